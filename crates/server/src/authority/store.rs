//! What the authorities keep in the datastore, as a trait so that tests can make every call fail.

use super::AuthorityKind;
use async_trait::async_trait;
use finial_core::{Bundle, TrustDomain, UnixSeconds};
use finial_store::{CaJournal, Page, Rotation, RotationNote, Store, StoreError};

/// Bundles are read a page at a time, so that no transaction is long.
const BUNDLES_PER_PAGE: u32 = 500;

/// What befalls an authority in the bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaintStep {
    /// It is marked.
    Taint,
    /// It goes; it must have been marked.
    Revoke,
}

/// The datastore as the authorities and the bundle feed see it.
#[async_trait]
pub trait AuthorityStore: Send + Sync {
    /// One bundle.
    async fn bundle(&self, trust_domain: &TrustDomain) -> Result<Option<Bundle>, StoreError>;

    /// All bundles, the own one included.
    async fn bundles(&self) -> Result<Vec<Bundle>, StoreError>;

    /// The row ID of each bundle, which pages go by.
    async fn bundle_rows(&self) -> Result<Vec<(TrustDomain, i64)>, StoreError>;

    /// Adds the authorities that are not there yet. Returns the whole result.
    async fn append_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError>;

    /// Taints or revokes an authority: by its subject key ID in lowercase hex, or the ID of the key.
    async fn mark_authority(
        &self,
        trust_domain: &TrustDomain,
        kind: AuthorityKind,
        step: TaintStep,
        id: &str,
    ) -> Result<(), StoreError>;

    /// The journal of the server whose active X.509 authority this is.
    async fn journal(&self, active_x509_authority_id: &str) -> Result<Option<CaJournal>, StoreError>;

    /// All journals.
    async fn journals(&self) -> Result<Vec<CaJournal>, StoreError>;

    /// Creates (`id` = 0) or replaces a journal.
    async fn set_journal(&self, journal: &CaJournal) -> Result<CaJournal, StoreError>;

    /// The newest order of each kind to rotate the authorities of all servers.
    async fn newest_rotations(&self) -> Result<Vec<Rotation>, StoreError>;

    /// What servers told of an order.
    async fn rotation_notes(&self, rotation_id: i64) -> Result<Vec<RotationNote>, StoreError>;

    /// Tells.
    async fn set_rotation_note(&self, note: &RotationNote) -> Result<(), StoreError>;

    /// Opens an order again that is done, with the goal that it has.
    async fn reopen_rotation(&self, order: &Rotation) -> Result<(), StoreError>;

    /// Closes an order that has come to its end.
    async fn close_rotation(&self, order: &Rotation) -> Result<(), StoreError>;

    /// When the servers of these journals last told of an order, each by its clock.
    async fn rotation_beats(&self, rotation_id: i64) -> Result<Vec<(i64, UnixSeconds)>, StoreError>;

    /// Shows that the server of this journal is there.
    async fn touch_rotation_note(&self, rotation_id: i64, journal_id: i64) -> Result<(), StoreError>;

    /// Takes the marks from authorities again.
    async fn untaint_authorities(&self, trust_domain: &TrustDomain, ids: &[String]) -> Result<(), StoreError>;
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

    async fn bundle_rows(&self) -> Result<Vec<(TrustDomain, i64)>, StoreError> {
        Store::bundle_rows(self).await
    }

    async fn append_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError> {
        Store::append_bundle(self, bundle).await
    }

    async fn mark_authority(
        &self,
        trust_domain: &TrustDomain,
        kind: AuthorityKind,
        step: TaintStep,
        id: &str,
    ) -> Result<(), StoreError> {
        match (kind, step) {
            (AuthorityKind::X509, TaintStep::Taint) => self.taint_x509_authority(trust_domain, id).await.map(drop),
            (AuthorityKind::X509, TaintStep::Revoke) => self.revoke_x509_authority(trust_domain, id).await.map(drop),
            (AuthorityKind::Jwt, TaintStep::Taint) => self.taint_jwt_authority(trust_domain, id).await.map(drop),
            (AuthorityKind::Jwt, TaintStep::Revoke) => self.revoke_jwt_authority(trust_domain, id).await.map(drop),
            (AuthorityKind::Wit, TaintStep::Taint) => self.taint_wit_authority(trust_domain, id).await.map(drop),
            (AuthorityKind::Wit, TaintStep::Revoke) => self.revoke_wit_authority(trust_domain, id).await.map(drop),
        }
    }

    async fn journal(&self, active_x509_authority_id: &str) -> Result<Option<CaJournal>, StoreError> {
        self.fetch_ca_journal(active_x509_authority_id).await
    }

    async fn journals(&self) -> Result<Vec<CaJournal>, StoreError> {
        self.list_ca_journals().await
    }

    async fn set_journal(&self, journal: &CaJournal) -> Result<CaJournal, StoreError> {
        self.set_ca_journal(journal).await
    }

    async fn newest_rotations(&self) -> Result<Vec<Rotation>, StoreError> {
        Store::newest_rotations(self).await
    }

    async fn rotation_notes(&self, rotation_id: i64) -> Result<Vec<RotationNote>, StoreError> {
        Store::rotation_notes(self, rotation_id).await
    }

    async fn set_rotation_note(&self, note: &RotationNote) -> Result<(), StoreError> {
        Store::set_rotation_note(self, note).await
    }

    async fn reopen_rotation(&self, order: &Rotation) -> Result<(), StoreError> {
        Store::advance_rotation(self, order, order.goal, false).await.map(drop)
    }

    async fn close_rotation(&self, order: &Rotation) -> Result<(), StoreError> {
        Store::close_rotation(self, order).await
    }

    async fn rotation_beats(&self, rotation_id: i64) -> Result<Vec<(i64, UnixSeconds)>, StoreError> {
        Store::rotation_beats(self, rotation_id).await
    }

    async fn touch_rotation_note(&self, rotation_id: i64, journal_id: i64) -> Result<(), StoreError> {
        Store::touch_rotation_note(self, rotation_id, journal_id).await
    }

    async fn untaint_authorities(&self, trust_domain: &TrustDomain, ids: &[String]) -> Result<(), StoreError> {
        Store::untaint_authorities(self, trust_domain, ids).await
    }
}
