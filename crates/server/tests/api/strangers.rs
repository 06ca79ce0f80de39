//! What callers without a certificate may send.

use crate::authorization::Raw;
use crate::harness::*;
use bytes::Bytes;
use finial_core::KeyType;
use finial_crypto::PrivateKey;
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::attest_agent_response::Step as Told;
use futures::StreamExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

const GET_BUNDLE: &str = "/spire.api.server.bundle.v1.Bundle/GetBundle";

/// Sends messages, for ever if the stream is, and gives the first answer.
async fn send(
    channel: &Channel,
    path: &'static str,
    messages: impl futures::Stream<Item = Bytes> + Send + 'static,
) -> Result<Option<Bytes>, Status> {
    let mut client = Grpc::new(channel.clone()).max_encoding_message_size(64 << 20);
    client.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static(path);
    let answer = async { client.streaming(Request::new(messages), path, Raw).await?.into_inner().message().await };
    tokio::time::timeout(DEADLINE, answer).await.expect("an answer")
}

/// A message of a field that no contract has, which is skipped.
fn filler(bytes: usize) -> Bytes {
    let mut message = vec![0x92, 0x3f];
    prost::encoding::encode_varint(bytes as u64, &mut message);
    message.resize(message.len() + bytes, 0);
    message.into()
}

#[tokio::test]
async fn what_is_not_for_strangers_is_refused_unread() {
    let server = Server::start().await;
    let channel = server.remote(None).await;
    let path = "/spire.api.server.entry.v1.Entry/ListEntries";
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    // Never comes to its end: who waits for that never answers.
    let endless = futures::stream::repeat(filler(64 << 10)).inspect(move |message| {
        count.fetch_add(message.len(), Ordering::Relaxed);
    });
    let silent = futures::stream::iter([filler(10)]).chain(futures::stream::pending());
    let status = send(&channel, path, silent).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(status.message(), format!("authorization denied for method {path}"));
    let status = send(&channel, path, endless).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "after {} bytes", sent.load(Ordering::Relaxed));
    let lines = logged("Failed to authenticate caller", "method", "ListEntries");
    let of_nobody = |line: &serde_json::Value| line.get("caller_id").is_none() && line["caller_addr"].is_string();
    assert!(lines.iter().any(of_nobody), "{lines:?}");
    // The same connection is still good.
    send(&channel, GET_BUNDLE, futures::stream::iter([Bytes::new()])).await.unwrap().expect("a bundle");
}

#[tokio::test]
async fn messages_of_strangers_are_small() {
    let server = Server::start().await;
    let channel = server.remote(None).await;
    let once = |bytes| futures::stream::iter([filler(bytes)]);
    send(&channel, GET_BUNDLE, once(60 << 10)).await.unwrap().expect("a bundle");
    let refusal = refused(send(&channel, GET_BUNDLE, once(100 << 10)).await, Code::ResourceExhausted);
    assert!(refusal.starts_with("Error, decoded message length too large: found "), "{refusal}");
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let steps = vec![first_step("join_token", &vec![b'x'; 2 << 20], &any_csr().await)];
    refused(server.attest(key, steps).await.map(drop), Code::ResourceExhausted);
    // Members are not limited so.
    let agent = server.agent().await;
    send(&agent.channel, GET_BUNDLE, once(1 << 20)).await.unwrap().expect("a bundle");
    server.attest_name("after", "after").await.unwrap();
}

/// Calls that are kept open with large evidence: one address gets 32 MiB, whatever the connection, and gets them back.
#[tokio::test]
async fn strangers_hold_a_bounded_number_of_bytes() {
    let server = Server::start().await;
    let (first, second) = (server.remote(None).await, server.remote(None).await);
    let step = first_step("gullible", &vec![b'x'; 1 << 20], &any_csr().await);
    let attest = |channel: &Channel| {
        let mut client = AgentClient::new(channel.clone());
        let (more, steps) = tokio::sync::mpsc::channel(1);
        more.try_send(step.clone()).unwrap();
        let steps = tokio_stream::wrappers::ReceiverStream::new(steps);
        async move {
            let mut answers = client.attest_agent(steps).await?.into_inner();
            let told = answers.message().await?.and_then(|answer| answer.step);
            assert!(matches!(told, Some(Told::Challenge(_))), "{told:?}");
            // The call ends when no more steps can come.
            Ok::<_, Status>((more, answers))
        }
    };
    let mut open = Vec::new();
    for _ in 0..31 {
        open.push(attest(&first).await.unwrap());
    }
    for channel in [&first, &second] {
        let refusal = refused(attest(channel).await.map(drop), Code::ResourceExhausted);
        assert_eq!(refusal, "too many bytes in open calls without a client certificate");
    }
    // Small calls still find room, and members are not concerned.
    server.attest_name("small", "small").await.unwrap();
    server.agent().await;
    drop(open);
    let again = async { while attest(&second).await.is_err() {} };
    tokio::time::timeout(DEADLINE, again).await.expect("room again");
}
