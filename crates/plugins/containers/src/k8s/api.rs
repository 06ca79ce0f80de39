//! The API server: what the node's kubelet does not have. Labels of namespaces, objects that brokers refer to, and whether a
//! broker may.

use super::kubelet::{Access, Auth, Kubelet};
use bytes::Bytes;
use finial_core::ErrorKind;
use finial_net::rest::{Answer, Limits, json};
use finial_plugin::PluginError;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use http::{Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use std::time::Duration;

const LIMITS: Limits = Limits { time: Duration::from_secs(4), body: 32 << 20 };
/// What a part of a path holds as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_');
/// The forms in which an object comes.
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const METADATA: HeaderValue =
    HeaderValue::from_static("application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json");
const METADATA_LIST: HeaderValue =
    HeaderValue::from_static("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json");

/// Where the API server is, and who asks it.
pub struct ApiServer {
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// A file with its CA's certificates.
    pub ca: PathBuf,
    /// A file with a service account's token.
    pub token: PathBuf,
}

impl ApiServer {
    /// By what Kubernetes gives each container: two variables, and the service account in that folder.
    pub(super) fn of_this_pod(folder: &str) -> Option<Self> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let port = variable("KUBERNETES_SERVICE_PORT")?.parse().ok()?;
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let file = |name: &str| PathBuf::from(folder).join(name);
        Some(Self { host, port, ca: file("ca.crt"), token: file("token") })
    }
}

/// How much of an object is wanted.
#[derive(Clone, Copy)]
pub(super) enum Form {
    Whole,
    Metadata,
    MetadataList,
}

/// Asks the API server.
pub(super) struct Api(Option<Kubelet>);

#[derive(Deserialize)]
struct Refusal {
    message: String,
}

impl Api {
    /// Without a place, every question fails with a word about it.
    pub(super) fn new(place: Option<ApiServer>, reload_after: Duration) -> Self {
        Self(place.map(|place| {
            let (ca, auth) = (Some(place.ca), Auth::Token(place.token));
            Kubelet::new(Access::Secure {
                server: "API server",
                node_name: place.host,
                port: place.port,
                ca,
                auth,
                reload_after,
            })
        }))
    }

    /// The object at `path`; `None` if there is none.
    pub(super) async fn get<T: DeserializeOwned + Send + 'static>(
        &self,
        path: &str,
        form: Form,
    ) -> Result<Option<T>, String> {
        let accept = match form {
            Form::Whole => JSON,
            Form::Metadata => METADATA,
            Form::MetadataList => METADATA_LIST,
        };
        let answer = self.ask(Method::GET, path, accept, Bytes::new()).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        read(&answer).await.map(Some)
    }

    /// Creates what `body` says; the answer.
    pub(super) async fn create<T: DeserializeOwned + Send + 'static>(
        &self,
        path: &str,
        body: &serde_json::Value,
    ) -> Result<T, String> {
        read(&self.ask(Method::POST, path, JSON, body.to_string().into()).await?).await
    }

    async fn ask(&self, method: Method, path: &str, accept: HeaderValue, body: Bytes) -> Result<Answer, String> {
        let outside =
            "unable to load Kubernetes client config: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set";
        let server = self.0.as_ref().ok_or(outside)?;
        let (client, mut headers) = server.client()?;
        headers.insert(ACCEPT, accept);
        headers.insert(CONTENT_TYPE, JSON);
        let answer = client.send(method, path, &headers, body, LIMITS).await;
        if answer.as_ref().is_ok_and(|answer| answer.status != StatusCode::UNAUTHORIZED) {
            return answer.map_err(|e| e.to_string());
        }
        // The token may have been replaced.
        server.doubt();
        answer.map_err(|e| e.to_string())
    }
}

async fn read<T: DeserializeOwned + Send + 'static>(answer: &Answer) -> Result<T, String> {
    if !answer.status.is_success() {
        let said = json::<Refusal>(answer).await.map(|refusal| refusal.message);
        let said = said.unwrap_or_else(|_| String::from_utf8_lossy(&answer.body).into_owned());
        return Err(format!("{}: {}", answer.status, said.chars().take(300).collect::<String>()));
    }
    json(answer).await
}

/// A part of a path.
pub(super) fn segment(text: &str) -> String {
    utf8_percent_encode(text, PLAIN).to_string()
}

pub(super) fn internal(message: String) -> PluginError {
    PluginError::new(ErrorKind::Internal, message)
}
