//! TLS against peers that behave badly.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

mod common;

use common::{Recorder, service, soon};
use finial_net::proxy::TrustedProxies;
use finial_net::tls::{self, TlsIncoming};
use finial_net::{Limits, client};
use finial_proto::health::HealthCheckRequest;
use finial_proto::health::health_client::HealthClient;
use finial_runtime::Supervisor;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Server;

/// Self-signed for `localhost`, valid for a hundred years.
fn identity() -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let certificate = CertificateDer::from(include_bytes!("../testdata/localhost.crt.der").to_vec());
    let key = PrivateKeyDer::try_from(include_bytes!("../testdata/localhost.key.der").to_vec()).unwrap();
    (vec![certificate], key)
}

fn roots() -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(identity().0.remove(0)).unwrap();
    Arc::new(roots)
}

fn server_config() -> Arc<ServerConfig> {
    let clients = rustls::server::WebPkiClientVerifier::builder(roots()).allow_unauthenticated().build().unwrap();
    let (chain, key) = identity();
    let mut config = ServerConfig::builder().with_client_cert_verifier(clients).with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

fn client_config(with_certificate: bool) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder().with_root_certificates(roots());
    let (chain, key) = identity();
    let mut config = if with_certificate {
        builder.with_client_auth_cert(chain, key).unwrap()
    } else {
        builder.with_no_client_auth()
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

struct TestServer {
    address: SocketAddr,
    recorder: Recorder,
    _supervisor: Supervisor,
}

fn serve(limits: Limits) -> TestServer {
    serve_behind(TrustedProxies::default(), limits)
}

fn serve_behind(proxies: TrustedProxies, limits: Limits) -> TestServer {
    let supervisor = Supervisor::default();
    let listener = tls::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let incoming = TlsIncoming::behind(proxies, listener, server_config(), limits, supervisor.spawner()).unwrap();
    let address = incoming.local_addr();
    let recorder = Recorder::default();
    let serving = Server::builder().serve_with_incoming(service(&recorder), incoming);
    supervisor.spawner().spawn("server", serving);
    TestServer { address, recorder, _supervisor: supervisor }
}

impl TestServer {
    async fn is_well(&self) {
        let channel = client::tls_channel(&format!("localhost:{}", self.address.port()), client_config(false));
        soon(HealthClient::new(channel).check(HealthCheckRequest::default())).await.unwrap();
    }
}

/// Reads until the other end hangs up; what it said before (an alert) does not matter.
async fn hung_up(mut stream: TcpStream) {
    let end = soon(stream.read_to_end(&mut Vec::new())).await;
    assert!(end.is_ok() || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
}

/// Whoever opens a thousand connections must not lock everybody out.
#[tokio::test]
async fn a_listener_raises_the_limit_of_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(512), ..limit }).unwrap();
    let _server = serve(Limits::default());
    assert_eq!(getrlimit(Resource::Nofile).current, limit.maximum);
}

#[tokio::test]
async fn requests_carry_address_and_certificates() {
    let server = serve(Limits::default());
    for with_certificate in [false, true] {
        let channel = client::tls_channel(&server.address.to_string(), client_config(with_certificate));
        soon(HealthClient::new(channel).check(HealthCheckRequest::default())).await.unwrap();
    }
    let seen = server.recorder.0.lock().unwrap();
    assert!(seen.tls[0].certificates.is_empty());
    assert_eq!(seen.tls[1].certificates[..], identity().0[..]);
    assert_eq!(seen.tls[1].address.ip(), server.address.ip());
}

#[tokio::test]
async fn garbage_and_silence_cost_only_themselves() {
    let server = serve(Limits { silence: Duration::from_millis(300), ..Limits::default() });
    let mut bad = Vec::new();
    for (i, text) in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 300], &[0x16, 3, 1, 0xff, 0xff], b"", b"\x16"].iter().enumerate()
    {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(text).await.unwrap();
        if i != 1 {
            bad.push(stream); // the other one leaves at once
        }
    }
    server.is_well().await;
    for stream in bad {
        hung_up(stream).await;
    }
    server.is_well().await;
}

#[tokio::test]
async fn a_client_that_shakes_hands_and_then_says_nothing_is_cut_off() {
    let server = serve(Limits { silence: Duration::from_millis(300), ..Limits::default() });
    let tcp = TcpStream::connect(server.address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(client_config(false));
    let mut tls = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
    let end = soon(tls.read_to_end(&mut Vec::new())).await;
    assert!(
        end.is_ok() || end.is_err_and(|e| matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof))
    );
    server.is_well().await;
}

