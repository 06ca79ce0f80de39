//! TLS through a proxy that is asked to CONNECT.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use finial_net::Proxies;
use finial_net::rest::{Client, Limits, Trust, client_config};
use http::HeaderMap;
use std::sync::Arc;
use std::time::Duration;
use testkit::fake::{Act, Pki, connect_proxy, tcp};

const LIMITS: Limits = Limits { time: Duration::from_secs(30), body: 1 << 20 };

fn proxies(url: String) -> Arc<Proxies> {
    Arc::new(Proxies::read(move |name| (name == "HTTPS_PROXY").then(|| url.clone())))
}

/// A server called `far.test`, which nobody but the proxy can find.
fn far(pki: &Pki) -> (u16, Arc<rustls::ClientConfig>) {
    pki.issue("server", "subjectAltName=DNS:far.test");
    let port =
        tcp(Some(pki.server("server", false)), |asked| Act::Say(200, format!("{} {}", asked.method, asked.path)));
    let ca = std::fs::read(pki.path("ca.crt")).unwrap();
    (port, Arc::new(client_config(&Trust::Named(ca), None, "server").unwrap()))
}

#[tokio::test]
async fn a_request_passes_and_the_proxy_sees_the_name_alone() {
    let pki = Pki::new();
    let (port, tls) = far(&pki);
    let proxy = connect_proxy(|_| None);
    let client = Client::to(&format!("https://far.test:{port}"), tls.clone()).unwrap();
    let client = client.through(proxies(format!("http://me:hu%73h@127.0.0.1:{}", proxy.port)));
    for _ in 0..2 {
        let answer = client.get("/secret", &HeaderMap::new(), LIMITS).await.unwrap();
        assert_eq!(&answer.body[..], b"GET /secret");
    }
    let heads = proxy.heads();
    assert_eq!(heads.len(), 1, "the connection is kept: {heads:?}");
    let want = format!("CONNECT far.test:{port} HTTP/1.1\r\nHost: far.test:{port}\r\n");
    assert!(
        heads[0].starts_with(&want) && heads[0].contains("\r\nProxy-Authorization: Basic bWU6aHVzaA==\r\n"),
        "{heads:?}"
    );
    // This machine needs no proxy, and what is not TLS goes its own way.
    let plain = tcp(None, |_| Act::Say(200, "near".into()));
    for url in [format!("https://127.0.0.1:{port}"), format!("http://127.0.0.1:{plain}")] {
        let client = Client::to(&url, tls.clone()).unwrap().through(proxies(format!("127.0.0.1:{}", proxy.port)));
        let _ = client.get("/", &HeaderMap::new(), LIMITS).await;
    }
    assert_eq!(proxy.heads().len(), 1);
}

#[tokio::test]
async fn who_keeps_a_request_from_leaving_is_named_and_no_password_is() {
    let pki = Pki::new();
    let (port, tls) = far(&pki);
    type Case = (fn(&str) -> Option<String>, &'static str);
    let cases: [Case; 4] = [
        (
            |_| Some("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n".into()),
            " refuses CONNECT far.test:{port}: 407 Proxy Authentication Required",
        ),
        (|_| Some("HTTP/1.0 403\r\nX: y\r\n\r\n".into()), " refuses CONNECT far.test:{port}: 403"),
        (|_| Some(String::new()), ": CONNECT far.test:{port}: unexpected end of file"),
        (|_| Some("x".repeat(20_000)), ": CONNECT far.test:{port}: the answer is too long"),
    ];
    for (instead, want) in cases {
        let proxy = connect_proxy(instead);
        let url = format!("http://me:hush@127.0.0.1:{}", proxy.port);
        let client = Client::to(&format!("https://far.test:{port}"), tls.clone()).unwrap().through(proxies(url));
        let error = client.get("/", &HeaderMap::new(), LIMITS).await.unwrap_err().to_string();
        let want = want.replace("{port}", &port.to_string());
        assert_eq!(error, format!("the proxy 127.0.0.1:{}{want}", proxy.port));
    }
    let closed = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    let client = Client::to(&format!("https://far.test:{port}"), tls).unwrap();
    let client = client.through(proxies(format!("http://me:hush@{closed}")));
    let error = client.get("/", &HeaderMap::new(), LIMITS).await.unwrap_err().to_string();
    assert_eq!(error, format!("proxyconnect tcp: dial tcp {closed}: connect: connection refused"));
}
