//! Issuing and verifying together, with certificates bent out of shape one rule at a time.

use super::authority::{assemble, tbs};
use super::extensions::{key_usage_value, put_extension, san_value};
use super::*;
use crate::{KeyError, PrivateKey, Signer, oid};
use finial_core::{KeyType, SpiffeId, TrustDomain};
use proptest::prelude::*;
use std::sync::{Arc, LazyLock};

const NOW: i64 = 1_800_000_000;

static CA_KEY: LazyLock<PrivateKey> = LazyLock::new(|| PrivateKey::generate(KeyType::EcP256).unwrap());
static LEAF_KEY: LazyLock<PrivateKey> = LazyLock::new(|| PrivateKey::generate(KeyType::EcP256).unwrap());

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn td() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn authority(key: &PrivateKey, from: i64, to: i64) -> X509Ca {
    let subject = DistinguishedName::ca_default();
    let template = CaTemplate {
        subject: &subject,
        trust_domain: &td(),
        not_before: from,
        not_after: to,
        serial: SerialNumber::random(),
    };
    wait(X509Ca::self_sign(Arc::new(key.clone()), &template)).unwrap()
}

fn ca() -> X509Ca {
    authority(&CA_KEY, NOW - 10, NOW + 86_400)
}

fn roots(ca: &X509Ca) -> TrustRoots {
    TrustRoots::new([ca.certificate()]).unwrap()
}

fn leaf(ca: &X509Ca, id: &str) -> Arc<[u8]> {
    issue(ca, id, &DistinguishedName::svid_default(), &[])
}

fn issue(ca: &X509Ca, id: &str, subject: &DistinguishedName, dns_names: &[String]) -> Arc<[u8]> {
    let template = SvidTemplate {
        id: &SpiffeId::parse(id).unwrap(),
        public_key: LEAF_KEY.public_key(),
        subject,
        dns_names,
        not_before: NOW - 10,
        not_after: NOW + 3600,
        serial: SerialNumber::random(),
    };
    ca.issue_svid_now(&template).unwrap().unwrap()
}

/// What a forged certificate says; the default is a good leaf.
struct Forge {
    uris: Vec<String>,
    san_critical: bool,
    subject: DistinguishedName,
    usage: Option<(u16, bool)>,
    purposes: Option<Vec<&'static [u8]>>,
    basic: Vec<u8>,
    more: Vec<u8>,
    until: i64,
    /// In place of the key's own way to write it.
    algorithm: Option<Vec<u8>>,
}

impl Default for Forge {
    fn default() -> Self {
        Self {
            uris: vec!["spiffe://example.org/web".into()],
            san_critical: false,
            subject: DistinguishedName::svid_default(),
            usage: Some((0b10101, true)),
            purposes: Some(vec![oid::SERVER_AUTH, oid::CLIENT_AUTH]),
            basic: vec![0x30, 0],
            more: Vec::new(),
            until: NOW + 3600,
            algorithm: None,
        }
    }
}

impl Forge {
    fn ca(uri: &str) -> Self {
        Self {
            uris: vec![uri.into()],
            subject: DistinguishedName::of(&[], &["intermediate"], ""),
            usage: Some((0b110_0000, true)),
            purposes: None,
            basic: vec![0x30, 3, 1, 1, 0xff],
            ..Self::default()
        }
    }

    fn sign(&self, issuer: &DistinguishedName, key: &PrivateKey, public: &crate::PublicKey) -> Arc<[u8]> {
        let mut list = Vec::new();
        if let Some((bits, critical)) = self.usage {
            put_extension(&mut list, oid::KEY_USAGE, critical, &key_usage_value(KeyUsage(bits)));
        }
        if let Some(purposes) = &self.purposes {
            let mut value = Vec::new();
            crate::der::put_nested(&mut value, 0x30, |out| purposes.iter().for_each(|p| crate::der::put(out, 6, p)));
            put_extension(&mut list, oid::EXTENDED_KEY_USAGE, false, &value);
        }
        if !self.basic.is_empty() {
            put_extension(&mut list, oid::BASIC_CONSTRAINTS, true, &self.basic);
        }
        if !self.uris.is_empty() {
            let names: Vec<u8> = self.uris.iter().flat_map(|u| san_value(&[], Some(u))[2..].to_vec()).collect();
            let mut value = Vec::new();
            crate::der::put(&mut value, 0x30, &names);
            put_extension(&mut list, oid::SUBJECT_ALT_NAME, self.san_critical, &value);
        }
        list.extend_from_slice(&self.more);
        let algorithm = match &self.algorithm {
            Some(algorithm) => algorithm.clone(),
            None => super::authority::algorithm_identifier(key.public_key().default_algorithm()).to_vec(),
        };
        let after_serial = [&algorithm[..], issuer.der()].concat();
        let serial = SerialNumber::random();
        let tbs = tbs(serial, &after_serial, NOW - 10, self.until, self.subject.der(), public, &[&list]);
        let signature = key.sign_now(key.public_key().default_algorithm(), &tbs).unwrap();
        assemble(&tbs, &algorithm, &signature)
    }

