// Policies in Vault's language: paths and their capabilities.

package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/hcl"
)

// policy maps paths to capabilities. A path may end with *.
type policy map[string][]string

// parsePolicy reads `path "pki/sign/mesh" { capabilities = ["create", "update"] }`.
func parsePolicy(text string) (policy, error) {
	var document struct {
		Path []map[string][]struct {
			Capabilities []string `hcl:"capabilities"`
		} `hcl:"path"`
	}
	if err := hcl.Decode(&document, text); err != nil {
		return nil, fmt.Errorf("failed to parse policy: %w", err)
	}
	parsed := make(policy)
	for _, paths := range document.Path {
		for path, rules := range paths {
			for _, rule := range rules {
				parsed[path] = append(parsed[path], rule.Capabilities...)
			}
		}
	}
	if len(parsed) == 0 {
		return nil, errors.New("failed to parse policy: it names no path")
	}
	return parsed, nil
}

func (p policy) allows(path, capability string) bool {
	for pattern, capabilities := range p {
		if matches(pattern, path) && slices.Contains(capabilities, capability) {
			return true
		}
	}
	return false
}

// matches implements Vault's rules for special paths: a * at the end matches any
// suffix, a + matches one segment.
func matches(pattern, path string) bool {
	pattern, open := strings.CutSuffix(pattern, "*")
	if !strings.Contains(pattern, "+") {
		return pattern == path || open && strings.HasPrefix(path, pattern)
	}
	want, have := strings.Split(pattern, "/"), strings.Split(path, "/")
	if len(have) < len(want) || !open && len(have) > len(want) {
		return false
	}
	for i, segment := range want {
		last := open && i == len(want)-1
		if segment != "+" && segment != have[i] && !(last && strings.HasPrefix(have[i], segment)) {
			return false
		}
	}
	return true
}
