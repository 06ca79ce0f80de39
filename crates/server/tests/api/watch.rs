//! What agents hear through their stream, when, and what they do not.

use crate::harness::*;
use finial_proto::digest::Digests;
use finial_proto::server::agent::{AgentX509svidParams, BanAgentRequest, DeleteAgentRequest, RenewAgentRequest};
use finial_proto::server::entry::*;
use finial_proto::sync::agent_sync_client::AgentSyncClient;
use finial_proto::sync::{BundleVersion, WatchRequest, WatchResponse};
use finial_proto::types;
use std::collections::BTreeMap;
use std::sync::Arc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

/// What an agent would keep, and its stream.
struct Watch {
    entries: BTreeMap<String, types::Entry>,
    bundles: BTreeMap<String, (types::Bundle, u64)>,
    answers: Streaming<WatchResponse>,
    told: usize,
}

async fn open(agent: &Agent, request: WatchRequest) -> Result<Streaming<WatchResponse>, Status> {
    let mut client = AgentSyncClient::new(agent.channel.clone()).max_decoding_message_size(64 << 20);
    tokio::time::timeout(DEADLINE, client.watch_authorized(request)).await.unwrap().map(tonic::Response::into_inner)
}

impl Watch {
    async fn new(agent: &Agent) -> Self {
        let answers = open(agent, WatchRequest::default()).await.unwrap();
        Self { entries: BTreeMap::new(), bundles: BTreeMap::new(), answers, told: 0 }
    }

    /// Goes on in a new stream with what there is.
    async fn again(self, agent: &Agent) -> Self {
        let answers = open(agent, self.request()).await.unwrap();
        Self { answers, ..self }
    }

    fn request(&self) -> WatchRequest {
        let mut digests = Digests::sized_for(self.entries.len());
        self.entries.values().for_each(|e| digests.add(&e.id, e.revision_number, e.created_at));
        let version = |(name, (_, version)): (&String, &(types::Bundle, u64))| BundleVersion {
            trust_domain: name.clone(),
            version: *version,
        };
        let entry_digests = if self.entries.is_empty() { Vec::new() } else { digests.into_inner() };
        WatchRequest { entry_digests, bundles: self.bundles.iter().map(version).collect() }
    }

    /// Takes one whole answer.
    async fn next(&mut self) -> Result<Option<WatchResponse>, Status> {
        let mut whole = WatchResponse::default();
        loop {
            let next = tokio::time::timeout(DEADLINE, self.answers.message()).await.expect("an answer in time")?;
            let Some(page) = next else { return Ok(None) };
            self.told += page.entries.len();
            whole.entries.extend(page.entries);
            whole.removed_entry_ids.extend(page.removed_entry_ids);
            whole.bundles.extend(page.bundles);
            whole.removed_bundles.extend(page.removed_bundles);
            whole.buckets.extend(page.buckets);
            whole.bucket_count = whole.bucket_count.max(page.bucket_count);
            if !page.more {
                break;
            }
        }
        let count = whole.bucket_count as usize;
        let replaced =
            |id: &str| whole.buckets.contains(&(finial_proto::digest::bucket_of(id, count) as u32)) && count > 0;
        self.entries.retain(|id, _| !replaced(id));
        whole.removed_entry_ids.iter().for_each(|id| drop(self.entries.remove(id)));
        self.entries.extend(whole.entries.iter().map(|e| (e.id.clone(), e.clone())));
        for bundle in &whole.bundles {
            let proto = bundle.bundle.clone().unwrap();
            self.bundles.insert(proto.trust_domain.clone(), (proto, bundle.version));
        }
        whole.removed_bundles.iter().for_each(|name| drop(self.bundles.remove(name)));
        Ok(Some(whole))
    }

    /// Waits until the agent has exactly these paths.
    async fn until(&mut self, paths: &[&str]) {
        while self.paths() != paths {
            self.next().await.unwrap().expect("the stream goes on");
        }
    }

