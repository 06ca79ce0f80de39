//! What is kept current: entries, agents and bundles in memory.

use super::Memory;
use crate::entries::Entries;
use crate::nodes::Nodes;
use crate::publish::BundleFeed;
use crate::rotation::Domain;
use async_trait::async_trait;
use finial_core::{EntryId, SpiffeId};
use finial_store::StoreError;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Everything that the server knows of the datastore.
pub struct Known {
    /// Registration entries.
    pub entries: Arc<Entries>,
    /// Attested agents.
    pub nodes: Arc<Nodes>,
    /// Bundles.
    pub bundles: Arc<BundleFeed>,
    /// Carries out orders to the whole trust domain.
    pub domain: Arc<Domain>,
}

#[async_trait]
impl Memory for Known {
    async fn entries_changed(&self, ids: Vec<EntryId>) -> Result<(), StoreError> {
        self.entries.read_some(ids).await
    }

    async fn agents_changed(&self, ids: Vec<SpiffeId>) -> Result<(), StoreError> {
        self.nodes.read_some(ids).await
    }

    async fn bundles_changed(&self) -> Result<(), StoreError> {
        self.bundles.reload().await?;
        if self.domain.anew.swap(false, Ordering::Relaxed) {
            self.domain.agents.start_anew(self.bundles.own().map_or(0, |own| own.bundle.sequence_number));
        }
        Ok(())
    }

    fn orders_changed(&self) {
        self.domain.wake();
    }

    async fn compare_all(&self) -> Result<(), StoreError> {
        self.bundles.start_anew();
        self.domain.anew.store(true, Ordering::Relaxed);
        // Agents first: a ban must not wait for the entries.
        self.nodes.compare_all().await?;
        self.entries.compare_all().await
    }

    fn datastore_is_back(&self) {
        self.nodes.store_pending_soon();
    }
}
