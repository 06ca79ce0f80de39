//! Cloud Storage: the bundle publisher `gcp_cloudstorage` and the notifier `gcs_bundle`.

use super::good;
use super::token::Tokens;
use crate::world::{Failure, Remote, World, encode, patiently, published_form};
use async_trait::async_trait;
use bytes::Bytes;
use finial_core::Bundle;
use finial_hcl::Value;
use finial_net::rest::Answer;
use finial_plugin::{
    BundleFormat, BundlePublisher, HostServices, Notifier, PluginContext, PluginError, Publishing, all_given, decode,
};
use http::Method;
use serde::Deserialize;
use serde_json::json;
use std::sync::{Arc, OnceLock};

const URL: &str = "https://storage.googleapis.com";
/// So often another server may have written first; each time the bundle is newer.
const CONFLICTS_MAX: usize = 10;
/// What Google's libraries find these texts to be.
const TEXT: &str = "text/plain; charset=utf-8";

/// One object of a bucket.
struct Object {
    remote: Remote,
    /// None for an emulator, which asks nobody who he is.
    tokens: Option<Tokens>,
    bucket: String,
    name: String,
    world: World,
}

#[derive(Deserialize)]
struct Attributes {
    /// A number, but JSON's are too small for it.
    generation: String,
}

impl Object {
    fn new(bucket: &str, name: &str, file: &str, world: &World) -> Result<Self, PluginError> {
        let emulator = world.env("STORAGE_EMULATOR_HOST");
        let url = match &emulator {
            Some(url) if url.contains("://") => url.clone(),
            Some(host) => format!("http://{host}"),
            None => URL.to_owned(),
        };
        let (remote, tokens) = (world.remote(&url)?, emulator.is_none().then(|| Tokens::new(file)));
        Ok(Self { remote, tokens, bucket: bucket.to_owned(), name: name.to_owned(), world: world.clone() })
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        (content_type, body): (Option<&str>, Bytes),
    ) -> Result<Answer, Failure> {
        let once = || async {
            let token = match &self.tokens {
                Some(tokens) => Some(tokens.get(&self.world).await?),
                None => None,
            };
            let bearer = token.map(|token| format!("Bearer {}", token.expose()));
            let mut headers: Vec<_> = bearer.iter().map(|bearer| ("authorization", bearer.as_str())).collect();
            headers.extend(content_type.map(|value| ("content-type", value)));
            good(&self.remote, self.remote.ask(method.clone(), path, &headers, body.clone()).await?)
        };
        match (patiently(&once).await, &self.tokens) {
            (Err(e), Some(tokens)) if e.status() == Some(401) => {
                tokens.forget().await;
                once().await
            }
            (done, _) => done,
        }
    }

    /// Its generation; 0 while it is not there.
    async fn generation(&self) -> Result<String, Failure> {
        let path = format!("/storage/v1/b/{}/o/{}?fields=generation", encode(&self.bucket), encode(&self.name));
        match self.ask(Method::GET, &path, (None, Bytes::new())).await {
            Ok(answer) => Ok(self.remote.json::<Attributes>(&answer)?.generation),
            // A bucket that is not there is found out when writing.
            Err(e) if e.status() == Some(404) => Ok("0".to_owned()),
            Err(e) => Err(e),
        }
    }

