//! Validation of JWT-SVIDs.

use crate::key::{KeyError, PublicKey, SignatureAlgorithm};
use crate::signer::ecdsa_raw_to_der;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use finial_core::{Bundle, ErrorKind, JwtAuthority, SpiffeId, SpiffeIdError, UnixSeconds};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::sync::Arc;

/// Longest token that is looked at, in bytes: room for the 16 KiB of audiences that our server signs, and for claims of
/// composers.
pub const TOKEN_BYTES_MAX: usize = 64 << 10;
/// How far clocks may be apart, in seconds: so long after `exp` a token still passes, as with SPIRE's library.
pub const LEEWAY_SECONDS: i64 = 60;

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
    #[error("unable to parse JWT token: unexpected signature algorithm {0:?}; expected {list}", list = allowed())]
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
    /// An agent's cache needs `iat`.
    #[error("JWT missing iat claim")]
    NoIssuedAt,
    /// Section 3.3: `exp` is not past.
    #[error("token has expired")]
    Expired,
    /// RFC 7519 section 4.1.5: `nbf` is not in the future.
    #[error("go-jose/go-jose/jwt: validation failed, token not valid yet (nbf)")]
    NotYetValid,
    /// RFC 7519 section 4.1.6: `iat` is not in the future.
    #[error("go-jose/go-jose/jwt: validation field, token issued in the future (iat)")]
    IssuedInFuture,
    /// Section 3.2: `aud` is set, and holds the validator's own name.
    #[error("expected audience in {} (audience={})", quoted(expected), quoted(found))]
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

/// JWT (or WIT) keys of one trust domain by their key IDs, parsed once. Share it behind an `Arc`.
#[derive(Default)]
pub struct JwtKeys {
    keys: HashMap<String, PublicKey>,
}

impl JwtKeys {
    /// The JWT keys of a bundle.
    pub fn from_bundle(bundle: &Bundle) -> Result<Self, KeyError> {
        Self::of(&bundle.jwt_authorities)
    }

    /// The WIT keys of a bundle.
    pub fn wit_from_bundle(bundle: &Bundle) -> Result<Self, KeyError> {
        Self::of(&bundle.wit_authorities)
    }

    fn of(authorities: &[JwtAuthority]) -> Result<Self, KeyError> {
        let mut keys = HashMap::with_capacity(authorities.len());
        for authority in authorities {
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
    pub claims: Map<String, Value>,
}

/// The three parts of a token, the first two decoded.
pub(super) struct Parts<'a> {
    algorithm: SignatureAlgorithm,
    pub(super) header: Header,
    pub(super) claims: Map<String, Value>,
    signed: &'a str,
    signature: Vec<u8>,
}

/// Validates a token for someone who identifies with any of `audience`.
pub fn verify_jwt_svid(
    token: &str,
    keys: &dyn JwtKeySource,
    audience: &[String],
    now: UnixSeconds,
) -> Result<JwtSvid, JwtError> {
    let parts = split_jwt(token)?;
    let (id, expires_at) = identify(&parts)?;
    let name = id.trust_domain_name();
    let keys = keys.jwt_keys(name).ok_or_else(|| JwtError::UnknownTrustDomain(name.to_owned()))?;
    verify_signature(&keys, &id, &parts)?;
    let found = audience_of(&parts.claims)?;
    if !found.iter().any(|a| audience.contains(a)) {
        return Err(JwtError::Audience { expected: audience.to_vec(), found });
    }
    check_times(&parts.claims, expires_at, now)?;
    Ok(JwtSvid { id, audience: found, expires_at, claims: parts.claims })
}

/// `iat` and `exp` of a token without verifying it: for one's own cache of tokens that one's server signed.
pub fn jwt_svid_times(token: &str) -> Result<(UnixSeconds, UnixSeconds), JwtError> {
    let claims = split_jwt(token)?.claims;
    let issued_at = date(&claims, "iat")?.ok_or(JwtError::NoIssuedAt)?;
    Ok((issued_at, date(&claims, "exp")?.ok_or(JwtError::NoExpiry)?))
}

/// `sub` and `exp`, where the key ID is there too.
pub(super) fn identify(parts: &Parts<'_>) -> Result<(SpiffeId, UnixSeconds), JwtError> {
    if parts.header.kid.is_empty() {
        return Err(JwtError::NoKeyId);
    }
    let subject = match parts.claims.get("sub") {
        None | Some(Value::Null) => return Err(JwtError::NoSubject),
        Some(Value::String(text)) if text.is_empty() => return Err(JwtError::NoSubject),
        Some(Value::String(text)) => text,
        Some(_) => return Err(JwtError::Malformed("sub claim")),
    };
    let expires_at = date(&parts.claims, "exp")?.ok_or(JwtError::NoExpiry)?;
    Ok((SpiffeId::parse(subject).map_err(JwtError::BadSubject)?, expires_at))
}

/// The parts of a token whose header is that of a JWT-SVID.
fn split_jwt(token: &str) -> Result<Parts<'_>, JwtError> {
    let parts = split(token)?;
    if let Some(name) = parts.header.other {
        return Err(JwtError::Header(name));
    }
    if parts.header.typ.as_ref().is_some_and(|typ| typ != "JWT" && typ != "JOSE") {
        return Err(JwtError::Type);
    }
    Ok(parts)
}