    fn by(&self, ca: &X509Ca) -> Arc<[u8]> {
        self.sign(&ca.subject().unwrap(), &CA_KEY, LEAF_KEY.public_key())
    }
}

fn verify(chain: &[Arc<[u8]>], ca: &X509Ca) -> Result<SpiffeId, VerifyError> {
    verify_x509_svid(chain, &roots(ca), NOW)
}

#[test]
fn a_leaf_has_spires_profile() {
    let ca = ca();
    let subject = DistinguishedName::svid_default().with_common_name("web.example.org");
    let der = issue(&ca, "spiffe://example.org/web", &subject, &["web.example.org".into(), "b".into()]);
    let cert = Certificate::parse(der.clone()).unwrap();
    assert_eq!(cert.uri_sans(), [Box::from("spiffe://example.org/web")]);
    assert_eq!(cert.dns_names(), [Box::from("web.example.org"), Box::from("b")]);
    assert_eq!(cert.subject().unwrap().to_string(), "CN=web.example.org,O=SPIRE,C=US");
    assert_eq!(cert.issuer_der(), ca.parsed().subject_der());
    assert_eq!((cert.not_before(), cert.not_after()), (NOW - 10, NOW + 3600));
    assert_eq!(cert.key_usage(), Some(KeyUsage(0b10101)));
    assert!(cert.key_usage_critical() && !cert.is_ca() && cert.has_basic_constraints() && !cert.san_critical());
    assert_eq!(
        cert.extended_key_usage(),
        ExtendedKeyUsage { present: true, server_auth: true, client_auth: true, any: false }
    );
    assert_eq!(cert.subject_key_id().unwrap(), LEAF_KEY.public_key().subject_key_id());
    assert_eq!(cert.authority_key_id().unwrap(), ca.subject_key_id());
    assert_eq!(cert.public_key().unwrap(), *LEAF_KEY.public_key());
    assert!(!cert.is_self_signed());
    assert_eq!(verify(&[der], &ca).unwrap().as_str(), "spiffe://example.org/web");
}

#[test]
fn a_ca_has_spires_profile() {
    let ca = ca();
    let cert = ca.parsed();
    assert!(cert.is_ca() && cert.is_self_signed() && cert.key_usage_critical() && cert.path_len().is_none());
    assert_eq!(cert.key_usage(), Some(KeyUsage(0b110_0000)));
    assert_eq!(cert.uri_sans(), [Box::from("spiffe://example.org")]);
    assert_eq!(cert.subject().unwrap().parts().serial_number, cert.serial_decimal());
    assert_eq!(cert.subject_key_id().unwrap(), CA_KEY.public_key().subject_key_id());
    assert!(cert.authority_key_id().is_none() && !cert.extended_key_usage().present);
    assert_eq!(cert.check_signing(), Ok(()));
}

#[test]
fn not_after_is_capped_to_the_authority() {
    let ca = authority(&CA_KEY, NOW - 10, NOW + 60);
    let der = leaf(&ca, "spiffe://example.org/web");
    assert_eq!(Certificate::parse(der).unwrap().not_after(), NOW + 60);
}

