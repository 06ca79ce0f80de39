//! Bundle documents: the SPIFFE bundle format (a JWK set), and the JWK sets of the Workload API.

use crate::key::{KeyError, PublicKey};
use crate::x509::ParseError;
use finial_core::{Bundle, ErrorKind, TrustDomain};

/// Largest bundle document that is read, in bytes.
pub const BUNDLE_BYTES_MAX: usize = 4 << 20;

/// Why a bundle document was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// Larger than [`BUNDLE_BYTES_MAX`].
    #[error("bundle is larger than {BUNDLE_BYTES_MAX} bytes")]
    TooLarge,
    /// Not JSON, or not of that shape.
    #[error("unable to parse JWKS: {0}")]
    Json(String),
    /// Section 4.1.3: `keys` is there.
    #[error("no authorities found")]
    NoKeys,
    /// X509-SVID section 6.1: exactly one certificate per key.
    #[error("expected a single certificate in x509-svid entry {index}; got {found}")]
    CertificateCount {
        /// Which key of the set.
        index: usize,
        /// How many there are.
        found: usize,
    },
    /// An x5c value is not a certificate.
    #[error("certificate in x509-svid entry {index} is malformed: {cause}")]
    Certificate {
        /// Which key of the set.
        index: usize,
        /// What is wrong.
        cause: ParseError,
    },
    /// JWT-SVID section 6.1: a `kid` is needed.
    #[error("error adding authority {0} of JWKS: keyID cannot be empty")]
    NoKeyId(usize),
    /// A key that we do not take.
    #[error("error adding authority {index} of JWKS: {cause}")]
    Key {
        /// Which key of the set.
        index: usize,
        /// What is wrong.
        cause: KeyError,
    },
}

impl BundleError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// What a bundle document contains and how it is written.
#[derive(Clone, Copy, Debug)]
pub struct BundleFormat {
    /// Write the `x509-svid` keys.
    pub x509: bool,
    /// Write the `jwt-svid` keys.
    pub jwt: bool,
    /// Write the `wit-svid` keys.
    pub wit: bool,
    /// A plain JWK set: no `use`, no `spiffe_sequence`, no `spiffe_refresh_hint`.
    pub standard: bool,
    /// Indent by four spaces, as SPIRE does; else no whitespace.
    pub pretty: bool,
}

impl BundleFormat {
    /// Everything, indented: the document of a federation endpoint.
    pub const SPIFFE: Self = Self { x509: true, jwt: true, wit: true, standard: false, pretty: true };
}

/// Writes a bundle document. A refresh hint or sequence number of 0 is left out.
pub fn bundle_to_json(bundle: &Bundle, format: BundleFormat) -> Result<String, KeyError> {
    let _ = (bundle, format);
    todo!()
}

/// A trust domain's JWT keys as the Workload API carries them: `{"keys":[...]}`, never null.
pub fn jwt_bundle_json(bundle: &Bundle) -> Result<String, KeyError> {
    let _ = bundle;
    todo!()
}

/// Reads a bundle document; keys of unknown type or use are ignored (section 4.1.3 and 4.2).
pub fn bundle_from_json(trust_domain: &TrustDomain, json: &[u8]) -> Result<Bundle, BundleError> {
    let _ = (trust_domain, json);
    todo!()
}

/// One public key as a JWK object (RFC 7517), without `use`; `kid` if given.
pub fn public_key_to_jwk(key: &PublicKey, key_id: Option<&str>) -> serde_json::Map<String, serde_json::Value> {
    let _ = (key, key_id);
    todo!()
}

/// The public key of a JWK object (`EC` or `RSA`).
pub fn public_key_from_jwk(jwk: &serde_json::Map<String, serde_json::Value>) -> Result<PublicKey, KeyError> {
    let _ = jwk;
    todo!()
}
