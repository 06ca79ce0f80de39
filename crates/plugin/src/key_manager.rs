//! Key managers.

use crate::PluginError;
use async_trait::async_trait;
use finial_core::KeyType;
use finial_crypto::{PrivateKey, Signer};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// Holds private keys by name. A name holds one key: generating again replaces it, while signers that were handed out
/// go on with the key they have.
///
/// Names in use: `x509-CA-A`, `x509-CA-B`, `JWT-Signer-A`, `JWT-Signer-B` (server); `agent-svid-A`, `agent-svid-B` (agent).
#[async_trait]
pub trait KeyManager: Send + Sync {
    /// Makes a key. When this returns, the key survives whatever the key manager promises to survive.
    async fn generate_key(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, PluginError>;

    /// The key of that name.
    async fn key(&self, id: &str) -> Result<Option<Arc<dyn Signer>>, PluginError>;

    /// All keys, in order of their names.
    async fn keys(&self) -> Result<Vec<(String, Arc<dyn Signer>)>, PluginError>;
}

/// Keys in memory: all of the `memory` key manager, and what the `disk` one writes out.
#[derive(Default)]
pub struct MemoryKeys(RwLock<BTreeMap<String, Arc<PrivateKey>>>);

impl MemoryKeys {
    /// With these keys.
    pub fn new(keys: BTreeMap<String, Arc<PrivateKey>>) -> Self {
        Self(RwLock::new(keys))
    }

    /// The key of that name.
    pub fn key(&self, id: &str) -> Option<Arc<PrivateKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// All keys, in order of their names.
    pub fn keys(&self) -> BTreeMap<String, Arc<PrivateKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts all keys in place of the present ones.
    pub fn replace(&self, keys: BTreeMap<String, Arc<PrivateKey>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }
}