#[tokio::test]
async fn a_flood_of_half_open_handshakes_displaces_itself() {
    let server = serve(Limits { handshakes: 4, silence: Duration::from_secs(3600), ..Limits::default() });
    let mut flood = Vec::new();
    for _ in 0..20 {
        flood.push(TcpStream::connect(server.address).await.unwrap());
    }
    server.is_well().await;
    hung_up(flood.remove(0)).await;
}

#[tokio::test]
async fn more_connections_than_allowed_are_closed_and_room_is_used_again() {
    let server = serve(Limits { connections_per_peer: 1, silence: Duration::from_secs(3600), ..Limits::default() });
    let first = TcpStream::connect(server.address).await.unwrap();
    hung_up(TcpStream::connect(server.address).await.unwrap()).await;
    drop(first);
    // The server notices the closing a little later than we do; until then it refuses.
    let channel = client::tls_channel(&server.address.to_string(), client_config(false));
    let mut health = HealthClient::new(channel);
    let served = async { while health.check(HealthCheckRequest::default()).await.is_err() {} };
    soon(served).await;
}

#[tokio::test]
async fn a_client_tries_the_addresses_of_a_name_and_names_the_failure() {
    let server = serve(Limits::default());
    // `localhost` may also have ::1, where nobody listens.
    server.is_well().await;
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let channel = client::tls_channel(&unused.to_string(), client_config(false));
    let status = soon(HealthClient::new(channel).check(HealthCheckRequest::default())).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}");
}

/// Greets with `header`, then speaks TLS on the same connection and asks for the server's health.
async fn asks_after(address: SocketAddr, header: Vec<u8>) -> Result<(), tonic::Code> {
    let connect = move |_: tonic::codegen::http::Uri| {
        let header = header.clone();
        async move {
            let mut tcp = TcpStream::connect(address).await?;
            tcp.write_all(&header).await?;
            let name = rustls_pki_types::ServerName::try_from("localhost").unwrap();
            let tls = tokio_rustls::TlsConnector::from(client_config(false)).connect(name, tcp).await?;
            std::io::Result::Ok(hyper_util::rt::TokioIo::new(tls))
        }
    };
    let endpoint = tonic::transport::Endpoint::from_static("http://localhost");
    let Ok(channel) = soon(endpoint.connect_with_connector(tower::service_fn(connect))).await else {
        return Err(tonic::Code::Unavailable);
    };
    soon(HealthClient::new(channel).check(HealthCheckRequest::default())).await.map(drop).map_err(|s| s.code())
}

#[tokio::test]
async fn who_stands_behind_a_trusted_proxy_is_known_by_its_own_address() {
    let limits = Limits { connections_per_peer: 2, ..Limits::default() };
    let server = serve_behind(TrustedProxies::parse(&["127.0.0.0/8"]).unwrap(), limits);
    let mut v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    v2.extend([10, 0, 0, 2, 127, 0, 0, 1, 0, 7, 31, 145]);
    asks_after(server.address, v2).await.unwrap();
    for port in 1..4 {
        let header = format!("PROXY TCP4 10.0.0.{port} 127.0.0.1 {port} 8081\r\n");
        asks_after(server.address, header.into_bytes()).await.unwrap();
    }
    asks_after(server.address, b"PROXY UNKNOWN\r\n".to_vec()).await.unwrap();
    asks_after(server.address, Vec::new()).await.expect("a proxy's own health check says nothing");
    let seen: Vec<String> = server.recorder.0.lock().unwrap().tls.iter().map(|p| p.address.to_string()).collect();
    assert_eq!(seen[..4], ["10.0.0.2:7", "10.0.0.1:1", "10.0.0.2:2", "10.0.0.3:3"]);
    assert!(seen[4..].iter().all(|address| address.starts_with("127.0.0.1:")), "{seen:?}");

    for bad in
        [&b"PROXY TCP4 10.0.0.1 127.0.0.1 1\r\n"[..], b"PROXY nonsense that never ends", b"\r\n\r\n\0\r\nQUIT\nxxxxx"]
    {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(&[bad, &[b'x'; 107]].concat()).await.unwrap();
        hung_up(stream).await;
    }
    server.is_well().await;
}

/// Else anybody could take any address, and with it another's place under the limits.
#[tokio::test]
async fn nobody_else_is_believed() {
    let server = serve_behind(TrustedProxies::parse(&["10.0.0.0/8"]).unwrap(), Limits::default());
    let header = b"PROXY TCP4 10.0.0.1 127.0.0.1 1 8081\r\n".to_vec();
    assert!(asks_after(server.address, header).await.is_err());
    assert!(server.recorder.0.lock().unwrap().tls.is_empty());
    server.is_well().await;
}
