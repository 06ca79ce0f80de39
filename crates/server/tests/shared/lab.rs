//! What these tests share: what a server keeps in memory, on a real database.

pub(crate) use crate::until::until;
use finial_core::{AgentRecord, Entry, EntryId, ManualClock, Selector, SelectorSet, SpiffeId, TrustDomain};
use finial_runtime::Supervisor;
use finial_server::entries::{Entries, Turn};
use finial_server::follow::{Follower, Known, Link, State};
use finial_server::nodes::Nodes;
use finial_server::publish::BundleFeed;
use finial_store::{SqlConfig, Store};
use std::sync::Arc;
use std::time::Duration;
use testkit::Database;

pub fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

/// A server, as far as its memory goes.
pub struct Server {
    pub store: Store,
    pub entries: Arc<Entries>,
    pub nodes: Arc<Nodes>,
    pub bundles: Arc<BundleFeed>,
    pub follower: Arc<Follower>,
    pub link: Arc<Link>,
    pub supervisor: Supervisor,
}

pub async fn open(database: &Database, dsn: String) -> Store {
    let config = SqlConfig {
        database_type: database.kind().spire_type().into(),
        connection_string: dsn,
        ..SqlConfig::default()
    };
    Store::open(config.resolve().unwrap(), Arc::new(ManualClock::at(1_800_000_000))).await.unwrap()
}

impl Server {
    pub async fn on(database: &Database) -> Self {
        Self::at(database, database.dsn()).await
    }

    pub async fn at(database: &Database, dsn: String) -> Self {
        let store = open(database, dsn).await;
        let supervisor = Supervisor::default();
        let turn = Turn::new(supervisor.spawner());
        let feed = Arc::new(store.feed(Duration::from_secs(900)));
        let state = State::now(&*feed).await.unwrap();
        let entries = Entries::load(store.clone(), turn.clone(), trust_domain()).await.unwrap();
        let nodes = Nodes::load(store.clone(), turn.clone(), entries.clone()).await.unwrap();
        let bundles = BundleFeed::open(Arc::new(store.clone()), trust_domain()).await.unwrap();
        let domain = Arc::default();
        let memory = Known { entries: entries.clone(), nodes: nodes.clone(), bundles: bundles.clone(), domain };
        let link = turn.link().clone();
        let follower = Follower::new(feed, Arc::new(memory), link.clone(), state);
        Self { store, entries, nodes, bundles, follower, link, supervisor }
    }

    /// Follows in the background, as a running server does.
    pub fn run(&self) {
        let (follower, shutdown) = (self.follower.clone(), self.supervisor.shutdown());
        drop(self.supervisor.spawner().spawn("follower", follower.run(shutdown.clone())));
        drop(self.supervisor.spawner().spawn("agents", self.nodes.clone().run(shutdown)));
    }

    /// Everything in memory, as text.
    pub async fn view(&self) -> Vec<String> {
        let entries = self.entries.list(&Default::default(), None).await.unwrap().items;
        let agents = self.nodes.list(&Default::default(), None).unwrap().items;
        let bundles = self.bundles.all();
        let bundles = bundles.values().map(|bundle| format!("{:?}", bundle.bundle));
        entries.iter().map(|e| format!("{e:?}")).chain(agents.iter().map(|a| format!("{a:?}"))).chain(bundles).collect()
    }

    pub async fn assert_current(&self) {
        assert!(self.follower.catch_up().await);
        assert_eq!(self.view().await, stored(&self.store).await);
    }
}

/// Everything in the database, in the same form.
pub async fn stored(store: &Store) -> Vec<String> {
    let mut all = Vec::new();
    let (entries, _) = store.entries_after(0, u32::MAX).await.unwrap();
    all.extend(entries.iter().map(|(_, e)| format!("{:?}", finial_proto::convert::entry_to_proto(e))));
    all.extend(store.list_nodes(&Default::default(), None).await.unwrap().items.iter().map(|a| format!("{a:?}")));
    let mut bundles = store.list_bundles(None).await.unwrap().items;
    bundles.sort_by(|a, b| a.trust_domain.cmp(&b.trust_domain));
    all.extend(bundles.iter().map(|b| format!("{b:?}")));
    all
}

pub fn databases() -> Vec<Database> {
    [testkit::postgres(), testkit::mariadb()].into_iter().flatten().collect()
}

pub fn agent_id(n: u8) -> SpiffeId {
    trust_domain().agent_id(&format!("test/{n}")).unwrap()
}

pub fn entry(n: u32, agent: u8) -> Entry {
    Entry::new(
        entry_id(n),
        SpiffeId::new(&trust_domain(), &format!("/w{n}")).unwrap(),
        agent_id(agent),
        SelectorSet::new(vec![Selector { kind: "s".into(), value: n.to_string() }]),
    )
}

pub fn entry_id(n: u32) -> EntryId {
    EntryId::parse(&format!("e{n}")).unwrap()
}

pub fn record(n: u8, serial: &str) -> AgentRecord {
    AgentRecord {
        id: agent_id(n),
        attestation_type: "test".into(),
        serial_number: serial.into(),
        expires_at: 2_000_000_000,
        new_serial_number: String::new(),
        new_expires_at: 0,
        can_reattest: false,
        agent_version: String::new(),
        selectors: SelectorSet::new(vec![Selector { kind: "n".into(), value: n.to_string() }]),
    }
}