#[test]
fn what_must_not_be_issued_is_not() {
    let ca = ca();
    let subject = DistinguishedName::svid_default();
    let id = SpiffeId::parse("spiffe://example.org/web").unwrap();
    let with = |id: &SpiffeId, dns: &[String], from| {
        let template = SvidTemplate {
            id,
            public_key: LEAF_KEY.public_key(),
            subject: &subject,
            dns_names: dns,
            not_before: from,
            not_after: NOW + 3600,
            serial: SerialNumber::random(),
        };
        ca.issue_svid_now(&template).unwrap()
    };
    assert!(matches!(with(&td().id(), &[], NOW), Err(IssueError::RootPath)));
    assert!(matches!(with(&id, &["a b".into()], NOW), Err(IssueError::BadDnsName(_))));
    assert!(matches!(with(&id, &[String::new()], NOW), Err(IssueError::BadDnsName(_))));
    assert!(matches!(with(&id, &vec!["a".to_owned(); 1001], NOW), Err(IssueError::TooLarge)));
    assert!(matches!(with(&id, &[], NOW + 86_401), Err(IssueError::EmptyValidity)));
    assert!(with(&id, &[], NOW).is_ok());
    let svid = leaf(&ca, "spiffe://example.org/web");
    assert!(matches!(X509Ca::new(Arc::new(LEAF_KEY.clone()), svid, vec![]), Err(IssueError::NotCa)));
    let stranger = X509Ca::new(Arc::new(LEAF_KEY.clone()), ca.certificate().clone(), vec![]);
    assert!(matches!(stranger, Err(IssueError::KeyMismatch)));
}

#[test]
fn every_leaf_rule_refuses_what_breaks_it() {
    let ca = ca();
    assert!(verify(&[Forge::default().by(&ca)], &ca).is_ok(), "the forge makes good leaves");
    let uri = |list: &[&str]| Forge { uris: list.iter().map(|u| (*u).into()).collect(), ..Forge::default() };
    let usage = |bits| Forge { usage: Some((bits, true)), ..Forge::default() };
    let nameless = DistinguishedName::of(&[], &[], "");
    for (forge, want) in [
        (uri(&[]), VerifyError::NoUriSan),
        (uri(&["spiffe://example.org/a", "spiffe://example.org/b"]), VerifyError::ManyUriSans),
        (uri(&["spiffe://example.org/a", "https://example.org"]), VerifyError::ManyUriSans),
        (uri(&["https://example.org/a"]), VerifyError::BadSpiffeId(finial_core_error("https://example.org/a"))),
        (uri(&["spiffe://example.org//a"]), VerifyError::BadSpiffeId(finial_core_error("spiffe://example.org//a"))),
        (uri(&["spiffe://example.org"]), VerifyError::RootPath),
        (Forge { basic: vec![0x30, 3, 1, 1, 0xff], ..Forge::default() }, VerifyError::LeafIsCa),
        (usage(1 | 1 << 5), VerifyError::LeafCertSign),
        (usage(1 | 1 << 6), VerifyError::LeafCrlSign),
        (Forge { usage: None, ..Forge::default() }, VerifyError::NoKeyUsage),
        (Forge { usage: Some((1, false)), ..Forge::default() }, VerifyError::KeyUsageNotCritical),
        (usage(1 << 2), VerifyError::NoDigitalSignature),
        (Forge { purposes: Some(vec![oid::SERVER_AUTH]), ..Forge::default() }, VerifyError::IncompleteExtendedKeyUsage),
        (Forge { purposes: Some(vec![oid::CLIENT_AUTH]), ..Forge::default() }, VerifyError::IncompleteExtendedKeyUsage),
        (Forge { subject: nameless.clone(), ..Forge::default() }, VerifyError::SanNotCritical),
    ] {
        assert_eq!(verify(&[forge.by(&ca)], &ca), Err(want));
    }
    let no_subject = Forge { subject: nameless, san_critical: true, ..Forge::default() };
    assert!(verify(&[no_subject.by(&ca)], &ca).is_ok());
    assert!(verify(&[Forge { purposes: None, ..Forge::default() }.by(&ca)], &ca).is_ok(), "EKU is only a SHOULD");
    assert!(verify(&[usage(1).by(&ca)], &ca).is_ok());
}

fn finial_core_error(text: &str) -> finial_core::SpiffeIdError {
    SpiffeId::parse(text).unwrap_err()
}

