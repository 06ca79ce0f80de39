//! What a plugin of a cloud sees of the world: the environment, the time, and services that answer over HTTPS.

use bytes::Bytes;
use finial_core::{Clock, Secret, UnixSeconds};
use finial_net::rest::{self, Answer, Client, HttpError, Limits, Trust};
use finial_plugin::{PluginContext, PluginError, PublishedForm, parse_refresh_hint};
use finial_runtime::files;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Longest time for one request, and largest answer. Several follow each other within the 30 s that a signature may take.
const LIMITS: Limits = Limits { time: Duration::from_secs(8), body: 1 << 20 };
/// Services next door answer at once or not at all.
const LIMITS_NEAR: Limits = Limits { time: Duration::from_secs(3), body: 64 << 10 };
/// Between attempts; one attempt more than waits.
const WAITS: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(1)];
/// No attempt begins later than this after the first: who takes that long is told of, not asked again.
const PATIENCE: Duration = Duration::from_secs(4);
/// Largest file that is read, in bytes.
const FILE_BYTES_MAX: usize = 1 << 20;
/// So many bytes of a service's complaint are shown.
const COMPLAINT_MAX: usize = 512;

type Env = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// The environment, the time, and whom to trust.
#[derive(Clone)]
pub(crate) struct World {
    env: Env,
    clock: Arc<dyn Clock>,
    tls: Arc<rustls::ClientConfig>,
}

impl World {
    /// The real one.
    pub(crate) fn new(context: &PluginContext) -> Result<Self, PluginError> {
        Self::with(Arc::new(|name| std::env::var(name).ok()), context.clock.clone(), &Trust::System)
    }

    pub(crate) fn with(env: Env, clock: Arc<dyn Clock>, trust: &Trust) -> Result<Self, PluginError> {
        let tls = rest::client_config(trust, None, "web").map_err(|e| {
            let advice = "install ca-certificates, or set SSL_CERT_FILE";
            PluginError::internal(format!("no CA is known that this machine trusts for the web ({advice}): {e}"))
        })?;
        Ok(Self { env, clock, tls: Arc::new(tls) })
    }

    /// A variable of the environment that says something.
    pub(crate) fn env(&self, name: &str) -> Option<String> {
        (self.env)(name).filter(|value| !value.is_empty())
    }

    pub(crate) fn now(&self) -> UnixSeconds {
        self.clock.now()
    }

    /// Who serves at this URL.
    pub(crate) fn remote(&self, url: &str) -> Result<Remote, PluginError> {
        let client = Client::to(url, self.tls.clone()).map_err(PluginError::invalid)?;
        Ok(Remote { client, url: url.to_owned(), limits: LIMITS })
    }

    /// The same for a service of this machine or its hypervisor.
    pub(crate) fn near(&self, url: &str) -> Result<Remote, PluginError> {
        Ok(Remote { limits: LIMITS_NEAR, ..self.remote(url)? })
    }
}

/// Why a service did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// It was not reached, or hung up, or did not answer in time.
    #[error("{url} cannot be reached: {source}")]
    Unreachable {
        /// Which one.
        url: String,
        /// Why.
        source: HttpError,
    },
    /// It says no.
    #[error("{url} answered {status}{}{}", said(code), said(message))]
    Refused {
        /// Which one.
        url: String,
        /// The status.
        status: u16,
        /// Its word for it, if it has one.
        code: String,
        /// Its sentence.
        message: String,
    },
    /// It answers in another way than its contract says.
    #[error("{url} answered what cannot be read: {why}")]
    Odd {
        /// Which one.
        url: String,
        /// What is odd.
        why: String,
    },
    /// There is nothing to identify with, or it is no good.
    #[error("{0}")]
    Credentials(String),
}

