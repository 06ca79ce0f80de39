//! SVIDs for workloads that cannot ask an agent: an entry with `store_svid` names an SVID store by the type of its selectors.
//!
//! Whatever is published in the cache is compared with what the stores were given; what differs is put there, and what is
//! no longer to be there is deleted. What fails is tried again. A restarted agent does not know what it stored before: it
//! puts all anew, and leaves what lost its entry meanwhile, as SPIRE's does.

use crate::Context;
use crate::cache::{BundleForms, Cache, Record, Snapshot, WorkloadSvid};
use crate::entry::WorkloadEntry;
use finial_core::{EntryId, ErrorKind, Secret};
use finial_crypto::Certificate;
use finial_plugin::{PluginError, PluginKind, StoredSvid, SvidStore};
use finial_runtime::{Backoff, Metrics, Shutdown};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// As log lines say it.
const SUBSYSTEM: &str = "svid_store";
/// How long one call of a store may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// After a failure all that is left is tried again: at first, and at most, which is SPIRE's pace.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));

/// Where an SVID is kept: the store's name, and what the store is told.
type Place = (String, Vec<String>);

/// What was stored for an entry.
struct Stored {
    place: Place,
    entry: Arc<WorkloadEntry>,
    svid: Arc<WorkloadSvid>,
    own: Arc<BundleForms>,
    federated: Vec<Arc<BundleForms>>,
}

/// The task that keeps the stores up to date.
pub(crate) struct StoreService {
    stores: BTreeMap<String, Arc<dyn SvidStore>>,
    cache: Arc<Cache>,
    metrics: Metrics,
    stored: BTreeMap<EntryId, Stored>,
    /// What is still to be deleted.
    leftovers: BTreeMap<Place, Arc<WorkloadEntry>>,
    /// Entries whose selectors name no store, each told once.
    told: BTreeSet<(EntryId, i64)>,
}

impl StoreService {
    pub(crate) fn new(context: &Context, cache: Arc<Cache>) -> Self {
        let named = |store: &Arc<dyn SvidStore>| (store.name().to_owned(), store.clone());
        Self {
            stores: context.plugins.svid_stores.iter().map(named).collect(),
            cache,
            metrics: context.metrics.clone(),
            stored: BTreeMap::new(),
            leftovers: BTreeMap::new(),
            told: BTreeSet::new(),
        }
    }

