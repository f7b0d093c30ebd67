// Command controlplane is a Kubernetes control plane for tests, in one process: etcd,
// kube-apiserver, a few of kube-controller-manager's controllers and cert-manager's
// webhook and CertificateRequest controllers. All of them are the real code from the
// public modules; this module only connects them.
//
// It starts in seconds, listens on the loopback interface only and ends with its
// standard input, so that it ends when a test process is killed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
)

// startLimit bounds the whole start; a slow, busy machine needs far less. Each pod
// of a crowd adds to it.
const (
	startLimit  = 3 * time.Minute
	limitPerPod = 10 * time.Millisecond
)

// The two ways in which callers end it.
var (
	errSignal     = errors.New("a signal asked for the end")
	errInputEnded = errors.New("standard input has ended; --stay starts without one")
)

// settings is the command line.
type settings struct {
	dir            string
	port           int
	approveSigners []string
	controllers    []string
	apiserver      string
	apiserverArgs  []string
	audit          bool
	workloads      bool
	pods           int
	stay           bool
	verbosity      int
}

func main() {
	// Output of libraries must not mix with the one line for which callers wait.
	stdout := os.Stdout
	os.Stdout = os.Stderr

	// The heap holds caches that hardly change: a lower GOGC saves a hundred megabytes for
	// little work.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}

	opts, err := parseFlags(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		err = run(opts, stdout)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "controlplane: %s\n", strings.Join(strings.Fields(err.Error()), " "))
		os.Exit(1)
	}
}

func parseFlags(args []string) (settings, error) {
	opts := settings{}
	var signers, controllers string
	fs := flag.NewFlagSet("controlplane", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&opts.dir, "dir", "", "directory for data, keys and logs; one that was used before is resumed (required)")
	fs.IntVar(&opts.port, "port", 0, "port of the API server on 127.0.0.1 (0: any free one)")
	fs.StringVar(&signers, "approve-signers", strings.Join(defaultApproveSigners, ","),
		"signer names that cert-manager's approver may approve, as in its chart; empty means every signer")
	fs.StringVar(&controllers, "controllers", "*",
		"cert-manager controllers to run: names, '*' for all, '-name' to take one out; known: "+strings.Join(certManagerControllers, " "))
	fs.StringVar(&opts.apiserver, "apiserver", "", "run this kube-apiserver, of another version, instead of the one inside")
	fs.Func("apiserver-arg", "a further flag for kube-apiserver, such as --feature-gates=…; may be repeated", func(arg string) error {
		opts.apiserverArgs = append(opts.apiserverArgs, arg)
		return nil
	})
	fs.BoolVar(&opts.audit, "audit", false, "log every finished request with its user to DIR/audit.log, one JSON object a line")
	fs.BoolVar(&opts.workloads, "workloads", false, "run the DaemonSet, Deployment and ReplicaSet controllers and the scheduler")
	fs.IntVar(&opts.pods, "pods", 0, "make so many pods of some 10 KB in the namespace "+crowdNamespace)
	fs.BoolVar(&opts.stay, "stay", false, "keep running when standard input ends")
	fs.IntVar(&opts.verbosity, "v", 2, "verbosity of the logs in DIR")

	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "usage: controlplane --dir DIR [flags]")
			fs.SetOutput(os.Stderr)
			fs.PrintDefaults()
		}
		return opts, err
	}
	if fs.NArg() > 0 {
		return opts, fmt.Errorf("unexpected argument %q; all settings are flags, see --help", fs.Arg(0))
	}
	if opts.dir == "" {
		return opts, errors.New("--dir is required, see --help")
	}
	if opts.port < 0 || opts.port > 65535 {
		return opts, fmt.Errorf("--port %d is not a port number", opts.port)
	}
	if opts.pods < 0 || opts.pods > crowdPods {
		return opts, fmt.Errorf("--pods %d is not between 0 and %d", opts.pods, crowdPods)
	}
	dir, err := filepath.Abs(opts.dir)
	if err != nil {
		return opts, fmt.Errorf("cannot resolve --dir %q: %w", opts.dir, err)
	}
	opts.dir = dir
	opts.approveSigners = splitList(signers)
	opts.controllers, err = selectControllers(splitList(controllers))
	return opts, err
}

func splitList(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' })
}

// run starts everything, reports it, and returns nil when it is asked to end, or an
// error when a part fails.
func run(opts settings, stdout io.Writer) error {
	ctx, fail := context.WithCancelCause(context.Background())
	defer fail(nil)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-signals
		fail(errSignal)
	}()
	if !opts.stay {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			fail(errInputEnded)
		}()
	}
	plane := &plane{settings: opts, ctx: ctx, fail: fail}

	started := make(chan error, 1)
	go func() { started <- plane.start() }()
	allowed := startLimit + time.Duration(opts.pods)*limitPerPod
	limit := time.NewTimer(allowed)
	defer limit.Stop()

	select {
	case err := <-started:
		if err != nil && ctx.Err() == nil {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("not started: %w", context.Cause(ctx))
		}
	case <-limit.C:
		return fmt.Errorf("not ready after %v; the logs are in %s", allowed, opts.dir)
	case <-ctx.Done():
		return fmt.Errorf("not started: %w", context.Cause(ctx))
	}
	fmt.Fprintf(stdout, "ready %s\n", plane.adminKubeconfig())
	<-ctx.Done()

	// The parts are not shut down in order: the data on disk is consistent at any time and
	// the sockets close with the process.
	cause := context.Cause(ctx)
	if errors.Is(cause, errSignal) || errors.Is(cause, errInputEnded) {
		return nil
	}
	return cause
}
