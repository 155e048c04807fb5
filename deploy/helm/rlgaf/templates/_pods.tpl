{{- define "rlgaf.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser }}
runAsGroup: {{ .Values.security.runAsGroup }}
fsGroup: {{ .Values.security.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "rlgaf.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ .Values.security.readOnlyRootFilesystem }}
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Environment of a container with rlgaf in it: rlgaf.env (dict "root" . "secrets" (list "huggingFace")). HOME is writable, so caches that live
below it are too. */}}
{{- define "rlgaf.env" -}}
{{- $v := .root.Values -}}
- name: HOME
  value: /home/rlgaf
- name: USER
  value: rlgaf
- name: HF_HOME
  value: /cache/huggingface
{{- if eq $v.mode "RayService" }}
- name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
  value: services.endpoint:proxy_middleware
{{- end }}
- name: TORCHINDUCTOR_CACHE_DIR
  value: /home/rlgaf/.cache/torchinductor
- name: TORCH_EXTENSIONS_DIR
  value: /home/rlgaf/.cache/torch_extensions
- name: TRITON_CACHE_DIR
  value: /home/rlgaf/.cache/triton
- name: VLLM_CACHE_ROOT
  value: /home/rlgaf/.cache/vllm
- name: RAY_JOB_STOP_WAIT_TIME_S
  value: {{ $v.stop.jobWaitSeconds | quote }}
{{- if $v.autoscaling.enabled }}
- name: RLGAF_AUTOSCALED
  value: {{ include "rlgaf.total" (dict "root" $.root "field" "gpus") }} {{ include "rlgaf.total" (dict "root" $.root "field" "cpus") }} {{ $v.autoscaling.startTimeoutSeconds }}
{{- end }}
{{- range $name := .secrets }}
{{- with (index $v.secrets $name).name }}
{{- range $variable, $key := include "rlgaf.secretVariables" (dict "root" $.root "name" $name) | fromYaml }}
- name: {{ $variable }}
  valueFrom:
    secretKeyRef:
      name: {{ index $v.secrets $name "name" }}
      key: {{ $key }}
      {{- if eq $name "huggingFace" }}
      optional: true  # open models need none
      {{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- with $v.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Variables of one of the secrets, and their keys in it. */}}
{{- define "rlgaf.secretVariables" -}}
{{- if eq .name "objectStore" -}}
AWS_ACCESS_KEY_ID: AWS_ACCESS_KEY_ID
AWS_SECRET_ACCESS_KEY: AWS_SECRET_ACCESS_KEY
{{- else -}}
{{ get (dict "huggingFace" "HF_TOKEN" "scoring" "RLGAF_SCORE_TOKEN" "reward" "RLGAF_REWARD_TOKEN" "wandb" "WANDB_API_KEY") .name }}: {{ (index .root.Values.secrets .name).key }}
{{- end -}}
{{- end -}}

{{/* Secrets of a role's Ray container. Every process with a model asks the hub; the rest is the driver's, which is on the head. A RayService has no
driver, and its application is built on any node. */}}
{{- define "rlgaf.secretsOf" -}}
{{- $names := list "huggingFace" -}}
{{- if eq .root.Values.mode "RayService" -}}
{{- $names = append $names "scoring" -}}
{{- else if eq .role "head" -}}
{{- $names = concat $names (list "scoring" "reward" "wandb" "objectStore") -}}
{{- end -}}
{{- toYaml $names -}}
{{- end -}}

{{- define "rlgaf.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/rlgaf
- name: runs
  mountPath: /runs
- name: cache
  mountPath: /cache
- name: scripts
  mountPath: /etc/rlgaf/scripts
  readOnly: true
{{- if include "rlgaf.hasRun" . }}
- name: run
  mountPath: /etc/rlgaf/run
  readOnly: true
{{- end }}
{{- if .Values.data.existingClaim }}
- name: data
  mountPath: /data
  readOnly: true
{{- end }}
{{- end -}}

{{- define "rlgaf.hasRun" -}}
{{- if or .Values.run.config .Values.run.existingConfigMap }}yes{{ end -}}
{{- end -}}

{{/* Volumes of a pod; shmGiB of 0 leaves /dev/shm out. rlgaf.volumes (dict "root" . "shmGiB" 8) */}}
{{- define "rlgaf.volumes" -}}
{{- $v := .root.Values -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ $v.storage.scratch.tmp }}
- name: home
  emptyDir:
    sizeLimit: {{ $v.storage.scratch.home }}
- name: runs
  persistentVolumeClaim:
    claimName: {{ $v.storage.runs.existingClaim | default (printf "%s-runs" (include "rlgaf.fullname" .root)) }}
- name: cache
{{- if $v.storage.cache.enabled }}
  persistentVolumeClaim:
    claimName: {{ $v.storage.cache.existingClaim | default (printf "%s-cache" (include "rlgaf.fullname" .root)) }}
{{- else }}
  emptyDir: {}
{{- end }}
- name: scripts
  configMap:
    name: {{ include "rlgaf.fullname" .root }}-scripts
{{- if include "rlgaf.hasRun" .root }}
- name: run
  projected:
    sources:
      - configMap:
          name: {{ include "rlgaf.runConfigMap" .root }}
          items:
            - key: {{ $v.run.configKey }}
              path: run.toml
      - configMap:
          name: {{ include "rlgaf.fullname" .root }}-scripts
          items:
            - key: overrides.json
              path: overrides.json
{{- end }}
{{- if $v.data.existingClaim }}
- name: data
  persistentVolumeClaim:
    claimName: {{ $v.data.existingClaim }}
    readOnly: true
{{- end }}
{{- if .shmGiB }}
- name: shared-mem
  emptyDir:
    medium: Memory
    sizeLimit: {{ .shmGiB }}Gi
{{- end }}
{{- end -}}

{{- define "rlgaf.initContainers" -}}
{{- $root := .root -}}{{- $v := .root.Values -}}
{{- $steps := list -}}
{{- if and $v.data.prepare (eq .role "head") -}}
{{- $steps = append $steps (dict "name" "prepare-data" "command" $v.data.prepare "secrets" (list "huggingFace" "objectStore")) -}}
{{- end -}}
{{- if $v.data.waitFor -}}
{{- $steps = append $steps (dict "name" "wait-for-data" "command" (concat (list "sh" "/etc/rlgaf/scripts/wait_for_data.sh" (toString $v.data.waitTimeoutSeconds)) $v.data.waitFor)) -}}
{{- end -}}
{{- range $steps }}
- name: {{ .name }}
  image: {{ include "rlgaf.image" $root }}
  imagePullPolicy: {{ $v.image.pullPolicy }}
  command:
    {{- toYaml .command | nindent 4 }}
  workingDir: /runs
  resources:
    requests:
      cpu: 500m
      memory: 1Gi
    limits:
      cpu: "2"
      memory: 4Gi
  securityContext:
    {{- include "rlgaf.containerSecurity" $root | nindent 4 }}
  env:
    {{- include "rlgaf.env" (dict "root" $root "secrets" .secrets) | nindent 4 }}
  volumeMounts:
    {{- include "rlgaf.mounts" $root | nindent 4 }}
{{- end }}
{{- end -}}

{{/* Term of a pod affinity: the node of this release's workers. */}}
{{- define "rlgaf.besideWorkers" -}}
topologyKey: kubernetes.io/hostname
labelSelector:
  matchLabels:
    {{- include "rlgaf.selector" . | nindent 4 }}
  matchExpressions:
    - key: app.kubernetes.io/component
      operator: In
      values: [rollout, learner, discriminator, cpu]
{{- end -}}

{{/* Whether /runs can be mounted on one node only; the workers, who need its GPUs, choose it. */}}
{{- define "rlgaf.oneNode" -}}
{{- if and (ne .Values.storage.runs.accessMode "ReadWriteMany") (gt (int (include "rlgaf.pods" .)) 1) }}yes{{ end -}}
{{- end -}}

{{/* A Ray pod: rlgaf.pod (dict "root" . "role" "head" "pod" .Values.head) */}}
{{- define "rlgaf.pod" -}}
{{- $root := .root -}}{{- $v := .root.Values -}}{{- $pod := .pod -}}{{- $head := eq .role "head" -}}
metadata:
  labels:
    {{- include "rlgaf.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
  {{- with $pod.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include (ternary "rlgaf.headServiceAccount" "rlgaf.serviceAccount" $head) $root }}
  automountServiceAccountToken: {{ and $head $v.autoscaling.enabled }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $v.stop.graceSeconds }}
  securityContext:
    {{- include "rlgaf.podSecurity" $root | nindent 4 }}
  {{- with $v.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- if or $pod.priorityClassName $v.priorityClass.create }}
  priorityClassName: {{ $pod.priorityClassName | default (include "rlgaf.fullname" $root) }}
  {{- end }}
  {{- if or $pod.nodeSelector $pod.gpuType }}
  nodeSelector:
    {{- with $pod.gpuType }}
    {{ $pod.gpuTypeLabel }}: {{ . | quote }}
    {{- end }}
    {{- with $pod.nodeSelector }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  {{- with $pod.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $pod.affinity }}
  affinity:
    {{- toYaml $pod.affinity | nindent 4 }}
  {{- else if and $head (include "rlgaf.oneNode" $root) }}
  affinity:
    podAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        - {{- include "rlgaf.besideWorkers" $root | nindent 10 }}
  {{- end }}
  {{- if $pod.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range $pod.topologySpreadConstraints }}
    {{- $constraint := deepCopy . }}
    {{- if not $constraint.labelSelector }}
    {{- $_ := set $constraint "labelSelector" (dict "matchLabels" (mustMerge (dict "app.kubernetes.io/component" $.role) (include "rlgaf.selector" $root | fromYaml))) }}
    {{- end }}
    - {{- toYaml $constraint | nindent 6 }}
    {{- end }}
  {{- end }}
  {{- with include "rlgaf.initContainers" . }}
  initContainers:
    {{- . | trim | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ ternary "head" "worker" $head }}
      image: {{ include "rlgaf.image" $root }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      workingDir: /runs
      env:
        {{- include "rlgaf.env" (dict "root" $root "secrets" (include "rlgaf.secretsOf" . | fromYamlArray)) | nindent 8 }}
      ports:
        - name: metrics
          containerPort: 8080
        {{- if $head }}
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        - name: client
          containerPort: 10001
        - name: serve
          containerPort: 8000
        {{- end }}
      resources:
        requests:
          cpu: {{ $pod.cpus | quote }}
          memory: {{ $pod.memory }}
        limits:
          cpu: {{ $pod.cpus | quote }}
          memory: {{ $pod.memory }}
          {{- if $pod.gpus }}
          {{ $pod.gpuResource }}: {{ $pod.gpus | quote }}
          {{- end }}
      securityContext:
        {{- include "rlgaf.containerSecurity" $root | nindent 8 }}
      {{- $probe := dict "httpGet" (ternary (dict "path" "/api/gcs_healthz" "port" 8265) (dict "path" "/api/local_raylet_healthz" "port" 52365) $head) }}
      {{- /* A RayService's requests go to every ready worker; KubeRay adds the look at its Serve proxy only to a readiness probe of its own. */}}
      {{- $serves := and (eq $v.mode "RayService") (not $head) }}
      startupProbe:
        {{- toYaml $probe | nindent 8 }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 60
      readinessProbe:
        {{- toYaml (ternary (dict "httpGet" (dict "path" "/-/healthz" "port" 8000)) $probe $serves) | nindent 8 }}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: {{ ternary 1 6 $serves }}
      livenessProbe:
        {{- toYaml $probe | nindent 8 }}
        periodSeconds: 15
        timeoutSeconds: 10
        failureThreshold: 12
      lifecycle:
        preStop:
          exec:
            command: [python, /etc/rlgaf/scripts/pre_stop.py, {{ ternary (ternary "job-head" "head" (eq $v.mode "RayJob")) "worker" $head }}, {{ $v.stop.jobWaitSeconds | quote }}]
      volumeMounts:
        {{- include "rlgaf.mounts" $root | nindent 8 }}
        - name: shared-mem
          mountPath: /dev/shm
  volumes:
    {{- include "rlgaf.volumes" (dict "root" $root "shmGiB" $pod.shmGiB) | nindent 4 }}
{{- end -}}

{{/* Parameters of `ray start` for a pod. Three quarters of /dev/shm hold Ray's objects; NCCL and workers use the rest. */}}
{{- define "rlgaf.rayStartParams" -}}
num-cpus: {{ .cpus | quote }}
num-gpus: {{ .gpus | quote }}
object-store-memory: {{ mul .shmGiB 805306368 | quote }}
{{- end -}}
