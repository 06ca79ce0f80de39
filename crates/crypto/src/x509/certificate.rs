//! A parsed view of a certificate.

use super::extensions::{Extensions, range_in};
use super::name::DistinguishedName;
use super::time;
use super::verify::CHAIN_LENGTH_MAX;
use crate::der::{self, Reader};
use crate::key::{Hash, KeyError, Kind, PublicKey};
use crate::oid;
use finial_core::{ErrorKind, UnixSeconds};
use std::ops::Range;
use std::sync::Arc;

/// Largest certificate that is read, in bytes.
pub const CERTIFICATE_BYTES_MAX: usize = 64 << 10;
/// Most roots of one bundle.
const BUNDLE_LENGTH_MAX: usize = 10_000;
/// Longest serial number, bytes (RFC 5280 section 4.1.2.2).
const SERIAL_BYTES_MAX: usize = 20;

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
    tbs: Range<usize>,
    serial: Range<usize>,
    issuer: Range<usize>,
    subject: Range<usize>,
    spki: Range<usize>,
    signature_algorithm: Range<usize>,
    signature: Range<usize>,
    not_before: UnixSeconds,
    not_after: UnixSeconds,
    /// Only version 3 certificates have constraints at all.
    is_v3: bool,
    extensions: Extensions,
}

impl Certificate {
    /// Parses strict DER, at most [`CERTIFICATE_BYTES_MAX`]. Nothing is verified.
    pub fn parse(der: impl Into<Arc<[u8]>>) -> Result<Self, ParseError> {
        let der = der.into();
        if der.len() > CERTIFICATE_BYTES_MAX {
            return Err(ParseError::TooLarge { found: der.len(), limit: CERTIFICATE_BYTES_MAX });
        }
        let parsed = parse(&der)?;
        Ok(Self { der, ..parsed })
    }

    /// Splits certificates that follow each other without a gap, as the Workload API carries chains; at most
    /// [`CHAIN_LENGTH_MAX`].
    pub fn parse_chain(der: &[u8]) -> Result<Vec<Self>, ParseError> {
        Self::parse_many(der, CHAIN_LENGTH_MAX)
    }

    /// The same for roots, as the Workload API carries bundles; at most 10,000.
    pub fn parse_bundle(der: &[u8]) -> Result<Vec<Self>, ParseError> {
        Self::parse_many(der, BUNDLE_LENGTH_MAX)
    }

    fn parse_many(der: &[u8], max: usize) -> Result<Vec<Self>, ParseError> {
        let mut reader = Reader::new(der);
        let mut chain = Vec::new();
        while !reader.is_empty() {
            let one = reader.element(der::SEQUENCE).ok_or(ParseError::Malformed("certificate chain"))?;
            if chain.len() == max {
                return Err(ParseError::Malformed("certificate chain: too long"));
            }
            chain.push(Self::parse(one.whole)?);
        }
        Ok(chain)
    }

    fn at(&self, range: &Range<usize>) -> &[u8] {
        self.der.get(range.clone()).unwrap_or_default()
    }

    /// The whole certificate.
    pub fn der(&self) -> &Arc<[u8]> {
        &self.der
    }

    /// The subject, DER.
    pub fn subject_der(&self) -> &[u8] {
        self.at(&self.subject)
    }

    /// The issuer, DER.
    pub fn issuer_der(&self) -> &[u8] {
        self.at(&self.issuer)
    }

    /// The subject.
    pub fn subject(&self) -> Result<DistinguishedName, ParseError> {
        DistinguishedName::from_der(self.subject_der())
    }

    /// The issuer.
    pub fn issuer(&self) -> Result<DistinguishedName, ParseError> {
        DistinguishedName::from_der(self.issuer_der())
    }

    /// The serial number, big endian, without leading zeros; at most 20 bytes.
    pub fn serial(&self) -> &[u8] {
        self.at(&self.serial)
    }

    /// The serial number in decimal, which is how SPIRE keeps and prints it.
    pub fn serial_decimal(&self) -> String {
        decimal(self.serial())
    }

    /// First second of validity.
    pub fn not_before(&self) -> UnixSeconds {
        self.not_before
    }

    /// Last second of validity.
    pub fn not_after(&self) -> UnixSeconds {
        self.not_after
    }

    /// URI SANs as they are written.
    pub fn uri_sans(&self) -> &[Box<str>] {
        &self.extensions.uri_sans
    }

    /// DNS SANs as they are written.
    pub fn dns_names(&self) -> &[Box<str>] {
        &self.extensions.dns_names
    }

    /// Whether the subjectAltName extension is marked critical.
    pub fn san_critical(&self) -> bool {
        self.extensions.san_critical
    }

    /// Whether it is a version 3 certificate (others have no extensions).
    pub fn is_v3(&self) -> bool {
        self.is_v3
    }

    /// `cA` of the basic constraints.
    pub fn is_ca(&self) -> bool {
        self.extensions.is_ca
    }

    /// Whether the basic constraints extension is there.
    pub fn has_basic_constraints(&self) -> bool {
        self.extensions.basic_constraints
    }

