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
    use finial_runtime::{Metrics, telemetry};

    finial_plugin::key_manager_conformance!(Arc::new(Memory::default()));

    #[tokio::test]
    async fn metered_calls_are_counted_under_the_names_of_spire() {
        let settings = telemetry::Settings { prefix: "spire_server".to_owned(), ..Default::default() };
        let metrics = Metrics::new(settings);
        let server = finial_plugin::metered_for_server(Arc::new(Memory::default()), metrics.clone());
        server.generate_key("a", KeyType::EcP256).await.expect("generates");
        assert!(server.generate_key("", KeyType::EcP256).await.is_err());
        server.key("a").await.expect("asks").expect("is there");
        assert_eq!(server.keys().await.expect("lists").len(), 1);
        finial_plugin::metered_for_agent(server, metrics.clone()).keys().await.expect("lists");
        let text = metrics.render();
        for line in [
            "server_key_manager_generate_key{status=\"OK\"} 1",
            "server_key_manager_generate_key{status=\"InvalidArgument\"} 1",
            "server_key_manager_get_public_key{status=\"OK\"} 1",
            "server_key_manager_get_public_keys{status=\"OK\"} 2",
            "agent_key_manager_get_keys{status=\"OK\"} 1",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
