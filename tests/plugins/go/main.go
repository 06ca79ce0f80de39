// A plugin of every kind for tests, built on SPIRE's plugin SDK as anyone's plugin is. The first argument says which kind it
// is to be; its configuration says what it is to do wrong.
package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl"
	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	agentkeymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/keymanager/v1"
	agentnodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	svidstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/svidstore/v1"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	bundlepublisherv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/bundlepublisher/v1"
	credentialcomposerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	keymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/keymanager/v1"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	notifierv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/notifier/v1"
	upstreamauthorityv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/upstreamauthority/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// config is what all kinds understand.
type config struct {
	Greeting string            `hcl:"greeting"`
	Labels   map[string]string `hcl:"labels"`
	// Each call dies, or hangs, while this file is there.
	DieFile  string `hcl:"die_file"`
	HangFile string `hcl:"hang_file"`
	// Refuses its configuration.
	Refuse string `hcl:"refuse"`
	// Writes this many lines to its standard output and to its log.
	Flood int `hcl:"flood"`
	// Where a store keeps what it is given, and a key manager its keys.
	Folder string `hcl:"folder"`
}

// base is what all kinds have: log, host services, configuration.
type base struct {
	configv1.UnimplementedConfigServer

	logger  hclog.Logger
	metrics metricsv1.MetricsServiceClient

	mutex       sync.Mutex
	config      config
	trustDomain string
}

func (b *base) SetLogger(logger hclog.Logger) { b.logger = logger }

func (b *base) BrokerHostServices(broker pluginsdk.ServiceBroker) error {
	if !broker.BrokerClient(&b.metrics) {
		return status.Error(codes.FailedPrecondition, "metrics host service required")
	}
	return nil
}

func parse(text string) (config, error) {
	var parsed config
	if err := hcl.Decode(&parsed, text); err != nil {
		return parsed, status.Errorf(codes.InvalidArgument, "failed to decode configuration: %v", err)
	}
	if parsed.Refuse != "" {
		return parsed, status.Error(codes.InvalidArgument, parsed.Refuse)
	}
	return parsed, nil
}

func (b *base) Configure(_ context.Context, req *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	parsed, err := parse(req.HclConfiguration)
	if err != nil {
		return nil, err
	}
	b.mutex.Lock()
	b.config = parsed
	b.trustDomain = req.CoreConfiguration.TrustDomain
	b.mutex.Unlock()
	b.logger.Info("Ready", "greeting", parsed.Greeting, "answer", 42)
	for n := range parsed.Flood {
		fmt.Printf("%d %s\n", n, strings.Repeat("x", 1000))
		b.logger.Debug("Flood", "number", n)
	}
	if parsed.Flood > 0 {
		fmt.Println("flooded")
	}
	return &configv1.ConfigureResponse{}, nil
}

func (b *base) Validate(_ context.Context, req *configv1.ValidateRequest) (*configv1.ValidateResponse, error) {
	if _, err := parse(req.HclConfiguration); err != nil {
		return &configv1.ValidateResponse{Notes: []string{status.Convert(err).Message()}}, nil
	}
	return &configv1.ValidateResponse{Valid: true}, nil
}

func there(file string) bool {
	_, err := os.Stat(file)
	return file != "" && err == nil
}

// misbehave does what the configuration says is to be done wrong now.
func (b *base) misbehave(ctx context.Context) (config, string) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if there(b.config.DieFile) {
		panic("as told")
	}
	for there(b.config.HangFile) && ctx.Err() == nil {
		time.Sleep(10 * time.Millisecond)
	}
	return b.config, b.trustDomain
}

func main() {
	kind := ""
	if len(os.Args) > 1 {
		kind = os.Args[1]
	}
	switch kind {
	case "workloadattestor":
		p := new(workloadAttestor)
		pluginmain.Serve(workloadattestorv1.WorkloadAttestorPluginServer(p), configv1.ConfigServiceServer(p))
	case "svidstore":
		p := new(svidStore)
		pluginmain.Serve(svidstorev1.SVIDStorePluginServer(p), configv1.ConfigServiceServer(p))
	case "server-keymanager":
		p := &keyManager{keys: map[string]entry{}}
		pluginmain.Serve(keymanagerv1.KeyManagerPluginServer(p), configv1.ConfigServiceServer(p))
	case "agent-keymanager":
		p := &agentKeyManager{keyManager: keyManager{keys: map[string]entry{}}}
		pluginmain.Serve(agentkeymanagerv1.KeyManagerPluginServer(p), configv1.ConfigServiceServer(p))
	case "server-nodeattestor":
		p := new(serverNodeAttestor)
		pluginmain.Serve(nodeattestorv1.NodeAttestorPluginServer(p), configv1.ConfigServiceServer(p))
	case "agent-nodeattestor":
		p := new(agentNodeAttestor)
		pluginmain.Serve(agentnodeattestorv1.NodeAttestorPluginServer(p), configv1.ConfigServiceServer(p))
	case "upstreamauthority":
		p := new(upstreamAuthority)
		pluginmain.Serve(upstreamauthorityv1.UpstreamAuthorityPluginServer(p), configv1.ConfigServiceServer(p))
	case "credentialcomposer":
		p := new(credentialComposer)
		pluginmain.Serve(credentialcomposerv1.CredentialComposerPluginServer(p), configv1.ConfigServiceServer(p))
	case "notifier":
		p := new(notifier)
		pluginmain.Serve(notifierv1.NotifierPluginServer(p), configv1.ConfigServiceServer(p))
	case "bundlepublisher":
		p := new(bundlePublisher)
		pluginmain.Serve(bundlepublisherv1.BundlePublisherPluginServer(p), configv1.ConfigServiceServer(p))
	default:
		fmt.Fprintf(os.Stderr, "unknown kind %q\n", kind)
		os.Exit(2)
	}
}
