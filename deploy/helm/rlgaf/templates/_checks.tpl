{{/* Combinations of values that cannot work, refused with the reason. */}}
{{- define "rlgaf.checks" -}}
{{- $v := .Values -}}
{{- if and (eq $v.mode "RayJob") (not $v.run.config) (not $v.run.existingConfigMap) -}}
{{- fail "run.config is empty: give the run's TOML (--set-file run.config=run.toml) or name a ConfigMap in run.existingConfigMap" -}}
{{- end -}}
{{- if and $v.run.config $v.run.existingConfigMap -}}
{{- fail "run.config and run.existingConfigMap are both set: keep one" -}}
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
{{- if and $v.headFaultTolerance.enabled (eq $v.mode "RayJob") -}}
{{- fail "headFaultTolerance.enabled needs mode RayCluster or RayService: the driver of a RayJob runs in the head pod and dies with it; job.backoffLimit starts it again from its last checkpoint instead" -}}
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
{{- range $name := list "rollout" "learner" "discriminator" "cpu" -}}
{{- $group := include "rlgaf.group" (dict "root" $ "name" $name) | fromYaml -}}
{{- if or (gt (int $group.minReplicas) (int $group.maxReplicas)) -}}
{{- fail (printf "workers.%s: minReplicas = %d exceeds maxReplicas = %d" $name (int $group.minReplicas) (int $group.maxReplicas)) -}}
{{- end -}}
{{- if and $group.gpuType (not (int $group.gpus)) -}}
{{- fail (printf "workers.%s: gpuType = %s without gpus" $name $group.gpuType) -}}
{{- end -}}
{{- end -}}
{{- if eq (int (include "rlgaf.total" (dict "root" . "field" "cpus"))) 0 -}}
{{- fail "the cluster has no Ray CPUs: give workers.rollout (or another group) replicas, or raise head.rayCpus" -}}
{{- end -}}
{{- end -}}
