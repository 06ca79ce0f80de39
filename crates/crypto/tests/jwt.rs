//! JWT-SVIDs: what is signed is accepted, and each rule of the standard refuses what breaks it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use finial_core::{Bundle, JwtAuthority, KeyType, SpiffeId, TrustDomain};
use finial_crypto::*;
use proptest::prelude::*;
use serde_json::json;
use std::sync::{Arc, LazyLock};

const NOW: i64 = 1_800_000_000;
static KEY: LazyLock<PrivateKey> = LazyLock::new(|| PrivateKey::generate(KeyType::EcP256).unwrap());
static RSA: LazyLock<PrivateKey> = LazyLock::new(|| PrivateKey::generate(KeyType::Rsa2048).unwrap());

struct Source(Arc<JwtKeys>);

impl JwtKeySource for Source {
    fn jwt_keys(&self, trust_domain: &str) -> Option<Arc<JwtKeys>> {
        (trust_domain == "example.org").then(|| self.0.clone())
    }
}

fn source() -> Source {
    let mut bundle = Bundle::empty(TrustDomain::parse("example.org").unwrap());
    for (key_id, key) in [("ec", &*KEY), ("rsa", &*RSA)] {
        let public_key = key.public_key().spki_der().clone();
        bundle.jwt_authorities.push(JwtAuthority { key_id: key_id.into(), public_key, expires_at: 0, tainted: false });
    }
    Source(Arc::new(JwtKeys::from_bundle(&bundle).unwrap()))
}

fn token(header: serde_json::Value, claims: serde_json::Value) -> String {
    raw(&header.to_string(), &claims.to_string())
}

fn raw(header: &str, claims: &str) -> String {
    let input = format!("{}.{}", BASE64URL.encode(header), BASE64URL.encode(claims));
    let der = KEY.sign_now(SignatureAlgorithm::EcdsaP256Sha256, input.as_bytes()).unwrap();
    format!("{input}.{}", BASE64URL.encode(fixed(&der)))
}

/// DER to `r || s`, apart from the crate's own code.
fn fixed(der: &[u8]) -> Vec<u8> {
    let r_len = usize::from(der[3]);
    let (r, s) = (&der[4..4 + r_len], &der[6 + r_len..]);
    let pad = |n: &[u8]| {
        let n = if n[0] == 0 { &n[1..] } else { n };
        [vec![0; 32 - n.len()], n.to_vec()].concat()
    };
    [pad(r), pad(s)].concat()
}

fn claims() -> serde_json::Value {
    json!({"sub": "spiffe://example.org/web", "aud": ["db"], "exp": NOW + 300, "iat": NOW})
}

fn header() -> serde_json::Value {
    json!({"alg": "ES256", "kid": "ec", "typ": "JWT"})
}

fn with(name: &str, value: serde_json::Value) -> serde_json::Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn without(name: &str) -> serde_json::Value {
    let mut claims = claims();
    claims.as_object_mut().unwrap().remove(name);
    claims
}

fn check(token: &str) -> Result<JwtSvid, JwtError> {
    verify_jwt_svid(token, &source(), &["db".into()], NOW)
}

fn svid_claims<'a>(id: &'a SpiffeId, aud: &'a [String]) -> JwtSvidClaims<'a> {
    JwtSvidClaims { sub: id, aud, exp: NOW + 300, iat: NOW, iss: None, jti: None }
}

