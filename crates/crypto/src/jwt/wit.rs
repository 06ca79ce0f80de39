//! WIT-SVIDs: tokens that are bound to a key of their holder.

use super::sign::JwsSigner;
use super::verify::{JwtError, JwtKeys, check_times, identify, split, verify_signature};
use crate::bundle::{public_key_from_jwk, public_key_to_jwk};
use crate::key::{Kind, PublicKey, SignatureAlgorithm};
use crate::signer::{SignError, Signer};
use finial_core::{ErrorKind, SpiffeId, UnixSeconds};
use serde::Serialize;
use serde_json::{Map, Value};
use std::sync::Arc;

/// Section 2.2: `typ` is this, always.
const TYPE: &str = "wit+jwt";

/// The claims of a WIT-SVID. There is no audience: that is for the proof of possession to say (section 3.8).
#[derive(Clone, Copy)]
pub struct WitSvidClaims<'a> {
    /// The holder's key (`cnf`).
    pub key: &'a PublicKey,
    /// With which the holder proves that it has it; see [`wit_key_algorithm`].
    pub key_algorithm: SignatureAlgorithm,
    /// When it ends.
    pub exp: UnixSeconds,
    /// When it was issued.
    pub iat: UnixSeconds,
    /// Who issued it; should not be an URL at which OpenID Connect finds keys (section 3.7).
    pub iss: Option<&'a str>,
    /// Whom it identifies.
    pub sub: &'a SpiffeId,
}

/// As Go writes them: by name, the key as go-jose has it.
#[derive(Serialize)]
struct Written<'a> {
    cnf: Confirmation,
    exp: UnixSeconds,
    iat: UnixSeconds,
    #[serde(skip_serializing_if = "Option::is_none")]
    iss: Option<&'a str>,
    sub: &'a str,
}

#[derive(Serialize)]
struct Confirmation {
    jwk: Map<String, Value>,
}

impl WitSvidClaims<'_> {
    fn written(&self) -> Written<'_> {
        let (mut jwk, mut members) = (Map::new(), public_key_to_jwk(self.key, None));
        // go-jose writes the algorithm after what the key is, before its numbers.
        for name in ["kty", "crv"] {
            jwk.extend(members.shift_remove(name).map(|value| (name.to_owned(), value)));
        }
        jwk.insert("alg".into(), self.key_algorithm.jwa().into());
        jwk.extend(members);
        Written { cnf: Confirmation { jwk }, exp: self.exp, iat: self.iat, iss: self.iss, sub: self.sub.as_str() }
    }
}

/// A WIT authority: a signer with its key ID and the header encoded once. Cheap to clone.
#[derive(Clone)]
pub struct WitAuthoritySigner(JwsSigner);

impl WitAuthoritySigner {
    /// Takes a signer and the `kid` of its key.
    pub fn new(signer: Arc<dyn Signer>, key_id: &str) -> Self {
        Self(JwsSigner::new(signer, key_id, TYPE))
    }

    /// The `kid`.
    pub fn key_id(&self) -> &str {
        self.0.key_id()
    }

    /// The signer.
    pub fn signer(&self) -> &Arc<dyn Signer> {
        self.0.signer()
    }

    /// Signs a WIT-SVID in compact serialization.
    pub async fn sign(&self, claims: &WitSvidClaims<'_>) -> Result<String, SignError> {
        self.0.sign(&claims.written()).await
    }

    /// The same without awaiting; `None` when the key is not in this process.
    pub fn sign_now(&self, claims: &WitSvidClaims<'_>) -> Option<Result<String, SignError>> {
        self.0.sign_now(&claims.written())
    }
}

