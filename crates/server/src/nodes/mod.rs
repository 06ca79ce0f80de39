//! Attested agents in memory: whether the holder of an SVID is still welcome, and what its node selectors are.
//!
//! As with entries, one writer changes the store first and then the map, so that a ban or an eviction holds for the next
//! call of a connection that is open already.

mod list;
mod node;
mod renewal;

pub use node::Standing;
pub use renewal::Renewal;

use crate::entries::{Entries, Turn};
use finial_core::{AgentRecord, JoinToken, SelectorSet, SpiffeId, UnixSeconds};
use finial_runtime::Shutdown;
use finial_store::{AgentUpdate, Store, StoreError};
use node::Node;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::Notify;

/// What became of an attestation.
#[derive(Debug)]
pub enum Attested {
    /// The agent is stored.
    Stored,
    /// The agent was banned meanwhile.
    Banned,
    /// The join token was used before or never existed.
    NoToken,
    /// The join token had expired; it is used up.
    Expired,
}

/// How many agents are read at once.
const PAGE: u32 = 2000;
/// How many agents are read by their IDs at once.
const READ_SOME: usize = 500;
/// How long after a failure agents and entries are read again.
const RETRY: Duration = Duration::from_secs(5);

/// Who hears of every change of an agent, right after it; it returns at once and asks nothing back.
pub trait NodesObserver: Send + Sync {
    /// This agent changed, came or went.
    fn agent_changed(&self, id: &SpiffeId);
    /// Every agent may have changed.
    fn agents_replaced(&self);
}

/// All attested agents.
pub struct Nodes {
    store: Store,
    turn: Turn,
    entries: Arc<Entries>,
    map: RwLock<HashMap<SpiffeId, Node>>,
    none: Arc<SelectorSet>,
    observer: OnceLock<Arc<dyn NodesObserver>>,
    /// The agents of whose renewed SVIDs the first use is being noted.
    noting: Mutex<HashSet<SpiffeId>>,
    /// Some SVIDs may have been given out that are not stored yet.
    some_wait: AtomicBool,
    store_now: Notify,
}

impl Nodes {
    /// Reads all agents into memory.
    pub async fn load(store: Store, turn: Turn, entries: Arc<Entries>) -> Result<Arc<Self>, StoreError> {
        let map = RwLock::new(Self::read(&store).await?);
        Ok(Arc::new(Self {
            store,
            turn,
            entries,
            map,
            none: Arc::default(),
            observer: OnceLock::new(),
            noting: Mutex::default(),
            some_wait: AtomicBool::new(false),
            store_now: Notify::new(),
        }))
    }

    async fn read(store: &Store) -> Result<HashMap<SpiffeId, Node>, StoreError> {
        let mut map = HashMap::new();
        let mut after = Some(0);
        while let Some(row) = after {
            let (agents, next) = store.agents_after(row, PAGE).await?;
            map.extend(agents.into_iter().map(|(row, record)| (record.id.clone(), Node::of(&record, row))));
            after = next;
        }
        Ok(map)
    }

    /// Names the one who hears of every change from now on; only the first call counts.
    pub fn observe(&self, observer: Arc<dyn NodesObserver>) {
        let _ = self.observer.set(observer);
    }

