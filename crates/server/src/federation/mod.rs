//! Federation: the bundles of foreign trust domains, fetched from their endpoints and kept fresh.
//!
//! The relationships are those of the configuration and those of the datastore; of two with the same trust domain the
//! configuration's counts. One task looks after them all: it fetches each bundle four times within its refresh hint and
//! stores it when it is another one. Several servers on one datastore do the same work side by side, which hurts nobody.

mod acme;
mod endpoint;
#[cfg(test)]
mod fault_tests;
mod fetch;
mod ground;
mod judge;
mod peers;
mod stored;
#[cfg(test)]
mod tests;

pub use endpoint::EndpointError;
pub(crate) use endpoint::{EndpointParts, serve as serve_bundle};
pub use fetch::FederationError;
pub(crate) use ground::{Ground, Real};
pub(crate) use peers::{PeerSeen, Peers};
pub(crate) use stored::Stored;

use finial_config::FederatesWith;
use finial_core::{Bundle, TrustDomain};
use finial_runtime::{Metrics, Shutdown};
use futures::future::{Fuse, FusedFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use judge::{Seen, refresh_after, same};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// Who speaks in the log.
const SUBSYSTEM: &str = "bundle_client";
/// How often the relationships are read again when nobody says that they changed: somebody always does, so this is a
/// second line of defence.
const RELATIONSHIPS_EVERY: Duration = Duration::from_secs(600);
/// The same after they could not be read.
const READ_RETRY: Duration = Duration::from_secs(10);
/// So many are fetched at the same time.
const FETCHES_MAX: usize = 16;

/// By trust domain.
pub(crate) type Relationships = BTreeMap<TrustDomain, FederatesWith>;

/// A trust domain that is looked after.
struct Managed {
    endpoint: FederatesWith,
    /// Held while it is fetched.
    fetching: Arc<tokio::sync::Mutex<Seen>>,
    /// When it is to be fetched; `None` while it is.
    due: Option<Instant>,
}

/// What came of a refresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Changed,
    Unchanged,
}

/// The relationships with foreign trust domains, and what keeps their bundles fresh.
pub struct Federation {
    ground: Arc<dyn Ground>,
    metrics: Metrics,
    managed: Mutex<BTreeMap<TrustDomain, Managed>>,
    /// Held while the relationships are read, so that an older reading never replaces a newer one.
    reading: tokio::sync::Mutex<()>,
    reload: Notify,
}

impl Federation {
    pub(crate) fn new(ground: Arc<dyn Ground>, metrics: Metrics) -> Arc<Self> {
        let (managed, reading, reload) = (Mutex::default(), tokio::sync::Mutex::default(), Notify::new());
        Arc::new(Self { ground, metrics, managed, reading, reload })
    }

    /// The relationships have changed, here or at another server: reads them soon.
    pub fn reload(&self) {
        self.reload.notify_one();
    }

    /// The relationships of the datastore as they were read last, for when it is away.
    pub(crate) fn stored(&self) -> Option<Arc<Stored>> {
        self.ground.stored()
    }

    /// Fetches the bundle of a trust domain now. `false`: there is no relationship with it.
    ///
    /// # Errors
    /// Says whether the endpoint, its certificate, what it sent or the datastore is to blame.
    pub async fn refresh(&self, trust_domain: &TrustDomain) -> Result<bool, FederationError> {
        self.read_or_log().await;
        let found = self.with(|managed| managed.get(trust_domain).map(|m| (m.endpoint.clone(), m.fetching.clone())));
        let Some((endpoint, fetching)) = found else { return Ok(false) };
        self.update(trust_domain, &endpoint, &fetching, true).await?;
        Ok(true)
    }

