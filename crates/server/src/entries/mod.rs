//! Registration entries: the index that answers, and the one writer that changes store and index together.
//!
//! A change is committed to the store first and then applied to the index, by one task at a time, and that task is not the
//! caller's: a client that hangs up cannot leave the index behind the store. Readers hold the index's lock for the length
//! of one lookup and never while waiting for anything.

mod index;

pub use index::{Index, Indexed};

use crate::publish::BundleFeed;
use finial_core::{Entry, EntryId, JoinToken, SelectorSet, SpiffeId, TrustDomain};
use finial_runtime::Spawner;
use finial_store::{CreatedEntry, DeleteMode, EntryUpdate, Store, StoreError};
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

/// Lets one change after the other through, each in a task of its own. Shared by all that is indexed.
#[derive(Clone)]
pub struct Turn {
    order: Arc<tokio::sync::Mutex<()>>,
    /// Whether a change may have been stored of which memory does not know.
    in_doubt: Arc<AtomicBool>,
    spawner: Spawner,
}

impl Turn {
    /// A new line.
    pub fn new(spawner: Spawner) -> Self {
        Self { order: Arc::default(), in_doubt: Arc::default(), spawner }
    }

    /// Runs `work` when its turn comes, to its end even if the caller goes away.
    pub(crate) async fn take<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let this = self.clone();
        let task = self.spawner.spawn("write", async move {
            let _turn = this.order.lock().await;
            work.await.inspect_err(|error| this.doubt(error))
        });
        match task.await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Missing("datastore-sql: the change was not finished; the log says why".into())),
        }
    }

    /// After a failure of the database itself, a COMMIT among them, nobody knows what was stored: it has to be read.
    fn doubt(&self, error: &StoreError) {
        if matches!(error, StoreError::Io { .. } | StoreError::Corrupt { .. } | StoreError::Sql(_)) {
            self.in_doubt.store(true, Ordering::Relaxed);
        }
    }

    /// Whether memory may be behind the datastore.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.in_doubt.load(Ordering::Relaxed)
    }

    /// Says that all was read again, from within a turn.
    pub(crate) fn settle(&self) {
        self.in_doubt.store(false, Ordering::Relaxed);
    }
}

/// All registration entries, and the join tokens that came lately.
pub struct Entries {
    trust_domain: TrustDomain,
    store: Store,
    turn: Turn,
    index: RwLock<Index>,
    /// Tokens that this server made and that nobody has used yet: a hint that saves a look into the datastore, which
    /// alone decides. At most [`RECENT_TOKENS_MAX`].
    recent_tokens: Mutex<HashSet<Box<str>>>,
}

const RECENT_TOKENS_MAX: usize = 4096;

impl Entries {
    /// Reads all entries into the index.
    pub async fn load(store: Store, turn: Turn, trust_domain: TrustDomain) -> Result<Arc<Self>, StoreError> {
        let mut index = Index::new(trust_domain.clone());
        store.load_entries(|entry| index.put(&entry)).await?;
        let index = RwLock::new(index);
        Ok(Arc::new(Self { trust_domain, store, turn, index, recent_tokens: Mutex::default() }))
    }

