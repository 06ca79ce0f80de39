//! PEM: certificates and keys as text (RFC 7468).

use crate::key::PublicKey;
use crate::signer::PrivateKey;
use finial_core::{ErrorKind, Secret};
use std::sync::Arc;

/// Largest PEM text that is read, in bytes.
pub const PEM_BYTES_MAX: usize = 4 << 20;

/// Why a PEM text was not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PemError {
    /// No block at all, or none of the wanted kind.
    #[error("no PEM blocks")]
    NoBlocks,
    /// A block of another kind.
    #[error("expected PEM block of type {want:?}, found {found:?}")]
    WrongType {
        /// What was wanted.
        want: &'static str,
        /// What the block is labelled.
        found: String,
    },
    /// A block without its end, or with characters that are not base64.
    #[error("PEM block {0:?} is malformed")]
    Malformed(String),
    /// Larger than [`PEM_BYTES_MAX`].
    #[error("PEM text is larger than {PEM_BYTES_MAX} bytes")]
    TooLarge,
    /// The content of a block is not a certificate.
    #[error("certificate {0} is malformed: {1}")]
    Certificate(usize, #[source] crate::ParseError),
    /// The content of a block is not a key that we take.
    #[error("private key: {0}")]
    PrivateKey(#[source] crate::SignError),
    /// The content of a block is not a public key that we take.
    #[error("public key: {0}")]
    PublicKey(#[source] crate::KeyError),
}

impl PemError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// One block of a PEM text.
pub struct PemBlock {
    /// What stands after `BEGIN`, such as `CERTIFICATE`.
    pub label: String,
    /// The decoded content.
    pub der: Secret<Vec<u8>>,
}

/// All blocks of a text, in order; text between blocks is ignored.
pub fn blocks(text: &[u8]) -> Result<Vec<PemBlock>, PemError> {
    let _ = text;
    todo!()
}

/// All certificates of a text, in order and each parsed once as a check. At least one is needed; other blocks are errors.
pub fn certificates(text: &[u8]) -> Result<Vec<Arc<[u8]>>, PemError> {
    let _ = text;
    todo!()
}

/// The first private key of a text: PKCS#8, SEC 1 or PKCS#1.
pub fn private_key(text: &[u8]) -> Result<PrivateKey, PemError> {
    let _ = text;
    todo!()
}

/// The first public key of a text (`PUBLIC KEY`).
pub fn public_key(text: &[u8]) -> Result<PublicKey, PemError> {
    let _ = text;
    todo!()
}

/// Writes one block with lines of 64 characters.
pub fn encode(label: &str, der: &[u8]) -> String {
    let _ = (label, der);
    todo!()
}

/// Writes certificates one after the other.
pub fn encode_certificates<'a>(certificates: impl IntoIterator<Item = &'a [u8]>) -> String {
    certificates.into_iter().map(|der| encode("CERTIFICATE", der)).collect()
}

/// Writes a private key as PKCS#8 (`PRIVATE KEY`).
pub fn encode_private_key(pkcs8: &[u8]) -> Secret<String> {
    Secret::new(encode("PRIVATE KEY", pkcs8))
}
