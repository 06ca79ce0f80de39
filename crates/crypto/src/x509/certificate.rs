//! A parsed view of a certificate.

use super::name::DistinguishedName;
use crate::key::{KeyError, PublicKey};
use finial_core::{ErrorKind, UnixSeconds};
use std::sync::Arc;

/// Largest certificate that is read, in bytes.
pub const CERTIFICATE_BYTES_MAX: usize = 64 << 10;

/// Why DER was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// Larger than the limit for its kind.
    #[error("too large: {found} bytes, at most {limit} are allowed")]
    TooLarge {
        /// Its size, bytes.
        found: usize,
        /// What is allowed, bytes.
        limit: usize,
    },
    /// Not DER, or not the structure that was wanted; names the field.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// Bytes after the end.
    #[error("trailing data after {0}")]
    TrailingData(&'static str),
    /// Only version 3 certificates may carry extensions.
    #[error("unsupported version")]
    Version,
    /// The same extension twice (RFC 5280 section 4.2).
    #[error("extension {0} appears twice")]
    DuplicateExtension(String),
    /// The key inside is not one that we take.
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl ParseError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// The key usage extension, as its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyUsage(pub u16);

impl KeyUsage {
    /// May sign data.
    pub const DIGITAL_SIGNATURE: Self = Self(1);
    /// May wrap keys.
    pub const KEY_ENCIPHERMENT: Self = Self(1 << 2);
    /// May agree on keys.
    pub const KEY_AGREEMENT: Self = Self(1 << 4);
    /// May sign certificates.
    pub const CERT_SIGN: Self = Self(1 << 5);
    /// May sign CRLs.
    pub const CRL_SIGN: Self = Self(1 << 6);

    /// Whether all bits of `other` are set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What the extended key usage extension lists, as far as SPIFFE is concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtendedKeyUsage {
    /// The extension is there.
    pub present: bool,
    /// `id-kp-serverAuth`
    pub server_auth: bool,
    /// `id-kp-clientAuth`
    pub client_auth: bool,
    /// `anyExtendedKeyUsage`
    pub any: bool,
}

/// A parsed certificate. Holds its DER; everything else are views or small copies.
#[derive(Clone)]
pub struct Certificate {
    der: Arc<[u8]>,
}

impl Certificate {
    /// Parses strict DER, at most [`CERTIFICATE_BYTES_MAX`]. Nothing is verified.
    pub fn parse(der: impl Into<Arc<[u8]>>) -> Result<Self, ParseError> {
        let _ = der.into();
        todo!()
    }

    /// Splits certificates that follow each other without a gap, as the Workload API carries chains; at most 16.
    pub fn parse_chain(der: &[u8]) -> Result<Vec<Self>, ParseError> {
        let _ = der;
        todo!()
    }

    /// The whole certificate.
    pub fn der(&self) -> &Arc<[u8]> {
        &self.der
    }

    /// The subject, DER.
    pub fn subject_der(&self) -> &[u8] {
        todo!()
    }

    /// The issuer, DER.
    pub fn issuer_der(&self) -> &[u8] {
        todo!()
    }

    /// The subject.
    pub fn subject(&self) -> Result<DistinguishedName, ParseError> {
        DistinguishedName::from_der(self.subject_der())
    }

    /// The issuer.
    pub fn issuer(&self) -> Result<DistinguishedName, ParseError> {
        DistinguishedName::from_der(self.issuer_der())
    }

    /// The serial number, big endian, without leading zeros.
    pub fn serial(&self) -> &[u8] {
        todo!()
    }

    /// The serial number in decimal, which is how SPIRE keeps and prints it.
    pub fn serial_decimal(&self) -> String {
        todo!()
    }

    /// First second of validity.
    pub fn not_before(&self) -> UnixSeconds {
        todo!()
    }

    /// Last second of validity.
    pub fn not_after(&self) -> UnixSeconds {
        todo!()
    }

    /// URI SANs as they are written.
    pub fn uri_sans(&self) -> &[Box<str>] {
        todo!()
    }

    /// DNS SANs as they are written.
    pub fn dns_names(&self) -> &[Box<str>] {
        todo!()
    }

    /// `cA` of the basic constraints.
    pub fn is_ca(&self) -> bool {
        todo!()
    }

    /// `pathLenConstraint` of the basic constraints.
    pub fn path_len(&self) -> Option<u32> {
        todo!()
    }

    /// The key usage extension.
    pub fn key_usage(&self) -> Option<KeyUsage> {
        todo!()
    }

    /// Whether the key usage extension is marked critical.
    pub fn key_usage_critical(&self) -> bool {
        todo!()
    }

    /// The extended key usage extension.
    pub fn extended_key_usage(&self) -> ExtendedKeyUsage {
        todo!()
    }

    /// The subject key identifier extension.
    pub fn subject_key_id(&self) -> Option<&[u8]> {
        todo!()
    }

    /// The key identifier in the authority key identifier extension.
    pub fn authority_key_id(&self) -> Option<&[u8]> {
        todo!()
    }

    /// The DER SubjectPublicKeyInfo, unchecked.
    pub fn spki_der(&self) -> &[u8] {
        todo!()
    }

    /// The public key, checked.
    pub fn public_key(&self) -> Result<PublicKey, KeyError> {
        PublicKey::from_spki(self.spki_der())
    }

    /// Whether the certificate is issued by its own key.
    pub fn is_self_signed(&self) -> bool {
        todo!()
    }

    /// Whether `issuer`'s key signed this certificate.
    pub fn verify_signed_by(&self, issuer: &PublicKey) -> Result<(), KeyError> {
        let _ = issuer;
        todo!()
    }
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Certificate({})", self.serial_decimal())
    }
}
impl PartialEq for Certificate {
    fn eq(&self, other: &Self) -> bool {
        self.der == other.der
    }
}
impl Eq for Certificate {}