    /// Reads all entries again, from within a turn.
    pub(crate) async fn read_again(&self) -> Result<(), StoreError> {
        let mut fresh = Index::new(self.trust_domain.clone());
        self.store.load_entries(|entry| fresh.put(&entry)).await?;
        drop(self.change(|index| std::mem::replace(index, fresh)));
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, act: impl FnOnce(&mut Index) -> T) -> T {
        act(&mut self.index.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many entries are indexed.
    pub fn count(&self) -> usize {
        self.read().len()
    }

    /// Whether an entry makes the holder of `id` an admin.
    pub fn is_admin(&self, id: &SpiffeId) -> bool {
        self.read().is_admin(id)
    }

    /// Whether an entry makes the holder of `id` a downstream server.
    pub fn is_downstream(&self, id: &SpiffeId) -> bool {
        self.read().is_downstream(id)
    }

    /// All entries that an agent with these node selectors may have.
    pub fn authorized(&self, agent: &SpiffeId, selectors: &SelectorSet) -> Vec<Arc<Indexed>> {
        self.read().authorized(agent, selectors)
    }

    /// For each ID, in order, its entry if the agent may have it.
    pub fn authorized_among<'i>(
        &self,
        agent: &SpiffeId,
        selectors: &SelectorSet,
        ids: impl Iterator<Item = &'i str>,
    ) -> Vec<Option<Arc<Indexed>>> {
        self.read().authorized_among(agent, selectors, ids)
    }

    /// The store, for what reads it: lists, counts and single entries.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Stores a batch; see [`Store::create_entries`].
    pub async fn create(
        self: &Arc<Self>,
        entries: Vec<Entry>,
    ) -> Result<Vec<Result<CreatedEntry, StoreError>>, StoreError> {
        let this = self.clone();
        let work = async move {
            let created = this.store.create_entries(entries).await?;
            this.change(|index| {
                for new in created.iter().flatten().filter(|c| !c.existing) {
                    index.put(&new.entry);
                }
            });
            Ok(created)
        };
        self.turn.take(work).await
    }

    /// Changes an entry.
    pub async fn update(self: &Arc<Self>, id: EntryId, update: EntryUpdate) -> Result<Entry, StoreError> {
        let this = self.clone();
        let work = async move {
            let entry = this.store.update_entry(&id, update).await?;
            this.change(|index| index.put(&entry));
            Ok(entry)
        };
        self.turn.take(work).await
    }

    /// Deletes entries, each with its own result.
    pub async fn delete(self: &Arc<Self>, ids: Vec<EntryId>) -> Result<Vec<Result<(), StoreError>>, StoreError> {
        let this = self.clone();
        let work = async move {
            let mut results = Vec::with_capacity(ids.len());
            for id in &ids {
                let result = this.store.delete_entry(id).await;
                if matches!(result, Ok(_) | Err(StoreError::NotFound)) {
                    this.forget(std::slice::from_ref(id));
                }
                results.push(result.map(|_| ()).inspect_err(|error| this.turn.doubt(error)));
            }
            Ok(results)
        };
        self.turn.take(work).await
    }

    /// Stores a join token and its alias entry.
    pub async fn create_join_token(
        self: &Arc<Self>,
        token: JoinToken,
        alias: Option<Entry>,
    ) -> Result<Option<CreatedEntry>, StoreError> {
        let this = self.clone();
        let work = async move {
            let created = this.store.create_join_token(&token, alias).await?;
            if let Some(new) = created.as_ref().filter(|c| !c.existing) {
                this.change(|index| index.put(&new.entry));
            }
            let mut recent = this.recent_tokens.lock().unwrap_or_else(PoisonError::into_inner);
            if recent.len() >= RECENT_TOKENS_MAX {
                recent.clear(); // most were forgotten by their makers
            }
            recent.insert(token.token.into());
            Ok(created)
        };
        self.turn.take(work).await
    }

    /// Whether the token may be one that can be used: taken from memory if this server made it, else looked up. Each
    /// token is found in memory once.
    pub async fn has_join_token(&self, token: &str) -> Result<bool, StoreError> {
        if self.recent_tokens.lock().unwrap_or_else(PoisonError::into_inner).remove(token) {
            return Ok(true);
        }
        Ok(self.store.fetch_join_token(token).await?.is_some())
    }

    /// Deletes a federated bundle, from the feed too, with what `mode` says about the entries that federate with it.
    pub async fn delete_bundle(
        self: &Arc<Self>,
        trust_domain: TrustDomain,
        mode: DeleteMode,
        feed: Arc<BundleFeed>,
    ) -> Result<(), StoreError> {
        let this = self.clone();
        let work = async move {
            let touched = this.store.delete_bundle(&trust_domain, mode).await?;
            if let Err(error) = feed.refresh(&trust_domain).await {
                tracing::warn!(%error, "Bundle will be read again");
            }
            match mode {
                DeleteMode::Delete => this.forget(&touched),
                DeleteMode::Dissociate | DeleteMode::Restrict => {
                    // The bundle is gone, whether or not this works.
                    match this.store.fetch_entries(&touched).await {
                        Ok(changed) => this.change(|index| changed.iter().for_each(|entry| index.put(entry))),
                        Err(error) => {
                            this.turn.in_doubt.store(true, Ordering::Relaxed);
                            tracing::warn!(%error, "Entries will be read again");
                        }
                    }
                }
            }
            Ok(())
        };
        self.turn.take(work).await
    }

    /// Takes entries out of the index that are gone from the store.
    pub(crate) fn forget(&self, ids: &[EntryId]) {
        self.change(|index| ids.iter().for_each(|id| index.remove(id.as_str())));
    }
}
