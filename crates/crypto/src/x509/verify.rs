//! Verification of X.509 chains: RFC 5280 paths, and the leaf rules of the X509-SVID standard.

use super::certificate::{Certificate, KeyUsage, ParseError};
use crate::der::{self, Reader};
use finial_core::{Bundle, ErrorKind, SpiffeId, SpiffeIdError, UnixSeconds};
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

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
    /// Section 4.2, section 5.1: a name constraint; such as webpki cannot evaluate permit nothing.
    #[error(
        "certificate path is not valid: name constraints of a signing certificate do not permit the certificate's names; \
         constraints of URIs and directory names are not evaluated and permit none (X509-SVID section 5.1)"
    )]
    NameConstraint,
    /// Section 5.1: any other rule of RFC 5280; names it.
    #[error("certificate path is not valid: {0} (X509-SVID section 5.1)")]
    Path(String),
    /// The peer is someone else than was expected.
    #[error("unexpected ID {got:?}, expected {expected:?}")]
    UnexpectedId {
        /// Who it is.
        got: String,
        /// Who was expected; more than one separated by commas.
        expected: String,
    },
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
    /// One for each of `certificates`, in the same order.
    anchors: Vec<TrustAnchor<'static>>,
}

impl TrustRoots {
    /// Parses root certificates; an unreadable one is an error.
    pub fn new<'a>(roots: impl IntoIterator<Item = &'a Arc<[u8]>>) -> Result<Self, ParseError> {
        let (mut certificates, mut anchors) = (Vec::new(), Vec::new());
        for root in roots {
            let certificate = Certificate::parse(root.clone())?;
            let der = CertificateDer::from(&**root);
            let anchor =
                webpki::anchor_from_trusted_cert(&der).map_err(|_| ParseError::Malformed("root certificate"))?;
            anchors.push(anchor.to_owned());
            certificates.push(certificate);
        }
        Ok(Self { certificates, anchors })
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

    /// The certificate of an anchor that webpki chose from ours.
    fn root_of(&self, anchor: &TrustAnchor<'_>) -> Option<&Certificate> {
        let at = self.anchors.iter().position(|ours| std::ptr::eq(ours, anchor))?;
        self.certificates.get(at)
    }
}

/// Verifies a chain, leaf first, and returns the leaf's SPIFFE ID. The caller has chosen `roots` by the trust domain
/// of that ID; [`crate::tls::BundleSource`] users let [`crate::tls::verify_peer`] choose.
pub fn verify_x509_svid<C: AsRef<[u8]>>(
    chain: &[C],
    roots: &TrustRoots,
    now: UnixSeconds,
) -> Result<SpiffeId, VerifyError> {
    let leaf = leaf_of(chain)?;
    let id = leaf.check_leaf()?;
    verify_path(chain, roots, now, Rules::Spiffe)?;
    Ok(id)
}

/// Verifies a chain by RFC 5280 alone, without any SPIFFE rule (x509pop's certificates of another PKI).
/// Returns the parsed leaf.
pub fn verify_x509_chain<C: AsRef<[u8]>>(
    chain: &[C],
    roots: &TrustRoots,
    now: UnixSeconds,
) -> Result<Certificate, VerifyError> {
    let leaf = leaf_of(chain)?;
    verify_path(chain, roots, now, Rules::Rfc5280)?;
    Ok(leaf)
}

/// The parsed leaf of a chain of bearable length.
pub(crate) fn leaf_of<C: AsRef<[u8]>>(chain: &[C]) -> Result<Certificate, VerifyError> {
    let leaf = chain.first().ok_or(VerifyError::EmptyChain)?;
    if chain.len() > CHAIN_LENGTH_MAX {
        return Err(VerifyError::ChainTooLong);
    }
    Ok(Certificate::parse(leaf.as_ref())?)
}

/// Which rules intermediates follow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rules {
    Rfc5280,
    Spiffe,
}

/// Builds and checks a path from the leaf to one of the roots: signatures, names, times, constraints, unknown critical
/// extensions by webpki; key usage of issuers and the validity of roots, which it leaves out, here.
pub(crate) fn verify_path<C: AsRef<[u8]>>(
    chain: &[C],
    roots: &TrustRoots,
    now: UnixSeconds,
    rules: Rules,
) -> Result<(), VerifyError> {
    let (leaf, rest) = chain.split_first().ok_or(VerifyError::EmptyChain)?;
    let leaf = CertificateDer::from(leaf.as_ref());
    let rest: Vec<CertificateDer<'_>> = rest.iter().map(|c| CertificateDer::from(c.as_ref())).collect();
    let seconds = u64::try_from(now).unwrap_or(0);
    let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    let leaf = webpki::EndEntityCert::try_from(&leaf).map_err(path_error)?;
    // webpki tries other paths after a refusal of ours and then reports its own error, so ours is kept aside.
    let refusal: RefCell<Option<VerifyError>> = RefCell::new(None);
    let check = |path: &webpki::VerifiedPath<'_>| {
        let checked = path
            .intermediate_certificates()
            .try_for_each(|cert| check_issuer(&Certificate::parse(&*cert.der())?, rules))
            .and_then(|()| {
                let root = roots.root_of(path.anchor()).ok_or(VerifyError::UnknownAuthority)?;
                check_root(root, path.intermediate_certificates().count(), now)
            });
        checked.map_err(|e| {
            refusal.replace(Some(e));
            webpki::Error::UnknownIssuer
        })
    };
    match leaf.verify_for_usage(ALGORITHMS, &roots.anchors, &rest, time, AnyPurpose, None, Some(&check)) {
        Ok(_) => Ok(()),
        Err(error) => Err(refusal.take().unwrap_or_else(|| path_error(error))),
    }
}

