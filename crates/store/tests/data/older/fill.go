// Fills a database as SPIRE of another release leaves it, by that release's own datastore, with rows in every table.
// Put it into a folder below that release's source; arguments: kind of database, connection string. null.sql was run
// afterwards: it makes rows as they are that were there before columns were added. The other files are dumps of that.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire/pkg/server/datastore"
	"github.com/spiffe/spire/pkg/server/datastore/sqlstore"
	"github.com/spiffe/spire/proto/private/server/journal"
	"github.com/spiffe/spire/proto/spire/common"
	"google.golang.org/protobuf/proto"
)

// Far ahead, so that nothing is pruned: 2286-11-20.
const late = 9999999999

func must[T any](value T, err error) T {
	check(err)
	return value
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func root(name string) []byte {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(int64(len(name))),
		Subject:               pkix.Name{Organization: []string{name}},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
		NotBefore:             time.Unix(1700000000, 0),
		NotAfter:              time.Unix(late, 0),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
		SubjectKeyId:          []byte(name),
	}
	return must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))
}

func jwtKey(id string, tainted bool) *common.PublicKey {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	pkix := must(x509.MarshalPKIXPublicKey(key.Public()))
	return &common.PublicKey{Kid: id, PkixBytes: pkix, NotAfter: late, TaintedKey: tainted}
}

func selectors(pairs ...string) (all []*common.Selector) {
	for i := 0; i < len(pairs); i += 2 {
		all = append(all, &common.Selector{Type: pairs[i], Value: pairs[i+1]})
	}
	return all
}

