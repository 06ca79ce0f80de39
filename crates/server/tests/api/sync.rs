//! Which entries an agent sees, and how it learns of them.

use crate::harness::*;
use finial_proto::convert::permission_denied_reason;
use finial_proto::server::agent::BanAgentRequest;
use finial_proto::server::entry::*;
use finial_proto::types;
use finial_proto::types::permission_denied_details::Reason;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

on_every_database!(an_agent_sees_what_hangs_below_it_and_its_aliases, many_entries_come_as_revisions_and_then_as_asked,);

/// A sync stream that is spoken to step by step.
struct Sync {
    send: mpsc::Sender<SyncAuthorizedEntriesRequest>,
    answers: Streaming<SyncAuthorizedEntriesResponse>,
}

impl Sync {
    async fn open(agent: &Agent, first: SyncAuthorizedEntriesRequest) -> Self {
        let (send, requests) = mpsc::channel(8);
        send.send(first).await.unwrap();
        let answers =
            agent.entries().sync_authorized_entries(ReceiverStream::new(requests)).await.unwrap().into_inner();
        Self { send, answers }
    }

    async fn next(&mut self) -> Result<Option<SyncAuthorizedEntriesResponse>, tonic::Status> {
        tokio::time::timeout(DEADLINE, self.answers.message()).await.expect("an answer in time")
    }

    async fn ask(&mut self, ids: Vec<String>) -> Vec<SyncAuthorizedEntriesResponse> {
        self.send.send(SyncAuthorizedEntriesRequest { ids, output_mask: None }).await.unwrap();
        let mut pages = Vec::new();
        loop {
            let page = self.next().await.unwrap().expect("a page");
            let more = page.more;
            pages.push(page);
            if !more {
                return pages;
            }
        }
    }
}

async fn visible(agent: &Agent) -> Vec<String> {
    let answer = agent.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
    let mut paths: Vec<_> = answer.into_inner().entries.into_iter().map(|e| e.spiffe_id.unwrap().path).collect();
    paths.sort();
    paths
}

async fn an_agent_sees_what_hangs_below_it_and_its_aliases(lab: Lab) {
    let server = lab.start().await;
    let (one, _) = server.attest_name("one", "one").await.unwrap();
    let (two, _) = server.attest_name("two", "two").await.unwrap();
    let (one, two) = (Agent::new(&server, one).await, Agent::new(&server, two).await);
    server
        .create(vec![
            one.entry("/own"),
            entry("/below-own", "/own", &["unix:uid:1"]),
            entry("/deep", "/below-own", &["unix:uid:1"]),
            // A cycle does no harm.
            entry("/own", "/deep", &["unix:uid:2"]),
            entry("/all", "/spire/server", &["gullible:name:any"]),
            entry("/both", "/spire/server", &["gullible:name:any", "gullible:name:two"]),
            entry("/other-alias", "/spire/server", &["gullible:name:any", "gullible:name:three"]),
            entry("/for-all", "/all", &["unix:uid:1"]),
            entry("/for-two", "/both", &["unix:uid:1"]),
            entry("/for-three", "/other-alias", &["unix:uid:1"]),
        ])
        .await;
    assert_eq!(visible(&one).await, ["/below-own", "/deep", "/for-all", "/own", "/own"]);
    assert_eq!(visible(&two).await, ["/for-all", "/for-two"]);
    // What one may see the other may not have signed.
    let all = server.entries().list_entries(ListEntriesRequest::default()).await.unwrap().into_inner().entries;
    let of = |path: &str| all.iter().find(|e| e.spiffe_id == id(path)).unwrap().id.clone();
    let csr = any_csr().await;
    for (agent, path, may) in [
        (&one, "/deep", true),
        (&two, "/deep", false),
        (&one, "/for-two", false),
        (&two, "/for-two", true),
        (&one, "/all", false),
    ] {
        use finial_proto::server::svid::*;
        let params = vec![NewX509svidParams { entry_id: of(path), csr: csr.clone() }];
        let answer = agent.svids().batch_new_x509svid(BatchNewX509svidRequest { params }).await.unwrap();
        let code = answer.into_inner().results.remove(0).status.unwrap().code;
        assert_eq!(code, if may { 0 } else { Code::NotFound as i32 }, "{path}");
    }
    // A change of an entry moves it between agents.
    let update = types::Entry { id: of("/for-two"), parent_id: id("/all"), ..Default::default() };
    let mask = Some(types::EntryMask { parent_id: true, ..Default::default() });
    let request = BatchUpdateEntryRequest { entries: vec![update], input_mask: mask, output_mask: None };
    server.entries().batch_update_entry(request).await.unwrap();
    assert_eq!(visible(&one).await, ["/below-own", "/deep", "/for-all", "/for-two", "/own", "/own"]);
    server
        .entries()
        .batch_delete_entry(BatchDeleteEntryRequest { ids: vec![of("/below-own"), of("/all")] })
        .await
        .unwrap();
    assert_eq!(visible(&one).await, ["/own"]);
    assert_eq!(visible(&two).await, [""; 0]);
}

