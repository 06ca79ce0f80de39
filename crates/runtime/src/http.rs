//! The small HTTP server behind metrics, health and the bundle endpoint.

use crate::{Shutdown, Spawner};
use bytes::Bytes;
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Status, content type and body of an answer.
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The content type.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
}

impl Answer {
    /// A line of plain text, as Go's `http.Error` writes it.
    pub fn text(status: StatusCode, line: &str) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", body: format!("{line}\n") }
    }

    /// As Go's `http.NotFound`.
    pub fn not_found() -> Self {
        Self::text(StatusCode::NOT_FOUND, "404 page not found")
    }
}

impl From<Answer> for Response<Full<Bytes>> {
    fn from(answer: Answer) -> Self {
        let mut response = Self::new(Full::new(Bytes::from(answer.body)));
        *response.status_mut() = answer.status;
        let content_type = header::HeaderValue::from_static(answer.content_type);
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
        response
    }
}

/// Answers by path. Must not block.
pub(crate) type Handler = Arc<dyn Fn(&str) -> Answer + Send + Sync>;

/// A scraper or a probe needs few connections; more than that is misuse.
const MAX_CONNECTIONS: usize = 32;
/// How long the head of a request may take to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of it.
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// Longest life of a connection; scrapers reconnect.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(300);

/// Listens on `address` (`host:port`) and serves until shutdown. Returns the address it got.
pub(crate) async fn serve(
    name: &'static str,
    address: &str,
    handler: Handler,
    spawner: &Spawner,
) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let local = listener.local_addr()?;
    let (tasks, shutdown) = (spawner.clone(), spawner.shutdown());
    spawner.service(name, async move {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return Ok::<(), std::io::Error>(()) };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shutdown.cancelled() => return Ok(()),
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(Duration::from_millis(100)).await; // out of file descriptors, most likely
                continue;
            };
            let (handler, ended) = (handler.clone(), shutdown.clone());
            tasks.spawn(name, async move {
                let _slot = slot;
                connection(stream, CONNECTION_TIMEOUT, ended, move |_, path| handler(path)).await;
            });
        }
    });
    Ok(local)
}

/// Serves one connection over HTTP/1.1 until it ends, for at most `lifetime` and until shutdown. `answer` gets method and
/// path, and must not block.
pub async fn connection<S>(
    stream: S,
    lifetime: Duration,
    shutdown: Shutdown,
    answer: impl Fn(&Method, &str) -> Answer + Send,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let respond = move |request: &Parts| answer(&request.method, request.uri.path()).into();
    connection_with(stream, lifetime, shutdown, respond).await;
}

/// The same for answers with headers of their own, to requests of which more counts than the path. Bodies are not read.
pub async fn connection_with<S>(
    stream: S,
    lifetime: Duration,
    shutdown: Shutdown,
    respond: impl Fn(&Parts) -> Response<Full<Bytes>> + Send,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(|request: Request<Incoming>| {
        let (head, _) = request.into_parts();
        std::future::ready(Ok::<_, Infallible>(respond(&head)))
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // How a client's connection ended is of no interest.
        _ = tokio::time::timeout(lifetime, served) => {}
        () = shutdown.cancelled() => {}
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// The whole answer to a GET, as text.
    pub(crate) async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("connects");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("writes");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("reads");
        answer
    }
}
