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
use std::sync::atomic::{AtomicBool, Ordering};
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
                if !node.pending.is_empty() {
                    self.some_wait.store(true, Ordering::SeqCst);
                }
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

    /// The same for what was found in the datastore, from within a turn. A ban that a failover took is made again: nobody
    /// else remembers it. Where that fails it stays in memory.
    async fn put_found(&self, found: &[(i64, AgentRecord)]) {
        for (row, record) in found {
            let id = &record.id;
            if !self.with(id, |known| known.is_some_and(|known| Node::of(record, *row).lost_ban(known))) {
                self.put_row(record, *row);
                continue;
            }
            match self.store.ban_node(id).await {
                Ok(banned) => {
                    tracing::error!(spiffe_id = %id, "The datastore had lost the ban of an agent; it is banned again");
                    self.put_row(&banned, *row);
                }
                Err(StoreError::NotFound) => self.forget(std::slice::from_ref(id)),
                Err(error) => tracing::error!(
                    spiffe_id = %id,
                    %error,
                    "The datastore has lost the ban of an agent, and it could not be banned again; only this server still \
                     refuses it: ban it again"
                ),
            }
        }
    }

    /// Reads these agents again, whatever is known of them.
    pub(crate) async fn read_some(self: &Arc<Self>, ids: Vec<SpiffeId>) -> Result<(), StoreError> {
        let this = self.clone();
        let work = async move {
            for some in ids.chunks(READ_SOME) {
                let found = this.store.agent_rows(some).await?;
                this.put_found(&found).await;
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
                this.put_found(&agents).await;
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

    /// Whether there is such an agent, banned ones included; also one that attested at another server a moment ago.
    ///
    /// # Errors
    /// The datastore is away, and memory does not know the agent.
    pub(crate) async fn is_attested(&self, id: &SpiffeId) -> Result<bool, StoreError> {
        let is_known = || self.can_reattest(id).is_some();
        Ok(is_known() || self.turn.link().look_again().await? && is_known())
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
                this.put_found(&known).await;
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
#[path = "nodes_tests.rs"]
mod tests;
