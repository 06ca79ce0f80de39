//! The bundles in memory: the trust domain's own and those it federates with. One writer, readers that take no lock.
//!
//! The datastore is written first, always; then the feed hears of it, by [`BundleFeed::publish_since`] with what the datastore
//! returned (own bundle: its sequence number tells old from new), or by [`BundleFeed::refresh`], which reads it again.
//! TLS, the API, and later publishers, notifiers and the federation endpoint read here.

mod lost;

pub(crate) use lost::{Lost, Name, join, split};

use crate::authority::{AuthorityStore, KeyIds};
use arc_swap::ArcSwap;
use finial_core::{Bundle, TrustDomain};
use finial_crypto::bundle::readable;
use finial_crypto::tls::BundleSource;
use finial_crypto::{Certificate, TrustRoots};
use finial_runtime::Shutdown;
use finial_store::{Listed, Page, StoreError};
use lost::Arrivals;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// After a refresh failed, everything is read again this often until that works.
const RETRY: Duration = Duration::from_secs(5);

/// A bundle with what readers need of it ready-made.
pub struct PublishedBundle {
    /// The bundle.
    pub bundle: Bundle,
    /// Its X.509 authorities, parsed; `None` when none can be read.
    pub roots: Option<Arc<TrustRoots>>,
    /// As the datastore has it, where that is not as `bundle` has it.
    stored: Option<Box<Bundle>>,
}

/// What this server's own authorities hang from. As long as they sign, the own bundle does not show it as tainted: agents
/// that are told so renew their SVIDs at once, and only once, and would get them from the same authority again.
#[derive(Default, PartialEq, Eq)]
pub(crate) struct Shield {
    pub(crate) x509: KeyIds,
    pub(crate) jwt: String,
    pub(crate) wit: String,
}

impl Shield {
    /// What is shown of a bundle, where it is not all that is stored.
    fn cover(&self, stored: &Bundle) -> Option<Bundle> {
        let key_id = |der: &Arc<[u8]>| Certificate::parse(der.clone()).ok()?.subject_key_id().map(<[u8]>::to_vec);
        let mut shown = stored.clone();
        for root in shown.x509_authorities.iter_mut().filter(|root| root.tainted) {
            root.tainted = !key_id(&root.der).is_some_and(|id| self.x509.include(&id));
        }
        for (keys, active) in [(&mut shown.jwt_authorities, &self.jwt), (&mut shown.wit_authorities, &self.wit)] {
            keys.iter_mut().filter(|key| key.key_id == *active).for_each(|key| key.tainted = false);
        }
        (shown != *stored).then_some(shown)
    }
}

impl PublishedBundle {
    /// The own bundle.
    fn own(stored: Bundle, shield: &Shield) -> Self {
        match shield.cover(&stored) {
            Some(shown) => Self { stored: Some(Box::new(stored)), ..Self::new(shown) },
            None => Self::new(stored),
        }
    }

    /// As the datastore has it: what is tainted there is tainted.
    pub(crate) fn stored(&self) -> &Bundle {
        self.stored.as_deref().unwrap_or(&self.bundle)
    }

    fn new(bundle: Bundle) -> Self {
        let (readable, unusable) = readable(&bundle);
        for error in unusable {
            tracing::error!(trust_domain_id = %bundle.trust_domain, %error, "Unusable authority in bundle");
        }
        Self { roots: TrustRoots::from_bundle(&readable).ok().map(Arc::new), bundle, stored: None }
    }
}

/// What a change of the bundles goes by.
#[derive(Default)]
struct Writing {
    shield: Shield,
    /// Grows with each change of the datastore's history.
    history: u64,
    /// The own bundle as it was in another history of the datastore: its sequence number says nothing of what is read now.
    before: Option<Bundle>,
    /// What this history lost of it, or may have, while nobody has seen to that.
    lost: Option<Lost>,
    arrivals: Arrivals,
}

impl Writing {
    /// The own bundle of this history is there: whether it is the first, before which nothing counts.
    fn settle(&mut self, now: Option<&Bundle>) -> bool {
        let Some(before) = self.before.take() else { return false };
        self.lost = Some(Lost::of(&before, now, &self.arrivals));
        self.arrivals = Arrivals::default();
        true
    }
}

