//! `memory`: keys end with the process. After a restart a server has a new authority, and its agents must attest again.

use async_trait::async_trait;
use finial_core::KeyType;
use finial_crypto::{PrivateKey, Signer};
use finial_plugin::{KeyManager, PluginError};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// Keys in memory, by name.
#[derive(Default)]
pub struct Memory(RwLock<BTreeMap<String, Arc<PrivateKey>>>);

impl Memory {
    /// With these keys.
    pub(super) fn with(keys: BTreeMap<String, Arc<PrivateKey>>) -> Self {
        Self(RwLock::new(keys))
    }

    /// All keys as they are now.
    pub(super) fn snapshot(&self) -> BTreeMap<String, Arc<PrivateKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn put(&self, id: &str, key: Arc<PrivateKey>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned(), key);
    }

    pub(super) fn find(&self, id: &str) -> Option<Arc<dyn Signer>> {
        let keys = self.0.read().unwrap_or_else(PoisonError::into_inner);
        keys.get(id).map(|key| key.clone() as Arc<dyn Signer>)
    }

    pub(super) fn list(&self) -> Vec<(String, Arc<dyn Signer>)> {
        self.snapshot().into_iter().map(|(id, key)| (id, key as Arc<dyn Signer>)).collect()
    }
}

#[async_trait]
impl KeyManager for Memory {
    async fn generate_key(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, PluginError> {
        let key = super::generate(id, key_type).await?;
        self.put(id, key.clone());
        Ok(key)
    }

    async fn key(&self, id: &str) -> Result<Option<Arc<dyn Signer>>, PluginError> {
        Ok(self.find(id))
    }

    async fn keys(&self) -> Result<Vec<(String, Arc<dyn Signer>)>, PluginError> {
        Ok(self.list())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    finial_plugin::key_manager_conformance!(Arc::new(Memory::default()));
}
