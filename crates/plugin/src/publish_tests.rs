use super::*;
use finial_core::{JwtAuthority, KeyType, TrustDomain, X509Authority};
use finial_crypto::{CaTemplate, DistinguishedName, PrivateKey, SerialNumber, X509Ca};
use std::sync::Arc;

async fn bundle() -> Bundle {
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let key = Arc::new(PrivateKey::generate(KeyType::EcP256).unwrap());
    let template = CaTemplate {
        subject: &DistinguishedName::ca_default(),
        trust_domain: &trust_domain,
        not_before: 0,
        not_after: 2_000_000_000,
        serial: SerialNumber::new(1),
    };
    let ca = X509Ca::self_sign(key.clone(), &template).await.unwrap();
    let key_of = |id: &str| JwtAuthority {
        key_id: id.into(),
        public_key: Arc::from(&**key.public_key().spki_der()),
        expires_at: 0,
        tainted: false,
    };
    Bundle {
        x509_authorities: vec![X509Authority { der: ca.certificate().clone(), tainted: false }],
        jwt_authorities: vec![key_of("jwt")],
        wit_authorities: vec![key_of("wit")],
        sequence_number: 7,
        refresh_hint: 60,
        ..Bundle::empty(trust_domain)
    }
}

fn kids(document: &str) -> Vec<String> {
    let document: serde_json::Value = serde_json::from_str(document).unwrap();
    let keys = document["keys"].as_array().unwrap();
    keys.iter().map(|key| key["kid"].as_str().unwrap_or("x5c").to_owned()).collect()
}

#[test]
fn formats_are_read_in_any_case() {
    let named = [("spiffe", BundleFormat::Spiffe), ("JWKS", BundleFormat::Jwks), ("Pem", BundleFormat::Pem)];
    for (name, format) in named {
        assert_eq!(BundleFormat::parse(name).unwrap(), format);
    }
    assert_eq!(BundleFormat::parse("der").unwrap_err().to_string(), "unknown bundle format: \"der\"");
}

#[tokio::test]
async fn each_format_holds_what_belongs_to_it() {
    let mut bundle = bundle().await;
    let spiffe = BundleFormat::Spiffe.write(&bundle);
    assert_eq!(kids(&spiffe), ["x5c", "jwt", "wit"]);
    assert!(spiffe.contains("\"spiffe_sequence\":7") && spiffe.contains("\"use\":\"x509-svid\""), "{spiffe}");
    let jwks = BundleFormat::Jwks.write(&bundle);
    assert_eq!(kids(&jwks), ["x5c", "jwt"]);
    assert!(!jwks.contains("spiffe") && !jwks.contains("\"use\""), "{jwks}");
    let read = pem::certificates(BundleFormat::Pem.write(&bundle).as_bytes()).unwrap();
    assert_eq!(read, [bundle.x509_authorities[0].der.clone()]);
    bundle.jwt_authorities[0].public_key = Arc::from(*b"garbage");
    assert_eq!(kids(&BundleFormat::Jwks.write(&bundle)), ["x5c"], "one that cannot be written costs only itself");
}

#[tokio::test]
async fn a_hint_of_its_own_takes_the_place_of_the_bundles() {
    let bundle = bundle().await;
    let written = |hint| PublishedForm::read("spiffe", hint).unwrap().write(&bundle);
    assert!(written("5m").contains("\"spiffe_refresh_hint\":300"));
    assert!(written("").contains("\"spiffe_refresh_hint\":60"));
    for (format, hint, want) in [
        ("der", "", "unknown bundle format: \"der\""),
        ("pem", "soon", "could not parse refresh hint \"soon\": time: invalid duration \"soon\""),
        ("pem", "-5m", "could not parse refresh hint \"-5m\": it is negative"),
    ] {
        assert_eq!(PublishedForm::read(format, hint).unwrap_err().to_string(), want);
    }
}