/// What was to be read and was not, when this goes: it is stale.
struct Unread<'a>(Option<&'a AtomicBool>);

impl Unread<'_> {
    fn was_read(mut self) {
        self.0 = None;
    }
}

impl Drop for Unread<'_> {
    fn drop(&mut self) {
        if let Some(stale) = self.0 {
            stale.store(true, Ordering::Relaxed);
        }
    }
}

/// By bare trust domain name.
type Bundles = BTreeMap<Box<str>, Arc<PublishedBundle>>;

/// By trust domain.
type Rows = BTreeMap<TrustDomain, i64>;

/// The bundles in memory.
pub struct BundleFeed {
    store: Arc<dyn AuthorityStore>,
    own: TrustDomain,
    bundles: ArcSwap<Bundles>,
    heard: ArcSwap<BTreeSet<Name>>,
    /// The datastore's row IDs of the bundles, as far as they were read.
    rows: Mutex<Rows>,
    /// Held while the map is replaced, never across an await.
    writing: Mutex<Writing>,
    /// Held while a bundle is read again, so that an older reading never replaces a newer one.
    refreshing: tokio::sync::Mutex<()>,
    stale: AtomicBool,
    changes: watch::Sender<u64>,
}

impl BundleFeed {
    /// Reads all bundles.
    pub async fn open(store: Arc<dyn AuthorityStore>, own: TrustDomain) -> Result<Arc<Self>, StoreError> {
        let feed = Self {
            store,
            own,
            bundles: ArcSwap::default(),
            heard: ArcSwap::default(),
            rows: Mutex::default(),
            writing: Mutex::default(),
            refreshing: tokio::sync::Mutex::new(()),
            stale: AtomicBool::new(false),
            changes: watch::Sender::new(0),
        };
        feed.reload().await?;
        Ok(Arc::new(feed))
    }

