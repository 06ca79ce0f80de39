//! One service of AWS: where it is, and requests to it.

use super::credentials::Credentials;
use super::sigv4::{self, Request, Scope};
use crate::world::{Failure, Remote, World, element, encode_path, patiently};
use bytes::Bytes;
use finial_crypto::sha256_hex;
use finial_net::rest::Answer;
use finial_plugin::PluginError;
use http::Method;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// The services that are asked, by the names that AWS gives them.
#[derive(Clone, Copy)]
pub(super) enum Name {
    AcmPca,
    RolesAnywhere,
    S3,
    SecretsManager,
    Sts,
}

impl Name {
    /// In host names and signatures.
    fn in_host(self) -> &'static str {
        match self {
            Self::AcmPca => "acm-pca",
            Self::RolesAnywhere => "rolesanywhere",
            Self::S3 => "s3",
            Self::SecretsManager => "secretsmanager",
            Self::Sts => "sts",
        }
    }

    /// In `AWS_ENDPOINT_URL_…`.
    fn in_env(self) -> &'static str {
        match self {
            Self::AcmPca => "ACM_PCA",
            Self::RolesAnywhere => "ROLESANYWHERE",
            Self::S3 => "S3",
            Self::SecretsManager => "SECRETS_MANAGER",
            Self::Sts => "STS",
        }
    }
}

/// Where the service is if the environment or configuration says so: a URL, or a host of HTTPS.
pub(super) fn endpoint_given(world: &World, name: Name, configured: &str) -> Option<String> {
    let configured = Some(configured.to_owned()).filter(|url| !url.is_empty());
    let own = || world.env(&format!("AWS_ENDPOINT_URL_{}", name.in_env()));
    let url = configured.or_else(own).or_else(|| world.env("AWS_ENDPOINT_URL"))?;
    Some(if url.contains("://") { url } else { format!("https://{url}") })
}

/// The host where AWS has it. Elsewhere regions may have names of any kind.
pub(super) fn usual_host(world: &World, name: Name, region: &str) -> Result<String, PluginError> {
    check_region(region)?;
    let suffix = match region {
        r if r.starts_with("cn-") => "amazonaws.com.cn",
        r if r.starts_with("us-isob-") => "sc2s.sgov.gov",
        r if r.starts_with("us-iso-") => "c2s.ic.gov",
        r if r.starts_with("eusc-") => "amazonaws.eu",
        _ => "amazonaws.com",
    };
    let fips = if world.env("AWS_USE_FIPS_ENDPOINT").as_deref() == Some("true") { "-fips" } else { "" };
    Ok(format!("{}{fips}.{region}.{suffix}", name.in_host()))
}

/// A region is a word of a host name and nothing more.
fn check_region(region: &str) -> Result<(), PluginError> {
    if !region.is_empty() && region.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        return Ok(());
    }
    Err(PluginError::invalid(format!("region {region:?} is not the name of an AWS region, such as us-east-1")))
}

/// What services say of keys that they do not know, or not any more.
const STALE: [&str; 6] = [
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "UnrecognizedClientException",
];

/// A service that is asked in our name.
pub(super) struct Service {
    name: Name,
    region: String,
    remote: Remote,
    credentials: Credentials,
    world: World,
}

/// A request to it.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    /// Not yet encoded.
    pub(super) path: &'a str,
    /// Names in lower case.
    pub(super) headers: &'a [(&'static str, String)],
    pub(super) body: Bytes,
}

impl Service {
    /// At this URL, or where AWS has it.
    pub(super) fn new(
        name: Name,
        region: &str,
        url: Option<String>,
        credentials: Credentials,
        world: &World,
    ) -> Result<Self, PluginError> {
        let url = url.map_or_else(|| usual_host(world, name, region).map(|host| format!("https://{host}")), Ok)?;
        let remote = world.remote(&url)?;
        Ok(Self { name, region: region.to_owned(), remote, credentials, world: world.clone() })
    }

