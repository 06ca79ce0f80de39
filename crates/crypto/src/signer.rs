//! Private keys and whatever else can sign: the async [`Signer`] that key managers hand out.

use crate::key::{PublicKey, SignatureAlgorithm};
use async_trait::async_trait;
use finial_core::{ErrorKind, KeyType, Secret};
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
}

impl PrivateKey {
    /// Makes a new key.
    pub fn generate(key_type: KeyType) -> Result<Self, SignError> {
        let _ = key_type;
        todo!()
    }

    /// Reads PKCS#8 DER: EC P-256, P-384, P-521, or RSA of 2048 to 8192 bits.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, SignError> {
        let _ = der;
        todo!()
    }

    /// Reads SEC 1 DER (`EC PRIVATE KEY`).
    pub fn from_sec1(der: &[u8]) -> Result<Self, SignError> {
        let _ = der;
        todo!()
    }

    /// Reads PKCS#1 DER (`RSA PRIVATE KEY`).
    pub fn from_pkcs1(der: &[u8]) -> Result<Self, SignError> {
        let _ = der;
        todo!()
    }

    /// The key as PKCS#8 DER, which is how the Workload API and key stores carry it.
    pub fn pkcs8_der(&self) -> Arc<Secret<Vec<u8>>> {
        todo!()
    }

    /// The public half.
    pub fn public_key(&self) -> &PublicKey {
        &self.0.public
    }

    /// Signs without awaiting; ECDSA signatures come as ASN.1 DER.
    pub fn sign_now(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError> {
        let _ = (algorithm, message);
        todo!()
    }

    /// The key for rustls handshakes.
    pub fn rustls_signing_key(&self) -> Result<Arc<dyn rustls::sign::SigningKey>, SignError> {
        todo!()
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
