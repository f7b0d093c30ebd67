{{/* Named templates for the configuration and lists derived from it. daemonset/derive.py generates all other templates, not this file. */}}

{{- define "sds-agent.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* The namespace of the approver. */}}
{{- define "sds-agent.approverNamespace" -}}
{{ .Values.approver.namespace | default (printf "%s-approver" .Release.Namespace) }}
{{- end }}

{{/* The user name of the agents. */}}
{{- define "sds-agent.agents" -}}
system:serviceaccount:{{ .Release.Namespace }}:sds-agent
{{- end }}

{{/* config.yaml of the ConfigMap. */}}
{{- define "sds-agent.config" -}}
{{- $issuer := dict "name" .Values.issuer.name "kind" .Values.issuer.kind }}
{{- if ne .Values.issuer.group "cert-manager.io" }}
{{- $_ := set $issuer "group" .Values.issuer.group }}
{{- end }}
{{- $config := dict "issuer" (dict "certManager" (dict "issuerRef" $issuer)) "approver" (dict "annotations" list) }}
{{- with .Values.trust.configMap }}
{{- $source := dict "namespace" .namespace "name" .name }}
{{- if ne .key "ca.crt" }}
{{- $_ := set $source "key" .key }}
{{- end }}
{{- $_ := set $config "trust" (dict "sources" (list (dict "configMap" $source))) }}
{{- end }}
{{- if eq .Values.mode "perPod" }}
{{- $_ := set $config "sockets" (dict "shared" (dict "enabled" false) "perPod" (dict "enabled" true)) }}
{{- else if eq .Values.mode "both" }}
{{- $_ := set $config "sockets" (dict "perPod" (dict "enabled" true)) }}
{{- end }}
{{- toYaml (mergeOverwrite $config (deepCopy .Values.config)) }}
{{- end }}

{{/* Every issuer of the configuration and its profiles, with the namespace of its requests, as JSON. */}}
{{- define "sds-agent.guarded" -}}
{{- $config := include "sds-agent.config" . | fromYaml }}
{{- $default := $config.issuer.certManager }}
{{- $namespace := $default.namespace | default .Release.Namespace }}
{{- $all := list (dict "ref" $default.issuerRef "namespace" $namespace) }}
{{- range $config.profiles }}
{{- $all = append $all (dict "ref" (.issuerRef | default $default.issuerRef) "namespace" (.namespace | default $namespace)) }}
{{- end }}
{{- toJson (uniq $all) }}
{{- end }}

{{/* User names that may approve in addition to the approver, one per line. Default without an approver: cert-manager's own approver. */}}
{{- define "sds-agent.approvers" -}}
{{- $names := .Values.policy.approvers }}
{{- if not (or .Values.approver.enabled $names) }}
{{- $names = list "system:serviceaccount:cert-manager:cert-manager" }}
{{- end }}
{{- join "\n" $names }}
{{- end }}

{{/* User names of the controllers that sign, as JSON. An external issuer's controller has an account of its own, which the chart cannot know. */}}
{{- define "sds-agent.policySigners" -}}
{{- $default := list "system:serviceaccount:cert-manager:cert-manager" }}
{{- range include "sds-agent.guarded" . | fromJsonArray }}
{{- if and (ne (.ref.group | default "cert-manager.io") "cert-manager.io") (eq (toJson $.Values.policy.signers) (toJson $default)) }}
{{- fail (printf "policy.signers: add the user name of the controller that signs for %s %s; otherwise the policies reject its certificates" .ref.kind .ref.name) }}
{{- end }}
{{- end }}
{{- toJson .Values.policy.signers }}
{{- end }}

{{/* The guarded issuers as the policies list them, one per line. */}}
{{- define "sds-agent.issuers" -}}
{{- $lines := list }}
{{- range include "sds-agent.guarded" . | fromJsonArray }}
{{- $group := .ref.group | default "cert-manager.io" }}
{{- if ne $group "cert-manager.io" }}
{{- $lines = append $lines (printf "%s.%s/%s" .ref.kind $group .ref.name) }}
{{- else if and (eq .ref.kind "Issuer") (ne .namespace "workload") }}
{{- $lines = append $lines (printf "Issuer/%s/%s" .namespace .ref.name) }}
{{- else }}
{{- $lines = append $lines (printf "%s/%s" .ref.kind .ref.name) }}
{{- end }}
{{- end }}
{{- uniq $lines | join "\n" }}
{{- end }}

{{/* resourceNames of the approver's permission on `signers`. */}}
{{- define "sds-agent.signers" -}}
{{- $more := .Values.approver.signers }}
{{- $names := list }}
{{- range include "sds-agent.guarded" . | fromJsonArray }}
{{- $group := .ref.group | default "cert-manager.io" }}
{{- if and (eq $group "cert-manager.io") (eq .ref.kind "ClusterIssuer") }}
{{- $names = append $names (printf "clusterissuers.cert-manager.io/%s" .ref.name) }}
{{- else if and (eq $group "cert-manager.io") (eq .ref.kind "Issuer") (ne .namespace "workload") }}
{{- $names = append $names (printf "issuers.cert-manager.io/%s.%s" .namespace .ref.name) }}
{{- else if not $more }}
{{- fail (printf "approver.signers: name the signers for %s %s, which the chart cannot derive, such as issuers.example.com/namespace.name" .ref.kind .ref.name) }}
{{- end }}
{{- end }}
{{- concat $names $more | uniq | toJson }}
{{- end }}

{{/* Not empty if the configuration has a ClusterTrustBundle as a source of roots. */}}
{{- define "sds-agent.clusterTrustBundles" -}}
{{- $trust := (include "sds-agent.config" . | fromYaml).trust | default dict }}
{{- range concat ($trust.sources | default list) (values ($trust.federated | default dict)) }}
{{- if hasKey . "clusterTrustBundle" }}true{{ end }}
{{- end }}
{{- end }}

{{/* Not empty if requests for an issuer are created in the pods' namespaces. */}}
{{- define "sds-agent.workloadRequests" -}}
{{- range include "sds-agent.guarded" . | fromJsonArray }}
{{- if eq .namespace "workload" }}true{{ end }}
{{- end }}
{{- end }}
