//! Public keys and signature algorithms.

use crate::der::{self, Reader};
use crate::oid;
use aws_lc_rs::signature::{self as aws, ParsedPublicKey, VerificationAlgorithm};
use finial_core::{ErrorKind, KeyType};
use std::ops::Range;
use std::sync::Arc;

/// How something is signed. ECDSA signatures are ASN.1 DER (`ECDSA-Sig-Value`) at this level; JWS turns them into `r || s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SignatureAlgorithm {
    /// ECDSA on P-256 with SHA-256 (`ES256`).
    EcdsaP256Sha256,
    /// ECDSA on P-384 with SHA-384 (`ES384`).
    EcdsaP384Sha384,
    /// ECDSA on P-521 with SHA-512 (`ES512`).
    EcdsaP521Sha512,
    /// RSASSA-PKCS1-v1_5 with SHA-256 (`RS256`).
    RsaPkcs1Sha256,
    /// RSASSA-PKCS1-v1_5 with SHA-384 (`RS384`).
    RsaPkcs1Sha384,
    /// RSASSA-PKCS1-v1_5 with SHA-512 (`RS512`).
    RsaPkcs1Sha512,
    /// RSASSA-PSS with SHA-256, MGF1 with SHA-256, salt of 32 bytes (`PS256`).
    RsaPssSha256,
    /// RSASSA-PSS with SHA-384 (`PS384`).
    RsaPssSha384,
    /// RSASSA-PSS with SHA-512 (`PS512`).
    RsaPssSha512,
}

impl SignatureAlgorithm {
    /// All of them, in SPIRE's order of allowed JWT algorithms.
    pub const ALL: [Self; 9] = [
        Self::EcdsaP256Sha256,
        Self::EcdsaP384Sha384,
        Self::EcdsaP521Sha512,
        Self::RsaPkcs1Sha256,
        Self::RsaPkcs1Sha384,
        Self::RsaPkcs1Sha512,
        Self::RsaPssSha256,
        Self::RsaPssSha384,
        Self::RsaPssSha512,
    ];

    /// The name in a JOSE `alg` header (RFC 7518 section 3.1).
    pub fn jwa(self) -> &'static str {
        match self {
            Self::EcdsaP256Sha256 => "ES256",
            Self::EcdsaP384Sha384 => "ES384",
            Self::EcdsaP521Sha512 => "ES512",
            Self::RsaPkcs1Sha256 => "RS256",
            Self::RsaPkcs1Sha384 => "RS384",
            Self::RsaPkcs1Sha512 => "RS512",
            Self::RsaPssSha256 => "PS256",
            Self::RsaPssSha384 => "PS384",
            Self::RsaPssSha512 => "PS512",
        }
    }

    /// The algorithm of a JOSE `alg` header: only those that JWT-SVID section 2.1 allows, so never `none` or `HS*`.
    pub fn from_jwa(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.jwa() == name)
    }

    fn hash(self) -> Hash {
        match self {
            Self::EcdsaP256Sha256 | Self::RsaPkcs1Sha256 | Self::RsaPssSha256 => Hash::Sha256,
            Self::EcdsaP384Sha384 | Self::RsaPkcs1Sha384 | Self::RsaPssSha384 => Hash::Sha384,
            Self::EcdsaP521Sha512 | Self::RsaPkcs1Sha512 | Self::RsaPssSha512 => Hash::Sha512,
        }
    }

    /// Bytes of `r` and of `s` in JWS signatures of this algorithm (RFC 7518 section 3.4); `None` for RSA.
    pub(crate) fn ecdsa_scalar_len(self) -> Option<usize> {
        match self {
            Self::EcdsaP256Sha256 => Some(32),
            Self::EcdsaP384Sha384 => Some(48),
            Self::EcdsaP521Sha512 => Some(66),
            _ => None,
        }
    }
}

/// The hash of a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

/// Why a public key or a signature was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Not a DER SubjectPublicKeyInfo, or a point that is not on its curve.
    #[error("public key is malformed")]
    Malformed,
    /// Neither ECDSA nor RSA.
    #[error("unsupported key type {0}: use EC P-256, P-384, P-521 or RSA of 2048 to 8192 bits")]
    UnsupportedAlgorithm(String),
    /// A curve that is too weak or not used with SPIFFE.
    #[error("unsupported elliptic curve {0}: use P-256, P-384 or P-521")]
    UnsupportedCurve(String),
    /// An RSA modulus outside of 2048 to 8192 bits.
    #[error("RSA keys must have 2048 to 8192 bits, this one has {0}")]
    RsaSize(usize),
    /// The signature does not verify.
    #[error("signature verification failed")]
    BadSignature,
    /// The algorithm does not go with this kind of key, or is not one that we take.
    #[error("signature algorithm {0} is not supported with this key")]
    WrongAlgorithm(String),
}

