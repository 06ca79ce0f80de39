//! WIT-SVIDs: what is signed is accepted, and each rule of the standard refuses what breaks it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use finial_core::{Bundle, JwtAuthority, KeyType, SpiffeId, TrustDomain};
use finial_crypto::*;
use serde_json::{Value, json};
use std::sync::{Arc, LazyLock};

const NOW: i64 = 1_800_000_000;
static KEY: LazyLock<PrivateKey> = LazyLock::new(|| PrivateKey::generate(KeyType::EcP256).unwrap());

fn keys() -> Arc<JwtKeys> {
    let mut bundle = Bundle::empty(TrustDomain::parse("example.org").unwrap());
    let public_key = KEY.public_key().spki_der().clone();
    bundle.wit_authorities.push(JwtAuthority { key_id: "wit".into(), public_key, expires_at: 0, tainted: false });
    assert!(JwtKeys::from_bundle(&bundle).unwrap().key("wit").is_none(), "WIT keys are no JWT keys");
    Arc::new(JwtKeys::wit_from_bundle(&bundle).unwrap())
}

fn check(token: &str) -> Result<WitSvid, WitError> {
    verify_wit_svid(token, |name| (name == "example.org").then(keys), NOW)
}

fn authority() -> WitAuthoritySigner {
    WitAuthoritySigner::new(Arc::new(KEY.clone()), "wit")
}

fn part(token: &str, n: usize) -> String {
    String::from_utf8(BASE64URL.decode(token.split('.').nth(n).unwrap()).unwrap()).unwrap()
}

/// A token of these parts, signed by the authority's key through the signer of JWTs, whose signature is taken over.
fn forged(header: &Value, claims: &Value) -> String {
    let input = format!("{}.{}", BASE64URL.encode(header.to_string()), BASE64URL.encode(claims.to_string()));
    let der = KEY.sign_now(SignatureAlgorithm::EcdsaP256Sha256, input.as_bytes()).unwrap();
    let scalar = |at: usize| {
        let bytes = &der[at + 1..at + 1 + usize::from(der[at])];
        let bytes = &bytes[bytes.len().saturating_sub(32)..];
        [vec![0; 32 - bytes.len()], bytes.to_vec()].concat()
    };
    let second = 4 + usize::from(der[3]) + 1;
    let raw = [scalar(3), scalar(second)].concat();
    format!("{input}.{}", BASE64URL.encode(raw))
}