fn said(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

impl Failure {
    /// Whether another attempt may go better.
    fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { source, .. } => {
                !matches!(source, HttpError::Exchange(rest::ExchangeError::TooLarge(_)))
            }
            Self::Refused { status, code, .. } => {
                matches!(status, 408 | 429 | 500..) || code.contains("Throttl") || code.contains("SlowDown")
            }
            Self::Odd { .. } | Self::Credentials(_) => false,
        }
    }

    /// As SPIRE reports it: an internal failure, said to be of `what`.
    pub(crate) fn of(self, what: &str) -> PluginError {
        PluginError::internal(format!("{what}: {self}"))
    }

    /// The same of a service that gives credentials: what it says is not what the service says that they are for.
    pub(crate) fn of_credentials(self) -> Self {
        Self::Credentials(self.to_string())
    }

    /// The status with which it said no.
    pub(crate) fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// The word with which it said no; empty if there is none.
    pub(crate) fn code(&self) -> &str {
        match self {
            Self::Refused { code, .. } => code,
            _ => "",
        }
    }
}

/// A service.
pub(crate) struct Remote {
    client: Client,
    url: String,
    limits: Limits,
}

impl Remote {
    /// What a request's `Host` says.
    pub(crate) fn host(&self) -> HeaderValue {
        self.client.host()
    }

    /// What stands before each path.
    pub(crate) fn base(&self) -> &str {
        self.client.base()
    }

    /// One request. `path` is encoded and may have a query. Whatever the answer says, it is given.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Answer, Failure> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let odd =
                |why: &dyn std::fmt::Display| Failure::Credentials(format!("header {name} cannot be sent: {why}"));
            let mut value = HeaderValue::from_str(value).map_err(|e| odd(&e))?;
            value.set_sensitive(true);
            map.append(HeaderName::from_bytes(name.as_bytes()).map_err(|e| odd(&e))?, value);
        }
        let unreachable = |source| Failure::Unreachable { url: self.url.clone(), source };
        self.client.send(method, path, &map, body.into(), self.limits).await.map_err(unreachable)
    }

    pub(crate) fn odd(&self, why: impl ToString) -> Failure {
        Failure::Odd { url: self.url.clone(), why: why.to_string() }
    }

    pub(crate) fn refused(&self, status: StatusCode, code: impl Into<String>, message: &str) -> Failure {
        let message = printable(message);
        Failure::Refused { url: self.url.clone(), status: status.as_u16(), code: printable(&code.into()), message }
    }

    /// The body as JSON.
    pub(crate) fn json<T: DeserializeOwned>(&self, answer: &Answer) -> Result<T, Failure> {
        serde_json::from_slice(&answer.body).map_err(|e| self.odd(unquoted(&e)))
    }
}

/// What is wrong with JSON, without a word of it: it may hold a secret.
pub(crate) fn unquoted(error: &serde_json::Error) -> String {
    let text = error.to_string();
    if text.starts_with("missing field") {
        return text;
    }
    format!("line {} column {} is not as agreed", error.line(), error.column())
}

/// The beginning of what a service says, on one line.
fn printable(text: &str) -> String {
    let words: Vec<_> = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()).collect();
    let mut text = words.join(" ");
    if text.len() > COMPLAINT_MAX {
        text.truncate(text.floor_char_boundary(COMPLAINT_MAX));
        text.push('…');
    }
    text
}

/// Tries again what may go better the next time, three times in all, while it does not take long.
pub(crate) async fn patiently<T, F: Future<Output = Result<T, Failure>>>(
    attempt: impl Fn() -> F,
) -> Result<T, Failure> {
    let end = Instant::now() + PATIENCE;
    for wait in WAITS {
        match attempt().await {
            Err(failure) if failure.may_pass() && Instant::now() + wait < end => {
                tracing::debug!(error = %failure, "Will be tried again");
                tokio::time::sleep(wait).await;
            }
            done => return done,
        }
    }
    attempt().await
}

