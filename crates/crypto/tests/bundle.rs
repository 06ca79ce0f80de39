//! Bundle documents and PEM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

use finial_core::{Bundle, JwtAuthority, KeyType, TrustDomain, X509Authority};
use finial_crypto::bundle::*;
use finial_crypto::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::{Arc, LazyLock};

fn td() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

static KEYS: LazyLock<Vec<PrivateKey>> = LazyLock::new(|| {
    [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048].map(|t| PrivateKey::generate(t).unwrap()).to_vec()
});

static ROOTS: LazyLock<Vec<Arc<[u8]>>> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let root = |key: &PrivateKey| {
        let subject = DistinguishedName::ca_default();
        let template = CaTemplate {
            subject: &subject,
            trust_domain: &td(),
            not_before: 0,
            not_after: 4_000_000_000,
            serial: SerialNumber::random(),
        };
        runtime.block_on(X509Ca::self_sign(Arc::new(key.clone()), &template)).unwrap().certificate().clone()
    };
    KEYS.iter().map(root).collect()
});

fn jwt_authority(key_id: &str, key: &PrivateKey) -> JwtAuthority {
    let public_key = key.public_key().spki_der().clone();
    JwtAuthority { key_id: key_id.into(), public_key, expires_at: 0, tainted: false }
}

fn bundle() -> Bundle {
    let mut bundle = Bundle::empty(td());
    bundle.x509_authorities = ROOTS.iter().map(|der| X509Authority { der: der.clone(), tainted: false }).collect();
    bundle.jwt_authorities = KEYS.iter().enumerate().map(|(i, k)| jwt_authority(&format!("j{i}"), k)).collect();
    bundle.wit_authorities = vec![jwt_authority("w", &KEYS[0])];
    bundle.refresh_hint = 300;
    bundle.sequence_number = 7;
    bundle
}

fn read(json: &Value) -> Result<Bundle, BundleError> {
    bundle_from_json(&td(), json.to_string().as_bytes())
}

#[test]
fn documents_round_trip_and_look_like_spires() {
    let bundle = bundle();
    let text = bundle_to_json(&bundle, BundleFormat::SPIFFE);
    assert_eq!(bundle_from_json(&td(), text.as_bytes()).unwrap(), bundle);
    assert!(text.starts_with("{\n    \"keys\": [\n        {\n            \"use\": \"x509-svid\","), "{text}");
    assert!(text.ends_with("    \"spiffe_sequence\": 7,\n    \"spiffe_refresh_hint\": 300\n}"), "{text}");
    let document: Value = serde_json::from_str(&text).unwrap();
    let keys = document["keys"].as_array().unwrap();
    for key in keys {
        match key["use"].as_str().unwrap() {
            // X509-SVID section 6.1: no kid, exactly one certificate.
            "x509-svid" => assert!(key.get("kid").is_none() && key["x5c"].as_array().unwrap().len() == 1),
            _ => assert!(key["kid"].is_string() && key.get("x5c").is_none()),
        }
    }
    assert_eq!(keys[0]["kty"], "EC");
    assert_eq!(keys[2]["e"], "AQAB");
}

