//! A small HTTPS server for one document.

use crate::Limits;
use crate::tls::TlsIncoming;
use finial_runtime::Spawner;
use finial_runtime::http::{Answer, connection};
use futures::StreamExt;
use http::{Method, StatusCode};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// A client fetches one document and goes, or asks again at most this long.
const CONNECTION_TIME: Duration = Duration::from_secs(60);
const LIMITS: Limits = Limits {
    connections: 1024,
    connections_per_peer: 256,
    handshakes: 128,
    silence: Duration::from_secs(10),
    lifetime: Some(CONNECTION_TIME),
};

/// Makes the page for `GET /`. Must not block.
pub type MakePage = Arc<dyn Fn() -> Answer + Send + Sync>;

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
            let accepted = tokio::select! {
                accepted = incoming.next() => accepted,
                () = shutdown.cancelled() => return Ok::<(), Infallible>(()),
            };
            let Some(Ok(stream)) = accepted else { continue };
            let (page, ended) = (page.clone(), shutdown.clone());
            tasks.spawn(
                name,
                connection(stream, CONNECTION_TIME, ended, move |method, path| answer(method, path, &page)),
            );
        }
    });
    Ok(address)
}

fn answer(method: &Method, path: &str, page: &MakePage) -> Answer {
    match (method, path) {
        (&Method::GET, "/") => page(),
        (&Method::GET, _) => Answer::not_found(),
        _ => Answer::text(StatusCode::METHOD_NOT_ALLOWED, "405 method not allowed"),
    }
}
