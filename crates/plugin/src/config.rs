//! How a plugin reads its part of the configuration.

use crate::PluginError;
use finial_core::{Clock, TrustDomain};
use serde::de::DeserializeOwned;
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