    /// Asks, again if that may help. Only success is returned.
    pub(super) async fn call(&self, call: &Call<'_>) -> Result<Answer, Failure> {
        let answer = patiently(|| self.call_once(call)).await;
        match &answer {
            // The keys that are kept may have been taken back before their end.
            Err(e) if STALE.contains(&e.code()) => {
                self.credentials.forget().await;
                self.call_once(call).await
            }
            _ => answer,
        }
    }

    async fn call_once(&self, call: &Call<'_>) -> Result<Answer, Failure> {
        let keys = self.credentials.keys(&self.world).await?;
        let stamp = sigv4::stamp(self.world.now());
        let path = format!("{}{}", self.remote.base(), encode_path(call.path));
        // S3 signs the path as it is sent, the others encode it once more.
        let signed_path = if matches!(self.name, Name::S3) { path } else { encode_path(&path) };
        let body_hash = sha256_hex(&call.body);
        let mut headers: BTreeMap<String, String> =
            call.headers.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        headers.insert("host".into(), self.remote.host().to_str().unwrap_or_default().to_owned());
        headers.insert("x-amz-date".into(), stamp.clone());
        headers.insert("x-amz-content-sha256".into(), body_hash.clone());
        if let Some(token) = &keys.token {
            headers.insert("x-amz-security-token".into(), token.expose().clone());
        }
        let request = Request {
            method: call.method.as_str(),
            path: &signed_path,
            query: "",
            headers: &headers,
            body_hash: &body_hash,
        };
        let scope = Scope { region: &self.region, service: self.name.in_host(), stamp: &stamp };
        let authorization = sigv4::authorization(&request, &scope, &keys);
        let mut sent: Vec<_> = headers.iter().filter(|(name, _)| *name != "host").collect();
        let name = "authorization".to_owned();
        sent.push((&name, &authorization));
        let sent: Vec<_> = sent.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let answer = self.remote.ask(call.method.clone(), &encode_path(call.path), &sent, call.body.clone()).await?;
        if answer.status.is_success() { Ok(answer) } else { Err(refusal(&self.remote, &answer)) }
    }

    /// An operation of a service that speaks JSON.
    pub(super) async fn operation(&self, target: &str, version: &str, fields: &Value) -> Result<Value, Failure> {
        let headers =
            [("content-type", format!("application/x-amz-json-{version}")), ("x-amz-target", target.to_owned())];
        let body = Bytes::from(fields.to_string());
        let answer = self.call(&Call { method: Method::POST, path: "/", headers: &headers, body }).await?;
        self.remote.json(&answer)
    }

    pub(super) fn odd(&self, why: impl ToString) -> Failure {
        self.remote.odd(why)
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Complaint {
    #[serde(rename = "__type", alias = "code", alias = "Code")]
    kind: String,
    #[serde(alias = "Message")]
    message: String,
}

/// What a service says when it says no: JSON of several kinds, or XML.
pub(super) fn refusal(remote: &Remote, answer: &Answer) -> Failure {
    let text = String::from_utf8_lossy(&answer.body);
    let header = |name| answer.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut complaint: Complaint = serde_json::from_slice(&answer.body).unwrap_or_default();
    if complaint.kind.is_empty() {
        complaint.kind = header("x-amzn-errortype").to_owned();
    }
    if complaint.kind.is_empty() {
        complaint = Complaint {
            kind: element(&text, "Code").unwrap_or_default(),
            message: element(&text, "Message").unwrap_or_default(),
        };
    }
    // `namespace#Name:url` is told by the name.
    let kind = complaint.kind.rsplit('#').next().unwrap_or_default();
    let kind = kind.split(':').next().unwrap_or_default();
    let region = header("x-amz-bucket-region");
    let elsewhere = answer.status.is_redirection() || kind == "AuthorizationHeaderMalformed";
    let message = match region {
        "" => complaint.message,
        region if elsewhere => format!("{} (the bucket is in region {region})", complaint.message),
        _ => complaint.message,
    };
    remote.refused(answer.status, kind, &message)
}
