//! Limits on connections: how many, how many by one peer, and how long a silent one is kept.

use finial_runtime::{Place, Places};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::hash::Hash;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// The client preface of HTTP/2 and the header of the SETTINGS frame that must follow it, in bytes.
const PREFACE_BYTES: usize = 24 + 9;

/// How many connections a listener keeps, and for how long one that says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open connections in all. More are closed at once.
    pub connections: usize,
    /// Open connections by one peer: one user ID on a unix socket, one address on TCP. More are closed at once.
    pub connections_per_peer: usize,
    /// TLS handshakes under way. A newer one takes the place of the oldest.
    pub handshakes: usize,
    /// How long a TLS handshake may take, and after it the beginning of HTTP/2.
    pub silence: Duration,
    /// When a connection is cut off, whatever it does; `None` = never. (tonic's `max_connection_age` asks it to end before;
    /// its `max_connection_age_grace` is of no use, as with it tonic 0.14 no longer asks.)
    pub lifetime: Option<Duration>,
}

impl Default for Limits {
    /// 16,384 connections, three quarters of which may be one peer's (many agents share an address behind a gateway); 1,024
    /// handshakes; 10 s; no end.
    fn default() -> Self {
        Self {
            connections: 16_384,
            connections_per_peer: 12_288,
            handshakes: 1_024,
            silence: Duration::from_secs(10),
            lifetime: None,
        }
    }
}

/// Descriptors for everything else than connections: the datastore, logs, and what is opened for a moment.
const FILES_KEPT: u64 = 128;

impl Limits {
    /// The same, but no more connections than there are descriptors for, `each` per connection: at the end of the
    /// descriptors nobody could come in any more, whoever holds them.
    fn within(self, files: Option<u64>, each: u64) -> Self {
        let room = files.map_or(u64::MAX, |files| files.saturating_sub(FILES_KEPT) / each.max(1)).max(2);
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        if room >= self.connections {
            return self;
        }
        Self { connections: room, connections_per_peer: self.connections_per_peer.min(room - room / 4), ..self }
    }

    /// Raises the soft limit of open files, which is usually 1,024 for the sake of programs that use `select`, and keeps
    /// the limits within it.
    pub(crate) fn within_files(self, each: u64) -> Self {
        let limit = getrlimit(Resource::Nofile);
        if limit.current != limit.maximum
            && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        {
            tracing::debug!(%error, "Cannot raise the limit of open files");
        }
        self.within(getrlimit(Resource::Nofile).current, each)
    }
}

/// Counts open connections.
pub(crate) fn counted<K: Clone + Eq + Hash>(limits: &Limits) -> Arc<Places<K>> {
    Places::new(limits.connections, limits.connections_per_peer)
}

/// The place that a connection takes, whoever's it is; given back on drop.
pub(crate) struct Admitted(#[allow(dead_code)] Box<dyn Send + Sync>);

impl<K: Clone + Eq + Hash + Send + Sync + 'static> From<Place<K>> for Admitted {
    fn from(place: Place<K>) -> Self {
        Self(Box::new(place))
    }
}

/// A connection that is counted and must begin to speak in time.
pub(crate) struct Guarded<S> {
    stream: S,
    /// How many bytes of the preface are still to come.
    missing: usize,
    /// Until when they must come; after that, until when the connection may live.
    deadline: Option<Pin<Box<Sleep>>>,
    lifetime: Option<Duration>,
    _admitted: Admitted,
}

impl<S> Guarded<S> {
    pub(crate) fn new(stream: S, limits: &Limits, admitted: Admitted) -> Self {
        let deadline = Some(Box::pin(tokio::time::sleep(limits.silence)));
        Self { stream, missing: PREFACE_BYTES, deadline, lifetime: limits.lifetime, _admitted: admitted }
    }