impl KeyError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// What a key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    P256,
    P384,
    P521,
    /// With the bits of its modulus.
    Rsa(usize),
}

/// Everything in a P-256 SubjectPublicKeyInfo up to the point; for P-384 and P-521 likewise.
const P256_PREFIX: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const P384_PREFIX: &[u8] = &[
    0x30, 0x76, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00,
    0x22, 0x03, 0x62, 0x00,
];
const P521_PREFIX: &[u8] = &[
    0x30, 0x81, 0x9b, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04,
    0x00, 0x23, 0x03, 0x81, 0x86, 0x00,
];

impl Kind {
    fn ec_prefix(self) -> Option<&'static [u8]> {
        match self {
            Self::P256 => Some(P256_PREFIX),
            Self::P384 => Some(P384_PREFIX),
            Self::P521 => Some(P521_PREFIX),
            Self::Rsa(_) => None,
        }
    }

    fn ec_point_len(self) -> usize {
        match self {
            Self::P256 => 65,
            Self::P384 => 97,
            Self::P521 => 133,
            Self::Rsa(_) => 0,
        }
    }

    pub(crate) fn default_algorithm(self) -> SignatureAlgorithm {
        match self {
            Self::P256 => SignatureAlgorithm::EcdsaP256Sha256,
            Self::P384 => SignatureAlgorithm::EcdsaP384Sha384,
            Self::P521 => SignatureAlgorithm::EcdsaP521Sha512,
            Self::Rsa(_) => SignatureAlgorithm::RsaPkcs1Sha256,
        }
    }

    /// ECDSA for elliptic keys, PKCS#1 v1.5 for RSA: what X.509 and x509pop need beyond the pairs of JWA.
    fn plain(self, hash: Hash) -> &'static dyn VerificationAlgorithm {
        match (self, hash) {
            (Self::P256, Hash::Sha256) => &aws::ECDSA_P256_SHA256_ASN1,
            (Self::P256, Hash::Sha384) => &aws::ECDSA_P256_SHA384_ASN1,
            (Self::P256, Hash::Sha512) => &aws::ECDSA_P256_SHA512_ASN1,
            (Self::P384, Hash::Sha256) => &aws::ECDSA_P384_SHA256_ASN1,
            (Self::P384, Hash::Sha384) => &aws::ECDSA_P384_SHA384_ASN1,
            (Self::P384, Hash::Sha512) => &aws::ECDSA_P384_SHA512_ASN1,
            (Self::P521, Hash::Sha256) => &aws::ECDSA_P521_SHA256_ASN1,
            (Self::P521, Hash::Sha384) => &aws::ECDSA_P521_SHA384_ASN1,
            (Self::P521, Hash::Sha512) => &aws::ECDSA_P521_SHA512_ASN1,
            (Self::Rsa(_), Hash::Sha256) => &aws::RSA_PKCS1_2048_8192_SHA256,
            (Self::Rsa(_), Hash::Sha384) => &aws::RSA_PKCS1_2048_8192_SHA384,
            (Self::Rsa(_), Hash::Sha512) => &aws::RSA_PKCS1_2048_8192_SHA512,
        }
    }

    fn pss(hash: Hash) -> &'static dyn VerificationAlgorithm {
        match hash {
            Hash::Sha256 => &aws::RSA_PSS_2048_8192_SHA256,
            Hash::Sha384 => &aws::RSA_PSS_2048_8192_SHA384,
            Hash::Sha512 => &aws::RSA_PSS_2048_8192_SHA512,
        }
    }
}

/// A public key that passed our rules: EC P-256, P-384, P-521, or RSA of 2048 to 8192 bits. Cheap to clone.
#[derive(Clone)]
pub struct PublicKey(Arc<Inner>);

struct Inner {
    spki: Arc<[u8]>,
    /// Where in `spki` the subjectPublicKey bits are.
    bits: Range<usize>,
    kind: Kind,
    /// Ready to verify with the kind's default algorithm.
    parsed: ParsedPublicKey,
}

impl PublicKey {
    /// Parses a DER SubjectPublicKeyInfo (PKIX); the point is checked to be on its curve.
    pub fn from_spki(der: &[u8]) -> Result<Self, KeyError> {
        for kind in [Kind::P256, Kind::P384, Kind::P521] {
            let prefix = kind.ec_prefix().unwrap_or_default();
            if let Some(point) = der.strip_prefix(prefix) {
                if point.len() != kind.ec_point_len() || point.first() != Some(&4) {
                    return Err(KeyError::Malformed);
                }
                return Self::checked(der.into(), prefix.len()..der.len(), kind);
            }
        }
        Self::from_other_spki(der)
    }

