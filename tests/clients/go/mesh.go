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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// How often each peer is called, and which of the calls carry a token: 20 handshakes and 5 tokens a second.
	meshPace   = 50 * time.Millisecond
	meshTokens = 4
	// How often it is looked at what is trusted and held, and how often the counts are told.
	meshLook     = 100 * time.Millisecond
	meshCounts   = 500 * time.Millisecond
	meshPatience = 10 * time.Second
	meshAudience = "mesh"
)

// meshed is a service that calls its peers, and is called by them, with a handshake of its own each time.
type meshed struct {
	x509   *workloadapi.X509Source
	jwt    *workloadapi.JWTSource
	agent  *workloadapi.Client
	config *tls.Config
	own    spiffeid.TrustDomain
	others []spiffeid.TrustDomain

	mu      sync.Mutex
	calls   map[string]int  // by peer; one that was there once stays
	roots   map[string]bool // authorities and keys that are trusted
	trusted map[string]bool // and those that ever were
	serials map[string]bool
	serial  string
	keys    map[string]string // that signed the newest token, by event

	tokens, denied, interrupted int
	failed, served              int
}

// mesh calls until the file stop is there, and serves until SIGTERM. Peers that are not there yet are waited for; those that
// are IDs of trust domains are further domains whose members may call.
func mesh(listen, stop string, peers []string) error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	m := &meshed{
		calls: map[string]int{}, roots: map[string]bool{}, trusted: map[string]bool{}, serials: map[string]bool{},
		keys: map[string]string{},
	}
	var addresses []string
	for _, peer := range peers {
		if !strings.HasPrefix(peer, "spiffe://") {
			addresses = append(addresses, peer)
		} else if domain, err := spiffeid.TrustDomainFromString(peer); err != nil {
			return err
		} else {
			m.others = append(m.others, domain)
		}
	}
	var err error
	if m.x509, err = workloadapi.NewX509Source(ctx); err != nil {
		return err
	}
	if m.jwt, err = workloadapi.NewJWTSource(ctx); err != nil {
		return err
	}
	if m.agent, err = workloadapi.New(ctx); err != nil {
		return err
	}
	svid, err := m.x509.GetX509SVID()
	if err != nil {
		return err
	}
	m.own = svid.ID.TrustDomain()
	authorize := tlsconfig.AdaptMatcher(m.member)
	listener, err := tls.Listen("tcp", listen, tlsconfig.MTLSServerConfig(m.x509, m.x509, authorize))
	if err != nil {
		return err
	}
	go m.accept(ctx, listener)
	m.config = tlsconfig.MTLSClientConfig(m.x509, m.x509, authorize)
	calling, enough := context.WithCancel(ctx)
	var callers sync.WaitGroup
	for _, peer := range addresses {
		callers.Add(1)
		go func() {
			defer callers.Done()
			m.keepCalling(calling, peer)
		}()
	}
	counts := time.NewTicker(meshCounts)
	for tick := time.NewTicker(meshLook); ctx.Err() == nil; <-tick.C {
		m.look()
		if _, err := os.Stat(stop); err == nil {
			break
		}
		select {
		case <-counts.C:
			m.count("counts", addresses)
		default:
		}
	}
	enough()
	callers.Wait()
	m.count("summary", addresses)
	<-ctx.Done()
	return nil
}

func (m *meshed) member(id spiffeid.ID) error {
	for _, domain := range append([]spiffeid.TrustDomain{m.own}, m.others...) {
		if id.MemberOf(domain) {
			return nil
		}
	}
	return fmt.Errorf("%s is of no domain that may call", id)
}

// count tells all counts; least is of the peer that was called least often.
func (m *meshed) count(event string, peers []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	calls, least := 0, -1
	for _, peer := range peers {
		n := m.calls[peer]
		if calls += n; least < 0 || n < least {
			least = n
		}
	}
	tell(map[string]string{
		"event": event, "calls": fmt.Sprint(calls), "least": fmt.Sprint(least), "served": fmt.Sprint(m.served), "failed": fmt.Sprint(m.failed),
		"tokens": fmt.Sprint(m.tokens), "denied": fmt.Sprint(m.denied), "interrupted": fmt.Sprint(m.interrupted),
		"svids": fmt.Sprint(len(m.serials)), "authorities": fmt.Sprint(len(m.trusted)),
	})
}

// trusts gives the authorities and keys that are trusted, of all domains.
func (m *meshed) trusts() (map[string]bool, error) {
	now := map[string]bool{}
	for _, domain := range append([]spiffeid.TrustDomain{m.own}, m.others...) {
		bundle, err := m.x509.GetX509BundleForTrustDomain(domain)
		if err != nil {
			return nil, err
		}
		for _, root := range bundle.X509Authorities() {
			now[hex.EncodeToString(root.SubjectKeyId)] = true
		}
		if keys, err := m.jwt.GetJWTBundleForTrustDomain(domain); err == nil {
			for id := range keys.JWTAuthorities() {
				now[id] = true
			}
		}
	}
	return now, nil
}

