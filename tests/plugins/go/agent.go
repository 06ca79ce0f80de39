package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	agentnodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	svidstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/svidstore/v1"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// workloadAttestor tells the name of a process and what it was configured with.
type workloadAttestor struct {
	workloadattestorv1.UnimplementedWorkloadAttestorServer
	base
}

func (p *workloadAttestor) Attest(ctx context.Context, req *workloadattestorv1.AttestRequest) (*workloadattestorv1.AttestResponse, error) {
	config, trustDomain := p.misbehave(ctx)
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", req.Pid))
	if err != nil {
		return nil, status.Errorf(codes.NotFound, "no such process: %v", err)
	}
	_, err = p.metrics.IncrCounter(ctx, &metricsv1.IncrCounterRequest{
		Key: []string{"test_plugin", "attested"}, Val: 1,
		Labels: []*metricsv1.Label{{Name: "greeting", Value: config.Greeting}},
	})
	if err != nil {
		return nil, err
	}
	values := []string{"greeting:" + config.Greeting, "domain:" + trustDomain, "comm:" + strings.TrimSpace(string(name))}
	for key, value := range config.Labels {
		values = append(values, "label:"+key+":"+value)
	}
	return &workloadattestorv1.AttestResponse{SelectorValues: values}, nil
}

// AttestReference repeats what it was asked, for a kind of its own.
func (p *workloadAttestor) AttestReference(ctx context.Context, req *workloadattestorv1.AttestReferenceRequest) (*workloadattestorv1.AttestReferenceResponse, error) {
	if req.Reference.GetTypeUrl() != "type.googleapis.com/test.Name" {
		return nil, status.Error(codes.Unimplemented, "not my kind")
	}
	headers, _ := metadata.FromIncomingContext(ctx)
	broker := strings.Join(headers.Get("spire-agent-broker-caller-id"), ",")
	return &workloadattestorv1.AttestReferenceResponse{SelectorValues: []string{"name:" + string(req.Reference.Value), "broker:" + broker}}, nil
}

// svidStore writes what it is given into files named by the metadata.
type svidStore struct {
	svidstorev1.UnimplementedSVIDStoreServer
	base
}

func (p *svidStore) file(ctx context.Context, metadata []string) (string, error) {
	config, _ := p.misbehave(ctx)
	for _, value := range metadata {
		if name, found := strings.CutPrefix(value, "name:"); found {
			return filepath.Join(config.Folder, name), nil
		}
	}
	return "", status.Error(codes.InvalidArgument, "no name")
}

func (p *svidStore) PutX509SVID(ctx context.Context, req *svidstorev1.PutX509SVIDRequest) (*svidstorev1.PutX509SVIDResponse, error) {
	file, err := p.file(ctx, req.Metadata)
	if err != nil {
		return nil, err
	}
	content, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(file+".new", content, 0o600); err != nil {
		return nil, err
	}
	return &svidstorev1.PutX509SVIDResponse{}, os.Rename(file+".new", file)
}

func (p *svidStore) DeleteX509SVID(ctx context.Context, req *svidstorev1.DeleteX509SVIDRequest) (*svidstorev1.DeleteX509SVIDResponse, error) {
	file, err := p.file(ctx, req.Metadata)
	if err != nil {
		return nil, err
	}
	return &svidstorev1.DeleteX509SVIDResponse{}, os.Remove(file)
}

// agentNodeAttestor shows its greeting, and answers challenges by turning them round.
type agentNodeAttestor struct {
	agentnodeattestorv1.UnimplementedNodeAttestorServer
	base
}

func (p *agentNodeAttestor) AidAttestation(stream agentnodeattestorv1.NodeAttestor_AidAttestationServer) error {
	config, _ := p.misbehave(stream.Context())
	err := stream.Send(&agentnodeattestorv1.PayloadOrChallengeResponse{
		Data: &agentnodeattestorv1.PayloadOrChallengeResponse_Payload{Payload: []byte(config.Greeting)},
	})
	if err != nil {
		return err
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		err = stream.Send(&agentnodeattestorv1.PayloadOrChallengeResponse{
			Data: &agentnodeattestorv1.PayloadOrChallengeResponse_ChallengeResponse{ChallengeResponse: turned(req.Challenge)},
		})
		if err != nil {
			return err
		}
	}
}

func turned(challenge []byte) []byte {
	answer := bytes.Clone(challenge)
	for i, j := 0, len(answer)-1; i < j; i, j = i+1, j-1 {
		answer[i], answer[j] = answer[j], answer[i]
	}
	return answer
}
