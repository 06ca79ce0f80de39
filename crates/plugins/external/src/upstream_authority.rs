//! Upstream authorities.

use crate::Plugin;
use crate::host::jwt_key;
use async_trait::async_trait;
use finial_core::{JwtAuthority, X509Authority};
use finial_plugin::{MintedX509Ca, PluginError, UpstreamAuthorities, UpstreamAuthority};
use finial_proto::plugin::types::{JwtKey, X509Certificate};
use finial_proto::plugin::upstream_authority::{
    MintX509caRequest, MintX509caResponse, PublishJwtKeyRequest, PublishJwtKeyResponse,
};
use futures::Stream as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use tokio::sync::Notify;
use tonic::Streaming;
use tonic::metadata::MetadataMap;

/// An upstream authority that is an external plugin. After a signature the plugin goes on telling of its roots on the stream
/// of that call, which [`UpstreamAuthority::next_authorities`] listens to.
pub struct ExternalUpstreamAuthority {
    plugin: Plugin,
    /// The stream of the last signature, while the plugin keeps it open.
    told: Mutex<Told>,
    /// There is another stream.
    renewed: Notify,
}

type Told = Option<Streaming<MintX509caResponse>>;

impl ExternalUpstreamAuthority {
    /// With a plugin of that kind.
    pub fn new(plugin: Plugin) -> Self {
        Self { plugin, told: Mutex::default(), renewed: Notify::new() }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> PluginError {
    PluginError::internal("plugin closed stream unexpectedly")
}

fn ders(certificates: Vec<X509Certificate>) -> Vec<Arc<[u8]>> {
    certificates.into_iter().map(|certificate| Arc::from(certificate.asn1.as_ref())).collect()
}

fn authority(key: JwtKey) -> JwtAuthority {
    JwtAuthority {
        key_id: key.key_id,
        public_key: Arc::from(key.public_key.as_ref()),
        expires_at: key.expires_at,
        tainted: key.tainted,
    }
}

#[async_trait]
impl UpstreamAuthority for ExternalUpstreamAuthority {
    fn name(&self) -> &str {
        self.plugin.name()
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        let preferred_ttl = i32::try_from(ttl_seconds).unwrap_or(i32::MAX);
        let request = MintX509caRequest { csr: csr.to_vec().into(), preferred_ttl };
        let asked = futures::stream::iter([request]);
        let mut answers: Streaming<MintX509caResponse> =
            self.plugin.stream("MintX509CAAndSubscribe", asked, MetadataMap::new()).await?;
        let first = answers.message().await.map_err(|status| self.plugin.error(status))?.ok_or_else(closed)?;
        if first.x509_ca_chain.is_empty() {
            return Err(PluginError::internal("plugin response missing X.509 CA chain"));
        }
        if first.upstream_x509_roots.is_empty() {
            return Err(PluginError::internal("plugin response missing upstream X.509 roots"));
        }
        *self.told() = Some(answers);
        self.renewed.notify_one();
        Ok(MintedX509Ca { chain: ders(first.x509_ca_chain), roots: ders(first.upstream_x509_roots) })
    }

    async fn publish_jwt_key(&self, key: &JwtAuthority) -> Result<Vec<JwtAuthority>, PluginError> {
        let request = PublishJwtKeyRequest { jwt_key: Some(jwt_key(key)) };
        let asked = futures::stream::iter([request]);
        let mut answers: Streaming<PublishJwtKeyResponse> =
            self.plugin.stream("PublishJWTKeyAndSubscribe", asked, MetadataMap::new()).await?;
        let first = answers.message().await.map_err(|status| self.plugin.error(status))?.ok_or_else(closed)?;
        Ok(first.upstream_jwt_keys.into_iter().map(authority).collect())
    }

    async fn next_authorities(&self) -> Result<UpstreamAuthorities, PluginError> {
        loop {
            let heard = std::future::poll_fn(|cx| {
                let mut told = self.told();
                let Some(answers) = told.as_mut() else { return Poll::Pending };
                let heard = std::task::ready!(Pin::new(answers).poll_next(cx));
                // Plugins that do not tell close the stream; after a failure the next signature opens another.
                if !matches!(heard, Some(Ok(_))) {
                    *told = None;
                }
                Poll::Ready(heard)
            });
            let heard = tokio::select! {
                heard = heard => heard.transpose(),
                () = self.renewed.notified() => continue,
            };
            let Some(answer) = heard.map_err(|status| self.plugin.error(status))? else { continue };
            if !answer.x509_ca_chain.is_empty() || answer.upstream_x509_roots.is_empty() {
                return Err(PluginError::internal("plugin response missing upstream X.509 roots"));
            }
            let root = |c: X509Certificate| X509Authority { der: Arc::from(c.asn1.as_ref()), tainted: c.tainted };
            let x509 = answer.upstream_x509_roots.into_iter().map(root).collect();
            return Ok(UpstreamAuthorities { x509, ..Default::default() });
        }
    }
}
