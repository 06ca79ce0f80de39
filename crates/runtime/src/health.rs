//! Health: named checks, run at intervals, shown as JSON on `/live` and `/ready`.

use crate::{BoxError, Spawner};
use std::net::SocketAddr;
use std::sync::Arc;

/// What a subsystem says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Whether it finished starting; `None` = yes.
    pub started: Option<bool>,
    /// It works, or may come back by itself.
    pub live: bool,
    /// It does its job now.
    pub ready: bool,
    /// Shown under its name on `/live`.
    pub live_details: serde_json::Value,
    /// Shown under its name on `/ready`.
    pub ready_details: serde_json::Value,
}

/// A subsystem that can be asked.
#[async_trait::async_trait]
pub trait Check: Send + Sync {
    /// Asks it. Takes no longer than a few seconds.
    async fn check(&self) -> State;
}

/// The listener's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `host:port` to listen on; none = no listener.
    pub address: Option<String>,
    /// `/live` unless configured.
    pub live_path: String,
    /// `/ready` unless configured.
    pub ready_path: String,
}

/// The checks of a program.
#[derive(Clone, Default)]
pub struct Health(());

impl Health {
    /// Adds a check; SPIRE's names are `server`, `server.ca`, `server.ca.rotator`, `catalog.datastore`, `agent`.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add(&self, _name: &str, _check: Arc<dyn Check>) -> Result<(), BoxError> {
        todo!()
    }
    /// Starts the checks (each second until all are well once, then each minute) and the listener.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn start(&self, _settings: &Settings, _spawner: &Spawner) -> Result<Option<SocketAddr>, BoxError> {
        todo!()
    }
}
