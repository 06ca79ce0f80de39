//! What one set of selectors sees of the cache, with its answers encoded once for all streams.

use super::bundle::BundleForms;
use super::hints::drop_duplicate_hints;
use super::snapshot::{Record, Snapshot, WorkloadSvid};
use super::tls_secret::TlsSecret;
use crate::entry::WorkloadEntry;
use finial_core::SelectorSet;
use finial_crypto::{JwtKeySource, JwtKeys};
use finial_proto::encoded::{Encoded, JwtBundlesResponse, WitBundlesResponse, X509BundlesResponse, X509SvidResponse};
use finial_proto::workload;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;

/// As log lines say it.
const SUBSYSTEM: &str = "cache_manager";

/// An entry that the workload may have, with its SVID.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) entry: Arc<WorkloadEntry>,
    pub(crate) svid: Arc<WorkloadSvid>,
}

/// What the workload may have, at one moment.
#[derive(Debug)]
pub(crate) struct ViewState {
    /// With SVIDs, in order of entry IDs, duplicate hints removed: what FetchX509SVID answers.
    pub(crate) identities: Vec<Identity>,
    /// In order of entry IDs, duplicate hints removed: what FetchJWTSVID answers for.
    pub(crate) entries: Vec<Arc<WorkloadEntry>>,
    /// All that match.
    records: Vec<Record>,
    /// At least one matching entry has no X.509-SVID yet.
    pub(crate) incomplete: bool,
    /// The agent is ending.
    pub(crate) closed: bool,
    own: Arc<BundleForms>,
    federated: Vec<Arc<BundleForms>>,
    x509_svids: OnceLock<X509SvidResponse>,
    x509_bundles: OnceLock<X509BundlesResponse>,
    jwt_bundles: OnceLock<JwtBundlesResponse>,
    wit_bundles: OnceLock<WitBundlesResponse>,
    certificates: OnceLock<Vec<TlsSecret>>,
}

impl ViewState {
    pub(crate) fn new(snapshot: &Snapshot, selectors: &SelectorSet, closed: bool) -> Self {
        let records: Vec<Record> = snapshot.matching(selectors).cloned().collect();
        let with_svid = |r: &Record| Some(Identity { entry: r.entry.clone(), svid: r.svid.clone()? });
        let (identities, _) = drop_duplicate_hints(records.iter().filter_map(with_svid).collect(), |i| &i.entry);
        let (entries, dropped) = drop_duplicate_hints(records.iter().map(|r| r.entry.clone()).collect(), |e| e);
        for entry in dropped {
            tracing::warn!(subsystem_name = SUBSYSTEM, hint = %entry.hint, entry_id = %entry.id, "Ignoring entry with duplicate hint");
        }
        let mut federated = BTreeMap::new();
        for trust_domain in records.iter().flat_map(|r| &r.entry.federates_with) {
            if let Some(bundle) = snapshot.bundles.federated.get(trust_domain) {
                federated.insert(trust_domain, bundle.clone());
            }
        }
        Self {
            identities,
            entries,
            incomplete: records.iter().any(|r| r.svid.is_none()),
            closed,
            own: snapshot.bundles.own.clone(),
            federated: federated.into_values().collect(),
            records,
            x509_svids: OnceLock::new(),
            x509_bundles: OnceLock::new(),
            jwt_bundles: OnceLock::new(),
            wit_bundles: OnceLock::new(),
            certificates: OnceLock::new(),
        }
    }

