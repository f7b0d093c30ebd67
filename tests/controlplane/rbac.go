// The permissions of cert-manager, from the ClusterRoles of its chart, as far as the
// controllers here need them, and the roles that it provides for users.

package main

import (
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	cmGroup   = "cert-manager.io"
	acmeGroup = "acme.cert-manager.io"
)

// defaultApproveSigners is the chart's default: every Issuer and ClusterIssuer of
// cert-manager's own. An empty list allows all signers, as in the chart.
var defaultApproveSigners = []string{"issuers.cert-manager.io/*", "clusterissuers.cert-manager.io/*"}

var (
	read  = []string{"get", "list", "watch"}
	write = []string{"update", "patch"}
)

// rule allows these verbs on these resources of this group.
func rule(verbs []string, group string, resources ...string) rbacv1.PolicyRule {
	return rbacv1.PolicyRule{Verbs: verbs, APIGroups: []string{group}, Resources: resources}
}

// grant is a ClusterRole and, when it has an owner, its binding to that user.
type grant struct {
	name   string
	owner  user
	labels map[string]string
	rules  []rbacv1.PolicyRule
}

func (p *plane) grants() []grant {
	recordEvents := rule([]string{"create", "patch"}, "", "events")
	keepSecrets := rule([]string{"get", "list", "watch", "create", "update", "delete"}, "", "secrets")
	review := rule([]string{"create"}, "authorization.k8s.io", "subjectaccessreviews")

	approve := rule([]string{"approve"}, cmGroup, "signers")
	approve.ResourceNames = p.approveSigners

	aggregate := func(to ...string) map[string]string {
		labels := make(map[string]string)
		for _, role := range to {
			labels["rbac.authorization.k8s.io/aggregate-to-"+role] = "true"
		}
		return labels
	}
	return []grant{
		{name: "cert-manager-controller-issuers", owner: certManagerUser, rules: []rbacv1.PolicyRule{
			rule(write, cmGroup, "issuers", "issuers/status"), rule(read, cmGroup, "issuers"), keepSecrets, recordEvents,
		}},
		{name: "cert-manager-controller-clusterissuers", owner: certManagerUser, rules: []rbacv1.PolicyRule{
			rule(write, cmGroup, "clusterissuers", "clusterissuers/status"), rule(read, cmGroup, "clusterissuers"), keepSecrets, recordEvents,
		}},
		{name: "cert-manager-controller-certificates", owner: certManagerUser, rules: []rbacv1.PolicyRule{
			rule(write, cmGroup, "certificaterequests", "certificaterequests/status"),
			rule(read, cmGroup, "certificaterequests", "issuers", "clusterissuers"),
			rule([]string{"update"}, cmGroup, "certificaterequests/finalizers"),
			keepSecrets, rule([]string{"patch"}, "", "secrets"), recordEvents,
		}},
		{name: "cert-manager-controller-approve:cert-manager-io", owner: certManagerUser, rules: []rbacv1.PolicyRule{approve}},
		{name: "cert-manager-webhook:subjectaccessreviews", owner: webhookUser, rules: []rbacv1.PolicyRule{review}},

		{name: "cert-manager-view", labels: aggregate("view", "edit", "admin"), rules: []rbacv1.PolicyRule{
			rule(read, cmGroup, "certificates", "certificaterequests", "issuers"),
			rule(read, acmeGroup, "challenges", "orders"),
		}},
		{name: "cert-manager-edit", labels: aggregate("edit", "admin"), rules: []rbacv1.PolicyRule{
			rule([]string{"create", "delete", "deletecollection", "patch", "update"}, cmGroup, "certificates", "certificaterequests", "issuers"),
			rule([]string{"update"}, cmGroup, "certificates/status"),
			rule([]string{"delete", "deletecollection", "patch", "update"}, acmeGroup, "challenges"),
			rule([]string{"delete", "deletecollection"}, acmeGroup, "orders"),
		}},
	}
}

// applyGrants creates the roles and bindings.
func (p *plane) applyGrants(admin *clients) error {
	for _, g := range p.grants() {
		meta := metav1.ObjectMeta{Name: g.name, Labels: g.labels}
		role := &rbacv1.ClusterRole{
			TypeMeta: metav1.TypeMeta{APIVersion: "rbac.authorization.k8s.io/v1", Kind: "ClusterRole"}, ObjectMeta: meta, Rules: g.rules,
		}
		if err := p.applyTyped(admin, rbacv1.SchemeGroupVersion.WithResource("clusterroles"), role); err != nil {
			return err
		}
		if g.owner.name == "" {
			continue
		}
		binding := &rbacv1.ClusterRoleBinding{
			TypeMeta:   metav1.TypeMeta{APIVersion: "rbac.authorization.k8s.io/v1", Kind: "ClusterRoleBinding"},
			ObjectMeta: meta,
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: g.name},
			Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: g.owner.name}},
		}
		if err := p.applyTyped(admin, rbacv1.SchemeGroupVersion.WithResource("clusterrolebindings"), binding); err != nil {
			return err
		}
	}
	return nil
}