/// How to write a bundle, by the values of `format` and `refresh_hint`; SPIRE's words and warnings.
pub(crate) fn published_form(format: &str, hint: &str) -> Result<PublishedForm, PluginError> {
    let of = |what: &str, e: PluginError| PluginError::invalid(format!("could not parse {what}: {}", e.message));
    PublishedForm::read(format, "").map_err(|e| of("bundle format from configuration", e))?;
    if !hint.is_empty() {
        match parse_refresh_hint(hint).map_err(|e| of("refresh_hint", e))? {
            seconds if seconds >= 24 * 3600 => tracing::warn!(
                "Bundle endpoint refresh hint set to a high value. To cover the case of unscheduled trust bundle updates, \
                 it's recommended to have a smaller value, e.g. 5m"
            ),
            ..60 => tracing::warn!(
                "Bundle endpoint refresh hint set too low. SPIRE will not refresh more often than 1 minute"
            ),
            _ => {}
        }
    }
    PublishedForm::read(format, hint)
}

/// A file that configuration or the environment names. Waits for the disk.
pub(crate) fn read_file(path: &str) -> io::Result<Vec<u8>> {
    files::read_limited(Path::new(path), FILE_BYTES_MAX)
}

/// The same, on a thread where that delays nobody.
pub(crate) async fn read_aside(path: &str) -> io::Result<Secret<Vec<u8>>> {
    let path = path.to_owned();
    let read = tokio::task::spawn_blocking(move || read_file(&path).map(Secret::new));
    read.await.map_err(io::Error::other)?
}

/// A small file of text, such as a token, without the white space around it.
pub(crate) async fn read_word(path: &str) -> io::Result<Secret<String>> {
    let bytes = read_aside(path).await?;
    let text = std::str::from_utf8(bytes.expose()).map_err(io::Error::other)?;
    Ok(Secret::new(text.trim().to_owned()))
}

/// All but what RFC 3986 reserves for nothing.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const RESERVED_IN_PATH: &AsciiSet = &RESERVED.remove(b'/');

/// For a part of a path or a value of a query.
pub(crate) fn encode(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
}

/// For a path.
pub(crate) fn encode_path(text: &str) -> String {
    utf8_percent_encode(text, RESERVED_IN_PATH).to_string()
}

/// The body of a form.
pub(crate) fn form(fields: &[(&str, &str)]) -> String {
    fields.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect::<Vec<_>>().join("&")
}

/// The text of the first element of that name.
pub(crate) fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    let plain = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&#34;", "\""), ("&amp;", "&")];
    Some(plain.iter().fold(text.to_owned(), |text, (entity, char)| text.replace(entity, char)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test(start_paused = true)]
    async fn who_fails_at_once_is_asked_again_and_who_takes_his_time_is_not() {
        for (takes, want) in [(0, 3), (8, 1)] {
            let count = AtomicUsize::new(0);
            let failed = patiently(|| async {
                count.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_secs(takes)).await;
                let (url, code, message) = (String::new(), String::new(), String::new());
                Err::<(), _>(Failure::Refused { url, status: 503, code, message })
            });
            assert_eq!(failed.await.unwrap_err().status(), Some(503));
            assert_eq!(count.load(Ordering::SeqCst), want);
        }
    }

    #[tokio::test]
    async fn a_connection_that_lay_idle_is_not_used() {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                count.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    let (mut head, mut byte) = (Vec::new(), [0]);
                    while let Ok(1) = stream.read(&mut byte) {
                        head.push(byte[0]);
                        if head.ends_with(b"\r\n\r\n") {
                            head.clear();
                            stream.write_all(b"HTTP/1.1 200 X\r\nContent-Length: 0\r\n\r\n").unwrap();
                        }
                    }
                });
            }
        });
        let remote = crate::testing::world(&[]).remote(&url).unwrap();
        for (idle, want) in [(0, 1), (29, 1), (31, 2)] {
            tokio::time::pause();
            tokio::time::advance(Duration::from_secs(idle)).await;
            tokio::time::resume();
            remote.ask(Method::GET, "/", &[], Bytes::new()).await.unwrap();
            assert_eq!(connections.load(Ordering::SeqCst), want);
        }
    }
}
