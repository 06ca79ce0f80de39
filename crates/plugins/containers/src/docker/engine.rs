//! A daemon that speaks Docker's API.

use finial_core::ErrorKind;
use finial_net::rest::{Answer, Client, ExchangeError, HttpError, Limits, Target, json};
use finial_plugin::PluginError;
use http::{HeaderMap, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How long one request may take, and how much it may answer: a container has up to 2 MiB of environment.
const LIMITS: Limits = Limits { time: Duration::from_secs(5), body: 8 << 20 };
/// Waits before the second attempt and those after it, as in SPIRE: a daemon that restarts is back soon.
const RETRIES: [Duration; 3] = [Duration::from_millis(100), Duration::from_millis(200), Duration::from_millis(400)];
/// What a part of a path holds as it is.
const PLAIN: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b':').remove(b'/').remove(b'@');

/// What the daemon says of a container; only what we need.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Container {
    #[serde(default)]
    id: String,
    #[serde(default)]
    name: String,
    /// The ID of the image that it was made from.
    #[serde(default)]
    image: String,
    #[serde(default)]
    pub(super) state: State,
    pub(super) config: ContainerConfig,
    /// The image's ID in full.
    #[serde(skip)]
    pub(super) image_config_digest: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct State {
    pub(super) pid: i32,
    pub(super) running: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct ContainerConfig {
    /// The image as it was asked for: a name, mostly.
    pub(super) image: String,
    pub(super) labels: Option<HashMap<String, String>>,
    pub(super) env: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    id: String,
}

#[derive(Deserialize)]
struct Refusal {
    message: String,
}

pub(super) struct Engine {
    client: Client,
    /// The version of its API, where the configuration says one.
    fixed_version: Option<String>,
    /// The version that it offers itself.
    own_version: Mutex<Option<String>>,
}

impl Engine {
    /// At `unix:///path`, `tcp://host:port` or `http://host:port`.
    pub(super) fn new(host: &str, version: &str) -> Result<Self, PluginError> {
        let target = match host.split_once("://") {
            Some(("unix", path)) if !path.is_empty() => Target::Unix(PathBuf::from(path)),
            Some(("tcp" | "http", address)) if !address.is_empty() => Target::Tcp(address.trim_end_matches('/').into()),
            _ => {
                let text = format!("unable to parse docker host {host:?}: give unix:///path/to/docker.sock");
                return Err(PluginError::invalid(text));
            }
        };
        let version = version.trim_start_matches('v');
        if !version.is_empty() && !is_version(version) {
            return Err(PluginError::invalid(format!("docker_version {version:?} is no API version, such as 1.41")));
        }
        let fixed_version = (!version.is_empty()).then(|| version.to_owned());
        Ok(Self { client: Client::new(target), fixed_version, own_version: Mutex::default() })
    }

    /// At the socket of that user, who must listen there himself.
    pub(super) fn of_user(host: &str, uid: u32) -> Result<Self, PluginError> {
        let engine = Self::new(host, "")?;
        Ok(Self { client: Client::of_user(engine.client.target().clone(), uid), ..engine })
    }

    /// The container of that ID, and of no other.
    pub(super) async fn container(&self, id: &str) -> Result<Container, PluginError> {
        let path = format!("/containers/{}/json", utf8_percent_encode(id, PLAIN));
        let mut container: Container = self.get(&path).await?;
        // An ID that a matcher of the configuration found may be short, or a name.
        if !container.id.starts_with(id) && container.name.trim_start_matches('/') != id {
            let other = container.id.chars().take(80).collect::<String>();
            return Err(PluginError::internal(format!(
                "asked about container {id}, the daemon answered about {other:?}"
            )));
        }
        container.image_config_digest = self.digest(&container).await;
        Ok(container)
    }

    /// The digest of the container's image. SPIRE looks the image up by the name that it was asked for, and gets another
    /// one's digest when the name has moved on since; the container itself knows.
    async fn digest(&self, container: &Container) -> Option<String> {
        if container.image.starts_with("sha256:") || container.config.image.is_empty() {
            return Some(container.image.clone());
        }
        let name = if container.image.is_empty() { &container.config.image } else { &container.image };
        let path = format!("/images/{}/json", utf8_percent_encode(name, PLAIN));
        // As in SPIRE: without the digest the other selectors are good still.
        self.get::<Image>(&path).await.ok().map(|image| image.id).filter(|id| !id.is_empty())
    }

    async fn get<T: DeserializeOwned + Send + 'static>(&self, path: &str) -> Result<T, PluginError> {
        let mut waits = RETRIES.iter();
        loop {
            let result = self.get_once(path).await;
            let passing = matches!(&result, Err(error) if error.kind == ErrorKind::Unavailable);
            match waits.next() {
                Some(wait) if passing => tokio::time::sleep(*wait).await,
                _ => return result,
            }
        }
    }

    async fn get_once<T: DeserializeOwned + Send + 'static>(&self, path: &str) -> Result<T, PluginError> {
        let version = match &self.fixed_version {
            Some(version) => Some(version.clone()),
            None => self.version().await?,
        };
        let versioned = version.map_or_else(|| path.to_owned(), |version| format!("/v{version}{path}"));
        let answer = self.request(&versioned).await?;
        if answer.status != StatusCode::OK {
            return Err(self.refused(&answer).await);
        }
        let malformed = |e: String| {
            PluginError::internal(format!("{} answers what is not of Docker's API", self.target())).because(e)
        };
        json(&answer).await.map_err(malformed)
    }

    /// The newest version of the API that the daemon has; `None` if it does not say.
    async fn version(&self) -> Result<Option<String>, PluginError> {
        if let Some(version) = self.own_version.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Ok(Some(version));
        }
        let answer = self.request("/_ping").await?;
        let version = answer.headers.get("Api-Version").and_then(|value| value.to_str().ok());
        let version = version.filter(|version| is_version(version)).map(str::to_owned);
        self.own_version.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&version);
        Ok(version)
    }

    async fn request(&self, path: &str) -> Result<Answer, PluginError> {
        let answer = self.client.get(path, &HeaderMap::new(), LIMITS).await;
        answer.map_err(|error| {
            let target = self.target();
            match error {
                HttpError::Connect(_) | HttpError::Dial(_) => PluginError::new(
                    ErrorKind::Unavailable,
                    format!(
                        "failed to connect to the docker API at {target}; check if the path is correct and if the daemon \
                         is running: {error}"
                    ),
                ),
                HttpError::Exchange(ExchangeError::Broken(cause)) => PluginError::new(ErrorKind::Unavailable, format!("{target}: {cause}")),
                HttpError::Timeout(_) => PluginError::new(ErrorKind::Timeout, format!("{target}: {error}")),
                HttpError::Exchange(ExchangeError::TooLarge(_)) => PluginError::internal(format!("{target}: {error}")),
            }
        })
    }

    async fn refused(&self, answer: &Answer) -> PluginError {
        let said = json::<Refusal>(answer).await.map(|refusal| refusal.message);
        let said: String = said.unwrap_or_else(|_| answer.status.to_string()).chars().take(300).collect();
        let kind = match answer.status {
            StatusCode::NOT_FOUND => ErrorKind::NotFound,
            // Another daemon by now, maybe, which does not have that version.
            StatusCode::BAD_REQUEST if self.fixed_version.is_none() => {
                self.own_version.lock().unwrap_or_else(PoisonError::into_inner).take();
                ErrorKind::Unavailable
            }
            status if status.is_server_error() => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        };
        PluginError::new(kind, format!("Error response from daemon: {said}"))
    }

    fn target(&self) -> &Target {
        self.client.target()
    }
}

fn is_version(text: &str) -> bool {
    let number = |part: &str| !part.is_empty() && part.len() < 6 && part.bytes().all(|b| b.is_ascii_digit());
    text.split_once('.').is_some_and(|(major, minor)| number(major) && number(minor))
}
