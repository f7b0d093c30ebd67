// Mounts, their storage, and the tokens: the parts that the engines need.

package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	kubeauth "github.com/hashicorp/vault-plugin-auth-kubernetes"
	"github.com/hashicorp/vault/builtin/logical/pki"
	"github.com/hashicorp/vault/helper/namespace"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical/file"
)

const (
	// The defaults of Vault.
	defaultLeaseTTL = 32 * 24 * time.Hour
	maxLeaseTTL     = 32 * 24 * time.Hour

	mountsPrefix   = "core/mounts/"
	policiesPrefix = "core/policies/"
)

// engines are the supported kinds of mounts, for secrets and for auth.
var engines = map[bool]map[string]logical.Factory{
	false: {"pki": pki.Factory},
	true:  {"kubernetes": kubeauth.Factory},
}

// entry is a mount as it is stored.
type entry struct {
	Path   string        `json:"path"` // with its slash, such as pki/ or auth/kubernetes/
	Kind   string        `json:"kind"`
	ID     string        `json:"id"`
	MaxTTL time.Duration `json:"max_ttl"`
}

func (e entry) isAuth() bool { return strings.HasPrefix(e.Path, "auth/") }

// mount is a running engine.
type mount struct {
	entry
	backend logical.Backend
	storage logical.Storage
}

// token is the result of a login.
type token struct {
	policies []string
	expires  time.Time
}

type core struct {
	ctx     context.Context
	logger  hclog.Logger
	storage logical.Storage
	root    string

	lock     sync.RWMutex
	mounts   map[string]*mount
	policies map[string]policy
	tokens   map[string]token
}

// newCore opens a directory and all its mounts. Tokens end with the process.
func newCore(ctx context.Context, dir, root string) (*core, error) {
	logger := hclog.New(&hclog.LoggerOptions{Name: "vault", Level: hclog.Debug})
	disk, err := file.NewFileBackend(map[string]string{"path": dir}, logger)
	if err != nil {
		return nil, fmt.Errorf("cannot use --dir: %w", err)
	}
	c := &core{
		ctx:     namespace.RootContext(ctx),
		logger:  logger,
		storage: logical.NewLogicalStorage(disk),
		root:    root,
		mounts:  make(map[string]*mount), policies: make(map[string]policy), tokens: make(map[string]token),
	}
	if err := c.resume(mountsPrefix, func(value []byte) error {
		var e entry
		if err := json.Unmarshal(value, &e); err != nil {
			return err
		}
		return c.open(e)
	}); err != nil {
		return nil, err
	}
	return c, c.resume(policiesPrefix, func(value []byte) error {
		var stored [2]string
		if err := json.Unmarshal(value, &stored); err != nil {
			return err
		}
		parsed, err := parsePolicy(stored[1])
		c.policies[stored[0]] = parsed
		return err
	})
}

func (c *core) resume(prefix string, each func([]byte) error) error {
	keys, err := c.storage.List(c.ctx, prefix)
	for _, key := range keys {
		var stored *logical.StorageEntry
		if err == nil {
			stored, err = c.storage.Get(c.ctx, prefix+key)
		}
		if err == nil && stored != nil {
			err = each(stored.Value)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot resume what is in --dir: %w", err)
	}
	return nil
}

func (c *core) keep(key string, value any) error {
	encoded, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return c.storage.Put(c.ctx, &logical.StorageEntry{Key: key, Value: encoded})
}

// enable mounts an engine permanently.
func (c *core) enable(path, kind string, maxTTL time.Duration) error {
	e := entry{Path: path, Kind: kind, ID: rand.Text(), MaxTTL: maxTTL}
	if _, known := engines[e.isAuth()][kind]; !known {
		return fmt.Errorf("there is no engine %q for %s here", kind, path)
	}
	c.lock.Lock()
	defer c.lock.Unlock()
	for other := range c.mounts {
		if strings.HasPrefix(path, other) || strings.HasPrefix(other, path) {
			return fmt.Errorf("path is already in use at %s", other)
		}
	}
	if err := c.open(e); err != nil {
		return err
	}
	return c.keep(mountsPrefix+e.ID, e)
}

// open starts an engine. The caller holds the lock, or no other goroutine runs.
func (c *core) open(e entry) error {
	storage := logical.NewStorageView(c.storage, "logical/"+e.ID+"/")
	backend, err := engines[e.isAuth()][e.Kind](c.ctx, &logical.BackendConfig{
		StorageView: storage,
		Logger:      c.logger.Named(strings.TrimSuffix(e.Path, "/")),
		System:      logical.StaticSystemView{DefaultLeaseTTLVal: defaultLeaseTTL, MaxLeaseTTLVal: e.MaxTTL, ClusterUUID: "test"},
		BackendUUID: e.ID,
		Config:      map[string]string{},
	})
	if err == nil {
		err = backend.Initialize(c.ctx, &logical.InitializationRequest{Storage: storage})
	}
	if err != nil {
		return fmt.Errorf("cannot mount %s: %w", e.Path, err)
	}
	c.mounts[e.Path] = &mount{entry: e, backend: backend, storage: storage}
	return nil
}

// find returns the mount of a path, and the path within it.
func (c *core) find(path string) (*mount, string) {
	c.lock.RLock()
	defer c.lock.RUnlock()
	for prefix, found := range c.mounts {
		if rest, ok := strings.CutPrefix(path, prefix); ok {
			return found, rest
		}
	}
	return nil, ""
}

// setPolicy stores a policy in Vault's policy language.
func (c *core) setPolicy(name, text string) error {
	parsed, err := parsePolicy(text)
	if err != nil {
		return err
	}
	c.lock.Lock()
	defer c.lock.Unlock()
	c.policies[name] = parsed
	return c.keep(policiesPrefix+name, [2]string{name, text})
}

// may returns whether a token has a capability on a path.
func (c *core) may(given, path string, capability logical.Operation) bool {
	if given == c.root {
		return true
	}
	c.lock.RLock()
	defer c.lock.RUnlock()
	known, ok := c.tokens[given]
	if !ok || time.Now().After(known.expires) {
		return false
	}
	for _, name := range known.policies {
		if c.policies[name].allows(path, string(capability)) {
			return true
		}
	}
	return false
}

// login creates the token that an auth method has granted.
func (c *core) login(auth *logical.Auth) error {
	if auth.TTL == 0 {
		auth.TTL = defaultLeaseTTL
	}
	if len(auth.Policies) == 0 && len(auth.TokenPolicies) == 0 {
		return errors.New("the auth method's role names no token_policies")
	}
	auth.TokenPolicies = append([]string{"default"}, auth.Policies...)
	auth.Policies = auth.TokenPolicies
	auth.ClientToken = "hvs." + rand.Text()
	auth.TokenType = logical.TokenTypeService
	c.lock.Lock()
	defer c.lock.Unlock()
	c.tokens[auth.ClientToken] = token{policies: auth.Policies, expires: time.Now().Add(auth.TTL)}
	return nil
}
