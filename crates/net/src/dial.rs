//! How every client gets to its server: the addresses of the name in turn, the proxy on the way if there is one, the handshake.

use crate::egress::Proxies;
use finial_runtime::errno_text;
use rustls_pki_types::ServerName;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// How long one address of a name may take to answer: one that swallows everything must not cost all the time.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no connection. The texts are those of Go's client where it has some.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The name has no address.
    #[error("dial tcp: lookup {host}: {reason}")]
    Lookup {
        /// The name.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// None of its addresses answers.
    #[error("dial tcp {address}: {reason}")]
    Connect {
        /// The address that was tried last.
        address: SocketAddr,
        /// Why it failed.
        reason: String,
    },
    /// The proxy cannot be used, cannot be reached, or lets nobody through.
    #[error("{0}")]
    Proxy(String),
    /// The TLS handshake failed.
    #[error("{0}")]
    Tls(#[source] Arc<rustls::Error>),
    /// The connection broke during the handshake.
    #[error("{0}")]
    Broken(String),
}

/// A connection to that host, through the proxy that there is for it.
pub(crate) async fn open(proxies: &Proxies, host: &str, port: u16) -> Result<TcpStream, DialError> {
    match proxies.of(host, port)? {
        None => tcp(host, port).await,
        Some(proxy) => proxy.open(host, port).await,
    }
}

/// A connection to the first address of the name that answers.
pub(crate) async fn tcp(host: &str, port: u16) -> Result<TcpStream, DialError> {
    let lookup = |reason: &str| DialError::Lookup { host: host.to_owned(), reason: reason.to_owned() };
    // Names below `localhost` are this machine (RFC 6761), also where the resolver does not know that.
    let known = if host.ends_with(".localhost") { "localhost" } else { host };
    let addresses = tokio::net::lookup_host((known, port)).await.map_err(|_| lookup("no such host"))?;
    let mut last = lookup("no such host");
    for address in addresses {
        let failed = |reason: String| DialError::Connect { address, reason };
        last = match tokio::time::timeout(ADDRESS_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // A request is one small write: gathering more would only cost the 40 ms until the peer acknowledges the
                // one before.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => failed(format!("connect: {}", errno_text(&error))),
            Err(_) => failed("i/o timeout".into()),
        };
    }
    Err(last)
}

/// The handshake with whoever is called `name`.
pub(crate) async fn secure(
    stream: TcpStream,
    name: ServerName<'static>,
    tls: Arc<rustls::ClientConfig>,
) -> Result<TlsStream<TcpStream>, DialError> {
    let failed = |error: io::Error| {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match inner {
            Some(cause) => DialError::Tls(Arc::new(cause.clone())),
            None => DialError::Broken(errno_text(&error)),
        }
    };
    TlsConnector::from(tls).connect(name, stream).await.map_err(failed)
}
