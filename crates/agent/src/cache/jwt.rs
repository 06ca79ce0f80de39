//! JWT-SVIDs that were fetched already: at most so many, renewed at half-life, one call to the server at a time for each.

use finial_core::{SpiffeId, UnixSeconds};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Flights that nobody waits for any more are cleared out when there are more than this.
const FLIGHTS_KEPT: usize = 64;

/// A token of the cache.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CachedJwt {
    pub(crate) id: SpiffeId,
    pub(crate) token: String,
    pub(crate) key_id: String,
    pub(crate) issued_at: UnixSeconds,
    pub(crate) expires_at: UnixSeconds,
    /// From then on it is to be renewed; it still serves when that fails. Milliseconds since the epoch.
    pub(crate) rotate_at_ms: i64,
}

/// SHA-256 over the ID and the sorted audiences, each with its length, so that no two requests share a key by accident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct JwtKey([u8; 32]);

impl JwtKey {
    /// The order of audiences does not matter; all of them do.
    pub(crate) fn new(id: &SpiffeId, audience: &[String]) -> Self {
        let mut sorted: Vec<&str> = audience.iter().map(String::as_str).collect();
        sorted.sort_unstable();
        let mut hash = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        for part in std::iter::once(id.as_str()).chain(sorted) {
            hash.update(&(part.len() as u64).to_be_bytes());
            hash.update(part.as_bytes());
        }
        let mut key = [0; 32];
        key.iter_mut().zip(hash.finish().as_ref()).for_each(|(to, from)| *to = *from);
        Self(key)
    }
}

/// What a flight ends with; the error is the text for the caller.
pub(crate) type FlightResult = Result<Arc<CachedJwt>, Arc<str>>;
type Flight = Shared<BoxFuture<'static, FlightResult>>;

#[derive(Default)]
struct State {
    svids: HashMap<JwtKey, (Arc<CachedJwt>, u64)>,
    /// Counts uses, so that the least recently used one can be found.
    uses: u64,
    flights: HashMap<JwtKey, WeakShared<BoxFuture<'static, FlightResult>>>,
}

/// The cache. The limit is hard.
pub(crate) struct JwtCache {
    limit: usize,
    state: Mutex<State>,
}

impl JwtCache {
    /// Keeps at most `limit` tokens (0: 1000).
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit: if limit == 0 { 1000 } else { limit }, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.state().svids.len()
    }

    /// The token, if there is one; the caller looks at its times.
    pub(crate) fn get(&self, key: &JwtKey) -> Option<Arc<CachedJwt>> {
        let mut state = self.state();
        state.uses += 1;
        let now = state.uses;
        let (svid, used) = state.svids.get_mut(key)?;
        *used = now;
        Some(svid.clone())
    }

    /// Keeps a token, in place of the least recently used one if there are too many.
    pub(crate) fn put(&self, key: JwtKey, svid: Arc<CachedJwt>) {
        let mut state = self.state();
        state.uses += 1;
        let now = state.uses;
        if !state.svids.contains_key(&key) && state.svids.len() >= self.limit {
            let oldest = state.svids.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key);
            oldest.and_then(|key| state.svids.remove(&key));
        }
        state.svids.insert(key, (svid, now));
    }

    /// Forgets tokens that were signed with one of these keys; returns how many.
    pub(crate) fn purge_tainted(&self, key_ids: &[String]) -> usize {
        let mut state = self.state();
        let before = state.svids.len();
        state.svids.retain(|_, (svid, _)| !key_ids.contains(&svid.key_id));
        before - state.svids.len()
    }

    /// Joins the call that is under way for `key`, or starts `call`. It runs as long as someone waits for it.
    pub(crate) async fn fly<F>(&self, key: JwtKey, call: impl FnOnce() -> F) -> FlightResult
    where
        F: Future<Output = FlightResult> + Send + 'static,
    {
        let flight: Flight = {
            let mut state = self.state();
            match state.flights.get(&key).and_then(WeakShared::upgrade).filter(|f| f.peek().is_none()) {
                Some(flight) => flight,
                None => {
                    let flight = call().boxed().shared();
                    if state.flights.len() >= FLIGHTS_KEPT {
                        state.flights.retain(|_, f| f.upgrade().is_some_and(|f| f.peek().is_none()));
                    }
                    flight.downgrade().and_then(|weak| state.flights.insert(key, weak));
                    flight
                }
            }
        };
        flight.await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn id() -> SpiffeId {
        SpiffeId::parse("spiffe://td/web").unwrap()
    }

    fn key(audience: &[&str]) -> JwtKey {
        JwtKey::new(&id(), &audience.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
    }

    fn svid(token: &str, key_id: &str) -> Arc<CachedJwt> {
        Arc::new(CachedJwt {
            id: id(),
            token: token.into(),
            key_id: key_id.into(),
            issued_at: 0,
            expires_at: 100,
            rotate_at_ms: 50_000,
        })
    }

    #[test]
    fn audiences_are_a_set_and_cannot_be_confused() {
        assert_eq!(key(&["a", "b"]), key(&["b", "a"]));
        assert_ne!(key(&["a", "b"]), key(&["a"]));
        assert_ne!(key(&["ab"]), key(&["a", "b"]));
        assert_ne!(key(&["a\0b"]), key(&["a", "b"]));
    }

    #[test]
    fn the_limit_is_hard_and_the_least_recently_used_goes() {
        let cache = JwtCache::new(2);
        cache.put(key(&["a"]), svid("a", "k1"));
        cache.put(key(&["b"]), svid("b", "k1"));
        assert!(cache.get(&key(&["a"])).is_some());
        cache.put(key(&["c"]), svid("c", "k2"));
        assert_eq!(cache.len(), 2);
        assert!(cache.get(&key(&["b"])).is_none());
        assert!(cache.get(&key(&["a"])).is_some());
        assert_eq!(cache.purge_tainted(&["k1".into()]), 1);
        assert!(cache.get(&key(&["c"])).is_some());
    }

    #[tokio::test]
    async fn callers_share_one_call_and_the_next_one_makes_its_own() {
        let cache = JwtCache::new(0);
        let calls = Arc::new(AtomicUsize::new(0));
        let call = || {
            let calls = calls.clone();
            async move {
                tokio::task::yield_now().await;
                calls.fetch_add(1, Ordering::SeqCst);
                Ok(svid("t", "k"))
            }
        };
        let (a, b) = tokio::join!(cache.fly(key(&["x"]), call), cache.fly(key(&["x"]), call));
        assert_eq!(a, b);
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        cache.fly(key(&["x"]), call).await.unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_caller_that_leaves_does_not_take_the_call_with_it() {
        let cache = JwtCache::new(0);
        let (send, receive) = tokio::sync::oneshot::channel::<()>();
        let mut first = Box::pin(cache.fly(key(&["x"]), || async move {
            let _ = receive.await;
            Ok(svid("t", "k"))
        }));
        assert!(futures::poll!(&mut first).is_pending());
        let second = cache.fly(key(&["x"]), || async { Err("a second call was made".into()) });
        let mut second = Box::pin(second);
        assert!(futures::poll!(&mut second).is_pending());
        drop(first);
        send.send(()).unwrap();
        assert_eq!(second.await.unwrap().token, "t");
    }
}
