//! Listening on TCP with TLS.

use crate::accept::AcceptBackoff;
use crate::elsewhere::Handshakes;
use crate::guard::{Admitted, Guarded, Limits, counted, delegate_io};
use crate::proxy::{TrustedProxies, read_header};
use finial_runtime::{Places, Spawner};
use futures::stream::{BoxStream, Stream, StreamExt};
use rustls_pki_types::CertificateDer;
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 1024;
/// How many finished handshakes may wait for the server to take them.
const FINISHED_MAX: usize = 64;

/// By which an ACME authority looks at a certificate: the handshake is all that it comes for (RFC 8737 section 4).
pub const ALPN_ACME: &[u8] = b"acme-tls/1";

/// Who is at the other end of a TLS connection.
#[derive(Clone, Debug)]
pub struct TlsPeer {
    /// Where it connects from; behind a trusted proxy, where the proxy says.
    pub address: SocketAddr,
    /// What it presented, leaf first; empty if nothing. The TLS configuration's verifier has accepted it.
    pub certificates: Arc<[CertificateDer<'static>]>,
}

/// Binds `address`. `SO_REUSEADDR` is set, so that a restart need not wait.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The connections that have completed their handshake. Never ends and never yields an error. Handshakes run side by
/// side as tasks of their own, each with a deadline; those that say nothing or garbage keep nobody waiting.
pub struct TlsIncoming {
    stream: BoxStream<'static, io::Result<TlsConnection>>,
    local: SocketAddr,
}

impl TlsIncoming {
    /// Serves `listener` with `config`, which is read anew for each connection through its resolver and verifier.
    pub fn new(
        listener: TcpListener,
        config: impl Into<Handshakes<rustls::ServerConfig>>,
        limits: Limits,
        spawner: Spawner,
    ) -> io::Result<Self> {
        Self::behind(TrustedProxies::default(), listener, config, limits, spawner)
    }

    /// The same, with clients that may come through `proxies` which say whose connections they pass on. A proxy may have as
    /// many connections as there are; who stands behind it is counted by its own address.
    pub fn behind(
        proxies: TrustedProxies,
        listener: TcpListener,
        config: impl Into<Handshakes<rustls::ServerConfig>>,
        limits: Limits,
        spawner: Spawner,
    ) -> io::Result<Self> {
        let local = listener.local_addr()?;
        let limits = limits.within_files(1);
        let (sender, finished) = mpsc::channel(FINISHED_MAX);
        let accept = Accept {
            listener,
            handshakes: config.into(),
            limits,
            places: counted(&limits),
            proxies,
            spawner,
            sender,
            backoff: AcceptBackoff::default(),
            running: VecDeque::new(),
        };
        let stream = futures::stream::unfold((accept, finished), |(mut accept, mut finished)| async move {
            loop {
                tokio::select! {
                    connection = finished.recv() => return Some((Ok(connection?), (accept, finished))),
                    accepted = accept.listener.accept() => accept.take(accepted).await,
                }
            }
        });
        Ok(Self { stream: stream.boxed(), local })
    }

