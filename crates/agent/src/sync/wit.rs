//! WIT-SVIDs: asked for when a workload wants them, kept with their keys, and renewed as long as a stream holds them.

use crate::Context;
use crate::cache::{Cache, CachedWit};
use crate::entry::{WorkloadEntry, spiffe_id};
use crate::rotation::{Jitter, RotationStrategy};
use crate::sync::client::ServerLink;
use crate::sync::mint::new_key;
use finial_config::WorkloadKeyType;
use finial_core::{Clock, EntryId, Secret};
use finial_crypto::{SignatureAlgorithm, private_key_to_jwk};
use finial_proto::server::svid::NewWitsvidParams;
use finial_proto::types;
use finial_runtime::Spawner;
use std::sync::{Arc, Mutex, PoisonError};
use tonic::{Code, Status};

/// As log lines say it.
const SUBSYSTEM: &str = "manager";

/// SVIDs in one request: the server counts each against its limit.
const BATCH: usize = 100;
/// How many are kept, unless configured.
const KEPT: usize = 1000;
/// After a failure the server is left alone for this time. Milliseconds.
const RETRY_MS: i64 = 5_000;

/// What there is for some entries.
pub(crate) struct Held {
    /// In their order.
    pub(crate) svids: Vec<(Arc<WorkloadEntry>, Arc<CachedWit>)>,
    /// When to ask again, milliseconds since the epoch.
    pub(crate) again_at_ms: i64,
}

/// Fetches them.
pub(crate) struct WitFetcher {
    cache: Arc<Cache>,
    link: Arc<ServerLink>,
    clock: Arc<dyn Clock>,
    rotation: RotationStrategy,
    jitter: Arc<Jitter>,
    key_type: WorkloadKeyType,
    spawner: Spawner,
    /// More are kept only while streams hold them.
    limit: usize,
    /// The last failure, and until when it holds, milliseconds since the epoch.
    failed: Mutex<Option<(Status, i64)>>,
    /// One call to the server at a time: who waited finds what another one fetched.
    call: tokio::sync::Mutex<()>,
}

impl WitFetcher {
    pub(crate) fn new(context: &Context, cache: Arc<Cache>, link: Arc<ServerLink>) -> Self {
        let limit = context.settings.x509_svid_cache_max_size;
        Self {
            cache,
            link,
            clock: context.clock.clone(),
            rotation: context.rotation,
            jitter: context.jitter.clone(),
            key_type: context.settings.workload_key_type,
            spawner: context.spawner.clone(),
            limit: if limit == 0 { KEPT } else { limit },
            failed: Mutex::default(),
            call: tokio::sync::Mutex::default(),
        }
    }

    /// The SVIDs of these entries, new ones where that is due. `tainted` are authorities that are no longer to be used.
    pub(crate) async fn get(&self, entries: &[Arc<WorkloadEntry>], tainted: &[String]) -> Result<Held, Status> {
        let due = || self.cache.wit.due(entries, tainted, self.clock.now_ms());
        let mut error = None;
        if !due().is_empty() {
            let _turn = self.call.lock().await;
            let due = due();
            if !due.is_empty() {
                error = self.renew(&due, tainted).await.err();
            }
        }
        self.held(entries, error)
    }

    /// What there is now; the error only if nothing of it serves.
    fn held(&self, entries: &[Arc<WorkloadEntry>], error: Option<Status>) -> Result<Held, Status> {
        let now_ms = self.clock.now_ms();
        let svids = self.cache.wit.serving(entries, now_ms);
        let end_ms = |svid: &CachedWit| svid.expires_at.saturating_mul(1000);
        let again_ms = |svid: &CachedWit| if error.is_some() { end_ms(svid) } else { svid.rotate_at_ms };
        let soon = svids.iter().map(|(_, svid)| again_ms(svid).max(now_ms.saturating_add(1)));
        let some_missing = error.is_some() || svids.len() < entries.len();
        let again_at_ms = soon.chain(some_missing.then(|| now_ms.saturating_add(RETRY_MS))).min().unwrap_or(i64::MAX);
        match error {
            Some(error) if svids.is_empty() => Err(error),
            _ => Ok(Held { svids, again_at_ms }),
        }
    }

