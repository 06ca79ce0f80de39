//! JWT-SVIDs: from the cache while they are young, from the server otherwise, and from the cache again when it is away.
//! Those that workloads use are renewed ahead of time, so that none of them waits for a server that is away.

use crate::cache::{Cache, CachedJwt, FlightResult, JwtKey};
use crate::entry::WorkloadEntry;
use crate::error::{ServerError, Verdict};
use crate::rotation::{Jitter, RotationStrategy};
use crate::sync::client::{IssuedJwt, RPC_TIMEOUT, ServerLink};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use finial_core::{Clock, EntryId};
use finial_runtime::Shutdown;
use futures::StreamExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// As log lines say it.
const SUBSYSTEM: &str = "manager";

/// Tokens that are renewed ahead of time in one round, and of these at the same time.
const RENEWED: (usize, usize) = (128, 8);
/// How often due renewals are looked for, at least, while there are any tokens.
const ROUND: Duration = Duration::from_secs(1);
/// A renewal that failed is tried again after a tenth of the time that is left, within these bounds. Milliseconds.
const RETRY_MS: (i64, i64) = (2_000, 60_000);

/// Before it is asked again each time that no server answered.
const LOST: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(250)];
/// A caller waits so long for the agent to attest anew; what it then may do is up to an operator.
const REATTESTED: Duration = Duration::from_secs(10);

/// Fetches JWT-SVIDs for workloads.
pub(crate) struct JwtFetcher {
    pub(crate) cache: Arc<Cache>,
    pub(crate) link: Arc<ServerLink>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) rotation: RotationStrategy,
    pub(crate) jitter: Arc<Jitter>,
    /// How long to wait for the server when the cached token still serves.
    pub(crate) cache_hit_timeout: Duration,
}