    /// `pathLenConstraint` of the basic constraints.
    pub fn path_len(&self) -> Option<u32> {
        self.extensions.path_len
    }

    /// The key usage extension.
    pub fn key_usage(&self) -> Option<KeyUsage> {
        self.extensions.key_usage
    }

    /// Whether the key usage extension is marked critical.
    pub fn key_usage_critical(&self) -> bool {
        self.extensions.key_usage_critical
    }

    /// The extended key usage extension.
    pub fn extended_key_usage(&self) -> ExtendedKeyUsage {
        self.extensions.extended_key_usage
    }

    /// The subject key identifier extension.
    pub fn subject_key_id(&self) -> Option<&[u8]> {
        self.extensions.subject_key_id.as_ref().map(|r| self.at(r))
    }

    /// The key identifier in the authority key identifier extension.
    pub fn authority_key_id(&self) -> Option<&[u8]> {
        self.extensions.authority_key_id.as_ref().map(|r| self.at(r))
    }

    /// The DER SubjectPublicKeyInfo, unchecked.
    pub fn spki_der(&self) -> &[u8] {
        self.at(&self.spki)
    }

    /// The public key, checked.
    pub fn public_key(&self) -> Result<PublicKey, KeyError> {
        PublicKey::from_spki(self.spki_der())
    }

    /// Whether the certificate names itself as its issuer and its own key signed it.
    pub fn is_self_signed(&self) -> bool {
        self.subject_der() == self.issuer_der() && self.public_key().is_ok_and(|k| self.verify_signed_by(&k).is_ok())
    }

    /// Whether `issuer`'s key signed this certificate. Says nothing about names, times or constraints.
    pub fn verify_signed_by(&self, issuer: &PublicKey) -> Result<(), KeyError> {
        verify_signature(issuer, self.at(&self.signature_algorithm), self.at(&self.tbs), self.at(&self.signature))
    }
}

fn parse(der: &[u8]) -> Result<Certificate, ParseError> {
    let malformed = ParseError::Malformed;
    let range = |part: &[u8], what| range_in(der, part).ok_or(malformed(what));
    let mut outer = Reader::new(der);
    let mut certificate = outer.nested(der::SEQUENCE).ok_or(malformed("certificate"))?;
    outer.end().ok_or(ParseError::TrailingData("certificate"))?;
    let tbs_element = certificate.element(der::SEQUENCE).ok_or(malformed("TBSCertificate"))?;
    let algorithm = certificate.element(der::SEQUENCE).ok_or(malformed("signatureAlgorithm"))?.whole;
    let signature = certificate.bit_string().ok_or(malformed("signatureValue"))?;
    certificate.end().ok_or(ParseError::TrailingData("signatureValue"))?;

    let mut tbs = Reader::new(tbs_element.content);
    let version = match tbs.optional(der::context(0)).ok_or(malformed("version"))? {
        None => 0,
        Some(inner) => {
            let mut inner = Reader::new(inner);
            inner.small().filter(|_| inner.is_empty()).ok_or(malformed("version"))?
        }
    };
    if version > 2 {
        return Err(ParseError::Version);
    }
    let serial = tbs.unsigned().filter(|s| s.len() <= SERIAL_BYTES_MAX).ok_or(malformed("serialNumber"))?;
    let inner_algorithm = tbs.element(der::SEQUENCE).ok_or(malformed("signature"))?.whole;
    if inner_algorithm != algorithm {
        return Err(malformed("signatureAlgorithm: not the one inside"));
    }
    let issuer = tbs.element(der::SEQUENCE).ok_or(malformed("issuer"))?.whole;
    let mut validity = tbs.nested(der::SEQUENCE).ok_or(malformed("validity"))?;
    let not_before = time::read(&mut validity).ok_or(malformed("notBefore"))?;
    let not_after = time::read(&mut validity).ok_or(malformed("notAfter"))?;
    validity.end().ok_or(malformed("validity"))?;
    let subject = tbs.element(der::SEQUENCE).ok_or(malformed("subject"))?.whole;
    let spki = tbs.element(der::SEQUENCE).ok_or(malformed("subjectPublicKeyInfo"))?.whole;
    for unique_id in [1, 2] {
        tbs.optional(der::context_primitive(unique_id)).ok_or(malformed("uniqueID"))?;
    }
    let extensions = match tbs.optional(der::context(3)).ok_or(malformed("extensions"))? {
        None => Extensions::default(),
        Some(_) if version < 2 => return Err(ParseError::Version),
        Some(explicit) => {
            let mut explicit = Reader::new(explicit);
            let list = explicit.nested(der::SEQUENCE).ok_or(malformed("extensions"))?;
            explicit.end().ok_or(malformed("extensions"))?;
            Extensions::read(der, list)?
        }
    };
    tbs.end().ok_or(ParseError::TrailingData("extensions"))?;
    Ok(Certificate {
        der: Arc::default(),
        tbs: range(tbs_element.whole, "TBSCertificate")?,
        serial: range(serial, "serialNumber")?,
        issuer: range(issuer, "issuer")?,
        subject: range(subject, "subject")?,
        spki: range(spki, "subjectPublicKeyInfo")?,
        signature_algorithm: range(algorithm, "signatureAlgorithm")?,
        signature: range(signature, "signatureValue")?,
        not_before,
        not_after,
        is_v3: version == 2,
        extensions,
    })
}