    fn paths(&self) -> Vec<&str> {
        let mut paths: Vec<_> = self.entries.values().map(|e| &*e.spiffe_id.as_ref().unwrap().path).collect();
        paths.sort_unstable();
        paths
    }

    /// Nothing has been sent that was not taken.
    async fn silent(&mut self) {
        tokio::select! {
            biased;
            answer = self.answers.message() => panic!("was told {answer:?}"),
            () = async { for _ in 0..100 { tokio::task::yield_now().await; } } => {}
        }
    }
}

async fn update(server: &Server, entry: types::Entry) {
    let request = BatchUpdateEntryRequest { entries: vec![entry], ..Default::default() };
    let result = server.entries().batch_update_entry(request).await.unwrap().into_inner().results.remove(0);
    assert_eq!(result.status.unwrap().code, 0);
}

async fn delete(server: &Server, id: &str) {
    let request = BatchDeleteEntryRequest { ids: vec![id.to_owned()] };
    let result = server.entries().batch_delete_entry(request).await.unwrap().into_inner().results.remove(0);
    assert_eq!(result.status.unwrap().code, 0);
}

#[tokio::test]
async fn an_agent_hears_of_its_entries_at_once_and_of_no_others() {
    let server = Server::start().await;
    let (one, two) = (server.agent().await, server.agent().await);
    let mut watch = Watch::new(&one).await;
    let first = watch.next().await.unwrap().unwrap();
    assert!(first.entries.is_empty());
    assert_eq!(watch.bundles.keys().collect::<Vec<_>>(), ["example.org"], "the own bundle comes unasked");
    let made = server.create(vec![one.entry("/a"), two.entry("/x")]).await;
    watch.until(&["/a"]).await;
    assert_eq!(watch.entries[&made[0].id], made[0], "the entry as the API has it");
    let changed = types::Entry { hint: "new".into(), ..made[0].clone() };
    update(&server, changed).await;
    let told = watch.next().await.unwrap().unwrap();
    assert_eq!((told.entries[0].hint.as_str(), told.entries[0].revision_number), ("new", 1));
    delete(&server, &made[1].id).await;
    delete(&server, &made[0].id).await;
    let told = watch.next().await.unwrap().unwrap();
    assert_eq!(told.removed_entry_ids, [made[0].id.clone()], "and nothing of the other agent's");
    watch.silent().await;
}

#[tokio::test]
async fn a_stream_opened_again_costs_what_changed_meanwhile() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let entries = (0..1200).map(|n| agent.entry(&format!("/w{n:04}"))).collect();
    let made = server.create(entries).await;
    let mut watch = Watch::new(&agent).await;
    watch.next().await.unwrap();
    assert_eq!((watch.entries.len(), watch.told), (1200, 1200), "in pages, as one answer");
    // The same again, at any server: silence.
    let mut watch = watch.again(&agent).await;
    watch.silent().await;
    delete(&server, &made[7].id).await;
    update(&server, types::Entry { hint: "h".into(), ..made[500].clone() }).await;
    let before = watch.told;
    let mut watch = watch.again(&agent).await;
    watch.next().await.unwrap();
    assert!(watch.told - before < 100, "{} entries for two changes", watch.told - before);
    assert!(!watch.entries.contains_key(&made[7].id));
    assert_eq!(watch.entries[&made[500].id].hint, "h");
    assert_eq!(watch.entries.len(), 1199);
}

#[tokio::test]
async fn aliases_and_intermediate_entries_bring_and_take_what_hangs_below_them() {
    let server = Server::start().await;
    let (one, _) = server.attest_name("one", "one").await.unwrap();
    let agent = Agent::new(&server, one).await;
    let mut watch = Watch::new(&agent).await;
    server.create(vec![entry("/deep", "/middle", &["unix:uid:1"]), entry("/leaf", "/group", &["unix:uid:2"])]).await;
    let middle = server.create(vec![agent.entry("/middle")]).await.remove(0);
    watch.until(&["/deep", "/middle"]).await;
    let alias = server.create(vec![entry("/group", "/spire/server", &["gullible:name:one"])]).await.remove(0);
    watch.until(&["/deep", "/leaf", "/middle"]).await;
    let other = types::Entry { selectors: selectors(&["gullible:name:two"]), ..alias.clone() };
    update(&server, other).await;
    watch.until(&["/deep", "/middle"]).await;
    update(&server, alias).await;
    watch.until(&["/deep", "/leaf", "/middle"]).await;
    delete(&server, &middle.id).await;
    watch.until(&["/leaf"]).await;
}

