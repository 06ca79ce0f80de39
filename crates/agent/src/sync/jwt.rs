//! JWT-SVIDs: from the cache while they are young, from the server otherwise, and from the cache again when it is away.

use crate::cache::{Cache, CachedJwt, JwtKey};
use crate::entry::WorkloadEntry;
use crate::rotation::{Jitter, RotationStrategy};
use crate::sync::client::{RPC_TIMEOUT, ServerLink};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use finial_core::Clock;
use std::sync::Arc;
use std::time::Duration;

/// As log lines say it.
const SUBSYSTEM: &str = "manager";

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
        if entry.jwt_svid_include_jti {
            // Each token is to be one of its own.
            return self.issue(entry, audience, RPC_TIMEOUT).await.map(|(svid, _)| svid);
        }
        let key = JwtKey::new(&entry.spiffe_id, audience);
        let now_ms = self.clock.now_ms();
        let alive = |svid: &CachedJwt| now_ms < svid.expires_at.saturating_mul(1000);
        let cached = self.cache.jwt.get(&key);
        if let Some(svid) = cached.as_ref().filter(|s| alive(s) && now_ms < s.rotate_at_ms) {
            return Ok(svid.clone());
        }
        let usable = cached.filter(|s| alive(s));
        let timeout = if usable.is_some() { self.cache_hit_timeout } else { RPC_TIMEOUT };
        let (this, entry, audience) = (self.clone(), entry.clone(), audience.to_vec());
        let id = entry.spiffe_id.clone();
        let call = move || async move {
            let (svid, key) = this.issue(&entry, &audience, timeout).await?;
            this.cache.jwt.put(key, svid.clone());
            Ok(svid)
        };
        match (self.cache.jwt.fly(key, call).await, usable) {
            (Err(error), Some(svid)) => {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, spiffe_id = %id, "Unable to renew JWT; returning cached copy");
                Ok(svid)
            }
            (result, _) => result,
        }
    }

    /// Asks the server. The key goes by the ID that the server gave: entries may have changed meanwhile.
    async fn issue(
        &self,
        entry: &WorkloadEntry,
        audience: &[String],
        timeout: Duration,
    ) -> Result<(Arc<CachedJwt>, JwtKey), Arc<str>> {
        let issued = self.link.new_jwt_svid(&entry.id, audience.to_vec(), timeout).await;
        let issued = issued.map_err(|error| {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, spiffe_id = %entry.spiffe_id, "Failed to fetch JWT SVID");
            Arc::from(error.to_string())
        })?;
        let (from, to) = (issued.issued_at.saturating_mul(1000), issued.expires_at.saturating_mul(1000));
        let key = JwtKey::new(&issued.id, audience);
        let svid = CachedJwt {
            key_id: key_id(&issued.token).unwrap_or_default(),
            rotate_at_ms: self.rotation.jwt_rotate_at(from, to, self.jitter.draw()),
            id: issued.id,
            token: issued.token,
            issued_at: issued.issued_at,
            expires_at: issued.expires_at,
        };
        Ok((Arc::new(svid), key))
    }
}

/// The `kid` of a token.
fn key_id(token: &str) -> Option<String> {
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