    /// The trust domain that this server serves.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.own
    }

    /// The own bundle; there is none before the first authority was made.
    pub fn own(&self) -> Option<Arc<PublishedBundle>> {
        self.bundle(self.own.as_str())
    }

    /// The bundle of a trust domain, by its bare name.
    pub fn bundle(&self, trust_domain: &str) -> Option<Arc<PublishedBundle>> {
        self.bundles.load().get(trust_domain).cloned()
    }

    /// All bundles, by bare trust domain name, the own one included.
    pub fn all(&self) -> Arc<BTreeMap<Box<str>, Arc<PublishedBundle>>> {
        self.bundles.load_full()
    }

    /// The bundles as the datastore lists them, in its order and with its tokens; `away` if it is known not to answer.
    pub async fn list(&self, page: Option<&Page>, away: bool) -> Result<Listed<Arc<PublishedBundle>>, StoreError> {
        let after = page.map_or(Ok(0), Page::after)?;
        let bundles = self.bundles.load_full();
        let unread = |rows: &Rows| bundles.values().any(|one| !rows.contains_key(&one.bundle.trust_domain));
        if !away
            && unread(&self.rows())
            && let Ok(rows) = self.store.bundle_rows().await
        {
            *self.rows() = rows.into_iter().collect();
        }
        let rows = self.rows();
        // Those whose rows could not be read are new, so that they come last.
        let mut last = rows.values().copied().max().unwrap_or(0);
        let row_of = |bundle| {
            let known: &Arc<PublishedBundle> = bundle;
            let row = rows.get(&known.bundle.trust_domain).copied().unwrap_or_else(|| {
                last = last.saturating_add(1);
                last
            });
            (row, known)
        };
        let mut chosen: Vec<_> = bundles.values().map(row_of).filter(|(row, _)| *row > after).collect();
        chosen.sort_by_key(|(row, _)| *row);
        if let Some(page) = page {
            chosen.truncate(usize::try_from(page.size).unwrap_or(usize::MAX));
        }
        let last = chosen.last().map(|(row, _)| *row);
        Ok(Listed::new(chosen.into_iter().map(|(_, bundle)| bundle.clone()).collect(), page, last))
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of each change; the number only grows.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Which history of the datastore this is: asked before a write, for [`BundleFeed::publish_since`].
    pub fn history(&self) -> u64 {
        self.writing().history
    }

    #[cfg(test)]
    pub(crate) fn publish(&self, bundle: Bundle) {
        self.publish_since(self.history(), bundle);
    }

    /// Takes the own bundle as the datastore returned it from a write that began in this history; an older one than is known
    /// changes nothing. The answer of another history is read again.
    pub fn publish_since(&self, begun: u64, bundle: Bundle) {
        let name = bundle.trust_domain.as_str().to_owned();
        self.update(|bundles, writing| {
            if writing.history != begun {
                self.stale.store(true, Ordering::Relaxed);
                return;
            }
            let first = writing.settle(Some(&bundle));
            let known = bundles.get(name.as_str()).filter(|_| !first);
            if known.is_none_or(|known| known.bundle.sequence_number <= bundle.sequence_number) {
                if !first {
                    writing.arrivals.note(known.map(|known| known.stored()), &bundle);
                }
                bundles.insert(name.into(), Arc::new(PublishedBundle::own(bundle, &writing.shield)));
            }
        });
    }

    /// The datastore has another history now: what is read of the own bundle from here on holds, however much newer the
    /// known one was. Until then that stays.
    pub fn start_anew(&self) {
        let mut writing = self.writing();
        writing.history += 1;
        let Some(own) = self.own() else { return };
        let mut before = own.stored().clone();
        // What another change took is not there again yet.
        if let Some(lost) = &writing.lost {
            lost.add_to(&mut before);
        }
        writing.before = Some(before);
    }

    fn writing(&self) -> MutexGuard<'_, Writing> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Authorities of the own bundle that a change of the datastore's history took, until they are
    /// [`restored`](BundleFeed::restored); there may be none among them.
    pub(crate) fn lost(&self) -> Option<Lost> {
        self.writing().lost.clone()
    }

    /// What was unclear of the lost authorities is decided.
    pub(crate) fn decided(&self, lost: &Lost, decided: Lost) {
        if let Some(now) = self.writing().lost.as_mut().filter(|now| *now == lost) {
            *now = decided;
        }
    }

    /// What of the lost authorities was to be added again is there.
    pub(crate) fn restored(&self, lost: &Lost) {
        self.writing().lost.take_if(|now| now == lost);
    }

    /// Keys that an answer from above does not bring into the own bundle (again).
    pub(crate) fn heard(&self) -> Arc<BTreeSet<Name>> {
        self.heard.load_full()
    }

    pub(crate) fn set_heard(&self, heard: BTreeSet<Name>) {
        self.heard.store(Arc::new(heard));
    }

    /// Says what the authorities hang from that sign now.
    pub(crate) fn shield(&self, shield: Shield) {
        let mut writing = self.writing();
        if writing.shield == shield {
            return;
        }
        writing.shield = shield;
        let Some(own) = self.own() else { return };
        let shown = PublishedBundle::own(own.stored().clone(), &writing.shield);
        if shown.bundle != own.bundle || shown.stored != own.stored {
            let mut bundles = Bundles::clone(&self.bundles.load());
            bundles.insert(self.own.as_str().into(), Arc::new(shown));
            self.bundles.store(Arc::new(bundles));
            self.changes.send_modify(|n| *n += 1);
        }
    }

    /// Reads one bundle again; call it after each write of it. On failure, or when the caller goes away, what is known stays,
    /// and is read again later.
    pub async fn refresh(&self, trust_domain: &TrustDomain) -> Result<(), StoreError> {
        let unread = Unread(Some(&self.stale));
        let _order = self.refreshing.lock().await;
        let begun = self.history();
        let found = self.store.bundle(trust_domain).await?;
        unread.was_read();
        if found.is_none() {
            self.rows().remove(trust_domain);
        }
        self.update(|bundles, writing| {
            if writing.history != begun {
                self.stale.store(true, Ordering::Relaxed);
                return;
            }
            let first = *trust_domain == self.own && writing.settle(found.as_ref());
            if !first && found.as_ref().is_some_and(|bundle| self.newer(bundles, bundle).is_some()) {
                return;
            }
            if let Some(bundle) = found.as_ref().filter(|_| !first) {
                self.note_arrivals(bundles, writing, bundle);
            }
            match found.map(|bundle| self.published(bundle, &writing.shield)) {
                Some(published) => bundles.insert(trust_domain.as_str().into(), published),
                None => bundles.remove(trust_domain.as_str()),
            };
        });
        Ok(())
    }

    /// The same for who has stored it already, and can only wait.
    pub async fn refresh_or_later(&self, trust_domain: &TrustDomain) {
        if let Err(error) = self.refresh(trust_domain).await {
            tracing::warn!(trust_domain_id = %trust_domain, %error, "Bundle will be read again");
        }
    }

    /// Reads all bundles again.
    pub async fn reload(&self) -> Result<(), StoreError> {
        let unread = Unread(Some(&self.stale));
        let _order = self.refreshing.lock().await;
        let begun = self.history();
        let (all, rows) = self.read().await?;
        unread.was_read();
        *self.rows() = rows;
        self.stale.store(false, Ordering::Relaxed);
        self.update(|bundles, writing| {
            if writing.history != begun {
                self.stale.store(true, Ordering::Relaxed);
                return;
            }
            let first = writing.settle(all.iter().find(|bundle| bundle.trust_domain == self.own));
            let named = |bundle: Bundle| {
                let name = bundle.trust_domain.as_str().into();
                let newer = if first { None } else { self.newer(bundles, &bundle) };
                if !first && newer.is_none() {
                    self.note_arrivals(bundles, writing, &bundle);
                }
                (name, newer.unwrap_or_else(|| self.published(bundle, &writing.shield)))
            };
            *bundles = all.into_iter().map(named).collect();
        });
        Ok(())
    }

    /// All bundles of the datastore. One that cannot be read is not among them, and that is an error for the own one.
    async fn read(&self) -> Result<(Vec<Bundle>, Rows), StoreError> {
        let mut all = self.store.bundles().await?;
        if !all.iter().any(|bundle| bundle.trust_domain == self.own) {
            all.extend(self.store.bundle(&self.own).await?);
        }
        Ok((all, self.store.bundle_rows().await?.into_iter().collect()))
    }

    /// The own bundle that is known when it is newer than one that was read: it was published meanwhile.
    fn newer(&self, bundles: &Bundles, read: &Bundle) -> Option<Arc<PublishedBundle>> {
        let known = bundles.get(self.own.as_str()).filter(|_| read.trust_domain == self.own)?;
        (known.bundle.sequence_number > read.sequence_number).then(|| known.clone())
    }

    /// Of the own bundle, before it is replaced by what was read.
    fn note_arrivals(&self, bundles: &Bundles, writing: &mut Writing, read: &Bundle) {
        if read.trust_domain == self.own {
            writing.arrivals.note(bundles.get(self.own.as_str()).map(|known| known.stored()), read);
        }
    }

    fn published(&self, bundle: Bundle, shield: &Shield) -> Arc<PublishedBundle> {
        let own = bundle.trust_domain == self.own;
        Arc::new(if own { PublishedBundle::own(bundle, shield) } else { PublishedBundle::new(bundle) })
    }

    /// Repairs what a failed refresh left, until shutdown.
    pub async fn run(self: Arc<Self>, shutdown: Shutdown) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
            if self.stale.load(Ordering::Relaxed)
                && let Err(error) = self.reload().await
            {
                tracing::error!(%error, "Failed to read bundles from the datastore; trying again");
            }
        }
    }

    fn update(&self, change: impl FnOnce(&mut Bundles, &mut Writing)) {
        let mut writing = self.writing();
        let mut bundles = Bundles::clone(&self.bundles.load());
        change(&mut bundles, &mut writing);
        self.bundles.store(Arc::new(bundles));
        self.changes.send_modify(|n| *n += 1);
    }
}

impl BundleSource for BundleFeed {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        self.bundles.load().get(trust_domain).and_then(|b| b.roots.clone())
    }
}

#[cfg(test)]
#[path = "publish_tests.rs"]
mod tests;