#[tokio::test]
async fn who_asks_late_gets_what_holds_then() {
    let server = Server::start().await;
    let agent = server.agent().await;
    server.create(vec![agent.entry("/a")]).await;
    let (send, requests) = mpsc::channel(8);
    let answers = agent.entries().sync_authorized_entries(ReceiverStream::new(requests)).await.unwrap().into_inner();
    let mut sync = Sync { send, answers };
    server.agents().ban_agent(BanAgentRequest { id: id(agent.identity.id.path()) }).await.unwrap();
    sync.send.send(SyncAuthorizedEntriesRequest::default()).await.unwrap();
    let refused = sync.next().await.unwrap_err();
    assert_eq!(permission_denied_reason(&refused), Some(Reason::AgentBanned));
}

#[tokio::test]
async fn few_entries_come_whole_in_one_answer() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let mut created = server.create(vec![agent.entry("/a"), agent.entry("/b")]).await;
    let mut sync = Sync::open(&agent, SyncAuthorizedEntriesRequest::default()).await;
    let mut answer = sync.next().await.unwrap().unwrap();
    answer.entries.sort_by(|a, b| a.id.cmp(&b.id));
    created.sort_by(|a, b| a.id.cmp(&b.id));
    assert_eq!((answer.entries, answer.more), (created, false));
    assert!(sync.next().await.unwrap().is_none());
}

async fn many_entries_come_as_revisions_and_then_as_asked(lab: Lab) {
    let server = lab.start().await;
    let agent = server.agent().await;
    let wanted = (0..1203).map(|n| agent.entry(&format!("/w{n}"))).collect();
    let created = server.create(wanted).await;
    let mask = types::EntryMask { revision_number: true, spiffe_id: true, ..Default::default() };
    let first = SyncAuthorizedEntriesRequest { output_mask: Some(mask), ids: vec![] };
    let mut sync = Sync::open(&agent, first).await;
    let mut revisions = Vec::new();
    for (len, more) in [(500, true), (500, true), (203, false)] {
        let page = sync.next().await.unwrap().unwrap();
        assert_eq!((page.entry_revisions.len(), page.more, page.entries.len()), (len, more, 0));
        revisions.extend(page.entry_revisions);
    }
    assert!(revisions.iter().all(|r| r.revision_number == 0 && r.created_at == NOW));
    let mut ids: Vec<_> = revisions.into_iter().map(|r| r.id).collect();
    ids.sort();
    let mut expected: Vec<_> = created.iter().map(|e| e.id.clone()).collect();
    expected.sort();
    assert_eq!(ids, expected);

    let pages = sync.ask(ids.iter().take(501).rev().cloned().chain(["no-such".into()]).collect()).await;
    assert_eq!(pages.iter().map(|p| (p.entries.len(), p.more)).collect::<Vec<_>>(), [(500, true), (1, false)]);
    let got: Vec<_> = pages.into_iter().flat_map(|p| p.entries).collect();
    assert_eq!(got.iter().map(|e| &e.id).collect::<Vec<_>>(), ids.iter().take(501).collect::<Vec<_>>());
    assert!(got.iter().all(|e| e.spiffe_id.is_some() && e.parent_id.is_none()), "the first mask holds");
    let pages = sync.ask(vec!["no-such".into()]).await;
    assert_eq!(pages, [SyncAuthorizedEntriesResponse::default()]);
    let pages = sync.ask(ids.iter().take(500).cloned().collect()).await;
    assert_eq!(pages.iter().map(|p| (p.entries.len(), p.more)).collect::<Vec<_>>(), [(500, false)]);
    // A ban ends the stream at the next request.
    server.agents().ban_agent(BanAgentRequest { id: id(agent.identity.id.path()) }).await.unwrap();
    sync.send.send(SyncAuthorizedEntriesRequest { ids, output_mask: None }).await.unwrap();
    let status = sync.next().await.unwrap_err();
    assert_eq!(permission_denied_reason(&status), Some(Reason::AgentBanned));
}

#[tokio::test]
async fn the_first_request_has_rules() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let with_ids = SyncAuthorizedEntriesRequest { ids: vec!["x".into()], output_mask: None };
    let mut sync = Sync::open(&agent, with_ids).await;
    let message = refused(sync.next().await, Code::InvalidArgument);
    assert_eq!(message, "specifying IDs on initial request is not supported");
    let masked = SyncAuthorizedEntriesRequest { ids: vec![], output_mask: Some(types::EntryMask::default()) };
    let mut sync = Sync::open(&agent, masked).await;
    assert_eq!(refused(sync.next().await, Code::InvalidArgument), "revision number cannot be masked");
}
