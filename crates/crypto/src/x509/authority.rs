//! The X.509 authority: issues SVIDs from a template that is encoded once per authority.

use super::certificate::{Certificate, KeyUsage, ParseError};
use super::extensions::{key_usage_value, put_extension, san_value};
use super::extras::{Extension, with_added};
use super::name::DistinguishedName;
use super::time;
use crate::der;
use crate::key::{PublicKey, SignatureAlgorithm};
use crate::oid;
use crate::random::random_bytes;
use crate::signer::{SignError, Signer};
use finial_core::{ErrorKind, SpiffeId, TrustDomain, UnixSeconds};
use std::sync::Arc;

/// Most DNS names in one certificate.
const DNS_NAMES_MAX: usize = 1000;

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
        Self::new(u128::from_be_bytes(random_bytes()))
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
pub struct X509Ca(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    certificate: Certificate,
    /// When it ends, or what it hangs from does.
    not_after: UnixSeconds,
    upstream_chain: Vec<Arc<[u8]>>,
    signer: Arc<dyn Signer>,
    algorithm: SignatureAlgorithm,
    /// The signature's AlgorithmIdentifier, which stands in a certificate twice.
    algorithm_der: Vec<u8>,
    /// What follows the serial number in each leaf: the AlgorithmIdentifier and the issuer.
    after_serial: Vec<u8>,
    /// Key usage, extended key usage and basic constraints of leaves.
    leaf_constraints: Vec<u8>,
    /// The authority key identifier extension.
    authority_key_id: Vec<u8>,
}

impl X509Ca {
    /// Makes a self-signed authority.
    pub async fn self_sign(signer: Arc<dyn Signer>, template: &CaTemplate<'_>) -> Result<Self, IssueError> {
        Self::self_sign_with(signer, &CaTemplate { subject: &ca_subject(template), ..*template }, &[]).await
    }

    /// The same with the subject as it is, and further extensions.
    pub async fn self_sign_with(
        signer: Arc<dyn Signer>,
        template: &CaTemplate<'_>,
        added: &[Extension],
    ) -> Result<Self, IssueError> {
        if template.not_after < template.not_before {
            return Err(IssueError::EmptyValidity);
        }
        let key = signer.public_key().clone();
        let algorithm_der = algorithm_identifier(key.default_algorithm());
        let after_serial = [&algorithm_der[..], template.subject.der()].concat();
        let tbs = ca_tbs(template, (&after_serial, &[], added), template.not_after, &key);
        let signature = sign(&*signer, key.default_algorithm(), &tbs).await?;
        Self::new(signer, assemble(&tbs, &algorithm_der, &signature), Vec::new())
    }

    /// Takes an existing CA certificate with its signer (from the journal, or from an upstream authority).
    /// `upstream_chain` is what follows a leaf on the wire: this CA's certificate first, then further intermediates;
    /// empty for a self-signed CA.
    pub fn new(
        signer: Arc<dyn Signer>,
        certificate: Arc<[u8]>,
        upstream_chain: Vec<Arc<[u8]>>,
    ) -> Result<Self, IssueError> {
        let certificate = Certificate::parse(certificate)?;
        // A root without key usage may do anything (RFC 5280 section 4.2.1.3); openssl makes such.
        if !certificate.is_ca() || !certificate.key_usage().is_none_or(|u| u.contains(KeyUsage::CERT_SIGN)) {
            return Err(IssueError::NotCa);
        }
        if certificate.spki_der() != &**signer.public_key().spki_der() {
            return Err(IssueError::KeyMismatch);
        }
        let algorithm = signer.public_key().default_algorithm();
        let algorithm_der = algorithm_identifier(algorithm);
        let after_serial = [&algorithm_der[..], certificate.subject_der()].concat();
        let computed = signer.public_key().subject_key_id();
        let key_id = certificate.subject_key_id().unwrap_or(&computed);
        let authority_key_id = authority_key_id(key_id);
        let ends = upstream_chain.iter().map(|der| Ok(Certificate::parse(der.clone())?.not_after()));
        let ends = ends.collect::<Result<Vec<_>, ParseError>>()?;
        Ok(Self(Arc::new(Inner {
            not_after: ends.into_iter().fold(certificate.not_after(), UnixSeconds::min),
            upstream_chain,
            algorithm,
            algorithm_der,
            after_serial,
            leaf_constraints: leaf_constraints(),
            authority_key_id,
            signer,
            certificate,
        })))
    }

