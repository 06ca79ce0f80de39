//! The suite for upstream authorities.

use crate::UpstreamAuthority;
use finial_core::{KeyType, TrustDomain, UnixSeconds};
use finial_crypto::{
    Certificate, DistinguishedName, PrivateKey, SerialNumber, SvidTemplate, TrustRoots, X509Ca, create_ca_csr,
    verify_x509_svid,
};
use std::sync::Arc;

/// An upstream authority and what it works for.
pub struct UpstreamAuthorityFixture {
    /// The implementation, with an authority that lives a day at least.
    pub upstream: Arc<dyn UpstreamAuthority>,
    /// The trust domain that it was configured with.
    pub trust_domain: TrustDomain,
    /// The time by its clock.
    pub now: UnixSeconds,
}

/// The suite for upstream authorities. `$make` is an expression of an async block's body that gives an
/// [`UpstreamAuthorityFixture`](crate::conformance::UpstreamAuthorityFixture).
#[macro_export]
macro_rules! upstream_authority_conformance {
    ($make:expr) => {
        mod conformance {
            use super::*;

            #[test]
            fn what_it_signs_is_an_authority_that_verifies() {
                $crate::conformance::run(async { $crate::conformance::mints_authorities($make).await });
            }
            #[test]
            fn bad_requests_are_refused() {
                $crate::conformance::run(async { $crate::conformance::bad_csrs_are_refused($make).await });
            }
        }
    };
}

async fn csr(key: &PrivateKey, trust_domain: &TrustDomain) -> Vec<u8> {
    let subject = DistinguishedName::ca_default().with_serial_number("42");
    create_ca_csr(key, &subject, trust_domain).await.expect("makes a request")
}

/// Each key type gets a CA of its key and subject, in time, below roots that are not in the chain.
pub async fn mints_authorities(fixture: UpstreamAuthorityFixture) {
    let UpstreamAuthorityFixture { upstream, trust_domain, now } = fixture;
    assert!(!upstream.name().is_empty());
    for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
        let key = PrivateKey::generate(key_type).expect("a key");
        let minted = upstream.mint_x509_ca(&csr(&key, &trust_domain).await, 600).await.expect("signs");
        assert!(!minted.roots.is_empty() && minted.roots.iter().all(|root| !minted.chain.contains(root)));
        let certificate = Certificate::parse(minted.chain[0].clone()).expect("a certificate");
        assert!(certificate.not_before() <= now && certificate.not_after() <= now + 600, "as long as was asked for");
        assert!(certificate.not_after() > now);
        let subject = certificate.subject().expect("a subject");
        assert_eq!(subject.parts().serial_number, "42", "the subject is the request's");
        let signer = Arc::new(key.clone());
        let ca = X509Ca::new(signer, minted.chain[0].clone(), minted.chain.clone()).expect("a CA of that key");
        let template = SvidTemplate {
            id: &trust_domain.server_id(),
            public_key: key.public_key(),
            subject: &DistinguishedName::svid_default(),
            dns_names: &[],
            not_before: now,
            not_after: now + 60,
            serial: SerialNumber::new(1),
        };
        let svid = ca.issue_svid(&template).await.expect("an SVID");
        let roots = TrustRoots::new(&minted.roots).expect("roots");
        verify_x509_svid(&ca.chain_of(svid), &roots, now).expect("what it signs verifies");
    }
}

/// Nothing is signed for another trust domain, or for a key that the requester has not.
pub async fn bad_csrs_are_refused(fixture: UpstreamAuthorityFixture) {
    let UpstreamAuthorityFixture { upstream, trust_domain, .. } = fixture;
    let key = PrivateKey::generate(KeyType::EcP256).expect("a key");
    let mut forged = csr(&key, &trust_domain).await;
    if let Some(last) = forged.last_mut() {
        *last ^= 1;
    }
    let foreign = csr(&key, &TrustDomain::parse("foreign.test").expect("a name")).await;
    for request in [forged, foreign, b"garbage".to_vec(), Vec::new()] {
        upstream.mint_x509_ca(&request, 600).await.expect_err("is refused");
    }
}
