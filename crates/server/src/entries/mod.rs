//! Registration entries: the index that answers, and the one writer that changes store and index together.
//!
//! A change is committed to the store first and then applied to the index, by one task at a time, and that task is not the
//! caller's: a client that hangs up cannot leave the index behind the store. Readers hold the index's lock for the length
//! of one lookup and never while waiting for anything.

mod index;
mod indexed;
mod list;

pub use index::Index;
pub use indexed::Indexed;

use crate::follow::Link;
use crate::publish::BundleFeed;
use finial_core::{Entry, EntryId, JoinToken, SelectorSet, SpiffeId, TrustDomain};
use finial_runtime::Spawner;
use finial_store::{CreatedEntry, DeleteMode, EntryUpdate, Store, StoreError};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use tokio::sync::Semaphore;

/// How many changes wait at most: as many as a whole fleet's agents may ask for at once, at a few KiB each.
const LINE_MAX: usize = 16_384;

/// Lets one change after the other through, each in a task of its own. Shared by all that is indexed.
#[derive(Clone)]
pub struct Turn {
    order: Arc<tokio::sync::Mutex<()>>,
    /// The places in the line, of those who may be refused.
    places: Arc<Semaphore>,
    /// Whether a change may have been stored of which memory does not know.
    in_doubt: Arc<AtomicBool>,
    link: Arc<Link>,
    spawner: Spawner,
}

impl Turn {
    /// A new line.
    pub fn new(spawner: Spawner) -> Self {
        Self {
            order: Arc::default(),
            places: Arc::new(Semaphore::new(LINE_MAX)),
            in_doubt: Arc::default(),
            link: Arc::default(),
            spawner,
        }
    }

