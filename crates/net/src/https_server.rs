//! Small HTTP servers, with TLS, without it, and on a unix socket.

use crate::Limits;
use crate::accept::AcceptBackoff;
use crate::tls::TlsIncoming;
use crate::unix::UnixIncoming;
use bytes::Bytes;
use finial_runtime::Spawner;
use finial_runtime::http::{Answer, connection_with};
use futures::stream::{BoxStream, StreamExt};
use http::request::Parts;
use http::{Method, Response, StatusCode};
use http_body_util::Full;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// A client fetches a document or two and goes, or asks again at most this long.
const CONNECTION_TIME: Duration = Duration::from_secs(60);
/// What a small server allows, on unix sockets too.
pub const LIMITS: Limits = Limits {
    connections: 1024,
    connections_per_peer: 256,
    handshakes: 128,
    silence: Duration::from_secs(10),
    lifetime: Some(CONNECTION_TIME),
};

/// Makes the page for `GET /`. Must not block.
pub type MakePage = Arc<dyn Fn() -> Answer + Send + Sync>;
/// Answers a request; its body is not read. Must not block.
pub type Respond = Arc<dyn Fn(&Parts) -> Response<Full<Bytes>> + Send + Sync>;

/// Where a server listens, and how.
pub enum Listen {
    /// TCP and TLS.
    Tls(TcpListener, Box<rustls::ServerConfig>),
    /// TCP alone: for a proxy before it.
    Plain(TcpListener),
    /// A unix socket, of [`LIMITS`].
    Unix(UnixIncoming),
}

/// Serves `GET /` over HTTP/1.1 and TLS until shutdown; any other path is 404, any other method 405. Gives the address it got.
pub fn serve(
    listener: TcpListener,
    tls: rustls::ServerConfig,
    page: MakePage,
    name: &'static str,
    spawner: &Spawner,
) -> io::Result<SocketAddr> {
    let address = listener.local_addr()?;
    let respond = Arc::new(move |request: &Parts| answer(&request.method, request.uri.path(), &page).into());
    serve_with(Listen::Tls(listener, Box::new(tls)), respond, name, spawner)?;
    Ok(address)
}

fn answer(method: &Method, path: &str, page: &MakePage) -> Answer {
    match (method, path) {
        (&Method::GET, "/") => page(),
        (&Method::GET, _) => Answer::not_found(),
        _ => Answer::text(StatusCode::METHOD_NOT_ALLOWED, "405 method not allowed"),
    }
}

/// Serves HTTP/1.1 until shutdown.
pub fn serve_with(listen: Listen, respond: Respond, name: &'static str, spawner: &Spawner) -> io::Result<()> {
    match listen {
        Listen::Tls(listener, mut tls) => {
            tls.alpn_protocols = vec![b"http/1.1".to_vec()];
            let incoming = TlsIncoming::new(listener, Arc::new(*tls), LIMITS, spawner.clone())?;
            run(incoming.boxed(), respond, name, spawner);
        }
        Listen::Plain(listener) => run(plain(listener), respond, name, spawner),
        Listen::Unix(incoming) => {
            run(incoming.map(|c| c.map(|c| c.into_stream())).boxed(), respond, name, spawner);
        }
    }
    Ok(())
}

fn plain(listener: TcpListener) -> BoxStream<'static, io::Result<tokio::net::TcpStream>> {
    let state = (listener, AcceptBackoff::default());
    let accepted = futures::stream::unfold(state, |(listener, mut backoff)| async move {
        loop {
            if let Some((stream, _)) = backoff.note(listener.accept().await).await {
                return Some((Ok(stream), (listener, backoff)));
            }
        }
    });
    accepted.boxed()
}

fn run<S>(mut incoming: BoxStream<'static, io::Result<S>>, respond: Respond, name: &'static str, spawner: &Spawner)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (tasks, shutdown) = (spawner.clone(), spawner.shutdown());
    spawner.service(name, async move {
        let slots = Arc::new(Semaphore::new(LIMITS.connections));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return Ok::<(), Infallible>(()) };
            let accepted = tokio::select! {
                accepted = incoming.next() => accepted,
                () = shutdown.cancelled() => return Ok(()),
            };
            let Some(Ok(stream)) = accepted else { continue };
            let (respond, ended) = (respond.clone(), shutdown.clone());
            tasks.spawn(name, async move {
                let _slot = slot;
                connection_with(stream, CONNECTION_TIME, ended, move |request| respond(request)).await;
            });
        }
    });
}
