//! Vault's HTTP API: one call, its answer or what Vault said instead.

use crate::config::{Auth, Settings};
use bytes::Bytes;
use finial_core::{ErrorKind, Secret};
use finial_net::Proxies;
use finial_net::rest::{Answer, Client, Identity, Limits, Trust, client_config};
use finial_plugin::PluginError;
use finial_runtime::files;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION};
use http::{Method, StatusCode};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// What one call may cost: the server waits half a minute for the log-in and the signature together.
const LIMITS: Limits = Limits { time: Duration::from_secs(12), body: 1 << 20 };
/// Largest file that is read: a CA bundle.
const FILE_BYTES_MAX: usize = 4 << 20;
/// What a path does not hold as it is. Mounts may have slashes.
const UNSAFE: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'<').add(b'>').add(b'?').add(b'`').add(b'%');
const TOKEN: HeaderName = HeaderName::from_static("x-vault-token");
const NAMESPACE: HeaderName = HeaderName::from_static("x-vault-namespace");
/// Without it an agent of Vault's between us refuses.
const REQUEST: HeaderName = HeaderName::from_static("x-vault-request");

/// Why a call did not do what it should.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Vault refuses: the token is no good (any more), or does not allow this.
    Refused(String),
    /// Anything else.
    Other(ErrorKind, String),
}

impl Failure {
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Refused(text) | Self::Other(_, text) => text,
        }
    }

    /// As an error whose message begins so.
    pub(crate) fn during(self, what: &str) -> PluginError {
        match self {
            Self::Refused(text) => PluginError::denied(format!("{what}: {text}")),
            Self::Other(kind, text) => PluginError::new(kind, format!("{what}: {text}")),
        }
    }
}

/// What Vault says of a failure.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Said {
    errors: Vec<String>,
}

/// A Vault server, with the files as they were when this was made.
pub(crate) struct Api {
    client: Client,
    tls: Arc<rustls::ClientConfig>,
    proxy: Option<Arc<Proxies>>,
    namespace: Option<HeaderValue>,
}

/// Reads a file of limited size.
pub(crate) fn read(path: &Path, what: &str) -> Result<Secret<Vec<u8>>, PluginError> {
    let bytes = files::read_limited(path, FILE_BYTES_MAX);
    bytes.map(Secret::new).map_err(|e| PluginError::invalid(format!("failed to load {what}: {}: {e}", path.display())))
}

/// Does what reads files on a thread where that delays nobody.
pub(crate) async fn aside<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, PluginError> + Send + 'static,
) -> Result<T, PluginError> {
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|e| Err(PluginError::internal(e.to_string())))
}

impl Api {
    /// Reads the files.
    pub(crate) async fn open(settings: &Arc<Settings>) -> Result<Self, PluginError> {
        let settings = settings.clone();
        aside(move || Self::open_now(&settings)).await
    }

    fn open_now(settings: &Settings) -> Result<Self, PluginError> {
        let trust = match &settings.ca {
            _ if settings.trusts_anyone => Trust::Anyone,
            Some(path) => Trust::Named(read(path, "CA certificate")?.expose().clone()),
            None => Trust::System,
        };
        let identity = match &settings.auth {
            Auth::Cert { certificate, key, .. } => Some(Identity {
                certificate: read(certificate, "client certificate")?.expose().clone(),
                key: read(key, "client private key")?,
            }),
            _ => None,
        };
        let tls = client_config(&trust, identity.as_ref(), "Vault").map_err(PluginError::invalid)?;
        let tls = Arc::new(tls);
        let proxy = settings.proxy.clone();
        let client = client(&settings.address, &tls, proxy.as_ref());
        let client = client.map_err(|e| PluginError::invalid(format!("vault_addr: {e}")))?;
        let namespace = Some(&settings.namespace).filter(|namespace| !namespace.is_empty());
        let namespace = namespace.map(|namespace| HeaderValue::try_from(namespace.as_str())).transpose();
        let namespace = namespace.map_err(|_| PluginError::invalid("namespace: not one line of text"))?;
        Ok(Self { client, tls, proxy, namespace })
    }

