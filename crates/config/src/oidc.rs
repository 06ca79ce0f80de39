//! `oidc-discovery-provider.conf`, from text to [`OidcSettings`]. All keys stand at the top of the file.

use crate::problem::{ConfigError, Loaded, Readable};
use crate::resolve::{Resolver, read_text};
use crate::{LogSettings, nearest};
use finial_core::TrustDomain;
use serde::Deserialize;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the provider looks for its file.
pub const OIDC_CONFIG_DEFAULT: &str = "oidc-discovery-provider.conf";
const POLL_INTERVAL_DEFAULT: Duration = Duration::from_secs(10);
const FILE_SYNC_INTERVAL_DEFAULT: Duration = Duration::from_secs(60);
const HEALTH_PORT_DEFAULT: u16 = 8008;
const ACME_CACHE_DEFAULT: &str = "./.acme-cache";

/// What an OIDC discovery provider is told to do.
#[derive(Clone, Debug)]
pub struct OidcSettings {
    /// How to log.
    pub log: LogSettings,
    /// Where and what it answers.
    pub endpoint: OidcEndpoint,
    /// Where the keys come from.
    pub source: OidcSource,
    /// How often they are asked for.
    pub poll_interval: Duration,
    /// The listener for probes.
    pub health: Option<OidcHealth>,
}

/// Where a provider answers, and what. Servers can have one too (`experimental { oidc { } }`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcEndpoint {
    /// The names it is asked under; requests to others are refused. Never empty.
    pub domains: Vec<String>,
    /// Where it listens.
    pub listen: OidcListen,
    /// What the documents say.
    pub documents: OidcDocuments,
    /// Whether each request is logged, at level debug.
    pub log_requests: bool,
}

/// What the documents say, and at which paths they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OidcDocuments {
    /// `jwt_issuer`: the issuer, a URL, where it is not the name that was asked for.
    pub issuer: Option<String>,
    /// `jwks_uri`: where the keys are, a URL.
    pub jwks_uri: Option<String>,
    /// Whether each key says `"use": "sig"`.
    pub set_key_use: bool,
    /// Whether URLs may begin with `http:`.
    pub allow_insecure_scheme: bool,
    /// Before both paths; `/` or empty for nothing.
    pub path_prefix: String,
}

/// Where the provider listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OidcListen {
    /// HTTP without TLS on `host:port`; the host may be missing.
    Insecure(String),
    /// HTTP on a unix socket, open to all users.
    Socket(PathBuf),
    /// HTTPS with a certificate from files.
    ServingCert {
        /// The certificate with its chain, PEM.
        certificate: PathBuf,
        /// Its key, PEM.
        key: PathBuf,
        /// Where.
        address: SocketAddr,
        /// How often the files are looked at.
        file_sync_interval: Duration,
    },
    /// HTTPS with certificates of an ACME authority.
    Acme {
        /// Empty: Let's Encrypt.
        directory_url: String,
        /// Whom it may write to.
        email: String,
        /// Where keys and certificates are kept; empty: nowhere.
        cache_dir: PathBuf,
        /// Where it listens; the authority and clients come to port 443 of the names.
        address: SocketAddr,
    },
}

/// Where the keys come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OidcSource {
    /// A server's API socket.
    Server(PathBuf),
    /// A Workload API socket, and whose keys.
    Workload(PathBuf, TrustDomain),
    /// A file with a SPIFFE bundle.
    File(PathBuf),
}

