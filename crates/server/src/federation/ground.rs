//! What federation stands on: datastore, configuration and network, as a trait so that tests can make time pass.

use super::fetch::{FederationError, Fetcher};
use super::{Relationships, SUBSYSTEM};
use crate::entries::Turn;
use crate::live::LiveSettings;
use crate::publish::BundleFeed;
use async_trait::async_trait;
use finial_config::FederatesWith;
use finial_core::{Bundle, Clock, TrustDomain};
use finial_crypto::tls::KeyExchange;
use finial_runtime::Spawner;
use finial_store::{FederationRelationship, Store, StoreError};
use std::sync::Arc;
use tokio::sync::watch;

#[async_trait]
pub(crate) trait Ground: Send + Sync {
    /// All relationships.
    async fn relationships(&self) -> Result<Relationships, StoreError>;

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
        let fetcher = Fetcher { bundles: bundles.clone(), clock, spawner, exchange };
        Arc::new(Self { store, turn, bundles, settings, fetcher })
    }
}

#[async_trait]
impl Ground for Real {
    async fn relationships(&self) -> Result<Relationships, StoreError> {
        let stored = self.store.list_federation_relationships(None).await?;
        let stored = stored.items.into_iter().map(|found| (found.trust_domain.clone(), from_store(found)));
        let mut all: Relationships = stored.collect();
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
            found => Ok(found?.map(from_store)),
        }
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
            // The bundle is stored; a feed that could not read it tries again by itself.
            if let Err(error) = feed.refresh(&written.trust_domain).await {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Bundle will be read again");
            }
            Ok(())
        };
        self.turn.take(change).await
    }

    fn known(&self, trust_domain: &TrustDomain) -> Option<Bundle> {
        self.bundles.bundle(trust_domain.as_str()).map(|published| published.bundle.clone())
    }
}

fn from_store(relationship: FederationRelationship) -> FederatesWith {
    FederatesWith { bundle_endpoint_url: relationship.bundle_endpoint_url, profile: relationship.profile }
}
