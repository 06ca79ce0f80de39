package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	agentstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/agentstore/v1"
	identityproviderv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/identityprovider/v1"
	agentkeymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/keymanager/v1"
	keymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/keymanager/v1"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	upstreamauthorityv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/upstreamauthority/v1"
	plugintypes "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/types"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// keyManager keeps keys in memory, and in its folder if it has one.
type keyManager struct {
	keymanagerv1.UnimplementedKeyManagerServer
	base
	keyMutex sync.Mutex
	keys     map[string]entry
}

type entry struct {
	signer crypto.Signer
	public *keymanagerv1.PublicKey
}

func (p *keyManager) GenerateKey(ctx context.Context, req *keymanagerv1.GenerateKeyRequest) (*keymanagerv1.GenerateKeyResponse, error) {
	p.misbehave(ctx)
	if req.KeyId == "" {
		return nil, status.Error(codes.InvalidArgument, "key id is required")
	}
	var signer crypto.Signer
	var err error
	switch req.KeyType {
	case keymanagerv1.KeyType_EC_P256:
		signer, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case keymanagerv1.KeyType_EC_P384:
		signer, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case keymanagerv1.KeyType_RSA_2048:
		signer, err = rsa.GenerateKey(rand.Reader, 2048)
	case keymanagerv1.KeyType_RSA_4096:
		signer, err = rsa.GenerateKey(rand.Reader, 4096)
	default:
		err = status.Error(codes.InvalidArgument, "key type is required")
	}
	if err != nil {
		return nil, err
	}
	if config, _ := p.misbehave(ctx); config.Folder != "" {
		der, err := x509.MarshalPKCS8PrivateKey(signer)
		if err != nil {
			return nil, err
		}
		name := filepath.Join(config.Folder, fmt.Sprintf("%s.%d", req.KeyId, req.KeyType))
		if err := os.WriteFile(name+".new", der, 0o600); err != nil {
			return nil, err
		}
		if err := os.Rename(name+".new", name); err != nil {
			return nil, err
		}
	}
	public, err := p.add(req.KeyId, req.KeyType, signer)
	if err != nil {
		return nil, err
	}
	p.logger.Info("Generated", "key", req.KeyId, "fingerprint", public.Fingerprint)
	return &keymanagerv1.GenerateKeyResponse{PublicKey: public}, nil
}

func (p *keyManager) add(id string, keyType keymanagerv1.KeyType, signer crypto.Signer) (*keymanagerv1.PublicKey, error) {
	spki, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(spki)
	public := &keymanagerv1.PublicKey{Id: id, Type: keyType, PkixData: spki, Fingerprint: hex.EncodeToString(sum[:])}
	p.keyMutex.Lock()
	defer p.keyMutex.Unlock()
	p.keys[id] = entry{signer: signer, public: public}
	return public, nil
}

// Configure takes up the keys of its folder.
func (p *keyManager) Configure(ctx context.Context, req *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	resp, err := p.base.Configure(ctx, req)
	if err != nil || p.config.Folder == "" {
		return resp, err
	}
	files, err := filepath.Glob(filepath.Join(p.config.Folder, "*.[0-9]"))
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		der, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		key, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			return nil, err
		}
		name := filepath.Base(file)
		keyType := keymanagerv1.KeyType(name[len(name)-1] - '0')
		if _, err := p.add(name[:len(name)-2], keyType, key.(crypto.Signer)); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

func (p *keyManager) GetPublicKey(_ context.Context, req *keymanagerv1.GetPublicKeyRequest) (*keymanagerv1.GetPublicKeyResponse, error) {
	p.keyMutex.Lock()
	defer p.keyMutex.Unlock()
	return &keymanagerv1.GetPublicKeyResponse{PublicKey: p.keys[req.KeyId].public}, nil
}

func (p *keyManager) GetPublicKeys(context.Context, *keymanagerv1.GetPublicKeysRequest) (*keymanagerv1.GetPublicKeysResponse, error) {
	p.keyMutex.Lock()
	defer p.keyMutex.Unlock()
	resp := &keymanagerv1.GetPublicKeysResponse{}
	for _, key := range p.keys {
		resp.PublicKeys = append(resp.PublicKeys, key.public)
	}
	return resp, nil
}

