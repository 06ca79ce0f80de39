//! The X.509 authority: issues SVIDs from a template that is encoded once per authority.

use super::certificate::ParseError;
use super::name::DistinguishedName;
use crate::key::PublicKey;
use crate::signer::{SignError, Signer};
use finial_core::{ErrorKind, SpiffeId, TrustDomain, UnixSeconds};
use std::sync::Arc;

/// Why a certificate was not issued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The signer failed.
    #[error("unable to sign: {0}")]
    Sign(#[from] SignError),
    /// The authority's own certificate is not usable.
    #[error("authority certificate: {0}")]
    Authority(#[from] ParseError),
    /// The authority's certificate is not a CA (X509-SVID section 3.2).
    #[error("authority certificate is not a CA")]
    NotCa,
    /// The signer's key is not that of the certificate.
    #[error("authority certificate and signing key do not match")]
    KeyMismatch,
    /// A leaf's SPIFFE ID needs a path (X509-SVID section 3.1).
    #[error("SPIFFE ID of an X509-SVID must have a path")]
    RootPath,
    /// The validity would end before it begins.
    #[error("validity period is empty")]
    EmptyValidity,
    /// A DNS name that cannot be written as an IA5String or is longer than 255 bytes.
    #[error("DNS name {0:?} is not valid")]
    BadDnsName(String),
    /// More than 1000 DNS names or similar nonsense.
    #[error("certificate would be too large")]
    TooLarge,
}

impl IssueError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Sign(e) => e.kind(),
            Self::RootPath | Self::BadDnsName(_) | Self::TooLarge => ErrorKind::InvalidArgument,
            _ => ErrorKind::Internal,
        }
    }
}

/// A certificate serial number of 1 to 2^128 - 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SerialNumber(u128);

impl SerialNumber {
    /// A random one.
    pub fn random() -> Self {
        todo!()
    }

    /// A given one; zero becomes one.
    pub fn new(value: u128) -> Self {
        Self(value.max(1))
    }

    /// The number.
    pub fn value(self) -> u128 {
        self.0
    }
}

/// In decimal, as SPIRE prints serial numbers.
impl std::fmt::Display for SerialNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What varies between SVIDs of one authority.
pub struct SvidTemplate<'a> {
    /// The URI SAN; must have a path.
    pub id: &'a SpiffeId,
    /// Whose key is certified.
    pub public_key: &'a PublicKey,
    /// The subject, complete: the caller puts the first DNS name into the common name as SPIRE does.
    pub subject: &'a DistinguishedName,
    /// DNS SANs, in order.
    pub dns_names: &'a [String],
    /// First second of validity (SPIRE: now - 10 s).
    pub not_before: UnixSeconds,
    /// Last second of validity; [`X509Ca`] caps it to its own end.
    pub not_after: UnixSeconds,
    /// The serial number.
    pub serial: SerialNumber,
}

/// What a CA certificate says.
pub struct CaTemplate<'a> {
    /// The subject; gets `serialNumber` = decimal serial if it has none.
    pub subject: &'a DistinguishedName,
    /// Its ID becomes the URI SAN.
    pub trust_domain: &'a TrustDomain,
    /// First second of validity.
    pub not_before: UnixSeconds,
    /// Last second of validity.
    pub not_after: UnixSeconds,
    /// The serial number.
    pub serial: SerialNumber,
}

/// An X.509 authority: a CA certificate, its signer and a template of what its SVIDs have in common. Cheap to clone.
#[derive(Clone)]
pub struct X509Ca {
    certificate: Arc<[u8]>,
    upstream_chain: Arc<[Arc<[u8]>]>,
    signer: Arc<dyn Signer>,
    not_after: UnixSeconds,
}

impl X509Ca {
    /// Makes a self-signed authority.
    pub async fn self_sign(signer: Arc<dyn Signer>, template: &CaTemplate<'_>) -> Result<Self, IssueError> {
        let _ = (signer, template);
        todo!()
    }

    /// Takes an existing CA certificate with its signer (from the journal, or from an upstream authority).
    /// `upstream_chain` is what follows a leaf on the wire: this CA's certificate first, then further intermediates;
    /// empty for a self-signed CA.
    pub fn new(
        signer: Arc<dyn Signer>,
        certificate: Arc<[u8]>,
        upstream_chain: Vec<Arc<[u8]>>,
    ) -> Result<Self, IssueError> {
        let _ = (signer, certificate, upstream_chain);
        todo!()
    }

    /// Issues a leaf by the profile of SPIRE: one sign operation, a copy of the template, no other work.
    /// `not_after` is capped to the authority's own end here.
    pub async fn issue_svid(&self, template: &SvidTemplate<'_>) -> Result<Arc<[u8]>, IssueError> {
        let _ = template;
        todo!()
    }

    /// The same without awaiting; `None` when the key is not in this process.
    pub fn issue_svid_now(&self, template: &SvidTemplate<'_>) -> Option<Result<Arc<[u8]>, IssueError>> {
        let _ = template;
        todo!()
    }

    /// Issues a CA certificate below this one (downstream servers, upstream plugins). Its `not_after` is capped too.
    pub async fn issue_ca(&self, public_key: &PublicKey, template: &CaTemplate<'_>) -> Result<Arc<[u8]>, IssueError> {
        let _ = (public_key, template);
        todo!()
    }

    /// The CA certificate, DER.
    pub fn certificate(&self) -> &Arc<[u8]> {
        &self.certificate
    }

    /// What follows a leaf on the wire; empty for a self-signed CA.
    pub fn upstream_chain(&self) -> &[Arc<[u8]>] {
        &self.upstream_chain
    }

    /// A leaf with what must follow it on the wire.
    pub fn chain_of(&self, leaf: Arc<[u8]>) -> Vec<Arc<[u8]>> {
        std::iter::once(leaf).chain(self.upstream_chain.iter().cloned()).collect()
    }

    /// The subject key ID of the authority.
    pub fn subject_key_id(&self) -> &[u8] {
        todo!()
    }

    /// The subject of the authority.
    pub fn subject(&self) -> Result<DistinguishedName, ParseError> {
        todo!()
    }

    /// Last second of validity of the CA certificate.
    pub fn not_after(&self) -> UnixSeconds {
        self.not_after
    }

    /// The signer.
    pub fn signer(&self) -> &Arc<dyn Signer> {
        &self.signer
    }
}
