//! Key managers whose keys are in this process's memory.

mod disk;
mod memory;

pub use disk::Disk;
pub use memory::Memory;

use finial_core::KeyType;
use finial_crypto::PrivateKey;
use finial_plugin::PluginError;
use std::sync::Arc;

/// Makes a key away from the threads that serve requests: RSA keys take up to seconds.
async fn generate(id: &str, key_type: KeyType) -> Result<Arc<PrivateKey>, PluginError> {
    if id.is_empty() {
        return Err(PluginError::invalid("failed to generate key: key id is required"));
    }
    let failed = || PluginError::internal("failed to generate key");
    match tokio::task::spawn_blocking(move || PrivateKey::generate(key_type)).await {
        Ok(Ok(key)) => Ok(Arc::new(key)),
        Ok(Err(error)) => Err(failed().because(error)),
        Err(error) => Err(failed().because(error)),
    }
}