func (p *keyManager) SignData(ctx context.Context, req *keymanagerv1.SignDataRequest) (*keymanagerv1.SignDataResponse, error) {
	p.misbehave(ctx)
	p.keyMutex.Lock()
	key, found := p.keys[req.KeyId]
	p.keyMutex.Unlock()
	if !found {
		return nil, status.Errorf(codes.NotFound, "no such key %q", req.KeyId)
	}
	var opts crypto.SignerOpts
	if pss := req.GetPssOptions(); pss != nil {
		opts = &rsa.PSSOptions{SaltLength: int(pss.SaltLength), Hash: crypto.Hash(pss.HashAlgorithm)}
	} else {
		opts = crypto.Hash(req.GetHashAlgorithm())
	}
	signature, err := key.signer.Sign(rand.Reader, req.Data, opts)
	if err != nil {
		return nil, err
	}
	return &keymanagerv1.SignDataResponse{Signature: signature, KeyFingerprint: key.public.Fingerprint}, nil
}

// agentKeyManager is the same for agents, whose messages have the same form.
type agentKeyManager struct {
	agentkeymanagerv1.UnimplementedKeyManagerServer
	keyManager
}

func as[To proto.Message](from proto.Message, to To, err error) (To, error) {
	if err != nil {
		return to, err
	}
	wire, err := proto.Marshal(from)
	if err != nil {
		return to, err
	}
	return to, proto.Unmarshal(wire, to)
}

func (p *agentKeyManager) GenerateKey(ctx context.Context, req *agentkeymanagerv1.GenerateKeyRequest) (*agentkeymanagerv1.GenerateKeyResponse, error) {
	resp, err := p.keyManager.GenerateKey(ctx, &keymanagerv1.GenerateKeyRequest{KeyId: req.KeyId, KeyType: keymanagerv1.KeyType(req.KeyType)})
	return as(resp, &agentkeymanagerv1.GenerateKeyResponse{}, err)
}

func (p *agentKeyManager) GetPublicKey(ctx context.Context, req *agentkeymanagerv1.GetPublicKeyRequest) (*agentkeymanagerv1.GetPublicKeyResponse, error) {
	resp, err := p.keyManager.GetPublicKey(ctx, &keymanagerv1.GetPublicKeyRequest{KeyId: req.KeyId})
	return as(resp, &agentkeymanagerv1.GetPublicKeyResponse{}, err)
}

func (p *agentKeyManager) GetPublicKeys(ctx context.Context, _ *agentkeymanagerv1.GetPublicKeysRequest) (*agentkeymanagerv1.GetPublicKeysResponse, error) {
	resp, err := p.keyManager.GetPublicKeys(ctx, &keymanagerv1.GetPublicKeysRequest{})
	return as(resp, &agentkeymanagerv1.GetPublicKeysResponse{}, err)
}

func (p *agentKeyManager) SignData(ctx context.Context, req *agentkeymanagerv1.SignDataRequest) (*agentkeymanagerv1.SignDataResponse, error) {
	same, err := as(req, &keymanagerv1.SignDataRequest{}, nil)
	if err != nil {
		return nil, err
	}
	resp, err := p.keyManager.SignData(ctx, same)
	return as(resp, &agentkeymanagerv1.SignDataResponse{}, err)
}

// serverNodeAttestor believes whoever turns its challenge round.
type serverNodeAttestor struct {
	nodeattestorv1.UnimplementedNodeAttestorServer
	base
	agents   agentstorev1.AgentStoreServiceClient
	identity identityproviderv1.IdentityProviderServiceClient
}

func (p *serverNodeAttestor) BrokerHostServices(broker pluginsdk.ServiceBroker) error {
	if !broker.BrokerClient(&p.agents) || !broker.BrokerClient(&p.identity) {
		return status.Error(codes.FailedPrecondition, "host services required")
	}
	return p.base.BrokerHostServices(broker)
}

