//! The code in `src/gen` is what the contracts in `/proto` give. `UPDATE_GEN=1 cargo test -p finial-proto --test drift`
//! writes it anew. No `protoc` is needed.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // all of it is test

use prost::Message as _;
use std::fs;
use std::path::Path;

/// What to generate from one contract.
struct Unit {
    /// The file in `src/gen`, without `.rs`.
    name: &'static str,
    proto: &'static str,
    package: &'static str,
    client: bool,
    server: bool,
}

const fn unit(name: &'static str, proto: &'static str, package: &'static str) -> Unit {
    Unit { name, proto, package, client: true, server: true }
}

const fn messages(name: &'static str, proto: &'static str, package: &'static str) -> Unit {
    Unit { client: false, server: false, ..unit(name, proto, package) }
}

const fn served(name: &'static str, proto: &'static str, package: &'static str) -> Unit {
    Unit { client: false, ..unit(name, proto, package) }
}

impl Unit {
    /// Where the messages are of contracts whose halves are generated apart: the server's answers are ready-made bytes.
    fn small_module(&self) -> Option<&'static str> {
        match self.name {
            "workload" | "workload_server" => Some("workload"),
            "sync" | "sync_server" => Some("sync"),
            "server_entry_encoded" => Some("server::entry"),
            "envoy_secret_server" => Some("envoy::secret"),
            _ => None,
        }
    }
}

/// Envoy's packages, which use each other's messages, and where they are.
const ENVOY: &[(&str, &str)] = &[
    ("envoy.config.core.v3", "crate::envoy::core"),
    ("envoy.type.v3", "crate::envoy::types"),
    ("envoy.service.discovery.v3", "crate::envoy::discovery"),
    ("envoy.extensions.transport_sockets.tls.v3", "crate::envoy::tls"),
];

const UNITS: &[Unit] = &[
    unit("types", "spire/types.proto", "spire.api.types"),
    unit("server_agent", "spire/server/agent.proto", "spire.api.server.agent.v1"),
    unit("server_bundle", "spire/server/bundle.proto", "spire.api.server.bundle.v1"),
    unit("server_debug", "spire/server/debug.proto", "spire.api.server.debug.v1"),
    unit("server_entry", "spire/server/entry.proto", "spire.api.server.entry.v1"),
    // The other server half has messages in it, for those who play a server.
    Unit {
        name: "server_entry_encoded",
        proto: "spire/server/entry.proto",
        package: "spire.api.server.entry.v1",
        client: false,
        server: true,
    },
    unit("server_localauthority", "spire/server/localauthority.proto", "spire.api.server.localauthority.v1"),
    unit("server_logger", "spire/server/logger.proto", "spire.api.server.logger.v1"),
    unit("server_svid", "spire/server/svid.proto", "spire.api.server.svid.v1"),
    unit("server_trustdomain", "spire/server/trustdomain.proto", "spire.api.server.trustdomain.v1"),
    unit("agent_debug", "spire/agent/debug.proto", "spire.agent.debug.v1"),
    unit("agent_delegatedidentity", "spire/agent/delegatedidentity.proto", "spire.api.agent.delegatedidentity.v1"),
    unit("agent_logger", "spire/agent/logger.proto", "spire.api.agent.logger.v1"),
    unit("agent_explain", "finial/agent.proto", "finial.agent.v1"),
    unit("broker", "spiffe/broker.proto", "spiffe.broker"),
    unit("common", "spire/common.proto", "spire.common"),
    unit("journal", "spire/journal.proto", ""),
    unit("health", "grpc/health.proto", "grpc.health.v1"),
    unit("rpc", "google/status.proto", "google.rpc"),
    unit("envoy_core", "envoy/core.proto", "envoy.config.core.v3"),
    unit("envoy_type", "envoy/type.proto", "envoy.type.v3"),
    unit("envoy_discovery", "envoy/discovery.proto", "envoy.service.discovery.v3"),
    unit("envoy_tls", "envoy/tls.proto", "envoy.extensions.transport_sockets.tls.v3"),
    Unit {
        name: "envoy_secret",
        proto: "envoy/secret.proto",
        package: "envoy.service.secret.v3",
        client: true,
        server: false,
    },
    Unit {
        name: "envoy_secret_server",
        proto: "envoy/secret.proto",
        package: "envoy.service.secret.v3",
        client: false,
        server: true,
    },
    // Two halves: the server's answers are ready-made bytes, the client's are decoded.
    Unit { name: "workload", proto: "spiffe/workload.proto", package: "", client: true, server: false },
    Unit { name: "workload_server", proto: "spiffe/workload.proto", package: "", client: false, server: true },
    Unit { name: "sync", proto: "finial/sync.proto", package: "finial.server.sync.v1", client: true, server: false },
    Unit {
        name: "sync_server",
        proto: "finial/sync.proto",
        package: "finial.server.sync.v1",
        client: false,
        server: true,
    },
    unit("rotation", "finial/rotation.proto", "finial.server.rotation.v1"),
    // Plugins: calls go to the service that the plugin names, so that the messages are enough.
    messages("plugin_go", "plugin/go_plugin.proto", "plugin"),
    messages("plugin_init", "plugin/init.proto", "spire.service.private.init.v1"),
    messages("plugin_config", "plugin/config.proto", "spire.service.common.config.v1"),
    messages("plugin_types", "plugin/types.proto", "spire.plugin.types"),
    messages("plugin_workload_attestor", "plugin/workload_attestor.proto", "spire.plugin.agent.workloadattestor.v1"),
    messages("plugin_svid_store", "plugin/svid_store.proto", "spire.plugin.agent.svidstore.v1"),
    messages("plugin_key_manager", "plugin/server_key_manager.proto", "spire.plugin.server.keymanager.v1"),
    messages("plugin_agent_node_attestor", "plugin/agent_node_attestor.proto", "spire.plugin.agent.nodeattestor.v1"),
    messages("plugin_server_node_attestor", "plugin/server_node_attestor.proto", "spire.plugin.server.nodeattestor.v1"),
    messages(
        "plugin_upstream_authority",
        "plugin/upstream_authority.proto",
        "spire.plugin.server.upstreamauthority.v1",
    ),
    messages(
        "plugin_credential_composer",
        "plugin/credential_composer.proto",
        "spire.plugin.server.credentialcomposer.v1",
    ),
    messages("plugin_notifier", "plugin/notifier.proto", "spire.plugin.server.notifier.v1"),
    messages("plugin_bundle_publisher", "plugin/bundle_publisher.proto", "spire.plugin.server.bundlepublisher.v1"),
    served("plugin_host_metrics", "plugin/host_metrics.proto", "spire.hostservice.common.metrics.v1"),
    served("plugin_host_agent_store", "plugin/host_agent_store.proto", "spire.hostservice.server.agentstore.v1"),
    served(
        "plugin_host_identity_provider",
        "plugin/host_identity_provider.proto",
        "spire.hostservice.server.identityprovider.v1",
    ),
];

