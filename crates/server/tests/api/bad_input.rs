//! What hostile or broken clients send. The server answers or hangs up, and goes on serving.

use crate::harness::*;
use bytes::Bytes;
use finial_core::KeyType;
use finial_crypto::PrivateKey;
use finial_proto::server::agent::attest_agent_request::{Params, Step};
use finial_proto::server::agent::{AgentX509svidParams, AttestAgentRequest, GetAgentRequest};
use finial_proto::server::entry::BatchCreateEntryRequest;
use finial_proto::server::svid::{BatchNewX509svidRequest, NewX509svidParams};
use finial_proto::types;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

async fn still_serves(server: &Server) {
    server.agent().await;
}

#[tokio::test]
async fn malformed_attestations_are_told_apart() {
    let server = Server::start().await;
    let data = |kind: &str, payload: &'static str| {
        Some(types::AttestationData { r#type: kind.into(), payload: Bytes::from_static(payload.as_bytes()) })
    };
    let csr = |csr: &'static str| Some(AgentX509svidParams { csr: Bytes::from_static(csr.as_bytes()) });
    let step = |data, params| Some(Step::Params(Params { data, params }));
    for (step, want) in [
        (None, "malformed param: missing params"),
        (Some(Step::ChallengeResponse(Bytes::new())), "malformed param: missing params"),
        (step(None, csr("x")), "malformed param: missing attestation data"),
        (step(data("t", "p"), None), "malformed param: missing X509-SVID parameters"),
        (step(data("t", "p"), csr("")), "malformed param: missing CSR"),
        (step(data("", "p"), csr("x")), "malformed param: missing attestation data type"),
        (step(data("t", ""), csr("x")), "malformed param: missing attestation data payload"),
        (step(data(&"t".repeat(256), "p"), csr("x")), "malformed param: attestation data type is too long"),
    ] {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let result = server.attest(key, vec![AttestAgentRequest { step }]).await.map(drop);
        assert_eq!(refused(result, Code::InvalidArgument), want);
    }
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let message = refused(server.attest(key.clone(), vec![]).await.map(drop), Code::InvalidArgument);
    assert_eq!(message, "failed to receive request from stream: EOF");
    let steps = vec![first_step("nobody", b"x", &any_csr().await)];
    let message = refused(server.attest(key.clone(), steps).await.map(drop), Code::FailedPrecondition);
    assert_eq!(message, "error getting node attestor: could not find node attestor type \"nobody\"");
    // Anybody can send this, so it must not look in the log like something that we say.
    let steps = vec![first_step("forged\u{1e}authorized_as\u{1f}admin-forged", b"x", &any_csr().await)];
    refused(server.attest(key.clone(), steps).await.map(drop), Code::FailedPrecondition);
    let of = |field: &str, value: &str| logged("Error getting node attestor", field, value).len();
    assert_eq!(of("authorized_as", "admin-forged"), 0);
    assert_eq!(of("node_attestor_type", "forgedauthorized_asadmin-forged"), 1);
    // The client closes its side instead of answering the challenge.
    let steps = vec![first_step("gullible", b"x", &any_csr().await)];
    let message = refused(server.attest(key.clone(), steps).await.map(drop), Code::Internal);
    assert_eq!(message, "nodeattestor(gullible): failed to receive challenge from agent: EOF");
    for name in ["../server", "", "a//b"] {
        if !name.is_empty() {
            assert!(server.attest_name(name, name).await.is_err(), "{name}");
        }
    }
    for token in [&b"\xff\xfe"[..], b"../x", b"a/b", &[b'x'; 4000]] {
        let steps = vec![first_step("join_token", token, &any_csr().await)];
        let message = refused(server.attest(key.clone(), steps).await.map(drop), Code::InvalidArgument);
        assert_eq!(message, "failed to attest: join token does not exist or has already been used");
    }
    let huge = vec![first_step("join_token", &vec![b'x'; (1 << 20) + 1], &any_csr().await)];
    let message = refused(server.attest(key, huge).await.map(drop), Code::InvalidArgument);
    assert_eq!(message, "malformed param: attestation data payload is too large");
    still_serves(&server).await;
}

#[tokio::test]
async fn malformed_ids_are_refused() {
    let server = Server::start().await;
    let wire =
        |trust_domain: &str, path: &str| Some(types::Spiffeid { trust_domain: trust_domain.into(), path: path.into() });
    let long = format!("/spire/agent/{}", "x".repeat(2048));
    for (id, want) in [
        (None, "invalid agent ID: request must specify SPIFFE ID"),
        (wire("", "/x"), "invalid agent ID: trust domain is missing"),
        (wire("EXAMPLE.org", "/x"), "invalid agent ID: trust domain characters are limited to"),
        (
            wire("example.org", ""),
            "invalid agent ID: \"spiffe://example.org\" is not an agent in trust domain \"example.org\"; path is empty",
        ),
        (wire("example.org", "x"), "invalid agent ID: path must have a leading slash"),
        (wire("example.org", "/x/"), "invalid agent ID: path cannot have a trailing slash"),
        (wire("example.org", "/spire/agent//x"), "invalid agent ID: path cannot contain empty segments"),
        (wire("example.org", "/spire/agent/../x"), "invalid agent ID: path cannot contain dot segments"),
        (wire("example.org", "/spire/agent/\u{e9}"), "invalid agent ID: path segment characters are limited to"),
        (wire("example.org", &long), "invalid agent ID: SPIFFE ID is too long"),
        (
            wire("example.org", "/w"),
            "invalid agent ID: \"spiffe://example.org/w\" is not an agent in trust domain \"example.org\"; path is not in the agent namespace",
        ),
        (
            wire("other.test", "/spire/agent/x"),
            "invalid agent ID: \"spiffe://other.test/spire/agent/x\" is not a member of trust domain \"example.org\"",
        ),
    ] {
        let answer = server.agents().get_agent(GetAgentRequest { id, output_mask: None }).await;
        let message = refused(answer, Code::InvalidArgument);
        assert!(message.starts_with(want), "{message}");
    }
}

#[tokio::test]
async fn oversize_messages_are_exhausted() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let csr = Bytes::from(vec![0; 5 << 20]);
    let params = vec![NewX509svidParams { entry_id: "x".into(), csr: csr.clone() }];
    refused(agent.svids().batch_new_x509svid(BatchNewX509svidRequest { params }).await, Code::ResourceExhausted);
    let entries = vec![types::Entry { hint: "x".repeat(5 << 20), ..entry("/w", "/p", &["a:b"]) }];
    let request = BatchCreateEntryRequest { entries, output_mask: None };
    refused(server.entries().batch_create_entry(request).await, Code::ResourceExhausted);
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let steps = vec![first_step("join_token", b"x", &csr)];
    refused(server.attest(key, steps).await.map(drop), Code::ResourceExhausted);
    still_serves(&server).await;
}

