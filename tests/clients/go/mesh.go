package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

const (
	meshPace     = 200 * time.Millisecond
	meshPatience = 10 * time.Second
	meshAudience = "mesh"
)

// meshed is a service that calls its peers, and is called by them, with a handshake and a JWT-SVID of its own each time.
type meshed struct {
	x509 *workloadapi.X509Source
	jwt  *workloadapi.JWTSource

	mu             sync.Mutex
	begun          map[string]bool // peers that were there once
	roots          map[string]bool
	serial, key    string
	calls, denied  int
	failed, served int
}

// mesh calls until the file stop is there, and serves until SIGTERM. Peers that are not there yet are waited for.
func mesh(listen, stop string, peers []string) error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	m := &meshed{begun: map[string]bool{}, roots: map[string]bool{}}
	var err error
	if m.x509, err = workloadapi.NewX509Source(ctx); err != nil {
		return err
	}
	if m.jwt, err = workloadapi.NewJWTSource(ctx); err != nil {
		return err
	}
	svid, err := m.x509.GetX509SVID()
	if err != nil {
		return err
	}
	domain := svid.ID.TrustDomain()
	authorize := tlsconfig.AuthorizeMemberOf(domain)
	listener, err := tls.Listen("tcp", listen, tlsconfig.MTLSServerConfig(m.x509, m.x509, authorize))
	if err != nil {
		return err
	}
	go m.accept(listener)
	config := tlsconfig.MTLSClientConfig(m.x509, m.x509, authorize)
	for tick := time.NewTicker(meshPace); ctx.Err() == nil; <-tick.C {
		m.look(domain)
		if _, err := os.Stat(stop); err == nil {
			break
		}
		for _, peer := range peers {
			m.call(ctx, config, peer)
		}
	}
	m.mu.Lock()
	say(map[string]string{
		"event": "summary", "calls": fmt.Sprint(m.calls), "served": fmt.Sprint(m.served), "failed": fmt.Sprint(m.failed),
		"denied": fmt.Sprint(m.denied),
	})
	m.mu.Unlock()
	<-ctx.Done()
	return nil
}

// look tells of what is new: roots that are trusted, or not any more, and the own SVID with all that signed it.
func (m *meshed) look(domain spiffeid.TrustDomain) {
	bundle, err := m.x509.GetX509BundleForTrustDomain(domain)
	if err != nil {
		m.fail("no bundle", err)
		return
	}
	now := map[string]bool{}
	for _, root := range bundle.X509Authorities() {
		id := hex.EncodeToString(root.SubjectKeyId)
		if now[id] = true; !m.roots[id] {
			say(map[string]string{"event": "trusted", "authority": id})
		}
	}
	if keys, err := m.jwt.GetJWTBundleForTrustDomain(domain); err == nil {
		for id := range keys.JWTAuthorities() {
			if now[id] = true; !m.roots[id] {
				say(map[string]string{"event": "trusted", "authority": id})
			}
		}
	}
	for id := range m.roots {
		if !now[id] {
			say(map[string]string{"event": "left", "authority": id})
		}
	}
	m.roots = now
	svid, err := m.x509.GetX509SVID()
	if err != nil {
		m.fail("no SVID", err)
		return
	}
	if serial := svid.Certificates[0].SerialNumber.Text(16); serial != m.serial {
		m.serial = serial
		var issuers []string
		for _, cert := range svid.Certificates {
			issuers = append(issuers, hex.EncodeToString(cert.AuthorityKeyId))
		}
		say(map[string]string{"event": "x509", "id": svid.ID.String(), "serial": serial, "issuers": strings.Join(issuers, " ")})
	}
}

func (m *meshed) call(ctx context.Context, config *tls.Config, peer string) {
	asking, cancel := context.WithTimeout(ctx, meshPatience)
	defer cancel()
	svid, err := m.jwt.FetchJWTSVID(asking, jwtsvid.Params{Audience: meshAudience})
	if err != nil {
		m.fail("FetchJWTSVID", err)
		return
	}
	if key := keyID(svid.Marshal()); key != m.key {
		m.key = key
		say(map[string]string{"event": "jwt", "issuer": key})
	}
	tcp, err := (&net.Dialer{}).DialContext(asking, "tcp", peer)
	if err != nil {
		if m.begun[peer] {
			m.fail("no connection to "+peer, err)
		}
		return
	}
	m.begun[peer] = true
	conn := tls.Client(tcp, config)
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(meshPatience))
	if _, err := fmt.Fprintf(conn, "%s\n", svid.Marshal()); err != nil {
		m.fail("handshake with "+peer, err)
		return
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	switch {
	case err != nil:
		m.fail("answer of "+peer, err)
	case line != "welcome\n":
		m.deny(peer, line)
	default:
		m.mu.Lock()
		m.calls++
		m.mu.Unlock()
	}
}

func (m *meshed) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			m.fail("accept", err)
			return
		}
		go m.answer(conn)
	}
}

func (m *meshed) answer(conn net.Conn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(meshPatience))
	token, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		m.fail("a caller", err)
		return
	}
	if _, err := jwtsvid.ParseAndValidate(strings.TrimSpace(token), m.jwt, []string{meshAudience}); err != nil {
		_, _ = fmt.Fprintf(conn, "%v\n", err)
		return
	}
	m.mu.Lock()
	m.served++
	m.mu.Unlock()
	_, _ = fmt.Fprintln(conn, "welcome")
}

func (m *meshed) fail(what string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failed++
	say(map[string]string{"event": "failed", "what": what, "error": fmt.Sprint(err), "at": time.Now().UTC().Format(time.RFC3339Nano)})
}

func (m *meshed) deny(peer, why string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.denied++
	say(map[string]string{"event": "denied", "peer": peer, "error": strings.TrimSpace(why), "at": time.Now().UTC().Format(time.RFC3339Nano)})
}
