//! One connection over TCP: how long it lives, and what it may hold.
//!
//! A connection is asked to end after some minutes, so that clients spread over servers. One that carries an agent's stream
//! ([`Streams`]) is left alone for much longer: the agent would come back at once with the same stream.

use super::{Known, REMOTE_CALLS, WINDOW_BYTES};
use crate::authz::Connection;
use finial_net::tls::TlsConnection;
use finial_runtime::{Shutdown, Spawner};
use futures::future::BoxFuture;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt};
use tonic::body::Body;
use tonic::service::Routes;
use tower::Service;

/// How long a connection lives before its client is asked to dial again.
const AGE: Duration = Duration::from_secs(180);
/// The same for one that carries an agent's stream.
const AGE_WITH_STREAM: Duration = Duration::from_secs(3600);
/// How long calls on such a connection may then go on.
const GRACE: Duration = Duration::from_secs(300);

/// Counts the agents' streams of a connection; each holds a clone as long as it is open. An extension of each request.
#[derive(Clone, Default)]
pub struct Streams(Arc<AtomicUsize>);

impl Streams {
    /// One more, until the result is dropped.
    pub fn hold(&self) -> Held {
        self.0.fetch_add(1, Ordering::Relaxed);
        Held(self.0.clone())
    }

    fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// See [`Streams::hold`].
pub struct Held(Arc<AtomicUsize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs calls as tasks.
#[derive(Clone)]
struct Calls(Spawner);

impl<F> hyper::rt::Executor<F> for Calls
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, call: F) {
        drop(self.0.spawn("call", call)); // it goes on
    }
}

/// The services, as one connection sees them.
#[derive(Clone)]
struct OfConnection {
    services: Routes,
    peer: Connection,
    streams: Streams,
}

impl hyper::service::Service<Request<Incoming>> for OfConnection {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(self.peer.clone());
        request.extensions_mut().insert(self.streams.clone());
        let mut services = self.services.clone();
        Box::pin(async move {
            // Always ready.
            let response = services.call(request).await?;
            Ok(super::oversize_is_exhausted(response))
        })
    }
}

/// An age, give or take a tenth, so that connections which began together do not end together.
fn spread(age: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish() % 200;
    age.mul_f64(0.9 + random as f64 / 1000.0)
}

/// Serves all connections until shutdown, and then those that are open until they have ended.
pub(super) async fn serve(
    incoming: impl Stream<Item = Known<TlsConnection>>,
    services: Routes,
    spawner: Spawner,
    shutdown: Shutdown,
) {
    let mut builder = http2::Builder::new(Calls(spawner.clone()));
    builder
        .max_concurrent_streams(REMOTE_CALLS)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    let mut incoming = pin!(incoming);
    // Nothing is ever sent: it tells when the last connection has ended.
    let (open, mut ended) = mpsc::channel::<Infallible>(1);
    loop {
        let next = tokio::select! {
            next = incoming.next() => next,
            () = shutdown.cancelled() => break,
        };
        let Some(known) = next else { break };
        let streams = Streams::default();
        let service = OfConnection { services: services.clone(), peer: known.peer.clone(), streams: streams.clone() };
        let (builder, shutdown, open) = (builder.clone(), shutdown.clone(), open.clone());
        drop(spawner.spawn("connection", async move {
            let _open = open;
            one(&builder, known, service, &streams, &shutdown).await;
        }));
    }
    drop(open);
    ended.recv().await;
}

/// Serves one connection to its end; the service counts `streams`.
async fn one<I, S>(builder: &http2::Builder<Calls>, io: I, service: S, streams: &Streams, shutdown: &Shutdown)
where
    I: AsyncRead + AsyncWrite + Unpin,
    S: hyper::service::Service<Request<Incoming>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    let mut connection = pin!(builder.serve_connection(TokioIo::new(io), service));
    let old = async {
        tokio::time::sleep(spread(AGE)).await;
        if streams.any() {
            tokio::time::sleep(spread(AGE_WITH_STREAM)).await;
        }
    };
    tokio::select! {
        result = connection.as_mut() => return note(result),
        () = old => {}
        () = shutdown.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    if let Ok(result) = tokio::time::timeout(GRACE, connection).await {
        note(result);
    }
}

fn note(result: hyper::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(%error, "Connection failed");
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