#[tokio::test]
async fn what_is_signed_is_what_the_standard_shows_and_is_accepted() {
    let holder = PrivateKey::generate(KeyType::EcP384).unwrap();
    let id = SpiffeId::parse("spiffe://example.org/web").unwrap();
    let claims = WitSvidClaims {
        key: holder.public_key(),
        key_algorithm: wit_key_algorithm(holder.public_key(), "ES384").unwrap(),
        exp: NOW + 60,
        iat: NOW,
        iss: None,
        sub: &id,
    };
    let token = authority().sign(&claims).await.unwrap();
    assert_eq!(part(&token, 0), r#"{"alg":"ES256","kid":"wit","typ":"wit+jwt"}"#);
    let written = part(&token, 1);
    assert!(written.starts_with(r#"{"cnf":{"jwk":{"kty":"EC","crv":"P-384","alg":"ES384","x":""#), "{written}");
    assert!(written.ends_with(&format!(r#""}}}},"exp":{},"iat":{NOW},"sub":"spiffe://example.org/web"}}"#, NOW + 60)));
    let svid = check(&token).unwrap();
    assert_eq!((svid.id, svid.expires_at), (id.clone(), NOW + 60));
    assert_eq!((&svid.key, svid.key_algorithm), (holder.public_key(), SignatureAlgorithm::EcdsaP384Sha384));

    let named = authority().sign_now(&WitSvidClaims { iss: Some("urn:example"), ..claims }).unwrap().unwrap();
    assert_eq!(check(&named).unwrap().claims["iss"], "urn:example");
    struct Source(Arc<JwtKeys>);
    impl JwtKeySource for Source {
        fn jwt_keys(&self, _: &str) -> Option<Arc<JwtKeys>> {
            Some(self.0.clone())
        }
    }
    let taken = verify_jwt_svid(&token, &Source(keys()), &["db".into()], NOW);
    assert_eq!(taken.unwrap_err(), JwtError::Type, "a WIT-SVID is never taken for a JWT-SVID");
}

#[test]
fn each_rule_refuses_what_breaks_it() {
    let header = json!({"alg": "ES256", "kid": "wit", "typ": "wit+jwt"});
    let jwk = |alg: &str| {
        let mut jwk = finial_crypto::bundle::public_key_to_jwk(KEY.public_key(), None);
        jwk.insert("alg".into(), alg.into());
        Value::Object(jwk)
    };
    let claims = json!({
        "sub": "spiffe://example.org/web", "exp": NOW + 60, "iat": NOW, "cnf": {"jwk": jwk("ES256")},
    });
    let with = |base: &Value, name: &str, value: Value| {
        let mut changed = base.clone();
        match value {
            Value::Null => drop(changed.as_object_mut().unwrap().remove(name)),
            value => changed[name] = value,
        }
        changed
    };
    check(&forged(&header, &claims)).unwrap();
    check(&forged(&with(&header, "x", json!(1)), &claims)).expect("section 2.4: unknown headers are ignored");
    check(&forged(&header, &with(&claims, "iat", json!(NOW + 9999)))).expect("section 3.6: iat decides nothing");
    let algorithm = |key, algorithm: &str| WitError::Algorithm { key, algorithm: algorithm.into() };
    let confirmation = |why: &str| WitError::Confirmation(why.into());
    let unknown = JwtError::UnknownKey { key_id: "other".into(), trust_domain: "example.org".into() };
    let refused = [
        (with(&header, "typ", json!("JWT")), claims.clone(), WitError::Type),
        (with(&header, "typ", Value::Null), claims.clone(), WitError::Type),
        (with(&header, "crit", json!(["x"])), claims.clone(), WitError::Critical),
        (with(&header, "kid", Value::Null), claims.clone(), JwtError::NoKeyId.into()),
        (with(&header, "kid", json!("other")), claims.clone(), unknown.into()),
        (with(&header, "alg", json!("none")), claims.clone(), JwtError::Algorithm("none".into()).into()),
        (header.clone(), with(&claims, "aud", json!(["db"])), WitError::Audience),
        (header.clone(), with(&claims, "sub", Value::Null), JwtError::NoSubject.into()),
        (header.clone(), with(&claims, "exp", Value::Null), JwtError::NoExpiry.into()),
        (header.clone(), with(&claims, "exp", json!(NOW - 61)), JwtError::Expired.into()),
        (header.clone(), with(&claims, "nbf", json!(NOW + 61)), JwtError::NotYetValid.into()),
        (header.clone(), with(&claims, "cnf", Value::Null), confirmation("there is no jwk")),
        (header.clone(), with(&claims, "cnf", json!({"jwk": {}})), confirmation("the jwk has no alg")),
        (header.clone(), with(&claims, "cnf", json!({"jwk": jwk("RS256")})), algorithm("ec-p256", "RS256")),
        (
            header.clone(),
            with(&claims, "sub", json!("spiffe://other.org/web")),
            JwtError::UnknownTrustDomain("other.org".into()).into(),
        ),
    ];
    for (header, claims, error) in refused {
        assert_eq!(check(&forged(&header, &claims)).unwrap_err(), error, "{header} {claims}");
    }
    let good = forged(&header, &claims);
    let (signed, _) = good.rsplit_once('.').unwrap();
    let other = forged(&header, &with(&claims, "exp", json!(NOW + 61)));
    let forged = format!("{signed}.{}", other.rsplit_once('.').unwrap().1);
    assert_eq!(check(&forged).unwrap_err(), JwtError::Signature.into());
}

#[test]
fn a_key_takes_the_algorithms_that_go_with_it() {
    let cases = [
        (KeyType::EcP256, "ec-p256", vec!["ES256"]),
        (KeyType::EcP384, "ec-p384", vec!["ES384"]),
        (KeyType::Rsa2048, "RSA", vec!["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]),
    ];
    for (kind, name, good) in cases {
        let key = PrivateKey::generate(kind).unwrap();
        for algorithm in SignatureAlgorithm::ALL.map(SignatureAlgorithm::jwa).into_iter().chain(["", "none", "HS256"]) {
            let answer = wit_key_algorithm(key.public_key(), algorithm);
            match good.contains(&algorithm) {
                true => assert_eq!(answer.unwrap().jwa(), algorithm),
                false => assert_eq!(
                    answer.unwrap_err().to_string(),
                    format!("unsupported signing algorithm for {name} key: {algorithm}")
                ),
            }
        }
    }
}