func (p *serverNodeAttestor) Attest(stream nodeattestorv1.NodeAttestor_AttestServer) error {
	ctx := stream.Context()
	_, trustDomain := p.misbehave(ctx)
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	name := string(req.GetPayload())
	challenge := make([]byte, 16)
	_, _ = rand.Read(challenge)
	err = stream.Send(&nodeattestorv1.AttestResponse{Response: &nodeattestorv1.AttestResponse_Challenge{Challenge: challenge}})
	if err != nil {
		return err
	}
	if req, err = stream.Recv(); err != nil {
		return err
	}
	if !bytes.Equal(turned(req.GetChallengeResponse()), challenge) {
		return status.Error(codes.PermissionDenied, "challenge was not turned round")
	}
	id := fmt.Sprintf("spiffe://%s/spire/agent/turner/%s", trustDomain, name)
	_, err = p.agents.GetAgentInfo(ctx, &agentstorev1.GetAgentInfoRequest{AgentId: id})
	known := status.Code(err).String()
	identity, err := p.identity.FetchX509Identity(ctx, &identityproviderv1.FetchX509IdentityRequest{})
	if err != nil {
		return err
	}
	if _, err := x509.ParsePKCS8PrivateKey(identity.Identity.PrivateKey); err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(identity.Identity.CertChain[0])
	if err != nil {
		return err
	}
	headers, _ := metadata.FromIncomingContext(ctx)
	p.logger.Info("Attested", "known", known, "server", leaf.URIs[0].String(), "roots", len(identity.Bundle.X509Authorities),
		"from", headers.Get("X-Forwarded-Client-IP"))
	return stream.Send(&nodeattestorv1.AttestResponse{Response: &nodeattestorv1.AttestResponse_AgentAttributes{
		AgentAttributes: &nodeattestorv1.AgentAttributes{SpiffeId: id, SelectorValues: []string{"name:" + name}, CanReattest: true},
	}})
}

// upstreamAuthority signs with a root that it makes when it is first asked.
type upstreamAuthority struct {
	upstreamauthorityv1.UnimplementedUpstreamAuthorityServer
	base
	rootMutex sync.Mutex
	key       *ecdsa.PrivateKey
	root      *x509.Certificate
}

func (p *upstreamAuthority) authority(trustDomain string) (*ecdsa.PrivateKey, *x509.Certificate, error) {
	p.rootMutex.Lock()
	defer p.rootMutex.Unlock()
	if p.root != nil {
		return p.key, p.root, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "plugin root"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	if p.root, err = x509.ParseCertificate(der); err != nil {
		return nil, nil, err
	}
	p.key = key
	return p.key, p.root, nil
}

func (p *upstreamAuthority) MintX509CAAndSubscribe(req *upstreamauthorityv1.MintX509CARequest, stream upstreamauthorityv1.UpstreamAuthority_MintX509CAAndSubscribeServer) error {
	_, trustDomain := p.misbehave(stream.Context())
	csr, err := x509.ParseCertificateRequest(req.Csr)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "unable to parse CSR: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return status.Errorf(codes.InvalidArgument, "CSR signature: %v", err)
	}
	if len(csr.URIs) != 1 || csr.URIs[0].String() != "spiffe://"+trustDomain {
		return status.Error(codes.InvalidArgument, "CSR of another trust domain")
	}
	key, root, err := p.authority(trustDomain)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial, Subject: csr.Subject, URIs: csr.URIs,
		NotBefore: now.Add(-10 * time.Second), NotAfter: now.Add(time.Duration(req.PreferredTtl)*time.Second - time.Minute),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, root, csr.PublicKey, key)
	if err != nil {
		return err
	}
	roots := []*plugintypes.X509Certificate{{Asn1: root.Raw}}
	err = stream.Send(&upstreamauthorityv1.MintX509CAResponse{
		X509CaChain: []*plugintypes.X509Certificate{{Asn1: der}}, UpstreamX509Roots: roots,
	})
	if err != nil {
		return err
	}
	// The same roots once more, as if they had changed.
	if err := stream.Send(&upstreamauthorityv1.MintX509CAResponse{UpstreamX509Roots: roots}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}
