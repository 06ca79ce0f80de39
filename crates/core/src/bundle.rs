//! Bundles: the public authorities of a trust domain.

use crate::{Secret, SpiffeId, TrustDomain, UnixSeconds};
use std::sync::Arc;

/// An X.509 authority: one root certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct X509Authority {
    /// The certificate, DER.
    pub der: Arc<[u8]>,
    /// Set when the authority is to be abandoned before it expires.
    pub tainted: bool,
}

/// A JWT (or WIT) authority: one public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtAuthority {
    /// The key ID that tokens name in their `kid` header.
    pub key_id: String,
    /// The public key, PKIX SubjectPublicKeyInfo, DER.
    pub public_key: Arc<[u8]>,
    /// When it ends; 0 = never.
    pub expires_at: UnixSeconds,
    /// Set when the authority is to be abandoned before it expires.
    pub tainted: bool,
}

/// All authorities of one trust domain at one sequence number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// Whose authorities these are.
    pub trust_domain: TrustDomain,
    /// X.509 roots, in order of their addition.
    pub x509_authorities: Vec<X509Authority>,
    /// JWT keys, in order of their addition.
    pub jwt_authorities: Vec<JwtAuthority>,
    /// WIT keys, in order of their addition.
    pub wit_authorities: Vec<JwtAuthority>,
    /// How often, in seconds, others should fetch it again; 0 = not said.
    pub refresh_hint: i64,
    /// Grows with each change.
    pub sequence_number: u64,
}

impl Bundle {
    /// A bundle without authorities.
    pub fn empty(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            x509_authorities: Vec::new(),
            jwt_authorities: Vec::new(),
            wit_authorities: Vec::new(),
            refresh_hint: 0,
            sequence_number: 0,
        }
    }
}

/// An X.509-SVID with its private key, as its holder keeps it.
#[derive(Clone)]
pub struct X509Svid {
    /// The one URI SAN of the leaf.
    pub id: SpiffeId,
    /// Leaf first, then intermediates; DER each. Never the root.
    pub chain: Vec<Arc<[u8]>>,
    /// PKCS#8, DER.
    pub key: Arc<Secret<Vec<u8>>>,
    /// From the leaf.
    pub not_before: UnixSeconds,
    /// From the leaf.
    pub not_after: UnixSeconds,
}
