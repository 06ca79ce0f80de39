//! The small HTTP server behind metrics and health.

use crate::Spawner;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Status, content type and body of an answer.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) content_type: &'static str,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn not_found() -> Self {
        let body = "404 page not found\n".to_owned();
        Self { status: StatusCode::NOT_FOUND, content_type: "text/plain; charset=utf-8", body }
    }
}

/// Answers by path. Must not block.
pub(crate) type Handler = Arc<dyn Fn(&str) -> Answer + Send + Sync>;

/// A scraper or a probe needs few connections; more than that is misuse.
const MAX_CONNECTIONS: usize = 32;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
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
                tokio::select! {
                    () = connection(stream, handler) => {}
                    () = ended.cancelled() => {}
                }
            });
        }
    });
    Ok(local)
}

async fn connection(stream: TcpStream, handler: Handler) {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let answer = handler(request.uri().path());
        let mut response = Response::new(Full::new(Bytes::from(answer.body)));
        *response.status_mut() = answer.status;
        let content_type = header::HeaderValue::from_static(answer.content_type);
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    // How a probe's connection ended is of no interest.
    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, served).await;
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
