//! `docker`: what the Docker daemon, or podman by Docker's API, says of the container that a process runs in.

mod engine;
mod matchers;

use crate::cgroup;
use crate::process::{cgroups, cgroups_of, locate_error};
use async_trait::async_trait;
use engine::{Container, Engine};
use finial_core::{ErrorKind, Selector};
use finial_hcl::Value;
use finial_plugin::{Peer, PluginContext, PluginError, WorkloadAttestor, decode, prefixed_selectors};
use matchers::Matchers;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

const DOCKER_SOCKET: &str = "unix:///var/run/docker.sock";
const PODMAN_SOCKET: &str = "unix:///run/podman/podman.sock";
const PODMAN_SOCKET_OF_USER: &str = "unix:///run/user/%d/podman/podman.sock";
/// So many callers ask the daemons at the same time; the others wait.
const ASKING_MAX: usize = 16;
/// So many ask one user's own podman, which may be as slow as that user likes.
const ASKING_USER_MAX: usize = 2;
/// How long one attestation may take in all: a little less than the agent gives each attestor, so that the message that says
/// what was slow is ours.
const TIMEOUT: Duration = Duration::from_secs(9);

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    docker_socket_path: String,
    docker_version: String,
    podman_socket_path: String,
    podman_socket_path_template: String,
    podman_users: Option<Vec<u32>>,
    container_id_cgroup_matchers: Vec<String>,
    use_new_container_locator: Option<bool>,
    verbose_container_locator_logs: bool,
    sigstore: Option<IgnoredAny>,
}

/// The attestor.
pub struct Docker {
    docker: Engine,
    podman: Engine,
    /// With a `%d` for the user.
    podman_of_user: String,
    /// Whose own podman is asked, where not everybody's is.
    podman_users: Option<Vec<u32>>,
    /// It was said what everybody's podman may say.
    warned: AtomicBool,
    matchers: Option<Matchers>,
    is_verbose: bool,
    asking: Semaphore,
    users: Users,
}

/// Who asks the users' own engines: apart from the others, and each user's apart, so that a silent one only holds up its own
/// user's containers.
struct Users {
    all: Semaphore,
    /// Only of users whose engine is being asked, or waited for.
    each: Mutex<HashMap<u32, Arc<Semaphore>>>,
}

impl Users {
    fn of(&self, uid: u32) -> Arc<Semaphore> {
        let mut each = self.each.lock().unwrap_or_else(PoisonError::into_inner);
        each.retain(|_, places| Arc::strong_count(places) > 1);
        each.entry(uid).or_insert_with(|| Arc::new(Semaphore::new(ASKING_USER_MAX))).clone()
    }
}

impl Docker {
    /// The name of the attestor, and the type of its selectors.
    pub const NAME: &str = "docker";

