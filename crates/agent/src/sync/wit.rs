//! WIT-SVIDs: asked for when a workload wants them, kept with their keys, and renewed as long as a stream holds them.

use crate::entry::WorkloadEntry;
use crate::entry::spiffe_id;
use crate::rotation::{Jitter, RotationStrategy};
use crate::sync::client::ServerLink;
use crate::sync::mint::new_key;
use finial_config::WorkloadKeyType;
use finial_core::{Clock, EntryId, Secret, SpiffeId, UnixSeconds};
use finial_crypto::{SignatureAlgorithm, private_key_to_jwk};
use finial_proto::server::svid::NewWitsvidParams;
use finial_proto::types;
use finial_runtime::Spawner;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tonic::{Code, Status};

/// As log lines say it.
const SUBSYSTEM: &str = "manager";

/// SVIDs in one request: the server counts each against its limit.
const BATCH: usize = 100;
/// How many are kept, unless configured.
const KEPT: usize = 1000;
/// After a failure the server is left alone for this time. Milliseconds.
const RETRY_MS: i64 = 5_000;

/// A token with the key that it is bound to.
pub(crate) struct WitSvid {
    pub(crate) id: SpiffeId,
    pub(crate) token: String,
    /// A private JWK.
    pub(crate) key: Secret<String>,
    expires_at: UnixSeconds,
    /// From then on it is to be renewed. Milliseconds since the epoch.
    rotate_at_ms: i64,
    /// Of the entry, when it was issued.
    revision_number: i64,
    /// Who signed it; none if that was tainted even then: a server that still signs with it would give the same again.
    key_id: Option<String>,
}

impl WitSvid {
    fn serves(&self, now_ms: i64) -> bool {
        now_ms < self.expires_at.saturating_mul(1000)
    }

    fn is_fresh(&self, entry: &WorkloadEntry, tainted: &[String], now_ms: i64) -> bool {
        now_ms < self.rotate_at_ms
            && self.revision_number == entry.revision_number
            && self.key_id.as_ref().is_none_or(|key| !tainted.contains(key))
    }
}

/// What there is for some entries.
pub(crate) struct Held {
    /// In their order.
    pub(crate) svids: Vec<(Arc<WorkloadEntry>, Arc<WitSvid>)>,
    /// When to ask again, milliseconds since the epoch.
    pub(crate) again_at_ms: i64,
}

#[derive(Default)]
struct State {
    /// With the number of its last use.
    svids: HashMap<EntryId, (Arc<WitSvid>, u64)>,
    uses: u64,
    /// The last failure, and until when it holds.
    failed: Option<(Status, i64)>,
}

/// Fetches and keeps them.
pub(crate) struct WitFetcher {
    pub(crate) link: Arc<ServerLink>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) rotation: RotationStrategy,
    pub(crate) jitter: Arc<Jitter>,
    pub(crate) key_type: WorkloadKeyType,
    pub(crate) spawner: Spawner,
    /// More are kept only while streams hold them.
    pub(crate) limit: usize,
    state: Mutex<State>,
    /// One call to the server at a time: who waited finds what another one fetched.
    call: tokio::sync::Mutex<()>,
}

