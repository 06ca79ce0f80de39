package main

import (
	"context"
	"encoding/asn1"
	"encoding/json"
	"os"
	"path/filepath"

	bundlepublisherv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/bundlepublisher/v1"
	credentialcomposerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	notifierv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/notifier/v1"
	plugintypes "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
)

// credentialComposer writes its greeting into whatever it is asked about, and has something against what "against" says.
type credentialComposer struct {
	credentialcomposerv1.UnimplementedCredentialComposerServer
	base
}

func (p *credentialComposer) extension(kind string, config config) (*credentialcomposerv1.X509Extension, error) {
	if config.Labels["against"] == kind {
		return nil, status.Errorf(codes.PermissionDenied, "no %s today", kind)
	}
	value, err := asn1.MarshalWithParams(config.Greeting+" "+kind, "utf8")
	return &credentialcomposerv1.X509Extension{Oid: config.Labels["extension"], Value: value}, err
}

func (p *credentialComposer) svid(ctx context.Context, kind, id string, attributes *credentialcomposerv1.X509SVIDAttributes) (*credentialcomposerv1.X509SVIDAttributes, error) {
	config, trustDomain := p.misbehave(ctx)
	extension, err := p.extension(kind, config)
	if err != nil {
		return nil, err
	}
	p.logger.Info("Composed", "kind", kind, "id", id)
	attributes.ExtraExtensions = append(attributes.ExtraExtensions, extension)
	attributes.DnsSans = append(attributes.DnsSans, config.Greeting+"."+trustDomain)
	subject := attributes.Subject
	subject.OrganizationalUnit = append(subject.OrganizationalUnit, config.Greeting)
	subject.Locality = []string{"Zürich"}
	subject.ExtraNames = append(subject.ExtraNames, &credentialcomposerv1.AttributeTypeAndValue{Oid: "2.5.4.12", StringValue: kind})
	if config.Labels["spoil"] == kind {
		attributes.ExtraExtensions = append(attributes.ExtraExtensions, &credentialcomposerv1.X509Extension{
			Oid: "2.5.29.19", Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff},
		})
	}
	return attributes, nil
}

func (p *credentialComposer) ComposeServerX509CA(ctx context.Context, req *credentialcomposerv1.ComposeServerX509CARequest) (*credentialcomposerv1.ComposeServerX509CAResponse, error) {
	config, _ := p.misbehave(ctx)
	extension, err := p.extension("ca", config)
	if err != nil {
		return nil, err
	}
	attributes := req.Attributes
	attributes.ExtraExtensions = append(attributes.ExtraExtensions, extension)
	attributes.PolicyIdentifiers = append(attributes.PolicyIdentifiers, config.Labels["extension"]+".1")
	attributes.Subject.CommonName = config.Greeting + " CA"
	attributes.Subject.SerialNumber = ""
	return &credentialcomposerv1.ComposeServerX509CAResponse{Attributes: attributes}, nil
}

func (p *credentialComposer) ComposeServerX509SVID(ctx context.Context, req *credentialcomposerv1.ComposeServerX509SVIDRequest) (*credentialcomposerv1.ComposeServerX509SVIDResponse, error) {
	attributes, err := p.svid(ctx, "server", "", req.Attributes)
	return &credentialcomposerv1.ComposeServerX509SVIDResponse{Attributes: attributes}, err
}

func (p *credentialComposer) ComposeAgentX509SVID(ctx context.Context, req *credentialcomposerv1.ComposeAgentX509SVIDRequest) (*credentialcomposerv1.ComposeAgentX509SVIDResponse, error) {
	attributes, err := p.svid(ctx, "agent", req.SpiffeId, req.Attributes)
	return &credentialcomposerv1.ComposeAgentX509SVIDResponse{Attributes: attributes}, err
}

func (p *credentialComposer) ComposeWorkloadX509SVID(ctx context.Context, req *credentialcomposerv1.ComposeWorkloadX509SVIDRequest) (*credentialcomposerv1.ComposeWorkloadX509SVIDResponse, error) {
	if config, _ := p.misbehave(ctx); config.Labels["silent"] != "" {
		return &credentialcomposerv1.ComposeWorkloadX509SVIDResponse{}, nil
	}
	attributes, err := p.svid(ctx, "workload", req.SpiffeId, req.Attributes)
	return &credentialcomposerv1.ComposeWorkloadX509SVIDResponse{Attributes: attributes}, err
}

func (p *credentialComposer) ComposeWorkloadJWTSVID(ctx context.Context, req *credentialcomposerv1.ComposeWorkloadJWTSVIDRequest) (*credentialcomposerv1.ComposeWorkloadJWTSVIDResponse, error) {
	config, _ := p.misbehave(ctx)
	if config.Labels["silent"] != "" {
		// As a plugin that was built before there was such a method.
		return p.UnimplementedCredentialComposerServer.ComposeWorkloadJWTSVID(ctx, req)
	}
	if config.Labels["against"] == "jwt" {
		return nil, status.Error(codes.PermissionDenied, "no jwt today")
	}
	claims := req.Attributes.Claims
	greeted := append(claims.Fields["greeted"].GetListValue().AsSlice(), config.Greeting)
	added, err := structpb.NewStruct(map[string]any{
		"greeted": greeted, "number": 7, "half": 0.5, "nothing": nil, "nested": map[string]any{"yes": true, "id": req.SpiffeId},
	})
	if err != nil {
		return nil, err
	}
	for name, value := range added.Fields {
		claims.Fields[name] = value
	}
	if config.Labels["spoil"] == "jwt" {
		claims.Fields["sub"] = structpb.NewStringValue("spiffe://example.org/other")
	}
	return &credentialcomposerv1.ComposeWorkloadJWTSVIDResponse{Attributes: req.Attributes}, nil
}

// put writes what was told of a bundle into a file of the folder.
func (b *base) put(ctx context.Context, name string, bundle *plugintypes.Bundle) error {
	config, _ := b.misbehave(ctx)
	if config.Labels["against"] == name || there(filepath.Join(config.Folder, "against-"+name)) {
		return status.Errorf(codes.FailedPrecondition, "no %s today", name)
	}
	content, err := json.Marshal(bundle)
	if err != nil {
		return err
	}
	file := filepath.Join(config.Folder, name)
	if err := os.WriteFile(file+".new", content, 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// notifier keeps the bundle of the last event of each kind.
type notifier struct {
	notifierv1.UnimplementedNotifierServer
	base
}

func (p *notifier) Notify(ctx context.Context, req *notifierv1.NotifyRequest) (*notifierv1.NotifyResponse, error) {
	return &notifierv1.NotifyResponse{}, p.put(ctx, "updated", req.GetBundleUpdated().GetBundle())
}

func (p *notifier) NotifyAndAdvise(ctx context.Context, req *notifierv1.NotifyAndAdviseRequest) (*notifierv1.NotifyAndAdviseResponse, error) {
	return &notifierv1.NotifyAndAdviseResponse{}, p.put(ctx, "loaded", req.GetBundleLoaded().GetBundle())
}

// bundlePublisher keeps the last bundle.
type bundlePublisher struct {
	bundlepublisherv1.UnimplementedBundlePublisherServer
	base
}

func (p *bundlePublisher) PublishBundle(ctx context.Context, req *bundlepublisherv1.PublishBundleRequest) (*bundlepublisherv1.PublishBundleResponse, error) {
	return &bundlepublisherv1.PublishBundleResponse{}, p.put(ctx, "published", req.Bundle)
}