/// What webpki does not check of an intermediate.
fn check_issuer(certificate: &Certificate, rules: Rules) -> Result<(), VerifyError> {
    if rules == Rules::Spiffe {
        return certificate.check_signing();
    }
    match certificate.key_usage() {
        Some(usage) if !usage.contains(KeyUsage::CERT_SIGN) => Err(VerifyError::IssuerNotCa),
        _ => Ok(()),
    }
}

/// What webpki does not check of a root: that it is valid now, may sign, and allows that many intermediates (as Go
/// checks it; RFC 5280 section 6.1 leaves it to implementations).
fn check_root(root: &Certificate, intermediates: usize, now: UnixSeconds) -> Result<(), VerifyError> {
    if now < root.not_before() {
        return Err(VerifyError::NotYetValid);
    }
    if now > root.not_after() {
        return Err(VerifyError::Expired);
    }
    let may_sign = root.key_usage().is_none_or(|u| u.contains(KeyUsage::CERT_SIGN));
    if !may_sign || (root.is_v3() && !root.is_ca()) {
        return Err(VerifyError::IssuerNotCa);
    }
    match root.path_len() {
        Some(limit) if intermediates > limit as usize => {
            Err(VerifyError::Path("more intermediates than the root allows".into()))
        }
        _ => Ok(()),
    }
}

/// The signature algorithms of certificates: those of the keys that we take, and Ed25519, which roots of others have.
const ALGORITHMS: &[&dyn SignatureVerificationAlgorithm] = &[
    webpki::aws_lc_rs::ECDSA_P256_SHA256,
    webpki::aws_lc_rs::ECDSA_P384_SHA384,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA256,
    webpki::aws_lc_rs::ECDSA_P256_SHA384,
    webpki::aws_lc_rs::ECDSA_P256_SHA512,
    webpki::aws_lc_rs::ECDSA_P384_SHA256,
    webpki::aws_lc_rs::ECDSA_P384_SHA512,
    webpki::aws_lc_rs::ECDSA_P521_SHA256,
    webpki::aws_lc_rs::ECDSA_P521_SHA384,
    webpki::aws_lc_rs::ECDSA_P521_SHA512,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA384,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA512,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA256_ABSENT_PARAMS,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA384_ABSENT_PARAMS,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA512_ABSENT_PARAMS,
    webpki::aws_lc_rs::ED25519,
];

/// Extended key usage is a rule of ours for leaves; SPIFFE libraries ignore that of intermediates (section 4.4).
struct AnyPurpose;

impl webpki::ExtendedKeyUsageValidator for AnyPurpose {
    fn validate(&self, _iter: webpki::KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}

fn path_error(error: webpki::Error) -> VerifyError {
    match error {
        webpki::Error::CertExpired { .. } => VerifyError::Expired,
        webpki::Error::CertNotValidYet { .. } => VerifyError::NotYetValid,
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => VerifyError::UnknownAuthority,
        webpki::Error::NameConstraintViolation => VerifyError::NameConstraint,
        webpki::Error::CaUsedAsEndEntity => VerifyError::LeafIsCa,
        webpki::Error::EndEntityUsedAsCa => VerifyError::IssuerNotCa,
        webpki::Error::UnsupportedSignatureAlgorithmContext(context) => VerifyError::Path(format!(
            "no signatures of algorithm {} are verified",
            Reader::new(&context.signature_algorithm_id).read(der::OID).map(der::dotted).unwrap_or_default()
        )),
        other => VerifyError::Path(format!("{other:?}")),
    }
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
        let id = self.spiffe_id()?;
        if id.path().is_empty() {
            return Err(VerifyError::RootPath);
        }
        if self.is_ca() {
            return Err(VerifyError::LeafIsCa);
        }
        let usage = self.key_usage().ok_or(VerifyError::NoKeyUsage)?;
        if usage.contains(KeyUsage::CERT_SIGN) {
            return Err(VerifyError::LeafCertSign);
        }
        if usage.contains(KeyUsage::CRL_SIGN) {
            return Err(VerifyError::LeafCrlSign);
        }
        if !self.key_usage_critical() {
            return Err(VerifyError::KeyUsageNotCritical);
        }
        if !usage.contains(KeyUsage::DIGITAL_SIGNATURE) {
            return Err(VerifyError::NoDigitalSignature);
        }
        let purposes = self.extended_key_usage();
        if purposes.present && !(purposes.server_auth && purposes.client_auth) {
            return Err(VerifyError::IncompleteExtendedKeyUsage);
        }
        if self.subject_der().len() <= 2 && !self.san_critical() {
            return Err(VerifyError::SanNotCritical);
        }
        Ok(id)
    }

    /// The rules for signing certificates of X509-SVID sections 3.2, 4.1 and 4.3.
    pub fn check_signing(&self) -> Result<(), VerifyError> {
        if !self.is_ca() || !self.key_usage().is_some_and(|u| u.contains(KeyUsage::CERT_SIGN)) {
            return Err(VerifyError::IssuerNotCa);
        }
        // Only signing certificates that are SVIDs themselves follow the rules for SVIDs; URIs of other kinds may be
        // there for the sake of other PKIs.
        let mut ids = self.uri_sans().iter().filter_map(|uri| uri.strip_prefix("spiffe://"));
        let Some(id) = ids.next() else { return Ok(()) };
        if ids.next().is_some() {
            return Err(VerifyError::ManyUriSans);
        }
        if !self.key_usage_critical() {
            return Err(VerifyError::KeyUsageNotCritical);
        }
        // The standard's own example has a lone slash after the trust domain.
        match id.strip_suffix('/').unwrap_or(id).contains('/') {
            true => Err(VerifyError::IssuerHasPath),
            false => Ok(()),
        }
    }
}