/// The parts of any token with an algorithm that is allowed; what else its header says is for the caller to judge.
pub(super) fn split(token: &str) -> Result<Parts<'_>, JwtError> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(JwtError::TooLarge);
    }
    let (signed, signature) = token.rsplit_once('.').ok_or(JwtError::NotCompact)?;
    let (header, payload) = signed.split_once('.').ok_or(JwtError::NotCompact)?;
    if payload.contains('.') {
        return Err(JwtError::NotCompact);
    }
    let decode = |part: &str, what| BASE64URL.decode(part).map_err(|_| JwtError::Malformed(what));
    let header: Header =
        serde_json::from_slice(&decode(header, "header")?).map_err(|_| JwtError::Malformed("header"))?;
    let algorithm = SignatureAlgorithm::from_jwa(&header.alg).ok_or_else(|| JwtError::Algorithm(header.alg.clone()))?;
    let claims = serde_json::from_slice(&decode(payload, "claims")?).map_err(|_| JwtError::Malformed("claims"))?;
    let signature = decode(signature, "signature")?;
    Ok(Parts { algorithm, header, claims, signed, signature })
}

/// The JOSE header. Section 2 of JWT-SVID allows three parameters and no other.
#[derive(Default)]
pub(super) struct Header {
    alg: String,
    kid: String,
    pub(super) typ: Option<String>,
    /// The first parameter that is not one of the three.
    other: Option<String>,
    /// Whether `crit` is one of them: something must be understood that is not (RFC 7515 section 4.1.11).
    pub(super) critical: bool,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JOSE header")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                let mut seen = Vec::with_capacity(3);
                while let Some(name) = map.next_key::<String>()? {
                    // RFC 7515 section 4: the names must be unique.
                    if seen.contains(&name) {
                        return Err(serde::de::Error::custom("duplicate header"));
                    }
                    match name.as_str() {
                        "alg" => header.alg = map.next_value()?,
                        "kid" => header.kid = map.next_value()?,
                        "typ" => header.typ = Some(map.next_value()?),
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            header.critical |= name == "crit";
                            header.other.get_or_insert_with(|| name.clone());
                        }
                    }
                    seen.push(name);
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// Checks the signature with the key that the header names.
pub(super) fn verify_signature(keys: &JwtKeys, id: &SpiffeId, parts: &Parts<'_>) -> Result<(), JwtError> {
    let key_id = &parts.header.kid;
    let unknown = || JwtError::UnknownKey { key_id: key_id.clone(), trust_domain: id.trust_domain_name().to_owned() };
    let key = keys.key(key_id).ok_or_else(unknown)?;
    let message = parts.signed.as_bytes();
    let verified = match parts.algorithm.ecdsa_scalar_len() {
        Some(len) => {
            let der = ecdsa_raw_to_der(&parts.signature, len).ok_or(JwtError::Signature)?;
            key.verify(parts.algorithm, message, &der)
        }
        None => key.verify(parts.algorithm, message, &parts.signature),
    };
    verified.map_err(|_| JwtError::Signature)
}

/// `aud`: an array of strings, or one string (RFC 7519 section 4.1.3).
fn audience_of(claims: &Map<String, Value>) -> Result<Vec<String>, JwtError> {
    match claims.get("aud") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![one.clone()]),
        Some(Value::Array(list)) => {
            list.iter().map(|item| item.as_str().map(str::to_owned).ok_or(JwtError::Malformed("aud claim"))).collect()
        }
        Some(_) => Err(JwtError::Malformed("aud claim")),
    }
}

/// A NumericDate in whole seconds; it may be written with a fraction (RFC 7519 section 2).
fn date(claims: &Map<String, Value>, name: &'static str) -> Result<Option<UnixSeconds>, JwtError> {
    match claims.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => {
            let seconds = number.as_i64().or_else(|| number.as_f64().map(|f| f as i64));
            seconds.map(Some).ok_or(JwtError::Malformed("numeric date"))
        }
        Some(_) => Err(JwtError::Malformed("numeric date")),
    }
}

pub(super) fn check_times(
    claims: &Map<String, Value>,
    expires_at: UnixSeconds,
    now: UnixSeconds,
) -> Result<(), JwtError> {
    let latest = now.saturating_add(LEEWAY_SECONDS);
    if date(claims, "nbf")?.is_some_and(|not_before| latest < not_before) {
        return Err(JwtError::NotYetValid);
    }
    if now.saturating_sub(LEEWAY_SECONDS) > expires_at {
        return Err(JwtError::Expired);
    }
    if date(claims, "iat")?.is_some_and(|issued_at| latest < issued_at) {
        return Err(JwtError::IssuedInFuture);
    }
    Ok(())
}

/// A list as Go prints it with `%q`.
fn quoted(list: &[String]) -> String {
    let items: Vec<String> = list.iter().map(|item| format!("{item:?}")).collect();
    format!("[{}]", items.join(" "))
}

fn allowed() -> String {
    quoted(&SignatureAlgorithm::ALL.map(|a| a.jwa().to_owned()))
}
