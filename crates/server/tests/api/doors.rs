//! The TCP door: who stands behind a load balancer, and which key exchanges are taken.

use crate::harness::*;
use finial_proto::server::agent::AttestAgentRequest;
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::bundle::GetBundleRequest;
use finial_proto::server::bundle::bundle_client::BundleClient;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme, SupportedProtocolVersion};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::io;
use std::net::SocketAddr;
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

/// A connection that a load balancer passes on for `source`.
async fn passed_on(address: SocketAddr, source: &str) -> Channel {
    let (host, port) = source.rsplit_once(':').unwrap();
    let header = format!("PROXY TCP4 {host} 127.0.0.1 {port} 8081\r\n").into_bytes();
    let connector = tower::service_fn(move |_: http::Uri| {
        let connecting = connect(address, header.clone(), default_provider().kx_groups, rustls::ALL_VERSIONS);
        async move { connecting.await.map(hyper_util::rt::TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap()
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
    assert_eq!(attest("10.98.76.1:1000").await, Code::InvalidArgument, "an empty request, after its turn");
    assert_eq!(attest("10.98.76.2:1000").await, Code::InvalidArgument, "another node");
    assert_ne!(attest("10.98.76.1:1001").await, Code::InvalidArgument, "the same again");

    let mut client = BundleClient::new(passed_on(address, "10.98.76.5:4321").await);
    client.get_bundle(GetBundleRequest::default()).await.unwrap();
    assert_eq!(logged("API accessed", "caller_addr", "10.98.76.5:4321").len(), 1);
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
