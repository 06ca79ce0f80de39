//! JWT-SVIDs that were fetched already: at most so many, renewed at half-life while workloads ask for them, one call to the
//! server at a time for each.

use finial_core::{EntryId, SpiffeId, UnixSeconds};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Flights that nobody waits for any more are cleared out when there are more than this.
const FLIGHTS_KEPT: usize = 64;

/// Between two renewals of the same token, at least: a server whose clock is behind gives tokens that are due at once.
const RENEWED_EVERY_MS: i64 = 1_000;

/// A token of the cache.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CachedJwt {
    pub(crate) id: SpiffeId,
    pub(crate) token: String,
    pub(crate) key_id: String,
    /// As it was asked for.
    pub(crate) audience: Vec<String>,
    /// For which it was issued.
    pub(crate) entry_id: EntryId,
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

struct Held {
    svid: Arc<CachedJwt>,
    /// The number of its last use.
    used: u64,
    /// When a workload asked for it last, milliseconds since the epoch.
    asked_ms: i64,
    /// It could not be renewed: not tried again before, milliseconds since the epoch.
    retry_ms: i64,
}

impl Held {
    /// From when on it is to be renewed; `None` if no workload asked for it within a lifetime, or it ended.
    fn renew_at_ms(&self, now_ms: i64) -> Option<i64> {
        let end_ms = self.svid.expires_at.saturating_mul(1000);
        let lifetime_ms = end_ms.saturating_sub(self.svid.issued_at.saturating_mul(1000));
        let wanted = now_ms.saturating_sub(self.asked_ms) <= lifetime_ms && now_ms < end_ms;
        wanted.then(|| self.svid.rotate_at_ms.max(self.retry_ms))
    }
}

#[derive(Default)]
struct State {
    svids: HashMap<JwtKey, Held>,
    /// Counts uses, so that the least recently used one can be found.
    uses: u64,
    flights: HashMap<JwtKey, WeakShared<BoxFuture<'static, FlightResult>>>,
}

impl State {
    fn flight(&self, key: &JwtKey) -> Option<Flight> {
        self.flights.get(key).and_then(WeakShared::upgrade).filter(|f| f.peek().is_none())
    }
}

/// What the cache has for a request.
pub(crate) struct Found {
    pub(crate) svid: Arc<CachedJwt>,
    /// It is being renewed, or that failed a moment ago: there is nothing to wait for.
    pub(crate) renewing: bool,
}

/// The cache. The limit is hard.
pub(crate) struct JwtCache {
    limit: usize,
    state: Mutex<State>,
    changed: Arc<Notify>,
    /// A token was put in.
    filled: Notify,
}