#[test]
fn paths_follow_rfc_5280() {
    let ca = ca();
    let good = leaf(&ca, "spiffe://example.org/web");
    assert_eq!(verify(&[], &ca), Err(VerifyError::EmptyChain));
    assert_eq!(verify(&vec![good.clone(); CHAIN_LENGTH_MAX + 1], &ca), Err(VerifyError::ChainTooLong));
    let late = verify_x509_svid(&[&good], &roots(&ca), NOW + 3601);
    assert_eq!(late, Err(VerifyError::Expired));
    assert!(verify_x509_svid(&[&good], &roots(&ca), NOW + 3600).is_ok(), "the last second still counts");
    let early = verify_x509_svid(&[&good], &roots(&ca), NOW - 11);
    assert_eq!(early, Err(VerifyError::NotYetValid));
    // Another authority of the same name but with another key.
    let other = authority(&LEAF_KEY, NOW - 10, NOW + 86_400);
    assert_eq!(verify(std::slice::from_ref(&good), &other), Err(VerifyError::UnknownAuthority));
    assert_eq!(verify_x509_svid(&[&good], &TrustRoots::new([]).unwrap(), NOW), Err(VerifyError::UnknownAuthority));
    // A signature that was tampered with.
    let mut bytes = good.to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    assert!(verify(&[bytes.into()], &ca).is_err());
    // An unknown critical extension.
    let mut more = Vec::new();
    put_extension(&mut more, &[0x2a, 0x03], true, &[5, 0]);
    let odd = Forge { more, ..Forge::default() };
    assert!(matches!(verify(&[odd.by(&ca)], &ca), Err(VerifyError::Path(_))));
    // A CA outlives its key usage: an expired root is no root, though its leaf is not expired.
    let short = authority(&CA_KEY, NOW - 10, NOW + 5);
    let forged = Forge::default().by(&short);
    assert!(verify_x509_svid(&[&forged], &roots(&short), NOW + 5).is_ok());
    assert_eq!(verify_x509_svid(&[&forged], &roots(&short), NOW + 6), Err(VerifyError::Expired));
}

#[test]
fn intermediates_follow_the_rules_for_signing_certificates() {
    let ca = ca();
    let middle_key = PrivateKey::generate(KeyType::EcP384).unwrap();
    let through = |middle: &Forge| {
        let cert = middle.sign(&ca.subject().unwrap(), &CA_KEY, middle_key.public_key());
        let leaf = Forge::default().sign(&middle.subject, &middle_key, LEAF_KEY.public_key());
        verify(&[leaf, cert], &ca)
    };
    let good = || Forge::ca("spiffe://example.org");
    assert!(through(&good()).is_ok());
    assert!(through(&Forge::ca("spiffe://example.org/")).is_ok(), "as in the example of the standard");
    assert!(through(&Forge::ca("https://pki.example.org/ca")).is_ok());
    assert!(through(&Forge { uris: vec![], ..good() }).is_ok(), "a signing certificate need not be an SVID");
    assert_eq!(through(&Forge::ca("spiffe://example.org/ca")), Err(VerifyError::IssuerHasPath));
    assert_eq!(through(&Forge { usage: Some((1 << 6, true)), ..good() }), Err(VerifyError::IssuerNotCa));
    assert_eq!(through(&Forge { usage: None, ..good() }), Err(VerifyError::IssuerNotCa));
    assert_eq!(through(&Forge { usage: Some((1 << 5, false)), ..good() }), Err(VerifyError::KeyUsageNotCritical));
    assert_eq!(through(&Forge { basic: vec![0x30, 0], ..good() }), Err(VerifyError::IssuerNotCa));
    assert_eq!(through(&Forge { until: NOW - 1, ..good() }), Err(VerifyError::Expired));
    let two = Forge { uris: vec!["spiffe://a".into(), "spiffe://b".into()], ..good() };
    assert_eq!(through(&two), Err(VerifyError::ManyUriSans));
    // pathLenConstraint 0 of the root of a chain of two.
    let depth = Forge { basic: vec![0x30, 6, 1, 1, 0xff, 2, 1, 0], ..good() };
    assert!(through(&depth).is_ok());
    let second = Forge { subject: DistinguishedName::of(&[], &["second"], ""), ..good() };
    let first_der = depth.sign(&ca.subject().unwrap(), &CA_KEY, middle_key.public_key());
    let second_der = second.sign(&depth.subject, &middle_key, CA_KEY.public_key());
    let leaf = Forge::default().sign(&second.subject, &CA_KEY, LEAF_KEY.public_key());
    assert!(matches!(verify(&[leaf, second_der, first_der], &ca), Err(VerifyError::Path(_))));
}

