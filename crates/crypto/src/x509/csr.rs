//! Certificate signing requests (PKCS#10).

use super::authority::algorithm_identifier;
use super::certificate::{ParseError, verify_signature};
use super::extensions::{Extensions, put_extension, range_in, san_value};
use super::extras::{Extension, with_added};
use super::name::DistinguishedName;
use crate::der::{self, Reader};
use crate::key::{KeyError, PublicKey};
use crate::oid;
use crate::signer::{SignError, Signer};
use finial_core::{SpiffeId, TrustDomain};
use std::ops::Range;

/// Largest CSR that is read, in bytes.
pub const CSR_BYTES_MAX: usize = 16 << 10;

/// A parsed CSR with an acceptable key. Its signature is not yet verified.
#[derive(Clone)]
pub struct Csr {
    der: Box<[u8]>,
    info: Range<usize>,
    subject: Range<usize>,
    algorithm: Range<usize>,
    signature: Range<usize>,
    public_key: PublicKey,
    extensions: Extensions,
}

impl Csr {
    /// Parses strict DER, at most [`CSR_BYTES_MAX`]; refuses keys that [`PublicKey`] refuses.
    pub fn parse(der: &[u8]) -> Result<Self, ParseError> {
        if der.len() > CSR_BYTES_MAX {
            return Err(ParseError::TooLarge { found: der.len(), limit: CSR_BYTES_MAX });
        }
        let malformed = ParseError::Malformed;
        let range = |part: &[u8], what| range_in(der, part).ok_or(malformed(what));
        let mut outer = Reader::new(der);
        let mut request = outer.nested(der::SEQUENCE).ok_or(malformed("certificate request"))?;
        outer.end().ok_or(ParseError::TrailingData("certificate request"))?;
        let info = request.element(der::SEQUENCE).ok_or(malformed("certificationRequestInfo"))?;
        let algorithm = request.element(der::SEQUENCE).ok_or(malformed("signatureAlgorithm"))?.whole;
        let signature = request.bit_string().ok_or(malformed("signature"))?;
        request.end().ok_or(ParseError::TrailingData("signature"))?;

        let mut fields = Reader::new(info.content);
        if fields.small().ok_or(malformed("version"))? != 0 {
            return Err(ParseError::Version);
        }
        let subject = fields.element(der::SEQUENCE).ok_or(malformed("subject"))?.whole;
        let spki = fields.element(der::SEQUENCE).ok_or(malformed("subjectPKInfo"))?.whole;
        let attributes = fields.optional(der::context(0)).ok_or(malformed("attributes"))?;
        fields.end().ok_or(ParseError::TrailingData("attributes"))?;
        let extensions = requested_extensions(der, attributes.unwrap_or_default())?;
        Ok(Self {
            info: range(info.whole, "certificationRequestInfo")?,
            subject: range(subject, "subject")?,
            algorithm: range(algorithm, "signatureAlgorithm")?,
            signature: range(signature, "signature")?,
            public_key: PublicKey::from_spki(spki)?,
            extensions,
            der: der.into(),
        })
    }

    fn at(&self, range: &Range<usize>) -> &[u8] {
        self.der.get(range.clone()).unwrap_or_default()
    }

    /// Checks that whoever made the request holds the private key.
    pub fn verify_proof_of_possession(&self) -> Result<(), KeyError> {
        verify_signature(&self.public_key, self.at(&self.algorithm), self.at(&self.info), self.at(&self.signature))
    }

    /// The key to certify.
    pub fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// The subject, DER.
    pub fn subject_der(&self) -> &[u8] {
        self.at(&self.subject)
    }

    /// The subject.
    pub fn subject(&self) -> Result<DistinguishedName, ParseError> {
        DistinguishedName::from_der(self.subject_der())
    }

    /// URI SANs as they are written.
    pub fn uri_sans(&self) -> &[Box<str>] {
        &self.extensions.uri_sans
    }

    /// DNS SANs as they are written.
    pub fn dns_names(&self) -> &[Box<str>] {
        &self.extensions.dns_names
    }
}

impl std::fmt::Debug for Csr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Csr({:?} {:?})", self.public_key, self.uri_sans())
    }
}

