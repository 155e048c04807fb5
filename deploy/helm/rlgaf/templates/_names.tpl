{{/* Names and labels. They depend on release and values only, never on a revision: an upgrade changes objects in place. */}}

{{- define "rlgaf.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Name of the Ray object. A RayJob runs once, so each attempt has an object of its own; its name may have 47 characters. */}}
{{- define "rlgaf.rayName" -}}
{{- if eq .Values.mode "RayJob" -}}
{{ include "rlgaf.fullname" . }}-{{ .Values.job.attempt }}
{{- else -}}
{{ include "rlgaf.fullname" . }}
{{- end -}}
{{- end -}}

{{/* Host name of the service in front of the head. A RayJob's cluster has a random name, so the chart brings its own. */}}
{{- define "rlgaf.headService" -}}
{{ include "rlgaf.fullname" . }}{{ if eq .Values.mode "RayJob" }}-head{{ else }}-head-svc{{ end }}
{{- end -}}

{{- define "rlgaf.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "rlgaf.labels" -}}
{{ include "rlgaf.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Labels by which KubeRay's batch schedulers and Kueue know a Ray object. */}}
{{- define "rlgaf.gangLabels" -}}
{{- $gang := .Values.gangScheduling -}}
{{- if eq $gang.scheduler "volcano" }}
ray.io/scheduler-name: volcano
{{- with $gang.queue }}
volcano.sh/queue-name: {{ . }}
{{- end }}
{{- with $gang.priorityClass }}
ray.io/priority-class-name: {{ . }}
{{- end }}
{{- else if eq $gang.scheduler "yunikorn" }}
ray.io/gang-scheduling-enabled: "true"
yunikorn.apache.org/app-id: {{ include "rlgaf.rayName" . }}
{{- with $gang.queue }}
yunikorn.apache.org/queue: {{ . }}
{{- end }}
{{- else if eq $gang.scheduler "kueue" }}
kueue.x-k8s.io/queue-name: {{ $gang.queue }}
{{- with $gang.priorityClass }}
kueue.x-k8s.io/priority-class: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "rlgaf.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "rlgaf.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "rlgaf.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end -}}

{{/* The head's account is apart only where the autoscaler needs rights, which KubeRay binds to it. */}}
{{- define "rlgaf.headServiceAccount" -}}
{{ include "rlgaf.serviceAccount" . }}{{ if and .Values.autoscaling.enabled .Values.serviceAccount.create }}-head{{ end }}
{{- end -}}

{{- define "rlgaf.runConfigMap" -}}
{{ .Values.run.existingConfigMap | default (printf "%s-run" (include "rlgaf.fullname" .)) }}
{{- end -}}

{{/* One worker group: the defaults with the group's own values over them. */}}
{{- define "rlgaf.group" -}}
{{- $group := mustMergeOverwrite (deepCopy .root.Values.workerDefaults) (index .root.Values.workers .name) -}}
{{- if kindIs "invalid" $group.minReplicas }}{{ $_ := set $group "minReplicas" $group.replicas }}{{ end -}}
{{- if kindIs "invalid" $group.maxReplicas }}{{ $_ := set $group "maxReplicas" $group.replicas }}{{ end -}}
{{- if not .root.Values.autoscaling.enabled }}{{ $_ := set $group "minReplicas" $group.replicas }}{{ $_ := set $group "maxReplicas" $group.replicas }}{{ end -}}
{{- toYaml $group -}}
{{- end -}}

{{/* Sum of a field over the head (its Ray CPUs) and all groups at their largest: rlgaf.total (dict "root" . "field" "gpus") */}}
{{- define "rlgaf.total" -}}
{{- $sum := ternary .root.Values.head.rayCpus 0 (eq .field "cpus") | int -}}
{{- $root := .root -}}{{- $field := .field -}}
{{- range $name := list "rollout" "learner" "discriminator" "cpu" -}}
{{- $group := include "rlgaf.group" (dict "root" $root "name" $name) | fromYaml -}}
{{- $sum = add $sum (mul (int $group.maxReplicas) (int (index $group $field))) -}}
{{- end -}}
{{- $sum -}}
{{- end -}}

{{/* Pods of the cluster: the head and every group at its largest. */}}
{{- define "rlgaf.pods" -}}
{{- $sum := 1 -}}{{- $root := . -}}
{{- range $name := list "rollout" "learner" "discriminator" "cpu" -}}
{{- $sum = add $sum (int (include "rlgaf.group" (dict "root" $root "name" $name) | fromYaml).maxReplicas) -}}
{{- end -}}
{{- $sum -}}
{{- end -}}
