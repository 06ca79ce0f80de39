//! Notifiers.

use crate::Plugin;
use crate::host::bundle;
use async_trait::async_trait;
use finial_core::Bundle;
use finial_plugin::{Notifier, PluginError};
use finial_proto::plugin::notifier::{
    BundleLoaded, BundleUpdated, NotifyAndAdviseRequest, NotifyAndAdviseResponse, NotifyRequest, NotifyResponse,
    notify_and_advise_request, notify_request,
};
use std::time::Duration;

/// The caller may be less patient.
const DEADLINE: Duration = Duration::from_secs(60);

/// A notifier that is an external plugin.
pub struct ExternalNotifier(pub Plugin);

#[async_trait]
impl Notifier for ExternalNotifier {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn bundle_loaded(&self, loaded: &Bundle) -> Result<(), PluginError> {
        let event = notify_and_advise_request::Event::BundleLoaded(BundleLoaded { bundle: Some(bundle(loaded)) });
        let request = NotifyAndAdviseRequest { event: Some(event) };
        let NotifyAndAdviseResponse {} = self.0.call("NotifyAndAdvise", request, DEADLINE).await?;
        Ok(())
    }

    async fn bundle_updated(&self, updated: &Bundle) -> Result<(), PluginError> {
        let event = notify_request::Event::BundleUpdated(BundleUpdated { bundle: Some(bundle(updated)) });
        let NotifyResponse {} = self.0.call("Notify", NotifyRequest { event: Some(event) }, DEADLINE).await?;
        Ok(())
    }
}
