package main

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// How often a JWT-SVID is asked for, and the X.509-SVIDs in hand are looked at.
	pace = 200 * time.Millisecond
	// How long one request may take. An agent that is being replaced is away for a few seconds; a request waits for it
	// as the SPIFFE Workload API asks of clients (and does not count as failed when it is then answered).
	patience = 30 * time.Second
)

// workload behaves as a service does that lives on its SVIDs: it holds the X.509 stream open, asks for JWT-SVIDs at a steady
// rate and verifies whatever it gets. It counts what a service would suffer from.
type workload struct {
	mu       sync.Mutex
	expected []string // SPIFFE IDs it must always have
	domains  []string // trust domains whose bundles it must always have
	jwt      *jwtbundle.Set
	inHand   map[string]*x509svid.SVID
	earlier  []*x509svid.SVID

	serials, authorities, keys    map[string]bool
	trusted                       map[string]bool // authorities (by subject key ID) and JWT keys, ever
	failed, lapsed, interruptions int
	tokens                        int
}

// live runs until SIGTERM; expected are SPIFFE IDs, those without a path trust domains.
func live(audience string, expected []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	client, err := workloadapi.New(ctx, workloadapi.WithDialOptions(grpc.WithDefaultCallOptions(grpc.WaitForReady(true))))
	if err != nil {
		return err
	}
	defer client.Close()
	w := &workload{
		inHand: map[string]*x509svid.SVID{}, serials: map[string]bool{}, authorities: map[string]bool{}, keys: map[string]bool{},
		trusted: map[string]bool{},
	}
	for _, id := range expected {
		if strings.Count(id, "/") == 2 {
			w.domains = append(w.domains, id)
		} else {
			w.expected = append(w.expected, id)
		}
	}
	go func() { _ = client.WatchX509Context(ctx, w) }()
	go func() { _ = client.WatchJWTBundles(ctx, w) }()
	subject, err := spiffeid.FromString(w.expected[0])
	if err != nil {
		return err
	}
	for tick := time.NewTicker(pace); ctx.Err() == nil; <-tick.C {
		w.look()
		w.token(ctx, client, jwtsvid.Params{Audience: audience, Subject: subject})
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	say(map[string]string{
		"event": "summary", "failed": fmt.Sprint(w.failed), "lapsed": fmt.Sprint(w.lapsed), "x509": fmt.Sprint(len(w.serials)),
		"jwt": fmt.Sprint(w.tokens), "authorities": fmt.Sprint(len(w.authorities)), "keys": fmt.Sprint(len(w.keys)),
		"interruptions": fmt.Sprint(w.interruptions),
	})
	return nil
}

func (w *workload) fail(what string, err error) {
	w.failed++
	say(map[string]string{"event": "failed", "what": what, "error": fmt.Sprint(err), "at": time.Now().UTC().Format(time.RFC3339Nano)})
}

// interrupted: the agent went away; the request is made again. The test knows when an agent may be away.
func (w *workload) interrupted(what string, err error) {
	w.interruptions++
	at := fmt.Sprint(time.Now().UnixMilli())
	say(map[string]string{"event": "interrupted", "what": what, "error": fmt.Sprint(err), "ms": at})
}

// trust tells of an authority that it hears of for the first time.
func (w *workload) trust(id string) {
	if !w.trusted[id] {
		w.trusted[id] = true
		say(map[string]string{"event": "trusted", "authority": id})
	}
}

// look: is every identity held at this moment, by a certificate that is valid now?
func (w *workload) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.serials) == 0 {
		return
	}
	for _, id := range w.expected {
		if svid := w.inHand[id]; svid == nil || time.Now().After(svid.Certificates[0].NotAfter) {
			w.lapsed++
			say(map[string]string{"event": "lapsed", "id": id, "at": time.Now().UTC().Format(time.RFC3339Nano)})
		}
	}
}

