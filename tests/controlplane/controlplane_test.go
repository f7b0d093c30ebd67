// The properties on which the agent's own tests rely, checked with the program
// $CONTROLPLANE, or with one that is built here.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	admissionregistration "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	cmapi "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	cmclient "github.com/cert-manager/cert-manager/pkg/client/clientset/versioned"
)

const (
	testNode    = "node-a"
	testAccount = "agent"
	testPod     = "agent-x"
)

var program string

func TestMain(m *testing.M) {
	program = os.Getenv("CONTROLPLANE")
	if program == "" {
		dir, err := os.MkdirTemp("", "controlplane")
		if err != nil {
			panic(err)
		}
		program = filepath.Join(dir, "controlplane")
		if out, err := exec.Command("./build.sh", program).CombinedOutput(); err != nil {
			panic(string(out))
		}
		defer os.RemoveAll(dir)
	}
	m.Run()
}

// cluster is a running program and clients with its administrator's access.
type cluster struct {
	command *exec.Cmd
	stdin   io.Closer
	stderr  *bytes.Buffer
	config  *rest.Config
	kube    kubernetes.Interface
	cm      cmclient.Interface
}

func start(t *testing.T, dir string, args ...string) *cluster {
	t.Helper()
	c := &cluster{command: exec.Command(program, append([]string{"--dir", dir}, args...)...), stderr: &bytes.Buffer{}}
	c.command.Stderr = c.stderr
	var err error
	if c.stdin, err = c.command.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := c.command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := c.command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.command.Process.Kill() })
	line, _ := bufio.NewReader(stdout).ReadString('\n')
	kubeconfig, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "ready ")
	if !ok {
		_ = c.command.Wait()
		t.Fatalf("no ready line but %q; stderr: %s", line, c.stderr)
	}
	t.Logf("ready after %v", time.Since(began).Round(time.Millisecond))
	if c.config, err = clientcmd.BuildConfigFromFlags("", kubeconfig); err != nil {
		t.Fatal(err)
	}
	c.kube, c.cm = kubernetes.NewForConfigOrDie(c.config), cmclient.NewForConfigOrDie(c.config)
	return c
}

// end closes standard input, at which the program must end quickly without output.
func (c *cluster) end(t *testing.T) {
	t.Helper()
	_ = c.stdin.Close()
	ended := make(chan error, 1)
	go func() { ended <- c.command.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("ended with %v; stderr: %s", err, c.stderr)
		}
	case <-time.After(5 * time.Second):
		t.Error("still there 5 s after its standard input was closed")
	}
}

// agent creates a node, a pod on it and its account, with the permissions of an agent
// in its own namespace. It returns clients that use the pod's bound token.
func (c *cluster) agent(t *testing.T) (*corev1.Pod, kubernetes.Interface, cmclient.Interface) {
	t.Helper()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	meta := metav1.ObjectMeta{Name: testAccount, Namespace: agentNamespace}
	_, err := c.kube.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: testNode}}, metav1.CreateOptions{})
	must(err)
	_, err = c.kube.CoreV1().ServiceAccounts(agentNamespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{})
	must(err)
	_, err = c.kube.RbacV1().Roles(agentNamespace).Create(ctx, &rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
		rule([]string{"create", "get", "list", "watch", "delete"}, cmGroup, "certificaterequests"),
	}}, metav1.CreateOptions{})
	must(err)
	_, err = c.kube.RbacV1().RoleBindings(agentNamespace).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: meta,
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: testAccount},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: testAccount, Namespace: agentNamespace}},
	}, metav1.CreateOptions{})
	must(err)
	pod, err := c.kube.CoreV1().Pods(agentNamespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: testPod, Namespace: agentNamespace},
		Spec: corev1.PodSpec{
			NodeName: testNode, ServiceAccountName: testAccount,
			Containers: []corev1.Container{{Name: "agent", Image: "agent"}},
		},
	}, metav1.CreateOptions{})
	must(err)
	token, err := c.kube.CoreV1().ServiceAccounts(agentNamespace).CreateToken(ctx, testAccount, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{
			BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
		},
	}, metav1.CreateOptions{})
	must(err)
	config := rest.AnonymousClientConfig(c.config)
	config.BearerToken = token.Status.Token
	return pod, kubernetes.NewForConfigOrDie(config), cmclient.NewForConfigOrDie(config)
}

func certificateRequest(t *testing.T, name string) *cmapi.CertificateRequest {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := &url.URL{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/shop/sa/cart"}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return &cmapi.CertificateRequest{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: agentNamespace},
		Spec: cmapi.CertificateRequestSpec{
			Request:   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			IssuerRef: cmmeta.IssuerReference{Name: issuerName, Kind: cmapi.ClusterIssuerKind, Group: cmGroup},
			Duration:  &metav1.Duration{Duration: 5 * time.Minute},
			Usages:    []cmapi.KeyUsage{cmapi.UsageDigitalSignature, cmapi.UsageKeyEncipherment, cmapi.UsageServerAuth, cmapi.UsageClientAuth},
		},
	}
}

