//! CAs of services that tests stand in for.

use finial_core::{KeyType, TrustDomain};
use finial_crypto::{CaTemplate, Csr, DistinguishedName, PrivateKey, SerialNumber, X509Ca};
use std::future::Future;
use std::sync::Arc;

/// Runs a future also where a runtime runs already.
pub fn aside<T: Send>(future: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| scope.spawn(|| super::run(future)).join().expect("it ends"))
}

/// A CA of another trust domain from 100 seconds before `now` on, for a day, below another one or self-signed.
pub fn authority(above: Option<&X509Ca>, name: &str, now: i64) -> X509Ca {
    let template = CaTemplate {
        subject: &DistinguishedName::of(&[], &[], name),
        trust_domain: &TrustDomain::parse("upstream.test").expect("a name"),
        not_before: now - 100,
        not_after: now + 86_400,
        serial: SerialNumber::random(),
    };
    let key = Arc::new(PrivateKey::generate(KeyType::EcP256).expect("a key"));
    let Some(above) = above else { return aside(X509Ca::self_sign(key, &template)).expect("signs") };
    let own = aside(above.issue_ca(key.public_key(), &template)).expect("signs");
    X509Ca::new(key, own, Vec::new()).expect("belong together")
}

/// What a CA makes of a request for an authority of `example.org`, with the subject that it asks for.
pub fn sign(ca: &X509Ca, csr: &[u8], (not_before, not_after): (i64, i64)) -> Arc<[u8]> {
    let csr = Csr::parse(csr).expect("a request");
    let template = CaTemplate {
        subject: &csr.subject().expect("a subject"),
        trust_domain: &TrustDomain::parse("example.org").expect("a name"),
        not_before,
        not_after,
        serial: SerialNumber::random(),
    };
    aside(ca.issue_ca(csr.public_key(), &template)).expect("signs")
}