    /// With SPIRE's keys, and `podman_users` of ours. Nothing is asked yet: the daemon may start later.
    ///
    /// # Errors
    /// When a value is malformed, or a key asks for what is not there (`sigstore`).
    pub fn new(data: &Value, _: &PluginContext) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        if config.sigstore.is_some() {
            return Err(sigstore_is_missing());
        }
        let matchers = match config.container_id_cgroup_matchers.as_slice() {
            [] => None,
            _ if config.use_new_container_locator.unwrap_or(true) => {
                return Err(PluginError::invalid(
                    "the new container locator and custom cgroup matchers cannot both be used; please open an issue if the \
                     new container locator fails to locate workload containers in your environment; to continue using \
                     custom matchers set use_new_container_locator=false",
                ));
            }
            patterns => Some(Matchers::new(patterns)?),
        };
        let or = |text: String, default: &str| if text.is_empty() { default.to_owned() } else { text };
        let template = or(config.podman_socket_path_template, PODMAN_SOCKET_OF_USER);
        check_template(&template)
            .map_err(|why| PluginError::invalid(format!("invalid podman_socket_path_template: {why}")))?;
        Ok(Self {
            docker: Engine::new(&or(config.docker_socket_path, DOCKER_SOCKET), &config.docker_version)?,
            podman: Engine::new(&or(config.podman_socket_path, PODMAN_SOCKET), "")?,
            podman_of_user: template,
            podman_users: config.podman_users,
            warned: AtomicBool::new(false),
            matchers,
            is_verbose: config.verbose_container_locator_logs,
            asking: Semaphore::new(ASKING_MAX),
            users: Users { all: Semaphore::new(ASKING_MAX), each: Mutex::default() },
        })
    }

    fn container_of(&self, paths: &[&str]) -> Result<Option<String>, PluginError> {
        let paths = paths.iter().copied();
        let found = match &self.matchers {
            Some(matchers) => matchers.container(paths),
            None => cgroup::container(paths),
        };
        found.map_err(locate_error)
    }

    /// Whether that user's own podman may say what it likes: any labels, any image.
    fn check_user(&self, uid: u32) -> Result<(), PluginError> {
        match &self.podman_users {
            Some(users) if !users.contains(&uid) => Err(PluginError::denied(format!(
                "the container is one of user {uid}'s own podman, and podman_users does not name that user"
            ))),
            None if !self.warned.swap(true, Ordering::Relaxed) => {
                tracing::warn!(
                    uid,
                    "A user's own podman says what docker selectors that user's containers have; podman_users names those whose word counts"
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn ask(&self, id: &str, runs: Runs) -> Result<Container, PluginError> {
        let closed = |_| PluginError::internal("the attestor is shutting down");
        let engine = match runs {
            Runs::Docker => &self.docker,
            Runs::Podman => &self.podman,
            // That user's own podman, which answers whatever that user likes, or not.
            Runs::PodmanOf(uid) => {
                self.check_user(uid)?;
                let places = self.users.of(uid);
                let _place = places.acquire().await.map_err(closed)?;
                let _permit = self.users.all.acquire().await.map_err(closed)?;
                return Engine::of_user(&fill_in(&self.podman_of_user, uid), uid)?.container(id).await;
            }
        };
        let _permit = self.asking.acquire().await.map_err(closed)?;
        engine.container(id).await
    }
}

#[async_trait]
impl WorkloadAttestor for Docker {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        let cgroups = cgroups(peer)?;
        if self.is_verbose {
            tracing::debug!(pid = peer.pid, cgroups, "PID cgroups enumerated");
        }
        let paths = cgroup::paths(&cgroups).map_err(locate_error)?;
        let Some(id) = self.container_of(&paths)? else { return Ok(Vec::new()) };
        let late =
            || PluginError::new(ErrorKind::Timeout, format!("no answer about container {id} within {TIMEOUT:?}"));
        let runs = who_runs(&paths);
        let container = tokio::time::timeout(TIMEOUT, self.ask(&id, runs)).await.map_err(|_| late())??;
        if !container.state.running {
            return Err(PluginError::new(ErrorKind::FailedPrecondition, format!("container {id} is not running")));
        }
        check_place(&id, &paths, cgroups_of(container.state.pid).as_deref())?;
        let mut values = values(container);
        if let Runs::PodmanOf(uid) = runs {
            values.push(format!("podman_user:{uid}"));
        }
        Ok(prefixed_selectors(Self::NAME, values))
    }
}

fn values(container: Container) -> Vec<String> {
    let config = container.config;
    let mut values: Vec<String> =
        config.labels.unwrap_or_default().into_iter().map(|(key, value)| format!("label:{key}:{value}")).collect();
    values.extend(config.env.unwrap_or_default().into_iter().map(|variable| format!("env:{variable}")));
    if !config.image.is_empty() {
        values.push(format!("image_id:{}", config.image));
        values.extend(container.image_config_digest.map(|digest| format!("image_config_digest:{digest}")));
    }
    values
}

/// Whether the process really is below the container's cgroup. Anyone who may make cgroups can name one after a container;
/// where the container's own first process is (`first`: its cgroups) depends on the engine alone. Nothing is said when that
/// process cannot be seen, or is another one by that number: an engine in another PID namespace.
fn check_place(id: &str, paths: &[&str], first: Option<&str>) -> Result<(), PluginError> {
    let first = cgroup::paths(first.unwrap_or_default()).map_err(locate_error)?;
    let roots: Vec<_> = first.into_iter().filter_map(|path| cgroup::up_to(path, id)).collect();
    let outside = |path: &&&str| !roots.iter().any(|root| cgroup::is_within(path, root));
    match paths.iter().filter(|path| cgroup::up_to(path, id).is_some()).find(outside) {
        Some(path) if !roots.is_empty() => Err(PluginError::denied(format!(
            "the process is in cgroup {path:?}, which is named after container {id} but is not that container's"
        ))),
        _ => Ok(()),
    }
}

/// What runs a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Runs {
    Docker,
    /// The one of root.
    Podman,
    /// That user's own.
    PodmanOf(u32),
}

fn who_runs(paths: &[&str]) -> Runs {
    let Some(path) = paths.iter().find(|path| path.contains("libpod-") || path.contains("/libpod/")) else {
        return Runs::Docker;
    };
    let user = path.split_once("/user-").and_then(|(_, rest)| rest.split_once(".slice/"));
    user.and_then(|(uid, _)| uid.parse().ok()).map_or(Runs::Podman, Runs::PodmanOf)
}

/// `%d` once, besides `%%`.
fn check_template(template: &str) -> Result<(), &'static str> {
    let mut users = 0;
    let mut rest = template.chars();
    while let Some(c) = rest.next() {
        match (c, if c == '%' { rest.next() } else { Some(c) }) {
            ('%', None) => return Err("trailing % at end of template"),
            ('%', Some('d')) => users += 1,
            ('%', Some('%')) => {}
            ('%', _) => return Err("template only supports escaped %% or the %d UID placeholder"),
            _ => {}
        }
    }
    if users == 1 { Ok(()) } else { Err("template must contain exactly one %d UID placeholder") }
}

fn fill_in(template: &str, uid: u32) -> String {
    template.split("%%").map(|part| part.replace("%d", &uid.to_string())).collect::<Vec<_>>().join("%")
}

/// What both attestors say about SPIRE's `sigstore` block.
pub(crate) fn sigstore_is_missing() -> PluginError {
    PluginError::invalid(
        "sigstore is not supported yet: no image signature would be checked, and no image-signature selector exist; \
         remove the block, and match images by digest",
    )
}

#[cfg(test)]
mod tests;