    fn from_other_spki(der: &[u8]) -> Result<Self, KeyError> {
        let mut outer = Reader::new(der);
        let mut spki = outer.nested(der::SEQUENCE).ok_or(KeyError::Malformed)?;
        outer.end().ok_or(KeyError::Malformed)?;
        let mut algorithm = spki.nested(der::SEQUENCE).ok_or(KeyError::Malformed)?;
        let oid = algorithm.read(der::OID).ok_or(KeyError::Malformed)?;
        match oid {
            oid::RSA => {}
            oid::EC_PUBLIC_KEY => {
                let curve = algorithm.read(der::OID).ok_or(KeyError::Malformed)?;
                // The three good curves were matched byte by byte: here they are encoded in another, wrong way.
                return Err(match curve {
                    oid::P256 | oid::P384 | oid::P521 => KeyError::Malformed,
                    oid::P224 => KeyError::UnsupportedCurve("P-224".into()),
                    other => KeyError::UnsupportedCurve(der::dotted(other)),
                });
            }
            oid::ED25519 => return Err(KeyError::UnsupportedAlgorithm("Ed25519".into())),
            other => return Err(KeyError::UnsupportedAlgorithm(der::dotted(other))),
        }
        let null = algorithm.read(der::NULL).ok_or(KeyError::Malformed)?;
        let bits = spki.bit_string().ok_or(KeyError::Malformed)?;
        if !null.is_empty() || !algorithm.is_empty() || !spki.is_empty() {
            return Err(KeyError::Malformed);
        }
        let (modulus, exponent) = rsa_parts(bits).ok_or(KeyError::Malformed)?;
        let size = bit_len(modulus);
        if !(2048..=8192).contains(&size) {
            return Err(KeyError::RsaSize(size));
        }
        if exponent.len() > 4 {
            return Err(KeyError::Malformed);
        }
        let bits_len = bits.len();
        Self::checked(der.into(), der.len() - bits_len..der.len(), Kind::Rsa(size))
    }

    fn checked(spki: Arc<[u8]>, bits: Range<usize>, kind: Kind) -> Result<Self, KeyError> {
        let content = spki.get(bits.clone()).ok_or(KeyError::Malformed)?;
        let parsed = ParsedPublicKey::new(kind.plain(kind.default_algorithm().hash()), content)
            .map_err(|_| KeyError::Malformed)?;
        Ok(Self(Arc::new(Inner { spki, bits, kind, parsed })))
    }

    /// From an uncompressed point.
    pub(crate) fn from_ec_point(kind: Kind, point: &[u8]) -> Result<Self, KeyError> {
        let prefix = kind.ec_prefix().ok_or(KeyError::Malformed)?;
        Self::from_spki(&[prefix, point].concat())
    }

    /// From a DER RSAPublicKey (PKCS#1).
    pub(crate) fn from_rsa_pkcs1(pkcs1: &[u8]) -> Result<Self, KeyError> {
        let mut spki = Vec::with_capacity(pkcs1.len() + 32);
        der::put_nested(&mut spki, der::SEQUENCE, |out| {
            der::put_nested(out, der::SEQUENCE, |out| {
                der::put(out, der::OID, oid::RSA);
                der::put(out, der::NULL, &[]);
            });
            der::put_bit_string(out, pkcs1);
        });
        Self::from_spki(&spki)
    }

    /// From big-endian modulus and exponent.
    pub(crate) fn from_rsa_parts(modulus: &[u8], exponent: &[u8]) -> Result<Self, KeyError> {
        let mut pkcs1 = Vec::with_capacity(modulus.len() + 16);
        der::put_nested(&mut pkcs1, der::SEQUENCE, |out| {
            der::put_unsigned(out, modulus);
            der::put_unsigned(out, exponent);
        });
        Self::from_rsa_pkcs1(&pkcs1)
    }

    /// The DER SubjectPublicKeyInfo.
    pub fn spki_der(&self) -> &Arc<[u8]> {
        &self.0.spki
    }

    pub(crate) fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The subjectPublicKey bits: an uncompressed point, or a DER RSAPublicKey.
    pub(crate) fn bits(&self) -> &[u8] {
        self.0.spki.get(self.0.bits.clone()).unwrap_or_default()
    }

    /// Modulus and exponent of an RSA key, big endian, without leading zeros.
    pub(crate) fn rsa_parts(&self) -> Option<(&[u8], &[u8])> {
        matches!(self.0.kind, Kind::Rsa(_)).then(|| rsa_parts(self.bits()))?
    }