/// Answers that are encoded once and sent to many streams.
const ENCODED: &[(&str, &str)] = &[
    (".X509SVIDResponse", "crate::encoded::X509SvidResponse"),
    (".X509BundlesResponse", "crate::encoded::X509BundlesResponse"),
    (".JWTBundlesResponse", "crate::encoded::JwtBundlesResponse"),
    (".WITSVIDResponse", "crate::encoded::WitSvidResponse"),
    (".WITBundlesResponse", "crate::encoded::WitBundlesResponse"),
    (".finial.server.sync.v1.WatchResponse", "crate::encoded::WatchResponse"),
    (".spire.api.server.entry.v1.GetAuthorizedEntriesResponse", "crate::encoded::GetAuthorizedEntriesResponse"),
    (".spire.api.server.entry.v1.SyncAuthorizedEntriesResponse", "crate::encoded::SyncAuthorizedEntriesResponse"),
];

/// Messages with secrets: `src/redact.rs` gives them a `Debug` that does not print them.
const SECRETS: &[&str] = &[
    ".X509SVID",
    ".JWTSVID",
    ".WITSVID",
    ".ValidateJWTSVIDRequest",
    ".spire.api.types.JWTSVID",
    ".spire.api.types.WITSVID",
    ".spire.api.types.JoinToken",
    ".spire.api.types.AttestationData",
    ".spire.api.server.agent.v1.CreateJoinTokenRequest",
    ".spire.api.agent.delegatedidentity.v1.X509SVIDWithKey",
    ".spiffe.broker.X509SVID",
    ".spiffe.broker.JWTSVID",
    ".envoy.extensions.transport_sockets.tls.v3.TlsCertificate",
    ".spire.plugin.agent.svidstore.v1.X509SVID",
    ".spire.hostservice.server.identityprovider.v1.X509Identity",
];

