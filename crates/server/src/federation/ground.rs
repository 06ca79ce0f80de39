//! What federation stands on: datastore, configuration and network, as a trait so that tests can make time pass.

use super::Relationships;
use super::fetch::{FederationError, Fetcher, LIMITS};
use super::stored::Stored;
use crate::entries::Turn;
use crate::live::LiveSettings;
use crate::publish::BundleFeed;
use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use finial_config::FederatesWith;
use finial_core::{Bundle, Clock, TrustDomain};
use finial_crypto::tls::KeyExchange;
use finial_net::https;
use finial_runtime::Spawner;
use finial_store::{FederationRelationship, Store, StoreError};
use std::sync::Arc;
use tokio::sync::watch;

#[async_trait]
pub(crate) trait Ground: Send + Sync {
    /// All relationships.
    async fn relationships(&self) -> Result<Relationships, StoreError>;

    /// Those of the datastore as they were read last; `None` before that.
    fn stored(&self) -> Option<Arc<Stored>> {
        None
    }

    /// The one with this trust domain.
    async fn relationship(&self, trust_domain: &TrustDomain) -> Result<Option<FederatesWith>, StoreError>;

    /// Changes when the relationships of the configuration do.
    fn changed(&self) -> watch::Receiver<Arc<crate::live::Live>>;

    /// Fetches a bundle from its endpoint.
    async fn fetch(&self, trust_domain: &TrustDomain, endpoint: &FederatesWith) -> Result<Bundle, FederationError>;

    /// Stores a bundle for all to see.
    async fn save(&self, bundle: Bundle) -> Result<(), StoreError>;

    /// The bundle that is stored.
    fn known(&self, trust_domain: &TrustDomain) -> Option<Bundle>;
}

/// The real one.
pub(crate) struct Real {
    store: Store,
    turn: Turn,
    bundles: Arc<BundleFeed>,
    settings: LiveSettings,
    fetcher: Fetcher,
    stored: ArcSwapOption<Stored>,
}

impl Real {
    pub(crate) fn new(
        store: Store,
        turn: Turn,
        bundles: Arc<BundleFeed>,
        settings: LiveSettings,
        clock: Arc<dyn Clock>,
        spawner: Spawner,
        exchange: KeyExchange,
    ) -> Arc<Self> {
        let (limits, web_roots) = (LIMITS, Arc::new(https::system_roots));
        let fetcher = Fetcher { bundles: bundles.clone(), clock, spawner, exchange, limits, web_roots };
        Arc::new(Self { store, turn, bundles, settings, fetcher, stored: ArcSwapOption::empty() })
    }
}

#[async_trait]
impl Ground for Real {
    async fn relationships(&self) -> Result<Relationships, StoreError> {
        let stored = self.store.federation_rows().await?;
        let named = stored.iter().map(|(_, found)| (found.trust_domain.clone(), from_store(found)));
        let mut all: Relationships = named.collect();
        self.stored.store(Some(Arc::new(Stored(stored))));
        let configured = self.settings.now();
        all.extend(configured.federates_with.iter().map(|(trust_domain, with)| (trust_domain.clone(), with.clone())));
        // The own bundle comes from nobody else.
        all.remove(self.bundles.trust_domain());
        Ok(all)
    }

    async fn relationship(&self, trust_domain: &TrustDomain) -> Result<Option<FederatesWith>, StoreError> {
        if trust_domain == self.bundles.trust_domain() {
            return Ok(None);
        }
        if let Some(with) = self.settings.now().federates_with.get(trust_domain) {
            return Ok(Some(with.clone()));
        }
        match self.store.fetch_federation_relationship(trust_domain).await {
            // It is none of all relationships either.
            Err(StoreError::BadRow { .. }) => Ok(None),
            found => Ok(found?.as_ref().map(from_store)),
        }
    }

    fn stored(&self) -> Option<Arc<Stored>> {
        self.stored.load_full()
    }

    fn changed(&self) -> watch::Receiver<Arc<crate::live::Live>> {
        self.settings.subscribe()
    }

    async fn fetch(&self, trust_domain: &TrustDomain, endpoint: &FederatesWith) -> Result<Bundle, FederationError> {
        self.fetcher.fetch(trust_domain, endpoint).await
    }

    async fn save(&self, bundle: Bundle) -> Result<(), StoreError> {
        let (store, feed) = (self.store.clone(), self.bundles.clone());
        let change = async move {
            let written = store.set_bundle(&bundle).await?;
            feed.refresh_or_later(&written.trust_domain).await;
            Ok(())
        };
        self.turn.take(change).await
    }

    fn known(&self, trust_domain: &TrustDomain) -> Option<Bundle> {
        self.bundles.bundle(trust_domain.as_str()).map(|published| published.bundle.clone())
    }
}

fn from_store(relationship: &FederationRelationship) -> FederatesWith {
    FederatesWith {
        bundle_endpoint_url: relationship.bundle_endpoint_url.clone(),
        profile: relationship.profile.clone(),
    }
}
