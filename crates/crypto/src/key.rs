//! Public keys and signature algorithms.

use finial_core::ErrorKind;
use std::sync::Arc;

/// How something is signed. ECDSA signatures are ASN.1 DER (`ECDSA-Sig-Value`) at this level; JWS turns them into `r || s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SignatureAlgorithm {
    /// ECDSA on P-256 with SHA-256 (`ES256`).
    EcdsaP256Sha256,
    /// ECDSA on P-384 with SHA-384 (`ES384`).
    EcdsaP384Sha384,
    /// ECDSA on P-521 with SHA-512 (`ES512`); verified, never chosen for signing.
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
        Some(match name {
            "ES256" => Self::EcdsaP256Sha256,
            "ES384" => Self::EcdsaP384Sha384,
            "ES512" => Self::EcdsaP521Sha512,
            "RS256" => Self::RsaPkcs1Sha256,
            "RS384" => Self::RsaPkcs1Sha384,
            "RS512" => Self::RsaPkcs1Sha512,
            "PS256" => Self::RsaPssSha256,
            "PS384" => Self::RsaPssSha384,
            "PS512" => Self::RsaPssSha512,
            _ => return None,
        })
    }
}

/// Why a public key or a signature was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Not a DER SubjectPublicKeyInfo.
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
    /// The algorithm does not go with this kind of key.
    #[error("signature algorithm {0} does not go with the key")]
    WrongAlgorithm(&'static str),
}

impl KeyError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// A public key that passed our rules: EC P-256, P-384, P-521, or RSA of 2048 to 8192 bits. Cheap to clone.
#[derive(Clone)]
pub struct PublicKey(Arc<Inner>);

struct Inner {
    spki: Arc<[u8]>,
}

impl PublicKey {
    /// Parses a DER SubjectPublicKeyInfo (PKIX); the point is checked to be on its curve.
    pub fn from_spki(der: &[u8]) -> Result<Self, KeyError> {
        let _ = der;
        todo!()
    }

    /// The DER SubjectPublicKeyInfo.
    pub fn spki_der(&self) -> &Arc<[u8]> {
        &self.0.spki
    }

    /// SHA-1 of the subjectPublicKey bits (RFC 5280 section 4.2.1.2, method 1), as SPIRE derives key IDs of authorities.
    pub fn subject_key_id(&self) -> [u8; 20] {
        todo!()
    }

    /// The algorithm that keys of this kind sign certificates and tokens with: ES256, ES384, ES512 or RS256.
    pub fn default_algorithm(&self) -> SignatureAlgorithm {
        todo!()
    }

    /// Verifies a signature (ECDSA: ASN.1 DER) over `message`.
    pub fn verify(&self, algorithm: SignatureAlgorithm, message: &[u8], signature: &[u8]) -> Result<(), KeyError> {
        let _ = (algorithm, message, signature);
        todo!()
    }

    /// SPIRE's words for logs and answers: `EC-P256`, `EC-P384`, `EC-P521`, `RSA-2048` and so on.
    pub fn type_name(&self) -> String {
        todo!()
    }

    /// The core key type, if it is one that we generate.
    pub fn key_type(&self) -> Option<finial_core::KeyType> {
        todo!()
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
