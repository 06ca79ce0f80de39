//! `aws_rolesanywhere_trustanchor`: the X.509 authorities as a trust anchor of IAM Roles Anywhere.

use super::credentials::Credentials;
use super::service::{Call, Name, Service, endpoint_given};
use crate::world::World;
use async_trait::async_trait;
use bytes::Bytes;
use finial_core::{Bundle, Secret};
use finial_hcl::Value;
use finial_plugin::{BundlePublisher, PluginContext, PluginError, PublishedForm, Publishing, all_given, decode};
use http::Method;
use serde::Deserialize;
use serde_json::json;

/// What AWS takes at most, in bytes of PEM.
const BUNDLE_BYTES_MAX: usize = 8000;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    access_key_id: String,
    #[serde(deserialize_with = "finial_plugin::secret")]
    secret_access_key: Secret<String>,
    region: String,
    trust_anchor_id: String,
}

/// The `aws_rolesanywhere_trustanchor` bundle publisher.
pub struct RolesAnywhere {
    service: Service,
    trust_anchor_id: String,
    publishing: Publishing,
}

impl RolesAnywhere {
    /// The name in configuration.
    pub const NAME: &'static str = "aws_rolesanywhere_trustanchor";

    /// With SPIRE's keys.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        Self::within(data, &World::new(context)?)
    }

    pub(super) fn within(data: &Value, world: &World) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        all_given([(&config.region, "region"), (&config.trust_anchor_id, "trust anchor id")], |what| {
            format!("configuration is missing the {what}")
        })?;
        if config.trust_anchor_id.contains('/') {
            return Err(PluginError::invalid(
                "trust_anchor_id is not an id: take what follows trust-anchor/ in the ARN",
            ));
        }
        let (id, secret) = (&config.access_key_id, &config.secret_access_key);
        let credentials = Credentials::new(id, secret, &Secret::default(), &config.region);
        let url = endpoint_given(world, Name::RolesAnywhere, "");
        let service = Service::new(Name::RolesAnywhere, &config.region, url, credentials, world)?;
        let publishing = Publishing::new(PublishedForm::read("pem", "")?);
        Ok(Self { service, trust_anchor_id: config.trust_anchor_id, publishing })
    }

    async fn put(&self, pem: String) -> Result<(), PluginError> {
        if pem.len() > BUNDLE_BYTES_MAX {
            let message = format!("bundle too large: {} bytes of PEM, and AWS takes {BUNDLE_BYTES_MAX}", pem.len());
            return Err(PluginError::invalid(message));
        }
        let source = json!({ "sourceType": "CERTIFICATE_BUNDLE", "sourceData": { "x509CertificateData": pem } });
        let path = format!("/trustanchor/{}", self.trust_anchor_id);
        let headers = [("content-type", "application/json".to_owned())];
        let body = Bytes::from(json!({ "source": source }).to_string());
        let call = Call { method: Method::PATCH, path: &path, headers: &headers, body };
        self.service.call(&call).await.map(drop).map_err(|e| e.of("failed to update trust anchor"))
    }
}

#[async_trait]
impl BundlePublisher for RolesAnywhere {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn publish(&self, bundle: &Bundle) -> Result<(), PluginError> {
        self.publishing.publish(bundle, |pem| self.put(pem)).await
    }
}