    /// Takes note of bytes that came.
    fn note(&mut self, bytes: usize) {
        if self.missing == 0 {
            return;
        }
        self.missing = self.missing.saturating_sub(bytes);
        if self.missing == 0 {
            self.deadline = self.lifetime.map(|end| Box::pin(tokio::time::sleep(end)));
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buf);
        if read.is_ready() {
            this.note(buf.filled().len() - before);
            return read;
        }
        let Some(deadline) = &mut this.deadline else { return Poll::Pending };
        ready!(deadline.as_mut().poll(cx));
        let what =
            if this.missing > 0 { "the peer did not begin to speak HTTP/2" } else { "the connection is too old" };
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, what)))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A public stream that reads and writes like the guarded one inside it.
macro_rules! delegate_io {
    ($stream:ty) => {
        impl tokio::io::AsyncRead for $stream {
            fn poll_read(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
                buf: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                std::pin::Pin::new(&mut self.stream).poll_read(cx, buf)
            }
        }
        impl tokio::io::AsyncWrite for $stream {
            fn poll_write(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
                buf: &[u8],
            ) -> std::task::Poll<std::io::Result<usize>> {
                std::pin::Pin::new(&mut self.stream).poll_write(cx, buf)
            }
            fn poll_write_vectored(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
                bufs: &[std::io::IoSlice<'_>],
            ) -> std::task::Poll<std::io::Result<usize>> {
                std::pin::Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
            }
            fn is_write_vectored(&self) -> bool {
                tokio::io::AsyncWrite::is_write_vectored(&self.stream)
            }
            fn poll_flush(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                std::pin::Pin::new(&mut self.stream).poll_flush(cx)
            }
            fn poll_shutdown(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                std::pin::Pin::new(&mut self.stream).poll_shutdown(cx)
            }
        }
    };
}
pub(crate) use delegate_io;

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn limits(connections: usize, connections_per_peer: usize) -> Limits {
        Limits { connections, connections_per_peer, ..Limits::default() }
    }

    #[test]
    fn no_peer_can_take_all_places_nor_all_files() {
        let usual = Limits::default();
        assert!(usual.connections_per_peer < usual.connections);
        assert_eq!(usual.within(None, 3), usual);
        assert_eq!(usual.within(Some(1 << 20), 3), usual);
        let few = usual.within(Some(1024), 3);
        assert_eq!((few.connections, few.connections_per_peer), (298, 224));
        let none = usual.within(Some(10), 3);
        assert_eq!((none.connections, none.connections_per_peer), (2, 2));
        let chosen = limits(5, 4);
        assert_eq!(chosen.within(Some(1024), 3), chosen);
    }

    fn guarded(lifetime: Option<Duration>) -> (tokio::io::DuplexStream, Guarded<tokio::io::DuplexStream>) {
        let (near, far) = tokio::io::duplex(256);
        let limits = Limits { lifetime, ..Limits::default() };
        let admitted = counted(&limits).take(0).unwrap().into();
        (near, Guarded::new(far, &limits, admitted))
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_says_nothing_or_only_a_little_is_cut_off() {
        let (mut client, mut server) = guarded(None);
        client.write_all(b"PRI * HTTP/2.0").await.unwrap();
        let mut buf = [0; 64];
        assert_eq!(server.read(&mut buf).await.unwrap(), 14);
        assert_eq!(server.read(&mut buf).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_has_begun_may_be_idle() {
        let (mut client, mut server) = guarded(None);
        client.write_all(&[b'x'; PREFACE_BYTES]).await.unwrap();
        let mut buf = [0; 64];
        assert_eq!(server.read(&mut buf).await.unwrap(), PREFACE_BYTES);
        let idle = tokio::time::timeout(Duration::from_secs(3600), server.read(&mut buf)).await;
        assert!(idle.is_err(), "still open after an hour");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_ends_with_its_lifetime() {
        let (mut client, mut server) = guarded(Some(Duration::from_secs(100)));
        client.write_all(&[b'x'; PREFACE_BYTES]).await.unwrap();
        let mut buf = [0; 64];
        assert_eq!(server.read(&mut buf).await.unwrap(), PREFACE_BYTES);
        let began = tokio::time::Instant::now();
        assert_eq!(server.read(&mut buf).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(began.elapsed().as_secs(), 100);
    }
}