    /// Issues a leaf by the profile of SPIRE: one sign operation, a copy of the template, no other work.
    /// `not_after` is capped to the authority's own end here.
    pub async fn issue_svid(&self, template: &SvidTemplate<'_>) -> Result<Arc<[u8]>, IssueError> {
        self.issue_svid_with(template, &[]).await
    }

    /// The same with further extensions.
    pub async fn issue_svid_with(
        &self,
        template: &SvidTemplate<'_>,
        added: &[Extension],
    ) -> Result<Arc<[u8]>, IssueError> {
        let tbs = self.0.leaf_tbs(template, added)?;
        let signature = sign(&*self.0.signer, self.0.algorithm, &tbs).await?;
        Ok(assemble(&tbs, &self.0.algorithm_der, &signature))
    }

    /// The same without awaiting; `None` when the key is not in this process.
    pub fn issue_svid_now(&self, template: &SvidTemplate<'_>) -> Option<Result<Arc<[u8]>, IssueError>> {
        let key = self.0.signer.local()?;
        Some(self.0.leaf_tbs(template, &[]).and_then(|tbs| {
            let signature = key.sign_now(self.0.algorithm, &tbs)?;
            Ok(assemble(&tbs, &self.0.algorithm_der, &signature))
        }))
    }

    /// Issues a CA certificate below this one (downstream servers, upstream plugins). Its `not_after` is capped too.
    pub async fn issue_ca(&self, public_key: &PublicKey, template: &CaTemplate<'_>) -> Result<Arc<[u8]>, IssueError> {
        self.issue_ca_with(public_key, &CaTemplate { subject: &ca_subject(template), ..*template }, &[]).await
    }

    /// The same with the subject as it is, and further extensions.
    pub async fn issue_ca_with(
        &self,
        public_key: &PublicKey,
        template: &CaTemplate<'_>,
        added: &[Extension],
    ) -> Result<Arc<[u8]>, IssueError> {
        let inner = &*self.0;
        let not_after = template.not_after.min(inner.not_after);
        if not_after < template.not_before {
            return Err(IssueError::EmptyValidity);
        }
        let below = (&inner.after_serial[..], &inner.authority_key_id[..], added);
        let tbs = ca_tbs(template, below, not_after, public_key);
        let signature = sign(&*inner.signer, inner.algorithm, &tbs).await?;
        Ok(assemble(&tbs, &inner.algorithm_der, &signature))
    }

    /// The CA certificate, DER.
    pub fn certificate(&self) -> &Arc<[u8]> {
        self.0.certificate.der()
    }

    /// The CA certificate, parsed.
    pub fn parsed(&self) -> &Certificate {
        &self.0.certificate
    }

    /// What follows a leaf on the wire; empty for a self-signed CA.
    pub fn upstream_chain(&self) -> &[Arc<[u8]>] {
        &self.0.upstream_chain
    }

    /// A leaf with what must follow it on the wire.
    pub fn chain_of(&self, leaf: Arc<[u8]>) -> Vec<Arc<[u8]>> {
        std::iter::once(leaf).chain(self.0.upstream_chain.iter().cloned()).collect()
    }

    /// The subject key ID of the authority: that of its certificate, or else SHA-1 of its key.
    pub fn subject_key_id(&self) -> [u8; 20] {
        let own = self.0.certificate.subject_key_id().and_then(|id| id.try_into().ok());
        own.unwrap_or_else(|| self.0.signer.public_key().subject_key_id())
    }

    /// The subject of the authority.
    pub fn subject(&self) -> Result<DistinguishedName, ParseError> {
        self.0.certificate.subject()
    }

    /// Last second for which it signs: of its certificate, or of an intermediate that ends before.
    pub fn not_after(&self) -> UnixSeconds {
        self.0.not_after
    }

    /// The same for at most so long: what it hangs from ends then.
    pub fn ending(self, not_after: UnixSeconds) -> Self {
        let inner = Arc::unwrap_or_clone(self.0);
        Self(Arc::new(Inner { not_after: not_after.min(inner.not_after), ..inner }))
    }

    /// The signer.
    pub fn signer(&self) -> &Arc<dyn Signer> {
        &self.0.signer
    }
}

