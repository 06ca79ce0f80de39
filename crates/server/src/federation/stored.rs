//! The relationships of the datastore in memory: what it would answer as of the last time.

use finial_core::TrustDomain;
use finial_store::{FederationRelationship, Listed, Page, StoreError};

/// With their row IDs and in the order of these; without their bundles, which are with the others.
pub(crate) struct Stored(pub(crate) Vec<(i64, FederationRelationship)>);

impl Stored {
    /// The one with this trust domain.
    pub(crate) fn get(&self, trust_domain: &TrustDomain) -> Option<FederationRelationship> {
        self.0.iter().map(|(_, found)| found).find(|found| found.trust_domain == *trust_domain).cloned()
    }

    /// A page of them, as the datastore lists them, with its tokens.
    pub(crate) fn list(&self, page: Option<&Page>) -> Result<Listed<FederationRelationship>, StoreError> {
        let after = page.map_or(Ok(0), Page::after)?;
        let size = page.and_then(|page| usize::try_from(page.size).ok()).unwrap_or(usize::MAX);
        let chosen: Vec<_> = self.0.iter().filter(|(row, _)| *row > after).take(size).cloned().collect();
        let last = chosen.last().map(|(row, _)| *row);
        Ok(Listed::new(chosen.into_iter().map(|(_, found)| found).collect(), page, last))
    }
}
