//! Bundle documents: the SPIFFE bundle format (a JWK set), and the JWK sets of the Workload API.

use crate::key::{KeyError, Kind, PublicKey};
use crate::random::sha256_hex;
use crate::x509::{Certificate, ParseError, TrustRoots};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD as BASE64URL};
use finial_core::{Bundle, ErrorKind, JwtAuthority, TrustDomain, X509Authority};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::sync::Arc;

const X509_SVID: &str = "x509-svid";
const JWT_SVID: &str = "jwt-svid";
const WIT_SVID: &str = "wit-svid";
/// Everything in an Ed25519 SubjectPublicKeyInfo up to the 32 bytes of the key.
const ED25519_PREFIX: &[u8] = &[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

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
    /// RFC 7517 section 4.7: the certificate holds another key than the JWK.
    #[error("certificate and key of x509-svid entry {0} do not match")]
    KeyMismatch(usize),
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

/// An authority that is of no use here, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{authority}: {cause}")]
pub struct Unusable {
    /// Names it.
    pub authority: String,
    /// What is wrong with it.
    pub cause: ParseError,
}

/// A bundle without the authorities that cannot be read, as one must not take the others with it. Tells of these, and of
/// roots with a kind of key that cannot be used: workloads may know better, but documents are without them.
pub fn readable(bundle: &Bundle) -> (Bundle, Vec<Unusable>) {
    let (mut readable, mut unusable) = (bundle.clone(), Vec::new());
    let mut note = |authority, cause| unusable.push(Unusable { authority, cause });
    readable.x509_authorities.retain(|root| {
        let anchor = TrustRoots::new([&root.der]).map(drop);
        let kept = anchor.is_ok();
        if let Err(cause) = anchor.and_then(|()| x509_jwk(root).map(drop)) {
            note(format!("X.509 authority with SHA-256 {}", sha256_hex(&root.der)), cause);
        }
        kept
    });
    for (kind, keys) in [("JWT", &mut readable.jwt_authorities), ("WIT", &mut readable.wit_authorities)] {
        keys.retain(|key| match key_jwk(key) {
            Ok(_) => true,
            Err(cause) => {
                note(format!("{kind} authority {:?}", key.key_id), cause.into());
                false
            }
        });
    }
    (readable, unusable)
}

/// Writes a bundle document, without those authorities that [`readable`] tells of. A refresh hint or sequence number of 0 is
/// left out.
pub fn bundle_to_json(bundle: &Bundle, format: BundleFormat) -> String {
    let mut keys = Vec::new();
    let mut add = |name: &str, members: Option<Map<String, Value>>| {
        let Some(members) = members else { return };
        let mut jwk = Map::new();
        if !format.standard {
            jwk.insert("use".into(), name.into());
        }
        jwk.extend(members);
        keys.push(Value::Object(jwk));
    };
    bundle.x509_authorities.iter().filter(|_| format.x509).for_each(|root| add(X509_SVID, x509_jwk(root).ok()));
    bundle.jwt_authorities.iter().filter(|_| format.jwt).for_each(|key| add(JWT_SVID, key_jwk(key).ok()));
    bundle.wit_authorities.iter().filter(|_| format.wit).for_each(|key| add(WIT_SVID, key_jwk(key).ok()));
    let mut document = Map::new();
    document.insert("keys".into(), Value::Array(keys));
    if !format.standard && bundle.sequence_number != 0 {
        document.insert("spiffe_sequence".into(), bundle.sequence_number.into());
    }
    if !format.standard && bundle.refresh_hint != 0 {
        document.insert("spiffe_refresh_hint".into(), bundle.refresh_hint.into());
    }
    if format.pretty { pretty(&document) } else { Value::Object(document).to_string() }
}

fn x509_jwk(root: &X509Authority) -> Result<Map<String, Value>, ParseError> {
    let certificate = Certificate::parse(root.der.clone())?;
    let mut jwk = match certificate.spki_der().strip_prefix(ED25519_PREFIX) {
        // Only roots have such keys: none of JWT-SVID's algorithms goes with them.
        Some(key) => {
            let member = |(name, value): (&str, String)| (name.to_owned(), Value::from(value));
            let members = [("kty", "OKP".into()), ("crv", "Ed25519".into()), ("x", BASE64URL.encode(key))];
            members.into_iter().map(member).collect()
        }
        None => public_key_to_jwk(&certificate.public_key()?, None),
    };
    jwk.insert("x5c".into(), Value::Array(vec![BASE64.encode(&root.der).into()]));
    Ok(jwk)
}

fn key_jwk(authority: &JwtAuthority) -> Result<Map<String, Value>, KeyError> {
    Ok(public_key_to_jwk(&PublicKey::from_spki(&authority.public_key)?, Some(&authority.key_id)))
}

/// Four spaces, as SPIRE indents.
fn pretty(document: &Map<String, Value>) -> String {
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    // Writing values to memory does not fail, and JSON is UTF-8.
    let _ = document.serialize(&mut serializer);
    String::from_utf8(out).unwrap_or_default()
}

/// A trust domain's JWT keys as the Workload API carries them: `{"keys":[...]}`, never null.
pub fn jwt_bundle_json(bundle: &Bundle) -> String {
    bundle_to_json(bundle, BundleFormat { x509: false, jwt: true, wit: false, standard: true, pretty: true })
}

/// A trust domain's WIT keys in the same form.
pub fn wit_bundle_json(bundle: &Bundle) -> String {
    bundle_to_json(bundle, BundleFormat { x509: false, jwt: false, wit: true, standard: true, pretty: true })
}

/// Reads a bundle document; keys of unknown type or use are ignored (section 4.1.3 and 4.2).
pub fn bundle_from_json(trust_domain: &TrustDomain, json: &[u8]) -> Result<Bundle, BundleError> {
    if json.len() > BUNDLE_BYTES_MAX {
        return Err(BundleError::TooLarge);
    }
    let document: Document = serde_json::from_slice(json).map_err(|e| BundleError::Json(e.to_string()))?;
    let mut bundle = Bundle::empty(trust_domain.clone());
    bundle.refresh_hint = document.spiffe_refresh_hint.unwrap_or(0);
    bundle.sequence_number = document.spiffe_sequence.unwrap_or(0);
    for (index, jwk) in document.keys.ok_or(BundleError::NoKeys)?.iter().enumerate() {
        // Sections 4.1.3, 4.2.1 and 4.2.2: an unknown or missing type or use makes the element ignored.
        match (text(jwk, "use"), text(jwk, "kty")) {
            (Some(X509_SVID), Some("EC" | "RSA" | "OKP")) => add_x509(&mut bundle, index, jwk)?,
            (Some(JWT_SVID), Some("EC" | "RSA")) => add_key(&mut bundle.jwt_authorities, index, jwk)?,
            (Some(WIT_SVID), Some("EC" | "RSA")) => add_key(&mut bundle.wit_authorities, index, jwk)?,
            _ => {}
        }
    }
    Ok(bundle)
}

#[derive(Deserialize)]
struct Document {
    keys: Option<Vec<Map<String, Value>>>,
    spiffe_sequence: Option<u64>,
    spiffe_refresh_hint: Option<i64>,
}

fn text<'a>(jwk: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    jwk.get(name).and_then(Value::as_str)
}

