//! Entries, SVIDs and bundles as the server gave them. One writer ([`CacheWriter`]) publishes immutable snapshots; workloads
//! look through [`View`]s, which hold their answers ready-made and wake their streams only when something for them changed.

mod bundle;
mod hints;
mod index;
mod jwt;
mod snapshot;
mod tls_secret;
mod view;
mod wit;

pub(crate) use bundle::{BundleForms, Bundles};
pub(crate) use hints::drop_duplicate_hints;
pub(crate) use jwt::{CachedJwt, FlightResult, JwtCache, JwtKey};
pub(crate) use snapshot::{Record, Snapshot, WorkloadSvid, key_bytes};
pub(crate) use tls_secret::TlsSecret;
pub(crate) use view::{Subscription, View, ViewState};
pub(crate) use wit::{CachedWit, WitCache};

use crate::entry::WorkloadEntry;
use arc_swap::ArcSwap;
use finial_core::{Clock, EntryId, SelectorSet, TrustDomain, UnixSeconds};
use finial_crypto::TrustRoots;
use finial_crypto::tls::BundleSource;
use index::SelectorIndex;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};

/// Views beyond this are dropped as soon as nobody holds them.
const VIEWS_KEPT: usize = 1024;
/// A view that nobody holds is dropped after this time. Milliseconds.
const VIEW_IDLE_MS: i64 = 60_000;
/// With more changed entries than this, views are compared one by one instead.
const CHANGES_LOOKED_AT: usize = 32;

struct Views {
    by_selectors: HashMap<SelectorSet, Arc<View>>,
    closed: bool,
}

/// The readers' side.
pub(crate) struct Cache {
    snapshot: ArcSwap<Snapshot>,
    /// Taken for the moment of finding or making a view, never while one is read. Connections keep theirs.
    views: Mutex<Views>,
    /// A workload waits for an SVID that is not there.
    wanted: Notify,
    /// Something was published, of which a part may be for SVID stores.
    to_store: Notify,
    /// Something is there that was not kept yet.
    changed: Arc<Notify>,
    clock: Arc<dyn Clock>,
    pub(crate) jwt: JwtCache,
    pub(crate) wit: WitCache,
    /// For those who want all of them.
    bundles: watch::Sender<Bundles>,
}

impl Cache {
    /// Whether anything that was issued for workloads has not ended.
    pub(crate) fn holds_valid(&self, now: UnixSeconds) -> bool {
        self.snapshot().records.iter().any(|record| record.svid.as_ref().is_some_and(|svid| svid.not_after > now))
            || self.jwt.all().iter().any(|(jwt, _)| jwt.expires_at > now)
            || self.wit.all().iter().any(|(_, wit)| wit.expires_at > now)
    }

    /// An empty cache with the agent's own bundle, and its only writer.
    pub(crate) fn new(own: Arc<BundleForms>, jwt_limit: usize, clock: Arc<dyn Clock>) -> (Arc<Self>, CacheWriter) {
        let snapshot = Snapshot {
            records: Arc::from([]),
            index: Arc::default(),
            bundles: Bundles { own, federated: BTreeMap::new() },
        };
        let (bundles, _) = watch::channel(snapshot.bundles.clone());
        let changed = Arc::new(Notify::new());
        let cache = Arc::new(Self {
            snapshot: ArcSwap::from_pointee(snapshot),
            views: Mutex::new(Views { by_selectors: HashMap::new(), closed: false }),
            wanted: Notify::new(),
            to_store: Notify::new(),
            jwt: JwtCache::new(jwt_limit, changed.clone()),
            wit: WitCache::new(changed.clone()),
            changed,
            clock,
            bundles,
        });
        (cache.clone(), CacheWriter { cache })
    }

    fn views(&self) -> MutexGuard<'_, Views> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state now.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// The view of a set of selectors.
    pub(crate) fn view(&self, selectors: &SelectorSet) -> Arc<View> {
        let mut views = self.views();
        if let Some(view) = views.by_selectors.get(selectors) {
            return view.clone();
        }
        let state = ViewState::new(&self.snapshot.load(), selectors, views.closed);
        let view = Arc::new(View::new(selectors.clone(), state));
        if views.by_selectors.len() >= VIEWS_KEPT {
            views.by_selectors.retain(|_, v| Arc::strong_count(v) > 1);
        }
        views.by_selectors.insert(selectors.clone(), view.clone());
        view
    }

    /// Watches a view, and asks for its SVIDs if some are missing.
    pub(crate) fn subscribe(&self, view: &Arc<View>) -> Subscription {
        view.touch(self.clock.now_ms());
        let subscription = view.subscribe();
        if view.now().incomplete {
            self.wanted.notify_one();
        }
        subscription
    }

    /// All bundles, now and whenever one changes.
    pub(crate) fn bundles(&self) -> watch::Receiver<Bundles> {
        self.bundles.subscribe()
    }

    /// Returns when a workload waits for an SVID.
    pub(crate) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Returns when there is something else than at the last time. For one waiter.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Returns when there may be something else for SVID stores. For one waiter.
    pub(crate) async fn to_store(&self) {
        self.to_store.notified().await;
    }

    /// Entries that a stream watches now.
    pub(crate) fn in_use(&self) -> HashSet<EntryId> {
        let views = self.views();
        let watched = views.by_selectors.values().filter(|v| v.is_watched());
        watched.flat_map(|v| v.now().records().iter().map(|r| r.entry.id.clone()).collect::<Vec<_>>()).collect()
    }

