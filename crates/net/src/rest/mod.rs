//! Requests to a daemon of this node or to a service elsewhere, over a unix socket, TCP or TLS, each with a limit on time and
//! size. Redirects are answers like others: a request may carry what only its receiver is to see.
//!
//! A connection is kept for the next request. Nobody looks at it meanwhile (plugins spawn nothing), so one that has died is
//! only noticed, and replaced, by the request after.

pub(crate) mod trust;

pub use crate::http1::{Answer, ExchangeError};
pub use trust::{Identity, Trust, client_config};

use crate::dial::{self, DialError};
use crate::egress::Proxies;
use crate::http1::{self, Connection};
use bytes::Bytes;
use finial_runtime::errno_text;
use http::header::{HOST, HeaderValue, USER_AGENT};
use http::{HeaderMap, Method, Request, Uri};
use http_body_util::Full;
use rustls_pki_types::ServerName;
use serde::de::DeserializeOwned;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::Instant;

/// A body larger than this is parsed on a thread of its own.
const LARGE: usize = 64 << 10;

/// A connection that nobody needed for so long is not used: what lies between may have forgotten it without a word.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Where the daemon listens.
#[derive(Clone)]
pub enum Target {
    /// A unix socket.
    Unix(PathBuf),
    /// Plain TCP: `host:port`.
    Tcp(String),
    /// TLS over TCP: `host:port`, the name for the handshake, and whom to trust.
    Tls(String, ServerName<'static>, Arc<rustls::ClientConfig>),
}

impl Target {
    /// Whether what is asked there stays between us.
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(..))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Tls(address, ..) => write!(f, "https://{address}"),
        }
    }
}

/// What one request may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest time for everything.
    pub time: Duration,
    /// Largest body, in bytes.
    pub body: usize,
}

/// What `read` makes of the body: of a large one on a thread of its own, so that it delays nobody.
pub async fn parse<T: Send + 'static>(answer: &Answer, read: fn(&[u8]) -> serde_json::Result<T>) -> Result<T, String> {
    let body = answer.body.clone();
    let parsed = if body.len() > LARGE {
        tokio::task::spawn_blocking(move || read(&body)).await.map_err(|e| e.to_string())?
    } else {
        read(&body)
    };
    parsed.map_err(|e| e.to_string())
}

/// The body as JSON.
pub async fn json<T: DeserializeOwned + Send + 'static>(answer: &Answer) -> Result<T, String> {
    parse(answer, |body| serde_json::from_slice(body)).await
}

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HttpError {
    /// Nobody listens at the unix socket, or another user.
    #[error("{0}")]
    Connect(String),
    /// There is no connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The connection broke, what came is not HTTP, or too long.
    #[error("{0}")]
    Exchange(#[from] ExchangeError),
    /// It took longer than allowed.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

/// A client of one daemon.
pub struct Client {
    target: Target,
    /// What stands before each path.
    base: String,
    /// Who must listen on the unix socket, if that matters.
    owner: Option<u32>,
    /// Between us and who is asked by TLS.
    proxies: Arc<Proxies>,
    /// The last connection, and since when nobody needs it.
    idle: Mutex<Option<(Connection, Instant)>>,
}

impl Client {
    /// Connects when it is asked, through no proxy: to what belongs to this node.
    pub fn new(target: Target) -> Self {
        Self { target, base: String::new(), owner: None, proxies: Arc::default(), idle: Mutex::default() }
    }

    /// Of who listens at this URL (`https://host[:port][/path]`, or `http://…`). A path stands before that of each request;
    /// `tls` is for `https`, which goes through the proxy that the environment names.
    ///
    /// # Errors
    /// What is wrong with the URL.
    pub fn to(url: &str, tls: Arc<rustls::ClientConfig>) -> Result<Self, String> {
        let bad = |why: &str| format!("{url:?} is not an http or https URL: {why}");
        let uri: Uri = url.parse().map_err(|e: http::uri::InvalidUri| bad(&e.to_string()))?;
        let authority = uri.authority().ok_or_else(|| bad("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it names a user"));
        }
        if uri.query().is_some() {
            return Err(bad("it has a query"));
        }
        let host = authority.host();
        let address = |port: u16| format!("{host}:{}", authority.port_u16().unwrap_or(port));
        let target = match uri.scheme_str() {
            Some("http") => Target::Tcp(address(80)),
            Some("https") => {
                let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                let name = ServerName::try_from(bare).map_err(|e| bad(&e.to_string()))?;
                Target::Tls(address(443), name, tls)
            }
            _ => return Err(bad("its scheme is another")),
        };
        let (base, proxies) = (uri.path().trim_end_matches('/').to_owned(), Proxies::of_environment());
        Ok(Self { base, proxies, ..Self::new(target) })
    }

    /// The same with other proxies.
    pub fn through(self, proxies: Arc<Proxies>) -> Self {
        Self { proxies, ..self }
    }

    /// The same, where TLS is to find a certificate of this name.
    ///
    /// # Errors
    /// It is no name.
    pub fn named(mut self, server: &str) -> Result<Self, String> {
        if let Target::Tls(_, name, _) = &mut self.target {
            *name = ServerName::try_from(server.to_owned()).map_err(|e| format!("{server:?}: {e}"))?;
        }
        Ok(self)
    }

    /// Of a daemon that only that user may be, where the target is a unix socket: the path may lead to another's.
    pub fn of_user(target: Target, uid: u32) -> Self {
        Self { owner: Some(uid), ..Self::new(target) }
    }

    /// Who is asked.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Gets `path`. Redirects are answers like others.
    pub async fn get(&self, path: &str, headers: &HeaderMap, limits: Limits) -> Result<Answer, HttpError> {
        self.send(Method::GET, path, headers, Bytes::new(), limits).await
    }

    /// A request that may be repeated: it is, when a connection that was kept turns out to be closed.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
        limits: Limits,
    ) -> Result<Answer, HttpError> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        let path = format!("{}{path}", self.base);
        *request.uri_mut() =
            path.parse().map_err(|e: http::uri::InvalidUri| ExchangeError::Broken(format!("{path:?}: {e}")))?;
        request.headers_mut().clone_from(headers);
        request.headers_mut().insert(HOST, self.host());
        request.headers_mut().entry(USER_AGENT).or_insert(HeaderValue::from_static(http1::AGENT));
        let late = Err(HttpError::Timeout(limits.time));
        tokio::time::timeout(limits.time, self.send_now(request, limits.body)).await.unwrap_or(late)
    }

    async fn send_now(&self, request: Request<Full<Bytes>>, body_max: usize) -> Result<Answer, HttpError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((kept, _)) = idle.filter(|(_, since)| since.elapsed() < IDLE_MAX) {
            match self.exchange(kept, request.clone(), body_max).await {
                // It was closed while nobody looked.
                Err(HttpError::Exchange(ExchangeError::Broken(_))) => {}
                answer => return answer,
            }
        }
        self.exchange(self.connect().await?, request, body_max).await
    }

    async fn exchange(
        &self,
        mut connection: Connection,
        request: Request<Full<Bytes>>,
        body_max: usize,
    ) -> Result<Answer, HttpError> {
        let answer = connection.ask(request, |_| Some(body_max)).await?;
        if connection.is_open() {
            *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some((connection, Instant::now()));
        }
        Ok(answer)
    }

    async fn connect(&self) -> Result<Connection, HttpError> {
        let failed = |e: io::Error| HttpError::Connect(errno_text(&e));
        match &self.target {
            Target::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(failed)?;
                let listener = stream.peer_cred().map_err(failed)?.uid();
                if let Some(owner) = self.owner.filter(|owner| *owner != listener) {
                    return Err(HttpError::Connect(format!("user {listener} listens there, not user {owner}")));
                }
                Ok(Connection::open(stream).await?)
            }
            Target::Tcp(address) => {
                let (host, port) = parts(address)?;
                Ok(Connection::open(dial::tcp(host, port).await?).await?)
            }
            Target::Tls(address, name, config) => {
                let (host, port) = parts(address)?;
                let stream = dial::open(&self.proxies, host, port).await?;
                Ok(Connection::open(dial::secure(stream, name.clone(), config.clone()).await?).await?)
            }
        }
    }

    /// What stands before each path.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// What `Host` says: without the port where that goes without saying.
    pub fn host(&self) -> HeaderValue {
        let address = match &self.target {
            Target::Unix(_) => "localhost",
            Target::Tcp(address) => address.strip_suffix(":80").unwrap_or(address),
            Target::Tls(address, ..) => address.strip_suffix(":443").unwrap_or(address),
        };
        HeaderValue::from_str(address).unwrap_or(HeaderValue::from_static("localhost"))
    }
}