// look tells of what is new: roots that are trusted, or not any more, and the own SVID with all that signed it.
func (m *meshed) look() {
	now, err := m.trusts()
	if err != nil {
		m.fail("no bundle", err)
		return
	}
	m.mu.Lock()
	for id := range now {
		if !m.roots[id] {
			m.trusted[id] = true
			tell(map[string]string{"event": "trusted", "authority": id})
		}
	}
	for id := range m.roots {
		if !now[id] {
			tell(map[string]string{"event": "left", "authority": id})
		}
	}
	m.roots = now
	m.mu.Unlock()
	svid, err := m.x509.GetX509SVID()
	if err != nil {
		m.fail("no SVID", err)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if serial := svid.Certificates[0].SerialNumber.Text(16); serial != m.serial {
		m.serial = serial
		m.serials[serial] = true
		var issuers []string
		for _, cert := range svid.Certificates {
			issuers = append(issuers, hex.EncodeToString(cert.AuthorityKeyId))
		}
		tell(map[string]string{"event": "x509", "id": svid.ID.String(), "serial": serial, "issuers": strings.Join(issuers, " ")})
	}
}

func (m *meshed) keepCalling(ctx context.Context, peer string) {
	tick := time.NewTicker(meshPace)
	defer tick.Stop()
	for n := 0; ctx.Err() == nil; <-tick.C {
		greeting := "hello"
		if n%meshTokens == 0 {
			// One that is the same all the time, so that the agent has it, and one that nobody has yet.
			audience := meshAudience
			if n%(2*meshTokens) == 0 {
				audience = fmt.Sprintf("%s-%s-%d", meshAudience, peer, n)
			}
			token, err := m.token(audience)
			if err != nil {
				m.fail("FetchJWTSVID", err)
				continue // for another one
			}
			greeting = audience + " " + token
		}
		m.call(peer, greeting)
		n++
	}
}

// token asks again when no server answers: the test knows whether one could have.
func (m *meshed) token(audience string) (string, error) {
	asking, cancel := context.WithTimeout(context.Background(), meshPatience)
	defer cancel()
	svid, err := m.jwt.FetchJWTSVID(asking, jwtsvid.Params{Audience: audience})
	for status.Code(err) == codes.Unavailable && asking.Err() == nil {
		m.mu.Lock()
		m.interrupted++
		tell(map[string]string{"event": "interrupted", "error": fmt.Sprint(err)})
		m.mu.Unlock()
		time.Sleep(meshPace)
		svid, err = m.jwt.FetchJWTSVID(asking, jwtsvid.Params{Audience: audience})
	}
	if err != nil {
		return "", err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	event := "jwt"
	if audience == meshAudience {
		event = "kept"
	}
	if key := keyID(svid.Marshal()); key != m.keys[event] {
		m.keys[event] = key
		tell(map[string]string{"event": event, "issuer": key})
	}
	return svid.Marshal(), nil
}

func (m *meshed) call(peer, greeting string) {
	tcp, err := net.DialTimeout("tcp", peer, meshPatience)
	if err != nil {
		m.mu.Lock()
		_, begun := m.calls[peer]
		m.mu.Unlock()
		if begun {
			m.fail("no connection to "+peer, err)
		}
		return
	}
	conn := tls.Client(tcp, m.config)
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(meshPatience))
	if _, err := fmt.Fprintf(conn, "%s\n", greeting); err != nil {
		m.fail("handshake with "+peer, err)
		return
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err != nil:
		m.failing("answer of "+peer, err)
	case line != "welcome\n":
		m.denied++
		tell(map[string]string{"event": "denied", "peer": peer, "error": strings.TrimSpace(line)})
	default:
		m.calls[peer]++
		if greeting != "hello" {
			m.tokens++
		}
	}
}

func (m *meshed) accept(ctx context.Context, listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			m.fail("accept", err)
			return
		}
		go m.answer(ctx, conn)
	}
}

func (m *meshed) answer(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(meshPatience))
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		m.fail("a caller", err)
		return
	}
	if audience, token, is := strings.Cut(strings.TrimSpace(line), " "); is {
		if err := m.verify(ctx, token, audience); err != nil {
			_, _ = fmt.Fprintf(conn, "%v\n", err)
			return
		}
	}
	m.mu.Lock()
	m.served++
	m.mu.Unlock()
	_, _ = fmt.Fprintln(conn, "welcome")
}

// verify has a token verified by the bundles in hand, and by the agent.
func (m *meshed) verify(ctx context.Context, token, audience string) error {
	if _, err := jwtsvid.ParseAndValidate(token, m.jwt, []string{audience}); err != nil {
		return err
	}
	asking, cancel := context.WithTimeout(ctx, meshPatience)
	defer cancel()
	if _, err := m.agent.ValidateJWTSVID(asking, token, audience); err != nil {
		return fmt.Errorf("ValidateJWTSVID: %w", err)
	}
	return nil
}

func (m *meshed) fail(what string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failing(what, err)
}

// failing is called with the lock held.
func (m *meshed) failing(what string, err error) {
	m.failed++
	tell(map[string]string{"event": "failed", "what": what, "error": fmt.Sprint(err)})
}

// tell says it with the time.
func tell(fields map[string]string) {
	fields["at"] = time.Now().UTC().Format(time.RFC3339Nano)
	say(fields)
}
