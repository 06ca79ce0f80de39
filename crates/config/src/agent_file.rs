//! `agent { }` and its neighbours, from text to [`AgentSettings`].

use crate::duration::format_go_duration;
use crate::problem::{ConfigError, Loaded};
use crate::raw::{self, RawHealth, RawTelemetry};
use crate::resolve::{Resolver, read_text};
use crate::server_file::{shared_section_name, trust_domain};
use crate::{
    AgentRateLimits, AgentSettings, Bootstrap, BrokerReference, BrokerSettings, BrokerUser, RebootstrapMode,
    TrustBundleFormat, WorkloadKeyType,
};
use finial_core::{Secret, SpiffeId, TrustDomain};
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where `spire-agent run` looks for its file.
pub const AGENT_CONFIG_DEFAULT: &str = "conf/agent/agent.conf";
/// Where the Workload API socket is by default.
pub const AGENT_SOCKET_DEFAULT: &str = "/tmp/spire-agent/public/api.sock";
/// A join token file above this size in bytes is refused.
const TOKEN_FILE_BYTES_MAX: u64 = 64 << 10;

/// What flags say. Empty, zero and false mean "not given": flags can set, but not unset.
#[derive(Clone, Debug, Default)]
pub struct AgentOverrides {
    /// `-dataDir`.
    pub data_dir: String,
    /// `-joinToken`.
    pub join_token: String,
    /// `-joinTokenFile`.
    pub join_token_file: String,
    /// `-logFile`.
    pub log_file: String,
    /// `-logFormat`.
    pub log_format: String,
    /// `-logLevel`.
    pub log_level: String,
    /// `-logSourceLocation`.
    pub log_source_location: bool,
    /// `-serverAddress`.
    pub server_address: String,
    /// `-serverPort`.
    pub server_port: i64,
    /// `-socketPath`.
    pub socket_path: String,
    /// `-trustDomain`.
    pub trust_domain: String,
    /// `-disableWorkloadAPI`.
    pub disable_workload_api: bool,
    /// `-disableSDSAPI`.
    pub disable_sds_api: bool,
    /// `-trustBundle`.
    pub trust_bundle_path: String,
    /// `-trustBundleUrl`.
    pub trust_bundle_url: String,
    /// `-trustBundleFormat`.
    pub trust_bundle_format: String,
    /// `-allowUnauthenticatedVerifiers`.
    pub allow_unauthenticated_verifiers: bool,
    /// `-insecureBootstrap`.
    pub insecure_bootstrap: bool,
    /// `-rebootstrapMode`.
    pub rebootstrap_mode: String,
    /// `-rebootstrapDelay`.
    pub rebootstrap_delay: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawFile {
    agent: RawAgent,
    plugins: Option<IgnoredAny>,
    telemetry: RawTelemetry,
    health_checks: RawHealth,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawAgent {
    data_dir: String,
    admin_socket_path: String,
    insecure_bootstrap: bool,
    rebootstrap_mode: String,
    rebootstrap_delay: String,
    join_token: String,
    join_token_file: String,
    log_file: String,
    log_format: String,
    log_level: String,
    log_selectors: Vec<String>,
    log_source_location: bool,
    sds: RawSds,
    server_address: String,
    server_port: i64,
    socket_path: String,
    disable_workload_api: bool,
    disable_sds_api: bool,
    workload_x509_svid_key_type: String,
    trust_bundle_format: String,
    trust_bundle_path: String,
    trust_bundle_spiffe_workload_api: String,
    trust_bundle_unix_socket: String,
    trust_bundle_url: String,
    trust_domain: String,
    allow_unauthenticated_verifiers: bool,
    allowed_foreign_jwt_claims: Vec<String>,
    availability_target: String,
    x509_svid_cache_max_size: i64,
    jwt_svid_cache_max_size: i64,
    authorized_delegates: Vec<String>,
    profiling_enabled: bool,
    profiling_port: i64,
    profiling_freq: i64,
    profiling_names: Vec<String>,
    experimental: RawExperimental,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawSds {
    default_svid_name: String,
    default_bundle_name: String,
    default_all_bundles_name: String,
    disable_spiffe_cert_validation: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawExperimental {
    sync_interval: String,
    jwt_svid_cache_hit_timeout: String,
    named_pipe_name: String,
    admin_named_pipe_name: String,
    use_sync_authorized_entries: Option<bool>,
    require_pq_kem: bool,
    ratelimit: RawLimits,
    broker: Option<RawBroker>,
    feature_flags: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawLimits {
    fetch_x509_svid: i64,
    fetch_jwt_svid: i64,
    fetch_x509_bundles: i64,
    fetch_jwt_bundles: i64,
    stream_secrets: i64,
    fetch_secrets: i64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawBroker {
    socket_path: String,
    bind_address: String,
    brokers: Vec<RawBrokerUser>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawBrokerUser {
    id: String,
    allowed_reference_types: Vec<RawReference>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawReference {
    type_url: String,
    allow_over_tcp: bool,
}

/// Reads and checks an agent's file. `env` looks variables up if `expand_env` is set.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn load_agent(
    path: &Path,
    expand_env: bool,
    env: &dyn Fn(&str) -> Option<String>,
    overrides: &AgentOverrides,
) -> Result<Loaded<AgentSettings>, Box<ConfigError>> {
    parse_agent(path, &read_text(path, expand_env, env)?, overrides)
}

/// As [`load_agent`], with the text at hand; `path` is only named in errors.
///
/// # Errors
/// As [`load_agent`].
pub fn parse_agent(
    path: &Path,
    text: &str,
    overrides: &AgentOverrides,
) -> Result<Loaded<AgentSettings>, Box<ConfigError>> {
    let mut r = Resolver::new(path, text, overrides.keys())?;
    let (mut file, unused) = r.raw::<RawFile>();
    overrides.apply(&mut file.agent);
    let a = file.agent;
    r.log_settings("agent", &a.log_level, &a.log_format, &a.log_file, a.log_source_location);

    let plugins = raw::plugins(&mut r);
    if plugins.is_none() && file.plugins.is_none() {
        let hint = "add plugins { KeyManager, NodeAttestor, WorkloadAttestor }";
        r.problem(&["plugins"], "plugins section must be configured", hint);
    }
    let nobody = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let Ok(placeholder) = TrustDomain::parse("invalid") else { return r.finish(None) };
    let data_dir: PathBuf = if a.data_dir.is_empty() { ".".into() } else { a.data_dir.clone().into() };
    let mut out = AgentSettings::minimal(placeholder, nobody, Bootstrap::Insecure, data_dir);
    out.plugins = plugins.unwrap_or_default();

    // In SPIRE's order, so that the first problem is the one that SPIRE names.
    join_token(&mut r, &a, &mut out);
    server(&mut r, &a, &mut out);
    let trust_domain = trust_domain(&mut r, "agent", &a.trust_domain);
    let known = trust_domain.is_some();
    out.trust_domain = trust_domain.unwrap_or(out.trust_domain);
    out.bootstrap = bootstrap(&mut r, &a).unwrap_or(Bootstrap::Insecure);
    rebootstrap(&mut r, &a, &mut out);
    sockets(&mut r, &a, &mut out);
    caches(&mut r, &a, &mut out);
    out.telemetry = file.telemetry.resolve(&mut r);
    out.health = file.health_checks.resolve(&mut r);
    out.profiling =
        raw::profiling(&mut r, "agent", a.profiling_enabled, a.profiling_port, a.profiling_freq, a.profiling_names);
    r.unknown_keys(&unused, section_name);
    delegates(&mut r, &a.authorized_delegates, known, &mut out);
    experimental(&mut r, a.experimental, &mut out);
    out.allow_unauthenticated_verifiers = a.allow_unauthenticated_verifiers;
    out.allowed_foreign_jwt_claims = a.allowed_foreign_jwt_claims;
    out.log_selectors = a.log_selectors;
    out.log = r.log.clone();
    r.finish(known.then_some(out))
}

fn server(r: &mut Resolver, a: &RawAgent, out: &mut AgentSettings) {
    if a.server_address.is_empty() {
        let hint = "add server_address = \"host\" to the agent section";
        r.problem(&["agent", "server_address"], "server_address must be configured", hint);
    }
    out.server_address = a.server_address.trim_matches(['[', ']']).into();
    match u16::try_from(a.server_port) {
        Ok(0) => {
            let hint = "add server_port = 8081 to the agent section";
            r.problem(&["agent", "server_port"], "server_port must be configured", hint);
        }
        Ok(port) => out.server_port = port,
        Err(_) => r.problem(
            &["agent", "server_port"],
            format!("server_port {} is not a TCP port", a.server_port),
            "ports go from 1 to 65535",
        ),
    }
}

fn bootstrap(r: &mut Resolver, a: &RawAgent) -> Option<Bootstrap> {
    let url = &a.trust_bundle_url;
    let path = &a.trust_bundle_path;
    let api = &a.trust_bundle_spiffe_workload_api;
    let given = |text: &String| !text.is_empty();
    if given(api) {
        let other = if a.insecure_bootstrap {
            Some("only one of insecure_bootstrap or trust_bundle_spiffe_workload_api can be specified, not both")
        } else if given(url) {
            Some("only one of trust_bundle_url or trust_bundle_spiffe_workload_api can be specified, not both")
        } else if given(path) {
            Some("only one of trust_bundle_path or trust_bundle_spiffe_workload_api can be specified, not both")
        } else if given(&a.trust_bundle_unix_socket) {
            Some("trust_bundle_unix_socket can not be used with trust_bundle_spiffe_workload_api")
        } else {
            None
        };
        if let Some(message) = other {
            r.problem(&["agent", "trust_bundle_spiffe_workload_api"], message, "keep one source of the first bundle");
            return None;
        }
        if let Err(error) = check_workload_api_address(api) {
            let label = "trust_bundle_spiffe_workload_api is not a valid SPIFFE Workload API endpoint address";
            r.problem(&["agent", "trust_bundle_spiffe_workload_api"], format!("{label}: {error}"), "");
            return None;
        }
        return Some(Bootstrap::WorkloadApi(api.clone()));
    }
    let conflict = match (a.insecure_bootstrap, given(url), given(path)) {
        (true, true, true) => Some(
            "only one of insecure_bootstrap, trust_bundle_url, or trust_bundle_path can be specified, not the three options",
        ),
        (true, true, false) => Some("only one of insecure_bootstrap or trust_bundle_url can be specified, not both"),
        (true, false, true) => Some("only one of insecure_bootstrap or trust_bundle_path can be specified, not both"),
        (false, true, true) => Some("only one of trust_bundle_url or trust_bundle_path can be specified, not both"),
        _ => None,
    };
    if let Some(message) = conflict {
        let key = if a.insecure_bootstrap { "insecure_bootstrap" } else { "trust_bundle_url" };
        r.problem(&["agent", key], message, "keep one source of the first bundle");
        return None;
    }
    if given(&a.trust_bundle_unix_socket) && !given(url) {
        let message = "if trust_bundle_unix_socket is specified, so must be trust_bundle_url";
        r.problem(&["agent", "trust_bundle_unix_socket"], message, "");
    }
    if a.insecure_bootstrap {
        return Some(Bootstrap::Insecure);
    }
    if given(path) {
        return Some(Bootstrap::Path(path.into()));
    }
    if given(url) {
        return bundle_url(r, url, &a.trust_bundle_unix_socket);
    }
    r.problem(
        &["agent"],
        "trust_bundle_path, trust_bundle_url, or trust_bundle_spiffe_workload_api must be configured unless insecure_bootstrap is set",
        "write the output of `spire-server bundle show` to a file and name it as trust_bundle_path",
    );
    None
}

fn bundle_url(r: &mut Resolver, url: &str, unix_socket: &str) -> Option<Bootstrap> {
    let path = ["agent", "trust_bundle_url"];
    let scheme = url.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase()).unwrap_or_default();
    if unix_socket.is_empty() {
        if scheme != "https" {
            r.problem(&path, "trust bundle URL must start with https://", "");
            return None;
        }
        return Some(Bootstrap::Url { url: url.into(), unix_socket: None });
    }
    if scheme != "http" {
        r.problem(&path, "trust bundle URL must start with http:// when used with trust bundle unix socket", "");
        return None;
    }
    let query = url.split('#').next().and_then(|u| u.split_once('?')).map(|(_, query)| query).unwrap_or_default();
    for reserved in ["spiffe-", "spire-"] {
        if query.split('&').any(|part| part.starts_with(reserved)) {
            r.problem(&path, format!("trust_bundle_url query params can not start with {reserved}"), "");
            return None;
        }
    }
    Some(Bootstrap::Url { url: url.into(), unix_socket: Some(unix_socket.into()) })
}

/// Section 4 of the SPIFFE Workload Endpoint standard: `unix:` with a path, or `tcp:` with an IP address and a port.
fn check_workload_api_address(address: &str) -> Result<(), &'static str> {
    let (body, fragment) = address.split_once('#').unwrap_or((address, ""));
    let (body, query) = body.split_once('?').unwrap_or((body, ""));
    if let Some(rest) = body.strip_prefix("unix:") {
        return match rest {
            _ if !rest.starts_with('/') => Err("workload endpoint unix socket URI must not be opaque"),
            _ if rest.starts_with("//") && rest.contains('@') => {
                Err("workload endpoint unix socket URI must not include user info")
            }
            "//" => Err("workload endpoint unix socket URI must include a path"),
            _ if !query.is_empty() => Err("workload endpoint unix socket URI must not include query values"),
            _ if !fragment.is_empty() => Err("workload endpoint unix socket URI must not include a fragment"),
            _ => Ok(()),
        };
    }
    let Some(rest) = body.strip_prefix("tcp:") else {
        return Err("workload endpoint socket URI must have a \"tcp\" or \"unix\" scheme");
    };
    let Some(host) = rest.strip_prefix("//") else {
        return Err("workload endpoint tcp socket URI must not be opaque");
    };
    match host {
        _ if host.contains('@') => Err("workload endpoint tcp socket URI must not include user info"),
        _ if host.is_empty() || host.starts_with('/') => Err("workload endpoint tcp socket URI must include a host"),
        _ if host.contains('/') => Err("workload endpoint tcp socket URI must not include a path"),
        _ if !query.is_empty() => Err("workload endpoint tcp socket URI must not include query values"),
        _ if !fragment.is_empty() => Err("workload endpoint tcp socket URI must not include a fragment"),
        _ if host.parse::<SocketAddr>().is_ok() => Ok(()),
        _ if host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok() => {
            Err("workload endpoint tcp socket URI host component must include a port")
        }
        _ => Err("workload endpoint tcp socket URI host component must be an IP:port"),
    }
}

fn sockets(r: &mut Resolver, a: &RawAgent, out: &mut AgentSettings) {
    let socket = if a.socket_path.is_empty() { AGENT_SOCKET_DEFAULT } else { &a.socket_path };
    out.disable_workload_api = a.disable_workload_api;
    out.disable_sds_api = a.disable_sds_api;
    out.socket_path = None;
    if !(a.disable_workload_api && a.disable_sds_api) {
        out.socket_path = r.absolute(&["agent", "socket_path"], socket, "failed to get absolute path for socket path");
    }
    if !a.admin_socket_path.is_empty() {
        let path = ["agent", "admin_socket_path"];
        out.admin_socket_path =
            r.absolute(&path, &a.admin_socket_path, "failed to get absolute path for admin_socket_path");
        if below(out.admin_socket_path.as_deref(), out.socket_path.as_deref()) {
            let message = "admin socket cannot be in the same directory or a subdirectory as that containing the Workload API socket";
            r.problem(&path, message, "use a directory of its own, such as /tmp/spire-agent/private");
        }
    }
}

/// Whether `path` is in the directory of `socket`, or below it.
fn below(path: Option<&Path>, socket: Option<&Path>) -> bool {
    match (path, socket.and_then(Path::parent)) {
        (Some(path), Some(dir)) => path.starts_with(dir),
        _ => false,
    }
}

fn join_token(r: &mut Resolver, a: &RawAgent, out: &mut AgentSettings) {
    let path = ["agent", "join_token_file"];
    if !a.join_token.is_empty() {
        out.join_token = Some(Secret::new(a.join_token.clone()));
    }
    if a.join_token_file.is_empty() {
        return;
    }
    if !a.join_token.is_empty() {
        let message = "only one of join_token or join_token_file can be specified, not both";
        r.problem(&["agent", "join_token"], message, "");
        return;
    }
    let file = &a.join_token_file;
    let hint = "write the output of `spire-server token generate` to it";
    let read = std::fs::metadata(file).and_then(|meta| {
        if meta.len() > TOKEN_FILE_BYTES_MAX {
            return Err(std::io::Error::other("file too large"));
        }
        std::fs::read_to_string(file)
    });
    match read {
        Ok(text) if text.trim().is_empty() => r.problem(&path, "join token file is empty", hint),
        Ok(text) => out.join_token = Some(Secret::new(text.trim().into())),
        Err(error) => {
            let reason = match error.kind() {
                std::io::ErrorKind::NotFound => "no such file or directory".into(),
                std::io::ErrorKind::PermissionDenied => "permission denied".into(),
                _ => error.to_string(),
            };
            r.problem(&path, format!("unable to read join token file {file:?}: open {file}: {reason}"), hint);
        }
    }
}

fn rebootstrap(r: &mut Resolver, a: &RawAgent, out: &mut AgentSettings) {
    out.rebootstrap_mode = match a.rebootstrap_mode.as_str() {
        "" | "never" => RebootstrapMode::Never,
        "auto" => RebootstrapMode::Auto,
        "always" => RebootstrapMode::Always,
        other => {
            let message = format!("unknown rebootstrap mode specified: {other}");
            r.problem(&["agent", "rebootstrap_mode"], message, "use never, auto or always");
            RebootstrapMode::Never
        }
    };
    if out.rebootstrap_mode != RebootstrapMode::Never && a.insecure_bootstrap {
        let message = "insecure_bootstrap option can not be used with rebootstrapping";
        r.problem(&["agent", "rebootstrap_mode"], message, "");
    }
    let label = "error parsing rebootstrap delay duration";
    if let Some(delay) = r.duration(&["agent", "rebootstrap_delay"], &a.rebootstrap_delay, label) {
        out.rebootstrap_delay = delay;
    }
    match a.trust_bundle_format.as_str() {
        "" | "pem" => {}
        "spiffe" => out.trust_bundle_format = TrustBundleFormat::Spiffe,
        _ => {
            let message = "invalid value for trust_bundle_format, expected \"pem\" or \"spiffe\"";
            r.problem(&["agent", "trust_bundle_format"], message, "");
        }
    }
}

fn caches(r: &mut Resolver, a: &RawAgent, out: &mut AgentSettings) {
    for (key, written, kept) in [
        ("x509_svid_cache_max_size", a.x509_svid_cache_max_size, &mut out.x509_svid_cache_max_size),
        ("jwt_svid_cache_max_size", a.jwt_svid_cache_max_size, &mut out.jwt_svid_cache_max_size),
    ] {
        match usize::try_from(written) {
            Ok(0) => {}
            Ok(size) => *kept = size,
            Err(_) => r.problem(&["agent", key], format!("{key} should not be negative"), ""),
        }
    }
    out.workload_key_type = match a.workload_x509_svid_key_type.to_ascii_lowercase().as_str() {
        "" | "ec-p256" => WorkloadKeyType::EcP256,
        "ec-p384" => WorkloadKeyType::EcP384,
        "rsa-2048" => WorkloadKeyType::Rsa2048,
        _ => {
            let written = &a.workload_x509_svid_key_type;
            let message = format!("key type {written:?} is unknown; must be one of [rsa-2048, ec-p256, ec-p384]");
            r.problem(&["agent", "workload_x509_svid_key_type"], message, "");
            WorkloadKeyType::EcP256
        }
    };
    let path = ["agent", "availability_target"];
    let minimum = Duration::from_secs(24 * 3600);
    out.availability_target = r.duration(&path, &a.availability_target, "unable to parse availability_target");
    if out.availability_target.is_some_and(|target| target < minimum) {
        r.problem(&path, format!("availability_target must be at least {}", format_go_duration(minimum)), "");
    }
    for (written, kept) in [
        (&a.sds.default_svid_name, &mut out.sds.default_svid_name),
        (&a.sds.default_bundle_name, &mut out.sds.default_bundle_name),
        (&a.sds.default_all_bundles_name, &mut out.sds.default_all_bundles_name),
    ] {
        if !written.is_empty() {
            kept.clone_from(written);
        }
    }
    out.sds.disable_spiffe_cert_validation = a.sds.disable_spiffe_cert_validation;
    if out.sds.default_all_bundles_name == out.sds.default_bundle_name {
        r.warn("The \"default_bundle_name\" and \"default_all_bundles_name\" configurables have the same value. \"default_all_bundles_name\" will be ignored. Please configure distinct values or use the defaults. This will be a configuration error in a future release.");
    }
}

fn delegates(r: &mut Resolver, delegates: &[String], known: bool, out: &mut AgentSettings) {
    for text in delegates {
        let problem = match SpiffeId::parse(text) {
            Ok(id) if !known || id.is_member_of(&out.trust_domain) => {
                out.authorized_delegates.push(id);
                continue;
            }
            Ok(id) => {
                let trust_domain = out.trust_domain.as_str();
                format!("SPIFFE ID {:?} is not a member of trust domain {trust_domain:?}", id.as_str())
            }
            Err(error) => error.to_string(),
        };
        let message = format!("error validating authorized delegate: {problem}");
        r.problem(&["agent", "authorized_delegates"], message, "");
    }
}

fn experimental(r: &mut Resolver, e: RawExperimental, out: &mut AgentSettings) {
    r.feature_flags("agent", &e.feature_flags);
    for (key, written, instead) in [
        ("named_pipe_name", &e.named_pipe_name, "socket_path"),
        ("admin_named_pipe_name", &e.admin_named_pipe_name, "admin_socket_path"),
    ] {
        if !written.is_empty() {
            let message =
                format!("invalid configuration: {key} is not supported in this platform; please use {instead} instead");
            r.problem(&["agent", "experimental", key], message, "");
        }
    }
    let path = ["agent", "experimental", "sync_interval"];
    if let Some(interval) = r.duration(&path, &e.sync_interval, "could not parse synchronization interval") {
        out.sync_interval = interval;
    }
    let path = ["agent", "experimental", "jwt_svid_cache_hit_timeout"];
    let (low, high) = (Duration::from_secs(5), Duration::from_secs(30));
    let label = "could not parse jwt_svid_cache_hit_timeout";
    if let Some(timeout) = r.duration(&path, &e.jwt_svid_cache_hit_timeout, label) {
        let shown = format_go_duration(timeout);
        if timeout < low {
            r.problem(&path, format!("jwt_svid_cache_hit_timeout ({shown}) must be greater than 5s"), "");
        } else if timeout >= high {
            r.problem(&path, format!("jwt_svid_cache_hit_timeout ({shown}) must be less than 30s"), "");
        }
        out.jwt_svid_cache_hit_timeout = timeout;
        r.warn("The use of 'jwt_svid_cache_hit_timeout' is experimental");
    }
    if let Some(written) = e.use_sync_authorized_entries {
        r.deprecated("The 'use_sync_authorized_entries' configuration is deprecated. The option to disable it will be removed in SPIRE 1.13.");
        out.use_sync_authorized_entries = written;
    }
    out.require_pq_kem = e.require_pq_kem;
    let mut limit = |key: &str, value: i64| {
        u32::try_from(value).unwrap_or_else(|_| {
            let message = format!("experimental.ratelimit.{key} must not be negative");
            r.problem(&["agent", "experimental", "ratelimit", key], message, "");
            0
        })
    };
    out.rate_limits = AgentRateLimits {
        fetch_x509_svid: limit("fetch_x509_svid", e.ratelimit.fetch_x509_svid),
        fetch_jwt_svid: limit("fetch_jwt_svid", e.ratelimit.fetch_jwt_svid),
        fetch_x509_bundles: limit("fetch_x509_bundles", e.ratelimit.fetch_x509_bundles),
        fetch_jwt_bundles: limit("fetch_jwt_bundles", e.ratelimit.fetch_jwt_bundles),
        stream_secrets: limit("stream_secrets", e.ratelimit.stream_secrets),
        fetch_secrets: limit("fetch_secrets", e.ratelimit.fetch_secrets),
    };
    if let Some(raw) = e.broker {
        out.broker = Some(broker(r, raw, out.socket_path.as_deref()));
    }
    r.experimental_warning("agent");
    r.feature_flag_warnings(&e.feature_flags);
}

fn broker(r: &mut Resolver, raw: RawBroker, workload_socket: Option<&Path>) -> BrokerSettings {
    let key = |key| ["agent", "experimental", "broker", key];
    let mut out = BrokerSettings { socket_path: None, bind_address: None, brokers: Vec::new() };
    if raw.socket_path.is_empty() && raw.bind_address.is_empty() {
        let message = "experimental.broker requires socket_path, bind_address, or both";
        r.problem(&["agent", "experimental", "broker"], message, "");
    }
    if !raw.socket_path.is_empty() {
        let label = "failed to get absolute path for experimental.broker.socket_path";
        out.socket_path = r.absolute(&key("socket_path"), &raw.socket_path, label);
        if below(out.socket_path.as_deref(), workload_socket) {
            let message = "broker socket cannot be in the same directory or a subdirectory as that containing the Workload API socket";
            r.problem(&key("socket_path"), message, "");
        }
    }
    if !raw.bind_address.is_empty() {
        let label = format!("invalid experimental.broker.bind_address {:?}", raw.bind_address);
        match raw.bind_address.rsplit_once(':').map(|(host, port)| (host, port.parse::<i64>())) {
            Some((host, Ok(port))) => out.bind_address = r.address(&key("bind_address"), host, port, &label),
            _ => {
                let message = format!("{label}: address {}: missing port in address", raw.bind_address);
                r.problem(&key("bind_address"), message, "write host:port");
            }
        }
    }
    let path = key("brokers");
    for (index, user) in raw.brokers.into_iter().enumerate() {
        let id = user.id;
        if id.is_empty() {
            r.problem(&path, format!("experimental.broker.brokers[{index}].id: must be specified"), "");
            continue;
        }
        let id = match SpiffeId::parse(&id) {
            Ok(id) => id,
            Err(error) => {
                r.problem(&path, format!("experimental.broker.brokers[{id}].id: {error}"), "");
                continue;
            }
        };
        if out.brokers.iter().any(|b| b.id == id) {
            r.problem(&path, format!("experimental.broker.brokers[{id}].id: duplicate broker id"), "");
        }
        let label = format!("experimental.broker.brokers[{id}].allowed_reference_types");
        let types = user.allowed_reference_types;
        if types.is_empty() {
            r.problem(&path, format!("{label}: must list at least one reference type URL"), "");
        }
        if types.len() > 1 && types.iter().any(|t| t.type_url == "*") {
            r.problem(&path, format!("{label}: wildcard \"*\" must be the only allowed reference type"), "");
        }
        for (at, _) in types.iter().enumerate().filter(|(_, t)| t.type_url.is_empty()) {
            r.problem(&path, format!("{label}[{at}].type_url: must be specified"), "");
        }
        let allowed_reference_types = types
            .into_iter()
            .map(|t| BrokerReference { type_url: t.type_url, allow_over_tcp: t.allow_over_tcp })
            .collect();
        out.brokers.push(BrokerUser { id, allowed_reference_types });
    }
    out
}

/// SPIRE's name for a section whose unknown keys are fatal.
fn section_name(path: &[String]) -> Option<String> {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    match path.as_slice() {
        ["agent"] => Some("agent".into()),
        ["agent", "experimental", "ratelimit"] => Some("ratelimit".into()),
        ["agent", "experimental", "broker", rest @ ..] => {
            let mut name = String::from("experimental.broker");
            for part in rest {
                if !part.starts_with('[') {
                    name.push('.');
                }
                name.push_str(part);
            }
            Some(name)
        }
        other => shared_section_name(other),
    }
}

impl AgentOverrides {
    fn keys(&self) -> Vec<&'static str> {
        let mut raw = RawAgent::default();
        let mut set: Vec<&'static str> =
            self.texts(&mut raw).into_iter().filter(|(_, flag, _)| !flag.is_empty()).map(|(key, ..)| key).collect();
        if self.server_port != 0 {
            set.push("server_port");
        }
        set
    }

    fn texts<'a>(&'a self, raw: &'a mut RawAgent) -> [(&'static str, &'a String, &'a mut String); 14] {
        [
            ("data_dir", &self.data_dir, &mut raw.data_dir),
            ("join_token", &self.join_token, &mut raw.join_token),
            ("join_token_file", &self.join_token_file, &mut raw.join_token_file),
            ("log_file", &self.log_file, &mut raw.log_file),
            ("log_format", &self.log_format, &mut raw.log_format),
            ("log_level", &self.log_level, &mut raw.log_level),
            ("server_address", &self.server_address, &mut raw.server_address),
            ("socket_path", &self.socket_path, &mut raw.socket_path),
            ("trust_domain", &self.trust_domain, &mut raw.trust_domain),
            ("trust_bundle_path", &self.trust_bundle_path, &mut raw.trust_bundle_path),
            ("trust_bundle_url", &self.trust_bundle_url, &mut raw.trust_bundle_url),
            ("trust_bundle_format", &self.trust_bundle_format, &mut raw.trust_bundle_format),
            ("rebootstrap_mode", &self.rebootstrap_mode, &mut raw.rebootstrap_mode),
            ("rebootstrap_delay", &self.rebootstrap_delay, &mut raw.rebootstrap_delay),
        ]
    }

    fn apply(&self, raw: &mut RawAgent) {
        for (_, flag, key) in self.texts(raw) {
            if !flag.is_empty() {
                key.clone_from(flag);
            }
        }
        if self.server_port != 0 {
            raw.server_port = self.server_port;
        }
        raw.log_source_location |= self.log_source_location;
        raw.disable_workload_api |= self.disable_workload_api;
        raw.disable_sds_api |= self.disable_sds_api;
        raw.allow_unauthenticated_verifiers |= self.allow_unauthenticated_verifiers;
        raw.insecure_bootstrap |= self.insecure_bootstrap;
    }
}
