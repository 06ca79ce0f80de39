//! One request over HTTP/1.1 and its answer, both limited in size. Who asks limits the time.

use bytes::Bytes;
use http::response::Parts;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use std::error::Error as _;
use std::future::Future;
use std::pin::Pin;
use tokio::io::{AsyncRead, AsyncWrite};

/// What `User-Agent` says.
pub(crate) const AGENT: &str = concat!("finial/", env!("CARGO_PKG_VERSION"));
/// Most bytes of headers that are read.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// What was answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body; empty if it was not to be read.
    pub body: Bytes,
}

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The connection broke, or what came is not HTTP.
    #[error("{0}")]
    Broken(String),
    /// The body is longer than allowed.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

/// A connection to a server. Nobody looks at it between two requests, so one that has died is only noticed by the next.
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// Moves the bytes while a request waits for its answer; none when it has ended.
    driver: Option<Driver>,
}

type Driver = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

impl Connection {
    /// Over this stream.
    pub async fn open(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Self, ExchangeError> {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_BYTES_MAX);
        let (sender, driver) = builder.handshake(TokioIo::new(stream)).await.map_err(broken)?;
        Ok(Self { sender, driver: Some(Box::pin(driver)) })
    }

    /// Asks. `body_max` says of an answer how long its body may be, or that it is not to be read: then the connection is of no
    /// further use.
    pub async fn ask(
        &mut self,
        request: Request<Full<Bytes>>,
        body_max: impl FnOnce(&Parts) -> Option<usize>,
    ) -> Result<Answer, ExchangeError> {
        let Self { sender, driver } = self;
        let answer = exchange(sender, request, body_max);
        tokio::pin!(answer);
        if let Some(moves) = driver {
            tokio::select! {
                answer = &mut answer => return answer,
                // The answer, or why there is none, may still be on its way to the reader.
                _ = moves => *driver = None,
            }
        }
        answer.await
    }

    /// Whether it may be asked again.
    pub fn is_open(&self) -> bool {
        self.driver.is_some() && !self.sender.is_closed()
    }
}

async fn exchange(
    sender: &mut SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
    body_max: impl FnOnce(&Parts) -> Option<usize>,
) -> Result<Answer, ExchangeError> {
    let (head, body) = sender.send_request(request).await.map_err(broken)?.into_parts();
    let body = match body_max(&head) {
        None => Bytes::new(),
        Some(max) => match Limited::new(body, max).collect().await {
            Ok(collected) => collected.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => return Err(ExchangeError::TooLarge(max)),
            Err(error) => return Err(ExchangeError::Broken(error.to_string())),
        },
    };
    Ok(Answer { status: head.status, headers: head.headers, body })
}

/// A hyper error with its cause, which holds the interesting half.
fn broken(error: hyper::Error) -> ExchangeError {
    ExchangeError::Broken(match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    })
}