#[tokio::test]
async fn federated_bundles_come_with_the_entries_that_need_them_and_as_they_change() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let mut watch = Watch::new(&agent).await;
    watch.next().await.unwrap();
    let own = watch.bundles["example.org"].0.clone();
    let other = |hint| types::Bundle { trust_domain: "other.org".into(), refresh_hint: hint, ..own.clone() };
    let set = async |hint| {
        let request = finial_proto::server::bundle::BatchSetFederatedBundleRequest {
            bundle: vec![other(hint)],
            output_mask: None,
        };
        server.bundles().batch_set_federated_bundle(request).await.unwrap();
    };
    set(10).await;
    server.create(vec![types::Entry { federates_with: vec!["other.org".into()], ..agent.entry("/a") }]).await;
    watch.until(&["/a"]).await;
    assert_eq!(watch.bundles["other.org"].0.refresh_hint, 10, "in the same answer as the entry");
    set(20).await;
    while watch.bundles["other.org"].0.refresh_hint != 20 {
        watch.next().await.unwrap().unwrap();
    }
    // A stream that begins with all of it is silent, bundles included.
    watch.again(&agent).await.silent().await;
}

#[tokio::test]
async fn a_banned_or_evicted_agents_stream_ends_at_once() {
    let server = Server::start().await;
    for evict in [false, true] {
        let agent = server.agent().await;
        let mut watch = Watch::new(&agent).await;
        watch.next().await.unwrap();
        let id = id(agent.identity.id.path());
        if evict {
            server.agents().delete_agent(DeleteAgentRequest { id }).await.unwrap();
        } else {
            server.agents().ban_agent(BanAgentRequest { id }).await.unwrap();
        }
        assert_eq!(watch.next().await.unwrap_err().code(), Code::PermissionDenied);
        assert_eq!(open(&agent, WatchRequest::default()).await.unwrap_err().code(), Code::PermissionDenied);
    }
}

#[tokio::test]
async fn more_than_can_be_told_ends_the_stream_and_the_next_one_tells_it() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let mut watch = Watch::new(&agent).await;
    watch.next().await.unwrap();
    let entries = (0..1500).map(|n| agent.entry(&format!("/w{n:04}"))).collect();
    server.create(entries).await;
    while watch.next().await.unwrap().is_some() {}
    let mut watch = watch.again(&agent).await;
    watch.next().await.unwrap();
    assert_eq!(watch.entries.len(), 1500);
}

/// A channel whose streams hold no more than 64 KiB that nobody has read.
async fn narrow(server: &Server, identity: &Identity) -> Channel {
    let tls = tokio_rustls::TlsConnector::from(Arc::new(server.tls(Some(identity)).await));
    let address = server.running.address;
    let connector = tower::service_fn(move |_: http::Uri| {
        let tls = tls.clone();
        async move {
            let tcp = tokio::net::TcpStream::connect(address).await?;
            let name = rustls_pki_types::ServerName::try_from("localhost").unwrap();
            tls.connect(name, tcp).await.map(hyper_util::rt::TokioIo::new)
        }
    });
    let endpoint = Endpoint::from_static("https://localhost").initial_stream_window_size(64 << 10);
    endpoint.connect_with_connector(connector).await.unwrap()
}

