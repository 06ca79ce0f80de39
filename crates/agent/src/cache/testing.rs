//! Values for tests.

use super::{BundleForms, CachedWit, WorkloadSvid};
use crate::entry::WorkloadEntry;
use finial_core::{Bundle, EntryId, JwtAuthority, Secret, Selector, SelectorSet, SpiffeId, TrustDomain};
use finial_crypto::PrivateKey;
use std::sync::Arc;

pub(crate) fn selectors(texts: &[&str]) -> SelectorSet {
    texts.iter().map(|t| Selector::parse(t).unwrap()).collect()
}

pub(crate) fn entry(id: &str, spiffe_id: &str, texts: &[&str]) -> WorkloadEntry {
    WorkloadEntry {
        id: EntryId::parse(id).unwrap(),
        spiffe_id: SpiffeId::parse(spiffe_id).unwrap(),
        selectors: selectors(texts).into(),
        federates_with: Vec::new(),
        revision_number: 0,
        created_at: 1,
        hint: String::new(),
        store_svid: false,
        disable_x509_svid_prefetch: false,
        jwt_svid_include_jti: false,
        admin: false,
        downstream: false,
    }
}

pub(crate) fn svid(entry: &WorkloadEntry, serial: u8) -> WorkloadSvid {
    WorkloadSvid {
        id: entry.spiffe_id.clone(),
        chain: vec![serial; 4].into(),
        key: vec![serial; 2].into(),
        not_after: 2_000,
        rotate_at_ms: 1_000_000,
        revision_number: entry.revision_number,
        created_at: entry.created_at,
        signed_by: vec![vec![7].into()],
        issued_in: 0,
    }
}

/// A token that ends at 2000.
pub(crate) fn wit(entry: &WorkloadEntry) -> CachedWit {
    CachedWit {
        id: entry.spiffe_id.clone(),
        token: format!("token of {}", entry.id),
        key: Secret::new(format!("key of {}", entry.id)),
        expires_at: 2_000,
        rotate_at_ms: 1_000_000,
        revision_number: entry.revision_number,
        created_at: entry.created_at,
        key_id: Some("k1".to_owned()),
    }
}

/// A bundle without X.509 roots whose JWT keys have these IDs.
pub(crate) fn bundle(trust_domain: &str, key_ids: &[&str]) -> Arc<BundleForms> {
    let key = PrivateKey::generate(finial_core::KeyType::EcP256).unwrap();
    let authority = |id: &&str| JwtAuthority {
        key_id: (*id).to_owned(),
        public_key: key.public_key().spki_der().clone(),
        expires_at: 0,
        tainted: false,
    };
    let mut bundle = Bundle::empty(TrustDomain::parse(trust_domain).unwrap());
    bundle.jwt_authorities = key_ids.iter().map(authority).collect();
    Arc::new(BundleForms::new(bundle).unwrap())
}

/// The index of these records.
pub(crate) fn index(records: &[super::Record]) -> super::index::SelectorIndex {
    super::index::SelectorIndex::new(records.iter().map(|r| r.entry.as_ref()))
}
