//! Private keys and whatever else can sign: the async [`Signer`] that key managers hand out.

use crate::der::{self, Reader};
use crate::key::{Kind, PublicKey, SignatureAlgorithm};
use crate::oid;
use async_trait::async_trait;
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{self as aws, EcdsaKeyPair, EcdsaSigningAlgorithm, KeyPair as _, RsaSignatureEncoding};
use finial_core::{ErrorKind, KeyType, Secret};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::sync::Arc;

/// Why signing failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignError {
    /// The key cannot sign with that algorithm.
    #[error("signature algorithm {0} does not go with the key")]
    WrongAlgorithm(&'static str),
    /// The private key could not be read.
    #[error("private key is malformed or not supported: {0}")]
    BadKey(String),
    /// A certificate and a private key do not belong together.
    #[error("certificate and private key do not match")]
    KeyMismatch,
    /// The library refused, without saying why.
    #[error("signing failed")]
    Failed,
    /// A remote signer (KMS, HSM, plugin) failed.
    #[error("{0}")]
    Remote(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl SignError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Remote(_) => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        }
    }
}

/// Signs with a key that may live elsewhere. Implementations hash `message` themselves.
#[async_trait]
pub trait Signer: Send + Sync {
    /// The key to verify with.
    fn public_key(&self) -> &PublicKey;

    /// Signs `message`; ECDSA signatures come as ASN.1 DER.
    async fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError>;

    /// The key itself when it is in this process's memory, so that hot paths need not await.
    fn local(&self) -> Option<&PrivateKey> {
        None
    }
}

/// A private key in memory. Cheap to clone; wiped when the last clone goes.
#[derive(Clone)]
pub struct PrivateKey(Arc<Inner>);

struct Inner {
    public: PublicKey,
    pair: Pair,
    pkcs8: Arc<Secret<Vec<u8>>>,
}

enum Pair {
    Ec(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

fn ec_signing(kind: Kind) -> Result<&'static EcdsaSigningAlgorithm, SignError> {
    match kind {
        Kind::P256 => Ok(&aws::ECDSA_P256_SHA256_ASN1_SIGNING),
        Kind::P384 => Ok(&aws::ECDSA_P384_SHA384_ASN1_SIGNING),
        Kind::P521 => Ok(&aws::ECDSA_P521_SHA512_ASN1_SIGNING),
        Kind::Rsa(_) => Err(SignError::BadKey("not an elliptic curve key".into())),
    }
}

fn rsa_encoding(algorithm: SignatureAlgorithm) -> Result<&'static RsaSignatureEncoding, SignError> {
    Ok(match algorithm {
        SignatureAlgorithm::RsaPkcs1Sha256 => &aws::RSA_PKCS1_SHA256,
        SignatureAlgorithm::RsaPkcs1Sha384 => &aws::RSA_PKCS1_SHA384,
        SignatureAlgorithm::RsaPkcs1Sha512 => &aws::RSA_PKCS1_SHA512,
        SignatureAlgorithm::RsaPssSha256 => &aws::RSA_PSS_SHA256,
        SignatureAlgorithm::RsaPssSha384 => &aws::RSA_PSS_SHA384,
        SignatureAlgorithm::RsaPssSha512 => &aws::RSA_PSS_SHA512,
        other => return Err(SignError::WrongAlgorithm(other.jwa())),
    })
}

/// The curve that a parameters field names.
fn curve(oid: &[u8]) -> Result<Kind, SignError> {
    match oid {
        oid::P256 => Ok(Kind::P256),
        oid::P384 => Ok(Kind::P384),
        oid::P521 => Ok(Kind::P521),
        other => Err(SignError::BadKey(format!("elliptic curve {}", der::dotted(other)))),
    }
}

