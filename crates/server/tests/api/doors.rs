//! The TCP door: who stands behind a load balancer, and which key exchanges are taken.

use crate::harness::*;
use bytes::Bytes;
use finial_proto::server::agent::AttestAgentRequest;
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::bundle::GetBundleRequest;
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::svid::{BatchNewX509svidRequest, NewX509svidParams};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme, SupportedProtocolVersion};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

/// Takes any server: these tests are about what the server takes.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

type Versions = &'static [&'static SupportedProtocolVersion];

/// Greets with `header` and shakes hands with these groups and versions.
async fn connect(
    address: SocketAddr,
    header: Vec<u8>,
    kx_groups: Vec<&'static dyn SupportedKxGroup>,
    versions: Versions,
) -> io::Result<TlsStream<TcpStream>> {
    let provider = CryptoProvider { kx_groups, ..default_provider() };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut tcp = TcpStream::connect(address).await?;
    tcp.write_all(&header).await?;
    let name = ServerName::try_from("localhost").unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

/// A connection that a load balancer passes on for `source`, in version 1 of the protocol.
async fn passed_on(address: SocketAddr, source: &str) -> Channel {
    let (host, port) = source.rsplit_once(':').unwrap();
    opened_with(address, format!("PROXY TCP4 {host} 127.0.0.1 {port} 8081\r\n").into_bytes()).await.unwrap()
}

/// A version 2 header: command and family, then the rest.
fn version_2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
    [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[command, family], &length, rest].concat()
}

/// The addresses of a version 2 header.
fn addresses(source: SocketAddr) -> Vec<u8> {
    let ports = [source.port().to_be_bytes(), 8081_u16.to_be_bytes()].concat();
    match source.ip() {
        IpAddr::V4(ip) => [&ip.octets()[..], &[127, 0, 0, 1], &ports].concat(),
        IpAddr::V6(ip) => [&ip.octets()[..], &[0; 16], &ports].concat(),
    }
}

/// A channel whose connection begins with these bytes.
async fn opened_with(address: SocketAddr, header: Vec<u8>) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |_: http::Uri| {
        let connecting = connect(address, header.clone(), default_provider().kx_groups, rustls::ALL_VERSIONS);
        async move { connecting.await.map(hyper_util::rt::TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await
}

/// Two nodes behind one load balancer do not take each other's turns, and the log names them.
#[tokio::test]
async fn callers_behind_a_trusted_proxy_are_themselves() {
    let server = Server::with(|settings| {
        settings.proxy_protocol_trusted_cidrs = vec!["127.0.0.0/8".into()];
        settings.rate_limit.attestation = true;
        settings.audit_log_enabled = true;
    })
    .await;
    let address = server.running.address;
    let attest = |source: &'static str| async move {
        let mut client = AgentClient::new(passed_on(address, source).await);
        let mut request = tonic::Request::new(tokio_stream::iter([AttestAgentRequest::default()]));
        // Less than the second after which the next turn comes.
        request.set_timeout(std::time::Duration::from_millis(100));
        match client.attest_agent(request).await {
            Err(status) => status.code(),
            Ok(steps) => steps.into_inner().message().await.unwrap_err().code(),
        }
    };
    while_time_stands(async {
        assert_eq!(attest("10.98.76.1:1000").await, Code::InvalidArgument, "an empty request, after its turn");
        assert_eq!(attest("10.98.76.2:1000").await, Code::InvalidArgument, "another node");
        assert_eq!(attest("10.98.76.1:1001").await, Code::ResourceExhausted, "the same again");
    })
    .await;

    let mut client = BundleClient::new(passed_on(address, "10.98.76.5:4321").await);
    client.get_bundle(GetBundleRequest::default()).await.unwrap();
    assert_eq!(logged("API accessed", "caller_addr", "10.98.76.5:4321").len(), 1);
}

/// The limits are of the ID that a certificate proves: neither does an agent take the turns of others behind its address,
/// nor does a further connection give it more.
#[tokio::test]
async fn agents_behind_one_address_each_have_their_own_turns() {
    let server = Server::with(|settings| settings.rate_limit.signing = true).await;
    let (one, two) = (server.agent().await, server.agent().await);
    let again = Agent::new(&server, one.identity.clone()).await;
    // All that an agent may have in a second, of entries that it has not.
    let ask = async |agent: &Agent| {
        let params = vec![NewX509svidParams { entry_id: "none".into(), csr: Bytes::new() }; 500];
        let mut request = tonic::Request::new(BatchNewX509svidRequest { params });
        request.set_timeout(std::time::Duration::from_millis(500));
        agent.svids().batch_new_x509svid(request).await.map(|answer| answer.into_inner().results.len())
    };
    while_time_stands(async {
        assert_eq!(ask(&one).await.unwrap(), 500);
        for connection in [&one, &again] {
            let why = refused(ask(connection).await, Code::ResourceExhausted);
            assert!(why.starts_with("rejecting request due to certificate signing rate limiting: rate: Wait"), "{why}");
        }
        assert_eq!(ask(&two).await.unwrap(), 500, "from the same address");
        refused(ask(&two).await, Code::ResourceExhausted);
    })
    .await;
}

async fn get_bundle(channel: Channel) {
    BundleClient::new(channel).get_bundle(GetBundleRequest::default()).await.unwrap();
}

/// Version 2 over a socket, with and without extensions; what follows the header is TLS, to the byte.
#[tokio::test]
async fn version_2_of_the_proxy_protocol_names_the_caller() {
    let server = Server::with(|settings| {
        settings.proxy_protocol_trusted_cidrs = vec!["127.0.0.1/32".into()];
        settings.audit_log_enabled = true;
    })
    .await;
    let address = server.running.address;
    let four: SocketAddr = "10.98.77.1:4001".parse().unwrap();
    let six: SocketAddr = "[2001:db8:77::1]:4002".parse().unwrap();
    let extended: SocketAddr = "10.98.77.3:4003".parse().unwrap();
    let long = [addresses(extended), vec![0x04, 0x0f, 0xf1], vec![0; 4081]].concat();
    for (source, header) in [
        (four, version_2(0x21, 0x11, &addresses(four))),
        (six, version_2(0x21, 0x21, &addresses(six))),
        (extended, version_2(0x21, 0x11, &long)),
    ] {
        get_bundle(opened_with(address, header).await.unwrap()).await;
        assert_eq!(logged("API accessed", "caller_addr", &source.to_string()).len(), 1, "{source}");
    }

    // The proxy's own connection is the proxy's.
    let own: SocketAddr = "10.98.77.9:4009".parse().unwrap();
    get_bundle(opened_with(address, version_2(0x20, 0x11, &addresses(own))).await.unwrap()).await;
    assert_eq!(logged("API accessed", "caller_addr", &own.to_string()), Vec::<serde_json::Value>::new());

    // What breaks the protocol ends the connection.
    let too_long = [addresses(four), vec![0; 4085]].concat();
    for broken in [
        version_2(0x22, 0x11, &addresses(four)),
        version_2(0x21, 0x11, &addresses(four)[..8]),
        version_2(0x21, 0x11, &too_long),
        [b"\r\n\r\n\0\r\nQUIT\r".to_vec(), addresses(four)].concat(),
    ] {
        assert!(opened_with(address, broken.clone()).await.is_err(), "{broken:?}");
    }
    assert_eq!(logged("API accessed", "caller_addr", &four.to_string()).len(), 1, "only the good one");
}

/// Headers are believed from the networks that are named, and are garbage from any other.
#[tokio::test]
async fn a_header_from_a_stranger_ends_the_connection() {
    let with = |networks: &'static [&'static str]| {
        Server::with(|settings| {
            settings.proxy_protocol_trusted_cidrs = networks.iter().map(|n| (*n).to_owned()).collect();
            settings.audit_log_enabled = true;
        })
    };
    let claimed: SocketAddr = "10.98.78.1:4010".parse().unwrap();
    for networks in [&[][..], &["10.0.0.0/8", "127.0.0.2/32", "::1/128"]] {
        let server = with(networks).await;
        let address = server.running.address;
        for header in [
            version_2(0x21, 0x11, &addresses(claimed)),
            format!("PROXY TCP4 {} 127.0.0.1 {} 8081\r\n", claimed.ip(), claimed.port()).into_bytes(),
        ] {
            assert!(opened_with(address, header).await.is_err(), "{networks:?}");
        }
        get_bundle(opened_with(address, Vec::new()).await.unwrap()).await;
    }
    assert_eq!(logged("API accessed", "caller_addr", &claimed.to_string()), Vec::<serde_json::Value>::new());
}

