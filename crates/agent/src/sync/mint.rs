//! Keys and requests for workloads' X.509-SVIDs, and what becomes of the answers.

use crate::cache::{WorkloadSvid, key_bytes};
use crate::entry::WorkloadEntry;
use crate::rotation::{Jitter, RotationStrategy};
use crate::sync::taints::Taints;
use bytes::Bytes;
use finial_config::WorkloadKeyType;
use finial_core::{KeyType, SpiffeId};
use finial_crypto::{Certificate, PrivateKey, SignError, create_csr};
use finial_proto::types;
use finial_runtime::Spawner;
use std::sync::Arc;

/// As log lines say it.
const SUBSYSTEM: &str = "manager";

/// A key for an entry, and the request that goes with it.
pub(crate) struct Request {
    pub(crate) entry: Arc<WorkloadEntry>,
    pub(crate) key: PrivateKey,
    pub(crate) csr: Bytes,
}

pub(crate) async fn request(
    entry: Arc<WorkloadEntry>,
    key_type: WorkloadKeyType,
    spawner: &Spawner,
) -> Result<Request, SignError> {
    let key = new_key(key_type, spawner).await?;
    let csr = create_csr(&key, None, Some(&entry.spiffe_id), &[]).await?;
    Ok(Request { entry, key, csr: csr.into() })
}

/// A key for a workload.
pub(crate) async fn new_key(key_type: WorkloadKeyType, spawner: &Spawner) -> Result<PrivateKey, SignError> {
    match key_type {
        WorkloadKeyType::EcP256 => PrivateKey::generate(KeyType::EcP256),
        WorkloadKeyType::EcP384 => PrivateKey::generate(KeyType::EcP384),
        // Takes a tenth of a second: not on the thread that answers workloads.
        WorkloadKeyType::Rsa2048 => {
            let made = spawner.blocking(|| PrivateKey::generate(KeyType::Rsa2048)).await;
            made.map_err(|_| SignError::Failed)?
        }
    }
}

/// Why an answer cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadAnswer {
    #[error("empty certificate chain")]
    Empty,
    #[error("certificate: {0}")]
    Parse(#[from] finial_crypto::ParseError),
    #[error("{0}")]
    Leaf(#[from] finial_crypto::VerifyError),
    #[error("certificate is not for our key")]
    OtherKey,
    #[error("certificate is for {0}")]
    OtherId(SpiffeId),
}

/// Checks an answer and makes it what the cache holds.
pub(crate) fn svid(
    request: &Request,
    answer: &types::X509svid,
    strategy: RotationStrategy,
    jitter: &Jitter,
    tainted: &Taints,
) -> Result<WorkloadSvid, BadAnswer> {
    let parsed: Result<Vec<_>, _> = answer.cert_chain.iter().map(|der| Certificate::parse(der.as_ref())).collect();
    let parsed = parsed?;
    let leaf = parsed.first().ok_or(BadAnswer::Empty)?;
    if leaf.spki_der() != request.key.public_key().spki_der().as_ref() {
        return Err(BadAnswer::OtherKey);
    }
    // What an entry was changed to is known before it is asked for again.
    let id = leaf.spiffe_id()?;
    if id != request.entry.spiffe_id {
        return Err(BadAnswer::OtherId(id));
    }
    let (from, to) = (leaf.not_before().saturating_mul(1000), leaf.not_after().saturating_mul(1000));
    if strategy.falls_back(to - from) {
        tracing::warn!(subsystem_name = SUBSYSTEM, spiffe_id = %request.entry.spiffe_id, entry_id = %request.entry.id,
            "X509 SVID lifetime isn't long enough to guarantee the availability_target, falling back to the default rotation strategy"
        );
    }
    Ok(WorkloadSvid {
        id,
        chain: answer.cert_chain.concat().into(),
        key: key_bytes(request.key.pkcs8_der()),
        not_after: leaf.not_after(),
        rotate_at_ms: strategy.x509_rotate_at(from, to, jitter.draw()),
        revision_number: request.entry.revision_number,
        created_at: request.entry.created_at,
        signed_by: parsed.iter().filter_map(Certificate::authority_key_id).map(Into::into).collect(),
        issued_in: tainted.round(),
    })
}
