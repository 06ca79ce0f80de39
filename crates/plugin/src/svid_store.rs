//! SVID stores.

use crate::PluginError;
use async_trait::async_trait;
use finial_core::{Secret, SpiffeId, UnixSeconds};
use std::collections::BTreeMap;
use std::sync::Arc;

/// An X.509-SVID with all that whoever uses it needs.
#[derive(Debug)]
pub struct StoredSvid {
    /// Whose it is.
    pub spiffe_id: SpiffeId,
    /// Leaf first; DER each.
    pub cert_chain: Vec<Arc<[u8]>>,
    /// PKCS#8, DER.
    pub private_key: Secret<Vec<u8>>,
    /// The roots of its own trust domain; DER each.
    pub bundle: Vec<Arc<[u8]>>,
    /// The roots of the trust domains that its entry federates with, by their names.
    pub federated_bundles: BTreeMap<String, Vec<Arc<[u8]>>>,
    /// When the leaf ends.
    pub expires_at: UnixSeconds,
}

/// Keeps X.509-SVIDs where workloads find them that cannot ask an agent. An entry with `store_svid` names the store by the
/// type of its selectors; their values say where in the store.
#[async_trait]
pub trait SvidStore: Send + Sync {
    /// Its configured name, which is the type of the selectors that name it.
    fn name(&self) -> &str;

    /// Puts an SVID there, in place of the one before.
    async fn put(&self, svid: &StoredSvid, metadata: &[String]) -> Result<(), PluginError>;

    /// Takes away what is there; nothing being there is no failure. `InvalidArgument` says that nothing can be there.
    async fn delete(&self, metadata: &[String]) -> Result<(), PluginError>;
}