impl JwtFetcher {
    /// A token for an entry; the error is for the caller.
    pub(crate) async fn fetch(
        self: &Arc<Self>,
        entry: &WorkloadEntry,
        audience: &[String],
    ) -> Result<Arc<CachedJwt>, Arc<str>> {
        let svid = if entry.jwt_svid_include_jti {
            // Each token is to be one of its own.
            self.issue(entry, audience, RPC_TIMEOUT).await.map(|(svid, _)| svid)
        } else {
            self.cached_or_renewed(entry, audience).await
        }?;
        // The server knows of a change of the entry that we do not, be it ours or that of one who asked before: the ID it has
        // now may be for other workloads.
        if svid.id != entry.spiffe_id {
            let error = format!(
                "the server issued it for {}, as entry {} was changed a moment ago; try again",
                svid.id, entry.id
            );
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, spiffe_id = %entry.spiffe_id, "JWT-SVID is for another SPIFFE ID");
            return Err(error.into());
        }
        Ok(svid)
    }

    async fn cached_or_renewed(self: &Arc<Self>, entry: &WorkloadEntry, audience: &[String]) -> FlightResult {
        let key = JwtKey::new(&entry.spiffe_id, audience);
        let now_ms = self.clock.now_ms();
        let alive = |svid: &CachedJwt| now_ms < svid.expires_at.saturating_mul(1000);
        let cached = self.cache.jwt.get(&key, now_ms).filter(|found| alive(&found.svid));
        // An old one that still serves, and that the server was asked for already, is as good as it gets.
        if let Some(found) = cached.as_ref().filter(|f| f.renewing || now_ms < f.svid.rotate_at_ms) {
            return Ok(found.svid.clone());
        }
        let usable = cached.map(|found| found.svid);
        let timeout = if usable.is_some() { self.cache_hit_timeout } else { RPC_TIMEOUT };
        let id = entry.spiffe_id.clone();
        match (self.renew(key, entry, audience.to_vec(), timeout).await, usable) {
            (Err(error), Some(svid)) => {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, spiffe_id = %id, "Unable to renew JWT; returning cached copy");
                Ok(svid)
            }
            (result, _) => result,
        }
    }

    /// Asks the server, or waits for a call that is under way; the cache has what came of it.
    async fn renew(
        self: &Arc<Self>,
        key: JwtKey,
        entry: &WorkloadEntry,
        audience: Vec<String>,
        timeout: Duration,
    ) -> FlightResult {
        let (this, entry) = (self.clone(), entry.clone());
        let call = move || async move {
            match this.issue(&entry, &audience, timeout).await {
                Ok((svid, key)) => {
                    this.cache.jwt.put(key, svid.clone(), this.clock.now_ms());
                    Ok(svid)
                }
                Err(error) => {
                    this.failed(&key);
                    Err(error)
                }
            }
        };
        self.cache.jwt.fly(key, call).await
    }

    /// Has a token that could not be renewed wait, while it serves.
    fn failed(&self, key: &JwtKey) {
        let now_ms = self.clock.now_ms();
        let held = self.cache.jwt.peek(key);
        let left = held.map(|svid| svid.expires_at.saturating_mul(1000).saturating_sub(now_ms));
        if let Some(left) = left.filter(|left| *left > 0) {
            self.cache.jwt.retry_at(key, now_ms.saturating_add((left / 10).clamp(RETRY_MS.0, RETRY_MS.1)));
        }
    }

    /// Renews tokens in use when their time comes, until shutdown.
    pub(crate) async fn renew_ahead(self: Arc<Self>, shutdown: Shutdown) {
        loop {
            let now_ms = self.clock.now_ms();
            let wait = match self.cache.jwt.next_due_ms(now_ms) {
                Some(at) => ROUND.min(Duration::from_millis(at.saturating_sub(now_ms).try_into().unwrap_or(0))),
                None => Duration::MAX,
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.cache.jwt.filled() => continue,
                () = shutdown.cancelled() => return,
            }
            let due = self.cache.jwt.due(self.clock.now_ms(), RENEWED.0);
            let round = futures::stream::iter(due).for_each_concurrent(RENEWED.1, |(key, svid)| {
                let this = self.clone();
                async move { this.renew_one(key, svid).await }
            });
            tokio::select! {
                () = round => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn renew_one(self: &Arc<Self>, key: JwtKey, svid: Arc<CachedJwt>) {
        let snapshot = self.cache.snapshot();
        let same = |entry: &&WorkloadEntry| entry.spiffe_id == svid.id && !entry.jwt_svid_include_jti;
        let its_own = snapshot.record(&svid.entry_id).map(|r| r.entry.as_ref()).filter(same);
        let entry = its_own.or_else(|| snapshot.records.iter().map(|r| r.entry.as_ref()).find(same));
        let Some(entry) = entry else { return self.cache.jwt.remove(&key) };
        // Of what failed, the cache knows and the log says.
        let renewed = self.renew(key, entry, svid.audience.clone(), RPC_TIMEOUT).await;
        if renewed.is_ok() && self.cache.jwt.peek(&key).is_some_and(|now| Arc::ptr_eq(&now, &svid)) {
            self.failed(&key); // the server gave one for another ID
        }
    }

    /// Asks, and asks again where another try may well do better and the caller would not have made it.
    async fn ask(&self, id: &EntryId, audience: &[String], timeout: Duration) -> Result<IssuedJwt, ServerError> {
        let deadline = Instant::now() + timeout;
        let mut waits = LOST.iter();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut svid = self.link.own_svid();
            let error = match self.link.new_jwt_svid(id, audience.to_vec(), left).await {
                Ok(issued) => return Ok(issued),
                Err(error) => error,
            };
            if error.was_lost()
                && let Some(wait) = waits.next()
            {
                // The server that was asked ended meanwhile, or the connection did: another one, or the same, may be there at
                // once, or when a balancer knows that one is gone.
                tokio::time::sleep(*wait).await;
            } else if error.verdict() == Verdict::Reattest && !self.link.is_refused() {
                // The agent's own SVID ended while no server was there, and now there is one.
                self.link.denied();
                let renewed = timeout_at(deadline.min(Instant::now() + REATTESTED), svid.changed()).await;
                if !matches!(renewed, Ok(Ok(()))) {
                    return Err(error);
                }
            } else {
                return Err(error);
            }
        }
    }

    /// Asks the server. The key goes by the ID that the server gave: entries may have changed meanwhile.
    async fn issue(
        &self,
        entry: &WorkloadEntry,
        audience: &[String],
        timeout: Duration,
    ) -> Result<(Arc<CachedJwt>, JwtKey), Arc<str>> {
        let issued = self.ask(&entry.id, audience, timeout).await.map_err(|error| {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, spiffe_id = %entry.spiffe_id, "Failed to fetch JWT SVID");
            Arc::from(error.to_string())
        })?;
        let (from, to) = (issued.issued_at.saturating_mul(1000), issued.expires_at.saturating_mul(1000));
        let key = JwtKey::new(&issued.id, audience);
        let svid = CachedJwt {
            key_id: key_id(&issued.token).unwrap_or_default(),
            rotate_at_ms: self.rotation.jwt_rotate_at(from, to, self.jitter.draw()),
            audience: audience.to_vec(),
            entry_id: entry.id.clone(),
            id: issued.id,
            token: issued.token,
            issued_at: issued.issued_at,
            expires_at: issued.expires_at,
        };
        Ok((Arc::new(svid), key))
    }
}

/// The `kid` of a token.
pub(super) fn key_id(token: &str) -> Option<String> {
    let header = URL_SAFE_NO_PAD.decode(token.split('.').next()?).ok()?;
    let header: serde_json::Value = serde_json::from_slice(&header).ok()?;
    Some(header.get("kid")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_key_id_is_read_from_the_header() {
        // {"alg":"ES256","kid":"k1"}
        assert_eq!(super::key_id("eyJhbGciOiJFUzI1NiIsImtpZCI6ImsxIn0.e30.x").as_deref(), Some("k1"));
        assert_eq!(super::key_id("nonsense"), None);
    }
}
