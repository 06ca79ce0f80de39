//! Fetching one small document over HTTPS, with a limit on everything: time, size, redirects.

use crate::http1::{Answer, Connection, ExchangeError};
use bytes::Bytes;
use finial_runtime::errno_text;
use http::header::{HOST, HeaderValue, LOCATION, USER_AGENT};
use http::response::Parts;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use http_body_util::Full;
use rustls::RootCertStore;
use rustls_pki_types::ServerName;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// So many redirects are followed, as Go's client does.
const REDIRECTS_MAX: usize = 10;
/// How long one address of a name may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What a fetch may cost.
#[derive(Clone, Copy, Debug)]
pub struct FetchLimits {
    /// Longest time for everything.
    pub time: Duration,
    /// Largest body, in bytes.
    pub body: usize,
}

/// What the server answered at last.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// The status; never a redirect that can be followed.
    pub status: StatusCode,
    /// The body.
    pub body: Bytes,
}

/// Why nothing was fetched. The texts are those of Go's client where it has some.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The URL is not one of HTTPS with a host, or names a user.
    #[error("{0:?} is not an https URL with a host and without a user")]
    Url(String),
    /// The name has no address.
    #[error("dial tcp: lookup {host}: {reason}")]
    Lookup {
        /// The name.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// None of its addresses answers.
    #[error("dial tcp {address}: {reason}")]
    Connect {
        /// The address that was tried last.
        address: SocketAddr,
        /// Why it failed.
        reason: String,
    },
    /// The TLS handshake failed.
    #[error("{0}")]
    Tls(#[source] Arc<rustls::Error>),
    /// The connection broke, or what came is not HTTP.
    #[error("{0}")]
    Http(String),
    /// The body is longer than allowed.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    /// One redirect leads to the next.
    #[error("stopped after {REDIRECTS_MAX} redirects")]
    Redirects,
    /// It was sent elsewhere, and that failed.
    #[error("redirected to {to:?}: {cause}")]
    Redirected {
        /// Where to, at last.
        to: String,
        /// What failed there.
        cause: Box<FetchError>,
    },
    /// It took longer than allowed.
    #[error("no answer within {0} s")]
    Timeout(u64),
}

/// The roots that this machine trusts for the web, as Go finds them: the distribution's files, or `SSL_CERT_FILE` and
/// `SSL_CERT_DIR`. Reads files; what cannot be read is left out, which a failed handshake tells.
pub fn system_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(%error, "A web root of this machine cannot be read");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    roots
}

/// Fetches `url` by HTTP/1.1. Redirects are followed to https URLs only, under the same rules for the server's
/// certificate (SPIFFE Federation sections 5.2.1.4 and 5.2.2.4).
pub async fn get(url: &str, tls: Arc<rustls::ClientConfig>, limits: FetchLimits) -> Result<Fetched, FetchError> {
    let fetch = async {
        let mut target = parse(url)?;
        for hops in 0..=REDIRECTS_MAX {
            let there = |cause| match hops {
                0 => cause,
                _ => FetchError::Redirected { to: target.to_string(), cause: Box::new(cause) },
            };
            match get_once(&target, tls.clone(), limits.body).await.map_err(there)? {
                Step::Done(fetched) => return Ok(fetched),
                Step::Redirected(location) => target = resolve(&target, &location)?,
            }
        }
        Err(FetchError::Redirects)
    };
    tokio::time::timeout(limits.time, fetch).await.unwrap_or(Err(FetchError::Timeout(limits.time.as_secs())))
}

/// Sends one request, over a connection of its own. Redirects are not followed: they are answers.
pub async fn send(
    request: Request<Bytes>,
    tls: Arc<rustls::ClientConfig>,
    limits: FetchLimits,
) -> Result<Answer, FetchError> {
    let send = async {
        let (mut head, body) = request.into_parts();
        let uri = parse(&head.uri.to_string())?;
        let bad = || FetchError::Url(uri.to_string());
        let authority = uri.authority().ok_or_else(bad)?.as_str();
        head.headers.insert(HOST, HeaderValue::from_str(authority).map_err(|_| bad())?);
        head.uri = uri.path_and_query().map_or("/", PathAndQuery::as_str).parse().map_err(|_| bad())?;
        let mut connection = Connection::open(dial(&uri, tls).await?).await?;
        let request = Request::from_parts(head, Full::new(body));
        Ok(connection.ask(request, |_| Some(limits.body)).await?)
    };
    tokio::time::timeout(limits.time, send).await.unwrap_or(Err(FetchError::Timeout(limits.time.as_secs())))
}