fn add_x509(bundle: &mut Bundle, index: usize, jwk: &Map<String, Value>) -> Result<(), BundleError> {
    // X509-SVID section 6.2: without x5c it is ignored; of several values only the first counts.
    let first = jwk.get("x5c").and_then(Value::as_array).and_then(|list| list.first()).and_then(Value::as_str);
    let Some(first) = first else { return Ok(()) };
    let bad = |cause| BundleError::Certificate { index, cause };
    let der = BASE64.decode(first).map_err(|_| bad(ParseError::Malformed("x5c: not base64")))?;
    let certificate = Certificate::parse(der).map_err(bad)?;
    // RFC 7517 section 4.7: the key of the first certificate is the key of the JWK.
    match spki_from_jwk(jwk) {
        Ok(written) if *written == *certificate.spki_der() => {}
        Ok(_) => return Err(BundleError::KeyMismatch(index)),
        Err(KeyError::UnsupportedCurve(_)) => return Ok(()),
        Err(cause) => return Err(BundleError::Key { index, cause }),
    }
    let der = certificate.der().clone();
    if !bundle.x509_authorities.iter().any(|a| a.der == der) {
        bundle.x509_authorities.push(X509Authority { der, tainted: false });
    }
    Ok(())
}

/// Of a kind that roots have.
fn spki_from_jwk(jwk: &Map<String, Value>) -> Result<Arc<[u8]>, KeyError> {
    if text(jwk, "kty") != Some("OKP") {
        return Ok(public_key_from_jwk(jwk)?.spki_der().clone());
    }
    match text(jwk, "crv") {
        Some("Ed25519") => match number(jwk, "x")? {
            key if key.len() == 32 => Ok([ED25519_PREFIX, &key].concat().into()),
            _ => Err(KeyError::Malformed),
        },
        other => Err(KeyError::UnsupportedCurve(other.unwrap_or_default().to_owned())),
    }
}

