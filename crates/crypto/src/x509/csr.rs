//! Certificate signing requests (PKCS#10).

use super::certificate::ParseError;
use super::name::DistinguishedName;
use crate::key::{KeyError, PublicKey};
use crate::signer::{SignError, Signer};
use finial_core::{SpiffeId, TrustDomain};

/// Largest CSR that is read, in bytes.
pub const CSR_BYTES_MAX: usize = 16 << 10;

/// A parsed CSR with an acceptable key. Its signature is not yet verified.
#[derive(Clone, Debug)]
pub struct Csr {
    public_key: PublicKey,
}

impl Csr {
    /// Parses strict DER, at most [`CSR_BYTES_MAX`]; refuses keys that [`PublicKey`] refuses.
    pub fn parse(der: &[u8]) -> Result<Self, ParseError> {
        let _ = der;
        todo!()
    }

    /// Checks that whoever made the request holds the private key.
    pub fn verify_proof_of_possession(&self) -> Result<(), KeyError> {
        todo!()
    }

    /// The key to certify.
    pub fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// The subject, DER.
    pub fn subject_der(&self) -> &[u8] {
        todo!()
    }

    /// The subject.
    pub fn subject(&self) -> Result<DistinguishedName, ParseError> {
        DistinguishedName::from_der(self.subject_der())
    }

    /// URI SANs as they are written.
    pub fn uri_sans(&self) -> &[Box<str>] {
        todo!()
    }

    /// DNS SANs as they are written.
    pub fn dns_names(&self) -> &[Box<str>] {
        todo!()
    }
}

/// Makes a CSR for a leaf: the subject (`None` = empty), a SPIFFE ID if given, and DNS names.
pub async fn create_csr(
    signer: &dyn Signer,
    subject: Option<&DistinguishedName>,
    id: Option<&SpiffeId>,
    dns_names: &[String],
) -> Result<Vec<u8>, SignError> {
    let _ = (signer, subject, id, dns_names);
    todo!()
}

/// Makes the CSR that a server sends to its upstream authority: the CA subject and the trust domain's own ID.
pub async fn create_ca_csr(
    signer: &dyn Signer,
    subject: &DistinguishedName,
    trust_domain: &TrustDomain,
) -> Result<Vec<u8>, SignError> {
    let _ = (signer, subject, trust_domain);
    todo!()
}
