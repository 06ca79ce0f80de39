//! A small certificate authority for tests.

use finial_core::{Clock, KeyType, SpiffeId, SystemClock, TrustDomain};
use finial_crypto::{
    CaTemplate, DistinguishedName, NameParts, PrivateKey, PublicKey, SerialNumber, SvidTemplate, X509Ca,
};
use std::sync::Arc;

/// An authority of a trust domain.
pub(crate) struct TestCa {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) root: Arc<[u8]>,
    ca: X509Ca,
    subject: DistinguishedName,
}

impl TestCa {
    pub(crate) fn new(trust_domain: &str) -> Self {
        let trust_domain = TrustDomain::parse(trust_domain).unwrap();
        let key = Arc::new(PrivateKey::generate(KeyType::EcP256).unwrap());
        let subject =
            DistinguishedName::new(NameParts { organization: vec!["TEST".to_owned()], ..NameParts::default() });
        let now = SystemClock.now();
        let template = CaTemplate {
            subject: &subject,
            trust_domain: &trust_domain,
            not_before: now - 10,
            not_after: now + 24 * 3600,
            serial: SerialNumber::random(),
        };
        let ca = X509Ca::self_sign(key, &template);
        let ca = futures::executor::block_on(ca).unwrap();
        Self { root: ca.certificate().clone(), ca, subject, trust_domain }
    }

    /// Issues an SVID that begins ten seconds ago and ends in `ttl` seconds.
    pub(crate) fn issue(&self, id: &SpiffeId, public_key: &PublicKey, ttl: i64) -> Arc<[u8]> {
        let now = SystemClock.now();
        let template = SvidTemplate {
            id,
            public_key,
            subject: &self.subject,
            dns_names: &[],
            not_before: now - 10,
            not_after: now + ttl,
            serial: SerialNumber::random(),
        };
        futures::executor::block_on(self.ca.issue_svid(&template)).unwrap()
    }
}
