//! `azure_blob`: the bundle as a blob of Azure Storage.

use super::shared_key::SharedKey;
use super::token::{Application, Tokens};
use crate::world::{Failure, Remote, World, element, encode_path, patiently, published_form};
use async_trait::async_trait;
use bytes::Bytes;
use finial_core::{Bundle, Secret};
use finial_hcl::Value;
use finial_net::rest::Answer;
use finial_plugin::{BundlePublisher, PluginContext, PluginError, Publishing, all_given, decode};
use http::Method;
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

const ENDPOINT: &str = "blob.core.windows.net";
/// Of the storage protocol.
const VERSION: &str = "2022-11-02";
const DATE: &[BorrowedFormatItem<'_>] =
    format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    storage_account_name: String,
    #[serde(deserialize_with = "finial_plugin::secret")]
    storage_account_key: Secret<String>,
    service_endpoint: String,
    container_name: String,
    blob_name: String,
    format: String,
    tenant_id: String,
    app_id: String,
    #[serde(deserialize_with = "finial_plugin::secret")]
    app_secret: Secret<String>,
    refresh_hint: String,
}

enum Identity {
    Key(SharedKey),
    Tokens(Tokens),
}

/// The `azure_blob` bundle publisher.
pub struct Blob {
    remote: Remote,
    path: String,
    identity: Identity,
    publishing: Publishing,
    world: World,
}

impl Blob {
    /// The name in configuration.
    pub const NAME: &'static str = "azure_blob";

    /// With SPIRE's keys.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        Self::within(data, &World::new(context)?)
    }

    pub(super) fn within(data: &Value, world: &World) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        let given = [
            (&config.storage_account_name, "storage account name"),
            (&config.container_name, "container name"),
            (&config.blob_name, "blob name"),
            (&config.format, "bundle format"),
        ];
        all_given(given, |what| format!("configuration is missing the {what}"))?;
        let form = published_form(&config.format, &config.refresh_hint)?;
        let endpoint = if config.service_endpoint.is_empty() { ENDPOINT } else { &config.service_endpoint };
        let url = format!("https://{}.{endpoint}", config.storage_account_name);
        let remote = world.remote(&url);
        let remote =
            remote.map_err(|e| PluginError::invalid(format!("could not parse service endpoint url: {}", e.message)))?;
        let path = encode_path(&format!("/{}/{}", config.container_name, config.blob_name));
        let identity = identity(config)?;
        Ok(Self { remote, path, identity, publishing: Publishing::new(form), world: world.clone() })
    }

    async fn put_once(&self, text: &str) -> Result<(), Failure> {
        let now = OffsetDateTime::from_unix_timestamp(self.world.now()).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let date = now.format(DATE).unwrap_or_default();
        let mut headers = vec![
            ("content-type", "application/octet-stream"),
            ("x-ms-blob-type", "BlockBlob"),
            ("x-ms-date", date.as_str()),
            ("x-ms-version", VERSION),
        ];
        let authorization = match &self.identity {
            Identity::Key(key) => key.authorization("PUT", &self.path, text.len(), &headers),
            Identity::Tokens(tokens) => format!("Bearer {}", tokens.get(&self.world).await?.expose()),
        };
        headers.push(("authorization", &authorization));
        let answer = self.remote.ask(Method::PUT, &self.path, &headers, Bytes::from(text.to_owned())).await?;
        if answer.status.is_success() { Ok(()) } else { Err(refusal(&self.remote, &answer)) }
    }

    async fn put(&self, text: &str) -> Result<(), PluginError> {
        let mut done = patiently(|| self.put_once(text)).await;
        if let (Err(e), Identity::Tokens(tokens)) = (&done, &self.identity)
            && e.status() == Some(401)
        {
            // The token that is kept may have been taken back before its end.
            tokens.forget().await;
            done = self.put_once(text).await;
        }
        done.map_err(|e| e.of("failed to upload blob"))
    }
}

fn identity(config: Config) -> Result<Identity, PluginError> {
    let parts = [
        (config.tenant_id.is_empty(), "tenant ID"),
        (config.app_id.is_empty(), "app ID"),
        (config.app_secret.expose().is_empty(), "app secret"),
    ];
    let is_application = parts.iter().any(|(is_empty, _)| !is_empty);
    if !config.storage_account_key.expose().is_empty() {
        if is_application {
            let message = "storage account key and client secret credentials are mutually exclusive";
            return Err(PluginError::invalid(message));
        }
        return SharedKey::new(&config.storage_account_name, &config.storage_account_key).map(Identity::Key);
    }
    if !is_application {
        return Ok(Identity::Tokens(Tokens::new(None)));
    }
    if let Some((_, what)) = parts.iter().find(|(is_empty, _)| *is_empty) {
        return Err(PluginError::invalid(format!("configuration is missing the {what}")));
    }
    let application = Application { tenant: config.tenant_id, id: config.app_id, secret: config.app_secret };
    Ok(Identity::Tokens(Tokens::new(Some(application))))
}

/// What storage says when it says no: XML, and its word for it in a header.
fn refusal(remote: &Remote, answer: &Answer) -> Failure {
    let text = String::from_utf8_lossy(&answer.body);
    let header = answer.headers.get("x-ms-error-code").and_then(|code| code.to_str().ok()).map(str::to_owned);
    let code = header.or_else(|| element(&text, "Code")).unwrap_or_default();
    remote.refused(answer.status, code, &element(&text, "Message").unwrap_or_default())
}

#[async_trait]
impl BundlePublisher for Blob {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn publish(&self, bundle: &Bundle) -> Result<(), PluginError> {
        self.publishing.publish(bundle, |text| async move { self.put(&text).await }).await
    }
}