impl JwtCache {
    /// Keeps at most `limit` tokens (0: 1000), and tells `changed` of each new one.
    pub(crate) fn new(limit: usize, changed: Arc<Notify>) -> Self {
        let limit = if limit == 0 { 1000 } else { limit };
        Self { limit, state: Mutex::default(), changed, filled: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.state().svids.len()
    }

    /// The token that a workload asks for, if there is one; the caller looks at its times.
    pub(crate) fn get(&self, key: &JwtKey, now_ms: i64) -> Option<Found> {
        let mut state = self.state();
        state.uses += 1;
        let now = state.uses;
        let flying = state.flight(key).is_some();
        let held = state.svids.get_mut(key)?;
        (held.used, held.asked_ms) = (now, now_ms);
        Some(Found { svid: held.svid.clone(), renewing: flying || now_ms < held.retry_ms })
    }

    /// Keeps a token, in place of the least recently used one if there are too many. One that takes the place of an older
    /// one was asked for when that was.
    pub(crate) fn put(&self, key: JwtKey, svid: Arc<CachedJwt>, now_ms: i64) {
        let mut state = self.state();
        if let Some(held) = state.svids.get_mut(&key) {
            (held.svid, held.retry_ms) = (svid, now_ms.saturating_add(RENEWED_EVERY_MS));
        } else {
            state.uses += 1;
            let used = state.uses;
            if state.svids.len() >= self.limit {
                let oldest = state.svids.iter().min_by_key(|(_, held)| held.used).map(|(key, _)| *key);
                oldest.and_then(|key| state.svids.remove(&key));
            }
            let retry_ms = now_ms.saturating_add(RENEWED_EVERY_MS);
            state.svids.insert(key, Held { svid, used, asked_ms: now_ms, retry_ms });
        }
        self.filled.notify_one();
        self.changed.notify_one();
    }

    /// Returns when a token was put in. For one waiter.
    pub(crate) async fn filled(&self) {
        self.filled.notified().await;
    }

    /// All tokens, with when workloads asked for them last.
    pub(crate) fn all(&self) -> Vec<(Arc<CachedJwt>, i64)> {
        self.state().svids.values().map(|held| (held.svid.clone(), held.asked_ms)).collect()
    }

    /// Tokens in use that are to be renewed by now, those that end first at the front, at most `limit`.
    pub(crate) fn due(&self, now_ms: i64, limit: usize) -> Vec<(JwtKey, Arc<CachedJwt>)> {
        let state = self.state();
        let is_due = |held: &Held| held.renew_at_ms(now_ms).is_some_and(|at| at <= now_ms);
        let due = state.svids.iter().filter(|(_, held)| is_due(held));
        let mut due: Vec<_> = due.map(|(key, held)| (*key, held.svid.clone())).collect();
        due.sort_by_key(|(_, svid)| svid.expires_at);
        due.truncate(limit);
        due
    }

    /// When the next one is to be renewed, milliseconds since the epoch.
    pub(crate) fn next_due_ms(&self, now_ms: i64) -> Option<i64> {
        self.state().svids.values().filter_map(|held| held.renew_at_ms(now_ms)).min()
    }

    /// A renewal failed.
    pub(crate) fn retry_at(&self, key: &JwtKey, at_ms: i64) {
        if let Some(held) = self.state().svids.get_mut(key) {
            held.retry_ms = at_ms;
        }
    }

    /// The token, without anybody asking for it.
    pub(crate) fn peek(&self, key: &JwtKey) -> Option<Arc<CachedJwt>> {
        self.state().svids.get(key).map(|held| held.svid.clone())
    }

    /// Forgets a token that nobody may have any more.
    pub(crate) fn remove(&self, key: &JwtKey) {
        self.state().svids.remove(key);
    }

    /// Forgets tokens that were signed with one of these keys; returns how many.
    pub(crate) fn purge_tainted(&self, key_ids: &[String]) -> usize {
        let mut state = self.state();
        let before = state.svids.len();
        state.svids.retain(|_, held| !key_ids.contains(&held.svid.key_id));
        before - state.svids.len()
    }

    /// Joins the call that is under way for `key`, or starts `call`. It runs as long as someone waits for it.
    pub(crate) async fn fly<F>(&self, key: JwtKey, call: impl FnOnce() -> F) -> FlightResult
    where
        F: Future<Output = FlightResult> + Send + 'static,
    {
        let flight: Flight = {
            let mut state = self.state();
            match state.flight(&key) {
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
            audience: vec!["a".into()],
            entry_id: EntryId::parse("e1").unwrap(),
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
        let cache = JwtCache::new(2, Arc::default());
        cache.put(key(&["a"]), svid("a", "k1"), 0);
        cache.put(key(&["b"]), svid("b", "k1"), 0);
        assert!(cache.get(&key(&["a"]), 0).is_some());
        cache.put(key(&["c"]), svid("c", "k2"), 0);
        assert_eq!(cache.len(), 2);
        assert!(cache.get(&key(&["b"]), 0).is_none());
        assert!(cache.get(&key(&["a"]), 0).is_some());
        assert_eq!(cache.purge_tainted(&["k1".into()]), 1);
        assert!(cache.get(&key(&["c"]), 0).is_some());
    }

    #[test]
    fn tokens_that_workloads_ask_for_are_renewed_at_their_time_and_others_left_to_end() {
        let cache = JwtCache::new(0, Arc::default());
        let key = key(&["a"]);
        cache.put(key, svid("1", "k1"), 10_000);
        assert_eq!((cache.due(49_999, 9).len(), cache.next_due_ms(49_999)), (0, Some(50_000)));
        assert_eq!(cache.due(50_000, 9)[0].1.token, "1");
        assert!(cache.due(50_000, 0).is_empty(), "bounded");
        // It could not be had: workloads need not wait for the same again, and it is not asked for all the time.
        cache.retry_at(&key, 60_000);
        assert!(cache.due(59_999, 9).is_empty() && cache.get(&key, 59_999).unwrap().renewing);
        assert!(!cache.get(&key, 60_000).unwrap().renewing);
        assert!(cache.due(100_000, 9).is_empty(), "an ended one is no renewal");
        let next = |issued_at: i64| {
            let first = svid("2", "k1");
            let rotate_at_ms = issued_at * 1000 + 50_000;
            Arc::new(CachedJwt {
                token: "2".into(),
                id: first.id.clone(),
                key_id: first.key_id.clone(),
                audience: first.audience.clone(),
                entry_id: first.entry_id.clone(),
                issued_at,
                expires_at: issued_at + 100,
                rotate_at_ms,
            })
        };
        cache.put(key, next(60), 70_000);
        assert_eq!(cache.due(110_000, 9).len(), 1);
        cache.put(key, next(110), 110_000);
        assert_eq!(cache.due(160_000, 9).len(), 1, "asked for a lifetime ago, at 60");
        cache.put(key, next(160), 160_000);
        assert_eq!((cache.due(210_000, 9).len(), cache.next_due_ms(210_000)), (0, None), "nobody asks any more");
        cache.get(&key, 211_000);
        assert_eq!(cache.due(211_000, 9).len(), 1);
        cache.remove(&key);
        assert_eq!(cache.len(), 0);
    }

    #[tokio::test]
    async fn callers_share_one_call_and_the_next_one_makes_its_own() {
        let cache = JwtCache::new(0, Arc::default());
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
        let cache = JwtCache::new(0, Arc::default());
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
