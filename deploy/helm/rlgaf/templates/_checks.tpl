{{/* Combinations of values that cannot work, refused with the reason. */}}
{{- define "rlgaf.checks" -}}
{{- $v := .Values -}}
{{- if and (eq $v.mode "RayJob") (not $v.run.config) (not $v.run.existingConfigMap) -}}
{{- fail "run.config is empty: give the run's TOML (--set-file run.config=run.toml) or name a ConfigMap in run.existingConfigMap" -}}
{{- end -}}
{{- if and $v.run.config $v.run.existingConfigMap -}}
{{- fail "run.config and run.existingConfigMap are both set: keep one" -}}
{{- end -}}
{{- if and $v.networkPolicy.enabled (not $v.networkPolicy.operatorNamespace) -}}
{{- fail "networkPolicy.operatorNamespace is empty: name the namespace of KubeRay's operator, which alone may ask the pods how they are (kubectl get pods -A -l app.kubernetes.io/name=kuberay-operator)" -}}
{{- end -}}
{{- range $name, $text := dict "storage.mirror.url" $v.storage.mirror.url "run.config" $v.run.config "run.overrides" (toJson $v.run.overrides) -}}
{{- if regexMatch "://[^/?#\\s\"'@]*@" $text -}}
{{- fail (printf "%s has a URL with credentials, and everyone who may read the release's ConfigMaps would read them: put them into a Secret and name it in secrets" $name) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.mode "RayService") (not $v.service.args.run) -}}
{{- fail "mode RayService needs service.args.run: the folder of the finished run whose discriminator to serve, as in /runs/NAME" -}}
{{- end -}}
{{- if and (eq $v.mode "RayService") $v.service.args.gpu (eq (int (include "rlgaf.total" (dict "root" . "field" "gpus"))) 0) -}}
{{- fail "service.args.gpu gives each replica a GPU, and no worker group has any: set gpus and replicas of workers.discriminator" -}}
{{- end -}}
{{- if and (eq $v.mode "RayService") (not $v.secrets.scoring.name) -}}
{{- fail "mode RayService needs secrets.scoring.name: the Secret with the bearer token that callers must send" -}}
{{- end -}}
{{- if and $v.scoring.http (not $v.secrets.scoring.name) -}}
{{- fail "scoring.http needs secrets.scoring.name: the Secret with the bearer token that callers must send" -}}
{{- end -}}
{{- if and $v.scoring.http (ne $v.mode "RayJob") -}}
{{- fail "scoring.http opens the endpoint of a training run that the chart starts: it needs mode RayJob. In mode RayCluster set discriminator.scoring.http in the run you submit; RayService serves by itself" -}}
{{- end -}}
{{- if and (or $v.storage.mirror.url $v.run.overrides) (or (eq $v.mode "RayService") (not (include "rlgaf.hasRun" .))) -}}
{{- fail "storage.mirror.url and run.overrides change the run that the chart brings, and this release brings none: they need run.config or run.existingConfigMap in mode RayJob or RayCluster. Set run.mirror and the other fields in the run you submit" -}}
{{- end -}}
{{- if and $v.headFaultTolerance.enabled (eq $v.mode "RayJob") -}}
{{- fail "headFaultTolerance.enabled needs mode RayCluster or RayService: the driver of a RayJob runs in the head pod and dies with it; job.backoffLimit (and job.attempt, where a lost node took the head along) starts it again from its last checkpoint instead" -}}
{{- end -}}
{{- if and $v.headFaultTolerance.enabled (not $v.headFaultTolerance.redisAddress) -}}
{{- fail "headFaultTolerance.enabled needs headFaultTolerance.redisAddress, as in redis:6379" -}}
{{- end -}}
{{- if ge (int $v.stop.jobWaitSeconds) (int $v.stop.graceSeconds) -}}
{{- fail (printf "stop.jobWaitSeconds = %d must be below stop.graceSeconds = %d: the checkpoint is written inside the pod's grace period" (int $v.stop.jobWaitSeconds) (int $v.stop.graceSeconds)) -}}
{{- end -}}
{{- if and (eq $v.gangScheduling.scheduler "kueue") (not $v.gangScheduling.queue) -}}
{{- fail "gangScheduling.scheduler = kueue needs gangScheduling.queue, the name of a LocalQueue" -}}
{{- end -}}
{{- if and (eq $v.gangScheduling.scheduler "kueue") (eq $v.mode "RayJob") (not $v.job.deleteClusterWhenFinished) -}}
{{- fail "gangScheduling.scheduler = kueue needs job.deleteClusterWhenFinished: Kueue refuses RayJobs that keep their cluster" -}}
{{- end -}}
{{- if and (ne $v.gangScheduling.scheduler "none") $v.autoscaling.enabled -}}
{{- fail "gangScheduling and autoscaling.enabled exclude each other: a gang is placed whole, an autoscaled group grows pod by pod" -}}
{{- end -}}
{{- if and (eq $v.gangScheduling.scheduler "none") (or $v.gangScheduling.queue $v.gangScheduling.priorityClass) -}}
{{- fail "gangScheduling.queue and gangScheduling.priorityClass do nothing while gangScheduling.scheduler is none" -}}
{{- end -}}
{{- if and (eq $v.gangScheduling.scheduler "yunikorn") $v.gangScheduling.priorityClass -}}
{{- fail "gangScheduling.priorityClass does nothing with yunikorn, which goes by the priority of the pods: set head.priorityClassName and workerDefaults.priorityClassName" -}}
{{- end -}}
{{- range $name, $volume := dict "runs" $v.storage.runs "cache" $v.storage.cache -}}
{{- if and (eq $volume.accessMode "ReadWriteOncePod") (or (eq $name "runs") $volume.enabled) (gt (int (include "rlgaf.pods" $)) 1) -}}
{{- fail (printf "storage.%s.accessMode = ReadWriteOncePod lets a single pod mount the volume, and head and workers all do: ReadWriteMany, or ReadWriteOnce where they share a node" $name) -}}
{{- end -}}
{{- end -}}
{{- $least := 0 -}}
{{- range $name := list "rollout" "learner" "discriminator" "cpu" -}}
{{- $group := include "rlgaf.group" (dict "root" $ "name" $name) | fromYaml -}}
{{- if or (gt (int $group.minReplicas) (int $group.maxReplicas)) -}}
{{- fail (printf "workers.%s: minReplicas = %d exceeds maxReplicas = %d" $name (int $group.minReplicas) (int $group.maxReplicas)) -}}
{{- end -}}
{{- $least = add $least (int $group.minReplicas) -}}
{{- if and $group.gpuType (not (int $group.gpus)) -}}
{{- fail (printf "workers.%s: gpuType = %s without gpus" $name $group.gpuType) -}}
{{- end -}}
{{- end -}}
{{- if and (include "rlgaf.oneNode" .) (eq (int $least) 0) (not $v.head.affinity) -}}
{{- fail "storage.runs.accessMode = ReadWriteOnce and no group with minReplicas above 0: the head would come first and bind the volume to a node of its own choice. Set minReplicas of a group, or head.affinity for the workers' node, or use ReadWriteMany" -}}
{{- end -}}
{{- if eq (int (include "rlgaf.total" (dict "root" . "field" "cpus"))) 0 -}}
{{- fail "the cluster has no Ray CPUs: give workers.rollout (or another group) replicas, or raise head.rayCpus" -}}
{{- end -}}
{{- end -}}
