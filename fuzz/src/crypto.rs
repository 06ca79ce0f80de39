//! Everything from outside that the crypto crate parses, and SPIFFE IDs.

use finial_core::{SpiffeId, TrustDomain};
use finial_crypto::bundle::{BundleFormat, bundle_from_json, bundle_to_json};
use finial_crypto::{
    Certificate, Csr, JwtKeySource, JwtKeys, TrustRoots, jwt_svid_times, pem as pem_text, verify_jwt_svid,
    verify_x509_chain, verify_x509_svid,
};
use std::sync::Arc;

const NOW: i64 = 1_800_000_000;

/// A CSR from an agent.
pub fn csr(data: &[u8]) {
    let Ok(csr) = Csr::parse(data) else { return };
    let _ = (csr.verify_proof_of_possession(), csr.uri_sans(), csr.dns_names());
    if let Ok(subject) = csr.subject() {
        let again = finial_crypto::DistinguishedName::from_der(subject.der()).expect("what we write we read");
        assert_eq!(again.to_string().len(), subject.to_string().len());
    }
    let key = finial_crypto::PublicKey::from_spki(csr.public_key().spki_der()).expect("a key that was taken is taken");
    assert_eq!(&key, csr.public_key());
}

/// A certificate from a peer, or from a file; also as a chain and as a root.
pub fn certificate(data: &[u8]) {
    if let Ok(chain) = Certificate::parse_chain(data) {
        let joined: Vec<u8> = chain.iter().flat_map(|c| c.der().to_vec()).collect();
        assert_eq!(joined, data);
    }
    let Ok(cert) = Certificate::parse(data) else { return };
    let _ = (cert.check_signing(), cert.public_key(), cert.is_self_signed(), cert.subject(), cert.issuer());
    assert!(cert.serial_decimal().bytes().all(|b| b.is_ascii_digit()));
    let leaf = cert.check_leaf();
    if leaf.is_ok() {
        assert!(!cert.is_ca() && cert.uri_sans().len() == 1);
    }
    let Ok(roots) = TrustRoots::new([cert.der()]) else { return };
    assert!(!(verify_x509_svid(&[data], &roots, NOW).is_ok() && leaf.is_err()), "leaf rules hold in any path");
    let _ = verify_x509_chain(&[data, data], &roots, NOW);
}

struct NoKeys;

impl JwtKeySource for NoKeys {
    fn jwt_keys(&self, _: &str) -> Option<Arc<JwtKeys>> {
        Some(Arc::new(JwtKeys::default()))
    }
}

/// A token from a workload.
pub fn jwt(data: &[u8]) {
    let Ok(token) = std::str::from_utf8(data) else { return };
    assert!(verify_jwt_svid(token, &NoKeys, &["x".into()], NOW).is_err(), "nobody signed that");
    let _ = jwt_svid_times(token);
}

/// A bundle document from another trust domain.
pub fn bundle(data: &[u8]) {
    let td = TrustDomain::parse("example.org").expect("a good name");
    let Ok(bundle) = bundle_from_json(&td, data) else { return };
    let text = bundle_to_json(&bundle, BundleFormat::SPIFFE);
    assert_eq!(bundle_from_json(&td, text.as_bytes()).expect("what we write we read"), bundle);
}

/// A SPIFFE ID or the name of a trust domain.
pub fn spiffe_id(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(id) = SpiffeId::parse(text) {
        assert_eq!(id.as_str(), text);
        assert_eq!(SpiffeId::new(&id.trust_domain(), id.path()).expect("parts of an ID make it again"), id);
    }
    if let Ok(td) = TrustDomain::parse(text) {
        assert_eq!(TrustDomain::parse(td.as_str()).expect("a name names itself"), td);
    }
}

/// Certificates and keys in files.
pub fn pem(data: &[u8]) {
    let _ = (pem_text::certificates(data), pem_text::private_key(data), pem_text::public_key(data));
    let Ok(blocks) = pem_text::blocks(data) else { return };
    for block in blocks {
        let again = pem_text::blocks(pem_text::encode(&block.label, block.der.expose()).as_bytes()).expect("ours");
        assert_eq!(again.first().map(|b| b.der.expose()), Some(block.der.expose()));
    }
}