/// The extensions of the `extensionRequest` attribute; other attributes are passed over.
fn requested_extensions(der: &[u8], attributes: &[u8]) -> Result<Extensions, ParseError> {
    let malformed = || ParseError::Malformed("attributes");
    let mut attributes = Reader::new(attributes);
    let mut found = None;
    while !attributes.is_empty() {
        let mut attribute = attributes.nested(der::SEQUENCE).ok_or_else(malformed)?;
        let id = attribute.read(der::OID).ok_or_else(malformed)?;
        let mut values = attribute.nested(der::SET).ok_or_else(malformed)?;
        attribute.end().ok_or_else(malformed)?;
        if id == oid::EXTENSION_REQUEST {
            let list = values.nested(der::SEQUENCE).ok_or_else(malformed)?;
            values.end().ok_or_else(malformed)?;
            if found.replace(Extensions::read(der, list)?).is_some() {
                return Err(ParseError::DuplicateExtension("extensionRequest".into()));
            }
        }
    }
    Ok(found.unwrap_or_default())
}

/// Makes a CSR for a leaf: the subject (`None` = empty), a SPIFFE ID if given, and DNS names.
pub async fn create_csr(
    signer: &dyn Signer,
    subject: Option<&DistinguishedName>,
    id: Option<&SpiffeId>,
    dns_names: &[String],
) -> Result<Vec<u8>, SignError> {
    create(signer, subject.map(DistinguishedName::der), id.map(SpiffeId::as_str), dns_names, &[]).await
}

/// Makes the CSR that a server sends to its upstream authority: the CA subject and the trust domain's own ID.
pub async fn create_ca_csr(
    signer: &dyn Signer,
    subject: &DistinguishedName,
    trust_domain: &TrustDomain,
) -> Result<Vec<u8>, SignError> {
    create_ca_csr_with(signer, subject, trust_domain, &[]).await
}

/// The same with further extensions.
pub async fn create_ca_csr_with(
    signer: &dyn Signer,
    subject: &DistinguishedName,
    trust_domain: &TrustDomain,
    added: &[Extension],
) -> Result<Vec<u8>, SignError> {
    create(signer, Some(subject.der()), Some(&trust_domain.id_string()), &[], added).await
}

async fn create(
    signer: &dyn Signer,
    subject: Option<&[u8]>,
    uri: Option<&str>,
    dns_names: &[String],
    added: &[Extension],
) -> Result<Vec<u8>, SignError> {
    let mut own = Vec::new();
    if uri.is_some() || !dns_names.is_empty() {
        put_extension(&mut own, oid::SUBJECT_ALT_NAME, subject.is_none(), &san_value(dns_names, uri));
    }
    let extensions = with_added(&[&own], added);
    let key = signer.public_key();
    let mut info = Vec::with_capacity(256);
    der::put_nested(&mut info, der::SEQUENCE, |out| {
        der::put_unsigned(out, &[]);
        out.extend_from_slice(subject.unwrap_or(&[der::SEQUENCE, 0]));
        out.extend_from_slice(key.spki_der());
        der::put_nested(out, der::context(0), |out| {
            if !extensions.is_empty() {
                put_extension_request(out, &extensions);
            }
        });
    });
    let algorithm = key.default_algorithm();
    let signature = match signer.local() {
        Some(local) => local.sign_now(algorithm, &info)?,
        None => signer.sign(algorithm, &info).await?,
    };
    let mut csr = Vec::with_capacity(info.len() + signature.len() + 32);
    der::put_nested(&mut csr, der::SEQUENCE, |out| {
        out.extend_from_slice(&info);
        out.extend_from_slice(&algorithm_identifier(algorithm));
        der::put_bit_string(out, &signature);
    });
    Ok(csr)
}

fn put_extension_request(out: &mut Vec<u8>, extensions: &[u8]) {
    der::put_nested(out, der::SEQUENCE, |out| {
        der::put(out, der::OID, oid::EXTENSION_REQUEST);
        der::put_nested(out, der::SET, |out| {
            der::put(out, der::SEQUENCE, extensions);
        });
    });
}
