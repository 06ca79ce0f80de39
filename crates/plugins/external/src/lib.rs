//! External plugins: programs made with SPIRE's plugin SDK, which run beside us and speak gRPC over a unix socket, by the
//! rules of HashiCorp's go-plugin as SPIRE uses it (protocol version 1, no TLS, the magic cookie being the plugin's type).
//!
//! [`Plugin::launch`] starts one and configures it. From then on it is ours: it is called through the types that stand for
//! it ([`ExternalWorkloadAttestor`] and so on), what it writes is in our log, it is started again when it dies, and it ends
//! with us. Unlike SPIRE, which needs a restart then.
//!
//! The parts: `process` (program, checksum, first line), `handshake` (that line), `connection` (calls), `host` (what it may
//! ask of us), `log`, and one module a kind.

mod bundle_publisher;
mod connection;
mod credential_composer;
mod handshake;
mod host;
mod key_manager;
mod log;
mod node_attestor;
mod notifier;
mod process;
mod running;
mod svid_store;
mod upstream_authority;
mod workload_attestor;

pub use bundle_publisher::ExternalBundlePublisher;
pub use credential_composer::ExternalCredentialComposer;
pub use key_manager::ExternalKeyManager;
pub use node_attestor::{ExternalAgentNodeAttestor, ExternalServerNodeAttestor};
pub use notifier::ExternalNotifier;
pub use svid_store::ExternalSvidStore;
pub use upstream_authority::ExternalUpstreamAuthority;
pub use workload_attestor::ExternalWorkloadAttestor;

use connection::Connection;
use finial_config::{PluginConfig, PluginDataError};
use finial_core::ErrorKind;
use finial_plugin::{HostServices, PluginContext, PluginError};
use finial_proto::convert::kind_of;
use finial_runtime::{Backoff, Shutdown, Spawner, Supervisor};
use futures::Stream;
use prost::Message;
use running::Running;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{IntoRequest, Status, Streaming};

/// A plugin that died is started again after this, at first and at most.
const RESTART_AFTER: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// After running this long the next restart is as prompt as the first.
const STEADY_AFTER: Duration = Duration::from_secs(60);

/// Why an external plugin cannot be used. Texts follow SPIRE's.
#[derive(Debug, thiserror::Error)]
pub enum ExternalError {
    /// It does not start, or does not say where it listens.
    #[error("failed to load plugin {name:?}: {reason}")]
    Load {
        /// The plugin.
        name: String,
        /// Why.
        reason: String,
    },
    /// It has not the service that its type stands for.
    #[error("failed to bind plugin {name:?}: no supported plugin interface found in: {found:?}")]
    Bind {
        /// The plugin.
        name: String,
        /// The services that it has.
        found: Vec<String>,
    },
    /// It does not accept its configuration.
    #[error("failed to configure plugin {name:?}: {reason}")]
    Configure {
        /// The plugin.
        name: String,
        /// Why.
        reason: String,
    },
    /// Its data file cannot be read.
    #[error("failed to configure plugin {name:?}: failed to load plugin data: {source}")]
    Data {
        /// The plugin.
        name: String,
        /// Why.
        source: PluginDataError,
    },
}

/// The kinds of plugins that may be external, by the service that they must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// A key manager of a server.
    ServerKeyManager,
    /// A key manager of an agent.
    AgentKeyManager,
    /// The server's half of a node attestor.
    ServerNodeAttestor,
    /// The agent's half of a node attestor.
    AgentNodeAttestor,
    /// An upstream authority.
    UpstreamAuthority,
    /// A credential composer.
    CredentialComposer,
    /// A notifier.
    Notifier,
    /// A bundle publisher.
    BundlePublisher,
    /// A workload attestor.
    WorkloadAttestor,
    /// An SVID store.
    SvidStore,
}

