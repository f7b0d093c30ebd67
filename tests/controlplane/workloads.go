// The parts that create pods of DaemonSets and Deployments and bind them to nodes:
// three more controllers of kube-controller-manager, and kube-scheduler with its
// default profile. They run only with --workloads: most tests place their pods
// themselves.

package main

import (
	"context"
	"fmt"
	"time"

	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller/daemon"
	"k8s.io/kubernetes/pkg/controller/deployment"
	"k8s.io/kubernetes/pkg/controller/replicaset"
	"k8s.io/kubernetes/pkg/scheduler"
	"k8s.io/kubernetes/pkg/scheduler/profile"
)

// schedulerUser is the user that binds pods.
var schedulerUser = user{name: "system:kube-scheduler"}

func (p *plane) startWorkloads() error {
	if !p.workloads {
		return nil
	}
	if err := p.startWorkloadControllers(); err != nil {
		return err
	}
	return p.startScheduler()
}

func (p *plane) startWorkloadControllers() error {
	logger, err := openLog(p.dir, "workload-controllers", p.verbosity)
	if err != nil {
		return err
	}
	ctx := klog.NewContext(p.ctx, logger)
	users := make(map[string]*clients)
	for _, account := range []string{"daemon-set-controller", "deployment-controller", "replicaset-controller"} {
		if users[account], err = p.clients(serviceAccount("kube-system", account)); err != nil {
			return err
		}
	}
	reader, err := p.clients(controllerManager)
	if err != nil {
		return err
	}
	shared := informers.NewSharedInformerFactory(reader.kube, resync)
	apps, core := shared.Apps().V1(), shared.Core().V1()

	daemons, err := daemon.NewDaemonSetsController(ctx, apps.DaemonSets(), apps.ControllerRevisions(), core.Pods(), core.Nodes(),
		users["daemon-set-controller"].kube, flowcontrol.NewBackOff(time.Second, 15*time.Minute))
	if err != nil {
		return fmt.Errorf("cannot make the DaemonSet controller: %w", err)
	}
	deployments, err := deployment.NewDeploymentController(ctx, apps.Deployments(), apps.ReplicaSets(), core.Pods(),
		users["deployment-controller"].kube)
	if err != nil {
		return fmt.Errorf("cannot make the Deployment controller: %w", err)
	}
	replicas := replicaset.NewReplicaSetController(ctx, apps.ReplicaSets(), core.Pods(), users["replicaset-controller"].kube,
		replicaset.BurstReplicas)

	shared.Start(p.ctx.Done())
	p.runWith(ctx, "the DaemonSet controller", func(ctx context.Context) { daemons.Run(ctx, 2) })
	p.runWith(ctx, "the Deployment controller", func(ctx context.Context) { deployments.Run(ctx, 2) })
	p.runWith(ctx, "the ReplicaSet controller", func(ctx context.Context) { replicas.Run(ctx, 2) })
	return nil
}

func (p *plane) startScheduler() error {
	logger, err := openLog(p.dir, "scheduler", p.verbosity)
	if err != nil {
		return err
	}
	ctx := klog.NewContext(p.ctx, logger)
	own, err := p.clients(schedulerUser)
	if err != nil {
		return err
	}
	broadcaster := events.NewBroadcaster(&events.EventSinkImpl{Interface: own.kube.EventsV1()})
	if err := broadcaster.StartRecordingToSinkWithContext(ctx); err != nil {
		return fmt.Errorf("cannot record the scheduler's events: %w", err)
	}
	shared := scheduler.NewInformerFactory(own.kube, 0)
	binder, err := scheduler.New(ctx, own.kube, shared, nil, profile.NewRecorderFactory(broadcaster), scheduler.WithKubeConfig(own.config))
	if err != nil {
		return fmt.Errorf("cannot make the scheduler: %w", err)
	}
	shared.Start(p.ctx.Done())
	p.runWith(ctx, "the scheduler", func(ctx context.Context) {
		shared.WaitForCacheSync(ctx.Done())
		if err := binder.WaitForHandlersSync(ctx); err == nil {
			binder.Run(ctx)
		}
	})
	return nil
}
