// Command trustmanager runs trust-manager's Bundle controller for tests. The controller is the real one, from trust-manager's public
// module; this program only starts it. trust-manager's own program also serves a webhook that validates Bundles and needs a certificate.
//
// It reads the sources of Bundles from --trust-namespace of the cluster that --kubeconfig names, and writes their targets into every
// namespace. It prints the line `ready` when it follows Bundles, and ends with its standard input.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/cert-manager/trust-manager/pkg/apis/trust/v1alpha1"
	"github.com/cert-manager/trust-manager/pkg/bundle"
	"github.com/cert-manager/trust-manager/pkg/bundle/controller"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"
)

func main() {
	// controller-runtime has a flag of the same name in the default set.
	flags := flag.NewFlagSet("trustmanager", flag.ExitOnError)
	kubeconfig := flags.String("kubeconfig", "", "an administrator's access to the cluster (required)")
	namespace := flags.String("trust-namespace", "cert-manager", "namespace of the sources of Bundles")
	_ = flags.Parse(os.Args[1:])
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	if err := run(ctx, *kubeconfig, *namespace); err != nil {
		fmt.Fprintf(os.Stderr, "trustmanager: %s\n", strings.Join(strings.Fields(err.Error()), " "))
		os.Exit(1)
	}
}

// run starts the controller, and returns when ctx ends or the controller fails.
func run(ctx context.Context, kubeconfig, namespace string) error {
	if kubeconfig == "" {
		return errors.New("--kubeconfig is required")
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return fmt.Errorf("the kubeconfig cannot be used: %w", err)
	}
	ctrl.SetLogger(klog.Background())
	kinds := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{scheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(kinds); err != nil {
			return fmt.Errorf("the kinds of objects cannot be registered: %w", err)
		}
	}
	options := controller.Options{Namespace: namespace}
	manager, err := ctrl.NewManager(config, ctrl.Options{
		Scheme: kinds,
		Cache:  bundle.CacheOpts(options),
		// Tests run several of these programs at once.
		Metrics: server.Options{BindAddress: "0"},
	})
	if err != nil {
		return fmt.Errorf("the manager cannot be created: %w", err)
	}
	if err := bundle.SetupWithManager(ctx, manager, options); err != nil {
		return fmt.Errorf("the controller cannot be created: %w", err)
	}
	go func() {
		if manager.GetCache().WaitForCacheSync(ctx) {
			fmt.Println("ready")
		}
	}()
	return manager.Start(ctx)
}