impl Inner {
    fn leaf_tbs(&self, template: &SvidTemplate<'_>, added: &[Extension]) -> Result<Vec<u8>, IssueError> {
        let not_after = template.not_after.min(self.not_after);
        if not_after < template.not_before {
            return Err(IssueError::EmptyValidity);
        }
        if template.id.path().is_empty() {
            return Err(IssueError::RootPath);
        }
        check_dns_names(template.dns_names)?;
        let subject_key_id = subject_key_id(template.public_key);
        let san = san_value(template.dns_names, Some(template.id.as_str()));
        let mut san_extension = Vec::with_capacity(san.len() + 24);
        // Section 3.1: the SAN is critical where there is no subject.
        put_extension(&mut san_extension, oid::SUBJECT_ALT_NAME, template.subject.is_empty(), &san);
        let own: [&[u8]; 4] = [&self.leaf_constraints, &subject_key_id, &self.authority_key_id, &san_extension];
        let (all, both);
        let extensions: &[&[u8]] = if added.is_empty() {
            &own
        } else {
            all = with_added(&own, added);
            both = [&all[..]];
            &both
        };
        Ok(tbs(
            template.serial,
            &self.after_serial,
            template.not_before,
            not_after,
            template.subject.der(),
            template.public_key,
            extensions,
        ))
    }
}

/// Writes a TBSCertificate in one pass, all lengths being known.
pub(crate) fn tbs(
    serial: SerialNumber,
    after_serial: &[u8],
    not_before: UnixSeconds,
    not_after: UnixSeconds,
    subject: &[u8],
    public_key: &PublicKey,
    extensions: &[&[u8]],
) -> Vec<u8> {
    /// `[0] { INTEGER 2 }`: version 3.
    const VERSION_3: [u8; 5] = [der::context(0), 3, der::INTEGER, 1, 2];
    let serial = serial.value().to_be_bytes();
    let mut validity = Vec::with_capacity(36);
    time::put(&mut validity, not_before);
    time::put(&mut validity, not_after);
    let spki: &[u8] = public_key.spki_der();
    let list = extensions.iter().map(|e| e.len()).sum::<usize>();
    let length = VERSION_3.len()
        + der::unsigned_len(&serial)
        + after_serial.len()
        + der::element_len(validity.len())
        + subject.len()
        + spki.len()
        + der::element_len(der::element_len(list));
    let mut out = Vec::with_capacity(der::element_len(length));
    der::put_header(&mut out, der::SEQUENCE, length);
    out.extend_from_slice(&VERSION_3);
    der::put_unsigned(&mut out, &serial);
    out.extend_from_slice(after_serial);
    der::put(&mut out, der::SEQUENCE, &validity);
    out.extend_from_slice(subject);
    out.extend_from_slice(spki);
    der::put_header(&mut out, der::context(3), der::element_len(list));
    der::put_header(&mut out, der::SEQUENCE, list);
    extensions.iter().for_each(|e| out.extend_from_slice(e));
    out
}

fn ca_subject(template: &CaTemplate<'_>) -> DistinguishedName {
    if template.subject.parts().serial_number.is_empty() {
        template.subject.with_serial_number(&template.serial.to_string())
    } else {
        template.subject.clone()
    }
}

/// The TBSCertificate of a CA; `authority_key_id` is a whole extension, or nothing when it signs itself.
fn ca_tbs(
    template: &CaTemplate<'_>,
    (after_serial, authority_key_id, added): (&[u8], &[u8], &[Extension]),
    not_after: UnixSeconds,
    key: &PublicKey,
) -> Vec<u8> {
    let mut constraints = Vec::new();
    let usage = KeyUsage(KeyUsage::CERT_SIGN.0 | KeyUsage::CRL_SIGN.0);
    put_extension(&mut constraints, oid::KEY_USAGE, true, &key_usage_value(usage));
    let is_ca = [der::SEQUENCE, 3, der::BOOLEAN, 1, 0xff];
    put_extension(&mut constraints, oid::BASIC_CONSTRAINTS, true, &is_ca);
    let subject = template.subject;
    let san = san_value(&[], Some(&template.trust_domain.id_string()));
    let mut san_extension = Vec::new();
    put_extension(&mut san_extension, oid::SUBJECT_ALT_NAME, subject.is_empty(), &san);
    let subject_key_id = subject_key_id(key);
    let all = with_added(&[&constraints[..], &subject_key_id, authority_key_id, &san_extension], added);
    tbs(template.serial, after_serial, template.not_before, not_after, subject.der(), key, &[&all])
}

