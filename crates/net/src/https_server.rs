//! A small HTTPS server for one document.

use crate::Limits;
use crate::tls::TlsIncoming;
use bytes::Bytes;
use finial_runtime::Spawner;
use futures::StreamExt;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// A client fetches one document and goes, or asks again at most this long.
const CONNECTION_TIME: Duration = Duration::from_secs(60);
/// How long a request may take to arrive.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// Most bytes of a request.
const REQUEST_BYTES_MAX: usize = 16 << 10;
const LIMITS: Limits = Limits {
    connections: 1024,
    connections_per_peer: 256,
    handshakes: 128,
    silence: Duration::from_secs(10),
    lifetime: Some(CONNECTION_TIME),
};
const TEXT: &str = "text/plain; charset=utf-8";

/// Status, content type and body of an answer.
pub struct Page {
    /// The status.
    pub status: StatusCode,
    /// The content type.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
}

impl Page {
    /// A line of plain text, as Go's `http.Error` writes it.
    pub fn text(status: StatusCode, line: &str) -> Self {
        Self { status, content_type: TEXT, body: format!("{line}\n") }
    }
}

/// Makes the page for `GET /`. Must not block.
pub type MakePage = Arc<dyn Fn() -> Page + Send + Sync>;

/// Serves `GET /` over HTTP/1.1 until shutdown; any other path is 404, any other method 405. Gives the address it got.
pub fn serve(
    listener: TcpListener,
    mut tls: rustls::ServerConfig,
    page: MakePage,
    name: &'static str,
    spawner: &Spawner,
) -> io::Result<SocketAddr> {
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let mut incoming = TlsIncoming::new(listener, Arc::new(tls), LIMITS, spawner.clone())?;
    let address = incoming.local_addr();
    let (tasks, shutdown) = (spawner.clone(), spawner.shutdown());
    spawner.service(name, async move {
        loop {
            let connection = tokio::select! {
                connection = incoming.next() => connection,
                () = shutdown.cancelled() => return Ok::<(), Infallible>(()),
            };
            let Some(Ok(connection)) = connection else { continue };
            let (page, ended) = (page.clone(), shutdown.clone());
            tasks.spawn(name, async move {
                let service = hyper::service::service_fn(move |request| std::future::ready(answer(&request, &page)));
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(REQUEST_TIME)
                    .max_buf_size(REQUEST_BYTES_MAX)
                    .serve_connection(TokioIo::new(connection), service);
                tokio::select! {
                    // How a client's connection ended is of no interest.
                    _ = tokio::time::timeout(CONNECTION_TIME, served) => {}
                    () = ended.cancelled() => {}
                }
            });
        }
    });
    Ok(address)
}

fn answer(request: &Request<Incoming>, page: &MakePage) -> Result<Response<Full<Bytes>>, Infallible> {
    let page = match (request.method(), request.uri().path()) {
        (&Method::GET, "/") => page(),
        (&Method::GET, _) => Page::text(StatusCode::NOT_FOUND, "404 page not found"),
        _ => Page::text(StatusCode::METHOD_NOT_ALLOWED, "405 method not allowed"),
    };
    let mut response = Response::new(Full::new(Bytes::from(page.body)));
    *response.status_mut() = page.status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(page.content_type));
    Ok(response)
}