    fn headers(&self, token: Option<&Secret<String>>) -> Result<HeaderMap, Failure> {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST, HeaderValue::from_static("true"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.extend(self.namespace.clone().map(|namespace| (NAMESPACE, namespace)));
        if let Some(token) = token {
            let bad = |_| Failure::Refused("the token is not one line of text".into());
            let mut value = HeaderValue::try_from(token.expose().as_str()).map_err(bad)?;
            value.set_sensitive(true);
            headers.insert(TOKEN, value);
        }
        Ok(headers)
    }

    /// Calls `path`, which stands behind `/v1/`.
    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        token: Option<&Secret<String>>,
        body: Zeroizing<Vec<u8>>,
    ) -> Result<T, Failure> {
        let path = format!("/v1/{}", utf8_percent_encode(path.trim_matches('/'), UNSAFE));
        let headers = self.headers(token)?;
        let body = Bytes::from_owner(body);
        let whence = |client: &Client| format!("{method} {}{path}", client.target());
        let failed = |e: &dyn std::fmt::Display| {
            Failure::Other(ErrorKind::Unavailable, format!("{}: {e}", whence(&self.client)))
        };
        let answer = self.client.send(method.clone(), &path, &headers, body.clone(), LIMITS).await;
        let mut answer = answer.map_err(|e| failed(&e))?;
        if let Some(location) = redirect(&answer) {
            // A standby that does not forward: it names the active one.
            let other = self.elsewhere(location, &path).map_err(|e| failed(&e))?;
            let again = other.send(method.clone(), &path, &headers, body, LIMITS).await;
            answer = again.map_err(|e| Failure::Other(ErrorKind::Unavailable, format!("{}: {e}", whence(&other))))?;
        }
        if !answer.status.is_success() {
            return Err(refusal(&answer, &whence(&self.client)));
        }
        let parsed = serde_json::from_slice(&answer.body);
        parsed.map_err(|e| {
            Failure::Other(ErrorKind::Internal, format!("{}: the answer is not Vault's: {e}", whence(&self.client)))
        })
    }

    /// Where a redirect leads, if it is the same call of another server. Never from TLS to none: the token goes along.
    fn elsewhere(&self, location: &str, path: &str) -> Result<Client, String> {
        let base =
            location.strip_suffix(path).ok_or_else(|| format!("redirected to {location}, which is another call"))?;
        let other = client(base, &self.tls, self.proxy.as_ref())?;
        let is_downgrade = self.client.target().is_tls() && !other.target().is_tls();
        if is_downgrade { Err(format!("redirected to {location}, which is without TLS")) } else { Ok(other) }
    }
}

fn client(url: &str, tls: &Arc<rustls::ClientConfig>, proxy: Option<&Arc<Proxies>>) -> Result<Client, String> {
    let client = Client::to(url, tls.clone())?;
    Ok(match proxy {
        Some(proxy) => client.through(proxy.clone()),
        None => client,
    })
}

fn redirect(answer: &Answer) -> Option<&str> {
    let is_redirect = matches!(answer.status.as_u16(), 301 | 302 | 307 | 308);
    answer.headers.get(LOCATION).filter(|_| is_redirect).and_then(|value| value.to_str().ok())
}

fn refusal(answer: &Answer, whence: &str) -> Failure {
    let said: Said = serde_json::from_slice(&answer.body).unwrap_or_default();
    let said: String = said.errors.join("; ").chars().take(500).collect();
    let separator = if said.is_empty() { "" } else { ": " };
    let text = format!("{whence}: {}{separator}{said}", answer.status);
    match answer.status {
        StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => Failure::Refused(text),
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            Failure::Other(ErrorKind::Unavailable, text)
        }
        _ => Failure::Other(ErrorKind::Internal, text),
    }
}
