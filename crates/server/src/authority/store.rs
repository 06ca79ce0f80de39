//! What the authorities keep in the datastore, as a trait so that tests can make every call fail.

use async_trait::async_trait;
use finial_core::{Bundle, TrustDomain};
use finial_store::{CaJournal, Page, Store, StoreError};

/// Bundles are read a page at a time, so that no transaction is long.
const BUNDLES_PER_PAGE: u32 = 500;

/// The datastore as the authorities and the bundle feed see it.
#[async_trait]
pub trait AuthorityStore: Send + Sync {
    /// One bundle.
    async fn bundle(&self, trust_domain: &TrustDomain) -> Result<Option<Bundle>, StoreError>;

    /// All bundles, the own one included.
    async fn bundles(&self) -> Result<Vec<Bundle>, StoreError>;

    /// Adds the authorities that are not there yet. Returns the whole result.
    async fn append_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError>;

    /// The journal of the server whose active X.509 authority this is.
    async fn journal(&self, active_x509_authority_id: &str) -> Result<Option<CaJournal>, StoreError>;

    /// Creates (`id` = 0) or replaces a journal.
    async fn set_journal(&self, journal: &CaJournal) -> Result<CaJournal, StoreError>;
}

#[async_trait]
impl AuthorityStore for Store {
    async fn bundle(&self, trust_domain: &TrustDomain) -> Result<Option<Bundle>, StoreError> {
        self.fetch_bundle(trust_domain).await
    }

    async fn bundles(&self) -> Result<Vec<Bundle>, StoreError> {
        let mut all = Vec::new();
        let mut page = Page { token: String::new(), size: BUNDLES_PER_PAGE };
        loop {
            let listed = self.list_bundles(Some(&page)).await?;
            all.extend(listed.items);
            if listed.next_page_token.is_empty() {
                return Ok(all);
            }
            page.token = listed.next_page_token;
        }
    }

    async fn append_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError> {
        Store::append_bundle(self, bundle).await
    }

    async fn journal(&self, active_x509_authority_id: &str) -> Result<Option<CaJournal>, StoreError> {
        self.fetch_ca_journal(active_x509_authority_id).await
    }

    async fn set_journal(&self, journal: &CaJournal) -> Result<CaJournal, StoreError> {
        self.set_ca_journal(journal).await
    }
}