func conditionOf(request *cmapi.CertificateRequest, kind cmapi.CertificateRequestConditionType) cmmeta.ConditionStatus {
	for _, condition := range request.Status.Conditions {
		if condition.Type == kind {
			return condition.Status
		}
	}
	return ""
}

func eventually(t *testing.T, what string, limit time.Duration, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		if condition() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

func TestRequestIsApprovedSignedAndCollected(t *testing.T) {
	c := start(t, t.TempDir())
	ctx := t.Context()
	pod, kube, cm := c.agent(t)
	requests := cm.CertmanagerV1().CertificateRequests(agentNamespace)

	wanted := certificateRequest(t, "one")
	wanted.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}}
	began := time.Now()
	created, err := requests.Create(ctx, wanted, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}

	// The webhook records the requester, its pod and its node.
	if got, want := created.Spec.Username, "system:serviceaccount:sds-agent:agent"; got != want {
		t.Errorf("username %q, want %q", got, want)
	}
	node, err := c.kube.CoreV1().Nodes().Get(ctx, testNode, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for claim, want := range map[string]string{
		"node-name": testNode, "node-uid": string(node.UID), "pod-name": testPod, "pod-uid": string(pod.UID),
	} {
		if got := created.Spec.Extra["authentication.kubernetes.io/"+claim]; !slices.Equal(got, []string{want}) {
			t.Errorf("claim %s is %q, want %q", claim, got, want)
		}
	}

	// The approver approves and the CA signs.
	var issued *cmapi.CertificateRequest
	eventually(t, "Ready", 20*time.Second, func() bool {
		issued, err = requests.Get(ctx, created.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return conditionOf(issued, cmapi.CertificateRequestConditionReady) == cmmeta.ConditionTrue
	})
	t.Logf("issued after %v", time.Since(began).Round(time.Millisecond))
	if conditionOf(issued, cmapi.CertificateRequestConditionApproved) != cmmeta.ConditionTrue {
		t.Error("Ready, but not Approved")
	}
	roots, err := c.kube.CoreV1().ConfigMaps(certManagerNamespace).Get(ctx, rootsConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(roots.Data["ca.crt"])) {
		t.Fatal("mesh-roots holds no certificate")
	}
	block, _ := pem.Decode(issued.Status.Certificate)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("the certificate does not verify against mesh-roots: %v", err)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://cluster.local/ns/shop/sa/cart" {
		t.Errorf("URIs %v", leaf.URIs)
	}

	// The agent's token has exactly the permissions of its role.
	if _, err := kube.CoreV1().Secrets(agentNamespace).List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("the agent may list secrets: %v", err)
	}

	// Objects that the pod owns are deleted with it.
	now := int64(0)
	if err := c.kube.CoreV1().Pods(agentNamespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	eventually(t, "collected", 20*time.Second, func() bool {
		_, err := c.cm.CertmanagerV1().CertificateRequests(agentNamespace).Get(ctx, created.Name, metav1.GetOptions{})
		return apierrors.IsNotFound(err)
	})
	t.Logf("collected after %v", time.Since(began).Round(time.Millisecond))
	// The API server caches a valid token for ten seconds.
	eventually(t, "the token ends with its pod", 20*time.Second, func() bool {
		_, err := requests.List(ctx, metav1.ListOptions{})
		return apierrors.IsUnauthorized(err)
	})
	c.end(t)
}

