//! What runs without SQL: all that agents, admins and downstream servers ask and that changes nothing. How little servers run
//! that nobody asks. And what is in memory at the start, whatever the datastore holds.

use crate::harness::*;
use finial_core::SpiffeId;
use finial_crypto::{DistinguishedName, PrivateKey, create_ca_csr};
use finial_proto::server::agent::CreateJoinTokenRequest;
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::bundle::{GetBundleRequest, ListFederatedBundlesRequest};
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::server::entry::*;
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::server::svid::*;
use finial_proto::sync::WatchRequest;
use finial_proto::sync::agent_sync_client::AgentSyncClient;
use finial_proto::types;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use testkit::{Database, PostgresPair, Proxy, Weather};
use tonic::transport::Channel;
use tonic::{Code, Status};

async fn on(database: &Database, port: u16) -> Server {
    Server::with(|settings| settings.plugins = vec![datastore(&testkit::datastore(database, port))]).await
}

/// What a database runs from now on.
struct Since<'a> {
    database: &'a Database,
    before: BTreeMap<String, u64>,
    begun: Instant,
}

impl<'a> Since<'a> {
    fn now(database: &'a Database) -> Self {
        Self { database, before: database.statements_by_text(), begun: Instant::now() }
    }

    /// How often servers looked for changes, and all other statements.
    fn run(&self) -> (u64, Vec<(String, u64)>) {
        let (mut looks, mut others) = (0, Vec::new());
        for (text, calls) in self.database.statements_by_text() {
            match calls - self.before.get(&text).copied().unwrap_or_default() {
                0 => {}
                more if text.contains("pg_snapshot_xmin") => looks += more,
                more => others.push((text, more)),
            }
        }
        (looks, others)
    }

    /// How often so many servers look at most when nobody asks them to, which is once a second.
    fn looks_max(&self, servers: u64) -> u64 {
        servers * (self.begun.elapsed().as_secs() + 2)
    }