impl PrivateKey {
    /// Makes a new key. RSA takes a good part of a second.
    pub fn generate(key_type: KeyType) -> Result<Self, SignError> {
        let ec = |kind| Self::from_ec(kind, EcdsaKeyPair::generate(ec_signing(kind)?).map_err(|_| SignError::Failed)?);
        let rsa = |size| Self::from_rsa(RsaKeyPair::generate(size).map_err(|_| SignError::Failed)?);
        match key_type {
            KeyType::EcP256 => ec(Kind::P256),
            KeyType::EcP384 => ec(Kind::P384),
            KeyType::Rsa2048 => rsa(KeySize::Rsa2048),
            KeyType::Rsa4096 => rsa(KeySize::Rsa4096),
        }
    }

    /// Reads PKCS#8 DER: EC P-256, P-384, P-521, or RSA of 2048 to 8192 bits.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, SignError> {
        let malformed = || SignError::BadKey("not PKCS#8".into());
        let mut info = Reader::new(pkcs8).nested(der::SEQUENCE).ok_or_else(malformed)?;
        info.small().ok_or_else(malformed)?;
        let mut algorithm = info.nested(der::SEQUENCE).ok_or_else(malformed)?;
        match algorithm.read(der::OID).ok_or_else(malformed)? {
            oid::EC_PUBLIC_KEY => {
                let kind = curve(algorithm.read(der::OID).ok_or_else(malformed)?)?;
                let pair = EcdsaKeyPair::from_pkcs8(ec_signing(kind)?, pkcs8);
                Self::from_ec(kind, pair.map_err(|e| SignError::BadKey(e.to_string()))?)
            }
            oid::RSA => Self::from_rsa(RsaKeyPair::from_pkcs8(pkcs8).map_err(|e| SignError::BadKey(e.to_string()))?),
            oid::ED25519 => Err(SignError::BadKey("Ed25519 keys are not used with SPIFFE".into())),
            other => Err(SignError::BadKey(format!("key type {}", der::dotted(other)))),
        }
    }

    /// Reads SEC 1 DER (`EC PRIVATE KEY`), which must name its curve.
    pub fn from_sec1(sec1: &[u8]) -> Result<Self, SignError> {
        let malformed = || SignError::BadKey("not a SEC 1 key with a named curve".into());
        let mut key = Reader::new(sec1).nested(der::SEQUENCE).ok_or_else(malformed)?;
        key.small().ok_or_else(malformed)?;
        key.read(der::OCTET_STRING).ok_or_else(malformed)?;
        let mut parameters = key.nested(der::context(0)).ok_or_else(malformed)?;
        let kind = curve(parameters.read(der::OID).ok_or_else(malformed)?)?;
        let pair = EcdsaKeyPair::from_private_key_der(ec_signing(kind)?, sec1);
        Self::from_ec(kind, pair.map_err(|e| SignError::BadKey(e.to_string()))?)
    }

    /// Reads PKCS#1 DER (`RSA PRIVATE KEY`).
    pub fn from_pkcs1(pkcs1: &[u8]) -> Result<Self, SignError> {
        Self::from_rsa(RsaKeyPair::from_der(pkcs1).map_err(|e| SignError::BadKey(e.to_string()))?)
    }

    fn from_ec(kind: Kind, pair: EcdsaKeyPair) -> Result<Self, SignError> {
        let bad = |e: crate::KeyError| SignError::BadKey(e.to_string());
        let public = PublicKey::from_ec_point(kind, pair.public_key().as_ref()).map_err(bad)?;
        let pkcs8 = pair.to_pkcs8v1().map_err(|_| SignError::Failed)?.as_ref().to_vec();
        Ok(Self(Arc::new(Inner { public, pair: Pair::Ec(pair), pkcs8: Arc::new(Secret::new(pkcs8)) })))
    }

    fn from_rsa(pair: RsaKeyPair) -> Result<Self, SignError> {
        let bad = |e: crate::KeyError| SignError::BadKey(e.to_string());
        let public = PublicKey::from_rsa_pkcs1(pair.public_key().as_ref()).map_err(bad)?;
        let pkcs8 = pair.as_der().map_err(|_| SignError::Failed)?.as_ref().to_vec();
        Ok(Self(Arc::new(Inner { public, pair: Pair::Rsa(pair), pkcs8: Arc::new(Secret::new(pkcs8)) })))
    }

    /// The key as PKCS#8 DER, which is how the Workload API and key stores carry it.
    pub fn pkcs8_der(&self) -> Arc<Secret<Vec<u8>>> {
        self.0.pkcs8.clone()
    }

    /// The public half.
    pub fn public_key(&self) -> &PublicKey {
        &self.0.public
    }

    /// Signs without awaiting; ECDSA signatures come as ASN.1 DER.
    pub fn sign_now(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError> {
        match &self.0.pair {
            Pair::Ec(pair) if algorithm == self.0.public.default_algorithm() => {
                let signature = pair.sign(&SystemRandom::new(), message).map_err(|_| SignError::Failed)?;
                Ok(signature.as_ref().to_vec())
            }
            Pair::Ec(_) => Err(SignError::WrongAlgorithm(algorithm.jwa())),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                let encoding = rsa_encoding(algorithm)?;
                pair.sign(encoding, &SystemRandom::new(), message, &mut signature).map_err(|_| SignError::Failed)?;
                Ok(signature)
            }
        }
    }

    /// Signs an x509pop challenge: ECDSA, or RSASSA-PSS, always with SHA-256. AWS-LC offers no SHA-256 with P-384, so
    /// such keys cannot answer (they can be verified).
    pub fn sign_x509pop(&self, message: &[u8]) -> Result<Vec<u8>, SignError> {
        match (&self.0.pair, self.0.public.kind()) {
            (Pair::Rsa(_), _) => self.sign_now(SignatureAlgorithm::RsaPssSha256, message),
            (Pair::Ec(_), Kind::P256) => self.sign_now(SignatureAlgorithm::EcdsaP256Sha256, message),
            (Pair::Ec(_), Kind::P521) => {
                let pkcs8 = self.0.pkcs8.expose();
                let pair = EcdsaKeyPair::from_pkcs8(&aws::ECDSA_P521_SHA256_ASN1_SIGNING, pkcs8);
                let pair = pair.map_err(|e| SignError::BadKey(e.to_string()))?;
                Ok(pair.sign(&SystemRandom::new(), message).map_err(|_| SignError::Failed)?.as_ref().to_vec())
            }
            _ => Err(SignError::WrongAlgorithm("ECDSA with SHA-256")),
        }
    }

    /// The key for rustls handshakes.
    pub fn rustls_signing_key(&self) -> Result<Arc<dyn rustls::sign::SigningKey>, SignError> {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.pkcs8.expose().as_slice()));
        rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).map_err(|e| SignError::BadKey(e.to_string()))
    }
}