func TestApprovalNeedsTheRight(t *testing.T) {
	dir := t.TempDir()
	c := start(t, dir, "--approve-signers", "issuers.cert-manager.io/*", "--audit")
	ctx := t.Context()
	_, _, cm := c.agent(t)
	if _, err := cm.CertmanagerV1().CertificateRequests(agentNamespace).Create(ctx, certificateRequest(t, "guarded"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	// cert-manager's approver no longer has permission for this signer. An account that
	// can write the status but not approve has none either.
	if _, err := c.kube.RbacV1().Roles(agentNamespace).Update(ctx, &rbacv1.Role{
		ObjectMeta: metav1.ObjectMeta{Name: testAccount, Namespace: agentNamespace},
		Rules:      []rbacv1.PolicyRule{rule([]string{"*"}, cmGroup, "certificaterequests", "certificaterequests/status")},
	}, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	approve := func(cm cmclient.Interface) error {
		requests := cm.CertmanagerV1().CertificateRequests(agentNamespace)
		request, err := requests.Get(ctx, "guarded", metav1.GetOptions{})
		if err != nil {
			return err
		}
		now := metav1.Now()
		request.Status.Conditions = append(request.Status.Conditions, cmapi.CertificateRequestCondition{
			Type: cmapi.CertificateRequestConditionApproved, Status: cmmeta.ConditionTrue,
			Reason: "Test", Message: "by hand", LastTransitionTime: &now,
		})
		_, err = requests.UpdateStatus(ctx, request, metav1.UpdateOptions{})
		return err
	}
	eventually(t, "the webhook refuses the approval", 10*time.Second, func() bool {
		err := approve(cm)
		return err != nil && strings.Contains(err.Error(), "does not have permissions to set approved/denied conditions")
	})
	eventually(t, "the webhook refuses cert-manager's own approver", 10*time.Second, func() bool {
		log, _ := os.ReadFile(filepath.Join(dir, "audit.log"))
		for _, line := range bytes.Split(log, []byte("\n")) {
			if bytes.Contains(line, []byte(`"username":"system:serviceaccount:cert-manager:cert-manager"`)) &&
				bytes.Contains(line, []byte(`/certificaterequests/guarded/status`)) && bytes.Contains(line, []byte(`does not have permissions`)) {
				return true
			}
		}
		return false
	})
	request, err := c.cm.CertmanagerV1().CertificateRequests(agentNamespace).Get(ctx, "guarded", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := conditionOf(request, cmapi.CertificateRequestConditionApproved); got != "" {
		t.Errorf("approved: %q", got)
	}

	// After a kill and a restart on its directory, no data is lost. Without the
	// restriction the same request is approved, and the old token still works.
	_ = c.command.Process.Kill()
	_ = c.command.Wait()
	if log, err := os.ReadFile(filepath.Join(dir, "audit.log")); err != nil || !bytes.Contains(log, []byte("system:serviceaccount:sds-agent:agent")) {
		t.Errorf("the audit log does not show the agent: %v", err)
	}
	c = start(t, dir)
	eventually(t, "issued after the restart", 20*time.Second, func() bool {
		request, err := c.cm.CertmanagerV1().CertificateRequests(agentNamespace).Get(ctx, "guarded", metav1.GetOptions{})
		return err == nil && conditionOf(request, cmapi.CertificateRequestConditionReady) == cmmeta.ConditionTrue
	})
	c.end(t)
}

func TestClusterBehavesLikeARealOne(t *testing.T) {
	c := start(t, t.TempDir())
	ctx := t.Context()

	// A new namespace gets its default account, and disappears when deleted.
	namespaces := c.kube.CoreV1().Namespaces()
	if _, err := namespaces.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "default service account", 10*time.Second, func() bool {
		_, err := c.kube.CoreV1().ServiceAccounts("shop").Get(ctx, "default", metav1.GetOptions{})
		return err == nil
	})
	if err := namespaces.Delete(ctx, "shop", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "namespace gone", 20*time.Second, func() bool {
		_, err := namespaces.Get(ctx, "shop", metav1.GetOptions{})
		return apierrors.IsNotFound(err)
	})

	// Namespace editors get cert-manager's permissions by aggregation.
	edit, err := c.kube.RbacV1().ClusterRoles().Get(ctx, "edit", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(edit.Rules, func(rule rbacv1.PolicyRule) bool { return slices.Contains(rule.Resources, "certificaterequests") }) {
		t.Error("the ClusterRole edit says nothing of certificaterequests")
	}

	// Policies are enforced.
	refuse := admissionregistration.Deny
	scope := admissionregistration.AllScopes
	if _, err := c.kube.AdmissionregistrationV1().ValidatingAdmissionPolicies().Create(ctx, &admissionregistration.ValidatingAdmissionPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "no-ca"},
		Spec: admissionregistration.ValidatingAdmissionPolicySpec{
			MatchConstraints: &admissionregistration.MatchResources{ResourceRules: []admissionregistration.NamedRuleWithOperations{{
				RuleWithOperations: admissionregistration.RuleWithOperations{
					Operations: []admissionregistration.OperationType{admissionregistration.Create},
					Rule:       admissionregistration.Rule{APIGroups: []string{cmGroup}, APIVersions: []string{"v1"}, Resources: []string{"certificaterequests"}, Scope: &scope},
				},
			}}},
			Validations: []admissionregistration.Validation{{Expression: "!has(object.spec.isCA) || !object.spec.isCA", Message: "no CA certificates"}},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.kube.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Create(ctx, &admissionregistration.ValidatingAdmissionPolicyBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "no-ca"},
		Spec: admissionregistration.ValidatingAdmissionPolicyBindingSpec{
			PolicyName: "no-ca", ValidationActions: []admissionregistration.ValidationAction{refuse},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the policy refuses", 20*time.Second, func() bool {
		request := certificateRequest(t, "ca")
		request.Spec.IsCA = true
		_, err := c.cm.CertmanagerV1().CertificateRequests(agentNamespace).Create(ctx, request, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err != nil && strings.Contains(err.Error(), "no CA certificates")
	})

	// Issuers of the other kinds get their status from their own controllers.
	issuers := c.cm.CertmanagerV1().Issuers(agentNamespace)
	for name, spec := range map[string]cmapi.IssuerConfig{
		"selfsigned": {SelfSigned: &cmapi.SelfSignedIssuer{}},
		"vault": {Vault: &cmapi.VaultIssuer{Server: "http://127.0.0.1:9", Path: "pki/sign/mesh", Auth: cmapi.VaultAuth{
			TokenSecretRef: &cmmeta.SecretKeySelector{LocalObjectReference: cmmeta.LocalObjectReference{Name: "none"}, Key: "token"},
		}}},
	} {
		if _, err := issuers.Create(ctx, &cmapi.Issuer{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: cmapi.IssuerSpec{IssuerConfig: spec}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		want := cmmeta.ConditionTrue
		if name == "vault" {
			want = cmmeta.ConditionFalse
		}
		eventually(t, "Issuer "+name, 10*time.Second, func() bool {
			issuer, err := issuers.Get(ctx, name, metav1.GetOptions{})
			return err == nil && len(issuer.Status.Conditions) == 1 && issuer.Status.Conditions[0].Status == want
		})
	}

	// A signal ends the program like the end of its input.
	if err := c.command.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	c.end(t)
}

// A DaemonSet's pod is created and bound, which needs the scheduler, and a Deployment's
// too, by a ReplicaSet.
func TestWorkloadsAreMadeAndBound(t *testing.T) {
	c := start(t, t.TempDir(), "--workloads", "--controllers", "")
	ctx := context.Background()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: testNode}}
	if _, err := c.kube.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	node.Status.Allocatable = corev1.ResourceList{corev1.ResourcePods: resource.MustParse("10")}
	if _, err := c.kube.CoreV1().Nodes().UpdateStatus(ctx, node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	template := corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "x"}},
		Spec: corev1.PodSpec{
			Containers:  []corev1.Container{{Name: "main", Image: "none"}},
			Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		},
	}
	selector := &metav1.LabelSelector{MatchLabels: template.Labels}
	daemons := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "x"}, Spec: appsv1.DaemonSetSpec{Selector: selector, Template: template}}
	if _, err := c.kube.AppsV1().DaemonSets("default").Create(ctx, daemons, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	deployment := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "x"}, Spec: appsv1.DeploymentSpec{Selector: selector, Template: template}}
	if _, err := c.kube.AppsV1().Deployments(agentNamespace).Create(ctx, deployment, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, namespace := range []string{"default", agentNamespace} {
		eventually(t, "a pod of "+namespace+" is bound", 30*time.Second, func() bool {
			pods, err := c.kube.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
			return err == nil && len(pods.Items) == 1 && pods.Items[0].Spec.NodeName == testNode
		})
	}
}

func TestTwoAtATime(t *testing.T) {
	dir := t.TempDir()
	one, two := start(t, dir), start(t, t.TempDir())
	out, err := exec.Command(program, "--dir", dir, "--stay").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another control plane is running") {
		t.Errorf("a second start in the same directory: %v, %s", err, out)
	}
	one.end(t)
	if _, err := two.kube.CoreV1().Namespaces().Get(t.Context(), agentNamespace, metav1.GetOptions{}); err != nil {
		t.Errorf("the second one suffers from the end of the first: %v", err)
	}
	two.end(t)
}