fn add_key(list: &mut Vec<JwtAuthority>, index: usize, jwk: &Map<String, Value>) -> Result<(), BundleError> {
    let key_id = text(jwk, "kid").filter(|kid| !kid.is_empty()).ok_or(BundleError::NoKeyId(index))?;
    let key = match public_key_from_jwk(jwk) {
        Ok(key) => key,
        // A curve that we do not know is a key type that we do not know (section 4.1.3).
        Err(KeyError::UnsupportedCurve(_)) => return Ok(()),
        Err(cause) => return Err(BundleError::Key { index, cause }),
    };
    // A later key of the same ID replaces the earlier, as in SPIFFE's own library.
    list.retain(|a| a.key_id != key_id);
    list.push(JwtAuthority {
        key_id: key_id.to_owned(),
        public_key: key.spki_der().clone(),
        expires_at: 0,
        tainted: false,
    });
    Ok(())
}

/// One public key as a JWK object (RFC 7517), without `use`; `kid` if given. Members in go-jose's order.
pub fn public_key_to_jwk(key: &PublicKey, key_id: Option<&str>) -> Map<String, Value> {
    let mut jwk = Map::new();
    let curve = match key.kind() {
        Kind::P256 => Some("P-256"),
        Kind::P384 => Some("P-384"),
        Kind::P521 => Some("P-521"),
        Kind::Rsa(_) => None,
    };
    jwk.insert("kty".into(), if curve.is_some() { "EC" } else { "RSA" }.into());
    if let Some(key_id) = key_id {
        jwk.insert("kid".into(), key_id.into());
    }
    if let Some(curve) = curve {
        // Uncompressed: 04, then x and y of equal length.
        let point = key.bits().get(1..).unwrap_or_default();
        let (x, y) = point.split_at(point.len() / 2);
        jwk.insert("crv".into(), curve.into());
        jwk.insert("x".into(), BASE64URL.encode(x).into());
        jwk.insert("y".into(), BASE64URL.encode(y).into());
    } else if let Some((modulus, exponent)) = key.rsa_parts() {
        jwk.insert("n".into(), BASE64URL.encode(modulus).into());
        jwk.insert("e".into(), BASE64URL.encode(exponent).into());
    }
    jwk
}

fn number(jwk: &Map<String, Value>, name: &str) -> Result<Vec<u8>, KeyError> {
    let value = text(jwk, name).ok_or(KeyError::Malformed)?;
    BASE64URL.decode(value).map_err(|_| KeyError::Malformed)
}

/// The public key of a JWK object (`EC` or `RSA`).
pub fn public_key_from_jwk(jwk: &Map<String, Value>) -> Result<PublicKey, KeyError> {
    let number = |name| number(jwk, name);
    match text(jwk, "kty") {
        Some("RSA") => PublicKey::from_rsa_parts(&number("n")?, &number("e")?),
        Some("EC") => {
            let (kind, len) = match text(jwk, "crv") {
                Some("P-256") => (Kind::P256, 32),
                Some("P-384") => (Kind::P384, 48),
                Some("P-521") => (Kind::P521, 66),
                other => return Err(KeyError::UnsupportedCurve(other.unwrap_or_default().to_owned())),
            };
            let (x, y) = (number("x")?, number("y")?);
            // RFC 7518 section 6.2.1.2: as long as the curve's field, not shorter.
            if x.len() != len || y.len() != len {
                return Err(KeyError::Malformed);
            }
            PublicKey::from_ec_point(kind, &[&[4], &x[..], &y[..]].concat())
        }
        other => Err(KeyError::UnsupportedAlgorithm(other.unwrap_or_default().to_owned())),
    }
}
