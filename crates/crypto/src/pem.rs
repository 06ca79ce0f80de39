//! PEM: certificates and keys as text (RFC 7468).

use crate::key::PublicKey;
use crate::signer::PrivateKey;
use crate::x509::Certificate;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use finial_core::{ErrorKind, Secret};
use std::sync::Arc;
use zeroize::Zeroizing;

const CERTIFICATE: &str = "CERTIFICATE";
const PRIVATE_KEY: &str = "PRIVATE KEY";
const PUBLIC_KEY: &str = "PUBLIC KEY";

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

const BEGIN: &str = "-----BEGIN ";
const END: &str = "-----END ";
const DASHES: &str = "-----";

/// All blocks of a text, in order; text between blocks is ignored, and so are RFC 1421 headers inside of them.
pub fn blocks(text: &[u8]) -> Result<Vec<PemBlock>, PemError> {
    if text.len() > PEM_BYTES_MAX {
        return Err(PemError::TooLarge);
    }
    let text = String::from_utf8_lossy(text);
    let mut lines = text.lines().map(str::trim);
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        let Some(label) = line.strip_prefix(BEGIN).and_then(|l| l.strip_suffix(DASHES)) else { continue };
        let malformed = || PemError::Malformed(label.to_owned());
        let mut body = Zeroizing::new(String::new());
        loop {
            let line = lines.next().ok_or_else(malformed)?;
            if let Some(end) = line.strip_prefix(END) {
                if end.strip_suffix(DASHES) != Some(label) {
                    return Err(malformed());
                }
                break;
            }
            if !line.contains(':') {
                body.push_str(line);
            }
        }
        let der = BASE64.decode(body.as_bytes()).map_err(|_| malformed())?;
        found.push(PemBlock { label: label.to_owned(), der: Secret::new(der) });
    }
    Ok(found)
}

/// All certificates of a text, in order and each parsed once as a check. At least one is needed; other blocks are errors.
pub fn certificates(text: &[u8]) -> Result<Vec<Arc<[u8]>>, PemError> {
    let mut found = Vec::new();
    for (index, block) in blocks(text)?.into_iter().enumerate() {
        if block.label != CERTIFICATE {
            return Err(PemError::WrongType { want: CERTIFICATE, found: block.label });
        }
        let certificate = Certificate::parse(block.der.expose().as_slice());
        found.push(certificate.map_err(|e| PemError::Certificate(index, e))?.der().clone());
    }
    if found.is_empty() { Err(PemError::NoBlocks) } else { Ok(found) }
}

/// The first private key of a text: PKCS#8, SEC 1 or PKCS#1. Other blocks (`EC PARAMETERS`, certificates) are skipped.
pub fn private_key(text: &[u8]) -> Result<PrivateKey, PemError> {
    for block in blocks(text)? {
        let der = block.der.expose().as_slice();
        let key = match block.label.as_str() {
            PRIVATE_KEY => PrivateKey::from_pkcs8(der),
            "EC PRIVATE KEY" => PrivateKey::from_sec1(der),
            "RSA PRIVATE KEY" => PrivateKey::from_pkcs1(der),
            label if label.ends_with("PRIVATE KEY") => {
                return Err(PemError::WrongType { want: PRIVATE_KEY, found: label.to_owned() });
            }
            _ => continue,
        };
        return key.map_err(PemError::PrivateKey);
    }
    Err(PemError::NoBlocks)
}

/// The first public key of a text (`PUBLIC KEY`).
pub fn public_key(text: &[u8]) -> Result<PublicKey, PemError> {
    let block = blocks(text)?.into_iter().next().ok_or(PemError::NoBlocks)?;
    if block.label != PUBLIC_KEY {
        return Err(PemError::WrongType { want: PUBLIC_KEY, found: block.label });
    }
    PublicKey::from_spki(block.der.expose()).map_err(PemError::PublicKey)
}

/// Writes one block with lines of 64 characters.
pub fn encode(label: &str, der: &[u8]) -> String {
    let body = Secret::new(BASE64.encode(der));
    let mut text = String::with_capacity(body.expose().len() * 65 / 64 + 2 * label.len() + 40);
    text.push_str(&format!("{BEGIN}{label}{DASHES}\n"));
    for (at, c) in body.expose().char_indices() {
        if at > 0 && at % 64 == 0 {
            text.push('\n');
        }
        text.push(c);
    }
    if !der.is_empty() {
        text.push('\n');
    }
    text.push_str(&format!("{END}{label}{DASHES}\n"));
    text
}

/// Writes certificates one after the other.
pub fn encode_certificates<'a>(certificates: impl IntoIterator<Item = &'a [u8]>) -> String {
    certificates.into_iter().map(|der| encode(CERTIFICATE, der)).collect()
}

/// Writes a private key as PKCS#8 (`PRIVATE KEY`).
pub fn encode_private_key(pkcs8: &[u8]) -> Secret<String> {
    Secret::new(encode(PRIVATE_KEY, pkcs8))
}

/// Writes a public key (`PUBLIC KEY`).
pub fn encode_public_key(key: &PublicKey) -> String {
    encode(PUBLIC_KEY, key.spki_der())
}
