//! Who hears of changes: the agents with an open stream, and which of them a change concerns.
//!
//! A change is a list of IDs to look at again. It is put aside for each agent that could have had one of the entries before
//! or may have it after ([`affected`]); the agent's [`stream`] looks them up when it gets to send. So what waits for a slow
//! agent is bounded ([`PENDING_MAX`]), and many changes of one entry become one answer.

mod affected;
mod bundles;
mod stream;

pub use stream::{Opening, WatchStream};

use crate::entries::{Index, IndexObserver};
use crate::nodes::NodesObserver;
use crate::publish::BundleFeed;
use affected::Roots;
use bundles::WireBundles;
use finial_core::{Clock, SelectorSet, SpiffeId, UnixSeconds};
use finial_proto::sync::BundleVersion;
use finial_runtime::Shutdown;
use futures::task::AtomicWaker;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// IDs that wait for one agent. With more it is cheaper that the agent compares all that it has.
const PENDING_MAX: usize = 1024;
/// Streams of one agent; a newer one ends the oldest. A second comes with a new SVID or after a lost connection.
const PER_AGENT_MAX: usize = 2;
/// How often it is looked for agents whose SVID has ended.
const EXPIRY: Duration = Duration::from_secs(15);

/// IDs to look at again; `None` = all.
type Ids = Option<Arc<[Box<str>]>>;

/// All open streams.
pub struct Watchers {
    open: Mutex<Open>,
    count: AtomicUsize,
    closed: AtomicBool,
    /// How many changes there were.
    revision: AtomicU64,
    /// What [`IndexObserver::before`] found, until the change is made.
    before: Mutex<Vec<(Arc<Watcher>, Ids)>>,
    bundles: WireBundles,
    hasher: RandomState,
}

#[derive(Default)]
struct Open {
    /// In no order; each knows its place.
    seats: Vec<Arc<Watcher>>,
    /// By the path of the agent's ID, oldest first.
    by_agent: HashMap<Box<str>, Vec<Arc<Watcher>>>,
}

/// One open stream, as seen from where changes come.
struct Watcher {
    agent: SpiffeId,
    selectors: Arc<SelectorSet>,
    /// One bit for each selector, of 64: who lacks a bit of an alias's lacks the alias.
    traits: u64,
    not_after: UnixSeconds,
    seat: AtomicUsize,
    pending: Mutex<Pending>,
    waker: AtomicWaker,
}

/// What the stream has to look at.
#[derive(Default)]
struct Pending {
    ids: Vec<Arc<[Box<str>]>>,
    count: usize,
    /// Bundles changed.
    bundles: bool,
    /// The agent changed.
    agent: bool,
    /// More than can be told.
    everything: bool,
    /// A newer stream of the agent took its place.
    displaced: bool,
    /// The server ends.
    closing: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watcher {
    fn tell(&self, change: impl FnOnce(&mut Pending)) {
        change(&mut lock(&self.pending));
        self.waker.wake();
    }

    fn look_at(&self, ids: &Ids) {
        self.tell(|pending| match ids {
            // Before and after a change they are mostly the same.
            Some(ids) if pending.ids.last() == Some(ids) => {}
            Some(ids) if pending.count + ids.len() <= PENDING_MAX && !pending.everything => {
                pending.count += ids.len();
                pending.ids.push(ids.clone());
            }
            _ => {
                pending.everything = true;
                pending.ids = Vec::new();
            }
        });
    }

    /// Takes what there is to look at; what decides whether the stream goes on is left.
    fn take(&self) -> Pending {
        let mut pending = lock(&self.pending);
        let Pending { agent, displaced, closing, .. } = *pending;
        std::mem::replace(&mut pending, Pending { agent, displaced, closing, ..Pending::default() })
    }
}

impl Watchers {
    /// Without streams.
    pub fn new(feed: Arc<BundleFeed>) -> Arc<Self> {
        Arc::new(Self {
            open: Mutex::default(),
            count: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            revision: AtomicU64::new(0),
            before: Mutex::default(),
            bundles: WireBundles::new(feed),
            hasher: RandomState::new(),
        })
    }

    /// How many streams are open.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// The number of the own bundle, if an agent with these has it as it is now.
    pub(crate) fn has_own(&self, theirs: &[BundleVersion]) -> Option<u64> {
        let (now, name) = (self.bundles.now(), self.bundles.own());
        let own = now.get(name)?;
        let has = theirs.iter().any(|their| their.trust_domain == name && their.version == own.version);
        has.then_some(own.proto.sequence_number)
    }

    fn revision(&self) -> u64 {
        self.revision.load(Ordering::Relaxed)
    }

    fn traits(&self, selectors: &SelectorSet) -> u64 {
        selectors.iter().fold(0, |bits, selector| bits | 1 << (self.hasher.hash_one(selector) % 64))
    }

