{{/* What the job runs. In mode RayCluster NOTES.txt prints it for `ray job submit`. Ray runs it in a shell: without exec a stopped driver would
become a child of the container's first process, `ray start`, which never collects it, and the job would count as running for all of stop.jobWaitSeconds. */}}
{{- define "rlgaf.entrypoint" -}}
exec python /etc/rlgaf/scripts/start.py /etc/rlgaf/run/run.toml /etc/rlgaf/run/overrides.json
{{- end -}}

{{/* Overrides of the run's TOML: where runs are written and copied to, the scoring endpoint, and the user's own. */}}
{{- define "rlgaf.overrides" -}}
{{- $words := list "--run.output=/runs" -}}
{{- with .Values.storage.mirror.url -}}
{{- $words = append $words (printf "--run.mirror=%s" .) -}}
{{- end -}}
{{- if .Values.scoring.http -}}
{{- $words = concat $words (list "--discriminator.scoring.http=true" "--discriminator.scoring.http_host=0.0.0.0" "--discriminator.scoring.http_port=8000") -}}
{{- end -}}
{{- concat $words .Values.run.overrides | toJson -}}
{{- end -}}
