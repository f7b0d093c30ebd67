// The real kube-apiserver, configured by its own flags.

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
)

const (
	serviceRange   = "10.96.0.0/16"
	firstServiceIP = "10.96.0.1"

	// auditPolicy logs one line for each request, without bodies.
	auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules: [{level: Metadata}]
`
)

// startAPIServer starts the server and sets p.server; awaitAPIServer waits for it.
func (p *plane) startAPIServer(etcd string) error {
	// A listener bound here, instead of a port flag, allows the kernel to choose a port
	// without a race.
	listener, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(p.port)))
	if err != nil {
		return fmt.Errorf("cannot listen for the API server: %w", err)
	}
	p.server = "https://" + listener.Addr().String()

	args := []string{
		"--etcd-servers=" + etcd,
		"--bind-address=127.0.0.1",
		"--advertise-address=127.0.0.1",
		"--endpoint-reconciler-type=none", // nobody reaches this server through a Service
		"--service-cluster-ip-range=" + serviceRange,
		"--tls-cert-file=" + p.keys.file("apiserver.crt"),
		"--tls-private-key-file=" + p.keys.file("apiserver.key"),
		"--client-ca-file=" + p.keys.file("ca.crt"),
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + p.keys.file("sa.pub"),
		"--service-account-signing-key-file=" + p.keys.file("sa.key"),
		"--allow-privileged=true",
		"--profiling=false",
	}
	if p.audit {
		policy := p.path("audit-policy.yaml")
		if err := os.WriteFile(policy, []byte(auditPolicy), 0o600); err != nil {
			return fmt.Errorf("cannot write the audit policy: %w", err)
		}
		args = append(args, "--audit-policy-file="+policy, "--audit-log-path="+p.path("audit.log"))
	}
	args = append(args, p.apiserverArgs...)
	if p.apiserver != "" {
		return p.startOtherAPIServer(listener, args)
	}

	server := options.NewServerRunOptions()
	flags := pflag.NewFlagSet("kube-apiserver", pflag.ContinueOnError)
	for _, set := range server.Flags().FlagSets {
		flags.AddFlagSet(set)
	}
	if err := flags.Parse(args); err != nil {
		return fmt.Errorf("kube-apiserver rejects its flags: %w", err)
	}
	server.SecureServing.Listener = listener
	if err := server.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return fmt.Errorf("kube-apiserver rejects its feature gates: %w", err)
	}
	completed, err := server.Complete(p.ctx)
	if err != nil {
		return fmt.Errorf("kube-apiserver cannot be configured: %w", err)
	}
	if errs := completed.Validate(); len(errs) > 0 {
		return fmt.Errorf("kube-apiserver refuses its configuration: %w", utilerrors.NewAggregate(errs))
	}
	p.run("kube-apiserver", func(ctx context.Context) error { return app.Run(ctx, completed) })
	return nil
}

// startOtherAPIServer runs a program that cannot inherit a listener: it uses the port
// that is free now.
func (p *plane) startOtherAPIServer(listener net.Listener, args []string) error {
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		return fmt.Errorf("cannot read the API server's address: %w", err)
	}
	if err := listener.Close(); err != nil {
		return fmt.Errorf("cannot free the API server's port: %w", err)
	}
	log, err := os.Create(p.path("apiserver-program.log"))
	if err != nil {
		return fmt.Errorf("cannot write the API server's log: %w", err)
	}
	command := exec.CommandContext(p.ctx, p.apiserver, append(args, "--secure-port="+port)...)
	command.Stdout, command.Stderr = log, log
	// The program ends with this process, regardless of how that ends.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	p.run(p.apiserver, func(context.Context) error {
		// The kernel sends the signal when the thread that started the program ends.
		runtime.LockOSThread()
		defer log.Close()
		err := command.Start()
		started <- err
		if err != nil {
			return err
		}
		return command.Wait()
	})
	if err := <-started; err != nil {
		return fmt.Errorf("--apiserver %s cannot be started: %w", p.apiserver, err)
	}
	return nil
}

// awaitAPIServer waits for /readyz, which covers the built-in RBAC roles, the
// priority levels and the admission plugins.
func (p *plane) awaitAPIServer(admin *clients) error {
	return p.await("the API server is ready", 50*time.Millisecond, func(ctx context.Context) (bool, error) {
		_, err := admin.discovery.RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err == nil, err
	})
}

// await polls until a condition holds. The last error is only used in the message:
// errors are normal during the start.
func (p *plane) await(what string, interval time.Duration, condition func(context.Context) (bool, error)) error {
	var last error
	err := wait.PollUntilContextTimeout(p.ctx, interval, time.Minute, true, func(ctx context.Context) (bool, error) {
		var done bool
		done, last = condition(ctx)
		return done, nil
	})
	switch {
	case err == nil:
		return nil
	case last != nil:
		return fmt.Errorf("timeout while waiting until %s: %w", what, last)
	default:
		return fmt.Errorf("timeout while waiting until %s", what)
	}
}