impl WitFetcher {
    pub(crate) fn new(
        link: Arc<ServerLink>,
        clock: Arc<dyn Clock>,
        rotation: (RotationStrategy, Arc<Jitter>),
        key_type: WorkloadKeyType,
        limit: usize,
        spawner: Spawner,
    ) -> Self {
        let (rotation, jitter) = rotation;
        let (state, call) = (Mutex::default(), tokio::sync::Mutex::default());
        Self {
            link,
            clock,
            rotation,
            jitter,
            key_type,
            spawner,
            limit: if limit == 0 { KEPT } else { limit },
            state,
            call,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The SVIDs of these entries, new ones where that is due. `tainted` are authorities that are no longer to be used.
    pub(crate) async fn get(&self, entries: &[Arc<WorkloadEntry>], tainted: &[String]) -> Result<Held, Status> {
        let due = |entries: &[Arc<WorkloadEntry>]| -> Vec<Arc<WorkloadEntry>> {
            let (state, now_ms) = (self.state(), self.clock.now_ms());
            let fresh = |entry: &Arc<WorkloadEntry>| {
                state.svids.get(&entry.id).is_some_and(|(svid, _)| svid.is_fresh(entry, tainted, now_ms))
            };
            entries.iter().filter(|entry| !fresh(entry)).cloned().collect()
        };
        let mut error = None;
        if !due(entries).is_empty() {
            let _turn = self.call.lock().await;
            let due = due(entries);
            if !due.is_empty() {
                error = self.renew(&due, tainted).await.err();
            }
        }
        self.held(entries, error)
    }

    /// What there is now; the error only if nothing of it serves.
    fn held(&self, entries: &[Arc<WorkloadEntry>], error: Option<Status>) -> Result<Held, Status> {
        let now_ms = self.clock.now_ms();
        let mut state = self.state();
        state.uses += 1;
        let use_ = state.uses;
        let mut held = Held { svids: Vec::with_capacity(entries.len()), again_at_ms: i64::MAX };
        if error.is_some() {
            held.again_at_ms = now_ms.saturating_add(RETRY_MS);
        }
        for entry in entries {
            match state.svids.get_mut(&entry.id).filter(|(svid, _)| svid.serves(now_ms)) {
                Some((svid, used)) if svid.id == entry.spiffe_id => {
                    *used = use_;
                    let again = if error.is_some() { svid.expires_at.saturating_mul(1000) } else { svid.rotate_at_ms };
                    held.again_at_ms = held.again_at_ms.min(again.max(now_ms.saturating_add(1)));
                    held.svids.push((entry.clone(), svid.clone()));
                }
                _ => held.again_at_ms = held.again_at_ms.min(now_ms.saturating_add(RETRY_MS)),
            }
        }
        match error {
            Some(error) if held.svids.is_empty() => Err(error),
            _ => Ok(held),
        }
    }

    async fn renew(&self, due: &[Arc<WorkloadEntry>], tainted: &[String]) -> Result<(), Status> {
        let failed = self.state().failed.clone();
        if let Some((status, _)) = failed.filter(|(_, until_ms)| self.clock.now_ms() < *until_ms) {
            return Err(status);
        }
        for some in due.chunks(BATCH) {
            let issued = self.issue(some, tainted).await;
            let mut state = self.state();
            let svids = issued.inspect_err(|status| {
                tracing::error!(subsystem_name = SUBSYSTEM, error = %status.message(), "Failed to fetch WIT-SVIDs");
                state.failed = Some((status.clone(), self.clock.now_ms().saturating_add(RETRY_MS)));
            })?;
            state.failed = None;
            for (id, svid) in svids {
                let used = state.uses;
                state.svids.insert(id, (Arc::new(svid), used));
            }
        }
        forget_unused(&mut self.state().svids, self.limit);
        Ok(())
    }

    async fn issue(&self, due: &[Arc<WorkloadEntry>], tainted: &[String]) -> Result<Vec<(EntryId, WitSvid)>, Status> {
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
    ) -> Result<WitSvid, String> {
        let id = answer.id.as_ref().ok_or("the answer has no SPIFFE ID")?;
        let id = spiffe_id(id).map_err(|e| e.to_string())?;
        if id != entry.spiffe_id {
            return Err(format!("the answer is for {id} instead of {}", entry.spiffe_id));
        }
        if answer.token.is_empty() || answer.expires_at <= answer.issued_at {
            return Err("the answer has no token, or ends before it begins".to_owned());
        }
        let (from, to) = (answer.issued_at.saturating_mul(1000), answer.expires_at.saturating_mul(1000));
        Ok(WitSvid {
            key_id: super::jwt::key_id(&answer.token).filter(|key| !tainted.contains(key)),
            rotate_at_ms: self.rotation.x509_rotate_at(from, to, self.jitter.draw()),
            expires_at: answer.expires_at,
            revision_number: entry.revision_number,
            token: answer.token,
            key,
            id,
        })
    }
}

/// Beyond the limit those go that no stream holds, the least recently used first.
fn forget_unused(svids: &mut HashMap<EntryId, (Arc<WitSvid>, u64)>, limit: usize) {
    let extra = svids.len().saturating_sub(limit);
    if extra == 0 {
        return;
    }
    let unheld = svids.iter().filter(|(_, (svid, _))| Arc::strong_count(svid) == 1);
    let mut unheld: Vec<(u64, EntryId)> = unheld.map(|(id, (_, used))| (*used, id.clone())).collect();
    unheld.sort_unstable();
    for (_, id) in unheld.iter().take(extra) {
        svids.remove(id);
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

    #[test]
    fn what_a_stream_holds_is_kept_beyond_the_limit() {
        let svid = || {
            Arc::new(WitSvid {
                id: SpiffeId::parse("spiffe://td/x").unwrap(),
                token: String::new(),
                key: Secret::new(String::new()),
                expires_at: 0,
                rotate_at_ms: 0,
                revision_number: 0,
                key_id: None,
            })
        };
        let id = |n: u64| EntryId::parse(&format!("e{n}")).unwrap();
        let mut svids: HashMap<_, _> = (0..5).map(|n| (id(n), (svid(), n))).collect();
        let _held = svids[&id(0)].0.clone();
        forget_unused(&mut svids, 2);
        let mut left: Vec<_> = svids.keys().cloned().collect();
        left.sort();
        assert_eq!(left, [id(0), id(4)]);
    }
}