#[test]
fn the_token_has_spires_form() {
    let id = SpiffeId::parse("spiffe://example.org/web").unwrap();
    let aud = ["db".to_owned()];
    let authority = JwtAuthoritySigner::new(Arc::new(KEY.clone()), "ec");
    let claims = JwtSvidClaims { iss: Some("https://oidc.example.org"), jti: Some("x"), ..svid_claims(&id, &aud) };
    let token = authority.sign_now(&claims).unwrap().unwrap();
    let parts: Vec<_> = token.split('.').collect();
    let text = |i: usize| String::from_utf8(BASE64URL.decode(parts[i]).unwrap()).unwrap();
    assert_eq!(text(0), r#"{"alg":"ES256","kid":"ec","typ":"JWT"}"#);
    assert_eq!(
        text(1),
        format!(
            r#"{{"aud":["db"],"exp":{},"iat":{NOW},"iss":"https://oidc.example.org","jti":"x","sub":"spiffe://example.org/web"}}"#,
            NOW + 300
        )
    );
    assert_eq!(BASE64URL.decode(parts[2]).unwrap().len(), 64);
    assert_eq!(jwt_svid_times(&token).unwrap(), (NOW, NOW + 300));
    let svid = check(&token).unwrap();
    assert_eq!((svid.id, svid.audience, svid.expires_at), (id, vec!["db".to_owned()], NOW + 300));
    assert_eq!(svid.claims["jti"], "x");
}

#[tokio::test]
async fn rsa_authorities_sign_rs256() {
    let id = SpiffeId::parse("spiffe://example.org/web").unwrap();
    let token = sign_jwt_svid(Arc::new(RSA.clone()), "rsa", &svid_claims(&id, &["db".into()])).await.unwrap();
    assert!(check(&token).is_ok());
    // All RSA algorithms of section 2.1 are accepted.
    for alg in ["RS384", "RS512", "PS256", "PS384", "PS512"] {
        let head = json!({"alg": alg, "kid": "rsa"}).to_string();
        let input = format!("{}.{}", BASE64URL.encode(head), BASE64URL.encode(claims().to_string()));
        let signature = RSA.sign_now(SignatureAlgorithm::from_jwa(alg).unwrap(), input.as_bytes()).unwrap();
        assert!(check(&format!("{input}.{}", BASE64URL.encode(signature))).is_ok(), "{alg}");
    }
}

#[test]
fn each_rule_refuses_what_breaks_it() {
    assert!(check(&token(header(), claims())).is_ok(), "the test's own tokens are good");
    let algorithm = |alg: &str| check(&token(json!({"alg": alg, "kid": "ec"}), claims()));
    // Section 2.1.
    for alg in ["none", "None", "HS256", "HS384", "HS512", "EdDSA", "ES256K", "es256", ""] {
        assert_eq!(algorithm(alg).unwrap_err(), JwtError::Algorithm(alg.into()));
    }
    assert_eq!(
        JwtError::Algorithm("HS256".into()).to_string(),
        r#"unable to parse JWT token: unexpected signature algorithm "HS256"; expected ["ES256" "ES384" "ES512" "RS256" "RS384" "RS512" "PS256" "PS384" "PS512"]"#
    );
    // An algorithm of another kind of key (section 4).
    for alg in ["ES384", "ES512", "RS256", "PS256"] {
        assert_eq!(algorithm(alg).unwrap_err(), JwtError::Signature, "{alg}");
    }
    // Section 2.2: optional in the standard, needed by SPIRE.
    assert_eq!(check(&token(json!({"alg": "ES256"}), claims())).unwrap_err(), JwtError::NoKeyId);
    // Section 2.3.
    let typ = |typ: &str| check(&token(json!({"alg": "ES256", "kid": "ec", "typ": typ}), claims()));
    assert!(typ("JWT").is_ok() && typ("JOSE").is_ok());
    assert!(check(&token(json!({"alg": "ES256", "kid": "ec"}), claims())).is_ok());
    for bad in ["jwt", "at+jwt", "wit+jwt", ""] {
        assert_eq!(typ(bad).unwrap_err(), JwtError::Type);
    }
    // Section 2: no other header.
    for name in ["crit", "jku", "jwk", "x5c", "cty", "b64", "zip"] {
        let mut head = header();
        head[name] = json!("x");
        assert_eq!(check(&token(head, claims())).unwrap_err(), JwtError::Header(name.into()));
    }
    let twice = r#"{"alg":"ES256","kid":"ec","alg":"ES256"}"#;
    assert_eq!(check(&raw(twice, &claims().to_string())).unwrap_err(), JwtError::Malformed("header"));
    // Section 3.1.
    assert_eq!(check(&token(header(), without("sub"))).unwrap_err(), JwtError::NoSubject);
    assert_eq!(check(&token(header(), with("sub", json!("")))).unwrap_err(), JwtError::NoSubject);
    assert!(matches!(check(&token(header(), with("sub", json!("web")))), Err(JwtError::BadSubject(_))));
    assert_eq!(check(&token(header(), with("sub", json!(7)))).unwrap_err(), JwtError::Malformed("sub claim"));
    // Section 3.2.
    for claims in [without("aud"), with("aud", json!([])), with("aud", json!("web")), with("aud", json!(["DB"]))] {
        assert!(matches!(check(&token(header(), claims)), Err(JwtError::Audience { .. })));
    }
    assert_eq!(check(&token(header(), with("aud", json!([1])))).unwrap_err(), JwtError::Malformed("aud claim"));
    assert!(check(&token(header(), with("aud", json!("db")))).is_ok(), "a lone string is a list of one");
    assert!(check(&token(header(), with("aud", json!(["x", "db"])))).is_ok());
    let nobody = verify_jwt_svid(&token(header(), claims()), &source(), &[], NOW);
    assert_eq!(nobody.unwrap_err().to_string(), r#"expected audience in [] (audience=["db"])"#);
    // Section 3.3.
    assert_eq!(check(&token(header(), without("exp"))).unwrap_err(), JwtError::NoExpiry);
    assert_eq!(check(&token(header(), with("exp", json!("soon")))).unwrap_err(), JwtError::Malformed("numeric date"));
    assert_eq!(check(&token(header(), with("exp", json!(NOW - 61)))).unwrap_err(), JwtError::Expired);
    assert!(check(&token(header(), with("exp", json!(NOW - 60)))).is_ok(), "one minute of leeway");
    assert!(check(&token(header(), with("exp", json!(1.9e9)))).is_ok());
    // RFC 7519 sections 4.1.5 and 4.1.6.
    assert_eq!(check(&token(header(), with("nbf", json!(NOW + 61)))).unwrap_err(), JwtError::NotYetValid);
    assert!(check(&token(header(), with("nbf", json!(NOW + 60)))).is_ok());
    assert_eq!(check(&token(header(), with("iat", json!(NOW + 61)))).unwrap_err(), JwtError::IssuedInFuture);
    // Keys.
    let foreign = with("sub", json!("spiffe://other.org/web"));
    assert_eq!(
        check(&token(header(), foreign)).unwrap_err().to_string(),
        r#"no keys found for trust domain "other.org""#
    );
    let unknown = check(&token(json!({"alg": "ES256", "kid": "x"}), claims()));
    assert_eq!(unknown.unwrap_err().to_string(), r#"public key "x" not found in trust domain "example.org""#);
}

#[test]
fn a_token_with_all_the_audiences_that_a_request_may_name_is_accepted() {
    let audiences: Vec<String> = (0..256).map(|i| format!("{i:064}")).chain(["db".to_owned()]).collect();
    assert!(audiences.iter().map(String::len).sum::<usize>() > 16 << 10);
    let mut claims = with("composed", json!("x".repeat(16 << 10)));
    claims["aud"] = json!(audiences);
    assert!(check(&token(header(), claims)).is_ok());
}

#[test]
fn only_compact_serialization_is_accepted() {
    let good = token(header(), claims());
    let parts: Vec<_> = good.split('.').collect();
    let json = json!({"protected": parts[0], "payload": parts[1], "signature": parts[2]}).to_string();
    for bad in ["", ".", "a.b", &json, &format!("{good}.x"), &format!("{good}."), &parts[..2].join(".")] {
        assert!(check(bad).is_err(), "{bad}");
    }
    assert_eq!(check("a.b").unwrap_err(), JwtError::NotCompact);
    assert_eq!(check(&"a".repeat(TOKEN_BYTES_MAX + 1)).unwrap_err(), JwtError::TooLarge);
    assert!(check(&format!("{good}=")).is_err(), "no padding");
    assert_eq!(check(&format!("{}.{}.", parts[0], parts[1])).unwrap_err(), JwtError::Signature);
    let other = token(header(), with("aud", json!(["else"])));
    let mixed = format!("{}.{}.{}", parts[0], parts[1], other.split('.').nth(2).unwrap());
    assert_eq!(check(&mixed).unwrap_err(), JwtError::Signature);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_signed_is_accepted(path in "(/[a-z0-9]{1,9}){1,4}", aud in proptest::collection::vec("\\PC{1,20}", 1..4), life in 0i64..100_000) {
        let id = SpiffeId::parse(&format!("spiffe://example.org{path}")).unwrap();
        let authority = JwtAuthoritySigner::new(Arc::new(KEY.clone()), "ec");
        let claims = JwtSvidClaims { exp: NOW + life, ..svid_claims(&id, &aud) };
        let token = authority.sign_now(&claims).unwrap().unwrap();
        let svid = verify_jwt_svid(&token, &source(), &aud[..1], NOW).unwrap();
        prop_assert_eq!((svid.id, svid.audience, svid.expires_at), (id, aud, NOW + life));
    }

    #[test]
    fn a_changed_character_never_verifies(at in any::<prop::sample::Index>(), c in "[A-Za-z0-9_.-]") {
        let good = token(header(), claims());
        let index = at.index(good.len());
        let mut bad = good.clone();
        bad.replace_range(index..=index, &c);
        prop_assert!(bad == good || check(&bad).is_err());
    }

    #[test]
    fn any_text_is_accepted_or_refused(text in "[a-zA-Z0-9_.=-]{0,200}") {
        prop_assert!(check(&text).is_err());
    }
}