func TestNoInputIsExplained(t *testing.T) {
	out, err := exec.Command(program, "--dir", t.TempDir()).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "--stay") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestBadStartsAreOneSentence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"no directory":       {nil, "--dir is required"},
		"unknown flag":       {[]string{"--nope"}, "-nope"},
		"unknown controller": {[]string{"--dir", t.TempDir(), "--controllers", "*,-acme"}, `"acme" is not one of`},
		"directory is file":  {[]string{"--dir", file}, "cannot create --dir"},
		"bad server flag":    {[]string{"--dir", t.TempDir(), "--apiserver-arg", "--nope"}, "kube-apiserver rejects its flags"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			command := exec.CommandContext(ctx, program, c.args...)
			var stdout, stderr bytes.Buffer
			command.Stdout, command.Stderr = &stdout, &stderr
			hold, err := command.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			defer hold.Close()
			_ = command.Run()
			if code := command.ProcessState.ExitCode(); code != 1 {
				t.Errorf("exit code %d", code)
			}
			if stdout.Len() > 0 {
				t.Errorf("stdout: %s", &stdout)
			}
			if text := stderr.String(); !strings.Contains(text, c.want) || strings.Count(text, "\n") != 1 {
				t.Errorf("stderr: %s", text)
			}
		})
	}
}