#[test]
fn roots_are_checked_like_other_issuers() {
    let name = DistinguishedName::of(&[], &["root"], "");
    let middle = Forge::ca("spiffe://example.org");
    let through = |root: &Forge| {
        let root = root.sign(&name, &CA_KEY, CA_KEY.public_key());
        let middle_der = middle.sign(&name, &CA_KEY, LEAF_KEY.public_key());
        let leaf = Forge::default().sign(&middle.subject, &LEAF_KEY, LEAF_KEY.public_key());
        verify_x509_svid(&[leaf, middle_der], &TrustRoots::new([&root]).unwrap(), NOW)
    };
    let root = || Forge { subject: name.clone(), ..Forge::ca("spiffe://example.org") };
    assert!(through(&root()).is_ok());
    assert!(through(&Forge { usage: None, ..root() }).is_ok(), "as Go: only a key usage that is there counts");
    assert_eq!(through(&Forge { usage: Some((1 << 6, true)), ..root() }), Err(VerifyError::IssuerNotCa));
    assert_eq!(through(&Forge { basic: vec![0x30, 0], ..root() }), Err(VerifyError::IssuerNotCa));
    assert_eq!(through(&Forge { until: NOW - 1, ..root() }), Err(VerifyError::Expired));
    let limit = |n| Forge { basic: vec![0x30, 6, 1, 1, 0xff, 2, 1, n], ..root() };
    assert!(through(&limit(1)).is_ok());
    assert!(matches!(through(&limit(0)), Err(VerifyError::Path(_))));
    // A second root of the same name and key that is still good makes up for an expired one, in any order.
    let leaf = Forge::default().sign(&name, &CA_KEY, LEAF_KEY.public_key());
    let (old, new) = (Forge { until: NOW - 1, ..root() }, root());
    let [old, new] = [old, new].map(|r| r.sign(&name, &CA_KEY, CA_KEY.public_key()));
    for order in [[&old, &new], [&new, &old]] {
        assert!(verify_x509_svid(&[&leaf], &TrustRoots::new(order).unwrap(), NOW).is_ok());
    }
}

#[test]
fn name_constraints_that_cannot_be_evaluated_permit_nothing_and_are_named() {
    let ca = ca();
    // nameConstraints { permittedSubtrees (a0) or excludedSubtrees (a1) { URI (86) or DNS (82) }, critical.
    let through = |subtrees: u8, kind: u8, name: &[u8]| {
        let mut value = Vec::new();
        crate::der::put_nested(&mut value, 0x30, |out| {
            crate::der::put_nested(out, subtrees, |out| {
                crate::der::put_nested(out, 0x30, |out| crate::der::put(out, kind, name));
            });
        });
        let mut more = Vec::new();
        put_extension(&mut more, &[0x55, 0x1d, 0x1e], true, &value);
        let middle = Forge { more, ..Forge::ca("spiffe://example.org") };
        let cert = middle.sign(&ca.subject().unwrap(), &CA_KEY, CA_KEY.public_key());
        let leaf = Forge::default().sign(&middle.subject, &CA_KEY, LEAF_KEY.public_key());
        verify(&[leaf, cert], &ca).map(drop)
    };
    assert_eq!(through(0xa0, 0x86, b"other.example"), Err(VerifyError::NameConstraint), "as it must be");
    // Go's library evaluates these; webpki 0.103 takes every URI for one that is not permitted.
    assert_eq!(through(0xa0, 0x86, b"example.org"), Err(VerifyError::NameConstraint));
    assert_eq!(through(0xa1, 0x86, b"other.example"), Err(VerifyError::NameConstraint));
    assert_eq!(through(0xa0, 0x82, b"example.org"), Ok(()), "of names that the leaf does not have");
}

