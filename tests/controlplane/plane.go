// The order in which the parts start, and the reaction when one of them ends.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"

	"go.etcd.io/etcd/server/v3/etcdserver"
	"k8s.io/klog/v2"
)

// plane is one running control plane.
type plane struct {
	settings
	ctx  context.Context
	fail context.CancelCauseFunc

	etcd   *etcdserver.EtcdServer
	locked *os.File // open while this process owns the directory
	keys   *keys    // the cluster's certificate authority and token key
	server string   // https://127.0.0.1:port
}

// start returns when every part works, or with the first failure.
func (p *plane) start() error {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return fmt.Errorf("cannot create --dir: %w", err)
	}
	if err := p.lock(); err != nil {
		return err
	}
	if err := setUpLogs(p.dir, p.verbosity, p.fail); err != nil {
		return err
	}
	var err error
	if p.keys, err = loadOrCreateKeys(p.path("pki")); err != nil {
		return err
	}

	etcd, err := p.startEtcd()
	if err != nil {
		return err
	}
	if err := p.startAPIServer(etcd); err != nil {
		return err
	}
	admin, err := p.clients(administrator)
	if err != nil {
		return err
	}
	if err := p.awaitAPIServer(admin); err != nil {
		return err
	}
	if err := p.seedBasics(admin); err != nil {
		return err
	}
	if err := p.installCRDs(admin); err != nil {
		return err
	}
	if err := p.startWebhook(admin); err != nil {
		return err
	}
	collector, err := p.startKubeControllers()
	if err != nil {
		return err
	}
	if err := p.startWorkloads(); err != nil {
		return err
	}
	if err := p.startCertManager(); err != nil {
		return err
	}
	if err := p.seedIssuer(admin); err != nil {
		return err
	}
	if err := p.awaitAll(admin, collector); err != nil {
		return err
	}
	if err := p.makeCrowd(admin, p.pods); err != nil {
		return err
	}
	return p.writeKubeconfig(p.adminKubeconfig(), administrator)
}

// lock claims the directory until this process ends.
func (p *plane) lock() error {
	file, err := os.OpenFile(p.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("cannot write to --dir: %w", err)
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("another control plane is running in %s: %w", p.dir, err)
	}
	p.locked = file
	return nil
}

// run runs a part in the background. If a part returns before the end, the whole
// process ends.
func (p *plane) run(part string, work func(ctx context.Context) error) {
	go func() {
		defer func() {
			if reason := recover(); reason != nil {
				klog.ErrorS(nil, "panic", "part", part, "reason", reason, "stack", string(debug.Stack()))
				p.fail(fmt.Errorf("%s panicked: %v", part, reason))
			}
		}()
		err := work(p.ctx)
		if p.ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("it returned without an error")
		}
		p.fail(fmt.Errorf("%s ended: %w", part, err))
	}()
}

func (p *plane) path(name string) string { return filepath.Join(p.dir, name) }

func (p *plane) adminKubeconfig() string { return p.path("admin.kubeconfig") }
