//! Bundles: the own trust domain's and those it federates with.

use crate::{Listed, Page, Store, StoreError};
use finial_core::{Bundle, EntryId, JwtAuthority, TrustDomain, UnixSeconds};

/// What to do with the entries that federate with a bundle that is to be deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteMode {
    /// Refuse when there are any.
    Restrict,
    /// They stop federating with it.
    Dissociate,
    /// They are deleted too.
    Delete,
}

/// Which parts of a bundle an update replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BundleMask {
    /// The X.509 authorities.
    pub x509_authorities: bool,
    /// The JWT authorities.
    pub jwt_authorities: bool,
    /// The WIT authorities.
    pub wit_authorities: bool,
    /// The refresh hint.
    pub refresh_hint: bool,
    /// The sequence number.
    pub sequence_number: bool,
}

impl BundleMask {
    /// Everything.
    pub const ALL: Self = Self {
        x509_authorities: true,
        jwt_authorities: true,
        wit_authorities: true,
        refresh_hint: true,
        sequence_number: true,
    };
}

impl Store {
    /// Stores a new bundle; `AlreadyExists` when the trust domain has one.
    pub async fn create_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError> {
        todo!()
    }

    /// Replaces the masked parts of an existing bundle; `NotFound` when there is none. Returns the whole result.
    pub async fn update_bundle(&self, bundle: &Bundle, mask: BundleMask) -> Result<Bundle, StoreError> {
        todo!()
    }

    /// Creates or replaces.
    pub async fn set_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError> {
        todo!()
    }

    /// Adds the authorities that are not there yet, creating the bundle if need be; the sequence number grows when
    /// something was added. Returns the whole result.
    pub async fn append_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError> {
        todo!()
    }

    /// Deletes a bundle. Returns the IDs of the entries that changed (`Dissociate`) or went (`Delete`).
    pub async fn delete_bundle(
        &self,
        trust_domain: &TrustDomain,
        mode: DeleteMode,
    ) -> Result<Vec<EntryId>, StoreError> {
        todo!()
    }

    /// One bundle.
    pub async fn fetch_bundle(&self, trust_domain: &TrustDomain) -> Result<Option<Bundle>, StoreError> {
        todo!()
    }

    /// How many bundles there are, the own one included.
    pub async fn count_bundles(&self) -> Result<u64, StoreError> {
        todo!()
    }

    /// The bundles, the own one included.
    pub async fn list_bundles(&self, page: Option<&Page>) -> Result<Listed<Bundle>, StoreError> {
        todo!()
    }

    /// Removes authorities that expired before `expires_before`. Returns the new bundle, or `None` when nothing
    /// changed; an error rather than a bundle without authorities.
    pub async fn prune_bundle(
        &self,
        trust_domain: &TrustDomain,
        expires_before: UnixSeconds,
    ) -> Result<Option<Bundle>, StoreError> {
        todo!()
    }

    /// Marks the X.509 authority with this subject key ID (lowercase hex) as tainted. Returns the new bundle.
    pub async fn taint_x509_authority(&self, trust_domain: &TrustDomain, key_id: &str) -> Result<Bundle, StoreError> {
        todo!()
    }

    /// Removes the tainted X.509 authority with this subject key ID (lowercase hex). Returns the new bundle.
    pub async fn revoke_x509_authority(&self, trust_domain: &TrustDomain, key_id: &str) -> Result<Bundle, StoreError> {
        todo!()
    }

    /// Marks the JWT authority with this key ID as tainted.
    pub async fn taint_jwt_authority(
        &self,
        trust_domain: &TrustDomain,
        key_id: &str,
    ) -> Result<JwtAuthority, StoreError> {
        todo!()
    }

    /// Removes the tainted JWT authority with this key ID.
    pub async fn revoke_jwt_authority(
        &self,
        trust_domain: &TrustDomain,
        key_id: &str,
    ) -> Result<JwtAuthority, StoreError> {
        todo!()
    }
}