    /// Looks after all bundles until shutdown. `stored` tells when another server changed a relationship.
    pub async fn run(self: Arc<Self>, mut stored: Option<watch::Receiver<u64>>, shutdown: Shutdown) {
        let mut fetches = FuturesUnordered::new();
        let mut read_again = Instant::now();
        // Beside the fetches: one of them may hold what it waits for, a connection to the datastore or a writer's turn.
        let mut reading = std::pin::pin!(Fuse::terminated());
        let mut configured = self.ground.changed();
        loop {
            if reading.is_terminated() && Instant::now() >= read_again {
                reading.set(self.read_or_log().fuse());
                read_again = Instant::now() + RELATIONSHIPS_EVERY;
            }
            for (trust_domain, endpoint, fetching) in self.take_due(FETCHES_MAX.saturating_sub(fetches.len())) {
                let this = &self;
                fetches.push(async move {
                    let wait = this.poll(&trust_domain, &endpoint, &fetching).await;
                    (trust_domain, wait)
                });
            }
            let next = self.next_due().filter(|_| fetches.len() < FETCHES_MAX).unwrap_or(read_again).min(read_again);
            // What is told while the relationships are read is heard after that.
            let hears = reading.is_terminated();
            tokio::select! {
                () = shutdown.cancelled() => return,
                read = &mut reading => read_again = Instant::now() + if read { RELATIONSHIPS_EVERY } else { READ_RETRY },
                Some((trust_domain, wait)) = fetches.next(), if !fetches.is_empty() => self.schedule(&trust_domain, wait),
                () = self.reload.notified(), if hears => read_again = Instant::now(),
                () = change(&mut stored), if hears => read_again = Instant::now(),
                _ = configured.changed(), if hears => read_again = Instant::now(),
                () = tokio::time::sleep_until(next), if hears || next < read_again => {}
            }
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<TrustDomain, Managed>) -> T) -> T {
        act(&mut self.managed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the relationships could be read.
    async fn read_or_log(&self) -> bool {
        let _order = self.reading.lock().await;
        match self.ground.relationships().await {
            Ok(wanted) => {
                self.with(|managed| reconcile(managed, wanted));
                true
            }
            Err(error) => {
                tracing::error!(subsystem_name = SUBSYSTEM, %error, "Failed to reload configs");
                false
            }
        }
    }

    /// Those that are due, at most `count`; they are not due again before [`Federation::schedule`].
    fn take_due(&self, count: usize) -> Vec<(TrustDomain, FederatesWith, Arc<tokio::sync::Mutex<Seen>>)> {
        let now = Instant::now();
        self.with(|managed| {
            let due = managed.iter_mut().filter(|(_, m)| m.due.is_some_and(|due| due <= now)).take(count);
            due.map(|(trust_domain, m)| {
                m.due = None;
                (trust_domain.clone(), m.endpoint.clone(), m.fetching.clone())
            })
            .collect()
        })
    }

    fn next_due(&self) -> Option<Instant> {
        self.with(|managed| managed.values().filter_map(|m| m.due).min())
    }

    fn schedule(&self, trust_domain: &TrustDomain, wait: Duration) {
        self.with(|managed| {
            // One that is due already was changed meanwhile.
            if let Some(m) = managed.get_mut(trust_domain).filter(|m| m.due.is_none()) {
                m.due = Some(Instant::now() + wait);
            }
        });
    }

    /// One fetch of the task's own, and how long to wait for the next.
    async fn poll(
        &self,
        trust_domain: &TrustDomain,
        endpoint: &FederatesWith,
        fetching: &tokio::sync::Mutex<Seen>,
    ) -> Duration {
        tracing::debug!(subsystem_name = SUBSYSTEM, trust_domain = %trust_domain, "Polling for bundle update");
        let mut call = self.metrics.call("bundle_manager.fetch.federated_bundle");
        call.label("trust_domain_id", trust_domain.as_str());
        let result = self.update(trust_domain, endpoint, fetching, false).await;
        call.finish_with(&result, FederationError::kind);
        match result {
            Ok(Outcome::Changed) => {
                let labels = [("trust_domain_id", trust_domain.as_str())];
                self.metrics.count("bundle_manager.update.federated_bundle", 1.0, &labels);
                tracing::info!(subsystem_name = SUBSYSTEM, trust_domain = %trust_domain, "Bundle refreshed");
            }
            Ok(Outcome::Unchanged) => {}
            Err(error) => tracing::error!(
                subsystem_name = SUBSYSTEM,
                trust_domain = %trust_domain,
                bundle_endpoint_url = %endpoint.bundle_endpoint_url,
                %error,
                "Error updating bundle"
            ),
        }
        let wait = refresh_after(self.ground.known(trust_domain).as_ref());
        let seconds = wait.as_secs();
        tracing::debug!(subsystem_name = SUBSYSTEM, trust_domain = %trust_domain, seconds, "Scheduling next bundle refresh");
        wait
    }

    async fn update(
        &self,
        trust_domain: &TrustDomain,
        endpoint: &FederatesWith,
        fetching: &tokio::sync::Mutex<Seen>,
        insist: bool,
    ) -> Result<Outcome, FederationError> {
        let mut seen = fetching.lock().await;
        let fetched = self.ground.fetch(trust_domain, endpoint).await?;
        if !self.is_still(trust_domain, endpoint, &fetched).await {
            return Ok(Outcome::Unchanged);
        }
        let known = self.ground.known(trust_domain);
        if known.as_ref().is_some_and(|known| same(known, &fetched)) {
            // Whatever its number: the domain may have been put back to the same keys.
            seen.take(&fetched);
            return Ok(Outcome::Unchanged);
        }
        seen.judge(&endpoint.bundle_endpoint_url, known.as_ref(), &fetched, insist)?;
        let loses_all_roots = known.is_some_and(|known| !known.x509_authorities.is_empty());
        if fetched.x509_authorities.is_empty() && (loses_all_roots || fetched.jwt_authorities.is_empty()) {
            tracing::warn!(
                subsystem_name = SUBSYSTEM,
                trust_domain = %trust_domain,
                bundle_endpoint_url = %endpoint.bundle_endpoint_url,
                "The endpoint's bundle has no X.509 authorities that can be used: its trust domain has revoked them, or has only \
                 keys of kinds that are not known here, and its X509-SVIDs are not trusted any more"
            );
        }
        self.ground.save(fetched).await.map_err(FederationError::Save)?;
        Ok(Outcome::Changed)
    }

    /// Whether the bundle may be stored: it changes nothing, or the relationship is still the one that it was fetched for.
    /// The operator may have deleted or replaced that meanwhile, and the bundle with it, here or at another server.
    async fn is_still(&self, trust_domain: &TrustDomain, endpoint: &FederatesWith, fetched: &Bundle) -> bool {
        if self.ground.known(trust_domain).is_none_or(|known| !same(&known, fetched)) {
            match self.ground.relationship(trust_domain).await {
                Ok(now) => {
                    let still = now.as_ref() == Some(endpoint);
                    if !still {
                        self.reload();
                    }
                    return still;
                }
                Err(error) => tracing::error!(
                    subsystem_name = SUBSYSTEM,
                    trust_domain = %trust_domain,
                    %error,
                    "Failed to read federation relationship"
                ),
            }
        }
        self.with(|managed| managed.get(trust_domain).is_some_and(|m| m.endpoint == *endpoint))
    }
}

/// The next change that is told; never when there is nobody who would.
async fn change(told: &mut Option<watch::Receiver<u64>>) {
    if let Some(receiver) = told
        && receiver.changed().await.is_ok()
    {
        return;
    }
    *told = None;
    std::future::pending().await
}

/// Makes what is looked after what is wanted. What is new or changed is due at once.
fn reconcile(managed: &mut BTreeMap<TrustDomain, Managed>, mut wanted: Relationships) {
    managed.retain(|trust_domain, _| {
        let keep = wanted.contains_key(trust_domain);
        if !keep {
            tracing::info!(subsystem_name = SUBSYSTEM, entry = %trust_domain, "Trust domain no longer managed");
        }
        keep
    });
    for (trust_domain, m) in managed.iter_mut() {
        let Some(endpoint) = wanted.remove(trust_domain).filter(|endpoint| *endpoint != m.endpoint) else { continue };
        tracing::info!(
            subsystem_name = SUBSYSTEM,
            entry = %trust_domain,
            bundle_endpoint_url = %endpoint.bundle_endpoint_url,
            bundle_endpoint_profile = endpoint.profile.name(),
            "Updated configuration for managed trust domain"
        );
        m.endpoint = endpoint;
        // Its sequence numbers have nothing to do with those of before.
        m.fetching = Arc::new(tokio::sync::Mutex::new(Seen::anew()));
        m.due = Some(Instant::now());
    }
    for (trust_domain, endpoint) in wanted {
        tracing::info!(
            subsystem_name = SUBSYSTEM,
            trust_domain = %trust_domain,
            bundle_endpoint_url = %endpoint.bundle_endpoint_url,
            bundle_endpoint_profile = endpoint.profile.name(),
            "Trust domain is now managed"
        );
        let due = Some(Instant::now());
        managed.insert(trust_domain, Managed { endpoint, fetching: Arc::default(), due });
    }
}
