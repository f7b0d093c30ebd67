// Command vault is a Vault for tests: the real PKI secrets engine and the real
// Kubernetes auth method, from Vault's public modules, behind a small server of this
// repository. The server implements the parts of Vault's core that they need: mounts,
// storage, tokens, policies, and the HTTP interface with its error format.
//
// So the decisions and error texts of a role are Vault's own, and so is the review of a
// service account's token. Not implemented are seals, namespaces, leases, audit,
// replication and identity. Vault's core is not used, because it needs nearly three
// times the packages (1,395 instead of 521).
//
// The PKI engine is under HashiCorp's Business Source License, the rest under MPL-2.0.
// They are fetched and built for the tests only, and not shipped.
//
// It listens on the loopback interface and ends with its standard input.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	dir := flag.String("dir", "", "directory for mounts, keys and policies; one that was used before is resumed (required)")
	port := flag.Int("port", 0, "port on 127.0.0.1 (0: any free one)")
	flag.Parse()
	if err := run(*dir, *port); err != nil {
		fmt.Fprintf(os.Stderr, "vault: %s\n", strings.Join(strings.Fields(err.Error()), " "))
		os.Exit(1)
	}
}

func run(dir string, port int) error {
	if dir == "" || flag.NArg() > 0 {
		return errors.New("usage: vault --dir DIR [--port N]")
	}
	root := os.Getenv("VAULT_TOKEN")
	if root == "" {
		return errors.New("VAULT_TOKEN is not set: it becomes the root token")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	ctx, ended := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		ended()
	}()

	core, err := newCore(ctx, dir, root)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return fmt.Errorf("cannot listen: %w", err)
	}
	server := &http.Server{Handler: core, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	fmt.Printf("ready http://%s\n", listener.Addr())
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}