#[async_trait]
impl Signer for PrivateKey {
    fn public_key(&self) -> &PublicKey {
        &self.0.public
    }

    async fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError> {
        self.sign_now(algorithm, message)
    }

    fn local(&self) -> Option<&PrivateKey> {
        Some(self)
    }
}

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// Turns `ECDSA-Sig-Value` into `r || s` with scalars of `len` bytes, as JWS wants it (RFC 7518 section 3.4).
pub(crate) fn ecdsa_der_to_raw(signature: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut outer = Reader::new(signature);
    let mut pair = outer.nested(der::SEQUENCE)?;
    outer.end()?;
    let (r, s) = (pair.unsigned()?, pair.unsigned()?);
    pair.end()?;
    let mut raw = vec![0; 2 * len];
    let (left, right) = raw.split_at_mut(len);
    left.get_mut(len.checked_sub(r.len())?..)?.copy_from_slice(r);
    right.get_mut(len.checked_sub(s.len())?..)?.copy_from_slice(s);
    Some(raw)
}

/// Turns `r || s` into `ECDSA-Sig-Value`.
pub(crate) fn ecdsa_raw_to_der(raw: &[u8], len: usize) -> Option<Vec<u8>> {
    if raw.len() != 2 * len {
        return None;
    }
    let (r, s) = raw.split_at_checked(len)?;
    let mut out = Vec::with_capacity(raw.len() + 12);
    der::put_header(&mut out, der::SEQUENCE, der::unsigned_len(r) + der::unsigned_len(s));
    der::put_unsigned(&mut out, r);
    der::put_unsigned(&mut out, s);
    Some(out)
}