#[tokio::test]
async fn garbage_on_the_port_is_hung_up_on() {
    let server = Server::start().await;
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0x16, 3, 1, 0xff, 0xff, 1], &[0; 600]]
    {
        let mut tcp = tokio::net::TcpStream::connect(server.running.address).await.unwrap();
        tcp.write_all(garbage).await.unwrap();
        tcp.shutdown().await.unwrap();
        let mut rest = Vec::new();
        // An alert or a reset, but an end.
        let _ = tokio::time::timeout(DEADLINE, tcp.read_to_end(&mut rest)).await.expect("the server hangs up");
    }
    // Connections that never speak do not keep others out.
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(tokio::net::TcpStream::connect(server.running.address).await.unwrap());
    }
    still_serves(&server).await;
    // And nonsense on the local socket.
    let mut unix = tokio::net::UnixStream::connect(&server.running.socket_path).await.unwrap();
    unix.write_all(&[0xff; 300]).await.unwrap();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, unix.read_to_end(&mut rest)).await.expect("the server hangs up");
    still_serves(&server).await;
}

#[tokio::test]
async fn foreign_and_expired_certificates_do_not_get_in() {
    use finial_proto::server::bundle::GetBundleRequest;
    use finial_proto::server::bundle::bundle_client::BundleClient;
    let server = Server::start().await;
    let other = Server::start().await;
    // The same trust domain name from another authority.
    let foreign = other.mint("/w").await;
    let mut client = BundleClient::new(server.remote(Some(&foreign)).await);
    assert!(client.get_bundle(GetBundleRequest::default()).await.is_err());
    let own = server.mint("/w").await;
    let mut client = BundleClient::new(server.remote(Some(&own)).await);
    client.get_bundle(GetBundleRequest::default()).await.unwrap();
}