    /// Runs until the shutdown.
    pub(crate) async fn run(mut self, shutdown: Shutdown) {
        let mut retry = Backoff::new(RETRY.0, RETRY.1).shape(1.5, 0.1);
        loop {
            let complete = tokio::select! {
                complete = self.round() => complete,
                () = shutdown.cancelled() => return,
            };
            let again = async {
                if complete {
                    retry.reset();
                    self.cache.to_store().await;
                } else {
                    // Whatever changes meanwhile: a store that fails is not asked more often for it.
                    tokio::time::sleep(retry.next_wait()).await;
                }
            };
            tokio::select! {
                () = again => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Brings all stores up to date. Whether nothing failed.
    async fn round(&mut self) -> bool {
        let snapshot = self.cache.snapshot();
        if snapshot.for_stores().next().is_none() && self.stored.is_empty() && self.leftovers.is_empty() {
            return true;
        }
        let call = self.metrics.call("store.store_svid_updates");
        let wanted = self.wanted(&snapshot);
        self.find_leftovers(&wanted);
        let mut complete = self.delete_leftovers().await;
        for (place, record) in wanted {
            complete &= self.put(place, record, &snapshot).await;
        }
        call.finish("OK");
        complete
    }

    /// What is to be stored, and where.
    fn wanted<'a>(&mut self, snapshot: &'a Snapshot) -> Vec<(Place, &'a Record)> {
        let mut wanted = Vec::new();
        let mut told = BTreeSet::new();
        for record in snapshot.for_stores() {
            let entry = &record.entry;
            let place = place(entry).filter(|(store, _)| self.stores.contains_key(store));
            if let Some(place) = place {
                wanted.push((place, record));
                continue;
            }
            let key = (entry.id.clone(), entry.revision_number);
            if !self.told.contains(&key) {
                let store = entry.selectors.parts().next().map(|(kind, _)| kind).unwrap_or_default();
                tracing::error!(
                    subsystem_name = SUBSYSTEM,
                    entry = %entry.id,
                    spiffe_id = %entry.spiffe_id,
                    svid_store = store,
                    "Error storing SVID: the entry's selectors must be of one type, which names a configured SVIDStore"
                );
            }
            told.insert(key);
        }
        self.told = told;
        wanted
    }

    /// Notes what lies where nothing is to lie any more.
    fn find_leftovers(&mut self, wanted: &[(Place, &Record)]) {
        let places: BTreeMap<&EntryId, &Place> = wanted.iter().map(|(place, r)| (&r.entry.id, place)).collect();
        let gone: Vec<EntryId> = self
            .stored
            .iter()
            .filter(|(id, stored)| places.get(id).is_none_or(|place| **place != stored.place))
            .map(|(id, _)| id.clone())
            .collect();
        for stored in gone.iter().filter_map(|id| self.stored.remove(id)) {
            self.leftovers.insert(stored.place, stored.entry);
        }
        // What is put there now takes its place.
        for place in places.values() {
            self.leftovers.remove(*place);
        }
    }

    async fn delete_leftovers(&mut self) -> bool {
        let mut left = BTreeMap::new();
        for (place, entry) in std::mem::take(&mut self.leftovers) {
            let Some(store) = self.stores.get(&place.0) else { continue };
            let outcome = within(PluginKind::SvidStore, &place.0, store.delete(&place.1)).await;
            match outcome {
                Ok(()) => {
                    tracing::debug!(subsystem_name = SUBSYSTEM, entry = %entry.id, spiffe_id = %entry.spiffe_id, svid_store = place.0, "SVID deleted successfully");
                }
                Err(error) if error.kind == ErrorKind::InvalidArgument => {
                    tracing::debug!(subsystem_name = SUBSYSTEM, %error, entry = %entry.id, spiffe_id = %entry.spiffe_id, svid_store = place.0, "Failed to delete SVID because of malformed selectors");
                }
                Err(error) => {
                    tracing::error!(subsystem_name = SUBSYSTEM, %error, entry = %entry.id, spiffe_id = %entry.spiffe_id, svid_store = place.0, "Failed to delete SVID");
                    left.insert(place, entry);
                }
            }
        }
        let complete = left.is_empty();
        self.leftovers.append(&mut left);
        complete
    }

    async fn put(&mut self, place: Place, record: &Record, snapshot: &Snapshot) -> bool {
        let entry = &record.entry;
        let Some(svid) = &record.svid else { return true }; // it is being asked for
        let own = snapshot.bundles.own.clone();
        let known = |td| snapshot.bundles.federated.get(td).cloned();
        let federated: Vec<_> = entry.federates_with.iter().filter_map(known).collect();
        let same = |stored: &Stored| {
            Arc::ptr_eq(&stored.svid, svid)
                && Arc::ptr_eq(&stored.own, &own)
                && stored.federated.len() == federated.len()
                && stored.federated.iter().zip(&federated).all(|(a, b)| Arc::ptr_eq(a, b))
        };
        if self.stored.get(&entry.id).is_some_and(same) {
            return true;
        }
        let Some(store) = self.stores.get(&place.0) else { return true };
        let put = async { store.put(&value(svid, &own, &federated)?, &place.1).await };
        let outcome = within(PluginKind::SvidStore, &place.0, put).await;
        match outcome {
            Ok(()) => {
                tracing::debug!(subsystem_name = SUBSYSTEM, entry = %entry.id, spiffe_id = %entry.spiffe_id, revision_number = entry.revision_number, svid_store = place.0, "SVID stored successfully");
                let stored = Stored { place, entry: entry.clone(), svid: svid.clone(), own, federated };
                self.stored.insert(entry.id.clone(), stored);
                true
            }
            Err(error) => {
                tracing::error!(subsystem_name = SUBSYSTEM, %error, entry = %entry.id, spiffe_id = %entry.spiffe_id, revision_number = entry.revision_number, svid_store = place.0, "Failed to put X509-SVID");
                false
            }
        }
    }
}

/// Where an entry wants its SVID; None if its selectors are of several types.
fn place(entry: &WorkloadEntry) -> Option<Place> {
    let parts = || entry.selectors.parts();
    let (store, _) = parts().next()?;
    let values = || parts().map(|(_, value)| value.to_owned()).collect();
    parts().all(|(kind, _)| kind == store).then(|| (store.to_owned(), values()))
}

fn value(svid: &WorkloadSvid, own: &BundleForms, federated: &[Arc<BundleForms>]) -> Result<StoredSvid, PluginError> {
    let roots = |forms: &BundleForms| forms.roots.certificates().iter().map(|c| c.der().clone()).collect::<Vec<_>>();
    let chain = Certificate::parse_chain(&svid.chain)
        .map_err(|e| PluginError::internal(format!("failed to parse record: {e}")).because(e))?;
    Ok(StoredSvid {
        spiffe_id: svid.id.clone(),
        cert_chain: chain.iter().map(|c| c.der().clone()).collect(),
        private_key: Secret::new(svid.key.to_vec()),
        bundle: roots(own),
        federated_bundles: federated
            .iter()
            .map(|forms| (forms.bundle.trust_domain.as_str().to_owned(), roots(forms)))
            .collect(),
        expires_at: svid.not_after,
    })
}

/// With a deadline, and saying whose error it is.
async fn within(
    kind: PluginKind,
    name: &str,
    call: impl Future<Output = Result<(), PluginError>>,
) -> Result<(), PluginError> {
    let late = || Err(PluginError::new(ErrorKind::Timeout, format!("no answer within {} s", DEADLINE.as_secs())));
    tokio::time::timeout(DEADLINE, call).await.unwrap_or_else(|_| late()).map_err(|e| e.of(kind, name))
}