    async fn wait_for_looks(&self, count: u64) {
        while self.run().0 < count {
            assert!(self.begun.elapsed() < DEADLINE * 3, "nobody looks: {:?}", self.run());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Waits until servers do nothing but look.
async fn at_rest(database: &Database, servers: u64) {
    let begun = Instant::now();
    loop {
        let since = Since::now(database);
        since.wait_for_looks(2 * servers).await;
        let (_, others) = since.run();
        if others.is_empty() {
            return;
        }
        assert!(begun.elapsed() < DEADLINE * 3, "never at rest: {others:?}");
    }
}

/// Everyone who asks.
struct Callers {
    agent: Agent,
    workload: String,
    admin: Channel,
    downstream: Channel,
    nobody: Channel,
    csr: bytes::Bytes,
    ca_csr: bytes::Bytes,
    mint_csr: bytes::Bytes,
}

impl Callers {
    /// With what the entries say: who is admin, who is downstream.
    async fn of(server: &Server) -> (Self, Vec<types::Entry>) {
        let agent = server.agent().await;
        let named = |path: &str| entry(path, "/spire/server", &["a:b"]);
        let admin = types::Entry { admin: true, ..named("/admin") };
        let downstream = types::Entry { downstream: true, ..named("/downstream") };
        let entries = server.create(vec![admin, downstream, agent.entry("/w")]).await;
        let key = PrivateKey::generate(finial_core::KeyType::EcP256).unwrap();
        let minted = SpiffeId::new(&trust_domain(), "/minted").unwrap();
        let this = Self {
            workload: entries[2].id.clone(),
            admin: server.remote(Some(&server.mint("/admin").await)).await,
            downstream: server.remote(Some(&server.mint("/downstream").await)).await,
            nobody: server.remote(Some(&server.mint("/nobody").await)).await,
            csr: any_csr().await,
            ca_csr: create_ca_csr(&key, &DistinguishedName::ca_default(), &trust_domain()).await.unwrap().into(),
            mint_csr: csr(&key, Some(&minted), &[]).await.into(),
            agent,
        };
        (this, entries)
    }

    async fn list(&self, channel: &Channel) -> Result<usize, Status> {
        let listed = EntryClient::new(channel.clone()).list_entries(ListEntriesRequest::default()).await;
        listed.map(|answer| answer.into_inner().entries.len())
    }

    async fn new_authority(&self, channel: &Channel) -> Result<NewDownstreamX509caResponse, Status> {
        let request = NewDownstreamX509caRequest { csr: self.ca_csr.clone(), preferred_ttl: 0 };
        SvidClient::new(channel.clone()).new_downstream_x509ca(request).await.map(tonic::Response::into_inner)
    }

    async fn mint(&self, channel: &Channel) -> Result<MintX509svidResponse, Status> {
        let request = MintX509svidRequest { csr: self.mint_csr.clone(), ttl: 0 };
        SvidClient::new(channel.clone()).mint_x509svid(request).await.map(tonic::Response::into_inner)
    }

    /// An agent's round, as SPIRE's agents ask, and what it signs.
    async fn agent_asks(&self) {
        let mut entries = self.agent.entries();
        let got = entries.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
        assert_eq!(got.into_inner().entries.len(), 1);
        let requests = tokio_stream::once(SyncAuthorizedEntriesRequest::default());
        let mut answers = entries.sync_authorized_entries(requests).await.unwrap().into_inner();
        assert_eq!(answers.message().await.unwrap().unwrap().entries.len(), 1);
        self.agent.bundles().get_bundle(GetBundleRequest::default()).await.unwrap();
        let params = vec![NewX509svidParams { entry_id: self.workload.clone(), csr: self.csr.clone() }];
        let signed = self.agent.svids().batch_new_x509svid(BatchNewX509svidRequest { params }).await.unwrap();
        assert!(signed.into_inner().results[0].svid.is_some());
    }

    /// Who is admin, or downstream, and who is not, without a list.
    async fn others_ask(&self) {
        self.mint(&self.admin).await.unwrap();
        self.new_authority(&self.downstream).await.unwrap();
        for other in [&self.nobody, &self.agent.channel, &self.downstream] {
            refused(self.mint(other).await, Code::PermissionDenied);
        }
        for other in [&self.nobody, &self.agent.channel, &self.admin] {
            refused(self.new_authority(other).await, Code::PermissionDenied);
        }
    }

    /// Lists, for which the server looks before it answers from memory.
    async fn admin_lists(&self, entry_id: &str) {
        let mut client = EntryClient::new(self.admin.clone());
        assert_eq!(self.list(&self.admin).await.unwrap(), 3);
        let counted = client.count_entries(CountEntriesRequest::default()).await.unwrap();
        assert_eq!(counted.into_inner().count, 3);
        let one = GetEntryRequest { id: entry_id.to_owned(), output_mask: None };
        assert_eq!(client.get_entry(one).await.unwrap().into_inner().id, entry_id);
        let mut bundles = BundleClient::new(self.admin.clone());
        bundles.list_federated_bundles(ListFederatedBundlesRequest::default()).await.unwrap();
        for other in [&self.nobody, &self.agent.channel, &self.downstream] {
            refused(self.list(other).await, Code::PermissionDenied);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_changes_nothing_runs_no_sql() {
    const TIMES: u64 = 30;
    const LISTS: u64 = 4;
    let Some(database) = testkit::postgres() else { return };
    let server = on(&database, database.port()).await;
    let since = Since::now(&database);
    let (callers, entries) = Callers::of(&server).await;
    assert!(since.run().1.len() > 3, "changes do: {:?}", since.run());
    // The first use of an agent's SVID may be noted.
    callers.agent_asks().await;
    at_rest(&database, 1).await;

    let since = Since::now(&database);
    for _ in 0..TIMES {
        callers.agent_asks().await;
        callers.others_ask().await;
    }
    let (looks, others) = since.run();
    assert_eq!(others, []);
    assert!(looks <= since.looks_max(1), "{looks} looks for {TIMES} rounds: somebody asked for them");

    // A list is never older than its call, so there is a look for it; the list itself comes from memory.
    let since = Since::now(&database);
    for _ in 0..TIMES {
        callers.admin_lists(&entries[2].id).await;
    }
    let (looks, others) = since.run();
    assert_eq!(others, []);
    assert!(looks <= TIMES * LISTS + since.looks_max(1), "{looks} looks for {TIMES} times {LISTS} lists");
}

/// Who is admin by an entry stays so, and who is not does not become it; what the entries say by now holds afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_by_entry_are_known_while_the_database_is_away() {
    let Some(database) = testkit::postgres() else { return };
    let proxy = Proxy::to(database.port());
    let (server, other) = (on(&database, proxy.port()).await, on(&database, database.port()).await);
    let (mut callers, entries) = Callers::of(&server).await;
    proxy.weather(Weather::Refusing);
    proxy.cut(None);
    let begun = Instant::now();
    let write = || async {
        let request = CreateJoinTokenRequest { ttl: 60, ..Default::default() };
        server.agents().create_join_token(request).await.map_or_else(|status| status.code(), |_| Code::Ok)
    };
    while write().await != Code::Unavailable {
        assert!(begun.elapsed() < DEADLINE, "the outage is not noticed");
    }
    // Those who were there before, and those who come now.
    for _ in 0..2 {
        callers.agent_asks().await;
        callers.others_ask().await;
        callers.admin_lists(&entries[2].id).await;
        callers.admin = server.remote(Some(&server.mint("/admin").await)).await;
        callers.downstream = server.remote(Some(&server.mint("/downstream").await)).await;
        callers.nobody = server.remote(Some(&server.mint("/nobody").await)).await;
    }
    let request = BatchDeleteEntryRequest { ids: vec![entries[0].id.clone()] };
    let deleted = other.entries().batch_delete_entry(request).await.unwrap().into_inner().results.remove(0);
    assert_eq!(deleted.status.unwrap().code, 0);
    callers.mint(&callers.admin).await.expect("nobody could tell this server");
    proxy.weather(Weather::Fair);
    while callers.mint(&callers.admin).await.map_or_else(|s| s.code(), |_| Code::Ok) != Code::PermissionDenied {
        assert!(begun.elapsed() < DEADLINE * 3, "it is not noticed who is admin no more");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    callers.new_authority(&callers.downstream).await.unwrap();
}

/// Three servers look once a second each; nothing else is run, whether few agents are connected or many.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn quiet_servers_run_one_statement_a_second_however_many_agents_there_are() {
    const ROUNDS: u64 = 5;
    let Some(database) = testkit::postgres() else { return };
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(on(&database, database.port()).await);
    }
    let mut connected = Vec::new();
    for count in [3, 60] {
        while connected.len() < count {
            let server = &servers[connected.len() % servers.len()];
            let agent = server.agent().await;
            server.create(vec![agent.entry("/w")]).await;
            let mut client = AgentSyncClient::new(agent.channel.clone());
            let mut answers = client.watch_authorized(WatchRequest::default()).await.unwrap().into_inner();
            answers.message().await.unwrap().expect("what there is");
            connected.push((agent, answers));
        }
        at_rest(&database, 3).await;
        let since = Since::now(&database);
        // Some ask as SPIRE's agents do, all the time.
        for (agent, _) in &connected {
            let got = agent.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
            assert_eq!(got.into_inner().entries.len(), 1);
            agent.bundles().get_bundle(GetBundleRequest::default()).await.unwrap();
        }
        since.wait_for_looks(3 * ROUNDS).await;
        let (looks, others) = since.run();
        assert_eq!(others, [], "{count} agents");
        assert!(looks <= since.looks_max(3), "{looks} looks with {count} agents: somebody asked for them");
    }
}

fn paths(entries: Vec<types::Entry>) -> Vec<String> {
    entries.into_iter().map(|entry| entry.spiffe_id.unwrap().path).collect()
}

async fn listed(server: &Server) -> Vec<String> {
    paths(server.entries().list_entries(ListEntriesRequest::default()).await.unwrap().into_inner().entries)
}

/// A standby spares the primary the reading at a start, and costs no entry: one that stands still is not read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_starts_with_everything_also_where_its_standby_is_behind() {
    let Some(pair) = PostgresPair::start() else { return };
    let database = pair.primary.database();
    let first = on(&database, database.port()).await;
    pair.wait_caught_up();
    let standby = pair.standby.view(&database);
    let data = testkit::datastore(&database, database.port());
    let data = format!("{data}\nro_connection_string = \"{}\"", standby.dsn());
    let start = || Server::with(|settings| settings.plugins = vec![datastore(&data)]);
    let pages = || {
        let all = standby.statements_by_text().into_iter();
        all.filter(|(text, _)| text.contains("FROM registered_entries e")).map(|(_, calls)| calls).sum::<u64>()
    };
    let told = || logged("The read-only database is not used; reading from the primary", "subsystem_name", "sql").len();
    first.create(vec![entry("/a", "/p", &["t:a"])]).await;
    let agent = first.agent().await;
    let second = start().await;
    assert_eq!((pages(), told()), (1, 0), "read there");
    assert_eq!(listed(&second).await, ["/a"]);

    standby.sql("SELECT pg_wal_replay_pause()");
    first.create(vec![agent.entry("/b")]).await;
    let third = start().await;
    assert_eq!((pages(), told()), (1, 1), "said once");
    assert_eq!(listed(&third).await, ["/a", "/b"]);
    // Also to the agents; the second server hears of it, too.
    let agent = Agent::new(&third, agent.identity).await;
    let got = agent.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
    assert_eq!(paths(got.into_inner().entries), ["/b"]);
    first.create(vec![entry("/c", "/p", &["t:a"])]).await;
    for server in [&second, &third] {
        assert_eq!(listed(server).await, ["/a", "/b", "/c"]);
    }
}

/// One bad row keeps no server from starting, and puts none that runs out of service; the log names it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_cannot_be_read_is_left_out_and_named() {
    let Some(database) = testkit::postgres() else { return };
    let first = on(&database, database.port()).await;
    let made = first.create(vec![entry("/bad", "/p", &["t:a"]), entry("/good", "/p", &["t:b"])]).await;
    let agents = [first.agent().await, first.agent().await];
    let bad_agent = agents[0].identity.id.as_str();
    database.sql(&format!("UPDATE registered_entries SET spiffe_id = 'nowhere' WHERE entry_id = '{}'", made[0].id));
    database.sql(&format!("UPDATE attested_node_entries SET spiffe_id = 'nobody' WHERE spiffe_id = '{bad_agent}'"));
    database.sql("INSERT INTO bundles (trust_domain, data) VALUES ('spiffe://bad.test', E'\\\\xff')");
    let second = on(&database, database.port()).await;
    let named = |field: &str, value: &str| match field {
        "entry_id" => logged("Invalid registration entry in the datastore; left out", field, value).len(),
        _ => logged("Invalid agent in the datastore; left out", field, value).len(),
    };
    assert_eq!((named("entry_id", &made[0].id), named("spiffe_id", "nobody")), (1, 1));
    assert_eq!(listed(&second).await, ["/good"]);
    let kept = Agent::new(&second, agents[1].identity.clone()).await;
    kept.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
    // Whoever changed the row by hand may have left an event for those that run.
    let events = "INSERT INTO registered_entries_events (created_at, updated_at, entry_id) VALUES (now(), now(), '{}')";
    database.sql(&events.replace("{}", &made[0].id));
    for server in [&first, &second] {
        assert_eq!(listed(server).await, ["/good"]);
    }
    assert_eq!(named("entry_id", &made[0].id), 3, "both have read it again");
    first.create(vec![entry("/new", "/p", &["t:a"])]).await;
    assert_eq!(listed(&second).await, ["/good", "/new"]);
}