    /// Whether the datastore can be reached, as those know who follow it.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Runs `work` when its turn comes, to its end even if the caller goes away. While the datastore is away this fails
    /// at once, for those in the line, too: nobody waits for what cannot be.
    pub(crate) async fn take<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        if let Some(refusal) = self.link.refusal() {
            return Err(refusal);
        }
        let Ok(place) = self.places.clone().try_acquire_owned() else { return Err(line_is_full()) };
        // It is the work's, not the caller's: those who hang up do not make the line shorter.
        let work = async move {
            let _place = place;
            work.await
        };
        self.run(false, work).await
    }

    /// The same for those who find out that the datastore is back.
    pub(crate) async fn take_always<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.run(true, work).await
    }

    async fn run<T: Send + 'static>(
        &self,
        patient: bool,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let this = self.clone();
        let task = self.spawner.spawn("write", async move {
            let _turn = tokio::select! {
                biased;
                turn = this.order.lock() => turn,
                refusal = this.link.lost(), if !patient => return Err(refusal),
            };
            work.await.inspect_err(|error| this.doubt(error))
        });
        match task.await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Missing("datastore-sql: the change was not finished; the log says why".into())),
        }
    }

    /// After a failure of the database itself, a COMMIT among them, nobody knows what was stored: it has to be read. Who
    /// follows the database finds it there.
    fn doubt(&self, error: &StoreError) {
        if !error.leaves_doubt() {
            return;
        }
        if self.link.is_followed() {
            self.link.wake();
        } else {
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

fn line_is_full() -> StoreError {
    StoreError::Unavailable {
        what: "the server".into(),
        detail: format!("has {LINE_MAX} changes waiting for the datastore already"),
        advice: "try again, or check the database's load and locks",
    }
}

/// One change of the index.
pub(crate) enum Change<'a> {
    /// The entry is there, with its row ID (0 when not known).
    Put(&'a Entry, i64),
    /// No entry has this ID.
    Remove(&'a str),
}

/// Who hears of every change of the index, under the lock that makes it: looks at what it needs, and returns at once.
pub trait IndexObserver: Send + Sync {
    /// Whether it wants to hear of nothing now, which saves the two calls.
    fn is_idle(&self) -> bool {
        false
    }
    /// The entries with these IDs are about to change, come or go.
    fn before(&self, index: &Index, ids: &[&str]);
    /// They have.
    fn after(&self, index: &Index, ids: &[&str]);
    /// Everything may have changed.
    fn replaced(&self, index: &Index);
}

/// How many entries are read at once.
const PAGE: u32 = 1000;
/// How many entries are read by their IDs at once.
const READ_SOME: usize = 500;

async fn read_all(store: &Store, trust_domain: &TrustDomain) -> Result<Index, StoreError> {
    let mut index = Index::new(trust_domain.clone());
    store.each_entry(|row, entry| index.put(entry, row)).await?;
    Ok(index)
}

/// All registration entries, and the join tokens that came lately.
pub struct Entries {
    trust_domain: TrustDomain,
    store: Store,
    turn: Turn,
    index: RwLock<Index>,
    observer: OnceLock<Arc<dyn IndexObserver>>,
    /// Tokens that this server made and that nobody has used yet: a hint that saves a look into the datastore, which
    /// alone decides. At most [`RECENT_TOKENS_MAX`].
    recent_tokens: Mutex<HashSet<Box<str>>>,
}

const RECENT_TOKENS_MAX: usize = 4096;

impl Entries {
    /// Reads all entries into the index.
    pub async fn load(store: Store, turn: Turn, trust_domain: TrustDomain) -> Result<Arc<Self>, StoreError> {
        let (index, observer) = (RwLock::new(read_all(&store, &trust_domain).await?), OnceLock::new());
        Ok(Arc::new(Self { trust_domain, store, turn, index, observer, recent_tokens: Mutex::default() }))
    }

    /// Names the one who hears of every change from now on; only the first call counts.
    pub fn observe(&self, observer: Arc<dyn IndexObserver>) {
        let _ = self.observer.set(observer);
    }

    /// Reads all entries again, from within a turn.
    pub(crate) async fn read_again(&self) -> Result<(), StoreError> {
        let fresh = read_all(&self.store, &self.trust_domain).await?;
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *index, fresh);
        if let Some(observer) = self.observer.get() {
            observer.replaced(&index);
        }
        drop(index);
        drop(old);
        Ok(())
    }

    /// Reads these entries again, whatever is known of them.
    pub(crate) async fn read_some(self: &Arc<Self>, ids: Vec<EntryId>) -> Result<(), StoreError> {
        let this = self.clone();
        let work = async move {
            for some in ids.chunks(READ_SOME) {
                let found = this.store.entry_rows(some).await?;
                let there: HashSet<&str> = found.iter().map(|(_, entry)| entry.id.as_str()).collect();
                let gone = some.iter().map(EntryId::as_str).filter(|id| !there.contains(id)).map(Change::Remove);
                this.apply(&found.iter().map(|(row, entry)| Change::Put(entry, *row)).chain(gone).collect::<Vec<_>>());
            }
            Ok(())
        };
        self.turn.take_always(work).await
    }

    /// Reads everything again, a page at a time, and changes what differs; others go on meanwhile.
    pub(crate) async fn compare_all(self: &Arc<Self>) -> Result<(), StoreError> {
        let mut missing: HashSet<Box<str>> = self.read().iter().map(|entry| entry.id().into()).collect();
        let mut after = Some(0);
        while let Some(row) = after {
            let this = self.clone();
            let page = async move {
                let (entries, next) = this.store.entries_after(row, PAGE).await?;
                this.apply(&entries.iter().map(|(row, entry)| Change::Put(entry, *row)).collect::<Vec<_>>());
                Ok((entries, next))
            };
            let (entries, next) = self.turn.take_always(page).await?;
            for (_, entry) in &entries {
                missing.remove(entry.id.as_str());
            }
            after = next;
        }
        self.read_some(missing.iter().filter_map(|id| EntryId::parse(id).ok()).collect()).await
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one place where the index changes. What is the same as before is no change.
    pub(crate) fn apply(&self, changes: &[Change<'_>]) {
        let changes = changes.iter().map(|change| match change {
            Change::Put(entry, row) => (entry.id.as_str(), Some(Indexed::new(entry, *row, &self.trust_domain))),
            Change::Remove(id) => (*id, None),
        });
        let mut changes: Vec<_> = changes.collect();
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        changes.retain_mut(|(id, new)| match (index.get(id), new) {
            (None, None) => false,
            (Some(old), Some(new)) => {
                if new.row() == 0 {
                    *new = new.with_row(old.row());
                }
                old != new
            }
            _ => true,
        });
        let ids: Vec<&str> = changes.iter().map(|(id, _)| *id).collect();
        if ids.is_empty() {
            return;
        }
        let observer = self.observer.get().filter(|observer| !observer.is_idle());
        if let Some(observer) = observer {
            observer.before(&index, &ids);
        }
        for (id, new) in &changes {
            match new {
                Some(entry) => index.insert(entry.clone()),
                None => index.remove(id),
            }
        }
        if let Some(observer) = observer {
            observer.after(&index, &ids);
        }
    }

    /// How many entries are indexed.
    pub fn count(&self) -> usize {
        self.read().len()
    }

    /// The trust domain of which they are, when there are some and they are all of another one.
    pub fn of_another_domain(&self) -> Option<String> {
        let index = self.read();
        if !index.iter().all(Indexed::is_foreign) {
            return None;
        }
        let name = index.iter().next()?.to_proto().spiffe_id?.trust_domain;
        (name != self.trust_domain.as_str()).then_some(name)
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
    pub fn authorized(&self, agent: &SpiffeId, selectors: &SelectorSet) -> Vec<Indexed> {
        self.read().authorized(agent, selectors)
    }

    /// For each ID, in order, its entry if the agent may have it.
    pub fn authorized_among<'i>(
        &self,
        agent: &SpiffeId,
        selectors: &SelectorSet,
        ids: impl Iterator<Item = &'i str>,
    ) -> Vec<Option<Indexed>> {
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
            let new = created.iter().flatten().filter(|c| !c.existing);
            this.apply(&new.map(|c| Change::Put(&c.entry, c.row)).collect::<Vec<_>>());
            Ok(created)
        };
        self.turn.take(work).await
    }

    /// Changes entries; see [`Store::update_entries`].
    pub async fn update(
        self: &Arc<Self>,
        updates: Vec<(EntryId, EntryUpdate)>,
    ) -> Result<Vec<Result<Entry, StoreError>>, StoreError> {
        let this = self.clone();
        let work = async move {
            let updated = this.store.update_entries(&updates).await?;
            // of several changes of one entry the last is what it is now
            let now: HashMap<&str, &Entry> = updated.iter().flatten().map(|entry| (entry.id.as_str(), entry)).collect();
            this.apply(&now.into_values().map(|entry| Change::Put(entry, 0)).collect::<Vec<_>>());
            Ok(updated)
        };
        self.turn.take(work).await
    }

    /// Deletes entries; see [`Store::delete_entries`].
    pub async fn delete(self: &Arc<Self>, ids: Vec<EntryId>) -> Result<Vec<Result<(), StoreError>>, StoreError> {
        let this = self.clone();
        let work = async move {
            let deleted = this.store.delete_entries(&ids).await?;
            let gone = ids.iter().zip(&deleted).filter(|(_, d)| matches!(d, Ok(_) | Err(StoreError::NotFound)));
            this.apply(
                &gone
                    .map(|(id, _)| id.as_str())
                    .collect::<HashSet<_>>()
                    .into_iter()
                    .map(Change::Remove)
                    .collect::<Vec<_>>(),
            );
            Ok(deleted.into_iter().map(|result| result.map(drop)).collect())
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
                this.apply(&[Change::Put(&new.entry, new.row)]);
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
            feed.refresh_or_later(&trust_domain).await;
            match mode {
                DeleteMode::Delete => this.forget(&touched),
                DeleteMode::Dissociate | DeleteMode::Restrict => {
                    // The bundle is gone, whether or not this works.
                    match this.store.fetch_entries(&touched).await {
                        Ok(changed) => {
                            this.apply(&changed.iter().map(|entry| Change::Put(entry, 0)).collect::<Vec<_>>())
                        }
                        Err(error) => {
                            this.turn.doubt(&error);
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
        self.apply(&ids.iter().map(|id| Change::Remove(id.as_str())).collect::<Vec<_>>());
    }
}
