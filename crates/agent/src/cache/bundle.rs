//! Bundles with everything that is derived from them, made once when they change.

use bytes::Bytes;
use finial_core::{Bundle, TrustDomain};
use finial_crypto::bundle::jwt_bundle_json;
use finial_crypto::{Certificate, JwtKeys, KeyError, ParseError, TrustRoots};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A bundle in all the forms in which it is asked for.
pub(crate) struct BundleForms {
    pub(crate) bundle: Bundle,
    /// `spiffe://TD`, the key in the Workload API's maps.
    pub(crate) id: String,
    /// The X.509 roots, DER, one after the other.
    pub(crate) x509: Bytes,
    /// The JWT keys as a JWK set.
    pub(crate) jwks: Bytes,
    pub(crate) roots: Arc<TrustRoots>,
    pub(crate) jwt_keys: Arc<JwtKeys>,
}

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadBundle {
    #[error("X.509 authority: {0}")]
    X509(#[from] ParseError),
    #[error("JWT authority: {0}")]
    Jwt(#[from] KeyError),
}

impl BundleForms {
    pub(crate) fn new(bundle: Bundle) -> Result<Self, BadBundle> {
        let ders = || bundle.x509_authorities.iter().map(|a| a.der.as_ref());
        Ok(Self {
            id: bundle.trust_domain.id_string(),
            x509: ders().flatten().copied().collect::<Vec<u8>>().into(),
            jwks: jwt_bundle_json(&bundle)?.into(),
            roots: Arc::new(TrustRoots::from_bundle(&bundle)?),
            jwt_keys: Arc::new(JwtKeys::from_bundle(&bundle)?),
            bundle,
        })
    }

    /// Subject key IDs of tainted X.509 authorities.
    pub(crate) fn tainted_x509(&self) -> Vec<Vec<u8>> {
        let tainted = self.bundle.x509_authorities.iter().filter(|a| a.tainted);
        tainted.filter_map(|a| Some(Certificate::parse(a.der.clone()).ok()?.subject_key_id()?.to_vec())).collect()
    }

    /// Key IDs of tainted JWT authorities.
    pub(crate) fn tainted_jwt(&self) -> Vec<String> {
        self.bundle.jwt_authorities.iter().filter(|a| a.tainted).map(|a| a.key_id.clone()).collect()
    }
}

impl std::fmt::Debug for BundleForms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BundleForms({})", self.id)
    }
}

/// The agent's own bundle and the federated ones.
#[derive(Clone, Debug)]
pub(crate) struct Bundles {
    pub(crate) own: Arc<BundleForms>,
    pub(crate) federated: BTreeMap<TrustDomain, Arc<BundleForms>>,
}