/// RSASSA-PSS with the same hash for message and mask and a salt as long as the hash: the only parameters in use.
const PSS: [(Hash, u8, u8); 3] = [(Hash::Sha256, 1, 32), (Hash::Sha384, 2, 48), (Hash::Sha512, 3, 64)];

/// The whole AlgorithmIdentifier of RSASSA-PSS with SHA-2 number `sha` (RFC 4055).
fn pss_identifier(sha: u8, salt: u8) -> Vec<u8> {
    let hash = |out: &mut Vec<u8>| {
        der::put_nested(out, der::SEQUENCE, |out| {
            der::put(out, der::OID, &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, sha]);
            der::put(out, der::NULL, &[]);
        });
    };
    let mut out = Vec::new();
    der::put_nested(&mut out, der::SEQUENCE, |out| {
        der::put(out, der::OID, oid::RSA_PSS);
        der::put_nested(out, der::SEQUENCE, |out| {
            der::put_nested(out, der::context(0), hash);
            der::put_nested(out, der::context(1), |out| {
                der::put_nested(out, der::SEQUENCE, |out| {
                    der::put(out, der::OID, oid::MGF1);
                    hash(out);
                });
            });
            der::put_nested(out, der::context(2), |out| der::put(out, der::INTEGER, &[salt]));
        });
    });
    out
}

/// Verifies a signature of X.509, given its whole AlgorithmIdentifier.
pub(crate) fn verify_signature(key: &PublicKey, algorithm: &[u8], message: &[u8], sig: &[u8]) -> Result<(), KeyError> {
    let mut inner = Reader::new(algorithm).nested(der::SEQUENCE).ok_or(KeyError::Malformed)?;
    let id = inner.read(der::OID).ok_or(KeyError::Malformed)?;
    let (is_rsa, hash) = match id {
        oid::ECDSA_SHA256 => (false, Hash::Sha256),
        oid::ECDSA_SHA384 => (false, Hash::Sha384),
        oid::ECDSA_SHA512 => (false, Hash::Sha512),
        oid::RSA_SHA256 => (true, Hash::Sha256),
        oid::RSA_SHA384 => (true, Hash::Sha384),
        oid::RSA_SHA512 => (true, Hash::Sha512),
        oid::RSA_PSS => {
            let hash = PSS.into_iter().find(|(_, sha, salt)| pss_identifier(*sha, *salt) == algorithm);
            return match (hash, key.kind()) {
                (Some((hash, ..)), Kind::Rsa(_)) => key.verify_pss(hash, message, sig),
                _ => Err(KeyError::WrongAlgorithm("RSASSA-PSS".into())),
            };
        }
        other => return Err(KeyError::WrongAlgorithm(der::dotted(other))),
    };
    let parameters = inner.optional(der::NULL).ok_or(KeyError::Malformed)?;
    // RFC 4055: NULL with RSA, though some leave it out; RFC 5758: nothing with ECDSA.
    if is_rsa != matches!(key.kind(), Kind::Rsa(_)) || !inner.is_empty() || (!is_rsa && parameters.is_some()) {
        return Err(KeyError::WrongAlgorithm(der::dotted(id)));
    }
    key.verify_plain(hash, message, sig)
}

/// A big-endian magnitude in decimal.
fn decimal(magnitude: &[u8]) -> String {
    if magnitude.len() <= 16 {
        return magnitude.iter().fold(0u128, |n, b| n << 8 | u128::from(*b)).to_string();
    }
    // Long division by 10^9, nine digits at a time.
    let mut rest = magnitude.to_vec();
    let mut groups = Vec::new();
    while rest.iter().any(|b| *b != 0) {
        let mut remainder = 0u64;
        for byte in &mut rest {
            let value = remainder << 8 | u64::from(*byte);
            *byte = (value / 1_000_000_000) as u8;
            remainder = value % 1_000_000_000;
        }
        groups.push(remainder);
    }
    let mut text = groups.pop().unwrap_or(0).to_string();
    groups.iter().rev().for_each(|group| text.push_str(&format!("{group:09}")));
    text
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Certificate({} {:?})", self.serial_decimal(), self.uri_sans())
    }
}
impl PartialEq for Certificate {
    fn eq(&self, other: &Self) -> bool {
        self.der == other.der
    }
}
impl Eq for Certificate {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_print_in_decimal() {
        assert_eq!(decimal(&[]), "0");
        assert_eq!(decimal(&[0xff; 16]), u128::MAX.to_string());
        assert_eq!(decimal(&[0xff; 20]), "1461501637330902918203684832716283019655932542975");
        assert_eq!(
            decimal(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            "340282366920938463463374607431768211456"
        );
    }
}