impl Service {
    fn name(self) -> &'static str {
        match self {
            Self::ServerKeyManager => "spire.plugin.server.keymanager.v1.KeyManager",
            Self::AgentKeyManager => "spire.plugin.agent.keymanager.v1.KeyManager",
            Self::ServerNodeAttestor => "spire.plugin.server.nodeattestor.v1.NodeAttestor",
            Self::AgentNodeAttestor => "spire.plugin.agent.nodeattestor.v1.NodeAttestor",
            Self::UpstreamAuthority => "spire.plugin.server.upstreamauthority.v1.UpstreamAuthority",
            Self::CredentialComposer => "spire.plugin.server.credentialcomposer.v1.CredentialComposer",
            Self::Notifier => "spire.plugin.server.notifier.v1.Notifier",
            Self::BundlePublisher => "spire.plugin.server.bundlepublisher.v1.BundlePublisher",
            Self::WorkloadAttestor => "spire.plugin.agent.workloadattestor.v1.WorkloadAttestor",
            Self::SvidStore => "spire.plugin.agent.svidstore.v1.SVIDStore",
        }
    }

    fn of_server(self) -> bool {
        !matches!(self, Self::AgentKeyManager | Self::AgentNodeAttestor | Self::WorkloadAttestor | Self::SvidStore)
    }
}

/// What a plugin is started with.
#[derive(Clone)]
pub struct Surroundings {
    /// Trust domain and clock.
    pub context: PluginContext,
    /// What it may ask of us.
    pub host: Arc<HostServices>,
    /// For the tasks that look after it; it ends when its shutdown triggers.
    pub spawner: Spawner,
}

/// An external plugin, which runs as long as the spawner that it was started with. Cheap to clone.
#[derive(Clone)]
pub struct Plugin(Arc<Shared>);

struct Shared {
    name: String,
    service: Service,
    state: Mutex<State>,
}

enum State {
    Up(Connection),
    /// Since it ended, until it runs again; with the reason.
    Down(String),
}

impl Shared {
    fn set(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

/// Starts a plugin, has it judge its configuration, and ends it: what it has to say against it. For programs that run
/// nothing else: it blocks, on a runtime of its own.
///
/// # Errors
/// It does not start, or has not the right service.
pub fn validate(
    config: &PluginConfig,
    service: Service,
    context: &PluginContext,
) -> Result<Vec<String>, ExternalError> {
    let failed = |reason: String| ExternalError::Load { name: config.name.clone(), reason };
    let judge = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|e| failed(e.to_string()))?.block_on(async {
            let supervisor = Supervisor::default();
            let (context, host, spawner) = (context.clone(), Arc::default(), supervisor.spawner());
            let around = Surroundings { context, host, spawner };
            let running = Running::start(config, service, &around).await?;
            let notes = running.validate(config, &around).await;
            running.end().await;
            notes
        })
    };
    // On a thread of its own, as the caller's may have a runtime.
    let judged = std::thread::scope(|scope| scope.spawn(judge).join());
    judged.unwrap_or_else(|_| Err(failed("the check panicked; the log has the place".into())))
}

impl Plugin {
    /// Starts a plugin and gives it its configuration.
    ///
    /// # Errors
    /// It does not start, has not the right service, or does not accept its configuration.
    pub async fn launch(config: &PluginConfig, service: Service, around: &Surroundings) -> Result<Self, ExternalError> {
        if config.checksum.is_empty() {
            tracing::warn!(
                subsystem_name = "catalog",
                external = true,
                plugin_name = config.name,
                plugin_type = config.kind,
                "Plugin checksum not configured"
            );
        }
        let running = Self::start(config, service, around).await?;
        let state = Mutex::new(State::Up(running.connection().clone()));
        let shared = Arc::new(Shared { name: config.name.clone(), service, state });
        let (config, around, looked_after) = (config.clone(), around.clone(), shared.clone());
        let spawner = around.spawner.clone();
        spawner.spawn("plugin", look_after(looked_after, running, config, around));
        Ok(Self(shared))
    }

    async fn start(config: &PluginConfig, service: Service, around: &Surroundings) -> Result<Running, ExternalError> {
        let running = Running::start(config, service, around).await?;
        running.configure(config, around).await?;
        Ok(running)
    }