#[test]
fn a_downstream_authority_chains_to_its_parent() {
    let parent = ca();
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let subject = parent.subject().unwrap().with_organizational_unit("DOWNSTREAM-1");
    let template = CaTemplate {
        subject: &subject,
        trust_domain: &td(),
        not_before: NOW - 10,
        not_after: NOW + 1_000_000,
        serial: SerialNumber::random(),
    };
    let certificate = wait(parent.issue_ca(key.public_key(), &template)).unwrap();
    let child = X509Ca::new(Arc::new(key), certificate.clone(), vec![certificate]).unwrap();
    assert_eq!(child.not_after(), parent.not_after(), "capped");
    assert_eq!(child.parsed().authority_key_id().unwrap(), parent.subject_key_id());
    assert!(child.subject().unwrap().to_string().contains("OU=DOWNSTREAM-1"));
    let chain = child.chain_of(leaf(&child, "spiffe://example.org/web"));
    assert_eq!(chain.len(), 2);
    assert!(verify(&chain, &parent).is_ok());
    assert_eq!(verify(&chain[..1], &parent), Err(VerifyError::UnknownAuthority));
    assert_eq!(Certificate::parse_chain(&chain.concat()).unwrap().len(), 2);
}

#[test]
fn x509pop_chains_need_no_spiffe_id() {
    let ca = ca();
    let plain = Forge { uris: vec![], purposes: None, usage: Some((1, false)), ..Forge::default() }.by(&ca);
    assert_eq!(verify(std::slice::from_ref(&plain), &ca), Err(VerifyError::NoUriSan));
    assert!(verify_x509_chain(&[&plain], &roots(&ca), NOW).is_ok());
    assert!(verify_x509_chain(&[&plain], &roots(&ca), NOW + 9999).is_err());
}

#[test]
fn every_key_type_signs_and_is_verified() {
    for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048, KeyType::Rsa4096] {
        let key = PrivateKey::generate(key_type).unwrap();
        assert_eq!(key.public_key().key_type(), Some(key_type));
        let ca = authority(&key, NOW - 10, NOW + 100);
        assert!(ca.parsed().is_self_signed(), "{key_type}");
        assert!(verify(&[leaf(&ca, "spiffe://example.org/web")], &ca).is_ok(), "{key_type}");
        let again = PrivateKey::from_pkcs8(key.pkcs8_der().expose()).unwrap();
        assert_eq!(again.public_key(), key.public_key());
        let csr = wait(create_csr(&key, None, None, &[])).unwrap();
        Csr::parse(&csr).unwrap().verify_proof_of_possession().unwrap();
        assert!(key.rustls_signing_key().is_ok());
        if key_type != KeyType::EcP384 {
            let signature = key.sign_x509pop(b"nonces").unwrap();
            assert_eq!(key.public_key().verify_x509pop(b"nonces", &signature), Ok(()));
            assert_eq!(key.public_key().verify_x509pop(b"other", &signature), Err(KeyError::BadSignature));
        }
    }
}

#[test]
fn rsa_signatures_without_parameters_are_verified() {
    // RFC 4055 section 5: they are NULL, and must be accepted absent.
    let key = PrivateKey::generate(KeyType::Rsa2048).unwrap();
    let ca = authority(&key, NOW - 10, NOW + 100);
    let mut absent = Vec::new();
    crate::der::put_nested(&mut absent, 0x30, |out| crate::der::put(out, 6, oid::RSA_SHA256));
    let forged = Forge { algorithm: Some(absent), ..Forge::default() };
    let leaf = forged.sign(&ca.subject().unwrap(), &key, LEAF_KEY.public_key());
    assert!(verify(&[leaf], &ca).is_ok());
}

#[test]
fn csrs_carry_what_was_asked_for_and_prove_possession() {
    let id = SpiffeId::parse("spiffe://example.org/web").unwrap();
    let subject = DistinguishedName::svid_default();
    let der = wait(create_csr(&*LEAF_KEY, Some(&subject), Some(&id), &["a.example".into()])).unwrap();
    let csr = Csr::parse(&der).unwrap();
    assert_eq!(csr.uri_sans(), [Box::from(id.as_str())]);
    assert_eq!(csr.dns_names(), [Box::from("a.example")]);
    assert_eq!(csr.subject().unwrap(), subject);
    assert_eq!(csr.public_key(), LEAF_KEY.public_key());
    assert_eq!(csr.verify_proof_of_possession(), Ok(()));
    // Someone else's key under the same signature.
    let ours = LEAF_KEY.public_key().spki_der();
    let at = der.windows(ours.len()).position(|w| w == &**ours).unwrap();
    let mut forged = der.clone();
    forged[at..at + ours.len()].copy_from_slice(CA_KEY.public_key().spki_der());
    assert_eq!(Csr::parse(&forged).unwrap().verify_proof_of_possession(), Err(KeyError::BadSignature));
    assert!(matches!(Csr::parse(&vec![0x30; CSR_BYTES_MAX + 1]), Err(ParseError::TooLarge { .. })));
    let ca_csr = wait(create_ca_csr(&*CA_KEY, &DistinguishedName::ca_default(), &td())).unwrap();
    assert_eq!(Csr::parse(&ca_csr).unwrap().uri_sans(), [Box::from("spiffe://example.org")]);
}

