//! Small HTTP servers, with TLS, without it, and on a unix socket.

use crate::Limits;
use crate::accept::AcceptBackoff;
use crate::tls::{ALPN_ACME, TlsConnection, TlsIncoming};
use crate::unix::UnixIncoming;
use bytes::Bytes;
use finial_runtime::Spawner;
use finial_runtime::http::{Answer, connection_with};
use futures::stream::{BoxStream, StreamExt};
use http::request::Parts;
use http::{Method, Response, StatusCode, header};
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

/// Who asks for a page.
pub struct Asker<'a> {
    /// Where the connection comes from.
    pub address: SocketAddr,
    /// What the program calls itself; empty if it does not say. Anything may stand here.
    pub user_agent: &'a str,
}

/// Makes the page for `GET /`. Must not block.
pub type MakePage = Arc<dyn Fn(&Asker<'_>) -> Answer + Send + Sync>;
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
    run(encrypted(listener, tls, spawner)?, name, spawner, move |connection: &TlsConnection| {
        let (from, page) = (connection.peer().address, page.clone());
        move |request: &Parts| answer(request, from, &page).into()
    });
    Ok(address)
}

fn answer(request: &Parts, address: SocketAddr, page: &MakePage) -> Answer {
    let user_agent = request.headers.get(header::USER_AGENT).and_then(|name| name.to_str().ok()).unwrap_or_default();
    match (&request.method, request.uri.path()) {
        (&Method::GET, "/") => page(&Asker { address, user_agent }),
        (&Method::GET, _) => Answer::not_found(),
        _ => Answer::text(StatusCode::METHOD_NOT_ALLOWED, "405 method not allowed"),
    }
}

type Incoming<S> = BoxStream<'static, io::Result<S>>;

fn encrypted(
    listener: TcpListener,
    mut tls: rustls::ServerConfig,
    spawner: &Spawner,
) -> io::Result<Incoming<TlsConnection>> {
    // What the caller wants beside HTTP is for ACME authorities.
    tls.alpn_protocols.retain(|protocol| protocol == ALPN_ACME);
    tls.alpn_protocols.insert(0, b"http/1.1".to_vec());
    Ok(TlsIncoming::new(listener, Arc::new(tls), LIMITS, spawner.clone())?.boxed())
}

/// Serves HTTP/1.1 until shutdown.
pub fn serve_with(listen: Listen, respond: Respond, name: &'static str, spawner: &Spawner) -> io::Result<()> {
    match listen {
        Listen::Tls(listener, tls) => run(encrypted(listener, *tls, spawner)?, name, spawner, to_all(respond)),
        Listen::Plain(listener) => run(plain(listener), name, spawner, to_all(respond)),
        Listen::Unix(incoming) => {
            run(incoming.map(|c| c.map(|c| c.into_stream())).boxed(), name, spawner, to_all(respond));
        }
    }
    Ok(())
}

/// Of one connection.
type Answers = Box<dyn Fn(&Parts) -> Response<Full<Bytes>> + Send + Sync>;

/// The same answers whoever asks.
fn to_all<S>(respond: Respond) -> impl Fn(&S) -> Answers + Send {
    move |_| {
        let respond = respond.clone();
        Box::new(move |request| respond(request))
    }
}

fn plain(listener: TcpListener) -> Incoming<tokio::net::TcpStream> {
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

/// `respond_to` makes the answers for one connection.
fn run<S, R>(
    mut incoming: Incoming<S>,
    name: &'static str,
    spawner: &Spawner,
    respond_to: impl Fn(&S) -> R + Send + 'static,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    R: Fn(&Parts) -> Response<Full<Bytes>> + Send + Sync + 'static,
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
            let (respond, ended) = (respond_to(&stream), shutdown.clone());
            tasks.spawn(name, async move {
                let _slot = slot;
                connection_with(stream, CONNECTION_TIME, ended, respond).await;
            });
        }
    });
}
