//! What external plugins may ask of the program that runs them. Plugins start before most of the program does, so this is
//! filled in as the program comes up.

use crate::PluginError;
use async_trait::async_trait;
use finial_core::{Bundle, Secret};
use finial_runtime::Metrics;
use std::sync::{Arc, OnceLock};

/// A server's own X.509 identity, and the bundle of its trust domain.
pub struct ServerIdentity {
    /// Leaf first; DER each.
    pub cert_chain: Vec<Arc<[u8]>>,
    /// PKCS#8, DER.
    pub private_key: Secret<Vec<u8>>,
    /// What verifies it.
    pub bundle: Bundle,
}

/// What a server does for its plugins.
#[async_trait]
pub trait ServerHost: Send + Sync {
    /// Whether an agent of that ID has attested.
    async fn has_agent(&self, agent_id: &str) -> Result<bool, PluginError>;

    /// The server's own identity.
    async fn identity(&self) -> Result<ServerIdentity, PluginError>;

    /// The bundle of its trust domain alone.
    async fn bundle(&self) -> Result<Bundle, PluginError> {
        Ok(self.identity().await?.bundle)
    }
}

/// What is there by now.
#[derive(Default)]
pub struct HostServices {
    /// Where plugins count and measure.
    pub metrics: OnceLock<Metrics>,
    /// Of a server.
    pub server: OnceLock<Arc<dyn ServerHost>>,
}

impl HostServices {
    /// The server's bundle as it is now; what was told, while it has none to show.
    pub async fn newest_bundle(&self, told: &Bundle) -> Bundle {
        match self.server.get() {
            Some(server) => server.bundle().await.unwrap_or_else(|_| told.clone()),
            None => told.clone(),
        }
    }
}
