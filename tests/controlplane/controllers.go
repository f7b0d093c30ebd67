// The controllers of kube-controller-manager on which tests rely: the garbage
// collector, namespaces, default service accounts, the root CA ConfigMap and aggregated
// ClusterRoles. Each uses the account that it has in a real cluster.

package main

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/restmapper"
	"k8s.io/controller-manager/pkg/informerfactory"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller/certificates/rootcacertpublisher"
	"k8s.io/kubernetes/pkg/controller/clusterroleaggregation"
	"k8s.io/kubernetes/pkg/controller/garbagecollector"
	namespaces "k8s.io/kubernetes/pkg/controller/namespace"
	"k8s.io/kubernetes/pkg/controller/serviceaccount"
)

const (
	resync = 12 * time.Hour

	// The interval at which the garbage collector looks for new CRDs: 30 s in a real
	// cluster. A shorter one saves time in tests that install their own CRDs.
	collectorSync = 10 * time.Second
)

// collector returns whether the garbage collector watches everything.
type collector func() bool

func (p *plane) startKubeControllers() (collector, error) {
	logger, err := openLog(p.dir, "kube-controllers", p.verbosity)
	if err != nil {
		return nil, err
	}
	ctx := klog.NewContext(p.ctx, logger)

	users := make(map[string]*clients)
	for _, account := range []string{
		"generic-garbage-collector", "namespace-controller", "service-account-controller",
		"root-ca-cert-publisher", "clusterrole-aggregation-controller",
	} {
		if users[account], err = p.clients(serviceAccount("kube-system", account)); err != nil {
			return nil, err
		}
	}
	reader, err := p.clients(controllerManager)
	if err != nil {
		return nil, err
	}
	shared := informers.NewSharedInformerFactory(reader.kube, resync)
	sharedMetadata := metadatainformer.NewSharedInformerFactory(reader.metadata, resync)
	started := make(chan struct{})

	gc := users["generic-garbage-collector"]
	gcIgnored := make(map[schema.GroupResource]struct{})
	for resource := range garbagecollector.DefaultIgnoredResources() {
		gcIgnored[resource] = struct{}{}
	}
	garbage, err := garbagecollector.NewGarbageCollector(ctx, gc.kube, gc.metadata,
		restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(gc.discovery)),
		gcIgnored, informerfactory.NewInformerFactory(shared, sharedMetadata), started)
	if err != nil {
		return nil, fmt.Errorf("cannot make the garbage collector: %w", err)
	}

	ns := users["namespace-controller"]
	namespaceController := namespaces.NewNamespaceController(ctx, ns.kube, ns.metadata,
		ns.discovery.ServerPreferredNamespacedResources,
		shared.Core().V1().Namespaces(), 5*time.Minute, corev1.FinalizerKubernetes)

	accounts, err := serviceaccount.NewServiceAccountsController(logger,
		shared.Core().V1().ServiceAccounts(), shared.Core().V1().Namespaces(),
		users["service-account-controller"].kube, serviceaccount.DefaultServiceAccountsControllerOptions())
	if err != nil {
		return nil, fmt.Errorf("cannot make the service account controller: %w", err)
	}

	rootPublisher, err := rootcacertpublisher.NewPublisher(
		shared.Core().V1().ConfigMaps(), shared.Core().V1().Namespaces(),
		users["root-ca-cert-publisher"].kube, p.keys.cluster.pem)
	if err != nil {
		return nil, fmt.Errorf("cannot make the root CA publisher: %w", err)
	}

	aggregation := clusterroleaggregation.NewClusterRoleAggregation(
		shared.Rbac().V1().ClusterRoles(), users["clusterrole-aggregation-controller"].kube.RbacV1())

	shared.Start(p.ctx.Done())
	sharedMetadata.Start(p.ctx.Done())
	close(started)

	p.runWith(ctx, "the garbage collector", func(ctx context.Context) { garbage.Run(ctx, 5, collectorSync) })
	p.runWith(ctx, "the garbage collector's discovery", func(ctx context.Context) { garbage.Sync(ctx, gc.discovery, collectorSync) })
	p.runWith(ctx, "the namespace controller", func(ctx context.Context) { namespaceController.Run(ctx, 2) })
	p.runWith(ctx, "the service account controller", func(ctx context.Context) { accounts.Run(ctx, 1) })
	p.runWith(ctx, "the root CA publisher", func(ctx context.Context) { rootPublisher.Run(ctx, 1) })
	p.runWith(ctx, "the role aggregation", func(ctx context.Context) { aggregation.Run(ctx, 1) })
	return func() bool { return garbage.IsSynced(logger) }, nil
}

// runWith is run for parts that return nothing and log to the logger of the context.
func (p *plane) runWith(ctx context.Context, part string, work func(context.Context)) {
	p.run(part, func(context.Context) error {
		work(ctx)
		return nil
	})
}
