//! `awssecret`: an upstream CA whose certificate and key are secrets of AWS Secrets Manager. They are read again at each
//! signature, so that they can be replaced while the server runs; what was read last serves on while they cannot be read.

use crate::aws::credentials::Credentials;
use crate::aws::profile::Profile;
use crate::aws::service::{Name, Service, endpoint_given};
use crate::world::World;
use async_trait::async_trait;
use finial_core::Secret;
use finial_crypto::pem;
use finial_hcl::Value;
use finial_plugin::{
    MintedX509Ca, PluginContext, PluginError, SigningCa, UpstreamAuthority, all_given, check_ca_csr, decode,
};
use serde::Deserialize;
use serde_json::json;
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    region: String,
    cert_file_arn: String,
    key_file_arn: String,
    bundle_file_arn: String,
    access_key_id: String,
    #[serde(deserialize_with = "finial_plugin::secret")]
    secret_access_key: Secret<String>,
    #[serde(deserialize_with = "finial_plugin::secret")]
    secret_token: Secret<String>,
    assume_role_arn: String,
}

/// The `awssecret` upstream authority.
pub struct Secrets {
    service: Service,
    config: Config,
    context: PluginContext,
    last: Mutex<Option<Arc<SigningCa>>>,
}

/// `region` may come from where AWS's tools have theirs.
fn region(config: &Config, world: &World) -> Result<String, PluginError> {
    let own = Some(config.region.clone()).filter(|region| !region.is_empty());
    let env = || world.env("AWS_REGION").or_else(|| world.env("AWS_DEFAULT_REGION"));
    let name = Profile::name(world).unwrap_or_else(|| "default".to_owned());
    let shared = || Profile::load(world, &name).ok()??.get("region").map(str::to_owned);
    own.or_else(env).or_else(shared).ok_or_else(|| PluginError::invalid("configuration missing 'region' value"))
}

impl Secrets {
    /// The name in configuration.
    pub const NAME: &'static str = "awssecret";

    /// With SPIRE's keys. Nothing is read yet.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        Self::within(data, context, &World::new(context)?)
    }

    pub(in crate::aws) fn within(data: &Value, context: &PluginContext, world: &World) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        all_given([(&config.cert_file_arn, "cert_file_arn"), (&config.key_file_arn, "key_file_arn")], |key| {
            format!("configuration missing '{key}' value")
        })?;
        let region = region(&config, world)?;
        let token = match config.secret_token.expose().as_str() {
            "" => world.env("AWS_SESSION_TOKEN").map(Secret::new).unwrap_or_default(),
            _ => config.secret_token.clone(),
        };
        let credentials = Credentials::new(&config.access_key_id, &config.secret_access_key, &token, &region);
        let credentials = credentials.assuming(&config.assume_role_arn);
        let url = endpoint_given(world, Name::SecretsManager, "");
        let service = Service::new(Name::SecretsManager, &region, url, credentials, world)?;
        Ok(Self { service, config, context: context.clone(), last: Mutex::default() })
    }

    #[cfg(test)]
    pub(in crate::aws) fn context(&self) -> &PluginContext {
        &self.context
    }

    async fn read(&self, arn: &str) -> Result<Secret<String>, PluginError> {
        let unable = |e: &dyn Display| PluginError::invalid(format!("unable to read {arn}: {e}"));
        let target = "secretsmanager.GetSecretValue";
        let answer = self.service.operation(target, "1.1", &json!({ "SecretId": arn })).await;
        let mut answer = answer.map_err(|e| unable(&e))?;
        match answer.get_mut("SecretString").map(serde_json::Value::take) {
            Some(serde_json::Value::String(text)) => Ok(Secret::new(text)),
            _ => Err(unable(&self.service.odd("the secret has no text; it must be PEM, stored as a text"))),
        }
    }

    async fn load(&self) -> Result<Arc<SigningCa>, PluginError> {
        let config = &self.config;
        let parse = |what: &str, e: pem::PemError| PluginError::invalid(format!("unable to parse {what}: {e}"));
        let key = self.read(&config.key_file_arn).await?;
        let key = pem::private_key(key.expose().as_bytes())
            .map_err(|e| parse(&format!("private key of {}", config.key_file_arn), e))?;
        let certificates = self.read(&config.cert_file_arn).await?;
        let certificates = pem::certificates(certificates.expose().as_bytes())
            .map_err(|e| parse(&format!("certificate of {}", config.cert_file_arn), e))?;
        let roots = match config.bundle_file_arn.as_str() {
            "" => None,
            arn => {
                let text = self.read(arn).await?;
                let unable = |e| PluginError::invalid(format!("unable to load upstream CA bundle of {arn}: {e}"));
                Some(pem::certificates(text.expose().as_bytes()).map_err(unable)?)
            }
        };
        let around = (&self.context.trust_domain, self.context.clock.now());
        let ca = Arc::new(SigningCa::new(key, certificates, roots, "bundle_file_arn", around)?);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(ca.clone());
        Ok(ca)
    }
}

#[async_trait]
impl UpstreamAuthority for Secrets {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn prepare(&self) -> Result<(), PluginError> {
        self.load().await.map(drop)
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        let csr = check_ca_csr(csr, &self.context.trust_domain)?;
        let ca = match self.load().await {
            Ok(ca) => ca,
            Err(error) => {
                let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let Some(last) = last else { return Err(error) };
                tracing::warn!(%error, "Upstream CA could not be read again; the one read last is used");
                last
            }
        };
        ca.mint(&csr, ttl_seconds, (&self.context.trust_domain, self.context.clock.now())).await
    }
}