#[test]
fn duplicate_extensions_and_trailing_bytes_are_refused() {
    let ca = ca();
    let mut more = Vec::new();
    put_extension(&mut more, oid::BASIC_CONSTRAINTS, true, &[0x30, 0]);
    let twice = Forge { more, ..Forge::default() }.by(&ca);
    assert!(matches!(Certificate::parse(twice), Err(ParseError::DuplicateExtension(id)) if id == "2.5.29.19"));
    let mut longer = leaf(&ca, "spiffe://example.org/web").to_vec();
    longer.push(0);
    assert_eq!(Certificate::parse(longer), Err(ParseError::TrailingData("certificate")));
}

/// A signer whose key is elsewhere.
struct Remote(PrivateKey);

#[async_trait::async_trait]
impl Signer for Remote {
    fn public_key(&self) -> &crate::PublicKey {
        self.0.public_key()
    }
    async fn sign(&self, algorithm: crate::SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, crate::SignError> {
        self.0.sign_now(algorithm, message)
    }
}

#[test]
fn a_remote_signer_issues_too() {
    let signer = Arc::new(Remote(CA_KEY.clone()));
    let ca = X509Ca::new(signer, ca().certificate().clone(), vec![]).unwrap();
    let subject = DistinguishedName::svid_default();
    let id = SpiffeId::parse("spiffe://example.org/web").unwrap();
    let template = SvidTemplate {
        id: &id,
        public_key: LEAF_KEY.public_key(),
        subject: &subject,
        dns_names: &[],
        not_before: NOW,
        not_after: NOW + 10,
        serial: SerialNumber::new(0),
    };
    assert!(ca.issue_svid_now(&template).is_none());
    let der = wait(ca.issue_svid(&template)).unwrap();
    assert_eq!(Certificate::parse(der.clone()).unwrap().serial_decimal(), "1");
    assert!(verify(&[der], &ca).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_issued_is_read_back(
        path in "(/[a-zA-Z0-9_-]{1,12}){1,6}",
        dns in proptest::collection::vec("[a-z0-9-]{1,20}(\\.[a-z]{1,5}){0,3}", 0..5),
        from in 0i64..4_000_000_000,
        lasts in 0i64..100_000_000,
        serial in any::<u128>(),
    ) {
        let ca = authority(&CA_KEY, 0, 253_402_300_799);
        let subject = DistinguishedName::svid_default();
        let id = SpiffeId::new(&td(), &path).unwrap();
        let serial = SerialNumber::new(serial);
        let template = SvidTemplate {
            id: &id, public_key: LEAF_KEY.public_key(), subject: &subject, dns_names: &dns,
            not_before: from, not_after: from + lasts, serial,
        };
        let der = ca.issue_svid_now(&template).unwrap().unwrap();
        let cert = Certificate::parse(der.clone()).unwrap();
        prop_assert_eq!(cert.spiffe_id().unwrap(), id);
        prop_assert_eq!(cert.dns_names().iter().map(|n| n.to_string()).collect::<Vec<_>>(), dns);
        prop_assert_eq!((cert.not_before(), cert.not_after()), (from, from + lasts));
        prop_assert_eq!(cert.serial_decimal(), serial.to_string());
        prop_assert!(verify_x509_svid(&[der], &roots(&ca), from).is_ok());
    }

    #[test]
    fn a_flipped_bit_never_verifies(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let ca = ca();
        let mut der = leaf(&ca, "spiffe://example.org/web").to_vec();
        let index = at.index(der.len());
        der[index] ^= 1 << bit;
        prop_assert!(verify(&[der.into()], &ca).is_err());
    }

    #[test]
    fn any_bytes_parse_or_err(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = Certificate::parse(bytes.clone());
        let _ = Csr::parse(&bytes);
        let _ = Certificate::parse_chain(&bytes);
    }
}
