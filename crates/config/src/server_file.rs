//! `server { }` and its neighbours, from text to [`ServerSettings`].

mod federation;

use crate::duration::format_go_duration;
use crate::oidc;
use crate::problem::{ConfigError, Loaded, Readable};
use crate::raw::{self, RawHealth, RawTelemetry};
use crate::resolve::{Resolver, read_text};
use crate::{CaSubject, EventSettings, Notice, PolicySettings, PruneAgentsSettings, RateLimitSettings, ServerSettings};
use finial_core::{KeyType, SpiffeId, TrustDomain};
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::net::IpAddr;
use std::path::Path;

/// Where `spire-server run` looks for its file.
pub const SERVER_CONFIG_DEFAULT: &str = "conf/server/server.conf";
/// Where the server's API socket is by default.
pub const SERVER_SOCKET_DEFAULT: &str = "/tmp/spire-server/private/api.sock";

/// What flags say. Empty, zero and false mean "not given": flags can set, but not unset.
#[derive(Clone, Debug, Default)]
pub struct ServerOverrides {
    /// `-bindAddress`.
    pub bind_address: String,
    /// `-serverPort`.
    pub bind_port: i64,
    /// `-dataDir`.
    pub data_dir: String,
    /// `-logFile`.
    pub log_file: String,
    /// `-logFormat`.
    pub log_format: String,
    /// `-logLevel`.
    pub log_level: String,
    /// `-logSourceLocation`.
    pub log_source_location: bool,
    /// `-socketPath`.
    pub socket_path: String,
    /// `-trustDomain`.
    pub trust_domain: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawFile {
    server: RawServer,
    plugins: Option<IgnoredAny>,
    telemetry: RawTelemetry,
    health_checks: RawHealth,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawServer {
    admin_ids: Vec<String>,
    agent_ttl: String,
    audit_log_enabled: bool,
    bind_address: String,
    bind_port: i64,
    ca_key_type: String,
    ca_subject: Option<RawSubject>,
    ca_ttl: String,
    data_dir: String,
    default_x509_svid_ttl: String,
    default_jwt_svid_ttl: String,
    experimental: RawExperimental,
    federation: Option<federation::RawFederation>,
    disable_jwt_svids: bool,
    jwt_issuer: String,
    jwt_key_type: String,
    log_file: String,
    log_level: String,
    log_format: String,
    log_source_location: bool,
    prune_attested_nodes_expired_for: String,
    prune_attested_nodes_batch_size: i64,
    prune_tofu_nodes: bool,
    proxy_protocol_trusted_cidrs: Vec<String>,
    ratelimit: RawRateLimit,
    socket_path: String,
    trust_domain: String,
    max_attested_node_info_staleness: Option<String>,
    profiling_enabled: bool,
    profiling_port: i64,
    profiling_freq: i64,
    profiling_names: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawSubject {
    country: Vec<String>,
    organization: Vec<String>,
    common_name: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawRateLimit {
    attestation: Option<bool>,
    signing: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawExperimental {
    agent_spiffe_id_as_selector: bool,
    auth_opa_policy_engine: Option<RawPolicyEngine>,
    cache_reload_interval: String,
    full_cache_reload_interval: String,
    events_based_cache: bool,
    prune_events_older_than: String,
    event_timeout: String,
    sql_transaction_timeout: String,
    require_pq_kem: bool,
    wit_key_type: String,
    wit_issuer: String,
    feature_flags: Vec<String>,
    named_pipe_name: String,
    oidc: Option<oidc::Raw>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawPolicyEngine {
    local: Option<RawLocalPolicy>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawLocalPolicy {
    rego_path: String,
    policy_data_path: String,
}

/// Reads and checks a server's file. `env` looks variables up if `expand_env` is set.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn load_server(
    path: &Path,
    expand_env: bool,
    env: &dyn Fn(&str) -> Option<String>,
    overrides: &ServerOverrides,
) -> Result<Loaded<ServerSettings>, Box<ConfigError>> {
    parse_server(path, &read_text(path, expand_env, env)?, overrides)
}

/// As [`load_server`], with the text at hand; `path` is only named in errors.
///
/// # Errors
/// As [`load_server`].
pub fn parse_server(
    path: &Path,
    text: &str,
    overrides: &ServerOverrides,
) -> Result<Loaded<ServerSettings>, Box<ConfigError>> {
    let mut r = Resolver::new(path, text, overrides.keys())?;
    let (mut file, unused) = r.raw::<RawFile>();
    overrides.apply(&mut file.server);
    let s = file.server;
    r.log_settings("server", &s.log_level, &s.log_format, &s.log_file, s.log_source_location);

    let trust_domain = trust_domain(&mut r, "server", &s.trust_domain);
    if s.data_dir.is_empty() {
        r.problem(
            &["server", "data_dir"],
            "data_dir must be configured",
            "add data_dir = \"./.data\" to the server section",
        );
    }
    let plugins = raw::plugins(&mut r);
    if plugins.is_none() && file.plugins.is_none() {
        r.problem(
            &["plugins"],
            "plugins section must be configured",
            "add plugins { DataStore, KeyManager, NodeAttestor }",
        );
    }
    if !s.experimental.named_pipe_name.is_empty() {
        r.problem(
            &["server", "experimental", "named_pipe_name"],
            "invalid configuration: named_pipe_name is not supported in this platform; please use socket_path instead",
            "",
        );
    }
    // without one there is a problem already, and the rest is only checked
    let Some(trust_domain) = trust_domain.or_else(|| TrustDomain::parse("invalid").ok()) else {
        return Err(r.into_error());
    };
    let mut settings = ServerSettings::minimal(trust_domain, s.data_dir.clone().into());
    settings.plugins = plugins.unwrap_or_default();
    resolve_rest(&mut r, s, file.telemetry, file.health_checks, &unused, &mut settings);
    settings.log = r.log.clone();
    r.finish(settings, Readable::Server)
}

pub(crate) fn trust_domain(r: &mut Resolver, section: &str, text: &str) -> Option<TrustDomain> {
    let path = [section, "trust_domain"];
    if text.is_empty() {
        let hint = format!("add trust_domain = \"example.org\" to the {section} section");
        r.problem(&path, "trust_domain must be configured", &hint);
        return None;
    }
    match TrustDomain::parse(text) {
        Ok(trust_domain) => {
            r.trust_domain = Some(trust_domain.clone());
            Some(trust_domain)
        }
        Err(error) => {
            let hint =
                "a trust domain is a name such as example.org: lowercase letters, digits, dots, dashes, underscores";
            r.problem(&path, format!("could not parse trust_domain {text:?}: {error}"), hint);
            None
        }
    }
}

fn resolve_rest(
    r: &mut Resolver,
    mut s: RawServer,
    telemetry: RawTelemetry,
    health: RawHealth,
    unused: &[finial_hcl::Unused],
    out: &mut ServerSettings,
) {
    let host = if s.bind_address.is_empty() { "0.0.0.0" } else { &s.bind_address };
    let port = if s.bind_port == 0 { 8081 } else { s.bind_port };
    let label = format!("could not resolve bind address \"{host}:{port}\"");
    let key = if u16::try_from(port).is_ok() { "bind_address" } else { "bind_port" };
    out.bind_address = r.address(&["server", key], host, port, &label).unwrap_or(out.bind_address);
    let socket = if s.socket_path.is_empty() { SERVER_SOCKET_DEFAULT } else { &s.socket_path };
    let label = "failed to get absolute path for socket path";
    out.socket_path = r.absolute(&["server", "socket_path"], socket, label).unwrap_or_default();
    for id in &s.admin_ids {
        match SpiffeId::parse(id) {
            Ok(id) => out.admin_ids.push(id),
            Err(error) => r.problem(&["server", "admin_ids"], format!("could not parse admin ID {id:?}: {error}"), ""),
        }
    }
    for cidr in &s.proxy_protocol_trusted_cidrs {
        if !is_cidr(cidr) {
            let message = format!("invalid proxy_protocol_trusted_cidrs value {cidr:?}: invalid CIDR address: {cidr}");
            r.problem(&["server", "proxy_protocol_trusted_cidrs"], message, "write networks such as 10.0.0.0/8");
        }
    }
    out.proxy_protocol_trusted_cidrs.clone_from(&s.proxy_protocol_trusted_cidrs);
    out.rate_limit = RateLimitSettings {
        attestation: s.ratelimit.attestation.unwrap_or(true),
        signing: s.ratelimit.signing.unwrap_or(true),
    };
    out.audit_log_enabled = s.audit_log_enabled;
    out.disable_jwt_svids = s.disable_jwt_svids;
    out.jwt_issuer = (!s.jwt_issuer.is_empty()).then(|| s.jwt_issuer.clone());
    out.profiling =
        raw::profiling(r, "server", s.profiling_enabled, s.profiling_port, s.profiling_freq, s.profiling_names.clone());
    times(r, &s, out);
    key_types(r, &s, out);
    if let Some(subject) = &s.ca_subject {
        let empty = subject.country.is_empty() && subject.organization.is_empty() && subject.common_name.is_empty();
        if empty {
            r.warn("ca_subject configurable is set but empty; the default will be used");
        } else {
            out.ca_subject = CaSubject {
                country: subject.country.clone(),
                organization: subject.organization.clone(),
                common_name: subject.common_name.clone(),
            };
        }
    }
    if let Some(federation) = s.federation {
        out.federation = federation::resolve(r, federation, Path::new(&s.data_dir));
    }
    if s.disable_jwt_svids {
        r.notices.push(Notice::Info("JWT-SVID profile is disabled".into()));
    }
    out.telemetry = telemetry.resolve(r);
    out.health = health.resolve(r);
    r.unknown_keys(unused, section_name);
    r.experimental_warning("server");
    out.oidc = s.experimental.oidc.take().and_then(|raw| oidc::of_server(r, raw, &s.jwt_issuer));
    experimental(r, &s.experimental, out);
}

fn times(r: &mut Resolver, s: &RawServer, out: &mut ServerSettings) {
    let mut ttl = |key: &str, text: &str, what: &str| {
        r.duration(&["server", key], text, &format!("could not parse {what} {text:?}"))
    };
    out.agent_ttl = ttl("agent_ttl", &s.agent_ttl, "agent ttl");
    let x509 = ttl("default_x509_svid_ttl", &s.default_x509_svid_ttl, "default X509 SVID ttl");
    let jwt = ttl("default_jwt_svid_ttl", &s.default_jwt_svid_ttl, "default JWT SVID ttl");
    let ca = ttl("ca_ttl", &s.ca_ttl, "default CA ttl");
    let staleness = s.max_attested_node_info_staleness.as_deref().unwrap_or_default();
    let staleness = ttl("max_attested_node_info_staleness", staleness, "max attested node staleness");
    out.x509_svid_ttl = x509.unwrap_or(out.x509_svid_ttl);
    out.jwt_svid_ttl = jwt.unwrap_or(out.jwt_svid_ttl);
    out.ca_ttl = ca.unwrap_or(out.ca_ttl);
    out.max_attested_node_info_staleness = staleness.unwrap_or_default();
    let path = ["server", "prune_attested_nodes_expired_for"];
    let label = "could not parse prune_attested_nodes_expired_for";
    if let Some(expired_for) = r.duration(&path, &s.prune_attested_nodes_expired_for, label) {
        let batch = if s.prune_attested_nodes_batch_size > 0 { s.prune_attested_nodes_batch_size } else { 1000 };
        out.prune_agents = Some(PruneAgentsSettings {
            expired_for,
            batch_size: u32::try_from(batch).unwrap_or(u32::MAX),
            non_reattestable: s.prune_tofu_nodes,
        });
    }
}

fn key_types(r: &mut Resolver, s: &RawServer, out: &mut ServerSettings) {
    let mut parse = |path: &[&str], text: &str, default: KeyType| {
        if text.is_empty() {
            return default;
        }
        KeyType::parse(text).unwrap_or_else(|| {
            let key = path.last().copied().unwrap_or_default();
            let known = "must be one of [rsa-2048, rsa-4096, ec-p256, ec-p384]";
            r.problem(path, format!("error parsing {key}: key type {text:?} is unknown; {known}"), "");
            default
        })
    };
    out.ca_key_type = parse(&["server", "ca_key_type"], &s.ca_key_type, KeyType::EcP256);
    out.jwt_key_type = parse(&["server", "jwt_key_type"], &s.jwt_key_type, out.ca_key_type);
    let wit = &s.experimental.wit_key_type;
    out.wit_key_type = parse(&["server", "experimental", "wit_key_type"], wit, out.ca_key_type);
}

fn experimental(r: &mut Resolver, e: &RawExperimental, out: &mut ServerSettings) {
    r.feature_flags("server", &e.feature_flags);
    let mut interval = |key: &str, text: &str, what: &str| {
        r.duration(&["server", "experimental", key], text, &format!("could not parse {what}"))
    };
    let defaults = EventSettings::default();
    let reload = interval("cache_reload_interval", &e.cache_reload_interval, "cache reload interval");
    let full = interval("full_cache_reload_interval", &e.full_cache_reload_interval, "full cache reload interval");
    let prune = interval("prune_events_older_than", &e.prune_events_older_than, "prune events interval");
    let old = interval("sql_transaction_timeout", &e.sql_transaction_timeout, "SQL transaction timeout interval");
    let timeout = interval("event_timeout", &e.event_timeout, "event timeout interval");
    out.events = EventSettings {
        events_based_cache: e.events_based_cache,
        cache_reload_interval: reload.unwrap_or(defaults.cache_reload_interval),
        full_cache_reload_interval: full.unwrap_or(defaults.full_cache_reload_interval),
        prune_events_older_than: prune.unwrap_or(defaults.prune_events_older_than),
        event_timeout: timeout.or(old).unwrap_or(defaults.event_timeout),
    };
    if !e.sql_transaction_timeout.is_empty() {
        if e.event_timeout.is_empty() {
            r.deprecated("experimental.sql_transaction_timeout is deprecated, use experimental.event_timeout instead");
        } else {
            r.problem(
                &["server", "experimental", "sql_transaction_timeout"],
                "both experimental sql_transaction_timeout and event_timeout set, only set event_timeout",
                "",
            );
        }
    }
    if out.events.full_cache_reload_interval <= out.events.cache_reload_interval {
        let message = format!(
            "full_cache_reload_interval ({}) must be greater than cache_reload_interval ({})",
            format_go_duration(out.events.full_cache_reload_interval),
            format_go_duration(out.events.cache_reload_interval)
        );
        r.problem(&["server", "experimental", "full_cache_reload_interval"], message, "");
    }
    if e.events_based_cache {
        r.notices.push(Notice::Info("Using events based cache".into()));
    }
    out.policy = e.auth_opa_policy_engine.as_ref().and_then(|engine| policy(r, engine));
    out.agent_spiffe_id_as_selector = e.agent_spiffe_id_as_selector;
    out.require_pq_kem = e.require_pq_kem;
    out.wit_issuer = (!e.wit_issuer.is_empty()).then(|| e.wit_issuer.clone());
    out.wit_svids_enabled = e.feature_flags.iter().any(|f| f == "wit-svid");
    r.feature_flag_warnings(&e.feature_flags);
}

/// SPIRE finds out when it starts.
fn policy(r: &mut Resolver, engine: &RawPolicyEngine) -> Option<PolicySettings> {
    let path = ["server", "experimental", "auth_opa_policy_engine", "local", "rego_path"];
    let Some(local) = &engine.local else {
        r.problem(&path, "policy engine configuration must define a provider", "add local { rego_path = \"…\" }");
        return None;
    };
    if local.rego_path.is_empty() {
        r.problem(&path, "auth_opa_policy_engine: rego_path must be configured", "name the file with the policy");
        return None;
    }
    let data_path = (!local.policy_data_path.is_empty()).then(|| local.policy_data_path.clone().into());
    Some(PolicySettings { rego_path: local.rego_path.clone().into(), data_path })
}

/// SPIRE's name for a section whose unknown keys are fatal.
fn section_name(path: &[String]) -> Option<String> {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let name = match path.as_slice() {
        ["server"] => "server",
        ["server", "ca_subject"] => "ca_subject",
        ["server", "ratelimit"] => "ratelimit",
        ["server", "federation", "bundle_endpoint"] => "bundle endpoint",
        ["server", "federation", "bundle_endpoint", "acme"] => "bundle endpoint ACME",
        other => return shared_section_name(other),
    };
    Some(name.into())
}

/// As [`section_name`], for sections that server and agent share.
pub(crate) fn shared_section_name(path: &[&str]) -> Option<String> {
    let name = match path {
        [] => "top-level",
        ["telemetry", "Prometheus"] => "Prometheus",
        ["telemetry", sink @ ("DogStatsd" | "Statsd" | "M3"), _] => sink,
        ["telemetry", "InMem"] => "InMem",
        ["health_checks"] => "health check",
        _ => return None,
    };
    Some(name.into())
}

fn is_cidr(text: &str) -> bool {
    let Some((address, bits)) = text.split_once('/') else { return false };
    let (Ok(address), Ok(bits)) = (address.parse::<IpAddr>(), bits.parse::<u8>()) else { return false };
    bits <= if address.is_ipv4() { 32 } else { 128 }
}

impl ServerOverrides {
    fn keys(&self) -> Vec<&'static str> {
        [
            ("bind_address", !self.bind_address.is_empty()),
            ("bind_port", self.bind_port != 0),
            ("data_dir", !self.data_dir.is_empty()),
            ("log_file", !self.log_file.is_empty()),
            ("log_format", !self.log_format.is_empty()),
            ("log_level", !self.log_level.is_empty()),
            ("socket_path", !self.socket_path.is_empty()),
            ("trust_domain", !self.trust_domain.is_empty()),
        ]
        .into_iter()
        .filter_map(|(key, given)| given.then_some(key))
        .collect()
    }

    fn apply(&self, raw: &mut RawServer) {
        for (flag, key) in [
            (&self.bind_address, &mut raw.bind_address),
            (&self.data_dir, &mut raw.data_dir),
            (&self.log_file, &mut raw.log_file),
            (&self.log_format, &mut raw.log_format),
            (&self.log_level, &mut raw.log_level),
            (&self.socket_path, &mut raw.socket_path),
            (&self.trust_domain, &mut raw.trust_domain),
        ] {
            if !flag.is_empty() {
                key.clone_from(flag);
            }
        }
        if self.bind_port != 0 {
            raw.bind_port = self.bind_port;
        }
        raw.log_source_location |= self.log_source_location;
    }
}
