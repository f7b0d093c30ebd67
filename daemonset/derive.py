#!/usr/bin/env python3
"""Derives the chart's templates (chart/templates/*.yaml) from the manifests for kustomize, with their comments.

    daemonset/derive.py            writes the templates
    daemonset/derive.py --check    writes nothing, and fails if a template differs from what it would write

It needs only python3. It reads a manifest as indented lines, which suffices because all blocks of these manifests are indented by two
spaces. If a replacement does not find its text, nothing is written. tests/real_install/manifests.rs checks with kustomize and helm that
both give the same objects.
"""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
TEMPLATES = HERE / "chart/templates"
NAMESPACE = "{{ .Release.Namespace }}"


class Node:
    """A line with the comments and blank lines before it, and its indented lines."""

    def __init__(self, text, comments):
        self.text, self.comments, self.children = text, comments, []

    def key(self):
        body = self.text.strip()
        named = re.match(r"- \{? ?(?:name|path|apiGroups): ([^,}]+)", body)
        return ("item", named[1].strip()) if named else body.split(":")[0]

    def is_item(self):
        return self.text.lstrip().startswith("- ")

    def lines(self):
        yield from self.comments
        yield self.text
        for child in self.children:
            yield from child.lines()


def indent(text):
    return len(text) - len(text.lstrip())


def parse(text):
    """Parses a document into a tree of lines."""
    root, comments = Node("", []), []
    stack, block = [(-1, root)], None
    for line in text.rstrip("\n").split("\n"):
        # The lines of a block scalar are not parsed.
        if block is not None and (not line.strip() or indent(line) > block[0]):
            block[1].children.append(Node(line, []))
            continue
        block = None
        if not line.strip() or line.lstrip().startswith("#"):
            comments.append(line)
            continue
        while stack[-1][0] >= indent(line):
            stack.pop()
        node, comments = Node(line, comments), []
        stack[-1][1].children.append(node)
        stack.append((indent(line), node))
        if re.search(r": [|>]-?$", line):
            block = (indent(line), node)
    if comments:
        fail(f"comments at the end of a document: {comments[0]}")
    return root


def merge(base, patch):
    """Applies a patch as kustomize applies a strategic merge patch: the items of the patch come first in a list."""
    first = 0
    for new in patch.children:
        old = next((child for child in base.children if child.key() == new.key()), None)
        if new.is_item():
            if old is not None:
                base.children.remove(old)
            base.children.insert(first, old or new)
            first += 1
        if old is None:
            if not new.is_item():
                base.children.append(new)
        elif new.children and old.children:
            if new.text.strip() != old.text.strip() or not old.comments:
                old.comments = new.comments
            merge(old, new)
        else:
            old.text, old.comments, old.children = new.text, new.comments or old.comments, new.children


def find(root, path):
    for step in path:
        found = [child for child in root.children if child.key() == step or child.key() == ("item", step)]
        if len(found) != 1:
            fail(f"{step} of {'.'.join(path)}: found {len(found)} times, expected once")
        root = found[0]
    return root


def fail(why):
    sys.exit(f"daemonset/derive.py: {why}")


def load(*names):
    """The documents of a manifest; the other manifests patch the first document. Template syntax in a manifest is escaped."""
    first, *patches = [(HERE / name).read_text().replace("{{", '{{ "{{" }}') for name in names]
    documents = [parse(document) for document in re.split(r"^---\n", first, flags=re.M)]
    for patch in patches:
        merge(documents[0], parse(patch))
    return documents


def values(node, value, spaces):
    """Replaces the value of a key by one of the chart's values."""
    node.children = [Node(f"{' ' * spaces}{{{{- toYaml {value} | nindent {spaces} }}}}", [])]


def guarded(node, value):
    """Renders the key only if the chart's value is set."""
    node.comments.append(f"{' ' * indent(node.text)}{{{{- with {value} }}}}")
    values(node, ".", indent(node.text) + 2)
    node.children.append(Node(f"{' ' * indent(node.text)}{{{{- end }}}}", []))


