//! Key managers.

use crate::PluginError;
use async_trait::async_trait;
use finial_core::KeyType;
use finial_crypto::Signer;
use finial_runtime::Metrics;
use std::sync::Arc;

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

/// A key manager whose calls are counted and timed.
struct Metered {
    inner: Arc<dyn KeyManager>,
    metrics: Metrics,
    /// Keys of the three calls.
    names: [&'static str; 3],
}

/// Counts and times the calls of a server's key manager.
pub fn metered_for_server(inner: Arc<dyn KeyManager>, metrics: Metrics) -> Arc<dyn KeyManager> {
    let names =
        ["server_key_manager.generate_key", "server_key_manager.get_public_key", "server_key_manager.get_public_keys"];
    Arc::new(Metered { inner, metrics, names })
}

/// Counts and times the calls of an agent's key manager.
pub fn metered_for_agent(inner: Arc<dyn KeyManager>, metrics: Metrics) -> Arc<dyn KeyManager> {
    let names = ["agent_key_manager.generate_key", "agent_key_manager.get_key", "agent_key_manager.get_keys"];
    Arc::new(Metered { inner, metrics, names })
}

#[async_trait]
impl KeyManager for Metered {
    async fn generate_key(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, PluginError> {
        let call = self.metrics.call(self.names[0]);
        let result = self.inner.generate_key(id, key_type).await;
        call.finish_with(&result, |e| e.kind);
        result
    }

    async fn key(&self, id: &str) -> Result<Option<Arc<dyn Signer>>, PluginError> {
        let call = self.metrics.call(self.names[1]);
        let result = self.inner.key(id).await;
        call.finish_with(&result, |e| e.kind);
        result
    }

    async fn keys(&self) -> Result<Vec<(String, Arc<dyn Signer>)>, PluginError> {
        let call = self.metrics.call(self.names[2]);
        let result = self.inner.keys().await;
        call.finish_with(&result, |e| e.kind);
        result
    }
}
