// cert-manager's custom resources, as its module ships them.

package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"
)

// build.sh fills the directory; without it the program still compiles.
//
//go:embed all:crds
var crdFiles embed.FS

var crdResource = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// installCRDs applies the CRDs and returns when the API server serves them.
func (p *plane) installCRDs(admin *clients) error {
	entries, err := crdFiles.ReadDir("crds")
	if err != nil {
		return fmt.Errorf("cannot list the embedded CRDs: %w", err)
	}
	var names []string
	for _, entry := range entries {
		content, err := crdFiles.ReadFile("crds/" + entry.Name())
		if err != nil {
			return fmt.Errorf("cannot read the embedded CRD %s: %w", entry.Name(), err)
		}
		if len(content) == 0 {
			continue // the placeholder that keeps the directory in the repository
		}
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(content, object); err != nil {
			return fmt.Errorf("the embedded CRD %s is not YAML: %w", entry.Name(), err)
		}
		if err := p.apply(admin, crdResource, object); err != nil {
			return err
		}
		names = append(names, object.GetName())
	}
	if len(names) == 0 {
		return errors.New("this program was built without cert-manager's CRDs; build it with build.sh")
	}
	return p.await("cert-manager's CRDs are served", 50*time.Millisecond, func(ctx context.Context) (bool, error) {
		for _, name := range names {
			crd, err := admin.extensions.ApiextensionsV1().CustomResourceDefinitions().Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return false, err
			}
			if !established(crd) {
				return false, fmt.Errorf("%s is not established", name)
			}
		}
		// The garbage collector and the webhook find resources by discovery, which
		// lags behind the CRDs' own conditions.
		list, err := admin.discovery.ServerResourcesForGroupVersion("cert-manager.io/v1")
		if err != nil {
			return false, err
		}
		for _, resource := range list.APIResources {
			if resource.Name == "certificaterequests" {
				return true, nil
			}
		}
		return false, errors.New("discovery does not show certificaterequests")
	})
}

func established(crd *apiextensionsv1.CustomResourceDefinition) bool {
	for _, condition := range crd.Status.Conditions {
		if condition.Type == apiextensionsv1.Established {
			return condition.Status == apiextensionsv1.ConditionTrue
		}
	}
	return false
}
