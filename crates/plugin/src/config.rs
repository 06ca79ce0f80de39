//! How a plugin reads its part of the configuration.

use crate::PluginError;
use finial_core::{Clock, Secret, TrustDomain};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use std::sync::Arc;

/// What a plugin is told besides its own configuration.
#[derive(Clone)]
pub struct PluginContext {
    /// The trust domain it serves.
    pub trust_domain: TrustDomain,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
}

/// Reads a `plugin_data` block into the plugin's own settings; the error names line and column. Unknown keys are ignored, as
/// SPIRE's built-in plugins do.
///
/// # Errors
/// `unable to decode configuration: …`
pub fn decode<T: DeserializeOwned>(data: &finial_hcl::Value) -> Result<T, PluginError> {
    finial_hcl::from_value(data).map_err(|e| PluginError::invalid(format!("unable to decode configuration: {e}")))
}

/// For fields of a plugin's settings that nobody may print: `#[serde(deserialize_with = "finial_plugin::secret")]`.
///
/// # Errors
/// It is no text.
pub fn secret<'de, D: Deserializer<'de>>(from: D) -> Result<Secret<String>, D::Error> {
    String::deserialize(from).map(Secret::new)
}
