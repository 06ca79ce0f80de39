//! A plugin's process together with what serves it.

use crate::connection::Connection;
use crate::host::Host;
use crate::log::PluginLog;
use crate::process::{self, Process};
use crate::{ExternalError, Service, Surroundings};
use finial_config::PluginConfig;
use finial_runtime::Shutdown;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::timeout;
use tonic::Status;

/// How long a plugin may take to end once it was asked; go-plugin's.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// One run of a plugin. Dropping it kills the process and ends the tasks.
pub(crate) struct Running {
    process: Process,
    connection: Connection,
    services: Vec<String>,
    log: Arc<PluginLog>,
    name: String,
    /// Ends what serves the plugin.
    tasks: StopOnDrop,
    /// Where its socket and ours lie; goes away with us.
    _folder: TempDir,
}

struct StopOnDrop(Shutdown);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.trigger();
    }
}

impl Running {
    /// Starts the plugin and gets to know it.
    pub(crate) async fn start(
        config: &PluginConfig,
        service: Service,
        around: &Surroundings,
    ) -> Result<Self, ExternalError> {
        let failed = |reason: String| ExternalError::Load { name: config.name.clone(), reason };
        let folder = tempfile::Builder::new().prefix("finial-plugin-").tempdir();
        let folder = folder.map_err(|e| failed(format!("cannot make a folder for its socket: {e}")))?;
        let program = config.command.as_deref().and_then(|c| c.file_name()).unwrap_or_default().to_string_lossy();
        let log = Arc::new(PluginLog::new(&config.name, &config.kind, &program));
        let mut process = process::start(config, folder.path(), &log, &around.spawner).await.map_err(failed)?;
        let connection = Connection::new(&process.address);
        let tasks = StopOnDrop(Shutdown::new());
        let clock = around.context.clock.clone();
        let host = Host { services: around.host.clone(), clock, of_server: service.of_server() };
        let socket = folder.path().join("host.sock");
        host.serve(&socket, &around.spawner, tasks.0.clone()).map_err(failed)?;
        connection.attend(&socket, log.clone(), &around.spawner, &tasks.0);
        let names = host.names();
        let introduced = tokio::select! {
            biased;
            services = connection.initialize(&names) => services.map_err(|s| s.message().to_owned()),
            status = process.ended() => {
                process.last_words().await;
                Err(format!("it ended: {status}"))
            }
        };
        let services = introduced.map_err(|why| failed(format!("failed to initialize plugin: {why}")))?;
        if !services.iter().any(|s| s == service.name()) {
            return Err(ExternalError::Bind { name: config.name.clone(), found: services });
        }
        let known = |s: &&String| *s == service.name() || Connection::is_configurable(std::slice::from_ref(*s));
        for unknown in services.iter().filter(|s| !known(s)) {
            tracing::warn!(
                subsystem_name = "catalog",
                external = true,
                plugin_name = config.name,
                plugin_type = config.kind,
                plugin_service = unknown,
                "Unsupported plugin service found"
            );
        }
        Ok(Self { process, connection, services, log, name: config.name.clone(), tasks, _folder: folder })
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The configuration as text; None if there is none and none is taken.
    fn text(&self, config: &PluginConfig) -> Result<Option<String>, ExternalError> {
        let name = || self.name.clone();
        let text = config.load_text().map_err(|source| ExternalError::Data { name: name(), source })?;
        match (text, Connection::is_configurable(&self.services)) {
            (None, false) => Ok(None),
            (Some(_), false) => {
                let reason = "no supported configuration interface found: take its plugin_data away".into();
                Err(ExternalError::Configure { name: name(), reason })
            }
            (text, true) => Ok(Some(text.unwrap_or_default())),
        }
    }

    fn misconfigured(&self, status: &Status) -> ExternalError {
        ExternalError::Configure { name: self.name.clone(), reason: status.message().to_owned() }
    }

    /// Gives the plugin its configuration.
    pub(crate) async fn configure(&self, config: &PluginConfig, around: &Surroundings) -> Result<(), ExternalError> {
        let Some(text) = self.text(config)? else { return Ok(()) };
        let configured = self.connection.configure(around.context.trust_domain.as_str(), text).await;
        configured.map_err(|status| self.misconfigured(&status))
    }

    /// What the plugin has to say against its configuration.
    pub(crate) async fn validate(
        &self,
        config: &PluginConfig,
        around: &Surroundings,
    ) -> Result<Vec<String>, ExternalError> {
        let Some(text) = self.text(config)? else { return Ok(Vec::new()) };
        let notes = self.connection.validate(around.context.trust_domain.as_str(), text).await;
        notes.map_err(|status| self.misconfigured(&status))
    }

    /// Returns when the process has ended, with how.
    pub(crate) async fn ended(&mut self) -> String {
        self.process.ended().await
    }

    /// How the process ended, with what it wrote last.
    pub(crate) async fn with_last_words(&mut self, status: String) -> String {
        self.process.last_words().await;
        let last = self.log.last();
        if last.is_empty() { status } else { format!("{status} (its last words: {last:?})") }
    }

    /// Has the plugin end in order, or kills it.
    pub(crate) async fn end(mut self) {
        if let Err(error) = self.connection.end().await {
            tracing::error!(plugin_name = self.name, error = error.message(), "Failed to deinitialize plugin");
        }
        if timeout(END_TIMEOUT, self.process.ended()).await.is_err() {
            tracing::warn!(plugin_name = self.name, "plugin failed to exit gracefully");
            self.process.kill();
        }
        self.process.last_words().await;
        self.tasks.0.trigger();
    }
}
