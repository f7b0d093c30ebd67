// cert-manager's real admission webhook. Only the webhook fills in a
// CertificateRequest's username, uid, groups and extra, and checks the permission to
// approve. Its package is internal to cert-manager, so the path of this module lies
// below cert-manager's.
//
// Only the listener is different, because cert-manager's binds every interface.

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"net/http"
	"time"

	admissionregistration "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/klog/v2"

	webhookconfig "github.com/cert-manager/cert-manager/internal/apis/config/webhook"
	cmwebhook "github.com/cert-manager/cert-manager/internal/webhook"
	"github.com/cert-manager/cert-manager/pkg/webhook/admission"
)

const webhookName = "cert-manager-webhook"

var webhookUser = serviceAccount(certManagerNamespace, webhookName)

func (p *plane) startWebhook(admin *clients) error {
	logger, err := openLog(p.dir, "cert-manager-webhook", p.verbosity)
	if err != nil {
		return err
	}
	kubeconfig := p.path("cert-manager-webhook.kubeconfig")
	if err := p.writeKubeconfig(kubeconfig, webhookUser); err != nil {
		return err
	}
	// The server is created for its admission chain and scheme; it never runs.
	chain, err := cmwebhook.NewCertManagerWebhookServer(logger, webhookconfig.WebhookConfiguration{KubeConfig: kubeconfig})
	if err != nil {
		return fmt.Errorf("cannot make cert-manager's webhook: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("/mutate", admission.NewCustomMutationWebhook(chain.MutationWebhook))
	mux.Handle("/validate", admission.NewCustomValidationWebhook(chain.ResourceScheme, chain.ValidationWebhook))

	certificate, key, err := p.keys.cluster.issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: webhookName},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return err
	}
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return fmt.Errorf("cannot use the webhook's certificate: %w", err)
	}
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("cannot listen for the webhook: %w", err)
	}
	server := &http.Server{
		Handler:           mux,
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{pair}},
		ReadHeaderTimeout: 30 * time.Second,
		BaseContext:       func(net.Listener) context.Context { return klog.NewContext(p.ctx, logger) },
	}
	p.run("cert-manager's webhook", func(context.Context) error { return server.ServeTLS(listener, "", "") })
	return p.registerWebhook(admin, "https://"+listener.Addr().String())
}

// registerWebhook creates both configurations with the rules of cert-manager's chart.
// They use a URL, because the cluster has no Services.
func (p *plane) registerWebhook(admin *clients, base string) error {
	var (
		allScopes  = admissionregistration.AllScopes
		fail       = admissionregistration.Fail
		equivalent = admissionregistration.Equivalent
		noEffects  = admissionregistration.SideEffectClassNone
		reviews    = []string{"v1"}
		timeout    = int32(30)
		name       = "webhook.cert-manager.io"
		typeMeta   = func(kind string) metav1.TypeMeta {
			return metav1.TypeMeta{APIVersion: "admissionregistration.k8s.io/v1", Kind: kind}
		}
		resource = func(name string) schema.GroupVersionResource {
			return admissionregistration.SchemeGroupVersion.WithResource(name)
		}
		clientFor = func(path string) admissionregistration.WebhookClientConfig {
			url := base + path
			return admissionregistration.WebhookClientConfig{URL: &url, CABundle: p.keys.cluster.pem}
		}
	)
	mutating := &admissionregistration.MutatingWebhookConfiguration{
		TypeMeta:   typeMeta("MutatingWebhookConfiguration"),
		ObjectMeta: metav1.ObjectMeta{Name: webhookName},
		Webhooks: []admissionregistration.MutatingWebhook{{
			Name:         name,
			ClientConfig: clientFor("/mutate"),
			Rules: []admissionregistration.RuleWithOperations{{
				Operations: []admissionregistration.OperationType{admissionregistration.Create},
				Rule: admissionregistration.Rule{
					APIGroups:   []string{"cert-manager.io"},
					APIVersions: []string{"v1"},
					Resources:   []string{"certificaterequests"},
					Scope:       &allScopes,
				},
			}},
			FailurePolicy: &fail, MatchPolicy: &equivalent, SideEffects: &noEffects,
			AdmissionReviewVersions: reviews, TimeoutSeconds: &timeout,
		}},
	}
	validating := &admissionregistration.ValidatingWebhookConfiguration{
		TypeMeta:   typeMeta("ValidatingWebhookConfiguration"),
		ObjectMeta: metav1.ObjectMeta{Name: webhookName},
		Webhooks: []admissionregistration.ValidatingWebhook{{
			Name:         name,
			ClientConfig: clientFor("/validate"),
			NamespaceSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{
				Key: "cert-manager.io/disable-validation", Operator: metav1.LabelSelectorOpNotIn, Values: []string{"true"},
			}}},
			Rules: []admissionregistration.RuleWithOperations{{
				Operations: []admissionregistration.OperationType{admissionregistration.Create, admissionregistration.Update},
				Rule: admissionregistration.Rule{
					APIGroups:   []string{"cert-manager.io", "acme.cert-manager.io"},
					APIVersions: []string{"v1"},
					Resources:   []string{"*/*"},
					Scope:       &allScopes,
				},
			}},
			FailurePolicy: &fail, MatchPolicy: &equivalent, SideEffects: &noEffects,
			AdmissionReviewVersions: reviews, TimeoutSeconds: &timeout,
		}},
	}
	if err := p.applyTyped(admin, resource("mutatingwebhookconfigurations"), mutating); err != nil {
		return err
	}
	return p.applyTyped(admin, resource("validatingwebhookconfigurations"), validating)
}
