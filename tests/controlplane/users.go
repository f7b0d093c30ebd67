// The users of the API server. Each part has a separate user with only the permissions
// of a real cluster, because policies under test check the user.

package main

import (
	"fmt"
	"os"

	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

type user struct {
	name   string
	groups []string
}

// administrator has all permissions; callers get its kubeconfig.
var administrator = user{name: "controlplane-admin", groups: []string{"system:masters"}}

// controllerManager is the user of the shared informers.
var controllerManager = user{name: "system:kube-controller-manager"}

// serviceAccount is the user that a token of this account authenticates.
func serviceAccount(namespace, name string) user {
	return user{
		name:   "system:serviceaccount:" + namespace + ":" + name,
		groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + namespace},
	}
}

// clients are the clients of a part for the API server.
type clients struct {
	config     *rest.Config
	kube       kubernetes.Interface
	dynamic    dynamic.Interface
	metadata   metadata.Interface
	extensions apiextensions.Interface
	discovery  discovery.DiscoveryInterface
}

// clients creates clients for a user without a rate limit: priority and fairness in the
// API server limits them.
func (p *plane) clients(who user) (*clients, error) {
	config, err := p.restConfig(who)
	if err != nil {
		return nil, err
	}
	c := &clients{config: config}
	if c.kube, err = kubernetes.NewForConfig(config); err == nil {
		if c.dynamic, err = dynamic.NewForConfig(config); err == nil {
			if c.metadata, err = metadata.NewForConfig(config); err == nil {
				c.extensions, err = apiextensions.NewForConfig(config)
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make a client for %s: %w", who.name, err)
	}
	c.discovery = c.kube.Discovery()
	return c, nil
}

func (p *plane) restConfig(who user) (*rest.Config, error) {
	certificate, key, err := p.keys.client(who)
	if err != nil {
		return nil, err
	}
	return &rest.Config{
		Host: p.server,
		TLSClientConfig: rest.TLSClientConfig{
			CAData:   p.keys.cluster.pem,
			CertData: certificate,
			KeyData:  key,
		},
		QPS:       -1,
		UserAgent: "controlplane",
	}, nil
}

// writeKubeconfig writes a self-contained kubeconfig for a user. The write is atomic
// for readers.
func (p *plane) writeKubeconfig(path string, who user) error {
	certificate, key, err := p.keys.client(who)
	if err != nil {
		return err
	}
	const name = "controlplane"
	content, err := clientcmd.Write(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{name: {Server: p.server, CertificateAuthorityData: p.keys.cluster.pem}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{who.name: {ClientCertificateData: certificate, ClientKeyData: key}},
		Contexts:       map[string]*clientcmdapi.Context{name: {Cluster: name, AuthInfo: who.name}},
		CurrentContext: name,
	})
	if err != nil {
		return fmt.Errorf("cannot encode a kubeconfig: %w", err)
	}
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		return fmt.Errorf("cannot write a kubeconfig: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("cannot write a kubeconfig: %w", err)
	}
	return nil
}
