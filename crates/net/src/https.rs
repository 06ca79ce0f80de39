//! Fetching one small document over HTTPS, with a limit on everything: time, size, redirects.

use crate::dial::{self, DialError};
use crate::egress::Proxies;
use crate::http1::{self, Answer, Connection, ExchangeError};
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
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

/// So many redirects are followed, as Go's client does.
const REDIRECTS_MAX: usize = 10;

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
    /// There is no connection.
    #[error(transparent)]
    Dial(#[from] DialError),
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

/// Fetches `url` by HTTP/1.1, through the proxy that the environment names. Redirects are followed to https URLs only, under the same rules for the server's
/// certificate (SPIFFE Federation sections 5.2.1.4 and 5.2.2.4).
pub async fn get(url: &str, tls: Arc<rustls::ClientConfig>, limits: FetchLimits) -> Result<Fetched, FetchError> {
    let proxies = Proxies::of_environment();
    let fetch = async {
        let mut target = parse(url)?;
        for hops in 0..=REDIRECTS_MAX {
            let there = |cause| match hops {
                0 => cause,
                _ => FetchError::Redirected { to: target.to_string(), cause: Box::new(cause) },
            };
            match get_once(&proxies, &target, tls.clone(), limits.body).await.map_err(there)? {
                Step::Done(fetched) => return Ok(fetched),
                Step::Redirected(location) => target = resolve(&target, &location)?,
            }
        }
        Err(FetchError::Redirects)
    };
    tokio::time::timeout(limits.time, fetch).await.unwrap_or(Err(FetchError::Timeout(limits.time.as_secs())))
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

/// Where a `Location` header leads (RFC 3986 section 5.2).
fn resolve(from: &Uri, location: &str) -> Result<Uri, FetchError> {
    let location = location.split('#').next().unwrap_or_default();
    let (path, query) = location.split_once('?').map_or((location, None), |(path, query)| (path, Some(query)));
    if path.split('/').next().is_some_and(|first| first.contains(':')) {
        return parse(location);
    }
    if path.starts_with("//") {
        return parse(&format!("https:{location}"));
    }
    let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
    let path = match path {
        "" => from.path().to_owned(),
        absolute if absolute.starts_with('/') => without_dots(absolute),
        relative => without_dots(&format!("{folder}/{relative}")),
    };
    let query = query.or_else(|| from.query().filter(|_| location.is_empty()));
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    let authority = from.authority().map_or("", |authority| authority.as_str());
    parse(&format!("https://{authority}{path}{query}"))
}

/// A path from the root, with `.` and `..` followed.
fn without_dots(path: &str) -> String {
    let mut kept = Vec::new();
    for part in path.split('/').skip(1) {
        match part {
            "." => {}
            ".." => drop(kept.pop()),
            part => kept.push(part),
        }
    }
    let is_folder = path.ends_with("/.") || path.ends_with("/..");
    format!("/{}{}", kept.join("/"), if is_folder && !kept.is_empty() { "/" } else { "" })
}

async fn get_once(
    proxies: &Proxies,
    uri: &Uri,
    tls: Arc<rustls::ClientConfig>,
    body_max: usize,
) -> Result<Step, FetchError> {
    let bad = || FetchError::Url(uri.to_string());
    let authority = uri.authority().ok_or_else(bad)?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(host.clone()).map_err(|_| bad())?;
    let stream = dial::open(proxies, &host, authority.port_u16().unwrap_or(443)).await?;
    let stream = dial::secure(stream, name, tls).await?;
    exchange(stream, request(uri, authority.as_str())?, body_max).await
}

fn request(uri: &Uri, host: &str) -> Result<Request<Full<Bytes>>, FetchError> {
    let bad = |_| FetchError::Url(uri.to_string());
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    Request::builder()
        .method(Method::GET)
        .uri(path)
        .header(HOST, HeaderValue::from_str(host).map_err(bad)?)
        .header(USER_AGENT, http1::AGENT)
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
        for (location, want) in [
            ("bundle.json", "https://a.test:1/p/bundle.json"),
            ("b/./c", "https://a.test:1/p/b/c"),
            ("./b?c=d#e", "https://a.test:1/p/b?c=d"),
            ("../b", "https://a.test:1/b"),
            ("../../../b/..", "https://a.test:1/"),
            ("b/c/..", "https://a.test:1/p/b/"),
            ("/a/../b/.", "https://a.test:1/b/"),
            ("?v=2:3", "https://a.test:1/p/x?v=2:3"),
            ("#e", "https://a.test:1/p/x?q"),
            ("x/y:z", "https://a.test:1/p/x/y:z"),
        ] {
            let from = parse("https://a.test:1/p/x?q").unwrap();
            assert_eq!(resolve(&from, location).unwrap().to_string(), want, "{location}");
        }
        assert_eq!(to("http://b.test/y"), None);
        assert_eq!(to("https://u@b.test/y"), None);
    }
}
