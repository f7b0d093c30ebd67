// The HTTP interface. It translates a request for the engine, the response into Vault's
// JSON, and an error into {"errors": [...]} with the status that Vault uses.

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

const largestBody = 1 << 20

func (c *core) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path, ok := strings.CutPrefix(r.URL.Path, "/v1/")
	if !ok {
		logical.RespondError(w, http.StatusNotFound, nil)
		return
	}
	if path == "sys/health" {
		respond(w, http.StatusOK, map[string]any{
			"initialized": true, "sealed": false, "standby": false, "server_time_utc": time.Now().Unix(), "version": "1.21.4",
		})
		return
	}
	var body map[string]any
	if r.Method == http.MethodPost || r.Method == http.MethodPut || r.Method == http.MethodPatch {
		decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, largestBody))
		decoder.UseNumber()
		if err := decoder.Decode(&body); err != nil {
			logical.RespondError(w, http.StatusBadRequest, fmt.Errorf("failed to parse JSON input: %w", err))
			return
		}
	}
	given := r.Header.Get("X-Vault-Token")
	if strings.HasPrefix(path, "sys/") {
		c.system(w, r.Method, path, given, body)
		return
	}
	c.engine(w, r, path, given, body)
}

// system implements the few paths of Vault itself that a set-up needs. They require the
// root token.
func (c *core) system(w http.ResponseWriter, method, path, given string, body map[string]any) {
	text := func(field string) string {
		value, _ := body[field].(string)
		return value
	}
	var err error
	name, isMount := strings.CutPrefix(path, "sys/mounts/")
	auth, isAuth := strings.CutPrefix(path, "sys/auth/")
	policy, isPolicy := strings.CutPrefix(path, "sys/policies/acl/")
	switch {
	case given != c.root:
		err = logical.ErrPermissionDenied
	case method != http.MethodPost && method != http.MethodPut:
		err = logical.ErrUnsupportedOperation
	case isMount || isAuth:
		maxTTL := maxLeaseTTL
		if config, ok := body["config"].(map[string]any); ok {
			if longest, ok := config["max_lease_ttl"].(string); ok {
				maxTTL, err = time.ParseDuration(longest)
			}
		}
		if isAuth {
			name = "auth/" + auth
		}
		if err == nil {
			err = c.enable(strings.Trim(name, "/")+"/", text("type"), maxTTL)
		}
	case isPolicy:
		err = c.setPolicy(policy, text("policy"))
	default:
		err = logical.ErrUnsupportedPath
	}
	if err != nil {
		status, err := logical.RespondErrorCommon(&logical.Request{}, &logical.Response{}, err)
		logical.RespondError(w, status, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// engine passes a request to the engine that is mounted there.
func (c *core) engine(w http.ResponseWriter, r *http.Request, path, given string, body map[string]any) {
	found, rest := c.find(path)
	if found == nil {
		logical.RespondError(w, http.StatusNotFound, fmt.Errorf("no handler for route %q. route entry not found.", path))
		return
	}
	request := &logical.Request{
		Path: rest, Data: body, Storage: found.storage, ClientToken: given, Headers: r.Header,
		MountPoint: found.Path, MountType: found.Kind, MountAccessor: found.Kind + "_" + found.ID,
		Connection: &logical.Connection{RemoteAddr: r.RemoteAddr},
	}
	switch r.Method {
	case http.MethodGet:
		request.Operation = logical.ReadOperation
	case http.MethodPost, http.MethodPut:
		request.Operation = logical.UpdateOperation
		checked, exists, err := found.backend.HandleExistenceCheck(c.ctx, request)
		if err != nil && !errors.Is(err, logical.ErrUnsupportedPath) {
			logical.RespondError(w, http.StatusInternalServerError, err)
			return
		}
		if checked && !exists {
			request.Operation = logical.CreateOperation
		}
	case http.MethodPatch:
		request.Operation = logical.PatchOperation
	case http.MethodDelete:
		request.Operation = logical.DeleteOperation
	default:
		logical.RespondError(w, http.StatusMethodNotAllowed, nil)
		return
	}
	if !found.isOpen(rest) && !c.may(given, path, request.Operation) {
		logical.RespondError(w, http.StatusForbidden, logical.ErrPermissionDenied)
		return
	}
	response, err := found.backend.HandleRequest(c.ctx, request)
	if err == nil && response != nil && response.Auth != nil {
		err = c.login(response.Auth)
	}
	if status, err := logical.RespondErrorCommon(request, response, err); err != nil || status != 0 {
		logical.RespondError(w, status, err)
		return
	}
	if response == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if raw, ok := response.Data[logical.HTTPRawBody].([]byte); ok {
		content, _ := response.Data[logical.HTTPContentType].(string)
		w.Header().Set("Content-Type", content)
		_, _ = w.Write(raw)
		return
	}
	respond(w, http.StatusOK, logical.LogicalResponseToHTTPResponse(response))
}

// isOpen returns whether a path of the engine needs no token.
func (m *mount) isOpen(path string) bool {
	if special := m.backend.SpecialPaths(); special != nil {
		for _, pattern := range special.Unauthenticated {
			if matches(pattern, path) {
				return true
			}
		}
	}
	return false
}

func respond(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}
