//! Unix sockets on which TLS is spoken, for those who are to prove more than which process they are.

use crate::authority::AuthorityFilter;
use crate::elsewhere::Handshakes;
use crate::guard::{Guarded, delegate_io};
use crate::unix::{UnixConnection, UnixIncoming};
use futures::stream::{BoxStream, Stream, StreamExt};
use rustls_pki_types::CertificateDer;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

/// Handshakes under way; those who connect locally are few.
const HANDSHAKES_MAX: usize = 64;

/// Who is at the other end.
#[derive(Clone, Debug)]
pub struct UnixTlsPeer {
    /// What it presented, leaf first; empty if nothing. The TLS configuration's verifier has accepted it.
    pub certificates: Arc<[CertificateDer<'static>]>,
}

/// Has each connection of `incoming` begin with a handshake, which has a deadline.
pub fn secured(
    incoming: UnixIncoming,
    config: impl Into<Handshakes<rustls::ServerConfig>>,
    deadline: Duration,
) -> UnixTlsIncoming {
    let handshakes = config.into();
    let begun = incoming.map(move |connection| handshake(handshakes.clone(), connection, deadline));
    let finished = begun.buffer_unordered(HANDSHAKES_MAX).filter_map(|done| async move { done.map(Ok) });
    UnixTlsIncoming(finished.boxed())
}

async fn handshake(
    handshakes: Handshakes<rustls::ServerConfig>,
    connection: io::Result<UnixConnection>,
    deadline: Duration,
) -> Option<UnixTlsConnection> {
    let stream = connection.ok()?.into_stream();
    let accepting = TlsAcceptor::from(handshakes.config.clone()).accept(stream);
    match tokio::time::timeout(deadline, handshakes.finish(accepting)).await {
        Ok(Ok(tls)) => {
            let certificates = tls.get_ref().1.peer_certificates().unwrap_or_default();
            let certificates = certificates.iter().map(|c| c.clone().into_owned()).collect();
            Some(UnixTlsConnection { stream: AuthorityFilter::new(tls), peer: UnixTlsPeer { certificates } })
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "TLS handshake failed");
            None
        }
        Err(_) => {
            tracing::debug!("TLS handshake took too long");
            None
        }
    }
}

/// The connections that have completed their handshake. Never ends and never yields an error.
pub struct UnixTlsIncoming(BoxStream<'static, io::Result<UnixTlsConnection>>);

impl Stream for UnixTlsIncoming {
    type Item = io::Result<UnixTlsConnection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx)
    }
}

/// A TLS connection. Requests on it carry a [`UnixTlsPeer`] extension.
pub struct UnixTlsConnection {
    stream: AuthorityFilter<TlsStream<Guarded<UnixStream>>>,
    peer: UnixTlsPeer,
}

impl Connected for UnixTlsConnection {
    type ConnectInfo = UnixTlsPeer;

    fn connect_info(&self) -> UnixTlsPeer {
        self.peer.clone()
    }
}

delegate_io!(UnixTlsConnection);