/// Why a WIT-SVID, or a key for one, was not accepted. The texts about keys are SPIRE's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WitError {
    /// Section 3.2: the algorithm of the holder's key goes with the key.
    #[error("unsupported signing algorithm for {key} key: {algorithm}")]
    Algorithm {
        /// `RSA`, or the curve.
        key: &'static str,
        /// What was asked for.
        algorithm: String,
    },
    /// A rule that JWT-SVIDs have too.
    #[error(transparent)]
    Token(#[from] JwtError),
    /// Section 2.2: `typ` is `wit+jwt`.
    #[error("token header type not equal to wit+jwt")]
    Type,
    /// RFC 7515 section 4.1.11: what is critical must be understood.
    #[error("token header has critical parameters that are not supported")]
    Critical,
    /// Section 3.8: there is no audience.
    #[error("token must not have an audience claim")]
    Audience,
    /// Section 3.2: `cnf` holds a public key and its algorithm.
    #[error("token has no usable key in its cnf claim: {0}")]
    Confirmation(String),
}

impl WitError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// The algorithm of that name, if it goes with the key (section 3.2; RSA with any of six, a curve with its own).
pub fn wit_key_algorithm(key: &PublicKey, name: &str) -> Result<SignatureAlgorithm, WitError> {
    let (what, prefixes): (_, &[&str]) = match key.kind() {
        Kind::P256 => ("ec-p256", &["ES256"]),
        Kind::P384 => ("ec-p384", &["ES384"]),
        Kind::P521 => ("ec-p521", &["ES512"]),
        Kind::Rsa(_) => ("RSA", &["RS", "PS"]),
    };
    let algorithm = SignatureAlgorithm::from_jwa(name).filter(|_| prefixes.iter().any(|p| name.starts_with(p)));
    algorithm.ok_or_else(|| WitError::Algorithm { key: what, algorithm: name.to_owned() })
}

/// A WIT-SVID whose signature and times are right. It proves nothing yet: whoever shows it must prove that it holds the
/// key (section 4).
#[derive(Clone, Debug)]
pub struct WitSvid {
    /// `sub`
    pub id: SpiffeId,
    /// The holder's key.
    pub key: PublicKey,
    /// With which the holder proves that it has it.
    pub key_algorithm: SignatureAlgorithm,
    /// `exp`
    pub expires_at: UnixSeconds,
    /// All claims as they are written.
    pub claims: Map<String, Value>,
}

/// Validates a token by the WIT keys of its trust domain, for which `keys` is asked by the bare name.
pub fn verify_wit_svid(
    token: &str,
    keys: impl FnOnce(&str) -> Option<Arc<JwtKeys>>,
    now: UnixSeconds,
) -> Result<WitSvid, WitError> {
    let parts = split(token)?;
    if parts.header.typ.as_deref() != Some(TYPE) {
        return Err(WitError::Type);
    }
    if parts.header.critical {
        return Err(WitError::Critical);
    }
    let (id, expires_at) = identify(&parts)?;
    let name = id.trust_domain_name();
    let keys = keys(name).ok_or_else(|| JwtError::UnknownTrustDomain(name.to_owned()))?;
    verify_signature(&keys, &id, &parts)?;
    if parts.claims.contains_key("aud") {
        return Err(WitError::Audience);
    }
    let unusable = |why: &str| WitError::Confirmation(why.to_owned());
    let jwk = parts.claims.get("cnf").and_then(|cnf| cnf.get("jwk")).and_then(Value::as_object);
    let jwk = jwk.ok_or_else(|| unusable("there is no jwk"))?;
    let algorithm = jwk.get("alg").and_then(Value::as_str).ok_or_else(|| unusable("the jwk has no alg"))?;
    let key = public_key_from_jwk(jwk).map_err(|e| unusable(&e.to_string()))?;
    let key_algorithm = wit_key_algorithm(&key, algorithm)?;
    // `iat` says nothing of when it becomes valid (section 3.6).
    let mut times = parts.claims.clone();
    times.remove("iat");
    check_times(&times, expires_at, now)?;
    Ok(WitSvid { id, key, key_algorithm, expires_at, claims: parts.claims })
}
