//! Verification of X.509 chains: RFC 5280 paths, and the leaf rules of the X509-SVID standard.

use super::certificate::{Certificate, ParseError};
use finial_core::{Bundle, ErrorKind, SpiffeId, SpiffeIdError, UnixSeconds};
use std::sync::Arc;

/// Longest chain that is looked at, leaf included.
pub const CHAIN_LENGTH_MAX: usize = 10;

/// Which rule a chain broke. Each MUST of X509-SVID is a variant of its own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// Nothing was presented.
    #[error("empty certificate chain")]
    EmptyChain,
    /// More certificates than [`CHAIN_LENGTH_MAX`].
    #[error("certificate chain is too long")]
    ChainTooLong,
    /// A certificate could not be parsed.
    #[error("unable to parse certificate: {0}")]
    Parse(#[from] ParseError),
    /// Section 2: a URI SAN is needed.
    #[error("certificate contains no URI SAN (X509-SVID section 2)")]
    NoUriSan,
    /// Section 2, section 5.2: only one URI SAN.
    #[error("certificate contains more than one URI SAN (X509-SVID section 2)")]
    ManyUriSans,
    /// Section 5.2: the scheme is `spiffe`, and the ID is well formed.
    #[error("URI SAN is not a SPIFFE ID: {0} (X509-SVID section 5.2)")]
    BadSpiffeId(SpiffeIdError),
    /// Section 3.1, section 5.2: a leaf's ID has a path.
    #[error("leaf SPIFFE ID has no path (X509-SVID section 5.2)")]
    RootPath,
    /// Section 4.1, section 5.2: `cA` is false.
    #[error("leaf certificate with CA flag set to true (X509-SVID section 5.2)")]
    LeafIsCa,
    /// Section 4.3, section 5.2: no `keyCertSign`.
    #[error("leaf certificate with KeyCertSign key usage (X509-SVID section 5.2)")]
    LeafCertSign,
    /// Section 4.3, section 5.2: no `cRLSign`.
    #[error("leaf certificate with KeyCrlSign key usage (X509-SVID section 5.2)")]
    LeafCrlSign,
    /// Section 4.3: key usage is there.
    #[error("certificate has no key usage extension (X509-SVID section 4.3)")]
    NoKeyUsage,
    /// Section 4.3: key usage is critical.
    #[error("key usage extension is not critical (X509-SVID section 4.3)")]
    KeyUsageNotCritical,
    /// Section 4.3: a leaf sets `digitalSignature`.
    #[error("leaf certificate without digitalSignature key usage (X509-SVID section 4.3)")]
    NoDigitalSignature,
    /// Section 4.4: extended key usage, where given, names both purposes.
    #[error("extended key usage lacks serverAuth or clientAuth (X509-SVID section 4.4)")]
    IncompleteExtendedKeyUsage,
    /// Section 3.1: without a subject the SAN is critical.
    #[error("subject is empty and the SAN extension is not critical (X509-SVID section 3.1)")]
    SanNotCritical,
    /// Section 4.1, section 4.3: a signing certificate is a CA and sets `keyCertSign`.
    #[error("signing certificate lacks the CA flag or keyCertSign (X509-SVID section 4.3)")]
    IssuerNotCa,
    /// Section 3.2: a signing certificate's SPIFFE ID has no path.
    #[error("SPIFFE ID of a signing certificate has a path (X509-SVID section 3.2)")]
    IssuerHasPath,
    /// There are no roots for the trust domain of the leaf.
    #[error("no X.509 bundle found for trust domain: {0:?}")]
    UnknownTrustDomain(String),
    /// Section 5.1: no path to a root.
    #[error("certificate signed by unknown authority (X509-SVID section 5.1)")]
    UnknownAuthority,
    /// Section 5.1: past its end.
    #[error("certificate has expired (X509-SVID section 5.1)")]
    Expired,
    /// Section 5.1: before its beginning.
    #[error("certificate is not yet valid (X509-SVID section 5.1)")]
    NotYetValid,
    /// Section 5.1: any other rule of RFC 5280; names it.
    #[error("certificate path is not valid: {0} (X509-SVID section 5.1)")]
    Path(String),
    /// The peer is someone else than was expected.
    #[error("unexpected ID {0:?}")]
    UnexpectedId(String),
    /// The peer is of another trust domain than was expected.
    #[error("unexpected trust domain {0:?}")]
    UnexpectedTrustDomain(String),
}

impl VerifyError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Unauthenticated
    }
}

/// The X.509 roots of a trust domain, parsed once. Share it behind an `Arc`.
pub struct TrustRoots {
    certificates: Vec<Certificate>,
}

impl TrustRoots {
    /// Parses root certificates; an unreadable one is an error.
    pub fn new<'a>(roots: impl IntoIterator<Item = &'a Arc<[u8]>>) -> Result<Self, ParseError> {
        let _ = roots.into_iter().count();
        todo!()
    }

    /// The roots of a bundle (tainted ones included: taint does not end trust, revocation does).
    pub fn from_bundle(bundle: &Bundle) -> Result<Self, ParseError> {
        Self::new(bundle.x509_authorities.iter().map(|a| &a.der))
    }

    /// The root certificates.
    pub fn certificates(&self) -> &[Certificate] {
        &self.certificates
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }
}

/// Verifies a chain, leaf first, and returns the leaf's SPIFFE ID. The caller has chosen `roots` by the trust domain
/// that it expects; see [`Certificate`] and [`TrustRoots`] for choosing by what the leaf says.
pub fn verify_x509_svid<C: AsRef<[u8]>>(
    chain: &[C],
    roots: &TrustRoots,
    now: UnixSeconds,
) -> Result<SpiffeId, VerifyError> {
    let _ = (chain, roots, now);
    todo!()
}

/// Verifies a chain by RFC 5280 alone, without any SPIFFE rule (x509pop's certificates of another PKI).
/// Returns the parsed leaf.
pub fn verify_x509_chain<C: AsRef<[u8]>>(
    chain: &[C],
    roots: &TrustRoots,
    now: UnixSeconds,
) -> Result<Certificate, VerifyError> {
    let _ = (chain, roots, now);
    todo!()
}

impl Certificate {
    /// The one SPIFFE ID of a certificate (X509-SVID section 2); the path may be empty.
    pub fn spiffe_id(&self) -> Result<SpiffeId, VerifyError> {
        match self.uri_sans() {
            [] => Err(VerifyError::NoUriSan),
            [uri] => SpiffeId::parse(uri).map_err(VerifyError::BadSpiffeId),
            _ => Err(VerifyError::ManyUriSans),
        }
    }

    /// The leaf rules of X509-SVID section 5.2, with those of sections 2 to 4 that a validator can check.
    pub fn check_leaf(&self) -> Result<SpiffeId, VerifyError> {
        todo!()
    }

    /// The rules for signing certificates of X509-SVID sections 3.2, 4.1 and 4.3.
    pub fn check_signing(&self) -> Result<(), VerifyError> {
        todo!()
    }
}
