//! The subjects that have a permission, by the roles and bindings of the cluster.

use std::collections::BTreeSet;

use agent_kube::Failure;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, Subject};
use kube::{Api, Client, ResourceExt};

use super::list;

/// Controllers of Kubernetes in kube-system that read every Secret or create pods.
const CONTROLLERS: [&str; 14] = [
    "bootstrap-signer",
    "cronjob-controller",
    "daemon-set-controller",
    "deployment-controller",
    "expand-controller",
    "generic-garbage-collector",
    "job-controller",
    "namespace-controller",
    "persistent-volume-binder",
    "replicaset-controller",
    "replication-controller",
    "statefulset-controller",
    "token-cleaner",
    "ttl-after-finished-controller",
];

/// Roles and bindings of the cluster.
pub(super) struct Rbac {
    cluster_roles: Vec<ClusterRole>,
    cluster_bindings: Vec<ClusterRoleBinding>,
    roles: Vec<Role>,
    bindings: Vec<RoleBinding>,
}

/// A permission.
pub(super) struct Wanted<'a> {
    pub(super) group: &'a str,
    pub(super) resource: &'a str,
    pub(super) verbs: &'a [&'a str],
    /// Names of objects, any of which suffices. Empty: a permission for all objects.
    pub(super) names: &'a [&'a str],
}

impl Wanted<'_> {
    fn is_in(&self, rule: &PolicyRule) -> bool {
        let has =
            |list: Option<&Vec<String>>, wanted: &[&str]| list.into_iter().flatten().any(|item| item == "*" || wanted.contains(&&**item));
        let limited = rule.resource_names.as_ref().is_some_and(|names| !names.is_empty());
        has(rule.api_groups.as_ref(), &[self.group])
            && has(rule.resources.as_ref(), &[self.resource])
            && has(Some(&rule.verbs), self.verbs)
            && (!limited || has(rule.resource_names.as_ref(), self.names))
    }
}

impl Rbac {
    /// Reads all roles and bindings.
    pub(super) async fn read(client: &Client) -> Result<Self, Failure> {
        Ok(Self {
            cluster_roles: list(&Api::all(client.clone()), "clusterroles.rbac.authorization.k8s.io", "").await?,
            cluster_bindings: list(&Api::all(client.clone()), "clusterrolebindings.rbac.authorization.k8s.io", "").await?,
            roles: list(&Api::all(client.clone()), "roles.rbac.authorization.k8s.io", "").await?,
            bindings: list(&Api::all(client.clone()), "rolebindings.rbac.authorization.k8s.io", "").await?,
        })
    }

    /// The subjects that have the permission in this namespace, or in the whole cluster. Accounts of Kubernetes' own components are left
    /// out.
    pub(super) fn subjects(&self, wanted: &Wanted<'_>, namespace: Option<&str>) -> BTreeSet<String> {
        let grants = |rules: Option<&Vec<PolicyRule>>| rules.into_iter().flatten().any(|rule| wanted.is_in(rule));
        let cluster_role = |name: &str| self.cluster_roles.iter().any(|role| role.name_any() == name && grants(role.rules.as_ref()));
        let mut out = BTreeSet::new();
        let mut add = |subjects: Option<&Vec<Subject>>, role: &str| {
            for subject in subjects.into_iter().flatten().filter(|subject| !is_of_kubernetes(subject)) {
                let place = subject.namespace.as_ref().map_or_else(String::new, |namespace| format!("{namespace}/"));
                out.insert(format!("{} {place}{} by {role}", subject.kind, subject.name));
            }
        };
        for binding in self.cluster_bindings.iter().filter(|binding| cluster_role(&binding.role_ref.name)) {
            add(binding.subjects.as_ref(), &format!("ClusterRole {}", binding.role_ref.name));
        }
        for binding in self.bindings.iter().filter(|binding| namespace.is_some() && binding.namespace().as_deref() == namespace) {
            let reference = &binding.role_ref;
            let own = |role: &&Role| role.namespace().as_deref() == namespace && role.name_any() == reference.name;
            let granted = match &*reference.kind {
                "ClusterRole" => cluster_role(&reference.name),
                _ => self.roles.iter().find(own).is_some_and(|role| grants(role.rules.as_ref())),
            };
            if granted {
                add(binding.subjects.as_ref(), &format!("{} {}", reference.kind, reference.name));
            }
        }
        out
    }
}

fn is_of_kubernetes(subject: &Subject) -> bool {
    match &*subject.kind {
        "ServiceAccount" => subject.namespace.as_deref() == Some("kube-system") && CONTROLLERS.contains(&&*subject.name),
        _ => subject.name.starts_with("system:kube-") || subject.name == "system:masters",
    }
}
