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

/// Names every key that says nothing, in a sentence that `text` makes of it.
///
/// # Errors
/// There are such.
pub fn all_given<'a>(
    keys: impl IntoIterator<Item = (&'a String, &'a str)>,
    text: impl Fn(&str) -> String,
) -> Result<(), PluginError> {
    let missing: Vec<_> = keys.into_iter().filter(|(value, _)| value.is_empty()).map(|(_, key)| text(key)).collect();
    if missing.is_empty() { Ok(()) } else { Err(PluginError::invalid(missing.join("; "))) }
}

/// For fields of a plugin's settings that nobody may print: `#[serde(deserialize_with = "finial_plugin::secret")]`.
///
/// # Errors
/// It is no text.
pub fn secret<'de, D: Deserializer<'de>>(from: D) -> Result<Secret<String>, D::Error> {
    String::deserialize(from).map(Secret::new)
}