    fn register(&self, agent: SpiffeId, selectors: Arc<SelectorSet>, not_after: UnixSeconds) -> Arc<Watcher> {
        let watcher = Arc::new(Watcher {
            traits: self.traits(&selectors),
            agent,
            selectors,
            not_after,
            seat: AtomicUsize::new(0),
            // What the caller knows of the agent may have changed before this one could hear of it.
            pending: Mutex::new(Pending { agent: true, ..Pending::default() }),
            waker: AtomicWaker::new(),
        });
        let mut open = lock(&self.open);
        watcher.seat.store(open.seats.len(), Ordering::Relaxed);
        open.seats.push(watcher.clone());
        self.count.store(open.seats.len(), Ordering::Relaxed);
        let same = open.by_agent.entry(watcher.agent.path().into()).or_default();
        same.push(watcher.clone());
        if self.closed.load(Ordering::SeqCst) {
            watcher.tell(|pending| pending.closing = true);
        }
        let surplus = same.len().saturating_sub(PER_AGENT_MAX);
        for oldest in same.iter().take(surplus) {
            oldest.tell(|pending| pending.displaced = true);
        }
        watcher
    }

    fn forget(&self, watcher: &Arc<Watcher>) {
        let mut open = lock(&self.open);
        let seat = watcher.seat.load(Ordering::Relaxed);
        if seat < open.seats.len() {
            open.seats.swap_remove(seat);
        }
        if let Some(moved) = open.seats.get(seat) {
            moved.seat.store(seat, Ordering::Relaxed);
        }
        self.count.store(open.seats.len(), Ordering::Relaxed);
        if let Some(same) = open.by_agent.get_mut(watcher.agent.path()) {
            same.retain(|other| !Arc::ptr_eq(other, watcher));
            if same.is_empty() {
                open.by_agent.remove(watcher.agent.path());
            }
        }
    }

    fn all(&self, tell: impl Fn(&mut Pending)) {
        for watcher in &lock(&self.open).seats {
            watcher.tell(&tell);
        }
    }

    /// Those whose entries hang below one of the roots.
    fn below(&self, roots: &Roots) -> Vec<Arc<Watcher>> {
        let open = lock(&self.open);
        let mut found: Vec<_> =
            roots.paths.iter().filter_map(|path| open.by_agent.get(path)).flatten().cloned().collect();
        for selectors in &roots.aliases {
            let traits = self.traits(selectors);
            let has = |w: &&Arc<Watcher>| w.traits & traits == traits && selectors.is_subset_of(&w.selectors);
            found.extend(open.seats.iter().filter(has).cloned());
        }
        found
    }

    fn find(&self, index: &Index, ids: &[&str]) -> Vec<(Arc<Watcher>, Ids)> {
        let mut found = Vec::new();
        for (roots, ids) in affected::of(index, ids, PENDING_MAX) {
            found.extend(self.below(&roots).into_iter().map(|watcher| (watcher, ids.clone())));
        }
        found
    }

    /// Tells of changed bundles and ends streams whose agents' SVIDs have ended, until shutdown.
    pub async fn run(self: Arc<Self>, clock: Arc<dyn Clock>, shutdown: Shutdown) {
        let mut changes = self.bundles.changes();
        let mut tick = tokio::time::interval(EXPIRY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => {
                    self.closed.store(true, Ordering::SeqCst);
                    return self.all(|pending| pending.closing = true);
                }
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    changes.mark_unchanged();
                    self.all(|pending| pending.bundles = true);
                }
                _ = tick.tick() => {
                    let now = clock.now();
                    for watcher in lock(&self.open).seats.iter().filter(|w| w.not_after < now) {
                        watcher.tell(|pending| pending.agent = true);
                    }
                }
            }
        }
    }
}

impl IndexObserver for Watchers {
    fn before(&self, index: &Index, ids: &[&str]) {
        if self.count() > 0 {
            *lock(&self.before) = self.find(index, ids);
        }
    }

    fn after(&self, index: &Index, ids: &[&str]) {
        self.revision.fetch_add(1, Ordering::Relaxed);
        let before = std::mem::take(&mut *lock(&self.before));
        let after = if self.count() > 0 { self.find(index, ids) } else { Vec::new() };
        for (watcher, ids) in before.iter().chain(&after) {
            watcher.look_at(ids);
        }
    }

    fn replaced(&self, _: &Index) {
        self.revision.fetch_add(1, Ordering::Relaxed);
        self.all(|pending| pending.everything = true);
    }
}

impl NodesObserver for Watchers {
    fn agent_changed(&self, agent: &SpiffeId) {
        if let Some(watchers) = lock(&self.open).by_agent.get(agent.path()) {
            watchers.iter().for_each(|watcher| watcher.tell(|pending| pending.agent = true));
        }
    }

    fn agents_replaced(&self) {
        self.all(|pending| pending.agent = true);
    }
}

#[cfg(test)]
mod tests;
