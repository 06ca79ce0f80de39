//! Validation of JWT-SVIDs.

use crate::key::{KeyError, PublicKey};
use finial_core::{Bundle, ErrorKind, SpiffeId, SpiffeIdError, UnixSeconds};
use std::collections::HashMap;
use std::sync::Arc;

/// Longest token that is looked at, in bytes.
pub const TOKEN_BYTES_MAX: usize = 16 << 10;
/// How long after `exp` a token still passes, in seconds, as SPIRE's library allows.
pub const EXPIRY_LEEWAY_SECONDS: i64 = 60;

/// Which rule a token broke. Each MUST of JWT-SVID is a variant of its own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JwtError {
    /// Longer than [`TOKEN_BYTES_MAX`].
    #[error("unable to parse JWT token: token is too large")]
    TooLarge,
    /// Section 5.1: compact serialization only.
    #[error("unable to parse JWT token: go-jose/go-jose: compact JWS format must have three parts")]
    NotCompact,
    /// Not base64url or not JSON; names the part.
    #[error("unable to parse JWT token: malformed {0}")]
    Malformed(&'static str),
    /// Section 2.1: the algorithm is one of nine.
    #[error("unable to parse JWT token: unexpected signature algorithm {0:?}")]
    Algorithm(String),
    /// Section 2: a header that is not allowed (`crit` and the like).
    #[error("unable to parse JWT token: unexpected header {0:?}")]
    Header(String),
    /// Section 2.3: `typ` is `JWT` or `JOSE`.
    #[error("token header type not equal to either JWT or JOSE")]
    Type,
    /// SPIRE needs a `kid`.
    #[error("token header missing key id")]
    NoKeyId,
    /// Section 3.1: `sub` is set.
    #[error("token missing subject claim")]
    NoSubject,
    /// Section 3.1: `sub` is a SPIFFE ID.
    #[error("token has in invalid subject claim: {0}")]
    BadSubject(SpiffeIdError),
    /// Section 3.3: `exp` is set.
    #[error("token missing exp claim")]
    NoExpiry,
    /// Section 3.3: `exp` is not past.
    #[error("token has expired")]
    Expired,
    /// RFC 7519 section 4.1.5: `nbf` is not in the future.
    #[error("token is not valid yet")]
    NotYetValid,
    /// RFC 7519 section 4.1.6: `iat` is not in the future.
    #[error("token was issued in the future")]
    IssuedInFuture,
    /// Section 3.2: `aud` is set, and holds the validator's own name.
    #[error("expected audience in {expected:?} (audience={found:?})")]
    Audience {
        /// What the validator identifies with.
        expected: Vec<String>,
        /// What the token says.
        found: Vec<String>,
    },
    /// There is no bundle of that trust domain.
    #[error("no keys found for trust domain {0:?}")]
    UnknownTrustDomain(String),
    /// The bundle has no such key.
    #[error("public key {key_id:?} not found in trust domain {trust_domain:?}")]
    UnknownKey {
        /// The `kid`.
        key_id: String,
        /// The trust domain of `sub`.
        trust_domain: String,
    },
    /// The signature does not verify, or was made with another kind of key.
    #[error("go-jose/go-jose: error in cryptographic primitive")]
    Signature,
}

impl JwtError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// JWT keys of one trust domain by their key IDs, parsed once. Share it behind an `Arc`.
#[derive(Default)]
pub struct JwtKeys {
    keys: HashMap<String, PublicKey>,
}

impl JwtKeys {
    /// The JWT keys of a bundle.
    pub fn from_bundle(bundle: &Bundle) -> Result<Self, KeyError> {
        let mut keys = HashMap::with_capacity(bundle.jwt_authorities.len());
        for authority in &bundle.jwt_authorities {
            keys.insert(authority.key_id.clone(), PublicKey::from_spki(&authority.public_key)?);
        }
        Ok(Self { keys })
    }

    /// One key.
    pub fn key(&self, key_id: &str) -> Option<&PublicKey> {
        self.keys.get(key_id)
    }
}

/// Gives the JWT keys of trust domains.
pub trait JwtKeySource: Send + Sync {
    /// The keys of that trust domain (its bare name), if it is trusted at all.
    fn jwt_keys(&self, trust_domain: &str) -> Option<Arc<JwtKeys>>;
}

/// A valid JWT-SVID.
#[derive(Clone, Debug)]
pub struct JwtSvid {
    /// `sub`
    pub id: SpiffeId,
    /// `aud`, also when it was written as a single string.
    pub audience: Vec<String>,
    /// `exp`
    pub expires_at: UnixSeconds,
    /// All claims as they are written.
    pub claims: serde_json::Map<String, serde_json::Value>,
}

/// Validates a token for someone who identifies with any of `audience`.
pub fn verify_jwt_svid(
    token: &str,
    keys: &dyn JwtKeySource,
    audience: &[String],
    now: UnixSeconds,
) -> Result<JwtSvid, JwtError> {
    let _ = (token, keys, audience, now);
    todo!()
}

/// `iat` and `exp` of a token without verifying it: for one's own cache of tokens that one's server signed.
pub fn jwt_svid_times(token: &str) -> Result<(UnixSeconds, UnixSeconds), JwtError> {
    let _ = token;
    todo!()
}