def pod(root, of):
    """Inserts the chart's values for a pod: image, resources, node selector and pull secrets."""
    spec = find(root, ["spec", "template", "spec"])
    for container in find(spec, ["containers"]).children:
        find(container, ["image"]).text = '          image: {{ include "sds-agent.image" . }}'
        find(container, ["imagePullPolicy"]).text = "          imagePullPolicy: {{ .Values.image.pullPolicy }}"
        resources = ".Values.mountHelper" if container.key() == ("item", "mount-helper") else of
        values(find(container, ["resources"]), f"{resources}.resources", 12)
    guarded(find(spec, ["nodeSelector"]), f"{of}.nodeSelector")
    pull = Node("      imagePullSecrets:", [])
    guarded(pull, ".Values.imagePullSecrets")
    spec.children.insert(0, pull)
    return spec


def selinux(spec):
    options = Node("        seLinuxOptions:", [])
    guarded(options, ".Values.seLinuxOptions")
    find(spec, ["securityContext"]).children.append(options)


def text(documents):
    return "---\n".join("\n".join(line for child in root.children for line in child.lines()) + "\n" for root in documents)


def replaced(body, *edits):
    for old, new in edits:
        if old not in body:
            fail(f"nothing to replace: {old!r}")
        body = body.replace(old, new)
    return body


def when(condition, body):
    return f"{{{{- if {condition} }}}}\n{body}{{{{- end }}}}\n"


IN_NAMESPACE = ("namespace: sds-agent", f"namespace: {NAMESPACE}")
# To be replaced before `IN_NAMESPACE`, whose text it begins with.
OF_APPROVER = ("namespace: sds-agent-approver", 'namespace: {{ include "sds-agent.approverNamespace" . }}')

# Only the chart has these objects. With kustomize, a user adds a ClusterRoleBinding for each further account.
APPROVERS = """\
# The accounts of `policy.approvers`, which may set Approved and Denied in addition to the approver.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: sds-agent-approvals
rules:
  - apiGroups: [sds-agent.io]
    resources: [guardedissuers]
    verbs: [approve]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: sds-agent-approvals
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: sds-agent-approvals }
subjects:
  {{- range include "sds-agent.approvers" . | splitList "\\n" }}
  - { kind: User, apiGroup: rbac.authorization.k8s.io, name: {{ toJson . }} }
  {{- end }}
"""


def rollout(root, several, none):
    """Inserts the update strategy. `several` is the limit that the user sets, `none` the one that stays 0."""
    strategy = find(root, ["spec", "updateStrategy"])
    find(strategy, ["type"]).text = "    type: {{ .Values.updateStrategy.type }}"
    limits = find(strategy, ["rollingUpdate"])
    find(limits, [several]).text = f"      {several}: {{{{ .Values.updateStrategy.nodesAtOnce }}}}"
    if find(limits, [none]).text.strip() != f"{none}: 0":
        fail(f"{none} is not 0")
    limits.comments.append('    {{- if eq .Values.updateStrategy.type "RollingUpdate" }}')
    limits.children.append(Node("    {{- end }}", []))


def agent(mode, *patches):
    documents = load("base/daemonset.yaml", *patches)
    rollout(documents[0], *(("maxSurge", "maxUnavailable") if mode == "shared" else ("maxUnavailable", "maxSurge")))
    spec = pod(documents[0], ".Values")
    guarded(find(spec, ["tolerations"]), ".Values.tolerations")
    selinux(spec)
    return when(f'eq .Values.mode "{mode}"', replaced(text(documents), IN_NAMESPACE))