    /// Whether a workload would notice no difference.
    fn same(&self, other: &Self) -> bool {
        let same_record = |(a, b): (&Record, &Record)| {
            Arc::ptr_eq(&a.entry, &b.entry)
                && match (&a.svid, &b.svid) {
                    (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                    (None, None) => true,
                    _ => false,
                }
        };
        self.closed == other.closed
            && Arc::ptr_eq(&self.own, &other.own)
            && self.records.len() == other.records.len()
            && self.records.iter().zip(&other.records).all(same_record)
            && self.federated.len() == other.federated.len()
            && self.federated.iter().zip(&other.federated).all(|(a, b)| Arc::ptr_eq(a, b))
    }

    /// Whether the workload has an X.509 identity now.
    pub(crate) fn has_identity(&self) -> bool {
        !self.identities.is_empty()
    }

    /// All entries that match, those with duplicate hints included.
    pub(crate) fn records(&self) -> &[Record] {
        &self.records
    }

    /// The answer of FetchX509SVID.
    pub(crate) fn x509_svids(&self) -> &X509SvidResponse {
        self.x509_svids.get_or_init(|| {
            let svid = |identity: &Identity| workload::X509svid {
                spiffe_id: identity.svid.id.as_str().to_owned(),
                x509_svid: identity.svid.chain.clone(),
                x509_svid_key: identity.svid.key.clone(),
                bundle: self.own.x509.clone(),
                hint: identity.entry.hint.clone(),
            };
            Encoded::new_secret(&workload::X509svidResponse {
                svids: self.identities.iter().map(svid).collect(),
                crl: Vec::new(),
                federated_bundles: self.federated.iter().map(|b| (b.id.clone(), b.x509.clone())).collect(),
            })
        })
    }

    /// The bundles that the workload may know: its own, and the federated ones if it has an identity.
    pub(crate) fn bundles(&self) -> impl Iterator<Item = &Arc<BundleForms>> {
        let federated: &[_] = if self.has_identity() { &self.federated } else { &[] };
        std::iter::once(&self.own).chain(federated)
    }

    /// The bundle of our own trust domain.
    pub(crate) fn own_bundle(&self) -> &BundleForms {
        &self.own
    }

    /// The bundles of the trust domains with which the entries that match federate, in order of their names.
    pub(crate) fn federated(&self) -> impl Iterator<Item = &Arc<BundleForms>> {
        self.federated.iter()
    }

    /// The answer of FetchX509Bundles.
    pub(crate) fn x509_bundles(&self) -> &X509BundlesResponse {
        self.x509_bundles.get_or_init(|| {
            let bundles = self.bundles().map(|b| (b.id.clone(), b.x509.clone())).collect();
            Encoded::new(&workload::X509BundlesResponse { crl: Vec::new(), bundles })
        })
    }

    /// The answer of FetchWITBundles.
    pub(crate) fn wit_bundles(&self) -> &WitBundlesResponse {
        self.wit_bundles.get_or_init(|| {
            let bundles = self.bundles().map(|b| (b.id.clone(), b.wit_jwks.clone())).collect();
            Encoded::new(&workload::WitBundlesResponse { bundles })
        })
    }

    /// Key IDs of WIT authorities of our own that are no longer to be used.
    pub(crate) fn tainted_wit(&self) -> Vec<String> {
        self.own.tainted_wit()
    }

    /// The answer of FetchJWTBundles.
    pub(crate) fn jwt_bundles(&self) -> &JwtBundlesResponse {
        self.jwt_bundles.get_or_init(|| {
            let bundles = self.bundles().map(|b| (b.id.clone(), b.jwks.clone())).collect();
            Encoded::new(&workload::JwtBundlesResponse { bundles })
        })
    }
}

/// The SVIDs for a proxy, in order of entry IDs: those with duplicate hints, too, as a proxy knows them by their IDs.
impl ViewState {
    pub(crate) fn certificates(&self) -> &[TlsSecret] {
        let with_svid = || self.records.iter().filter_map(|r| r.svid.as_deref());
        self.certificates.get_or_init(|| with_svid().filter_map(TlsSecret::new).collect())
    }
}

/// The keys with which the workload may validate tokens.
impl JwtKeySource for ViewState {
    fn jwt_keys(&self, trust_domain: &str) -> Option<Arc<JwtKeys>> {
        let known = std::iter::once(&self.own).chain(&self.federated);
        known.into_iter().find(|b| b.bundle.trust_domain.as_str() == trust_domain).map(|b| b.jwt_keys.clone())
    }
}

/// What one set of selectors sees, now and later. Shared by all its streams.
pub(crate) struct View {
    pub(crate) selectors: SelectorSet,
    state: watch::Sender<Arc<ViewState>>,
    streams: AtomicUsize,
    /// Milliseconds since the epoch.
    last_used_ms: AtomicI64,
}

impl View {
    pub(super) fn new(selectors: SelectorSet, state: ViewState) -> Self {
        let (state, _) = watch::channel(Arc::new(state));
        Self { selectors, state, streams: AtomicUsize::new(0), last_used_ms: AtomicI64::new(0) }
    }

    /// The state now.
    pub(crate) fn now(&self) -> Arc<ViewState> {
        self.state.borrow().clone()
    }

    /// Publishes a state if it differs.
    pub(super) fn refresh(&self, snapshot: &Snapshot, closed: bool) {
        let fresh = ViewState::new(snapshot, &self.selectors, closed);
        if !self.state.borrow().same(&fresh) {
            self.state.send_replace(Arc::new(fresh));
        }
    }

    /// Notes that a workload asked, so that its SVIDs stay in the cache.
    pub(crate) fn touch(&self, now_ms: i64) {
        self.last_used_ms.store(now_ms, Ordering::Relaxed);
        for record in &self.state.borrow().records {
            record.last_used_ms.store(now_ms, Ordering::Relaxed);
        }
    }

    pub(super) fn last_used_ms(&self) -> i64 {
        self.last_used_ms.load(Ordering::Relaxed)
    }

    /// Whether a stream watches.
    pub(super) fn is_watched(&self) -> bool {
        self.streams.load(Ordering::Relaxed) > 0
    }

    /// The states from now on; nothing is kept or fetched for that.
    pub(crate) fn subscribe_states(&self) -> watch::Receiver<Arc<ViewState>> {
        self.state.subscribe()
    }

    /// Watches; as long as the result lives, SVIDs of the view are kept and fetched.
    pub(crate) fn subscribe(self: &Arc<Self>) -> Subscription {
        self.streams.fetch_add(1, Ordering::Relaxed);
        Subscription(self.clone())
    }
}

/// A stream's hold on a view.
pub(crate) struct Subscription(Arc<View>);

impl Subscription {
    /// The states from now on.
    pub(crate) fn states(&self) -> watch::Receiver<Arc<ViewState>> {
        self.0.state.subscribe()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}
