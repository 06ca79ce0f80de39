//! A server's own certificate as the root that it is verified by, which says that it is a CA's: as `openssl req -x509` makes it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use finial_core::SystemClock;
use finial_crypto::tls::KeyExchange;
use finial_crypto::web::{is_root_itself, web_client_config};
use finial_net::rest::{Client, Limits, Trust, client_config};
use http::HeaderMap;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use testkit::fake::{Act, Pki, tcp};

const LIMITS: Limits = Limits { time: Duration::from_secs(30), body: 1 << 20 };

fn self_signed(pki: &Pki, name: &str, more: &[&str]) -> CertificateDer<'static> {
    let args = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    let (key, crt, subject) = (format!("{name}.key"), format!("{name}.crt"), format!("/CN={name}"));
    let mut openssl = Command::new("openssl");
    openssl.args(args).args([
        "-keyout",
        &key,
        "-out",
        &crt,
        "-subj",
        &subject,
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]);
    let made = openssl.args(more).current_dir(pki.0.path()).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    CertificateDer::from_pem_file(pki.path(&crt)).unwrap()
}

/// In each of the ways that a server of the web is verified in.
fn configurations(pki: &Pki, root: &str) -> Vec<(&'static str, ClientConfig)> {
    let pem = std::fs::read(pki.path(root)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
    vec![
        ("by name", client_config(&Trust::Named(pem.clone()), None, "server").unwrap()),
        ("issued", client_config(&Trust::Issued(pem), None, "server").unwrap()),
        ("web", web_client_config(KeyExchange::default(), roots, Arc::new(SystemClock)).unwrap()),
    ]
}

async fn ask(tls: ClientConfig, host: &str, port: u16) -> Result<u16, String> {
    let client = Client::to(&format!("https://{host}:{port}"), Arc::new(tls)).unwrap();
    client.get("/", &HeaderMap::new(), LIMITS).await.map(|answer| answer.status.as_u16()).map_err(|e| e.to_string())
}

#[tokio::test]
async fn it_is_taken_for_its_name_and_no_other_is() {
    let pki = Pki::new();
    for name in ["own", "other"] {
        self_signed(&pki, name, &[]);
    }
    let port = tcp(Some(pki.server("own", false)), |_| Act::Say(200, String::new()));
    for (how, tls) in configurations(&pki, "own.crt") {
        assert_eq!(ask(tls, "127.0.0.1", port).await, Ok(200), "{how}");
    }
    for (how, tls) in configurations(&pki, "other.crt") {
        assert!(ask(tls, "127.0.0.1", port).await.is_err(), "{how}");
    }
    for (how, tls) in configurations(&pki, "own.crt").into_iter().filter(|(how, _)| *how != "issued") {
        let error = ask(tls, "localhost", port).await.unwrap_err();
        assert!(error.contains("not valid for name \"localhost\""), "{how}: {error}");
    }
}

#[test]
fn its_time_and_purpose_hold() {
    let pki = Pki::new();
    let (any, server) =
        (self_signed(&pki, "any", &[]), self_signed(&pki, "s", &["-addext", "extendedKeyUsage=serverAuth"]));
    let client = self_signed(&pki, "c", &["-addext", "extendedKeyUsage=clientAuth"]);
    let mut roots = RootCertStore::empty();
    for root in [&any, &server, &client] {
        roots.add(root.clone()).unwrap();
    }
    let now = UnixTime::now();
    let later = |days: u64| UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs() + days * 86_400));
    assert!(is_root_itself(&any, &roots, now) && is_root_itself(&server, &roots, later(1)));
    assert!(!is_root_itself(&client, &roots, now), "for clients alone");
    assert!(!is_root_itself(&any, &roots, later(3)), "expired");
    let earlier = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs() - 3600));
    assert!(!is_root_itself(&any, &roots, earlier), "not yet");
    let stranger = self_signed(&pki, "any", &[]);
    assert!(!is_root_itself(&stranger, &roots, now), "of the same name with another key");
    let constrained = self_signed(&pki, "n", &["-addext", "nameConstraints=critical,permitted;DNS:example.org"]);
    roots.add(constrained.clone()).unwrap();
    assert!(!is_root_itself(&constrained, &roots, now), "what it may be is for a chain to say");
}
