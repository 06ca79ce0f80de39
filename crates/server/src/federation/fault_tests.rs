//! Endpoints that misbehave, over real TLS: each is named with its fault, and the last good bundle stays in force.

mod lab;

use super::judge::refresh_after;
use super::*;
use finial_core::EndpointProfile;
use lab::*;
use serde_json::{Value, json};
use std::net::SocketAddr;

const FETCH: &str = "failed to fetch federated bundle from endpoint: failed to fetch bundle: Get ";
const DECODE: &str = "failed to fetch federated bundle from endpoint: failed to decode bundle: ";

#[tokio::test]
async fn what_is_no_bundle_is_refused_with_what_is_wrong_and_who_served_it() {
    let lab = Lab::new().await;
    let good = lab.document(&lab.other.bundle(10));
    let keys = good["keys"].clone();
    let with = |key: usize, field: &str, value: Value| {
        let mut keys = keys.clone();
        keys[key][field] = value;
        json!({ "keys": keys }).to_string()
    };
    let off_curve = with(1, "x", keys[1]["y"].clone());
    for (body, want) in [
        (String::new(), "unable to parse JWKS: EOF while parsing a value at line 1 column 0 (served by URL)"),
        ("<html>".into(), "unable to parse JWKS: expected value at line 1 column 1 (served by URL)"),
        ("\u{0}\u{1}\u{2}".into(), "unable to parse JWKS: "),
        ("[]".into(), "unable to parse JWKS: "),
        ("{".into(), "unable to parse JWKS: EOF"),
        (format!("{good}{good}"), "unable to parse JWKS: trailing characters"),
        ("[".repeat(5000), "unable to parse JWKS: "),
        (r#"{"keys": [], "keys": []}"#.into(), "unable to parse JWKS: duplicate field `keys`"),
        ("{}".into(), "no authorities found (served by URL)"),
        (r#"{"keys": null}"#.into(), "no authorities found (served by URL)"),
        (r#"{"keys": {}}"#.into(), "unable to parse JWKS: invalid type: map, expected a sequence"),
        (r#"{"keys": [], "spiffe_sequence": -1}"#.into(), "unable to parse JWKS: invalid value: integer `-1`"),
        (r#"{"keys": [], "spiffe_refresh_hint": 99999999999999999999}"#.into(), "unable to parse JWKS: "),
        (with(0, "x5c", json!(["AAAA"])), "certificate in x509-svid entry 0 is malformed: "),
        (with(0, "x", keys[0]["y"].clone()), "error adding authority 0 of JWKS: "),
        (with(1, "kid", json!("")), "error adding authority 1 of JWKS: keyID cannot be empty (served by URL)"),
        (off_curve, "error adding authority 1 of JWKS: "),
    ] {
        lab.endpoint.serves(&body);
        lab.fails(&format!("{DECODE}{want}")).await;
    }
    for (answer, want) in [
        (http("500 Internal Server Error", "", "oh no"), "unexpected status 500 fetching bundle: oh no"),
        (http("204 No Content", "", ""), "unexpected status 204 fetching bundle: "),
        (http("403 Forbidden", "", &"no ".repeat(5000)), "unexpected status 403 fetching bundle: no no no"),
        // Nowhere to go.
        (http("302 Found", "", ""), "unexpected status 302 fetching bundle: "),
    ] {
        lab.endpoint.says(Says::Answer(answer));
        lab.fails(&format!("failed to fetch federated bundle from endpoint: {want}")).await;
    }
    for answer in ["nonsense\r\n\r\n".to_owned(), format!("HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{good}")] {
        lab.endpoint.says(Says::Answer(answer));
        lab.fails(&format!("{FETCH}URL: ")).await;
    }
}

#[tokio::test]
async fn what_the_standard_leaves_open_or_tells_to_ignore_does_no_harm() {
    let lab = Lab::new().await;
    let good = lab.document(&lab.other.bundle(11));
    let taken = lab.takes(&good).await;
    assert_eq!((taken.x509_authorities.len(), taken.jwt_authorities.len(), taken.sequence_number), (1, 1, 10));
    let key = |index: usize, field: &str, value: Value| {
        let mut key = good["keys"][index].clone();
        key[field] = value;
        key
    };
    let mut document = good.clone();
    let keys = document["keys"].as_array_mut().unwrap();
    keys.extend([
        key(1, "kty", json!("OKP")),
        key(1, "kty", json!(7)),
        key(1, "use", json!("sig")),
        key(1, "use", json!("JWT-SVID")),
        key(1, "use", Value::Null),
        key(1, "crv", json!("secp256k1")),
        json!({}),
        key(0, "x5c", json!([])),
        // twice the same, and more than there should be
        key(1, "alg", json!("ES256")),
        key(0, "kid", json!("named")),
    ]);
    document["more"] = json!({"deep": [1, 2, 3]});
    assert_eq!(lab.takes(&document).await, taken);
    // A hint is only that.
    for (hint, seconds) in
        [(json!(0), 300), (json!(-5), 300), (json!(null), 300), (json!(1), 15), (json!(i64::MAX), 86_760)]
    {
        let mut document = good.clone();
        document["spiffe_refresh_hint"] = hint;
        let taken = lab.takes(&document).await;
        assert_eq!(refresh_after(Some(&taken)).as_secs(), seconds, "{}", document["spiffe_refresh_hint"]);
        assert_eq!(taken.x509_authorities.len(), 1);
    }
    for headers in ["Content-Type: text/html\r\n", "", "Content-Type: \r\nContent-Encoding: what\r\n"] {
        let mut document = good.clone();
        document["spiffe_refresh_hint"] = json!(headers.len() + 100);
        lab.endpoint.says(Says::Answer(http("200 OK", headers, &document.to_string())));
        lab.poll().await.unwrap();
        assert_eq!(lab.known().refresh_hint, i64::try_from(headers.len() + 100).unwrap(), "{headers:?}");
    }
}

#[tokio::test]
async fn a_trust_domain_without_keys_has_revoked_them_and_needs_its_operator_to_come_back() {
    let lab = Lab::new().await;
    let none = lab.takes(&json!({"keys": []})).await;
    assert!(none.x509_authorities.is_empty() && none.jwt_authorities.is_empty());
    lab.fails("can't perform SPIFFE Authentication: the bundle of \"other.test\" has no X.509 authorities").await;
    lab.ours.set(lab.other.bundle(20)).await;
    assert_eq!(lab.takes(&lab.document(&lab.other.bundle(21))).await.x509_authorities.len(), 1);
    lab.by_spiffe("spiffe://nobody.test/x", &lab.endpoint.url());
    lab.fails("can't perform SPIFFE Authentication: local copy of bundle not found").await;
}

#[tokio::test]
async fn an_older_bundle_is_refused_also_after_a_restart_and_told_to_last() {
    let lab = Lab::new().await;
    let older = |number| Bundle { refresh_hint: 77, ..lab.other.bundle(number) };
    lab.endpoint.serves(&lab.document(&older(9)).to_string());
    // Nothing was fetched yet by this process: the stored one counts.
    let told = lab.poll().await.unwrap_err().to_string();
    let url = lab.endpoint.url();
    assert_eq!(
        told,
        format!(
            "{url:?} serves a bundle with sequence number 9, older than 10 that it had before: not taken unless it stays so for \
             an hour, or `federation refresh` asks for it"
        )
    );
    for _ in 0..10 {
        lab.poll().await.unwrap_err();
    }
    assert_eq!(lab.known(), lab.other.bundle(10));
    assert!(lab.federation.refresh(&lab.other.name).await.unwrap());
    assert_eq!(lab.known(), older(9), "an operator wants it");
    // The numbers of another endpoint have nothing to do with it.
    lab.by_spiffe(ENDPOINT, &format!("{url}?elsewhere"));
    let document = lab.document(&Bundle { refresh_hint: 78, ..older(3) }).to_string();
    lab.endpoint.says_at("/?elsewhere", Says::Answer(http("200 OK", "", &document)));
    lab.poll().await.unwrap();
    assert_eq!(lab.known().refresh_hint, 78);
}

#[tokio::test]
async fn another_domains_bundle_is_not_taken_unless_an_operator_has_set_it() {
    let (lab, third) = (Lab::new().await, Domain::new("third.test").await);
    lab.endpoint.serves(&lab.document(&third.bundle(50)).to_string());
    lab.fails("URL serves the bundle of trust domain \"third.test\" instead of \"other.test\": ").await;
    // Both together are odd, but an authority of its own is among them.
    let mut both = lab.other.bundle(51);
    both.x509_authorities.extend(third.bundle(0).x509_authorities);
    assert_eq!(lab.takes(&lab.document(&both)).await.x509_authorities.len(), 2);
    // What is known is expected: the standard lets another trust domain's authority sign.
    let taken = lab.takes(&lab.document(&third.bundle(52))).await;
    assert_eq!(taken.x509_authorities[0].der, *third.ca.certificate());
}

#[tokio::test]
async fn an_endpoint_that_cannot_prove_who_it_is_is_not_asked() {
    let lab = Lab::new().await;
    lab.endpoint.serves(&lab.document(&lab.other.bundle(99)).to_string());
    let unverified = format!("{FETCH}URL: tls: failed to verify certificate: ");
    lab.at(NOW + 2 * HOUR);
    lab.fails(&format!("{unverified}x509: certificate has expired or is not yet valid")).await;
    lab.at(NOW - 2 * HOUR);
    lab.fails(&format!("{unverified}x509: certificate has expired or is not yet valid")).await;
    lab.at(NOW);
    lab.by_spiffe("spiffe://other.test/else", &lab.endpoint.url());
    lab.fails(&format!("{unverified}unexpected ID \"spiffe://other.test/endpoint\"")).await;
    lab.by_spiffe(ENDPOINT, &lab.endpoint.url());
    // Another domain's certificate, whether that domain is known or not.
    let third = Domain::new("third.test").await;
    let mut lab = lab;
    lab.endpoint =
        Endpoint::start(&lab.supervisor.spawner(), third.svid("spiffe://third.test/endpoint", NOW + HOUR).await).await;
    lab.by_spiffe(ENDPOINT, &lab.endpoint.url());
    lab.fails(&unverified).await;
    lab.ours.set(third.bundle(1)).await;
    lab.fails(&format!("{unverified}unexpected ID \"spiffe://third.test/endpoint\"")).await;
    // The right name, signed by nobody that is known.
    let false_other = Domain::new(OTHER).await;
    lab.endpoint = Endpoint::start(&lab.supervisor.spawner(), false_other.svid(ENDPOINT, NOW + HOUR).await).await;
    lab.by_spiffe(ENDPOINT, &lab.endpoint.url());
    lab.fails(&format!(
        "{unverified}x509: certificate signed by unknown authority: not by any that is known here of \"other.test\""
    ))
    .await;
}

#[tokio::test]
async fn an_endpoint_of_the_web_is_verified_by_name_and_by_the_machines_roots() {
    let mut lab = Lab::new().await;
    let web = |lab: &Lab, host: &str| {
        let url = format!("https://{host}:{}/", lab.endpoint.address.port());
        lab.by(&url, EndpointProfile::HttpsWeb);
        format!("{FETCH}{url:?}: tls: failed to verify certificate: ")
    };
    lab.endpoint = Endpoint::start(&lab.supervisor.spawner(), lab.web("IP:127.0.0.1,DNS:bundles.test")).await;
    lab.endpoint.serves(&lab.document(&lab.other.bundle(11)).to_string());
    let unverified = web(&lab, "localhost");
    lab.fails(&format!("{unverified}x509: invalid peer certificate: certificate not valid for name \"localhost\""))
        .await;
    let unverified = web(&lab, "127.0.0.1");
    lab.poll().await.unwrap();
    lab.at(NOW + 20 * 365 * 24 * HOUR);
    lab.fails(&format!("{unverified}x509: certificate has expired or is not yet valid")).await;
    lab.at(NOW);
    lab.web("DNS:else.test"); // another root now
    lab.fails(&format!(
        "{unverified}x509: certificate signed by unknown authority: not by any web root of this machine"
    ))
    .await;
}

#[tokio::test]
async fn redirects_are_followed_within_https_and_to_the_same_identity_only() {
    let lab = Lab::new().await;
    let url = lab.endpoint.url();
    let start = |identity| {
        let spawner = lab.supervisor.spawner();
        async move { Endpoint::start(&spawner, identity).await }
    };
    let same = start(lab.other.svid(ENDPOINT, NOW + HOUR).await).await;
    same.serves(&lab.document(&Bundle { refresh_hint: 88, ..lab.other.bundle(11) }).to_string());
    lab.endpoint.says(redirect(&same.url()));
    lab.poll().await.unwrap();
    assert_eq!(lab.known().refresh_hint, 88);
    let else_ = start(lab.other.svid("spiffe://other.test/else", NOW + HOUR).await).await;
    else_.serves(&lab.document(&lab.other.bundle(12)).to_string());
    lab.endpoint.says(redirect(&else_.url()));
    let there = else_.url();
    lab.fails(&format!("{FETCH}{there:?}: tls: failed to verify certificate: unexpected ID")).await;
    same.serves("garbage");
    lab.endpoint.says(redirect(&same.url()));
    lab.fails(&format!("{DECODE}unable to parse JWKS: ")).await;
    for to in ["http://127.0.0.1:1/", "ftp://a.test/", "https://user:secret@a.test/", "https://"] {
        lab.endpoint.says(redirect(to));
        lab.fails(&format!("{FETCH}{url:?}: {to:?} is not an https URL")).await;
    }
    lab.endpoint.says(redirect("/"));
    lab.fails(&format!("{FETCH}{url:?}: stopped after 10 redirects")).await;
    // Those two send each other about.
    same.says(redirect(&url));
    lab.endpoint.says(redirect(&same.url()));
    lab.fails(&format!("{FETCH}{url:?}: stopped after 10 redirects")).await;
    let closed = SocketAddr::from(([127, 0, 0, 1], testkit::free_port()));
    lab.endpoint.says(redirect(&format!("https://{closed}/")));
    lab.fails(&format!("{FETCH}\"https://{closed}/\": dial tcp {closed}: connect: connection refused")).await;
}

#[tokio::test]
async fn answers_without_end_come_to_one() {
    let lab = Lab::new().await;
    let large = format!("{FETCH}URL: the answer is larger than 65536 bytes");
    let body = "x".repeat(BODY_MAX + 1);
    lab.endpoint.serves(&body);
    lab.fails(&large).await;
    for head in ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"] {
        lab.endpoint.says(Says::Endless(head.into()));
        lab.fails(&large).await;
    }
    lab.endpoint.says(Says::Endless("HTTP/1.1 500 No\r\n\r\n".into()));
    lab.fails(&large).await;
    // Headers have a limit of their own.
    lab.endpoint.says(Says::Endless("HTTP/1.1 200 OK\r\nMany: ".into()));
    lab.fails(&format!("{FETCH}URL: ")).await;
    // Where a redirect comes with a body, nobody reads it.
    lab.endpoint.says(Says::Endless("HTTP/1.1 302 Found\r\nLocation: /else\r\n\r\n".into()));
    let document = lab.document(&Bundle { refresh_hint: 99, ..lab.other.bundle(12) }).to_string();
    lab.endpoint.says_at("/else", Says::Answer(http("200 OK", "", &document)));
    lab.poll().await.unwrap();
    assert_eq!(lab.known().refresh_hint, 99);
}

#[tokio::test]
async fn whoever_is_silent_or_slow_is_left() {
    let lab = Lab::with(QUICK).await;
    let silent = format!("{FETCH}URL: no answer within ");
    for says in [
        Says::NothingToTcp,
        Says::Nothing,
        Says::Trickle("HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n{".into()),
        Says::Trickle("HTTP/1.1 200 OK\r\nSlow: ".into()),
    ] {
        lab.endpoint.says(says);
        lab.fails(&silent).await;
    }
}

#[tokio::test]
async fn whoever_hangs_up_or_speaks_no_tls_is_told_so() {
    let lab = Lab::new().await;
    let alert = vec![21, 3, 1, 0, 2, 2, 70];
    for (says, want) in [
        (Says::Closes, "tls handshake eof"),
        (
            Says::Plain(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
            "tls: first record does not look like a TLS handshake",
        ),
        // What a server says that has only TLS 1.1.
        (Says::Plain(alert), "remote error: tls: protocol version not supported"),
        (Says::Plain(vec![21, 3, 3, 0, 2, 2, 40]), "remote error: tls: HandshakeFailure"),
    ] {
        lab.endpoint.says(says);
        lab.fails(&format!("{FETCH}URL: {want}")).await;
    }
    let closed = SocketAddr::from(([127, 0, 0, 1], testkit::free_port()));
    lab.by_spiffe(ENDPOINT, &format!("https://{closed}"));
    lab.fails(&format!("{FETCH}\"https://{closed}\": dial tcp {closed}: connect: connection refused")).await;
    lab.by_spiffe(ENDPOINT, "https://no-such-host.invalid/");
    lab.fails(&format!("{FETCH}\"https://no-such-host.invalid/\": dial tcp: lookup no-such-host.invalid: ")).await;
}