    /// Drops views that nobody has held for a while.
    pub(crate) fn forget_idle_views(&self) {
        let now_ms = self.clock.now_ms();
        let kept = |view: &Arc<View>| Arc::strong_count(view) > 1 || now_ms - view.last_used_ms() < VIEW_IDLE_MS;
        self.views().by_selectors.retain(|_, view| kept(view));
    }

    /// Ends all streams, now and from now on.
    pub(crate) fn close(&self) {
        let mut views = self.views();
        views.closed = true;
        let snapshot = self.snapshot.load();
        views.by_selectors.values().for_each(|v| v.refresh(&snapshot, true));
    }
}

/// Trusts only its own trust domain: the agent speaks with no one else.
impl BundleSource for Cache {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        let snapshot = self.snapshot.load();
        let own = &snapshot.bundles.own;
        (own.bundle.trust_domain.as_str() == trust_domain).then(|| own.roots.clone())
    }
}

/// The only one who changes the cache.
pub(crate) struct CacheWriter {
    cache: Arc<Cache>,
}

/// What the server said that differs from before.
#[derive(Default)]
pub(crate) struct Change {
    /// All entries in order of their IDs, if any of them changed; unchanged ones as the same `Arc`.
    pub(crate) entries: Option<Vec<Arc<WorkloadEntry>>>,
    /// All bundles, if any of them changed; unchanged ones as the same `Arc`.
    pub(crate) bundles: Option<Bundles>,
    /// New SVIDs.
    pub(crate) svids: Vec<(EntryId, Arc<WorkloadSvid>)>,
    /// SVIDs that are to be forgotten.
    pub(crate) evict: HashSet<EntryId>,
}

impl Change {
    fn is_empty(&self) -> bool {
        let Self { entries, bundles, svids, evict } = self;
        entries.is_none() && bundles.is_none() && svids.is_empty() && evict.is_empty()
    }
}

impl CacheWriter {
    /// The readers' side.
    pub(crate) fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Publishes the state after `change`, then wakes those whom it concerns.
    pub(crate) fn publish(&mut self, change: Change) {
        if change.is_empty() {
            return; // most syncs: nobody is to look, and nothing to be written
        }
        let old = self.cache.snapshot();
        let bundles_changed = change.bundles.is_some();
        let new = Arc::new(apply(&old, change));
        let views = self.cache.views();
        self.cache.snapshot.store(new.clone());
        let concerns = Concerns::between(&old, &new);
        let closed = views.closed;
        views.by_selectors.values().filter(|v| concerns.view(v)).for_each(|v| v.refresh(&new, closed));
        if bundles_changed {
            self.cache.bundles.send_replace(new.bundles.clone());
        }
        self.cache.changed.notify_one();
        self.cache.to_store.notify_one();
    }
}

fn apply(old: &Snapshot, change: Change) -> Snapshot {
    let Change { entries, bundles, svids, evict } = change;
    let mut index = old.index.clone();
    let mut records = match entries {
        None => old.records.to_vec(),
        Some(entries) => {
            let keep = |entry: Arc<WorkloadEntry>| match old.record(&entry.id) {
                Some(record) => {
                    Record { svid: record.svid.clone().filter(|s| s.is_for(&entry)), entry, ..record.clone() }
                }
                None => Record::new(entry),
            };
            let records: Vec<Record> = entries.into_iter().map(keep).collect();
            index = Arc::new(SelectorIndex::new(records.iter().map(|r| r.entry.as_ref())));
            records
        }
    };
    for record in records.iter_mut().filter(|r| evict.contains(&r.entry.id)) {
        record.svid = None;
    }
    for (id, svid) in svids {
        if let Ok(at) = records.binary_search_by(|r| r.entry.id.cmp(&id))
            && let Some(record) = records.get_mut(at)
            && svid.is_for(&record.entry)
        {
            record.svid = Some(svid);
        }
    }
    Snapshot { records: records.into(), index, bundles: bundles.unwrap_or_else(|| old.bundles.clone()) }
}

/// Whom a change concerns.
struct Concerns {
    all: bool,
    selectors: Vec<Arc<WorkloadEntry>>,
}

impl Concerns {
    fn between(old: &Snapshot, new: &Snapshot) -> Self {
        let mut all = !Arc::ptr_eq(&old.bundles.own, &new.bundles.own);
        let bundle_changed = |td: &TrustDomain| match (old.bundles.federated.get(td), new.bundles.federated.get(td)) {
            (Some(a), Some(b)) => !Arc::ptr_eq(a, b),
            (None, None) => false,
            _ => true,
        };
        let mut selectors = Vec::new();
        for record in new.records.iter() {
            let same = old.record(&record.entry.id).is_some_and(|before| {
                Arc::ptr_eq(&before.entry, &record.entry)
                    && before.svid.as_ref().map(Arc::as_ptr) == record.svid.as_ref().map(Arc::as_ptr)
            });
            if !same || record.entry.federates_with.iter().any(bundle_changed) {
                selectors.push(record.entry.clone());
            }
        }
        // Entries that are gone or changed: whoever matched them before.
        let gone = old.records.iter().filter(|before| {
            new.record(&before.entry.id).is_none_or(|after| !Arc::ptr_eq(&before.entry, &after.entry))
        });
        selectors.extend(gone.map(|r| r.entry.clone()));
        all |= selectors.len() > CHANGES_LOOKED_AT;
        Self { all, selectors }
    }

    fn view(&self, view: &View) -> bool {
        self.all || self.selectors.iter().any(|e| e.selectors.is_subset_of(&view.selectors))
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
