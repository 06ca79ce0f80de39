// The words of ../README.md, spoken by go-spiffe.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	if len(os.Args) > 3 && os.Args[1] == "live" {
		if err := live(os.Args[2], os.Args[3:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) > 3 && os.Args[1] == "mesh" {
		if err := mesh(os.Args[2], os.Args[3], os.Args[4:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 120*time.Second)
	defer cancel()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 2 && args[0] == "check":
		return check(ctx, args[1])
	case len(args) == 2 && args[0] == "serve":
		return serve(ctx, args[1])
	case len(args) == 3 && args[0] == "call":
		return call(ctx, args[1], args[2])
	case len(args) == 2 && args[0] == "watch":
		return watch(ctx, args[1])
	}
	return errors.New("usage: check AUDIENCE | serve ID | call ADDR ID | watch N | live AUDIENCE ID… | mesh ADDR STOP PEER…")
}

func say(fields map[string]string) {
	line, _ := json.Marshal(fields)
	fmt.Println(string(line))
}

func sayX509(svid *x509svid.SVID) {
	say(map[string]string{"event": "x509", "id": svid.ID.String(), "serial": svid.Certificates[0].SerialNumber.Text(16)})
}

func check(ctx context.Context, audience string) error {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	x509Context, err := client.FetchX509Context(ctx)
	if err != nil {
		return err
	}
	svid := x509Context.DefaultSVID()
	if _, _, err := x509svid.Verify(svid.Certificates, x509Context.Bundles); err != nil {
		return fmt.Errorf("X.509-SVID: %w", err)
	}
	sayX509(svid)
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience, Subject: svid.ID})
	if err != nil {
		return err
	}
	jwtBundles, err := client.FetchJWTBundles(ctx)
	if err != nil {
		return err
	}
	parsed, err := jwtsvid.ParseAndValidate(token.Marshal(), jwtBundles, []string{audience})
	if err != nil {
		return fmt.Errorf("JWT-SVID: %w", err)
	}
	if _, err := client.ValidateJWTSVID(ctx, token.Marshal(), audience); err != nil {
		return fmt.Errorf("ValidateJWTSVID: %w", err)
	}
	say(map[string]string{"event": "jwt", "id": parsed.ID.String()})
	return nil
}

func serve(ctx context.Context, expected string) error {
	id, err := spiffeid.FromString(expected)
	if err != nil {
		return err
	}
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	listener, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(id)))
	if err != nil {
		return err
	}
	defer listener.Close()
	say(map[string]string{"event": "listening", "addr": listener.Addr().String()})
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		if err := answer(conn, source); err != nil {
			say(map[string]string{"event": "refused", "error": err.Error()})
		}
	}
}

func answer(conn net.Conn, source *workloadapi.X509Source) error {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := bufio.NewReader(conn).ReadString('\n'); err != nil {
		return err
	}
	peer, err := peerID(conn.(*tls.Conn).ConnectionState().PeerCertificates)
	if err != nil {
		return err
	}
	svid, err := source.GetX509SVID()
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "%s\n", svid.ID); err != nil {
		return err
	}
	say(map[string]string{"event": "accepted", "peer": peer})
	return nil
}

func call(ctx context.Context, addr, expected string) error {
	id, err := spiffeid.FromString(expected)
	if err != nil {
		return err
	}
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	conn, err := tls.Dial("tcp", addr, tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id)))
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := fmt.Fprintln(conn, "hello"); err != nil {
		return err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return err
	}
	peer, err := peerID(conn.ConnectionState().PeerCertificates)
	if err != nil {
		return err
	}
	say(map[string]string{"event": "answered", "peer": peer, "line": line})
	return nil
}

func peerID(chain []*x509.Certificate) (string, error) {
	if len(chain) == 0 {
		return "", errors.New("the peer showed no certificate")
	}
	id, err := x509svid.IDFromCert(chain[0])
	return id.String(), err
}

type watcher struct {
	seen map[string]bool
	want int
	done context.CancelFunc
}

func (w *watcher) OnX509ContextUpdate(update *workloadapi.X509Context) {
	svid := update.DefaultSVID()
	serial := svid.Certificates[0].SerialNumber.Text(16)
	if w.seen[serial] {
		return
	}
	w.seen[serial] = true
	sayX509(svid)
	if len(w.seen) >= w.want {
		w.done()
	}
}

func (w *watcher) OnX509ContextWatchError(err error) {
	if !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, err)
	}
}

func watch(ctx context.Context, count string) error {
	want, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	watching, done := context.WithCancel(ctx)
	w := &watcher{seen: map[string]bool{}, want: want, done: done}
	if err := workloadapi.WatchX509Context(watching, w); len(w.seen) < want {
		return fmt.Errorf("saw %d of %d: %w", len(w.seen), want, err)
	}
	return nil
}