fn generate(unit: &Unit, contracts: &Path) -> String {
    let files = protox::compile([unit.proto], [contracts]).unwrap();
    let of_unit = files.file.iter().find(|f| f.name() == unit.proto).unwrap();
    assert_eq!(of_unit.package(), unit.package);
    let messages: Vec<String> = of_unit.message_type.iter().map(|m| m.name().to_owned()).collect();

    let out = tempfile::tempdir().unwrap();
    let mut build = tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".")
        .build_client(unit.client)
        .build_server(unit.server)
        .skip_debug(SECRETS)
        .out_dir(out.path());
    if unit.name != "types" {
        build = build.extern_path(".spire.api.types", "crate::types");
    }
    if unit.name != "plugin_types" {
        build = build.extern_path(".spire.plugin.types", "crate::plugin::types");
    }
    if unit.package.starts_with("envoy.") {
        // Of our own, as its value may be a key.
        build = build.extern_path(".google.protobuf.Any", "crate::envoy::Any").extern_path(".google.rpc", "crate::rpc");
        for (package, module) in ENVOY.iter().filter(|(package, _)| *package != unit.package) {
            build = build.extern_path(format!(".{package}"), *module);
        }
    }
    if unit.name == "envoy_secret_server" {
        for answer in ["DiscoveryResponse", "DeltaDiscoveryResponse"] {
            let proto = format!(".envoy.service.discovery.v3.{answer}");
            build = build.extern_path(proto, format!("crate::encoded::{answer}"));
        }
    }
    if let Some(module) = unit.small_module() {
        build = build.codec_path("crate::encoded::SmallCodec");
        for message in messages.iter().filter(|_| !unit.client) {
            let proto = [".", unit.package, ".", message].concat().replace("..", ".");
            let rust = ENCODED
                .iter()
                .find(|(p, _)| *p == proto)
                .map_or_else(|| format!("crate::{module}::{}", camel(message)), |(_, rust)| (*rust).to_owned());
            build = build.extern_path(proto, rust);
        }
    }
    build.compile_fds(files).unwrap();
    // prost names the file as the module, keywords escaped.
    let file = if unit.package.is_empty() { "_".to_owned() } else { unit.package.replace(".type.", ".r#type.") };
    fs::read_to_string(out.path().join(format!("{file}.rs"))).unwrap()
}

/// prost's spelling of the few names with runs of capitals that the Workload API has.
fn camel(name: &str) -> String {
    let mut out = String::new();
    let chars: Vec<char> = name.chars().collect();
    for (i, c) in chars.iter().enumerate() {
        let after_upper = i > 0 && (chars[i - 1].is_uppercase() || chars[i - 1].is_numeric());
        let before_lower = chars.get(i + 1).is_some_and(|n| n.is_lowercase());
        let starts_word = i == 0 || !after_upper || before_lower;
        out.push(if starts_word { *c } else { c.to_ascii_lowercase() });
    }
    out
}

#[test]
fn committed_code_is_current() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let update = std::env::var_os("UPDATE_GEN").is_some();
    let mut stale = Vec::new();
    for unit in UNITS {
        let fresh = generate(unit, &here.join("../../proto"));
        let path = here.join(format!("src/gen/{}.rs", unit.name));
        if update {
            fs::write(&path, &fresh).unwrap();
        } else if fs::read_to_string(&path).unwrap_or_default() != fresh {
            stale.push(unit.name);
        }
    }
    assert!(stale.is_empty(), "run with UPDATE_GEN=1: {stale:?}");
}

/// Renumbering or renaming a field would be invisible in a review of generated code; the descriptors are compared with
/// what SPIRE's own files give, kept as one line per field.
#[test]
fn contracts_are_spires() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut lines = Vec::new();
    for unit in UNITS {
        let files = protox::compile([unit.proto], [here.join("../../proto")]).unwrap();
        assert!(files.encoded_len() > 0);
        for file in files.file.iter().filter(|f| f.name() == unit.proto) {
            for message in &file.message_type {
                fields(&mut lines, file.package(), message);
            }
            for service in &file.service {
                for m in &service.method {
                    let stream = |on: bool| if on { "stream " } else { "" };
                    lines.push(format!(
                        "{}.{}/{} {}{} {}{}",
                        file.package(),
                        service.name(),
                        m.name(),
                        stream(m.client_streaming()),
                        m.input_type(),
                        stream(m.server_streaming()),
                        m.output_type()
                    ));
                }
            }
            for e in &file.enum_type {
                enum_values(&mut lines, file.package(), e);
            }
        }
    }
    lines.sort();
    lines.dedup();
    let path = here.join("testdata/contracts.txt");
    let fresh = lines.join("\n") + "\n";
    if std::env::var_os("UPDATE_CONTRACTS").is_some() {
        fs::write(&path, &fresh).unwrap();
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), fresh, "a contract with others has changed");
}

fn fields(lines: &mut Vec<String>, scope: &str, message: &prost_types::DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    for f in &message.field {
        lines.push(format!(
            "{name} {} {} {} {} {}",
            f.number(),
            f.name(),
            f.label().as_str_name(),
            f.r#type().as_str_name(),
            f.type_name()
        ));
    }
    message.nested_type.iter().for_each(|m| fields(lines, &name, m));
    message.enum_type.iter().for_each(|e| enum_values(lines, &name, e));
}

fn enum_values(lines: &mut Vec<String>, scope: &str, e: &prost_types::EnumDescriptorProto) {
    for v in &e.value {
        lines.push(format!("{scope}.{} {} {}", e.name(), v.number(), v.name()));
    }
}
