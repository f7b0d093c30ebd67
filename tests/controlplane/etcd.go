// The embedded etcd: one member, on loopback, on free ports, without fsync.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// startEtcd returns the address for the API server.
func (p *plane) startEtcd() (string, error) {
	anyPort := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}

	config := embed.NewConfig()
	config.Name = "controlplane"
	config.Dir = p.path("etcd")
	config.ListenPeerUrls, config.AdvertisePeerUrls = anyPort, anyPort
	config.ListenClientUrls, config.AdvertiseClientUrls = anyPort, anyPort
	config.InitialCluster = config.InitialClusterFromName(config.Name)
	config.UnsafeNoFsync = true // a killed process loses no data by this, only a crashed machine does
	config.WatchProgressNotifyInterval = 5 * time.Second
	config.WarningUnaryRequestDuration = embed.DefaultWarningUnaryRequestDuration
	config.LogOutputs = []string{p.path("etcd.log")}
	config.LogLevel = "warn"
	if p.verbosity > 2 {
		config.LogLevel = "info"
	}

	etcd, err := embed.StartEtcd(config)
	if err != nil {
		return "", fmt.Errorf("cannot start etcd: %w", err)
	}
	select {
	case <-etcd.Server.ReadyNotify():
	case err := <-etcd.Err():
		return "", fmt.Errorf("etcd failed: %w", err)
	case <-time.After(30 * time.Second):
		return "", errors.New("etcd has not elected itself within 30 s")
	case <-p.ctx.Done():
		return "", p.ctx.Err()
	}
	p.etcd = etcd.Server
	p.run("etcd", func(ctx context.Context) error {
		select {
		case err := <-etcd.Err():
			return err
		case <-etcd.Server.StopNotify():
			return errors.New("its server stopped")
		case <-ctx.Done():
			return nil
		}
	})
	return "http://" + etcd.Clients[0].Addr().String(), nil
}