    /// The address with the port that the kernel has chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

/// A peer whose machine is gone says nothing more, and some connections are silent for hours: the kernel asks after a minute,
/// and gives up after another.
fn notice_death(tcp: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(tcp, Duration::from_secs(20))?;
    sockopt::set_tcp_keepcnt(tcp, 3)?;
    Ok(())
}

struct Accept {
    listener: TcpListener,
    handshakes: Handshakes<rustls::ServerConfig>,
    limits: Limits,
    places: Arc<Places<IpAddr>>,
    proxies: TrustedProxies,
    spawner: Spawner,
    sender: mpsc::Sender<TlsConnection>,
    backoff: AcceptBackoff,
    /// Handshakes under way, oldest first.
    running: VecDeque<AbortHandle>,
}

impl Accept {
    async fn take(&mut self, accepted: io::Result<(TcpStream, SocketAddr)>) {
        let Some((tcp, address)) = self.backoff.note(accepted).await else { return };
        let proxied = self.proxies.includes(address.ip());
        let (places, peer) = (&self.places, address.ip());
        let place = if proxied { places.take_for_others(peer) } else { places.take(peer) };
        let Some(admitted) = place.map(Into::into) else { return warn_full(address) };
        // An agent's calls are small and it waits for each.
        let _ = tcp.set_nodelay(true);
        let _ = notice_death(&tcp);
        self.make_room();
        let (handshakes, sender, limits) = (self.handshakes.clone(), self.sender.clone(), self.limits);
        let places = proxied.then(|| self.places.clone());
        let task = self.spawner.spawn("tls-handshake", async move {
            let handshake = async {
                let mut tcp = tcp;
                let Some((address, admitted)) = look_behind(&mut tcp, address, admitted, places).await? else {
                    return Ok(None);
                };
                let accepting = TlsAcceptor::from(handshakes.config.clone()).accept(tcp);
                let tls = handshakes.finish(accepting).await?;
                if tls.get_ref().1.alpn_protocol() == Some(ALPN_ACME) {
                    return Ok(None);
                }
                let certificates = tls.get_ref().1.peer_certificates().unwrap_or_default();
                let peer =
                    TlsPeer { address, certificates: certificates.iter().map(|c| c.clone().into_owned()).collect() };
                io::Result::Ok(Some(TlsConnection { stream: Guarded::new(tls, &limits, admitted), peer }))
            };
            match tokio::time::timeout(limits.silence, handshake).await {
                Ok(Ok(Some(connection))) => drop(sender.send(connection).await),
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::debug!(%address, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(%address, "TLS handshake took too long"),
            }
        });
        self.running.push_back(task.abort_handle());
    }

    /// Forgets handshakes that have ended, and gives up the oldest when there are too many: who floods the port
    /// displaces mostly its own.
    fn make_room(&mut self) {
        // One that has ended holds the memory of its task for as long as it is listed.
        while self.running.front().is_some_and(AbortHandle::is_finished) {
            self.running.pop_front();
        }
        if self.running.len() < self.limits.handshakes {
            return;
        }
        self.running.retain(|task| !task.is_finished());
        if self.running.len() >= self.limits.handshakes
            && let Some(oldest) = self.running.pop_front()
        {
            oldest.abort();
        }
    }
}

/// Who stands behind a trusted proxy (`places` are there for those), and is counted from now on. Nobody if that one has
/// enough connections.
async fn look_behind(
    tcp: &mut TcpStream,
    address: SocketAddr,
    admitted: Admitted,
    places: Option<Arc<Places<IpAddr>>>,
) -> io::Result<Option<(SocketAddr, Admitted)>> {
    let Some(places) = places else { return Ok(Some((address, admitted))) };
    let Some(behind) = read_header(tcp).await? else { return Ok(Some((address, admitted))) };
    drop(admitted);
    let place = places.take(behind.ip());
    if place.is_none() {
        warn_full(behind);
    }
    Ok(place.map(|place| (behind, place.into())))
}

fn warn_full(address: SocketAddr) {
    tracing::warn!(%address, "Too many connections; this one was closed");
}

impl Drop for Accept {
    fn drop(&mut self) {
        self.running.iter().for_each(AbortHandle::abort);
    }
}

impl Stream for TlsIncoming {
    type Item = io::Result<TlsConnection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.stream.poll_next_unpin(cx)
    }
}

/// A TLS connection. Requests on it carry a [`TlsPeer`] extension.
pub struct TlsConnection {
    stream: Guarded<TlsStream<TcpStream>>,
    peer: TlsPeer,
}

impl TlsConnection {
    /// Who is at the other end.
    pub fn peer(&self) -> &TlsPeer {
        &self.peer
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = TlsPeer;

    fn connect_info(&self) -> TlsPeer {
        self.peer.clone()
    }
}

delegate_io!(TlsConnection);

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::sockopt;

    #[tokio::test]
    async fn the_kernel_asks_after_silent_peers() {
        let listener = bind(([127, 0, 0, 1], 0).into()).unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        notice_death(&tcp).unwrap();
        assert!(sockopt::socket_keepalive(&tcp).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&tcp).unwrap(), Duration::from_secs(60));
    }
}