    /// SHA-1 of the subjectPublicKey bits (RFC 5280 section 4.2.1.2, method 1), as SPIRE derives key IDs of authorities.
    pub fn subject_key_id(&self) -> [u8; 20] {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, self.bits());
        digest.as_ref().try_into().unwrap_or_default()
    }

    /// The algorithm that keys of this kind sign certificates and tokens with: ES256, ES384, ES512 or RS256.
    pub fn default_algorithm(&self) -> SignatureAlgorithm {
        self.0.kind.default_algorithm()
    }

    /// Whether keys of this kind can be used with the algorithm.
    pub fn supports(&self, algorithm: SignatureAlgorithm) -> bool {
        match algorithm {
            SignatureAlgorithm::EcdsaP256Sha256 => self.0.kind == Kind::P256,
            SignatureAlgorithm::EcdsaP384Sha384 => self.0.kind == Kind::P384,
            SignatureAlgorithm::EcdsaP521Sha512 => self.0.kind == Kind::P521,
            _ => matches!(self.0.kind, Kind::Rsa(_)),
        }
    }

    /// Verifies a signature (ECDSA: ASN.1 DER) over `message`.
    pub fn verify(&self, algorithm: SignatureAlgorithm, message: &[u8], signature: &[u8]) -> Result<(), KeyError> {
        if !self.supports(algorithm) {
            return Err(KeyError::WrongAlgorithm(algorithm.jwa().to_owned()));
        }
        match algorithm {
            SignatureAlgorithm::RsaPssSha256 | SignatureAlgorithm::RsaPssSha384 | SignatureAlgorithm::RsaPssSha512 => {
                self.verify_raw(Kind::pss(algorithm.hash()), message, signature)
            }
            _ => self.verify_plain(algorithm.hash(), message, signature),
        }
    }

    /// Verifies the response to an x509pop challenge: SHA-256 whatever the curve, or PSS with the longest salt
    /// that fits (as Go signs) or one as long as the hash.
    pub fn verify_x509pop(&self, message: &[u8], signature: &[u8]) -> Result<(), KeyError> {
        match self.0.kind {
            Kind::Rsa(_) => self
                .verify_raw(&PSS_SHA256_MAX_SALT, message, signature)
                .or_else(|_| self.verify_pss(Hash::Sha256, message, signature)),
            _ => self.verify_plain(Hash::Sha256, message, signature),
        }
    }

    /// ECDSA with any of the three hashes, or PKCS#1 v1.5.
    pub(crate) fn verify_plain(&self, hash: Hash, message: &[u8], signature: &[u8]) -> Result<(), KeyError> {
        if hash == self.default_algorithm().hash() {
            return self.0.parsed.verify_sig(message, signature).map_err(|_| KeyError::BadSignature);
        }
        self.verify_raw(self.0.kind.plain(hash), message, signature)
    }

    pub(crate) fn verify_pss(&self, hash: Hash, message: &[u8], signature: &[u8]) -> Result<(), KeyError> {
        self.verify_raw(Kind::pss(hash), message, signature)
    }

    fn verify_raw(&self, algorithm: &dyn VerificationAlgorithm, message: &[u8], sig: &[u8]) -> Result<(), KeyError> {
        algorithm.verify_sig(self.bits(), message, sig).map_err(|_| KeyError::BadSignature)
    }

    /// For logs and messages: `EC-P256`, `EC-P384`, `EC-P521`, `RSA-2048` and so on.
    pub fn type_name(&self) -> String {
        match self.0.kind {
            Kind::P256 => "EC-P256".into(),
            Kind::P384 => "EC-P384".into(),
            Kind::P521 => "EC-P521".into(),
            Kind::Rsa(bits) => format!("RSA-{bits}"),
        }
    }

    /// The core key type, if it is one that we generate.
    pub fn key_type(&self) -> Option<KeyType> {
        match self.0.kind {
            Kind::P256 => Some(KeyType::EcP256),
            Kind::P384 => Some(KeyType::EcP384),
            Kind::Rsa(2048) => Some(KeyType::Rsa2048),
            Kind::Rsa(4096) => Some(KeyType::Rsa4096),
            _ => None,
        }
    }
}

const PSS_SHA256_MAX_SALT: aws::RsaParameters =
    aws::RSA_PSS_2048_8192_SHA256.with_pss_salt_length(aws::RsaPssSaltLength::Max);

/// Modulus and exponent of a DER RSAPublicKey.
fn rsa_parts(pkcs1: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut outer = Reader::new(pkcs1);
    let mut key = outer.nested(der::SEQUENCE)?;
    outer.end()?;
    let parts = (key.unsigned()?, key.unsigned()?);
    key.end()?;
    Some(parts)
}

fn bit_len(magnitude: &[u8]) -> usize {
    match magnitude.first() {
        Some(first) => magnitude.len() * 8 - first.leading_zeros() as usize,
        None => 0,
    }
}

impl PartialEq for PublicKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.spki == other.0.spki
    }
}
impl Eq for PublicKey {}
impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PublicKey({})", self.type_name())
    }
}