func main() {
	ctx := context.Background()
	ds := sqlstore.New(logrus.New())
	check(ds.Configure(ctx, fmt.Sprintf("database_type = %q\nconnection_string = %q", os.Args[1], os.Args[2])))

	for _, bundle := range []*common.Bundle{
		{
			TrustDomainId:  "spiffe://example.org",
			RootCas:        []*common.Certificate{{DerBytes: root("first")}, {DerBytes: root("second"), TaintedKey: true}},
			JwtSigningKeys: []*common.PublicKey{jwtKey("first", false), jwtKey("second", true)},
			RefreshHint:    600, SequenceNumber: 41,
		},
		{TrustDomainId: "spiffe://web.test", RootCas: []*common.Certificate{{DerBytes: root("web")}}},
		{TrustDomainId: "spiffe://spiffe.test", JwtSigningKeys: []*common.PublicKey{jwtKey("k", false)}, RefreshHint: 1 << 40, SequenceNumber: 1 << 62},
		{TrustDomainId: "spiffe://empty.test"},
	} {
		must(ds.CreateBundle(ctx, bundle))
	}
	must(ds.AppendBundle(ctx, &common.Bundle{TrustDomainId: "spiffe://example.org", JwtSigningKeys: []*common.PublicKey{jwtKey("third", false)}}))

	long := "/" + strings.Repeat("l", 255-len("spiffe://example.org/"))
	for _, entry := range []*common.RegistrationEntry{
		{EntryId: "least", ParentId: "spiffe://example.org/node", SpiffeId: "spiffe://example.org/least", Selectors: selectors("unix", "uid:0")},
		{
			EntryId: "full", ParentId: "spiffe://example.org/spire/agent/join_token/a", SpiffeId: "spiffe://example.org/full",
			Selectors:     selectors("unix", "uid:2147483648", "k8s", "pod-label:a/b:c:d", "docker", "env:A=\"q\" 'p' \\ % _ ; -- \t", "docker", "label:ünïcode ☃"),
			FederatesWith: []string{"spiffe://web.test", "spiffe://spiffe.test", "spiffe://empty.test"},
			DnsNames:      []string{"z.example", "a.example", "xn--bcher-kva.example"},
			Admin:         true, Downstream: true, StoreSvid: false, EntryExpiry: late,
			X509SvidTtl: 2147483647, JwtSvidTtl: 2147483647, Hint: "hint: ☃ 'quoted'",
		},
		{EntryId: "stored", ParentId: "spiffe://example.org/node", SpiffeId: "spiffe://example.org/stored", Selectors: selectors("aws_secretsmanager", "secretname:s"), StoreSvid: true},
		{EntryId: strings.Repeat("e", 255), ParentId: "spiffe://example.org/node", SpiffeId: "spiffe://example.org" + long, Selectors: selectors("unix", "path:/"+strings.Repeat("p", 249))},
		{EntryId: "alias", ParentId: "spiffe://example.org/spire/server", SpiffeId: "spiffe://example.org/node", Selectors: selectors("x509pop", "subject:cn:a")},
		{EntryId: "deleted", ParentId: "spiffe://example.org/node", SpiffeId: "spiffe://example.org/deleted", Selectors: selectors("unix", "uid:1")},
		{EntryId: "old", ParentId: "spiffe://example.org/node", SpiffeId: "spiffe://example.org/old", Selectors: selectors("unix", "uid:1")},
	} {
		must(ds.CreateRegistrationEntry(ctx, entry))
	}
	must(ds.DeleteRegistrationEntry(ctx, "deleted"))
	changed := must(ds.FetchRegistrationEntry(ctx, "full"))
	for range 3 {
		must(ds.UpdateRegistrationEntry(ctx, changed, nil))
	}

	for _, node := range []*common.AttestedNode{
		{SpiffeId: "spiffe://example.org/spire/agent/join_token/a", AttestationDataType: "join_token", CertSerialNumber: "1234567890123456789012345678901234567890", CertNotAfter: late},
		{SpiffeId: "spiffe://example.org/spire/agent/x509pop/b", AttestationDataType: "x509pop", CertSerialNumber: "1", CertNotAfter: late, NewCertSerialNumber: "2", NewCertNotAfter: late + 1, CanReattest: true},
		{SpiffeId: "spiffe://example.org/spire/agent/banned", AttestationDataType: "k8s_psat", CanReattest: true},
		{SpiffeId: "spiffe://example.org/spire/agent/past", AttestationDataType: "join_token", CertSerialNumber: "3", CertNotAfter: 1},
		{SpiffeId: "spiffe://example.org/spire/agent/old", AttestationDataType: "join_token", CertSerialNumber: "4", CertNotAfter: late},
		{SpiffeId: "spiffe://example.org/spire/agent/gone", AttestationDataType: "join_token", CertSerialNumber: "5", CertNotAfter: late},
	} {
		must(ds.CreateAttestedNode(ctx, node))
		check(ds.SetNodeSelectors(ctx, node.SpiffeId, selectors("x509pop", "subject:cn:a", "docker", "label:ünïcode ☃")))
	}
	must(ds.DeleteAttestedNode(ctx, "spiffe://example.org/spire/agent/gone"))

	for token, expiry := range map[string]int64{"unused": late, "past": 1} {
		check(ds.CreateJoinToken(ctx, &datastore.JoinToken{Token: token, Expiry: time.Unix(expiry, 0)}))
	}
	for name, profile := range map[string]datastore.BundleEndpointType{"web.test": datastore.BundleEndpointWeb, "spiffe.test": datastore.BundleEndpointSPIFFE} {
		relationship := &datastore.FederationRelationship{
			TrustDomain:           spiffeid.RequireTrustDomainFromString(name),
			BundleEndpointURL:     must(url.Parse("https://127.0.0.1:1/" + name + "?a=b%20c")),
			BundleEndpointProfile: profile,
		}
		if profile == datastore.BundleEndpointSPIFFE {
			relationship.EndpointSPIFFEID = spiffeid.RequireFromString("spiffe://spiffe.test/endpoint")
		}
		must(ds.CreateFederationRelationship(ctx, relationship))
	}
	for i := range 3 {
		must(ds.SetCAJournal(ctx, &datastore.CAJournal{Data: must(proto.Marshal(&journal.Entries{
			X509CAs: []*journal.X509CAEntry{{SlotId: "A", IssuedAt: 1700000000, NotAfter: late, Certificate: root("first"), Status: journal.Status_ACTIVE, AuthorityId: fmt.Sprintf("%040d", i)}},
		})), ActiveX509AuthorityID: fmt.Sprintf("%040d", i)}))
	}
	check(ds.Close())
}
