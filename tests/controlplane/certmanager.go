// cert-manager's real controllers for CertificateRequests and issuers, run as its own
// controller binary runs them, with the permissions of its chart.

package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"k8s.io/klog/v2"

	"github.com/cert-manager/cert-manager/pkg/controller"
	"github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/approver"
	crca "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/ca"
	crselfsigned "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/selfsigned"
	crvault "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/vault"
	"github.com/cert-manager/cert-manager/pkg/controller/clusterissuers"
	"github.com/cert-manager/cert-manager/pkg/controller/issuers"

	// Issuer types: importing them registers them.
	_ "github.com/cert-manager/cert-manager/pkg/issuer/ca"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/selfsigned"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/vault"
)

const (
	certManagerNamespace = "cert-manager"

	// The values of cert-manager's own binary: five workers for each controller, and a
	// client-side limit that it removes when the API server has priority and fairness.
	certManagerWorkers = 5
	certManagerQPS     = 20
	certManagerBurst   = 50
)

var (
	certManagerUser = serviceAccount(certManagerNamespace, "cert-manager")

	certManagerControllers = []string{
		issuers.ControllerName, clusterissuers.ControllerName, approver.ControllerName,
		crca.CRControllerName, crselfsigned.CRControllerName, crvault.CRControllerName,
	}
)

// selectControllers reads the --controllers flag: "*" means all, a leading "-" excludes
// one, in any order.
func selectControllers(wanted []string) ([]string, error) {
	chosen := make(map[string]bool)
	for _, word := range wanted {
		name, removed := strings.CutPrefix(word, "-")
		if !slices.Contains(certManagerControllers, name) && word != "*" {
			return nil, fmt.Errorf("--controllers: %q is not one of %s", name, strings.Join(certManagerControllers, ", "))
		}
		if !removed && word != "*" {
			chosen[name] = true
		}
	}
	var names []string
	for _, name := range certManagerControllers {
		all := slices.Contains(wanted, "*")
		if (all || chosen[name]) && !slices.Contains(wanted, "-"+name) {
			names = append(names, name)
		}
	}
	return names, nil
}

func (p *plane) startCertManager() error {
	if len(p.controllers) == 0 {
		return nil
	}
	logger, err := openLog(p.dir, "cert-manager", p.verbosity)
	if err != nil {
		return err
	}
	kubeconfig := p.path("cert-manager.kubeconfig")
	if err := p.writeKubeconfig(kubeconfig, certManagerUser); err != nil {
		return err
	}
	ctx := klog.NewContext(p.ctx, logger)
	factory, err := controller.NewContextFactory(ctx, controller.ContextOptions{
		Kubeconfig:         kubeconfig,
		KubernetesAPIQPS:   certManagerQPS,
		KubernetesAPIBurst: certManagerBurst,
		IssuerOptions: controller.IssuerOptions{
			ClusterResourceNamespace:        certManagerNamespace,
			ClusterIssuerAmbientCredentials: true,
		},
	})
	if err != nil {
		return fmt.Errorf("cannot set up cert-manager: %w", err)
	}
	for _, name := range p.controllers {
		part, err := controller.Known()[name](factory)
		if err != nil {
			return fmt.Errorf("cannot make cert-manager's controller %s: %w", name, err)
		}
		p.run("cert-manager's controller "+name, func(context.Context) error {
			return part.Run(certManagerWorkers, ctx)
		})
	}
	shared, err := factory.Build()
	if err != nil {
		return fmt.Errorf("cannot set up cert-manager's informers: %w", err)
	}
	shared.SharedInformerFactory.Start(ctx.Done())
	shared.KubeSharedInformerFactory.Start(ctx.Done())
	shared.HTTP01ResourceMetadataInformersFactory.Start(ctx.Done())
	return nil
}