#[test]
fn workload_bundles_have_only_jwt_keys_and_never_null() {
    let empty = jwt_bundle_json(&Bundle::empty(td()));
    assert_eq!(serde_json::from_str::<Value>(&empty).unwrap(), json!({"keys": []}));
    let document: Value = serde_json::from_str(&jwt_bundle_json(&bundle())).unwrap();
    let keys = document["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 3);
    assert!(keys.iter().all(|k| k["kid"].is_string() && k.get("x5c").is_none()));
    assert_eq!(document.as_object().unwrap().len(), 1);
}

#[test]
fn the_rules_for_consumers_hold() {
    let good = |use_: &str| {
        let mut jwk = public_key_to_jwk(KEYS[0].public_key(), Some("k"));
        jwk.insert("use".into(), use_.into());
        Value::Object(jwk)
    };
    // Section 4.1.3: keys must be there, and may be empty.
    assert_eq!(read(&json!({})), Err(BundleError::NoKeys));
    assert_eq!(read(&json!({"keys": null})), Err(BundleError::NoKeys));
    assert_eq!(read(&json!({"keys": []})).unwrap(), Bundle::empty(td()));
    // Sections 4.1.3, 4.2.1 and 4.2.2: what is unknown is ignored; case matters.
    let mut no_kty = good("jwt-svid");
    no_kty.as_object_mut().unwrap().remove("kty");
    let okp = json!({"kty": "OKP", "crv": "Ed25519", "use": "jwt-svid", "kid": "x", "x": "AA"});
    let mut no_use = good("jwt-svid");
    no_use.as_object_mut().unwrap().remove("use");
    let ignored =
        json!({"keys": [no_kty, okp, no_use, good("JWT-SVID"), good("new-svid"), good("jwt-svid")], "more": 1});
    assert_eq!(read(&ignored).unwrap().jwt_authorities.len(), 1);
    // Sections 4.1.1 and 4.1.2: integers.
    for bad in [json!("1"), json!(1.5), json!(-1)] {
        assert!(matches!(read(&json!({"keys": [], "spiffe_sequence": bad})), Err(BundleError::Json(_))));
    }
    assert!(matches!(read(&json!({"keys": [], "spiffe_refresh_hint": "300"})), Err(BundleError::Json(_))));
    assert_eq!(read(&json!({"keys": [], "spiffe_sequence": u64::MAX})).unwrap().sequence_number, u64::MAX);
    // X509-SVID section 6.2: without x5c it is ignored; of several only the first counts.
    let text = bundle_to_json(&bundle(), BundleFormat::SPIFFE);
    let document: Value = serde_json::from_str(&text).unwrap();
    let x509 = document["keys"][0].clone();
    let set = |x5c: Value| {
        let mut key = x509.clone();
        key["x5c"] = x5c;
        read(&json!({"keys": [key]}))
    };
    assert_eq!(set(json!([])).unwrap().x509_authorities.len(), 0);
    assert_eq!(set(Value::Null).unwrap().x509_authorities.len(), 0);
    assert_eq!(set(json!([x509["x5c"][0], "garbage"])).unwrap().x509_authorities.len(), 1);
    assert!(matches!(set(json!(["garbage"])), Err(BundleError::Certificate { index: 0, .. })));
    assert_eq!(set(document["keys"][1]["x5c"].clone()), Err(BundleError::KeyMismatch(0)));
    // JWT-SVID section 6.1: a kid.
    let mut no_kid = good("jwt-svid");
    no_kid["kid"] = json!("");
    assert_eq!(read(&json!({"keys": [no_kid]})), Err(BundleError::NoKeyId(0)));
    // Bad keys.
    let mut off_curve = good("jwt-svid");
    off_curve["x"] = off_curve["y"].clone();
    assert!(matches!(read(&json!({"keys": [off_curve]})), Err(BundleError::Key { index: 0, .. })));
    assert!(matches!(bundle_from_json(&td(), b"[]"), Err(BundleError::Json(_))));
    assert_eq!(bundle_from_json(&td(), &vec![b' '; BUNDLE_BYTES_MAX + 1]), Err(BundleError::TooLarge));
}

#[test]
fn the_same_root_or_key_id_counts_once() {
    let mut twice = bundle();
    twice.x509_authorities.extend(twice.x509_authorities.clone());
    twice.jwt_authorities.push(jwt_authority("j0", &KEYS[1]));
    let text = bundle_to_json(&twice, BundleFormat::SPIFFE);
    let read = bundle_from_json(&td(), text.as_bytes()).unwrap();
    assert_eq!((read.x509_authorities.len(), read.jwt_authorities.len()), (3, 3));
    assert_eq!(read.jwt_authorities[2], jwt_authority("j0", &KEYS[1]), "the later one stays");
}

#[test]
fn one_authority_that_is_of_no_use_costs_only_itself() {
    let good = bundle();
    let mut bad = good.clone();
    bad.x509_authorities.insert(0, X509Authority { der: b"garbage"[..].into(), tainted: false });
    // A root whose key is off its curve is still one that workloads get, but there is no writing it.
    let point = KEYS[0].public_key().spki_der()[30..].to_vec();
    let at = ROOTS[0].windows(point.len()).position(|w| w == point).unwrap();
    let mut off_curve = ROOTS[0].to_vec();
    off_curve[at] ^= 1;
    let off_curve = X509Authority { der: off_curve.into(), tainted: false };
    bad.x509_authorities.push(off_curve.clone());
    let key = |key_id: &str| JwtAuthority { public_key: b"garbage"[..].into(), ..jwt_authority(key_id, &KEYS[0]) };
    bad.jwt_authorities.insert(0, key("j"));
    bad.wit_authorities.push(key("w9"));
    assert_eq!(bundle_to_json(&bad, BundleFormat::SPIFFE), bundle_to_json(&good, BundleFormat::SPIFFE));
    let (readable, unusable) = readable(&bad);
    let mut kept = good.clone();
    kept.x509_authorities.push(off_curve);
    assert_eq!(readable, kept);
    let told: Vec<String> = unusable.iter().map(ToString::to_string).collect();
    let sha = |i: usize| sha256_hex(&bad.x509_authorities[i].der);
    assert_eq!(
        told,
        [
            format!("X.509 authority with SHA-256 {}: malformed certificate", sha(0)),
            format!("X.509 authority with SHA-256 {}: public key is malformed", sha(4)),
            "JWT authority \"j\": public key is malformed".into(),
            "WIT authority \"w9\": public key is malformed".into(),
        ]
    );
    assert_eq!(finial_crypto::bundle::readable(&good), (good, vec![]));
}

#[test]
fn pem_round_trips_and_tells_what_is_wrong() {
    use pem::*;
    let text = encode_certificates(ROOTS.iter().map(|r| &**r));
    assert_eq!(certificates(text.as_bytes()).unwrap(), *ROOTS);
    assert_eq!(certificates(text.replace('\n', "\r\n").as_bytes()).unwrap(), *ROOTS);
    assert!(matches!(certificates(b"nothing"), Err(PemError::NoBlocks)));
    assert!(matches!(certificates(&text.as_bytes()[..300]), Err(PemError::Malformed(_))));
    assert!(matches!(certificates(text.replace("MII", "!!!").as_bytes()), Err(PemError::Malformed(_))));
    for key in KEYS.iter() {
        let text = encode_private_key(key.pkcs8_der().expose());
        assert_eq!(private_key(text.expose().as_bytes()).unwrap().public_key(), key.public_key());
        assert!(matches!(certificates(text.expose().as_bytes()), Err(PemError::WrongType { .. })));
        assert_eq!(public_key(encode_public_key(key.public_key()).as_bytes()).unwrap(), *key.public_key());
    }
    assert!(matches!(private_key(text.as_bytes()), Err(PemError::NoBlocks)));
    assert!(matches!(private_key(encode("ENCRYPTED PRIVATE KEY", &[1]).as_bytes()), Err(PemError::WrongType { .. })));
    assert!(text.lines().all(|line| line.len() <= 64));
}

#[test]
fn weak_and_foreign_keys_are_named_when_refused() {
    let spki = |hex: &str| {
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        PublicKey::from_spki(&bytes).unwrap_err()
    };
    let ed25519 = format!("302a300506032b6570032100{}", "11".repeat(32));
    assert_eq!(spki(&ed25519), KeyError::UnsupportedAlgorithm("Ed25519".into()));
    let p224 = format!("304e301006072a8648ce3d020106052b81040021033a0004{}", "22".repeat(56));
    assert_eq!(spki(&p224), KeyError::UnsupportedCurve("P-224".into()));
    let rsa_1024 = format!("30819f300d06092a864886f70d010101050003818d0030818902818100{}0203010001", "ff".repeat(128));
    assert_eq!(spki(&rsa_1024), KeyError::RsaSize(1024));
    let off_curve = format!("3059301306072a8648ce3d020106082a8648ce3d03010703420004{}", "33".repeat(64));
    assert_eq!(spki(&off_curve), KeyError::Malformed);
    let compressed = format!("3039301306072a8648ce3d020106082a8648ce3d03010703220002{}", "33".repeat(32));
    assert_eq!(spki(&compressed), KeyError::Malformed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bundle_round_trips(x509 in proptest::sample::subsequence(vec![0usize, 1, 2], 0..=3), ids in proptest::collection::btree_set("\\PC{1,12}", 0..5), hint in 0i64..1_000_000, sequence in any::<u64>(), pretty in any::<bool>()) {
        let mut bundle = Bundle::empty(td());
        bundle.x509_authorities = x509.iter().map(|i| X509Authority { der: ROOTS[*i].clone(), tainted: false }).collect();
        bundle.jwt_authorities = ids.iter().enumerate().map(|(i, id)| jwt_authority(id, &KEYS[i % 3])).collect();
        bundle.refresh_hint = hint;
        bundle.sequence_number = sequence;
        let text = bundle_to_json(&bundle, BundleFormat { pretty, ..BundleFormat::SPIFFE });
        prop_assert_eq!(bundle_from_json(&td(), text.as_bytes()).unwrap(), bundle);
    }

    #[test]
    fn any_block_of_pem_round_trips(der in proptest::collection::vec(any::<u8>(), 0..300)) {
        let text = format!("prose\n{}more prose\n", pem::encode("X", &der));
        let blocks = pem::blocks(text.as_bytes()).unwrap();
        prop_assert_eq!(blocks.len(), 1);
        prop_assert_eq!(blocks[0].der.expose(), &der);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,200}") {
        let _ = bundle_from_json(&td(), text.as_bytes());
        let _ = pem::blocks(text.as_bytes());
    }
}