def templates():
    """Yields the name and content of each template."""
    approver = replaced(text(load("approver/namespace.yaml")), ("name: sds-agent-approver", 'name: {{ include "sds-agent.approverNamespace" . }}'))
    own = 'ne (include "sds-agent.approverNamespace" .) .Release.Namespace'
    yield "approver-namespace.yaml", when(f"and .Values.approver.enabled .Values.approver.createNamespace ({own})", approver)
    yield "namespace.yaml", when(".Values.createNamespace", replaced(text(load("base/namespace.yaml")), ("name: sds-agent", f"name: {NAMESPACE}")))

    roots = "{{ .Values.trust.configMap.%s }}"
    *agents, trust_role, trust_binding = load("base/rbac.yaml")
    body = replaced(text(agents), IN_NAMESPACE)
    trust = replaced(
        text([trust_role, trust_binding]), IN_NAMESPACE, ("namespace: cert-manager", "namespace: " + roots % "namespace"), ("[mesh-roots]", "[" + roots % "name" + "]")
    )
    yield "rbac.yaml", body + when(".Values.trust.configMap", "---\n" + trust)

    config = load("base/config.yaml")
    data = find(config[0], ["data"])
    for key in ("config.yaml", "agentUsernames", "issuers"):
        helper = {"config.yaml": "config", "agentUsernames": "agents", "issuers": "issuers"}[key]
        find(data, [key]).children = [Node(f'    {{{{- include "sds-agent.{helper}" . | nindent 4 }}}}', [])]
    find(data, ["maxDuration"]).text = "  maxDuration: {{ .Values.maxDuration }}"
    denied = '  {{- with .Values.deniedNodes }}\n  deniedNodes: {{ join "\\n" . | quote }}\n  {{- end }}\n'
    yield "config.yaml", replaced(text(config), IN_NAMESPACE) + denied

    shared, per_pod, both = (f"{mode}/daemonset.yaml" for mode in ("shared", "per-pod", "both"))
    yield "daemonset.yaml", agent("shared", shared) + agent("perPod", per_pod) + agent("both", per_pod, both)
    yield "csidriver.yaml", when('ne .Values.mode "shared"', text(load("per-pod/csidriver.yaml")))

    rbac = load("approver/rbac.yaml")
    rbac = replaced(
        text(rbac), OF_APPROVER, IN_NAMESPACE, ("[clusterissuers.cert-manager.io/mesh-ca]", '{{ include "sds-agent.signers" . }}'),
        # Without the policies, the right to delete would not be limited to ended requests.
        ("verbs: [get, list, watch, delete]", "verbs: [get, list, watch{{ if .Values.policy.enabled }}, delete{{ end }}]"),
        ("verbs: [approve, remove]", "verbs: [approve{{ if .Values.policy.enabled }}, remove{{ end }}]"),
    )
    yield "approver-rbac.yaml", when(".Values.approver.enabled", rbac)

    deployment = load("approver/deployment.yaml")
    find(deployment[0], ["spec", "replicas"]).text = "  replicas: {{ .Values.approver.replicas }}"
    spec = pod(deployment[0], ".Values.approver")
    for key in ("tolerations", "affinity"):
        guarded(find(spec, [key]), f".Values.approver.{key}")
    config_map = ("sds-agent/sds-agent", f"{NAMESPACE}/sds-agent")
    yield "approver-deployment.yaml", when(".Values.approver.enabled", replaced(text(deployment), OF_APPROVER, config_map))

    policy = replaced(
        text(load("approver/policy.yaml")),
        IN_NAMESPACE,
        ("sds-agent/sds-agent", NAMESPACE + "/sds-agent"),
        ('        ).exists(issuer, """ClusterIssuer/mesh-ca\n', '        ).exists(issuer, """{{ include "sds-agent.issuers" . | nindent 8 | trim }}\n'),
        ('        """ClusterIssuer/mesh-ca\n', '        """{{ include "sds-agent.issuers" . | nindent 8 | trim }}\n'),
        ('["sds-agent:break-glass"]', "{{ toJson .Values.policy.breakGlassGroups }}"),
        ('["system:serviceaccount:cert-manager:cert-manager"]', '{{ include "sds-agent.policySigners" . }}'),
        ("validationActions: [Deny]", "validationActions: {{ toJson .Values.policy.validationActions }}"),
        ("[clusterissuers.cert-manager.io/mesh-ca]", '{{ include "sds-agent.signers" . }}'),
        (
            '  - { kind: Group, apiGroup: rbac.authorization.k8s.io, name: "sds-agent:break-glass" }\n',
            "  {{- range .Values.policy.breakGlassGroups }}\n"
            "  - { kind: Group, apiGroup: rbac.authorization.k8s.io, name: {{ toJson . }} }\n"
            "  {{- end }}\n",
        ),
    )
    yield "approver-policy.yaml", when(".Values.policy.enabled", policy)
    yield "policy-approvers.yaml", when("and .Values.policy.enabled (include \"sds-agent.approvers\" .)", APPROVERS)

    mounts = replaced(
        text(load("socket-mounts/policy.yaml")),
        ("validationActions: [Audit, Warn]", "validationActions: {{ toJson .Values.policy.socketMounts.validationActions }}"),
    )
    yield "socket-mounts.yaml", when(".Values.policy.socketMounts.enabled", mounts)

    requests = replaced(text(load("workload-requests/rbac.yaml")), IN_NAMESPACE)
    yield "workload-requests.yaml", when('include "sds-agent.workloadRequests" .', requests)

    bundles = replaced(text(load("cluster-trust-bundles/rbac.yaml")), IN_NAMESPACE)
    yield "cluster-trust-bundles.yaml", when('include "sds-agent.clusterTrustBundles" .', bundles)

    metrics_from = ".Values.networkPolicy.metricsFrom"
    ingress = replaced(
        text(load("network-policy/networkpolicy.yaml")), OF_APPROVER, IN_NAMESPACE,
        ("    - from:\n", f"    - from:\n        {{{{- with {metrics_from} }}}}\n        {{{{- toYaml . | nindent 8 }}}}\n        {{{{- else }}}}\n"),
        ("name: monitoring\n", "name: monitoring\n        {{- end }}\n"),
        ("    # Replace `monitoring` by the namespace of your Prometheus.\n", ""),
    )
    yield "network-policy.yaml", when(".Values.networkPolicy.enabled", ingress)

    yield from monitoring()