/// A load balancer's health checks, and agents that come past it: who sends no header is who connects.
#[tokio::test]
async fn a_trusted_proxy_may_leave_the_header_out() {
    let server = Server::with(|settings| {
        settings.proxy_protocol_trusted_cidrs = vec!["127.0.0.0/8".into()];
        settings.audit_log_enabled = true;
    })
    .await;
    get_bundle(opened_with(server.running.address, Vec::new()).await.unwrap()).await;
    let agent = server.agent().await;
    assert!(agent.identity.id.as_str().contains("/spire/agent/"), "agents attest as usual");
}

#[tokio::test]
async fn post_quantum_key_exchange_can_be_required() {
    const TLS13: Versions = &[&rustls::version::TLS13];
    const TLS12: Versions = &[&rustls::version::TLS12];
    let usual = Server::start().await;
    let strict = Server::with(|settings| settings.require_pq_kem = true).await;
    let try_with = |server: &Server, group: &'static dyn SupportedKxGroup, versions: Versions| {
        let address = server.running.address;
        async move { connect(address, Vec::new(), vec![group], versions).await.is_ok() }
    };
    assert!(try_with(&usual, kx_group::X25519, TLS13).await);
    assert!(try_with(&usual, kx_group::SECP256R1, TLS12).await);
    assert!(!try_with(&strict, kx_group::X25519, TLS13).await);
    assert!(!try_with(&strict, kx_group::SECP256R1, TLS12).await);
    for group in [kx_group::X25519MLKEM768, kx_group::SECP256R1MLKEM768] {
        assert!(try_with(&strict, group, TLS13).await);
    }
    let agent = strict.agent().await;
    assert!(agent.identity.id.as_str().contains("/spire/agent/"), "agents attest as usual");
}

#[tokio::test]
async fn networks_of_proxies_must_be_networks() {
    let refused = Server::try_with(|settings| settings.proxy_protocol_trusted_cidrs = vec!["10.0.0.1".into()]).await;
    let message = refused.map(drop).unwrap_err().to_string();
    assert_eq!(message, "invalid proxy_protocol_trusted_cidrs: invalid CIDR address: 10.0.0.1");
}
