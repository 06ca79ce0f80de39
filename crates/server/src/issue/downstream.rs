//! X.509 authorities of downstream servers: certificates below our own authority's.

use super::{IssueError, Issued, Issuer, Purpose, deadline};
use crate::authority::plan::BACKDATE_SECONDS;
use crate::compose::check_ca;
use finial_core::{SpiffeId, UnixSeconds};
use finial_crypto::{CaTemplate, Certificate, DistinguishedName, Extension, PublicKey, SerialNumber};
use finial_plugin::X509CaAttributes;
use std::sync::Arc;

/// A downstream authority that was issued.
#[derive(Clone, Debug)]
pub struct IssuedCa {
    /// Its certificate, then what must follow it up to below a root; DER each.
    pub chain: Vec<Arc<[u8]>>,
    /// Its end; never after that of our own authority.
    pub not_after: UnixSeconds,
}

impl Issuer {
    /// An authority of the trust domain for the downstream server `caller`, which holds the key. `ttl_seconds` of 0 or
    /// less = `ca_ttl`. The subject is that of our own authority, with the depth in its organizational unit.
    pub async fn downstream_ca(
        &self,
        caller: &SpiffeId,
        public_key: &PublicKey,
        ttl_seconds: i64,
    ) -> Result<IssuedCa, IssueError> {
        let result = self.sign_ca(public_key, ttl_seconds).await;
        self.record(Purpose::Downstream, caller, result.as_ref().map(Issued::Ca));
        result
    }

    async fn sign_ca(&self, public_key: &PublicKey, ttl_seconds: i64) -> Result<IssuedCa, IssueError> {
        let authority = self.authorities.x509().ok_or(IssueError::NoX509Authority)?;
        let ca = &authority.ca;
        let now = self.clock.now();
        let ttl = if ttl_seconds > 0 { ttl_seconds } else { self.settings.ca_ttl_seconds };
        let not_after = now.saturating_add(ttl).min(ca.not_after());
        if not_after <= now {
            return Err(IssueError::ExpiredCa(not_after));
        }
        let depth = ca.upstream_chain().len().max(1);
        let subject = ca.subject().map_err(|e| IssueError::DownstreamCa(e.into()))?;
        let subject = subject.with_organizational_unit(&format!("DOWNSTREAM-{depth}"));
        let attributes = X509CaAttributes { subject: subject.parts().clone(), ..X509CaAttributes::default() };
        let attributes = self.composers.x509_ca(attributes).await.map_err(IssueError::Compose)?;
        let template = CaTemplate {
            subject: &DistinguishedName::new(attributes.subject),
            trust_domain: &self.settings.trust_domain,
            not_before: now - BACKDATE_SECONDS,
            not_after,
            serial: SerialNumber::random(),
        };
        let added = Extension::of_ca(&attributes.policies, attributes.extra_extensions);
        let signing = ca.issue_ca_with(public_key, &template, &added);
        let certificate = deadline(signing).await?.map_err(IssueError::DownstreamCa)?;
        if !self.composers.is_empty() {
            let parsed = Certificate::parse(certificate.clone()).map_err(|e| IssueError::DownstreamCa(e.into()))?;
            check_ca(&parsed, &self.settings.trust_domain).map_err(IssueError::BadDownstreamCa)?;
        }
        Ok(IssuedCa { chain: ca.chain_of(certificate), not_after })
    }
}