    fn set_failed(&self, failed: Option<(Status, i64)>) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = failed;
    }

    async fn renew(&self, due: &[Arc<WorkloadEntry>], tainted: &[String]) -> Result<(), Status> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((status, _)) = failed.filter(|(_, until_ms)| self.clock.now_ms() < *until_ms) {
            return Err(status);
        }
        for some in due.chunks(BATCH) {
            let issued = self.issue(some, tainted).await.inspect_err(|status| {
                tracing::error!(subsystem_name = SUBSYSTEM, error = %status.message(), "Failed to fetch WIT-SVIDs");
                self.set_failed(Some((status.clone(), self.clock.now_ms().saturating_add(RETRY_MS))));
            })?;
            self.set_failed(None);
            self.cache.wit.put(issued, self.limit);
        }
        Ok(())
    }

    async fn issue(&self, due: &[Arc<WorkloadEntry>], tainted: &[String]) -> Result<Vec<(EntryId, CachedWit)>, Status> {
        let no_key = || Status::internal("could not fetch WIT-SVID: cannot make a key");
        let (mut keys, mut params) = (Vec::with_capacity(due.len()), Vec::with_capacity(due.len()));
        for entry in due {
            let key = new_key(self.key_type, &self.spawner).await.map_err(|_| no_key())?;
            let algorithm = algorithm(self.key_type).jwa();
            params.push(NewWitsvidParams {
                entry_id: entry.id.as_str().to_owned(),
                public_key: key.public_key().spki_der().to_vec().into(),
                signing_algorithm: algorithm.to_owned(),
            });
            keys.push(with_algorithm(private_key_to_jwk(&key).ok_or_else(no_key)?, algorithm));
        }
        let answers = self.link.new_wit_svids(params).await.map_err(|error| match error.status.code() {
            // What the standard wants workloads to hear where there are none.
            Code::Unimplemented => Status::unimplemented(error.status.message()),
            _ => Status::unavailable(format!("could not fetch WIT-SVID: {error}")),
        })?;
        let taken = due.iter().zip(keys).zip(answers).filter_map(|((entry, key), answer)| {
            let svid = answer.and_then(|answer| self.take(entry, key, answer, tainted));
            let svid = svid.inspect_err(
                |error| tracing::error!(subsystem_name = SUBSYSTEM, %error, entry_id = %entry.id, "Failed to fetch WIT-SVID"),
            );
            Some((entry.id.clone(), svid.ok()?))
        });
        Ok(taken.collect())
    }

    fn take(
        &self,
        entry: &WorkloadEntry,
        key: Secret<String>,
        answer: types::Witsvid,
        tainted: &[String],
    ) -> Result<CachedWit, String> {
        let id = answer.id.as_ref().ok_or("the answer has no SPIFFE ID")?;
        let id = spiffe_id(id).map_err(|e| e.to_string())?;
        if id != entry.spiffe_id {
            return Err(format!("the answer is for {id} instead of {}", entry.spiffe_id));
        }
        if answer.token.is_empty() || answer.expires_at <= answer.issued_at {
            return Err("the answer has no token, or ends before it begins".to_owned());
        }
        let (from, to) = (answer.issued_at.saturating_mul(1000), answer.expires_at.saturating_mul(1000));
        Ok(CachedWit {
            key_id: super::jwt::key_id(&answer.token).filter(|key| !tainted.contains(key)),
            rotate_at_ms: self.rotation.x509_rotate_at(from, to, self.jitter.draw()),
            expires_at: answer.expires_at,
            revision_number: entry.revision_number,
            created_at: entry.created_at,
            token: answer.token,
            key,
            id,
        })
    }
}

fn algorithm(key_type: WorkloadKeyType) -> SignatureAlgorithm {
    match key_type {
        WorkloadKeyType::EcP256 => SignatureAlgorithm::EcdsaP256Sha256,
        WorkloadKeyType::EcP384 => SignatureAlgorithm::EcdsaP384Sha384,
        WorkloadKeyType::Rsa2048 => SignatureAlgorithm::RsaPkcs1Sha256,
    }
}

/// Says with which algorithm the key is to be used, as the token does.
fn with_algorithm(jwk: Secret<String>, algorithm: &str) -> Secret<String> {
    let body = jwk.expose().strip_suffix('}').unwrap_or_default();
    let mut with = String::with_capacity(body.len() + algorithm.len() + 10);
    for part in [body, ",\"alg\":\"", algorithm, "\"}"] {
        with.push_str(part);
    }
    Secret::new(with)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_names_its_algorithm() {
        let jwk = with_algorithm(Secret::new("{\"kty\":\"EC\",\"d\":\"x\"}".to_owned()), "ES256");
        let jwk: serde_json::Value = serde_json::from_str(jwk.expose()).unwrap();
        assert_eq!(jwk, serde_json::json!({"kty": "EC", "d": "x", "alg": "ES256"}));
    }
}