/// Fetches `url` (`http://…`) by HTTP through a unix socket. Redirects are not followed: who serves there is next door.
pub async fn get_unix(socket: &Path, url: &str, limits: FetchLimits) -> Result<Fetched, FetchError> {
    let fetch = async {
        let bad = || FetchError::Url(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let host = uri.authority().ok_or_else(bad)?.as_str().to_owned();
        let failed =
            |e: io::Error| FetchError::Http(format!("dial unix {}: connect: {}", socket.display(), errno_text(&e)));
        let stream = UnixStream::connect(socket).await.map_err(failed)?;
        match exchange(stream, request(&uri, &host)?, limits.body).await? {
            Step::Done(fetched) => Ok(fetched),
            Step::Redirected(to) => Err(FetchError::Http(format!("redirected to {to}"))),
        }
    };
    tokio::time::timeout(limits.time, fetch).await.unwrap_or(Err(FetchError::Timeout(limits.time.as_secs())))
}

enum Step {
    Done(Fetched),
    Redirected(String),
}

/// Reads an URL and checks it against the rules of the standard.
fn parse(url: &str) -> Result<Uri, FetchError> {
    let bad = || FetchError::Url(url.to_owned());
    // A fragment is the client's own business.
    let sent = url.split_once('#').map_or(url, |(sent, _)| sent);
    let uri: Uri = sent.parse().map_err(|_| bad())?;
    let authority = uri.authority().ok_or_else(bad)?;
    let good =
        uri.scheme() == Some(&Scheme::HTTPS) && !authority.as_str().contains('@') && !authority.host().is_empty();
    if good { Ok(uri) } else { Err(bad()) }
}

/// Where a `Location` header leads.
fn resolve(from: &Uri, location: &str) -> Result<Uri, FetchError> {
    if !location.starts_with('/') || location.starts_with("//") {
        let absolute = if location.starts_with("//") { format!("https:{location}") } else { location.to_owned() };
        return parse(&absolute);
    }
    let authority = from.authority().map_or("", |authority| authority.as_str());
    parse(&format!("https://{authority}{location}"))
}

async fn get_once(uri: &Uri, tls: Arc<rustls::ClientConfig>, body_max: usize) -> Result<Step, FetchError> {
    let stream = dial(uri, tls).await?;
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    exchange(stream, request(uri, authority)?, body_max).await
}

async fn dial(uri: &Uri, tls: Arc<rustls::ClientConfig>) -> Result<TlsStream<TcpStream>, FetchError> {
    let bad = || FetchError::Url(uri.to_string());
    let authority = uri.authority().ok_or_else(bad)?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(host.clone()).map_err(|_| bad())?;
    let tcp = connect(&host, authority.port_u16().unwrap_or(443)).await?;
    TlsConnector::from(tls).connect(name, tcp).await.map_err(tls_error)
}

fn request(uri: &Uri, host: &str) -> Result<Request<Full<Bytes>>, FetchError> {
    let bad = |_| FetchError::Url(uri.to_string());
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    Request::builder()
        .method(Method::GET)
        .uri(path)
        .header(HOST, HeaderValue::from_str(host).map_err(bad)?)
        .header(USER_AGENT, concat!("finial/", env!("CARGO_PKG_VERSION")))
        .body(Full::default())
        .map_err(|e| FetchError::Http(e.to_string()))
}

/// One request and its answer on a connection of their own.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
    body_max: usize,
) -> Result<Step, FetchError> {
    let mut connection = Connection::open(stream).await?;
    let body_max = |head: &Parts| location(head.status, &head.headers).is_none().then_some(body_max);
    let Answer { status, headers, body } = connection.ask(request, body_max).await?;
    Ok(match location(status, &headers) {
        Some(location) => Step::Redirected(location.to_owned()),
        None => Step::Done(Fetched { status, body }),
    })
}

/// Where a redirect leads.
fn location(status: StatusCode, headers: &HeaderMap) -> Option<&str> {
    let is_redirect = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308);
    headers.get(LOCATION).filter(|_| is_redirect).and_then(|value| value.to_str().ok())
}

impl From<ExchangeError> for FetchError {
    fn from(error: ExchangeError) -> Self {
        match error {
            ExchangeError::Broken(text) => Self::Http(text),
            ExchangeError::TooLarge(max) => Self::TooLarge(max),
        }
    }
}

fn tls_error(error: io::Error) -> FetchError {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(cause) => FetchError::Tls(Arc::new(cause.clone())),
        None => FetchError::Http(errno_text(&error)),
    }
}

/// Connects to the first address of the name that answers.
async fn connect(host: &str, port: u16) -> Result<TcpStream, FetchError> {
    let lookup = |reason: String| FetchError::Lookup { host: host.to_owned(), reason };
    let addresses = tokio::net::lookup_host((host, port)).await.map_err(|_| lookup("no such host".into()))?;
    let mut last = lookup("no such host".into());
    for address in addresses {
        let failed = |reason: String| FetchError::Connect { address, reason };
        last = match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // One small request: nothing to gather.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => failed(format!("connect: {}", errno_text(&error))),
            Err(_) => failed("i/o timeout".into()),
        };
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_https_urls_with_a_host_are_fetched() {
        for good in ["https://a.test", "https://a.test:8443/x?y#z", "https://127.0.0.1/", "https://[::1]:1/"] {
            parse(good).unwrap();
        }
        for bad in
            ["", "http://a.test", "https://", "https:///x", "https://u@a.test", "https://u:p@a.test", "a.test", "/x"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_redirect_never_leads_away_from_https() {
        let from = parse("https://a.test:1/x").unwrap();
        let to = |location: &str| resolve(&from, location).map(|uri| uri.to_string()).ok();
        assert_eq!(to("/y?z").as_deref(), Some("https://a.test:1/y?z"));
        assert_eq!(to("//b.test/y").as_deref(), Some("https://b.test/y"));
        assert_eq!(to("https://b.test/y").as_deref(), Some("https://b.test/y"));
        assert_eq!(to("http://b.test/y"), None);
        assert_eq!(to("https://u@b.test/y"), None);
    }
}