    /// Its configured name.
    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    fn connection(&self) -> Result<Connection, PluginError> {
        match &*self.0.state.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Up(connection) => Ok(connection.clone()),
            State::Down(why) => Err(PluginError::new(ErrorKind::Unavailable, format!("the plugin is down: {why}"))),
        }
    }

    /// One call of a method of its service.
    pub(crate) async fn call<Q, A>(
        &self,
        method: &str,
        question: impl IntoRequest<Q>,
        deadline: Duration,
    ) -> Result<A, PluginError>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path = format!("/{}/{method}", self.0.service.name());
        self.connection()?.unary(&path, question, deadline).await.map_err(|status| self.error(status))
    }

    /// One call with streams both ways; see [`Connection::streaming`].
    pub(crate) async fn stream<Q, A>(
        &self,
        method: &str,
        questions: impl Stream<Item = Q> + Send + 'static,
        metadata: MetadataMap,
    ) -> Result<Streaming<A>, PluginError>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path = format!("/{}/{method}", self.0.service.name());
        let begun = self.connection()?.streaming(&path, questions, metadata).await;
        begun.map_err(|status| self.error(status))
    }

    /// What a failed call means. Whoever calls a plugin says whose error it is; older plugins do so themselves.
    pub(crate) fn error(&self, status: Status) -> PluginError {
        if std::error::Error::source(&status).is_some() {
            // Not an answer of the plugin: the connection broke, as it does when the plugin dies.
            return PluginError::new(ErrorKind::Unavailable, "the plugin hung up without an answer").because(status);
        }
        let message = status.message();
        let message = message.strip_prefix(&format!("{}: ", self.0.name)).unwrap_or(message).to_owned();
        PluginError::new(kind_of(status.code()), message).because(status)
    }
}

/// Waits until the plugin dies, and starts it again; ends it when we end.
async fn look_after(shared: Arc<Shared>, mut running: Running, config: PluginConfig, around: Surroundings) {
    let shutdown = around.spawner.shutdown();
    let mut backoff = Backoff::new(RESTART_AFTER.0, RESTART_AFTER.1).shape(2.0, 0.1);
    loop {
        let since = Instant::now();
        let status = tokio::select! {
            status = running.ended() => status,
            () = shutdown.cancelled() => {
                shared.set(State::Down("we are ending".into()));
                return running.end().await;
            }
        };
        // Nobody calls it any more while its last words are read.
        shared.set(State::Down(status.clone()));
        let why = running.with_last_words(status).await;
        shared.set(State::Down(why.clone()));
        tracing::error!(
            subsystem_name = "catalog",
            external = true,
            plugin_name = config.name,
            plugin_type = config.kind,
            reason = why,
            "External plugin ended by itself; this is the plugin's fault. It is started again"
        );
        drop(running);
        if since.elapsed() > STEADY_AFTER {
            backoff.reset();
        }
        running = match restart(&config, &shared, &around, &shutdown, &mut backoff).await {
            Some(running) => running,
            None => return,
        };
    }
}

async fn restart(
    config: &PluginConfig,
    shared: &Shared,
    around: &Surroundings,
    shutdown: &Shutdown,
    backoff: &mut Backoff,
) -> Option<Running> {
    loop {
        let again = async {
            tokio::time::sleep(backoff.next_wait()).await;
            Plugin::start(config, shared.service, around).await
        };
        let started = tokio::select! {
            started = again => started,
            () = shutdown.cancelled() => return None,
        };
        match started {
            Ok(running) => {
                shared.set(State::Up(running.connection().clone()));
                tracing::info!(
                    subsystem_name = "catalog",
                    external = true,
                    plugin_name = config.name,
                    plugin_type = config.kind,
                    "External plugin runs again"
                );
                return Some(running);
            }
            Err(error) => {
                shared.set(State::Down(error.to_string()));
                tracing::error!(
                    subsystem_name = "catalog",
                    external = true,
                    plugin_name = config.name,
                    plugin_type = config.kind,
                    %error,
                    "External plugin does not start again; it is tried on"
                );
            }
        }
    }
}
