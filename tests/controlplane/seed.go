// The objects that tests rely on: namespaces, cert-manager's accounts and roles, a
// private CA with the ClusterIssuer mesh-ca, and its root in a ConfigMap.

package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	cmapi "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	"github.com/cert-manager/cert-manager/pkg/controller/clusterissuers"
)

const (
	agentNamespace = "sds-agent"
	caSecret       = "ca-key-pair"
	issuerName     = "mesh-ca"
	rootsConfigMap = "mesh-roots"
)

var (
	clusterIssuers      = cmapi.SchemeGroupVersion.WithResource("clusterissuers")
	certificateRequests = cmapi.SchemeGroupVersion.WithResource("certificaterequests")
	serviceAccounts     = corev1.SchemeGroupVersion.WithResource("serviceaccounts")
)

// apply creates or updates an object, by server-side apply.
func (p *plane) apply(admin *clients, resource schema.GroupVersionResource, object *unstructured.Unstructured) error {
	_, err := admin.dynamic.Resource(resource).Namespace(object.GetNamespace()).
		Apply(p.ctx, object.GetName(), object, metav1.ApplyOptions{FieldManager: "controlplane", Force: true})
	if err != nil {
		return fmt.Errorf("cannot apply %s %q: %w", object.GetKind(), object.GetName(), err)
	}
	return nil
}

// applyTyped is apply for a typed object, which must carry its kind.
func (p *plane) applyTyped(admin *clients, resource schema.GroupVersionResource, object any) error {
	fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(object)
	if err != nil {
		return fmt.Errorf("cannot convert a %T: %w", object, err)
	}
	delete(fields, "status")
	return p.apply(admin, resource, &unstructured.Unstructured{Object: fields})
}

// seedBasics creates the objects that cert-manager needs before it can start.
func (p *plane) seedBasics(admin *clients) error {
	for _, name := range []string{certManagerNamespace, agentNamespace} {
		namespace := &corev1.Namespace{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
			ObjectMeta: metav1.ObjectMeta{Name: name},
		}
		if err := p.applyTyped(admin, corev1.SchemeGroupVersion.WithResource("namespaces"), namespace); err != nil {
			return err
		}
	}
	for _, name := range []string{"cert-manager", webhookName} {
		account := &corev1.ServiceAccount{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceAccount"},
			ObjectMeta: metav1.ObjectMeta{Namespace: certManagerNamespace, Name: name},
		}
		if err := p.applyTyped(admin, serviceAccounts, account); err != nil {
			return err
		}
	}
	return p.applyGrants(admin)
}

// seedIssuer creates the private CA, unless an earlier run on this directory did.
func (p *plane) seedIssuer(admin *clients) error {
	secrets := admin.kube.CoreV1().Secrets(certManagerNamespace)
	secret, err := secrets.Get(p.ctx, caSecret, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		root, err := newAuthority("sds-agent test mesh root")
		if err != nil {
			return err
		}
		key, err := encodeKey(root.key)
		if err != nil {
			return err
		}
		secret = &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: caSecret},
			Type:       corev1.SecretTypeTLS,
			Data: map[string][]byte{
				corev1.TLSCertKey: root.pem, corev1.TLSPrivateKeyKey: key, corev1.ServiceAccountRootCAKey: root.pem,
			},
		}
		if secret, err = secrets.Create(p.ctx, secret, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("cannot create the Secret %s: %w", caSecret, err)
		}
	} else if err != nil {
		return fmt.Errorf("cannot read the Secret %s: %w", caSecret, err)
	}

	roots := &corev1.ConfigMap{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{Namespace: certManagerNamespace, Name: rootsConfigMap},
		Data:       map[string]string{corev1.ServiceAccountRootCAKey: string(secret.Data[corev1.ServiceAccountRootCAKey])},
	}
	if err := p.applyTyped(admin, corev1.SchemeGroupVersion.WithResource("configmaps"), roots); err != nil {
		return err
	}
	issuer := &cmapi.ClusterIssuer{
		TypeMeta:   metav1.TypeMeta{APIVersion: cmapi.SchemeGroupVersion.String(), Kind: cmapi.ClusterIssuerKind},
		ObjectMeta: metav1.ObjectMeta{Name: issuerName},
		Spec:       cmapi.IssuerSpec{IssuerConfig: cmapi.IssuerConfig{CA: &cmapi.CAIssuer{SecretName: caSecret}}},
	}
	return p.applyTyped(admin, clusterIssuers, issuer)
}

// awaitAll returns when every object that tests may rely on exists.
func (p *plane) awaitAll(admin *clients, collector collector) error {
	const interval = 50 * time.Millisecond
	if slices.Contains(p.controllers, clusterissuers.ControllerName) {
		if err := p.await("ClusterIssuer "+issuerName+" is Ready", interval, func(ctx context.Context) (bool, error) {
			return issuerIsReady(ctx, admin)
		}); err != nil {
			return err
		}
	}
	csr, err := newCSR("probe")
	if err != nil {
		return err
	}
	if err := p.await("cert-manager's webhook admits requests", interval, func(ctx context.Context) (bool, error) {
		return webhookWorks(ctx, admin, csr)
	}); err != nil {
		return err
	}
	if err := p.await("the default service accounts exist", interval, func(ctx context.Context) (bool, error) {
		for _, namespace := range []string{"default", certManagerNamespace, agentNamespace} {
			if _, err := admin.kube.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{}); err != nil {
				return false, err
			}
		}
		return true, nil
	}); err != nil {
		return err
	}
	return p.await("the garbage collector watches every resource", interval, func(context.Context) (bool, error) {
		return collector(), nil
	})
}

func issuerIsReady(ctx context.Context, admin *clients) (bool, error) {
	object, err := admin.dynamic.Resource(clusterIssuers).Get(ctx, issuerName, metav1.GetOptions{})
	if err != nil {
		return false, err
	}
	issuer := &cmapi.ClusterIssuer{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, issuer); err != nil {
		return false, err
	}
	for _, condition := range issuer.Status.Conditions {
		if condition.Type == cmapi.IssuerConditionReady {
			return condition.Status == cmmeta.ConditionTrue, errors.New(condition.Message)
		}
	}
	return false, errors.New("it has no Ready condition")
}

// webhookWorks makes dry-run requests until the API server calls both webhooks: a valid
// request must come back with its requester filled in by the mutating webhook, and a
// request without a CSR must be rejected by the validating webhook.
func webhookWorks(ctx context.Context, admin *clients, csr []byte) (bool, error) {
	request := func(content []byte) (*unstructured.Unstructured, error) {
		object := &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": cmapi.SchemeGroupVersion.String(),
			"kind":       cmapi.CertificateRequestKind,
			"metadata":   map[string]any{"generateName": "probe-"},
			"spec": map[string]any{
				// An issuer that no policy guards: a resumed control plane may have policies.
				"issuerRef": map[string]any{"name": "probe", "kind": cmapi.ClusterIssuerKind},
				"request":   base64.StdEncoding.EncodeToString(content),
			},
		}}
		return admin.dynamic.Resource(certificateRequests).Namespace(agentNamespace).
			Create(ctx, object, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	}
	good, err := request(csr)
	if err != nil {
		return false, err
	}
	if name, _, _ := unstructured.NestedString(good.Object, "spec", "username"); name != administrator.name {
		return false, fmt.Errorf("a new request has the username %q", name)
	}
	if _, err := request([]byte("not a CSR")); err == nil {
		return false, errors.New("a request without a CSR was accepted")
	}
	return true, nil
}
