//! `agent { }` and its neighbours, from text to [`AgentSettings`].

mod bootstrap;
mod experimental;

use crate::duration::format_go_duration;
use crate::problem::{ConfigError, Loaded, Readable};
use crate::raw::{self, RawHealth, RawTelemetry};
use crate::resolve::{Resolver, read_text};
use crate::server_file::{shared_section_name, trust_domain};
use crate::{AgentSettings, Bootstrap, RebootstrapMode, TrustBundleFormat, WorkloadKeyType};
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
    experimental: experimental::RawExperimental,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawSds {
    default_svid_name: String,
    default_bundle_name: String,
    default_all_bundles_name: String,
    disable_spiffe_cert_validation: bool,
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
    let Ok(placeholder) = TrustDomain::parse("invalid") else { return Err(r.into_error()) };
    let data_dir: PathBuf = if a.data_dir.is_empty() { ".".into() } else { a.data_dir.clone().into() };
    let mut out = AgentSettings::minimal(placeholder, nobody, Bootstrap::Insecure, data_dir);
    out.plugins = plugins.unwrap_or_default();

    // In SPIRE's order, so that the first problem is the one that SPIRE names.
    join_token(&mut r, &a, &mut out);
    server(&mut r, &a, &mut out);
    let trust_domain = trust_domain(&mut r, "agent", &a.trust_domain);
    let known = trust_domain.is_some();
    out.trust_domain = trust_domain.unwrap_or(out.trust_domain);
    out.bootstrap = bootstrap::resolve(&mut r, &a).unwrap_or(Bootstrap::Insecure);
    rebootstrap(&mut r, &a, &mut out);
    sockets(&mut r, &a, &mut out);
    caches(&mut r, &a, &mut out);
    out.telemetry = file.telemetry.resolve(&mut r);
    out.health = file.health_checks.resolve(&mut r);
    out.profiling =
        raw::profiling(&mut r, "agent", a.profiling_enabled, a.profiling_port, a.profiling_freq, a.profiling_names);
    r.unknown_keys(&unused, section_name);
    delegates(&mut r, &a.authorized_delegates, known, &mut out);
    experimental::resolve(&mut r, a.experimental, &mut out);
    out.allow_unauthenticated_verifiers = a.allow_unauthenticated_verifiers;
    out.allowed_foreign_jwt_claims = a.allowed_foreign_jwt_claims;
    out.log_selectors = a.log_selectors;
    out.log = r.log.clone();
    r.finish(out, Readable::Agent)
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
