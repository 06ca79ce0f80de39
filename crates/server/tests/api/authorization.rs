//! Every row of the method table: who may, and who may not. An empty request is sent to each method by a caller of each
//! kind; whether the gate let it through shows in the code, as only the gate answers `PermissionDenied`.

use crate::harness::*;
use bytes::Bytes;
use finial_config::ServerSettings;
use finial_core::SpiffeId;
use finial_proto::convert::permission_denied_reason;
use finial_proto::types::permission_denied_details::Reason;
use finial_server::authz::{MethodRow, TABLE, Who};
use prost::Message;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// Sends and receives messages without looking into them.
#[derive(Clone, Default)]
pub(crate) struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}
impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put(buf, item);
        Ok(())
    }
}
impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let len = bytes::Buf::remaining(buf);
        Ok(Some(bytes::Buf::copy_to_bytes(buf, len)))
    }
}

/// What the server answers to an empty message.
async fn call(channel: &Channel, path: &'static str) -> Code {
    // Such a stream stays open once its caller was let in.
    let endless = path.contains("/Watch");
    let mut client = Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static(path);
    let request = Request::new(tokio_stream::iter([Bytes::from(().encode_to_vec())]));
    match client.streaming(request, path, Raw).await {
        Err(status) => status.code(),
        Ok(_) if endless => Code::Ok,
        Ok(answers) => {
            let mut answers = answers.into_inner();
            loop {
                match answers.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return Code::Ok,
                    Err(status) => return status.code(),
                }
            }
        }
    }
}

/// What is not there: the contract that we serve has no `List`, and our own stream is for agents, who come over TCP.
fn is_missing(row: &MethodRow, local: bool) -> bool {
    row.path.ends_with("Health/List") || (local && row.path.starts_with("/finial.server.sync."))
}

fn is_local_only(row: &MethodRow) -> bool {
    ["grpc.health", "Logger/", "Debug/"].iter().any(|part| row.path.contains(part))
}

async fn check(name: &str, channel: &Channel, local: bool, is: &[Who]) {
    for row in TABLE {
        let code = call(channel, row.path).await;
        let allowed = row.who.includes(Who::ANYONE) || is.iter().any(|class| row.who.includes(*class));
        if is_missing(row, local) || (!local && is_local_only(row)) {
            assert_eq!(code, Code::Unimplemented, "{} by {name}", row.path);
        } else if allowed {
            // RenewAgent of an agent that has to attest again would be denied, but this one joined by token.
            assert_ne!(code, Code::PermissionDenied, "{} by {name}", row.path);
        } else {
            assert_eq!(code, Code::PermissionDenied, "{} by {name}", row.path);
        }
    }
}

#[tokio::test]
async fn every_row_holds_for_every_kind_of_caller() {
    every_row_holds(|_| {}).await;
}

pub(crate) async fn every_row_holds(change: impl FnOnce(&mut ServerSettings)) {
    let configured = SpiffeId::parse("spiffe://example.org/configured").unwrap();
    let server = Server::with(|settings| {
        settings.admin_ids.push(configured);
        change(settings);
    })
    .await;
    let mut admin = entry("/admin", "/nobody", &["unix:uid:0"]);
    admin.admin = true;
    let mut downstream = entry("/downstream", "/nobody", &["unix:uid:0"]);
    downstream.downstream = true;
    server.create(vec![admin, downstream]).await;
    let by_entry = server.mint("/admin").await;
    let by_config = server.mint("/configured").await;
    let below = server.mint("/downstream").await;
    let workload = server.mint("/workload").await;
    let agent = server.agent().await;

    check("a local process", &server.local, true, &[Who::LOCAL]).await;
    check("nobody", &server.remote(None).await, false, &[]).await;
    check("a workload", &server.remote(Some(&workload)).await, false, &[]).await;
    check("an admin by entry", &server.remote(Some(&by_entry)).await, false, &[Who::ADMIN]).await;
    check("an admin by configuration", &server.remote(Some(&by_config)).await, false, &[Who::ADMIN]).await;
    check("a downstream server", &server.remote(Some(&below)).await, false, &[Who::DOWNSTREAM]).await;
    check("an agent", &agent.channel, false, &[Who::AGENT]).await;
}

#[tokio::test]
async fn rights_by_entry_follow_the_entries_at_once() {
    use finial_proto::server::entry::*;
    let server = Server::start().await;
    let identity = server.mint("/admin").await;
    let channel = server.remote(Some(&identity)).await;
    let path = "/spire.api.server.agent.v1.Agent/CountAgents";
    assert_eq!(call(&channel, path).await, Code::PermissionDenied);
    let mut admin = entry("/admin", "/nobody", &["unix:uid:0"]);
    admin.admin = true;
    let created = server.create(vec![admin]).await.remove(0);
    assert_eq!(call(&channel, path).await, Code::Ok);
    let update = finial_proto::types::Entry { id: created.id.clone(), ..Default::default() };
    let mask = finial_proto::types::EntryMask { admin: true, ..Default::default() };
    let request = BatchUpdateEntryRequest { entries: vec![update], input_mask: Some(mask), output_mask: None };
    server.entries().batch_update_entry(request).await.unwrap();
    assert_eq!(call(&channel, path).await, Code::PermissionDenied);
}

#[tokio::test]
async fn who_is_no_agent_is_told_so() {
    use finial_proto::server::entry::*;
    let server = Server::start().await;
    let workload = server.mint("/workload").await;
    let mut client = entry_client::EntryClient::new(server.remote(Some(&workload)).await);
    let status = client.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap_err();
    assert_eq!(permission_denied_reason(&status), Some(Reason::AgentNotAttested));
    let mut client = entry_client::EntryClient::new(server.remote(None).await);
    let status = client.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), permission_denied_reason(&status)), (Code::PermissionDenied, None));
}
