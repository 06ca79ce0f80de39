// Vault's own PKI engine, by itself: the engine of HashiCorp behind as much of Vault's HTTP as a client of it needs. One
// token is good, `root`. Called with: ADDRESS CERTIFICATE KEY.
package main

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/builtin/logical/pki"
	"github.com/hashicorp/vault/sdk/logical"
)

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	must(json.NewEncoder(w).Encode(body))
}

func main() {
	ctx := context.Background()
	storage := &logical.InmemStorage{}
	engine, err := pki.Factory(ctx, &logical.BackendConfig{
		StorageView: storage,
		Logger:      hclog.NewNullLogger(),
		System:      logical.StaticSystemView{DefaultLeaseTTLVal: 24 * time.Hour, MaxLeaseTTLVal: 8760 * time.Hour},
		BackendUUID: "6b3a9f6e-0000-4000-8000-000000000001",
	})
	must(err)
	must(engine.Initialize(ctx, &logical.InitializationRequest{Storage: storage}))
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Vault-Token") != "root" {
			answer(w, 403, map[string]any{"errors": []string{"permission denied"}})
			return
		}
		if r.URL.Path == "/v1/auth/token/lookup-self" {
			answer(w, 200, map[string]any{"data": map[string]any{"id": "root", "ttl": 0, "renewable": false}})
			return
		}
		path, found := strings.CutPrefix(r.URL.Path, "/v1/pki/")
		if !found {
			answer(w, 404, map[string]any{"errors": []string{"no handler for route " + r.URL.Path}})
			return
		}
		request := &logical.Request{Operation: logical.ReadOperation, Path: path, Storage: storage, MountPoint: "pki/"}
		if r.Method != http.MethodGet {
			request.Operation = logical.UpdateOperation
			decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20))
			decoder.UseNumber()
			if err := decoder.Decode(&request.Data); err != nil {
				answer(w, 400, map[string]any{"errors": []string{err.Error()}})
				return
			}
		}
		response, err := engine.HandleRequest(r.Context(), request)
		if status, err := logical.RespondErrorCommon(request, response, err); status != 0 && err != nil {
			answer(w, status, map[string]any{"errors": []string{err.Error()}})
			return
		}
		data := map[string]any{}
		if response != nil {
			data = response.Data
		}
		answer(w, 200, map[string]any{"data": data})
	})
	must(http.ListenAndServeTLS(os.Args[1], os.Args[2], os.Args[3], nil))
}
