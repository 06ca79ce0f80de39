//! Bundle publishers.

use crate::Plugin;
use crate::host::bundle;
use async_trait::async_trait;
use finial_core::Bundle;
use finial_plugin::{BundlePublisher, PluginError};
use finial_proto::plugin::bundle_publisher::{PublishBundleRequest, PublishBundleResponse};
use std::time::Duration;

/// The caller may be less patient.
const DEADLINE: Duration = Duration::from_secs(60);

/// A bundle publisher that is an external plugin.
pub struct ExternalBundlePublisher(pub Plugin);

#[async_trait]
impl BundlePublisher for ExternalBundlePublisher {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn publish(&self, published: &Bundle) -> Result<(), PluginError> {
        let request = PublishBundleRequest { bundle: Some(bundle(published)) };
        let PublishBundleResponse {} = self.0.call("PublishBundle", request, DEADLINE).await?;
        Ok(())
    }
}
