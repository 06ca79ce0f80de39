//! A CA whose key an upstream authority has at hand, wherever it came from.

use crate::{MintedX509Ca, PluginError};
use finial_core::{TrustDomain, UnixSeconds};
use finial_crypto::{
    CaTemplate, Certificate, Csr, DistinguishedName, IssueError, PrivateKey, SerialNumber, Signer, SvidTemplate,
    TrustRoots, VerifyError, X509Ca, verify_x509_chain,
};
use std::fmt::Display;
use std::sync::Arc;

/// Certificates are valid from this long before they are signed, for verifiers whose clocks run late.
const BACKDATE_SECONDS: i64 = 10;
/// The lifetime of what is signed when the server has no preference.
const DEFAULT_TTL_SECONDS: i64 = 3600;

/// Reads the request for a trust domain's authority: its sender has the key, and its one URI SAN is the trust domain's ID.
///
/// # Errors
/// `unable to sign CSR: …`, in SPIRE's words.
pub fn check_ca_csr(csr: &[u8], trust_domain: &TrustDomain) -> Result<Csr, PluginError> {
    let csr = Csr::parse(csr).map_err(|e| unable(&format!("unable to parse CSR: {e}")))?;
    csr.verify_proof_of_possession().map_err(|e| unable(&format!("CSR signature check failed: {e}")))?;
    match csr.uri_sans() {
        [uri] if **uri == *trust_domain.id_string() => Ok(csr),
        [uri] => Err(unable(&format!(
            "CSR with SPIFFE ID {uri:?} is invalid: must use the trust domain ID for trust domain {:?}",
            trust_domain.as_str()
        ))),
        _ => Err(unable(&"CSR must have exactly one URI SAN")),
    }
}

fn unable(why: &dyn Display) -> PluginError {
    PluginError::internal(format!("unable to sign CSR: {why}"))
}

/// A CA with its key, verified.
pub struct SigningCa {
    ca: X509Ca,
    /// What follows a certificate that the CA signs: nothing when the CA is a root.
    chain: Vec<Arc<[u8]>>,
    roots: Vec<Arc<[u8]>>,
}

impl SigningCa {
    /// Of a key, its certificate with the intermediates that follow, and the roots; `bundle_key` is what configuration calls
    /// the latter. Without them the one certificate is its own root, also, as in SPIRE, when it is not self-signed.
    ///
    /// # Errors
    /// When key, certificates and roots do not belong together, or do not verify at this time.
    pub fn new(
        key: PrivateKey,
        certificates: Vec<Arc<[u8]>>,
        roots: Option<Vec<Arc<[u8]>>>,
        bundle_key: &str,
        (trust_domain, now): (&TrustDomain, UnixSeconds),
    ) -> Result<Self, PluginError> {
        let Some(own) = certificates.first().cloned() else {
            return Err(PluginError::invalid("unable to load upstream CA cert: no certificate found"));
        };
        let (chain, roots) = match roots {
            Some(roots) => (certificates, roots),
            None if certificates.len() == 1 => (Vec::new(), certificates),
            None => {
                let message = format!("with no {bundle_key} configured only self-signed CAs are supported");
                return Err(PluginError::invalid(message));
            }
        };
        let ca = X509Ca::new(Arc::new(key) as Arc<dyn Signer>, own, chain.clone()).map_err(|e| match e {
            IssueError::KeyMismatch => {
                PluginError::invalid("unable to load upstream CA: certificate and private key do not match")
            }
            e => PluginError::invalid(format!("unable to load upstream CA: {e}")),
        })?;
        let signing = Self { ca, chain, roots };
        match signing.verify(trust_domain, now) {
            Ok(()) => Ok(signing),
            Err(cause) => Err(PluginError::invalid(format!(
                "unable to load upstream CA: certificate cannot be validated with the provided bundle or is not \
                 self-signed: {cause}"
            ))),
        }
    }

    /// Whether what it signs now hangs from one of the roots.
    fn verify(&self, trust_domain: &TrustDomain, now: UnixSeconds) -> Result<(), String> {
        let own = Certificate::parse(self.ca.certificate().clone()).map_err(|e| e.to_string())?;
        if own.not_after() < now {
            return Err(VerifyError::Expired.to_string());
        }
        let trial = SvidTemplate {
            id: &trust_domain.server_id(),
            public_key: self.ca.signer().public_key(),
            subject: &DistinguishedName::svid_default(),
            dns_names: &[],
            not_before: now,
            not_after: now.saturating_add(1),
            serial: SerialNumber::new(1),
        };
        let leaf = self.ca.issue_svid_now(&trial).ok_or("the key is elsewhere")?.map_err(|e| e.to_string())?;
        let roots = TrustRoots::new(&self.roots).map_err(|e| e.to_string())?;
        verify_x509_chain(&self.ca.chain_of(leaf), &roots, now).map(drop).map_err(|e| e.to_string())
    }

    /// Signs what was read by [`check_ca_csr`]; for an hour if the server has no preference.
    ///
    /// # Errors
    /// `unable to sign CSR: …`
    pub async fn mint(
        &self,
        csr: &Csr,
        ttl_seconds: i64,
        (trust_domain, now): (&TrustDomain, UnixSeconds),
    ) -> Result<MintedX509Ca, PluginError> {
        let ttl_seconds = if ttl_seconds > 0 { ttl_seconds } else { DEFAULT_TTL_SECONDS };
        let template = CaTemplate {
            subject: &csr.subject().map_err(|e| unable(&e))?,
            trust_domain,
            not_before: now - BACKDATE_SECONDS,
            not_after: now.saturating_add(ttl_seconds),
            serial: SerialNumber::random(),
        };
        let certificate = self.ca.issue_ca(csr.public_key(), &template).await.map_err(|e| unable(&e))?;
        let chain = std::iter::once(certificate).chain(self.chain.iter().cloned()).collect();
        Ok(MintedX509Ca { chain, roots: self.roots.clone() })
    }
}