def monitoring():
    enabled = ".Values.monitoring.enabled"
    scraped = ("[sds-agent]", f"[{NAMESPACE}]")
    approvers = '[{{ include "sds-agent.approverNamespace" . }}]'
    for kind, condition, further in (
        ("podmonitor", enabled, [IN_NAMESPACE, scraped]),
        ("podmonitor-approver", f"and {enabled} .Values.approver.enabled", [OF_APPROVER, ("[sds-agent-approver]", approvers)]),
        ("prometheusrule", enabled, [IN_NAMESPACE]),
    ):
        body = replaced(text(load(f"monitoring/{kind}.yaml")), *further)
        yield f"{kind}.yaml", when(condition, body)
    dashboard = [
        "apiVersion: v1", "kind: ConfigMap", "metadata:", "  name: sds-agent-dashboard", f"  namespace: {NAMESPACE}", "  labels:",
        '    grafana_dashboard: "1"', "data:", "  dashboard.json: |", '    {{- .Files.Get "dashboard.json" | nindent 4 }}', "",
    ]
    yield "dashboard.yaml", when(enabled, "\n".join(dashboard))
    yield "../dashboard.json", (HERE / "monitoring/dashboard.json").read_text()


def main():
    arguments = sys.argv[1:]
    if arguments not in ([], ["--check"]):
        fail("usage: daemonset/derive.py [--check]")
    note = "{{- /* Generated by daemonset/derive.py from the manifests beside the chart. Do not edit. */ -}}\n"
    wanted = {}
    for name, body in templates():
        wanted[(TEMPLATES / name).resolve()] = body if name.endswith(".json") else note + body
    stale = [path for path, body in wanted.items() if not path.exists() or path.read_text() != body]
    strays = [path for path in TEMPLATES.glob("*.yaml") if path.resolve() not in wanted]
    if arguments and (stale or strays):
        fail("these templates differ, run daemonset/derive.py: " + ", ".join(sorted(path.name for path in stale + strays)))
    for path in strays:
        path.unlink()
    for path in stale:
        path.write_text(wanted[path])


main()
