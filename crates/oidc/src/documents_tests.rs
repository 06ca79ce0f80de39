use super::*;
use finial_config::{OidcDocuments, OidcListen};
use finial_core::{Bundle, JwtAuthority, KeyType, ManualClock, TrustDomain};
use finial_crypto::PrivateKey;
use http::Request;
use serde_json::Value;
use std::sync::Arc;

fn keys(kinds: &[KeyType], say_use: bool) -> (Keys, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::at(784_111_777));
    let keys = Keys::new(clock.clone(), say_use);
    let mut bundle = Bundle::empty(TrustDomain::parse("td").unwrap());
    for (index, kind) in kinds.iter().enumerate() {
        let public_key = PrivateKey::generate(*kind).unwrap().public_key().spki_der().clone();
        let key_id = format!("k{index}");
        bundle.jwt_authorities.push(JwtAuthority { key_id, public_key, expires_at: 0, tainted: false });
    }
    keys.set(&bundle);
    (keys, clock)
}

fn ask(documents: &Documents, url: &str, headers: &[(&str, &str)]) -> (u16, Value, HeaderMap) {
    let mut request = Request::get(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = documents.respond(&request.body(()).unwrap().into_parts().0);
    let (head, mut body) = response.into_parts();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let frame = runtime.block_on(http_body_util::BodyExt::frame(&mut body));
    let bytes = frame.and_then(|frame| frame.unwrap().into_data().ok()).unwrap_or_default();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    (head.status.as_u16(), serde_json::from_str(&text).unwrap_or(text.into()), head.headers)
}

fn with(keys: Keys, documents: OidcDocuments, tls: bool) -> Documents {
    let domains = vec!["x.test".into(), "::1".into()];
    let listen = OidcListen::Insecure(String::new());
    Documents::new(keys, OidcEndpoint { domains, listen, documents, log_requests: true }, tls)
}

fn documents(settings: OidcDocuments, tls: bool) -> Documents {
    with(keys(&[KeyType::EcP256], false).0, settings, tls)
}

const DISCOVERY: &str = "/.well-known/openid-configuration";

#[test]
fn the_issuer_is_the_name_that_was_asked_for() {
    let issuer = |settings: OidcDocuments, tls, headers: &[(&str, &str)]| {
        let (status, document, _) = ask(&documents(settings, tls), DISCOVERY, headers);
        (status, document["issuer"].as_str().unwrap_or_default().to_owned(), document["jwks_uri"].clone())
    };
    let plain = OidcDocuments::default();
    let insecure = OidcDocuments { allow_insecure_scheme: true, ..plain.clone() };
    let host = ("host", "x.test:1");
    let of = |issuer: &str| (200, issuer.to_owned(), Value::from(format!("{issuer}/keys")));
    assert_eq!(issuer(plain.clone(), false, &[host]), of("https://x.test:1"));
    assert_eq!(issuer(insecure.clone(), false, &[host]), of("http://x.test:1"));
    assert_eq!(issuer(insecure.clone(), true, &[host]), of("https://x.test:1"), "over TLS");
    assert_eq!(issuer(insecure, false, &[host, ("forwarded", "for=1;proto=\"HTTPS\";by=2")]), of("https://x.test:1"));
    assert_eq!(issuer(plain.clone(), false, &[("host", "[::1]:80")]), of("https://[::1]:80"));
    assert_eq!(issuer(plain.clone(), false, &[("host", "y"), ("x-forwarded-host", "x.test")]), of("https://x.test"));
    for other in [
        "",
        "y.test",
        "x.test.evil",
        "X.test",
        "x.test:1:2",
        "x.test:x@evil.test",
        "x.test:1/any",
        "x.test:",
        "x.test:+1",
        "[::1]@evil.test",
        "[::1",
        "x.test:99999",
    ] {
        assert_eq!(issuer(plain.clone(), false, &[("host", other)]).0, 400, "{other:?}");
    }
}

#[test]
fn every_kind_of_key_names_its_algorithm() {
    let kinds = [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048];
    let documents = with(keys(&kinds, true).0, OidcDocuments::default(), true);
    let (status, set, headers) = ask(&documents, "/keys", &[]);
    let said: Vec<_> = set["keys"].as_array().unwrap().iter().map(|k| (k["alg"].as_str(), k["use"].as_str())).collect();
    assert_eq!(said, [(Some("ES256"), Some("sig")), (Some("ES384"), Some("sig")), (Some("RS256"), Some("sig"))]);
    assert_eq!((status, headers["last-modified"].to_str().unwrap()), (200, "Sun, 06 Nov 1994 08:49:37 GMT"));
    let (status, body, _) = ask(&documents, "/keys", &[("if-modified-since", "Sun, 06 Nov 1994 08:49:37 GMT")]);
    assert_eq!((status, body), (304, "".into()));
}

#[test]
fn no_keys_and_not_known_yet_are_told_apart() {
    let answer = |keys: Keys| ask(&with(keys, OidcDocuments::default(), true), "/keys", &[]).0;
    assert_eq!(answer(keys(&[], false).0), 501);
    assert_eq!(answer(Keys::new(Arc::new(ManualClock::at(1)), false)), 500);
}

#[test]
fn probes_allow_five_polls_and_three_minutes() {
    let answers = |poll_seconds: u64, age: i64| {
        let (keys, clock) = keys(&[KeyType::EcP256], false);
        clock.advance(age);
        let paths = finial_config::OidcHealth { port: 0, ready_path: "/ready".into(), live_path: "/live".into() };
        let probes = crate::health::Probes::new(keys, paths, std::time::Duration::from_secs(poll_seconds));
        let ask = |path: &str| probes.respond(&Request::get(path).body(()).unwrap().into_parts().0).status().as_u16();
        [ask("/ready"), ask("/live"), ask("/other")]
    };
    assert_eq!(answers(10, 179), [200, 200, 404]);
    assert_eq!(answers(10, 180), [500, 500, 404]);
    assert_eq!(answers(60, 299), [200, 200, 404], "four polls may fail");
    assert_eq!(answers(60, 300), [500, 500, 404]);
    let nothing = Keys::new(Arc::new(ManualClock::at(1)), false);
    assert_eq!(nothing.age(), (0, false));
}