/// The extensions that all leaves share, in Go's order.
fn leaf_constraints() -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    let usage = KeyUsage::DIGITAL_SIGNATURE.0 | KeyUsage::KEY_ENCIPHERMENT.0 | KeyUsage::KEY_AGREEMENT.0;
    put_extension(&mut out, oid::KEY_USAGE, true, &key_usage_value(KeyUsage(usage)));
    let mut purposes = Vec::new();
    der::put_nested(&mut purposes, der::SEQUENCE, |out| {
        der::put(out, der::OID, oid::SERVER_AUTH);
        der::put(out, der::OID, oid::CLIENT_AUTH);
    });
    put_extension(&mut out, oid::EXTENDED_KEY_USAGE, false, &purposes);
    put_extension(&mut out, oid::BASIC_CONSTRAINTS, true, &[der::SEQUENCE, 0]);
    out
}

fn subject_key_id(key: &PublicKey) -> Vec<u8> {
    let mut value = Vec::with_capacity(22);
    der::put(&mut value, der::OCTET_STRING, &key.subject_key_id());
    let mut out = Vec::with_capacity(31);
    put_extension(&mut out, oid::SUBJECT_KEY_ID, false, &value);
    out
}

fn authority_key_id(key_id: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(24);
    der::put_nested(&mut value, der::SEQUENCE, |out| der::put(out, der::context_primitive(0), key_id));
    let mut out = Vec::with_capacity(33);
    put_extension(&mut out, oid::AUTHORITY_KEY_ID, false, &value);
    out
}

fn check_dns_names(names: &[String]) -> Result<(), IssueError> {
    if names.len() > DNS_NAMES_MAX {
        return Err(IssueError::TooLarge);
    }
    let bad = names.iter().find(|name| !is_dns_san(name));
    bad.map_or(Ok(()), |n| Err(IssueError::BadDnsName(n.clone())))
}

/// Whether an SVID can carry the name: 1 to 255 printable ASCII characters without blanks.
pub fn is_dns_san(name: &str) -> bool {
    (1..=255).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic())
}

async fn sign(signer: &dyn Signer, algorithm: SignatureAlgorithm, tbs: &[u8]) -> Result<Vec<u8>, SignError> {
    match signer.local() {
        Some(key) => key.sign_now(algorithm, tbs),
        None => signer.sign(algorithm, tbs).await,
    }
}

/// Puts a certificate together.
pub(crate) fn assemble(tbs: &[u8], algorithm: &[u8], signature: &[u8]) -> Arc<[u8]> {
    let length = tbs.len() + algorithm.len() + der::element_len(signature.len() + 1);
    let mut out = Vec::with_capacity(der::element_len(length));
    der::put_header(&mut out, der::SEQUENCE, length);
    out.extend_from_slice(tbs);
    out.extend_from_slice(algorithm);
    der::put_bit_string(&mut out, signature);
    out.into()
}

/// The AlgorithmIdentifier that authorities sign with (never PSS, so five of the nine).
pub(crate) fn algorithm_identifier(algorithm: SignatureAlgorithm) -> Vec<u8> {
    let (id, null) = match algorithm {
        SignatureAlgorithm::EcdsaP256Sha256 => (oid::ECDSA_SHA256, false),
        SignatureAlgorithm::EcdsaP384Sha384 => (oid::ECDSA_SHA384, false),
        SignatureAlgorithm::EcdsaP521Sha512 => (oid::ECDSA_SHA512, false),
        SignatureAlgorithm::RsaPkcs1Sha384 => (oid::RSA_SHA384, true),
        SignatureAlgorithm::RsaPkcs1Sha512 => (oid::RSA_SHA512, true),
        _ => (oid::RSA_SHA256, true),
    };
    let mut out = Vec::with_capacity(15);
    der::put_nested(&mut out, der::SEQUENCE, |out| {
        der::put(out, der::OID, id);
        if null {
            der::put(out, der::NULL, &[]);
        }
    });
    out
}