/// The listener for probes, on all addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcHealth {
    /// Its port.
    pub port: u16,
    /// Answers 200 while the keys are fresh.
    pub ready_path: String,
    /// The same, but from the start.
    pub live_path: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct Raw {
    log_level: String,
    log_format: String,
    log_path: String,
    log_requests: bool,
    domains: Vec<String>,
    set_key_use: bool,
    allow_insecure_scheme: bool,
    insecure_addr: String,
    listen_socket_path: String,
    acme: Option<RawAcme>,
    serving_cert_file: Option<RawServingCert>,
    server_api: Option<RawServerApi>,
    workload_api: Option<RawWorkloadApi>,
    file: Option<RawFile>,
    health_checks: Option<RawHealth>,
    jwt_issuer: String,
    jwks_uri: String,
    server_path_prefix: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawAcme {
    directory_url: String,
    email: String,
    tos_accepted: bool,
    cache_dir: Option<String>,
    /// Ours: SPIRE's provider listens on port 443 of all addresses.
    addr: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawServingCert {
    cert_file_path: String,
    key_file_path: String,
    addr: String,
    file_sync_interval: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawServerApi {
    address: String,
    poll_interval: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawWorkloadApi {
    socket_path: String,
    trust_domain: String,
    poll_interval: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawFile {
    path: String,
    poll_interval: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawHealth {
    bind_port: i64,
    ready_path: String,
    live_path: String,
}

/// Reads the provider's file.
///
/// # Errors
/// All that is wrong with it.
pub fn load_oidc(
    path: &Path,
    expand: bool,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Loaded<OidcSettings>, Box<ConfigError>> {
    parse_oidc(path, &read_text(path, expand, env)?)
}

/// The same from text; `path` is only named.
///
/// # Errors
/// All that is wrong with it.
pub fn parse_oidc(path: &Path, text: &str) -> Result<Loaded<OidcSettings>, Box<ConfigError>> {
    let mut r = Resolver::new(path, text, Vec::new())?;
    let (raw, unused) = r.raw::<Raw>();
    for key in unused {
        let meant = nearest(&key.key, key.known.iter().copied());
        let meant = meant.map(|meant| format!(" (did you mean {meant:?}?)")).unwrap_or_default();
        r.warn(format!("Unknown configuration key {} at {} is ignored{meant}", key.key, key.pos));
    }
    let settings = resolve(&mut r, raw);
    match settings {
        Some(settings) => r.finish(settings, |_| Readable::Other),
        None => Err(r.into_error()),
    }
}

/// `None` after a problem that was reported.
fn resolve(r: &mut Resolver, mut raw: Raw) -> Option<OidcSettings> {
    r.log_settings("", &raw.log_level, &raw.log_format, &raw.log_path, false);
    let source = source(r, raw.server_api.take(), raw.workload_api.take(), raw.file.take());
    let health = raw.health_checks.take().map(|health| health_checks(r, health));
    let endpoint = endpoint(r, raw);
    let (source, poll_interval) = source?;
    Some(OidcSettings { log: r.log.clone(), endpoint: endpoint?, source, poll_interval, health })
}

/// That of a server, which serves its own keys, logs as it does and has probes of its own.
pub(crate) fn of_server(r: &mut Resolver, raw: Raw, jwt_issuer: &str) -> Option<OidcEndpoint> {
    r.base = &["server", "experimental", "oidc"];
    let elsewhere = [
        ("server_api", raw.server_api.is_some()),
        ("workload_api", raw.workload_api.is_some()),
        ("file", raw.file.is_some()),
        ("health_checks", raw.health_checks.is_some()),
        ("log_level", !raw.log_level.is_empty()),
        ("log_format", !raw.log_format.is_empty()),
        ("log_path", !raw.log_path.is_empty()),
    ];
    for (key, _) in elsewhere.into_iter().filter(|(_, set)| *set) {
        let hint = "remove it: a server serves its own keys, and has a log and probes already";
        r.problem(&[key], format!("experimental.oidc: {key} has no meaning in a server"), hint);
    }
    let endpoint = endpoint(r, raw);
    r.base = &[];
    if let Some(endpoint) = &endpoint {
        compare_issuers(r, endpoint, jwt_issuer);
    }
    endpoint
}

/// Who verifies a token asks its issuer for the keys, and wants to find that name in the answer.
fn compare_issuers(r: &mut Resolver, endpoint: &OidcEndpoint, of_tokens: &str) {
    let named = endpoint.documents.issuer.as_deref();
    let url = of_tokens.split_once("://").map_or(of_tokens, |(_, rest)| rest);
    let authority = url.split(['/', '?', '#']).next().unwrap_or_default();
    let host = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => authority.split(':').next().unwrap_or_default(),
    };
    let fits = match named {
        Some(named) => named == of_tokens,
        None => endpoint.domains.iter().any(|d| d.trim_matches(['[', ']']) == host),
    };
    if fits {
        return;
    }
    let first = endpoint.domains.first().map(|domain| format!("https://{domain}")).unwrap_or_default();
    let wanted = named.unwrap_or(&first);
    let problem = match (of_tokens, named) {
        ("", _) => "JWT-SVIDs name no issuer, as the server's jwt_issuer is not set".to_owned(),
        (of_tokens, Some(_)) => format!("the server's jwt_issuer is {of_tokens:?}, that of the oidc block is another"),
        (of_tokens, None) => format!("the server's jwt_issuer is {of_tokens:?}, which is none of the domains"),
    };
    r.warn(format!(
        "experimental.oidc: {problem}: who verifies JWT-SVIDs with these documents refuses them; set jwt_issuer = \
         {wanted:?} in server {{ }}"
    ));
}

fn endpoint(r: &mut Resolver, raw: Raw) -> Option<OidcEndpoint> {
    let domains = domains(r, raw.domains);
    let listen = listen(r, raw.acme, raw.serving_cert_file, &raw.insecure_addr, &raw.listen_socket_path);
    for (key, url) in [("jwt_issuer", &raw.jwt_issuer), ("jwks_uri", &raw.jwks_uri)] {
        check_url(r, key, url);
    }
    if raw.jwks_uri.is_empty() && !raw.jwt_issuer.is_empty() {
        r.warn("jwt_issuer also decides about jwks_uri, as that is not set: set it to have it elsewhere");
    }
    if raw.allow_insecure_scheme {
        r.warn(
            "allow_insecure_scheme: documents may name http: URLs. Whoever can change what passes between this provider \
             and who reads it can forge the keys; use it behind a proxy that terminates TLS, on a network you trust",
        );
    }
    let some = |text: String| (!text.is_empty()).then_some(text);
    Some(OidcEndpoint {
        domains,
        listen: listen?,
        documents: OidcDocuments {
            issuer: some(raw.jwt_issuer),
            jwks_uri: some(raw.jwks_uri),
            set_key_use: raw.set_key_use,
            allow_insecure_scheme: raw.allow_insecure_scheme,
            path_prefix: match raw.server_path_prefix {
                // It is the path of URLs.
                prefix if !prefix.is_empty() && !prefix.starts_with('/') => format!("/{prefix}"),
                prefix => prefix,
            },
        },
        log_requests: raw.log_requests,
    })
}

fn domains(r: &mut Resolver, domains: Vec<String>) -> Vec<String> {
    if domains.is_empty() {
        r.problem(&["domains"], "at least one domain must be configured", "domains = [\"oidc.example.org\"]");
    }
    let mut kept: Vec<String> = Vec::new();
    for domain in domains {
        if !domain.is_ascii() || domain.chars().any(|c| c.is_ascii_uppercase()) {
            let hint = "small letters; others than ASCII as xn--…";
            r.problem(&["domains"], format!("domain {domain:?} must already be punycode encoded"), hint);
        } else if !domain.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':' | '[' | ']')) {
            r.problem(&["domains"], format!("domain {domain:?} is not a valid domain name"), "a name without a port");
        } else if !kept.contains(&domain) {
            kept.push(domain);
        }
    }
    kept
}

fn listen(
    r: &mut Resolver,
    acme: Option<RawAcme>,
    files: Option<RawServingCert>,
    insecure: &str,
    socket: &str,
) -> Option<OidcListen> {
    let named = [
        ("acme", acme.is_some()),
        ("serving_cert_file", files.is_some()),
        ("insecure_addr", !insecure.is_empty()),
        ("listen_socket_path", !socket.is_empty()),
    ];
    let named: Vec<&str> = named.into_iter().filter_map(|(name, set)| set.then_some(name)).collect();
    if let [first, second, ..] = named.as_slice() {
        r.problem(&[second], format!("{first} and {second} are mutually exclusive"), "keep one of them");
        return None;
    }
    if let Some(acme) = acme {
        return from_acme(r, acme);
    }
    if let Some(files) = files {
        return serving_cert(r, files);
    }
    if !insecure.is_empty() {
        return Some(OidcListen::Insecure(insecure.into()));
    }
    if socket.is_empty() {
        let message = "either acme, serving_cert_file, insecure_addr or listen_socket_path must be configured";
        r.problem(&[], message, "serving_cert_file { } serves HTTPS with a certificate from files");
        return None;
    }
    Some(OidcListen::Socket(socket.into()))
}

fn from_acme(r: &mut Resolver, raw: RawAcme) -> Option<OidcListen> {
    if !raw.tos_accepted {
        let message = "tos_accepted must be set to true in the acme configuration section";
        r.problem(&["acme", "tos_accepted"], message, "read the authority's terms of service first");
    }
    if raw.email.is_empty() {
        r.problem(&["acme"], "email must be configured in the acme configuration section", "");
    }
    let address = address(r, "acme", &raw.addr)?;
    let cache_dir = raw.cache_dir.unwrap_or_else(|| ACME_CACHE_DEFAULT.into()).into();
    Some(OidcListen::Acme { directory_url: raw.directory_url, email: raw.email, cache_dir, address })
}

/// The `addr` of a section; port 443 of all addresses if it has none.
fn address(r: &mut Resolver, section: &'static str, written: &str) -> Option<SocketAddr> {
    let found = socket_address(if written.is_empty() { ":443" } else { written });
    if let Err(error) = &found {
        let message = format!("invalid addr in the {section} configuration section: {error}");
        r.problem(&[section, "addr"], message, "write host:port, or :port for all addresses");
    }
    found.ok()
}

fn serving_cert(r: &mut Resolver, files: RawServingCert) -> Option<OidcListen> {
    let section = "serving_cert_file";
    for (key, path) in [("cert_file_path", &files.cert_file_path), ("key_file_path", &files.key_file_path)] {
        if path.is_empty() {
            r.problem(&[section], format!("{key} must be configured in the {section} configuration section"), "");
        }
    }
    let label = "invalid file_sync_interval in the serving_cert_file configuration section";
    let interval = r.duration(&[section, "file_sync_interval"], &files.file_sync_interval, label);
    let address = address(r, section, &files.addr)?;
    Some(OidcListen::ServingCert {
        certificate: files.cert_file_path.into(),
        key: files.key_file_path.into(),
        address,
        file_sync_interval: interval.filter(|i| !i.is_zero()).unwrap_or(FILE_SYNC_INTERVAL_DEFAULT),
    })
}

/// The address of `host:port` as Go reads it: without a host, all addresses.
///
/// # Errors
/// In words.
pub fn socket_address(text: &str) -> Result<SocketAddr, String> {
    if let Some(port) = text.strip_prefix(':') {
        let port = port.parse().map_err(|_| format!("address {text}: invalid port"))?;
        return Ok(SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port));
    }
    let found = text.to_socket_addrs().map_err(|e| format!("address {text}: {e}"))?;
    found.min_by_key(SocketAddr::is_ipv6).ok_or_else(|| format!("address {text}: no such host"))
}

fn source(
    r: &mut Resolver,
    server: Option<RawServerApi>,
    workload: Option<RawWorkloadApi>,
    file: Option<RawFile>,
) -> Option<(OidcSource, Duration)> {
    let (section, interval, source) = match (server, workload, file) {
        (Some(server), None, None) => ("server_api", server.poll_interval, server_api(r, &server.address)),
        (None, Some(workload), None) => {
            let interval = workload.poll_interval.clone();
            ("workload_api", interval, workload_api(r, &workload))
        }
        (None, None, Some(file)) => ("file", file.poll_interval, Some(OidcSource::File(file.path.into()))),
        (None, None, None) => {
            let message = "exactly one of the server_api, workload_api, or file sections must be configured";
            r.problem(&[], message, "server_api { address = \"unix:///tmp/spire-server/private/api.sock\" }");
            return None;
        }
        _ => {
            let message = "the server_api, workload_api, and file sections are mutually exclusive";
            r.problem(&[], message, "keep one of them");
            return None;
        }
    };
    let label = format!("invalid poll_interval in the {section} configuration section");
    let interval = r.duration(&[section, "poll_interval"], &interval, &label);
    Some((source?, interval.filter(|i| !i.is_zero()).unwrap_or(POLL_INTERVAL_DEFAULT)))
}

fn server_api(r: &mut Resolver, address: &str) -> Option<OidcSource> {
    let path = &["server_api", "address"];
    if address.is_empty() {
        r.problem(
            path,
            "address must be configured in the server_api configuration section",
            "unix:///path/of/api.sock",
        );
        return None;
    }
    let Some(socket) = address.strip_prefix("unix:") else {
        let message = "address must use the unix name system in the server_api configuration section";
        r.problem(path, message, "unix:///path/of/api.sock");
        return None;
    };
    // "unix:path" and "unix:///absolute/path".
    let socket = socket.strip_prefix("//").unwrap_or(socket);
    Some(OidcSource::Server(socket.into()))
}

fn workload_api(r: &mut Resolver, workload: &RawWorkloadApi) -> Option<OidcSource> {
    if workload.socket_path.is_empty() {
        let message = "socket_path must be configured in the workload_api configuration section";
        r.problem(&["workload_api"], message, "");
    }
    if workload.trust_domain.is_empty() {
        let message = "trust_domain must be configured in the workload_api configuration section";
        r.problem(&["workload_api"], message, "");
        return None;
    }
    match TrustDomain::parse(&workload.trust_domain) {
        Ok(trust_domain) => Some(OidcSource::Workload((&workload.socket_path).into(), trust_domain)),
        Err(error) => {
            r.problem(&["workload_api", "trust_domain"], error.to_string(), "");
            None
        }
    }
}

fn health_checks(r: &mut Resolver, raw: RawHealth) -> OidcHealth {
    let port = if raw.bind_port <= 0 { Ok(HEALTH_PORT_DEFAULT) } else { u16::try_from(raw.bind_port) };
    let port = port.unwrap_or_else(|_| {
        let message = format!("health_checks: bind_port {} is not a TCP port", raw.bind_port);
        r.problem(&["health_checks", "bind_port"], message, "ports go from 0 to 65535");
        HEALTH_PORT_DEFAULT
    });
    let or = |written: String, default: &str| if written.is_empty() { default.to_owned() } else { written };
    OidcHealth { port, ready_path: or(raw.ready_path, "/ready"), live_path: or(raw.live_path, "/live") }
}

fn check_url(r: &mut Resolver, key: &'static str, url: &str) {
    if url.is_empty() {
        return;
    }
    let parsed = url.parse::<http::Uri>();
    let problem = match &parsed {
        Err(error) => format!("the {key} url could not be parsed: {error}"),
        Ok(uri) if uri.scheme().is_none() => format!("the {key} url must contain a scheme"),
        Ok(uri) if uri.host().is_none_or(str::is_empty) => format!("the {key} url must contain a host"),
        Ok(_) => return,
    };
    r.problem(&[key], problem, "such as https://oidc.example.org");
}

#[cfg(test)]
#[path = "oidc_tests.rs"]
mod tests;