    /// After a change of which nobody knows whether it was stored, reads agents and entries again; after an outage, stores
    /// the SVIDs that were given out in it. Until shutdown.
    pub async fn run(self: Arc<Self>, shutdown: Shutdown) {
        let heal = async {
            loop {
                let _ = tokio::time::timeout(RETRY, self.store_now.notified()).await;
                self.repair().await;
                self.store_pending().await;
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = heal => {}
        }
    }

    pub(crate) async fn repair(self: &Arc<Self>) {
        if self.turn.is_in_doubt()
            && let Err(error) = self.read_again().await
        {
            tracing::error!(%error, "Failed to read agents and entries from the datastore; trying again");
        }
    }

    async fn read_again(self: &Arc<Self>) -> Result<(), StoreError> {
        let this = self.clone();
        let work = async move {
            this.entries.read_again().await?;
            let mut fresh = Self::read(&this.store).await?;
            drop(this.change(|map| {
                // What was given out and is not stored yet is known here only.
                for (id, known) in map.iter().filter(|(_, known)| !known.pending.is_empty()) {
                    if let Some(node) = fresh.get_mut(id) {
                        node.inherit(known);
                    }
                }
                std::mem::replace(map, fresh)
            }));
            if let Some(observer) = this.observer.get() {
                observer.agents_replaced();
            }
            this.turn.settle();
            Ok(())
        };
        self.turn.take(work).await
    }

    fn with<T>(&self, id: &SpiffeId, read: impl FnOnce(Option<&Node>) -> T) -> T {
        read(self.map.read().unwrap_or_else(PoisonError::into_inner).get(id))
    }

    fn change<T>(&self, act: impl FnOnce(&mut HashMap<SpiffeId, Node>) -> T) -> T {
        act(&mut self.map.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, record: &AgentRecord) {
        self.put_row(record, 0);
    }

    /// Row 0 is one that is not known. What is the same as before is no change.
    fn put_row(&self, record: &AgentRecord, row: i64) {
        let mut node = Node::of(record, row);
        let changed = self.change(|map| match map.get_mut(&record.id) {
            Some(known) => {
                node.inherit(known);
                let changed = known.differs(&node);
                *known = node;
                changed
            }
            None => {
                map.insert(record.id.clone(), node);
                true
            }
        });
        if changed {
            self.tell(&record.id);
        }
    }

    /// Reads these agents again, whatever is known of them.
    pub(crate) async fn read_some(self: &Arc<Self>, ids: Vec<SpiffeId>) -> Result<(), StoreError> {
        let this = self.clone();
        let work = async move {
            for some in ids.chunks(READ_SOME) {
                let found = this.store.agent_rows(some).await?;
                found.iter().for_each(|(row, record)| this.put_row(record, *row));
                let there: HashSet<&SpiffeId> = found.iter().map(|(_, record)| &record.id).collect();
                let gone: Vec<_> = some.iter().filter(|id| !there.contains(id)).cloned().collect();
                this.forget(&gone);
            }
            Ok(())
        };
        self.turn.take_always(work).await
    }

    /// Reads everything again, a page at a time, and changes what differs; others go on meanwhile.
    pub(crate) async fn compare_all(self: &Arc<Self>) -> Result<(), StoreError> {
        let known = |map: &mut HashMap<SpiffeId, Node>| map.keys().cloned().collect::<HashSet<_>>();
        let mut missing = self.change(known);
        let mut after = Some(0);
        while let Some(row) = after {
            let this = self.clone();
            let page = async move {
                let (agents, next) = this.store.agents_after(row, PAGE).await?;
                agents.iter().for_each(|(row, record)| this.put_row(record, *row));
                Ok((agents, next))
            };
            let (agents, next) = self.turn.take_always(page).await?;
            for (_, record) in &agents {
                missing.remove(&record.id);
            }
            after = next;
        }
        self.read_some(missing.into_iter().collect()).await
    }

    fn tell(&self, id: &SpiffeId) {
        if let Some(observer) = self.observer.get() {
            observer.agent_changed(id);
        }
    }

    /// The store, for what reads it: lists, counts and single agents.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// How many agents there are, banned and expired ones included.
    pub fn count(&self) -> usize {
        self.map.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// What to think of an agent with this SVID; `serial` in decimal. `follows` are the serial numbers that the SVID itself
    /// says it follows, if it was given out while the datastore was away.
    pub fn standing(&self, id: &SpiffeId, serial: &str, follows: &[Box<str>]) -> Standing {
        self.with(id, |node| node.map_or(Standing::Unknown, |node| node.standing(serial, follows)))
    }

    /// The same, but an agent is not refused for what memory may have missed: it may have attested or renewed at another
    /// server a moment ago.
    ///
    /// # Errors
    /// The datastore is away, and memory does not know the agent by this SVID.
    pub async fn judge(&self, id: &SpiffeId, serial: &str, follows: &[Box<str>]) -> Result<Standing, StoreError> {
        match self.standing(id, serial, follows) {
            Standing::Banned if self.turn.link().is_away() => Ok(Standing::Banned),
            Standing::Unknown | Standing::Superseded | Standing::Banned if self.turn.link().look_again().await? => {
                Ok(self.standing(id, serial, follows))
            }
            standing => Ok(standing),
        }
    }

    /// Whether the agent exists and is banned.
    pub fn is_banned(&self, id: &SpiffeId) -> bool {
        self.with(id, |node| node.is_some_and(Node::is_banned))
    }

    /// Whether the agent has to attest again instead of renewing; `None` when there is no such agent.
    pub fn can_reattest(&self, id: &SpiffeId) -> Option<bool> {
        self.with(id, |node| node.map(|n| n.can_reattest))
    }

    /// The agent's node selectors.
    pub fn selectors(&self, id: &SpiffeId) -> Arc<SelectorSet> {
        self.with(id, |node| node.map_or_else(|| self.none.clone(), |n| n.selectors.clone()))
    }

    /// Stores an agent that has attested, unless it was banned since it was last asked.
    pub async fn attest(self: &Arc<Self>, record: AgentRecord) -> Result<Attested, StoreError> {
        let this = self.clone();
        let work = async move {
            // Another server may have banned it a moment ago.
            if this.turn.link().is_followed() {
                let known = this.store.agent_rows(std::slice::from_ref(&record.id)).await?;
                known.iter().for_each(|(row, known)| this.put_row(known, *row));
            }
            if this.is_banned(&record.id) {
                return Ok(Attested::Banned);
            }
            // Nor may a ban that comes between that look and this write be undone: the datastore refuses.
            match this.store.create_or_update_node(&record).await {
                Ok(stored) => this.put(&stored),
                Err(StoreError::Banned) => return Ok(Attested::Banned),
                Err(error) => return Err(error),
            }
            Ok(Attested::Stored)
        };
        self.turn.take(work).await
    }

    /// Uses up the join token and stores the agent, both or neither.
    pub async fn attest_by_join_token(
        self: &Arc<Self>,
        token: String,
        record: AgentRecord,
        now: UnixSeconds,
    ) -> Result<Attested, StoreError> {
        let this = self.clone();
        let work = async move {
            if this.is_banned(&record.id) {
                return Ok(Attested::Banned);
            }
            match this.store.attest_by_join_token(&token, &record, now).await {
                Err(StoreError::Banned) => Ok(Attested::Banned),
                Err(error) => Err(error),
                Ok(None) => Ok(Attested::NoToken),
                Ok(Some(JoinToken { expires_at, .. })) if expires_at < now => Ok(Attested::Expired),
                Ok(Some(_)) => {
                    this.put(&record);
                    Ok(Attested::Stored)
                }
            }
        };
        self.turn.take(work).await
    }

    /// Changes an agent's row: its version. An SVID is renewed by [`Nodes::renew`].
    pub async fn update(self: &Arc<Self>, id: SpiffeId, update: AgentUpdate) -> Result<(), StoreError> {
        let this = self.clone();
        let work = async move {
            let record = this.store.update_node(&id, update).await?;
            this.put(&record);
            Ok(())
        };
        self.turn.take(work).await
    }

    /// Bans an agent.
    pub async fn ban(self: &Arc<Self>, id: SpiffeId) -> Result<(), StoreError> {
        let this = self.clone();
        let work = async move {
            let record = this.store.ban_node(&id).await?;
            this.put(&record);
            Ok(())
        };
        self.turn.take(work).await
    }

    /// Forgets an agent: it may attest again.
    pub async fn delete(self: &Arc<Self>, id: SpiffeId) -> Result<(), StoreError> {
        let this = self.clone();
        let work = async move {
            let (_, aliases) = this.store.delete_node(&id).await?;
            this.forget(std::slice::from_ref(&id));
            let ids: Vec<_> = aliases.into_iter().map(|entry| entry.id).collect();
            this.entries.forget(&ids);
            Ok(())
        };
        self.turn.take(work).await
    }

    /// Takes agents out of memory that are gone from the store.
    pub(crate) fn forget(&self, ids: &[SpiffeId]) {
        let gone =
            |map: &mut HashMap<SpiffeId, Node>| ids.iter().filter(|id| map.remove(*id).is_some()).collect::<Vec<_>>();
        self.change(gone).into_iter().for_each(|id| self.tell(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::{ManualClock, TrustDomain};
    use finial_runtime::Supervisor;
    use finial_store::StoreSettings;

    struct Scene {
        store: Store,
        turn: Turn,
        nodes: Arc<Nodes>,
        id: SpiffeId,
        supervisor: Supervisor,
    }

    /// One agent, whose serial number is 1.
    async fn scene() -> Scene {
        scene_on(StoreSettings::memory()).await
    }

    /// No agent but those that are stored.
    async fn load(settings: StoreSettings) -> Scene {
        let store = Store::open(settings, Arc::new(ManualClock::at(0))).await.unwrap();
        let supervisor = Supervisor::default();
        let turn = Turn::new(supervisor.spawner());
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        let entries = Entries::load(store.clone(), turn.clone(), trust_domain.clone()).await.unwrap();
        let nodes = Nodes::load(store.clone(), turn.clone(), entries).await.unwrap();
        let id = trust_domain.agent_id("test/a").unwrap();
        Scene { store, turn, nodes, id, supervisor }
    }

    async fn scene_on(settings: StoreSettings) -> Scene {
        let scene = load(settings).await;
        let record = AgentRecord {
            id: scene.id.clone(),
            attestation_type: "test".into(),
            serial_number: "1".into(),
            expires_at: 100,
            new_serial_number: String::new(),
            new_expires_at: 0,
            can_reattest: false,
            agent_version: String::new(),
            selectors: SelectorSet::default(),
        };
        scene.nodes.attest(record).await.unwrap();
        scene
    }

    async fn at_once<T>(what: impl Future<Output = T>) -> Option<T> {
        tokio::time::timeout(Duration::ZERO, what).await.ok()
    }

    #[tokio::test]
    async fn a_line_that_is_full_refuses() {
        let Scene { turn, nodes, id, .. } = scene().await;
        assert_eq!(nodes.renew(&id, "1", "2".into(), 200).await.unwrap(), Renewal::Stored);
        let stuck = || turn.take(std::future::pending::<Result<(), StoreError>>());
        assert!(at_once(stuck()).await.is_none());
        // An agent whose SVID is new has one place, however often it calls.
        assert!(at_once(nodes.promote(&id, "2")).await.is_none(), "the first waits");
        assert!(at_once(nodes.promote(&id, "2")).await.is_some(), "others go on");
        let mut waiting = 2;
        let refusal = loop {
            match at_once(stuck()).await {
                None => waiting += 1,
                Some(result) => break result.unwrap_err(),
            }
            assert!(waiting < 100_000, "no end");
        };
        assert_eq!(refusal.kind(), finial_core::ErrorKind::Unavailable);
    }

    #[tokio::test]
    async fn what_was_given_out_without_the_datastore_is_stored_by_itself() {
        let Scene { store, nodes, id, supervisor, .. } = scene().await;
        let follows = nodes.serials(&id).unwrap();
        assert!(nodes.renew_without_datastore(&id, "1", follows, "2", 200));
        drop(supervisor.spawner().spawn("agents", nodes.clone().run(supervisor.shutdown())));
        nodes.store_pending_soon();
        let stored = async {
            while store.fetch_node(&id).await.unwrap().unwrap().new_serial_number != "2" {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), stored).await.unwrap();
    }

    /// A full disk and a failing one are the same to it: whatever the datastore cannot store now waits.
    #[tokio::test]
    async fn agents_of_a_file_that_cannot_be_written_go_on() {
        let folder = tempfile::tempdir().unwrap();
        let settings = StoreSettings::file(folder.path().join("db"));
        let Scene { store, nodes, id, .. } = scene_on(settings.clone()).await;
        assert_eq!(nodes.renew(&id, "1", "2".into(), 200).await.unwrap(), Renewal::Stored);
        store.close().await;
        drop((store, nodes));
        let Scene { nodes, .. } = load(StoreSettings { read_only: true, ..settings }).await;
        assert_eq!(nodes.judge(&id, "2", &[]).await.unwrap(), Standing::Renewed);
        nodes.promote(&id, "2").await.unwrap();
        for (own, serial) in [("2", "3"), ("3", "4")] {
            assert_eq!(nodes.renew(&id, own, serial.into(), 300).await.unwrap(), Renewal::DatastoreAway);
            let follows = nodes.serials(&id).unwrap();
            assert!(nodes.renew_without_datastore(&id, own, follows, serial, 300));
            assert_eq!(nodes.standing(&id, serial, &[]), Standing::Current);
        }
        nodes.store_pending().await;
        assert_eq!(nodes.standing(&id, "4", &[]), Standing::Current, "it waits on");
        assert_eq!(nodes.standing(&id, "2", &[]), Standing::Renewed, "so does the one that is stored");
    }

    #[tokio::test]
    async fn a_renewal_does_not_wait_for_a_slow_datastore_and_its_late_end_is_void() {
        let Scene { store, turn, nodes, id, .. } = scene().await;
        let (go, gate) = tokio::sync::oneshot::channel::<()>();
        let slow = async move {
            let _ = gate.await;
            Ok(())
        };
        assert!(at_once(turn.take(slow)).await.is_none());
        tokio::time::pause();
        assert_eq!(nodes.renew(&id, "1", "2".into(), 200).await.unwrap(), Renewal::DatastoreAway);
        tokio::time::resume();
        let follows = nodes.serials(&id).unwrap();
        assert!(nodes.renew_without_datastore(&id, "1", follows, "3", 300));
        go.send(()).unwrap();
        turn.take(async { Ok(()) }).await.unwrap();
        nodes.store_pending().await;
        let stored = store.fetch_node(&id).await.unwrap().unwrap();
        assert_eq!((stored.serial_number.as_str(), stored.new_serial_number.as_str()), ("1", "3"));
        assert_eq!(nodes.standing(&id, "3", &[]), Standing::Renewed);
        assert_eq!(nodes.standing(&id, "2", &[]), Standing::Superseded, "nobody ever got it");
    }

    #[tokio::test]
    async fn what_waits_to_be_stored_outlives_a_new_look_at_the_datastore() {
        let Scene { nodes, id, .. } = scene().await;
        let follows = nodes.serials(&id).unwrap();
        assert!(nodes.renew_without_datastore(&id, "1", follows, "2", 200));
        nodes.read_again().await.unwrap();
        assert_eq!(nodes.standing(&id, "2", &[]), Standing::Current);
    }

    async fn stored(Scene { store, id, .. }: &Scene) -> (String, String) {
        let stored = store.fetch_node(id).await.unwrap().unwrap();
        (stored.serial_number, stored.new_serial_number)
    }

    fn serials(of: (&str, &str)) -> (String, String) {
        (of.0.into(), of.1.into())
    }

    /// Its answer may be lost again, and then the agent has nothing else.
    #[tokio::test]
    async fn the_svid_that_asks_stays_good_until_the_next_is_used() {
        let scene = scene().await;
        let Scene { nodes, id, .. } = &scene;
        let give = |own: &str, serial: &str| {
            let follows = nodes.serials(id).unwrap();
            assert!(nodes.renew_without_datastore(id, own, follows, serial, 200));
        };
        give("1", "2");
        assert_eq!(nodes.renew(id, "2", "3".into(), 300).await.unwrap(), Renewal::Stored);
        assert_eq!(stored(&scene).await, serials(("2", "3")), "2 asked");
        // The answers with 3 and 4 were lost.
        give("2", "4");
        give("2", "5");
        nodes.store_pending().await;
        assert_eq!(stored(&scene).await, serials(("2", "5")), "2 asked each time");
        give("5", "6");
        give("6", "7");
        nodes.store_pending().await;
        assert_eq!(stored(&scene).await, serials(("6", "7")), "6 asked last");
    }

    #[tokio::test]
    async fn what_another_server_gave_out_meanwhile_is_replaced_only_when_the_agent_did_not_get_it() {
        let scene = scene().await;
        let Scene { store, nodes, id, .. } = &scene;
        let follows = nodes.serials(id).unwrap();
        assert!(nodes.renew_without_datastore(id, "1", follows.clone(), "2", 200));
        store.renew_node(id, &follows, "5", 200).await.unwrap();
        nodes.store_pending().await;
        assert_eq!(stored(&scene).await, serials(("1", "5")));
        assert_eq!(nodes.standing(id, "5", &[]), Standing::Renewed);
        assert_eq!(nodes.standing(id, "2", &follows), Standing::Ahead);
        nodes.adopt(id, "2", 200, &follows).await;
        assert_eq!(stored(&scene).await, serials(("1", "2")), "it has this one");
        // And the agent is another by now.
        let follows = nodes.serials(id).unwrap();
        assert!(nodes.renew_without_datastore(id, "1", follows, "3", 200));
        store.delete_node(id).await.unwrap();
        nodes.store_pending().await;
        assert_eq!(nodes.standing(id, "3", &[]), Standing::Unknown);
    }

    impl Scene {
        /// Another server on the same datastore.
        async fn beside(&self) -> Self {
            let supervisor = Supervisor::default();
            let turn = Turn::new(supervisor.spawner());
            let trust_domain = TrustDomain::parse("example.org").unwrap();
            let entries = Entries::load(self.store.clone(), turn.clone(), trust_domain).await.unwrap();
            let nodes = Nodes::load(self.store.clone(), turn.clone(), entries).await.unwrap();
            Self { store: self.store.clone(), turn, nodes, id: self.id.clone(), supervisor }
        }
    }

    /// An agent's SVID of an outage, and the ones that it says it follows.
    type Svid = (&'static str, Box<[Box<str>]>);

    /// The agent shows one at a server that cannot reach the datastore, and gets the next.
    async fn renewed_at(server: &Scene, (own, follows): Svid, serial: &'static str) -> Svid {
        let Scene { nodes, id, .. } = server;
        match nodes.standing(id, own, &follows) {
            Standing::Ahead => nodes.adopt(id, own, 200, &follows).await,
            standing => assert_eq!(standing, Standing::Current),
        }
        let follows = nodes.serials(id).unwrap();
        assert!(nodes.renew_without_datastore(id, own, follows.clone(), serial, 200));
        (serial, follows)
    }

    /// Two servers that cannot reach the datastore, at which the agent was in turn, and what it has in the end.
    async fn two_of_an_outage() -> ([Scene; 2], Svid) {
        let one = scene().await;
        let two = one.beside().await;
        for server in [&one, &two] {
            server.turn.link().set_away(&StoreError::Busy(1));
        }
        let svid = renewed_at(&one, ("1", Box::default()), "2").await;
        let svid = renewed_at(&two, svid, "3").await;
        let svid = renewed_at(&two, svid, "4").await;
        // This one has never heard of 3.
        let svid = renewed_at(&one, svid, "5").await;
        for server in [&one, &two] {
            server.turn.link().set_back();
        }
        ([one, two], svid)
    }

    #[tokio::test]
    async fn servers_that_each_gave_out_a_part_store_it_in_any_order() {
        for first in [0, 1] {
            let (servers, (serial, follows)) = two_of_an_outage().await;
            for server in [first, 1 - first] {
                servers[server].nodes.store_pending().await;
                servers[1 - server].nodes.read_again().await.unwrap();
            }
            assert_eq!(stored(&servers[0]).await, serials(("4", "5")), "server {first} was first");
            for server in &servers {
                assert_eq!(server.nodes.standing(&server.id, serial, &follows), Standing::Renewed);
            }
        }
    }

    #[tokio::test]
    async fn an_svid_is_known_by_any_that_it_follows_however_far_the_others_are() {
        let ([one, two], (serial, follows)) = two_of_an_outage().await;
        let Scene { store, id, .. } = &two;
        let first = ["1".into()];
        store.renew_node(id, &first, "3", 200).await.unwrap();
        for recorded in [("1", "3"), ("3", "")] {
            assert_eq!(stored(&two).await, serials(recorded));
            one.nodes.read_again().await.unwrap();
            assert_eq!(one.nodes.standing(id, serial, &[]), Standing::Current, "{recorded:?}");
            assert_eq!(one.beside().await.nodes.standing(id, serial, &follows), Standing::Ahead, "{recorded:?}");
            store.promote_serial(id, "3").await.unwrap();
        }
        one.nodes.store_pending().await;
        assert_eq!(stored(&one).await, serials(("4", "5")));
        // And not by an agent that is another by now.
        store.delete_node(id).await.unwrap();
        two.nodes.read_again().await.unwrap();
        assert_eq!(two.nodes.standing(id, serial, &follows), Standing::Unknown);
    }

    #[tokio::test]
    async fn however_long_an_outage_an_svid_names_the_recorded_and_the_last() {
        let server = scene().await;
        server.turn.link().set_away(&StoreError::Busy(1));
        const SERIALS: [&str; 20] = [
            "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16", "17", "18", "19", "20",
            "21",
        ];
        let mut svid: Svid = ("1", Box::default());
        for serial in SERIALS {
            svid = renewed_at(&server, svid, serial).await;
        }
        let expected: Vec<Box<str>> = std::iter::once(1).chain(5..=20).map(|n| n.to_string().into()).collect();
        assert_eq!(*svid.1, *expected);
    }

    #[tokio::test]
    async fn only_the_agent_that_called_is_renewed() {
        let Scene { nodes, id, .. } = scene().await;
        assert_eq!(nodes.renew(&id, "0", "2".into(), 200).await.unwrap(), Renewal::Superseded);
        assert_eq!(nodes.renew(&id, "1", "2".into(), 200).await.unwrap(), Renewal::Stored);
        // The first use of 2 is noted, if nothing else has done so: otherwise 3 would take its place.
        assert_eq!(nodes.renew(&id, "2", "3".into(), 300).await.unwrap(), Renewal::Stored);
        assert_eq!(nodes.standing(&id, "2", &[]), Standing::Current);
        assert_eq!(nodes.standing(&id, "3", &[]), Standing::Renewed);
        nodes.ban(id.clone()).await.unwrap();
        assert_eq!(nodes.renew(&id, "2", "4".into(), 400).await.unwrap(), Renewal::Superseded);
    }

    #[tokio::test]
    async fn what_was_stored_by_a_change_that_failed_is_read_again() {
        let Scene { store, turn, nodes, id, supervisor: _supervisor } = scene().await;
        let fail = async |error: StoreError| {
            let (store, id) = (store.clone(), id.clone());
            let work = async move {
                store.ban_node(&id).await?;
                Err::<(), _>(error)
            };
            turn.take(work).await.unwrap_err();
            nodes.repair().await;
        };
        // A refusal says that nothing was stored, and is no reason to read anything.
        fail(StoreError::NotFound).await;
        assert_eq!(nodes.standing(&id, "1", &[]), Standing::Current);
        fail(StoreError::Io { path: "db".into(), detail: "fsync".into() }).await;
        assert_eq!(nodes.standing(&id, "1", &[]), Standing::Banned);
        assert!(!turn.is_in_doubt());
    }
}
