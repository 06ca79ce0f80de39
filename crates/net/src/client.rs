//! Channels to servers: lazily connected, with deadlines, reconnecting by themselves.

use crate::egress::Proxies;
use crate::elsewhere::Handshakes;
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower_service::Service;

/// How long one attempt to connect, with its handshake, may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an idle connection to a server is probed, and how long the answer may take.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// A channel to a unix socket. Nothing is opened before the first call.
pub fn uds_channel(path: impl Into<PathBuf>) -> Channel {
    // The URI becomes the `:authority` of requests. gRPC clients say "localhost" on unix sockets.
    endpoint("http://localhost").connect_with_connector_lazy(UnixConnector(path.into()))
}

/// A channel over TLS to `address` (`host:port`). The name is resolved anew at each attempt, and its addresses are taken
/// in turn; where the environment names a proxy for it, that one looks it up. The configuration decides whom to trust; the host name is only sent as SNI.
pub fn tls_channel(address: &str, tls: impl Into<Handshakes<rustls::ClientConfig>>) -> Channel {
    let connector = Connector { address: address.into(), tls: tls.into(), turn: Arc::default() };
    endpoint(&format!("https://{address}"))
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .connect_with_connector_lazy(connector)
}

/// A channel without TLS to an IP address and port of this machine.
pub fn tcp_channel(address: &str) -> Channel {
    endpoint(&format!("http://{address}")).connect_lazy()
}

/// A channel over TLS to a unix socket.
pub fn uds_tls_channel(path: impl Into<PathBuf>, config: Arc<rustls::ClientConfig>) -> Channel {
    let connector = UnixTlsConnector { path: path.into(), tls: TlsConnector::from(config) };
    endpoint("https://localhost").connect_with_connector_lazy(connector)
}

fn endpoint(uri: &str) -> Endpoint {
    // An address that makes no URI fails at its first use, when it is resolved; no need for an error here.
    let endpoint = Endpoint::from_shared(uri.to_owned()).unwrap_or_else(|_| Endpoint::from_static("http://invalid"));
    endpoint.connect_timeout(CONNECT_TIMEOUT)
}

struct UnixConnector(PathBuf);

impl<T> Service<T> for UnixConnector {
    type Response = TokioIo<UnixStream>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: T) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async move { Ok(TokioIo::new(UnixStream::connect(path).await?)) })
    }
}

struct UnixTlsConnector {
    path: PathBuf,
    tls: TlsConnector,
}

impl<T> Service<T> for UnixTlsConnector {
    type Response = TokioIo<TlsStream<UnixStream>>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: T) -> Self::Future {
        let (path, tls) = (self.path.clone(), self.tls.clone());
        Box::pin(async move {
            let stream = UnixStream::connect(path).await?;
            Ok(TokioIo::new(tls.connect(server_name("localhost")?, stream).await?))
        })
    }
}

struct Connector {
    address: Arc<str>,
    tls: Handshakes<rustls::ClientConfig>,
    /// Counts attempts, so that each starts at the next address.
    turn: Arc<AtomicUsize>,
}

impl<T> Service<T> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: T) -> Self::Future {
        let (address, tls) = (self.address.clone(), self.tls.clone());
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            let name = server_name(&address)?;
            let proxies = Proxies::of_environment();
            let tcp = match proxies.of(&name.to_str(), port(&address)).map_err(io::Error::other)? {
                Some(proxy) => proxy.open(&name.to_str(), port(&address)).await.map_err(io::Error::other)?,
                None => {
                    let addresses = resolve(&address).await?;
                    connect_any(&addresses, turn).await?
                }
            };
            tcp.set_nodelay(true)?;
            let handshake = TlsConnector::from(tls.config.clone()).connect(name, tcp);
            Ok(TokioIo::new(tls.finish(handshake).await?))
        })
    }
}

/// The host of `host:port` for SNI.
fn server_name(address: &str) -> io::Result<ServerName<'static>> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    ServerName::try_from(host).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, format!("{address}: {e}")))
}

fn port(address: &str) -> u16 {
    address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(443)
}

/// The addresses of `host:port`, or as Go says that there are none.
async fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let failed = |e: io::Error| {
        let text = format!("Error while dialing: dial tcp: lookup {host}: no such host ({e})");
        io::Error::new(e.kind(), text)
    };
    Ok(tokio::net::lookup_host(address).await.map_err(failed)?.collect())
}

/// As Go says it.
fn dial_error(address: SocketAddr, error: &io::Error) -> io::Error {
    let reason = finial_runtime::errno_text(error);
    io::Error::new(error.kind(), format!("Error while dialing: dial tcp {address}: connect: {reason}"))
}

/// Connects to the first address that answers, beginning with number `turn`.
async fn connect_any(addresses: &[SocketAddr], turn: usize) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let share = CONNECT_TIMEOUT / u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
    for address in addresses.iter().cycle().skip(turn % addresses.len().max(1)).take(addresses.len()) {
        match tokio::time::timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(e)) => last = dial_error(*address, &e),
            Err(_) => last = io::Error::new(io::ErrorKind::TimedOut, format!("{address}: no answer")),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_without_an_address_is_told() {
        let error = resolve("spire-server.invalid:8081").await.unwrap_err().to_string();
        assert!(
            error.starts_with("Error while dialing: dial tcp: lookup spire-server.invalid: no such host ("),
            "{error}"
        );
    }
}
