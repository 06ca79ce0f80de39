//! Attested agents in memory: whether the holder of an SVID is still welcome, and what its node selectors are.
//!
//! As with entries, one writer changes the store first and then the map, so that a ban or an eviction holds for the next
//! call of a connection that is open already.

use crate::entries::{Entries, Turn};
use finial_core::{AgentRecord, JoinToken, SelectorSet, SpiffeId, UnixSeconds};
use finial_runtime::Shutdown;
use finial_store::{AgentUpdate, Store, StoreError};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// What the server thinks of an agent that shows an SVID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is the agent's current SVID.
    Current,
    /// It is the renewed one, used for the first time: [`Nodes::promote`] it.
    Renewed,
    /// There is no such agent.
    Unknown,
    /// The agent is banned.
    Banned,
    /// The agent has another SVID by now.
    Superseded,
}

/// What calls need to know of an agent.
struct Node {
    serial: Box<str>,
    new_serial: Box<str>,
    can_reattest: bool,
    selectors: Arc<SelectorSet>,
}

impl Node {
    fn of(record: &AgentRecord, shared: Arc<SelectorSet>) -> Self {
        Self {
            serial: record.serial_number.as_str().into(),
            new_serial: record.new_serial_number.as_str().into(),
            can_reattest: record.can_reattest,
            selectors: shared,
        }
    }

    fn is_banned(&self) -> bool {
        self.serial.is_empty()
    }
}

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

/// How long after a failure agents and entries are read again.
const RETRY: Duration = Duration::from_secs(5);

/// All attested agents.
pub struct Nodes {
    store: Store,
    turn: Turn,
    entries: Arc<Entries>,
    map: RwLock<HashMap<SpiffeId, Node>>,
    none: Arc<SelectorSet>,
}

impl Nodes {
    /// Reads all agents into memory.
    pub async fn load(store: Store, turn: Turn, entries: Arc<Entries>) -> Result<Arc<Self>, StoreError> {
        let map = RwLock::new(Self::read(&store).await?);
        Ok(Arc::new(Self { store, turn, entries, map, none: Arc::default() }))
    }

    async fn read(store: &Store) -> Result<HashMap<SpiffeId, Node>, StoreError> {
        let mut map = HashMap::new();
        let keep = |record: AgentRecord| {
            let node = Node::of(&record, Arc::new(record.selectors.clone()));
            map.insert(record.id, node);
        };
        store.load_nodes(keep).await?;
        Ok(map)
    }

    /// After a change of which nobody knows whether it was stored, reads agents and entries again, until shutdown.
    pub async fn run(self: Arc<Self>, shutdown: Shutdown) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
            self.repair().await;
        }
    }

    async fn repair(self: &Arc<Self>) {
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
            let fresh = Self::read(&this.store).await?;
            drop(this.change(|map| std::mem::replace(map, fresh)));
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
        let node = Node::of(record, Arc::new(record.selectors.clone()));
        self.change(|map| map.insert(record.id.clone(), node));
    }

    /// The store, for what reads it: lists, counts and single agents.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// How many agents there are, banned and expired ones included.
    pub fn count(&self) -> usize {
        self.map.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// What to think of an agent with this SVID; `serial` in decimal.
    pub fn standing(&self, id: &SpiffeId, serial: &str) -> Standing {
        self.with(id, |node| match node {
            None => Standing::Unknown,
            Some(node) if node.is_banned() => Standing::Banned,
            Some(node) if &*node.serial == serial => Standing::Current,
            Some(node) if &*node.new_serial == serial => Standing::Renewed,
            Some(_) => Standing::Superseded,
        })
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

    /// The renewed SVID was used: makes it the current one.
    pub async fn promote(self: &Arc<Self>, id: &SpiffeId, serial: &str) -> Result<(), StoreError> {
        let (this, id, serial) = (self.clone(), id.clone(), serial.to_owned());
        let work = async move {
            if this.standing(&id, &serial) != Standing::Renewed {
                return Ok(()); // another call of the same agent was first; or it was banned, which the next call sees
            }
            let record = this.store.promote_serial(&id, &serial).await?;
            this.put(&record);
            Ok(())
        };
        self.turn.take(work).await
    }

    /// Stores an agent that has attested, unless it was banned since it was last asked.
    pub async fn attest(self: &Arc<Self>, record: AgentRecord) -> Result<Attested, StoreError> {
        let this = self.clone();
        let work = async move {
            if this.is_banned(&record.id) {
                return Ok(Attested::Banned);
            }
            let stored = this.store.create_or_update_node(&record).await?;
            this.put(&stored);
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
            match this.store.attest_by_join_token(&token, &record, now).await? {
                None => Ok(Attested::NoToken),
                Some(JoinToken { expires_at, .. }) if expires_at < now => Ok(Attested::Expired),
                Some(_) => {
                    this.put(&record);
                    Ok(Attested::Stored)
                }
            }
        };
        self.turn.take(work).await
    }

    /// Changes an agent's row: a renewed SVID, or its version.
    pub async fn update(self: &Arc<Self>, id: SpiffeId, update: AgentUpdate) -> Result<(), StoreError> {
        let this = self.clone();
        let work = async move {
            if this.is_banned(&id) && update.new_serial_number.is_some() {
                return Err(StoreError::NotFound);
            }
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
            this.change(|map| map.remove(&id));
            let ids: Vec<_> = aliases.into_iter().map(|entry| entry.id).collect();
            this.entries.forget(&ids);
            Ok(())
        };
        self.turn.take(work).await
    }

    /// Takes agents out of memory that are gone from the store.
    pub(crate) fn forget(&self, ids: &[SpiffeId]) {
        self.change(|map| ids.iter().for_each(|id| drop(map.remove(id))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::{ManualClock, TrustDomain};
    use finial_runtime::Supervisor;
    use finial_store::StoreSettings;

    #[tokio::test]
    async fn what_was_stored_by_a_change_that_failed_is_read_again() {
        let store = Store::open(StoreSettings::memory(), Arc::new(ManualClock::at(0))).await.unwrap();
        let turn = Turn::new(Supervisor::default().spawner());
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        let entries = Entries::load(store.clone(), turn.clone(), trust_domain.clone()).await.unwrap();
        let nodes = Nodes::load(store.clone(), turn.clone(), entries).await.unwrap();
        let id = trust_domain.agent_id("test/a").unwrap();
        let record = AgentRecord {
            id: id.clone(),
            attestation_type: "test".into(),
            serial_number: "1".into(),
            expires_at: 100,
            new_serial_number: String::new(),
            new_expires_at: 0,
            can_reattest: false,
            agent_version: String::new(),
            selectors: SelectorSet::default(),
        };
        nodes.attest(record).await.unwrap();
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
        assert_eq!(nodes.standing(&id, "1"), Standing::Current);
        fail(StoreError::Io { path: "db".into(), detail: "fsync".into() }).await;
        assert_eq!(nodes.standing(&id, "1"), Standing::Banned);
        assert!(!turn.is_in_doubt());
    }
}