/// Neither do the changes pile up that it does not read, nor does anybody wait for it.
#[tokio::test]
async fn a_client_that_stops_reading_holds_up_nothing() {
    const ENTRIES: usize = 100;
    const ROUNDS: i64 = 20;
    let server = Server::start().await;
    let (stuck, other) = (server.agent().await, server.agent().await);
    let stuck = Agent { channel: narrow(&server, &stuck.identity).await, ..stuck };
    let entries = (0..ENTRIES).map(|n| stuck.entry(&format!("/w{n:03}"))).chain([other.entry("/o")]).collect();
    let made = server.create(entries).await;
    let (mut unread, mut read) = (Watch::new(&stuck).await, Watch::new(&other).await);
    unread.next().await.unwrap();
    read.next().await.unwrap();
    assert_eq!((unread.told, read.told), (ENTRIES, 1));
    for round in 1..=ROUNDS {
        // More than a stream holds.
        let hint = format!("{round:01000}");
        let entries = made.iter().map(|entry| types::Entry { hint: hint.clone(), ..entry.clone() }).collect();
        let request = BatchUpdateEntryRequest { entries, ..Default::default() };
        let results = server.entries().batch_update_entry(request).await.unwrap().into_inner().results;
        assert!(results.iter().all(|result| result.status.as_ref().unwrap().code == 0));
        let told = read.next().await.unwrap().unwrap();
        assert_eq!(told.entries[0].revision_number, round, "the other agent hears of each at once");
    }
    let last = |watch: &Watch| watch.entries.values().map(|entry| entry.revision_number).min();
    while last(&unread) != Some(ROUNDS) {
        unread.next().await.unwrap().expect("the stream goes on");
    }
    // The first, what was under way when it stopped, and the last.
    assert!(unread.told <= 4 * ENTRIES, "{} entries were kept for it", unread.told);
    // And with more than is kept at all, its stream has ended when it looks again.
    let more = (0..1100).map(|n| stuck.entry(&format!("/x{n:04}"))).collect();
    server.create(more).await;
    while unread.next().await.unwrap().is_some() {}
    let mut unread = unread.again(&stuck).await;
    unread.next().await.unwrap();
    assert_eq!(unread.entries.len(), ENTRIES + 1100);
}

#[tokio::test]
async fn a_third_stream_of_an_agent_ends_the_first() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let (mut first, mut second) = (Watch::new(&agent).await, Watch::new(&agent).await);
    first.next().await.unwrap();
    second.next().await.unwrap();
    let _third = Watch::new(&agent).await;
    assert_eq!(first.next().await.unwrap_err().code(), Code::Unavailable);
    server.create(vec![agent.entry("/a")]).await;
    second.until(&["/a"]).await;
}

#[tokio::test]
async fn only_agents_may_watch_and_digests_come_in_powers_of_two() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let request = WatchRequest { entry_digests: vec![1, 2, 3], ..Default::default() };
    refused(open(&agent, request).await.map(drop), Code::InvalidArgument);
    let workload = server.mint("/w").await;
    let workload = Agent::new(&server, workload).await;
    refused(open(&workload, WatchRequest::default()).await.map(drop), Code::PermissionDenied);
}

#[tokio::test]
async fn a_server_that_shuts_down_ends_its_streams_at_once() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let mut watch = Watch::new(&agent).await;
    watch.next().await.unwrap();
    server.supervisor.shutdown().trigger();
    assert_eq!(watch.next().await.unwrap_err().code(), Code::Unavailable);
    drop((watch, agent));
    server.supervisor.run(DEADLINE).await.unwrap();
}

#[tokio::test]
async fn the_stream_of_a_renewed_svid_ends_without_a_word() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let mut watch = Watch::new(&agent).await;
    watch.next().await.unwrap();
    let key = finial_crypto::PrivateKey::generate(finial_core::KeyType::EcP256).unwrap();
    let params = AgentX509svidParams { csr: csr(&key, None, &[]).await.into() };
    let renewed = agent.agents().renew_agent(RenewAgentRequest { params: Some(params) }).await.unwrap().into_inner();
    let renewed = Agent::new(&server, Identity::of(renewed.svid.unwrap(), key)).await;
    Watch::new(&renewed).await.next().await.unwrap();
    assert!(watch.next().await.unwrap().is_none(), "it ended well");
    assert!(logged("Agent is no longer authorized", "caller_id", agent.identity.id.as_str()).is_empty());
}
