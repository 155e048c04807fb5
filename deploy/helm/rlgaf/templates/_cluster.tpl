{{/* The RayCluster's spec, the same in all three modes. */}}
{{- define "rlgaf.clusterSpec" -}}
{{- include "rlgaf.checks" . -}}
{{- $root := . -}}{{- $v := .Values -}}
rayVersion: {{ $v.rayVersion | quote }}
{{- if $v.secrets.rayToken.enabled }}
authOptions:
  mode: token
  {{- with $v.secrets.rayToken.name }}
  secretName: {{ . }}
  {{- end }}
{{- end }}
{{- /* No externalStorageNamespace: KubeRay takes the cluster's UID, which a restarted head keeps. One name for both clusters of a RayService
that is upgraded would load the old one's state into the new one, and be deleted with the old one. */}}
{{- if $v.headFaultTolerance.enabled }}
gcsFaultToleranceOptions:
  redisAddress: {{ $v.headFaultTolerance.redisAddress | quote }}
  {{- if $v.headFaultTolerance.passwordSecret.name }}
  redisPassword:
    valueFrom:
      secretKeyRef:
        name: {{ $v.headFaultTolerance.passwordSecret.name }}
        key: {{ $v.headFaultTolerance.passwordSecret.key }}
  {{- end }}
{{- end }}
{{- if $v.autoscaling.enabled }}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ $v.autoscaling.idleTimeoutSeconds }}
  resources:
    requests:
      cpu: {{ $v.autoscaling.cpu }}
      memory: {{ $v.autoscaling.memory }}
    limits:
      cpu: {{ $v.autoscaling.cpu }}
      memory: {{ $v.autoscaling.memory }}
  securityContext:
    {{- include "rlgaf.containerSecurity" . | nindent 4 }}
{{- end }}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams:
    dashboard-host: 0.0.0.0
    {{- include "rlgaf.rayStartParams" (dict "cpus" $v.head.rayCpus "gpus" 0 "shmGiB" $v.head.shmGiB) | nindent 4 }}
  template:
    {{- include "rlgaf.pod" (dict "root" . "role" "head" "pod" $v.head) | nindent 4 }}
workerGroupSpecs:
  {{- range $name := list "rollout" "learner" "discriminator" "cpu" }}
  {{- $group := include "rlgaf.group" (dict "root" $root "name" $name) | fromYaml }}
  {{- if $group.maxReplicas }}
  - groupName: {{ $name }}
    replicas: {{ $group.minReplicas }}
    minReplicas: {{ $group.minReplicas }}
    maxReplicas: {{ $group.maxReplicas }}
    rayStartParams:
      {{- include "rlgaf.rayStartParams" $group | nindent 6 }}
    template:
      {{- include "rlgaf.pod" (dict "root" $root "role" $name "pod" $group) | nindent 6 }}
  {{- end }}
  {{- end }}
{{- end -}}