// token asks for one JWT-SVID and verifies it.
func (w *workload) token(ctx context.Context, client *workloadapi.Client, params jwtsvid.Params) {
	w.mu.Lock()
	bundles := w.jwt
	w.mu.Unlock()
	if bundles == nil {
		return
	}
	asking, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	svid, err := client.FetchJWTSVID(asking, params)
	for status.Code(err) == codes.Unavailable && asking.Err() == nil {
		w.mu.Lock()
		w.interrupted("FetchJWTSVID", err)
		w.mu.Unlock()
		time.Sleep(pace)
		svid, err = client.FetchJWTSVID(asking, params)
	}
	if ctx.Err() != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.fail("FetchJWTSVID", err)
		return
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), w.jwt, []string{params.Audience}); err != nil {
		w.fail("the JWT-SVID does not verify", err)
		return
	}
	w.tokens++
	if key := keyID(svid.Marshal()); !w.keys[key] {
		w.keys[key] = true
		say(map[string]string{"event": "jwt", "issuer": key})
	}
}

// keyID is the ID of the key that a token was signed with, as its header names it.
func keyID(token string) string {
	encoded, _, _ := strings.Cut(token, ".")
	var header struct {
		KeyID string `json:"kid"`
	}
	if text, err := base64.RawURLEncoding.DecodeString(encoded); err == nil {
		_ = json.Unmarshal(text, &header)
	}
	return header.KeyID
}

func (w *workload) OnX509ContextUpdate(update *workloadapi.X509Context) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range w.domains {
		if domain, err := spiffeid.TrustDomainFromString(id); err != nil || !update.Bundles.Has(domain) {
			w.fail("no bundle of "+id, err)
		}
	}
	for _, authority := range update.Bundles.Bundles() {
		for _, cert := range authority.X509Authorities() {
			w.trust(hex.EncodeToString(cert.SubjectKeyId))
		}
	}
	got := map[string]*x509svid.SVID{}
	for _, svid := range update.SVIDs {
		got[svid.ID.String()] = svid
		if _, _, err := x509svid.Verify(svid.Certificates, update.Bundles); err != nil {
			w.fail("the X.509-SVID does not verify", err)
		}
		w.earlier = append(w.earlier, svid)
		leaf := svid.Certificates[0]
		if serial := leaf.SerialNumber.Text(16); !w.serials[serial] {
			w.serials[serial] = true
			issuer := hex.EncodeToString(leaf.AuthorityKeyId)
			w.authorities[issuer] = true
			say(map[string]string{"event": "x509", "id": svid.ID.String(), "serial": serial, "issuer": issuer})
		}
	}
	// Peers may still show what was issued before: it must go on verifying until it expires.
	alive := w.earlier[:0]
	for _, svid := range w.earlier {
		if time.Now().Before(svid.Certificates[0].NotAfter) {
			alive = append(alive, svid)
			if _, _, err := x509svid.Verify(svid.Certificates, update.Bundles); err != nil && time.Now().Before(svid.Certificates[0].NotAfter) {
				w.fail("an earlier X.509-SVID does not verify any more", err)
			}
		}
	}
	w.earlier = alive
	ids := make([]string, 0, len(got))
	for id := range got {
		ids = append(ids, id)
	}
	sort.Strings(ids)
	for _, id := range w.expected {
		if got[id] == nil {
			w.fail("the identities changed", errors.New(strings.Join(ids, " ")))
		}
	}
	w.inHand = got
}

// OnX509ContextWatchError: a stream that ends because its agent ends is taken up again; anything else is a refusal.
func (w *workload) OnX509ContextWatchError(err error) {
	w.watchError("the X.509 stream", err)
}

func (w *workload) OnJWTBundlesUpdate(bundles *jwtbundle.Set) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.jwt = bundles
	for _, bundle := range bundles.Bundles() {
		for id := range bundle.JWTAuthorities() {
			w.trust(id)
		}
	}
}

func (w *workload) OnJWTBundlesWatchError(err error) {
	w.watchError("the JWT bundles' stream", err)
}

func (w *workload) watchError(what string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch status.Code(err) {
	case codes.Canceled: // this program ends
	case codes.Unavailable:
		w.interrupted(what, err)
	default:
		w.fail(what, err)
		fmt.Fprintln(os.Stderr, what, err)
	}
}
