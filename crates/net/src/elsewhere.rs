//! Handshakes whose key may sign elsewhere: their steps are taken on threads that keep nobody waiting.

use finial_crypto::tls::patiently;
use finial_runtime::Spawner;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use tokio::sync::Notify;

/// How connections are secured: a configuration, and where the steps of handshakes are taken.
#[derive(Clone)]
pub struct Handshakes<C> {
    pub(crate) config: Arc<C>,
    elsewhere: Option<Spawner>,
}

impl<C> From<Arc<C>> for Handshakes<C> {
    fn from(config: Arc<C>) -> Self {
        Self { config, elsewhere: None }
    }
}

impl<C> Handshakes<C> {
    /// On threads of their own where `elsewhere`: the key signs elsewhere, so that a step of a handshake may take long.
    pub fn new(config: Arc<C>, elsewhere: bool, spawner: &Spawner) -> Self {
        Self { config, elsewhere: elsewhere.then(|| spawner.clone()) }
    }

    /// Finishes a handshake. The caller gives it its deadline.
    pub(crate) async fn finish<T: Send + 'static>(
        &self,
        handshake: impl Future<Output = io::Result<T>> + Send + 'static,
    ) -> io::Result<T> {
        let Some(spawner) = &self.elsewhere else { return handshake.await };
        let mut handshake: Pin<Box<dyn Future<Output = io::Result<T>> + Send>> = Box::pin(handshake);
        let woken = Arc::new(Woken(Notify::new()));
        loop {
            let waker = Waker::from(woken.clone());
            let step = spawner.blocking(move || {
                let step = patiently(|| handshake.as_mut().poll(&mut Context::from_waker(&waker)));
                (handshake, step)
            });
            let (unfinished, step) = step.await.map_err(io::Error::other)?;
            if let Poll::Ready(done) = step {
                return done;
            }
            handshake = unfinished;
            woken.0.notified().await;
        }
    }
}

/// The connection has something to say, or room for more.
struct Woken(Notify);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}