/// Of `host:port`.
fn parts(address: &str) -> Result<(&str, u16), HttpError> {
    let found = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let (host, port) = found.ok_or_else(|| HttpError::Connect(format!("{address:?} is not host:port")))?;
    Ok((host.trim_start_matches('[').trim_end_matches(']'), port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::StatusCode;

    #[test]
    fn a_url_says_where_to_connect_and_what_stands_before_paths() {
        let tls = Arc::new(client_config(&Trust::Anyone, None, "server").unwrap());
        let to = |url: &str| Client::to(url, tls.clone()).map(|client| (client.target.to_string(), client.base));
        for (url, want) in [
            ("https://vault.test", "vault.test"),
            ("https://[::1]:443", "[::1]"),
            ("https://vault.test:80", "vault.test:80"),
            ("http://vault.test:80/x", "vault.test"),
        ] {
            assert_eq!(Client::to(url, tls.clone()).unwrap().host(), want, "{url}");
        }
        for (url, want) in [
            ("https://vault.test", ("https://vault.test:443", "")),
            ("https://vault.test:8200/", ("https://vault.test:8200", "")),
            ("https://[::1]:8200/a/b/", ("https://[::1]:8200", "/a/b")),
            ("http://127.0.0.1", ("http://127.0.0.1:80", "")),
        ] {
            assert_eq!(to(url).unwrap(), (want.0.to_owned(), want.1.to_owned()), "{url}");
        }
        for bad in
            ["", "vault.test", "/x", "ftp://vault.test", "https://u:p@vault.test", "https://a.test/?x", "https://a b"]
        {
            let error = to(bad).unwrap_err();
            assert!(error.starts_with(&format!("{bad:?} is not an http or https URL: ")), "{error}");
        }
    }

    #[tokio::test]
    async fn a_large_body_is_parsed_on_another_thread() {
        let here = std::thread::current().id();
        for (bytes, is_here) in [(LARGE, true), (LARGE + 1, false)] {
            let body = vec![b' '; bytes].into();
            let answer = Answer { status: StatusCode::OK, headers: HeaderMap::new(), body };
            let there = parse(&answer, |_| Ok(std::thread::current().id())).await.unwrap();
            assert_eq!(there == here, is_here, "{bytes}");
            assert!(json::<u8>(&answer).await.is_err());
        }
    }
}