    /// Writes it, on the condition that it is still of that generation.
    async fn put(&self, content_type: &str, text: &str, generation: Option<&str>) -> Result<(), Failure> {
        let condition = generation.map(|g| format!("&ifGenerationMatch={}", encode(g))).unwrap_or_default();
        let path = format!("/upload/storage/v1/b/{}/o?uploadType=multipart{condition}", encode(&self.bucket));
        let boundary = uuid::Uuid::new_v4().simple().to_string();
        let about = json!({ "name": self.name, "contentType": content_type });
        let body = format!(
            "--{boundary}\r\nContent-Type: application/json\r\n\r\n{about}\r\n\
             --{boundary}\r\nContent-Type: {content_type}\r\n\r\n{text}\r\n--{boundary}--\r\n"
        );
        let content_type = format!("multipart/related; boundary={boundary}");
        self.ask(Method::POST, &path, (Some(&content_type), Bytes::from(body))).await.map(drop)
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PublisherConfig {
    bucket_name: String,
    object_name: String,
    format: String,
    service_account_file: String,
    refresh_hint: String,
}

/// The `gcp_cloudstorage` bundle publisher.
pub struct CloudStorage {
    object: Object,
    publishing: Publishing,
}

impl CloudStorage {
    /// The name in configuration.
    pub const NAME: &'static str = "gcp_cloudstorage";

    /// With SPIRE's keys.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        Self::within(data, &World::new(context)?)
    }

    pub(super) fn within(data: &Value, world: &World) -> Result<Self, PluginError> {
        let config: PublisherConfig = decode(data)?;
        all_given(
            [
                (&config.bucket_name, "bucket name"),
                (&config.object_name, "object name"),
                (&config.format, "bundle format"),
            ],
            |what| format!("configuration is missing the {what}"),
        )?;
        let publishing = Publishing::new(published_form(&config.format, &config.refresh_hint)?);
        let object = Object::new(&config.bucket_name, &config.object_name, &config.service_account_file, world)?;
        Ok(Self { object, publishing })
    }
}

#[async_trait]
impl BundlePublisher for CloudStorage {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn publish(&self, bundle: &Bundle) -> Result<(), PluginError> {
        let put =
            async |text: String| self.object.put(TEXT, &text, None).await.map_err(|e| e.of("failed to write bundle"));
        self.publishing.publish(bundle, put).await
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NotifierConfig {
    bucket: String,
    object_path: String,
    service_account_file: String,
}

/// The `gcs_bundle` notifier.
pub struct GcsBundle {
    object: Object,
    host: OnceLock<Arc<HostServices>>,
}

impl GcsBundle {
    /// The name in configuration.
    pub const NAME: &'static str = "gcs_bundle";

    /// With SPIRE's keys.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        Self::within(data, &World::new(context)?)
    }

    pub(super) fn within(data: &Value, world: &World) -> Result<Self, PluginError> {
        let config: NotifierConfig = decode(data)?;
        all_given([(&config.bucket, "bucket"), (&config.object_path, "object_path")], |key| {
            format!("{key} must be set")
        })?;
        let object = Object::new(&config.bucket, &config.object_path, &config.service_account_file, world)?;
        Ok(Self { object, host: OnceLock::new() })
    }

    /// The server's bundle as it is now; what was told while the server has none to show.
    async fn newest(&self, told: &Bundle) -> Bundle {
        match self.host.get() {
            Some(host) => host.newest_bundle(told).await,
            None => told.clone(),
        }
    }

    /// Other servers of the trust domain write the same object. A bundle that is read after the object's generation is not
    /// older than what the object holds then; if somebody writes in between, it begins anew.
    async fn write(&self, told: &Bundle) -> Result<(), PluginError> {
        let object = &self.object;
        let named = format!("bundle object {}/{}", object.bucket, object.name);
        for _ in 0..CONFLICTS_MAX {
            let generation = object.generation().await.map_err(|e| e.of(&format!("unable to get {named}")))?;
            let text = BundleFormat::Pem.write(&self.newest(told).await);
            match object.put("application/x-pem-file", &text, Some(&generation)).await {
                Ok(()) => return Ok(()),
                Err(e) if e.status() == Some(412) => {
                    tracing::debug!(generation, "Conflict detected setting bundle object");
                }
                Err(e) => return Err(e.of(&format!("unable to update {named}"))),
            }
        }
        Err(PluginError::internal(format!("unable to update {named}: others wrote it {CONFLICTS_MAX} times meanwhile")))
    }
}

#[async_trait]
impl Notifier for GcsBundle {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn use_host(&self, host: Arc<HostServices>) {
        // Set once, when the plugin is made.
        let _ = self.host.set(host);
    }

    async fn bundle_loaded(&self, bundle: &Bundle) -> Result<(), PluginError> {
        self.write(bundle).await
    }

    async fn bundle_updated(&self, bundle: &Bundle) -> Result<(), PluginError> {
        self.write(bundle).await
    }
}
