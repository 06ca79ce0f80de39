//! `aws_s3`: the bundle as an object of S3, or of what speaks its protocol.

use super::credentials::Credentials;
use super::service::{Call, Name, Service, endpoint_given, usual_host};
use crate::world::{World, published_form};
use async_trait::async_trait;
use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use finial_core::{Bundle, Secret};
use finial_hcl::Value;
use finial_plugin::{BundlePublisher, PluginContext, PluginError, Publishing, all_given, decode};
use http::Method;
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    access_key_id: String,
    #[serde(deserialize_with = "finial_plugin::secret")]
    secret_access_key: Secret<String>,
    region: String,
    bucket: String,
    object_key: String,
    format: String,
    endpoint: String,
    refresh_hint: String,
}

/// The `aws_s3` bundle publisher.
pub struct S3 {
    service: Service,
    /// Of the object, from the service's root.
    path: String,
    publishing: Publishing,
}

impl S3 {
    /// The name in configuration.
    pub const NAME: &'static str = "aws_s3";

    /// With SPIRE's keys.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        Self::within(data, &World::new(context)?)
    }

    pub(super) fn within(data: &Value, world: &World) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        all_given(
            [
                (&config.region, "region"),
                (&config.bucket, "bucket name"),
                (&config.object_key, "object key"),
                (&config.format, "bundle format"),
            ],
            |what| format!("configuration is missing the {what}"),
        )?;
        let form = published_form(&config.format, &config.refresh_hint)?;
        let (url, path) = match endpoint_given(world, Name::S3, &config.endpoint) {
            Some(url) => (url, format!("/{}/{}", config.bucket, config.object_key)),
            None => place(&usual_host(world, Name::S3, &config.region)?, &config.bucket, &config.object_key),
        };
        let (id, secret) = (&config.access_key_id, &config.secret_access_key);
        let credentials = Credentials::new(id, secret, &Secret::default(), &config.region);
        let service = Service::new(Name::S3, &config.region, Some(url), credentials, world)?;
        Ok(Self { service, path, publishing: Publishing::new(form) })
    }

    async fn put(&self, text: String) -> Result<(), PluginError> {
        // Buckets whose objects are locked want a checksum.
        let checksum = BASE64.encode(digest::digest(&digest::SHA256, text.as_bytes()));
        let headers = [("content-type", "application/octet-stream".to_owned()), ("x-amz-checksum-sha256", checksum)];
        let call = Call { method: Method::PUT, path: &self.path, headers: &headers, body: Bytes::from(text) };
        self.service.call(&call).await.map(drop).map_err(|e| e.of("failed to put object"))
    }
}

/// Where an object is. A bucket has a host of its own if its name can be one that the service's certificate is good for.
fn place(host: &str, bucket: &str, key: &str) -> (String, String) {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if bucket.bytes().all(plain) {
        (format!("https://{bucket}.{host}"), format!("/{key}"))
    } else {
        (format!("https://{host}"), format!("/{bucket}/{key}"))
    }
}

#[async_trait]
impl BundlePublisher for S3 {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn publish(&self, bundle: &Bundle) -> Result<(), PluginError> {
        self.publishing.publish(bundle, |text| self.put(text)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_has_a_host_of_its_own_where_the_certificate_allows_it() {
        let host = "s3.eu-west-1.amazonaws.com";
        let at = |bucket| place(host, bucket, "a/b");
        assert_eq!(at("bundles"), ("https://bundles.s3.eu-west-1.amazonaws.com".into(), "/a/b".into()));
        assert_eq!(at("my.bundles"), ("https://s3.eu-west-1.amazonaws.com".into(), "/my.bundles/a/b".into()));
    }
}
