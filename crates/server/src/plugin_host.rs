//! What external plugins may ask of the server, and how long it waits for any plugin.

use crate::nodes::Nodes;
use crate::publish::BundleFeed;
use crate::svid::ServerSvid;
use async_trait::async_trait;
use finial_core::{Bundle, ErrorKind, Secret, SpiffeId};
use finial_plugin::{PluginError, PluginKind, ServerHost, ServerIdentity};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// Gives a plugin its deadline, and a failure its name.
pub(crate) async fn within<T>(
    deadline: Duration,
    (kind, name): (PluginKind, &str),
    asked: impl Future<Output = Result<T, PluginError>>,
) -> Result<T, PluginError> {
    let answer = tokio::time::timeout(deadline, asked).await.unwrap_or_else(|_| {
        let message = format!("no answer within {} s", deadline.as_secs());
        Err(PluginError::new(ErrorKind::Timeout, message))
    });
    answer.map_err(|error| error.of(kind, name))
}

/// Answers them.
pub(crate) struct PluginHost {
    pub(crate) svid: Arc<ServerSvid>,
    pub(crate) nodes: Arc<Nodes>,
    pub(crate) bundles: Arc<BundleFeed>,
}

#[async_trait]
impl ServerHost for PluginHost {
    async fn has_agent(&self, agent_id: &str) -> Result<bool, PluginError> {
        let Ok(id) = SpiffeId::parse(agent_id) else { return Ok(false) };
        let unknown = |error| PluginError::new(ErrorKind::Unavailable, format!("unable to look up the agent: {error}"));
        self.nodes.is_attested(&id).await.map_err(unknown)
    }

    async fn identity(&self) -> Result<ServerIdentity, PluginError> {
        let absent = || PluginError::new(ErrorKind::Unavailable, "the server has no SVID yet");
        let state = self.svid.state().ok_or_else(absent)?;
        let bundle = self.bundles.own().map(|own| own.stored().clone());
        Ok(ServerIdentity {
            cert_chain: state.chain.clone(),
            private_key: Secret::new(state.key.pkcs8_der().expose().clone()),
            bundle: bundle.unwrap_or_else(|| Bundle::empty(self.bundles.trust_domain().clone())),
        })
    }

    async fn bundle(&self) -> Result<Bundle, PluginError> {
        let absent = || PluginError::new(ErrorKind::Unavailable, "the server has no bundle yet");
        self.bundles.own().map(|own| own.stored().clone()).ok_or_else(absent)
    }
}
