//! Health: named checks, run at intervals, shown as JSON on `/live` and `/ready`.

use crate::http::{Answer, serve};
use crate::{BoxError, Spawner};
use http::StatusCode;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Until all were well once.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);
/// From then on.
const INTERVAL: Duration = Duration::from_secs(60);
/// A check that takes longer counts as failed.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);

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
    pub live_details: Value,
    /// Shown under its name on `/ready`.
    pub ready_details: Value,
}

impl State {
    /// Live and ready, with nothing to add: `{}`.
    pub fn well() -> Self {
        let empty = || Value::Object(serde_json::Map::new());
        Self { started: None, live: true, ready: true, live_details: empty(), ready_details: empty() }
    }

    /// What is wrong, as SPIRE says it.
    fn problem(&self) -> Option<&'static str> {
        match (self.ready, self.live) {
            (true, true) => None,
            (true, false) => Some("subsystem is not live"),
            (false, true) => Some("subsystem is not ready"),
            (false, false) => Some("subsystem is not live or ready"),
        }
    }
}

/// A subsystem that can be asked.
#[async_trait::async_trait]
pub trait Check: Send + Sync {
    /// Asks it.
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

struct Subsystem {
    check: Arc<dyn Check>,
    last: Option<State>,
    failing_since: Option<Instant>,
    failures: u64,
}

/// The checks of a program. Clones share them.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<BTreeMap<String, Subsystem>>>);

impl Health {
    /// Adds a check; SPIRE's names are `server`, `server.ca`, `server.ca.rotator`, `catalog.datastore`, `agent`.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add(&self, name: &str, check: Arc<dyn Check>) -> Result<(), BoxError> {
        let subsystem = Subsystem { check, last: None, failing_since: None, failures: 0 };
        if self.lock().contains_key(name) {
            return Err(format!("check {name:?} has already been added").into());
        }
        self.lock().insert(name.to_owned(), subsystem);
        Ok(())
    }

    /// Starts the checks (each second until all are well once, then each minute) and the listener, if one is configured.
    /// Returns the listener's address. A listener that cannot be opened is a warning, not an error, as in SPIRE.
    pub async fn start(&self, settings: &Settings, spawner: &Spawner) -> Option<SocketAddr> {
        tracing::debug!(subsystem_name = "health", "Initializing health checkers");
        let (health, shutdown) = (self.clone(), spawner.shutdown());
        spawner.service("health checks", async move {
            let mut interval = FIRST_INTERVAL;
            loop {
                let all_well = health.run_checks().await;
                if all_well {
                    interval = INTERVAL;
                }
                tokio::select! {
                    () = tokio::time::sleep(interval) => {}
                    () = shutdown.cancelled() => {
                        tracing::debug!(subsystem_name = "health", "Finishing health checker");
                        return Ok::<(), BoxError>(());
                    }
                }
            }
        });
        let address = settings.address.as_deref()?;
        let (health, live_path, ready_path) = (self.clone(), settings.live_path.clone(), settings.ready_path.clone());
        let handler = Arc::new(move |path: &str| match path {
            path if path == live_path => health.answer(|s| (s.live, &s.live_details)),
            path if path == ready_path => health.answer(|s| (s.ready, &s.ready_details)),
            _ => Answer::not_found(),
        });
        match serve("health listener", address, handler, spawner).await {
            Ok(local) => {
                tracing::info!(subsystem_name = "health", address, "Serving health checks");
                Some(local)
            }
            Err(error) => {
                let error = crate::listen_text(&address, &error);
                tracing::warn!(subsystem_name = "health", error, address, "Error serving health checks");
                None
            }
        }
    }

    /// Runs all checks once; whether all are live and ready.
    pub async fn run_checks(&self) -> bool {
        let checks: Vec<_> = self.lock().iter().map(|(name, s)| (name.clone(), s.check.clone())).collect();
        let mut all_well = true;
        for (name, check) in checks {
            let state = tokio::time::timeout(CHECK_TIMEOUT, check.check()).await.unwrap_or_else(|_| State {
                live_details: serde_json::json!({"err": "health check timed out"}),
                ready_details: serde_json::json!({"err": "health check timed out"}),
                live: false,
                ready: false,
                started: None,
            });
            all_well &= state.problem().is_none();
            if let Some(subsystem) = self.lock().get_mut(&name) {
                subsystem.note(&name, state);
            }
        }
        all_well
    }

    fn answer(&self, pick: impl Fn(&State) -> (bool, &Value)) -> Answer {
        let subsystems = self.lock();
        let mut well = true;
        let mut details = BTreeMap::new();
        for (name, subsystem) in subsystems.iter() {
            match &subsystem.last {
                Some(state) => {
                    let (good, detail) = pick(state);
                    well &= good;
                    details.insert(name, detail.clone());
                }
                // Not asked yet: not known to be well.
                None => {
                    well = false;
                    details.insert(name, Value::Null);
                }
            }
        }
        let status = if well { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
        let body = serde_json::to_string(&details).unwrap_or_default() + "\n";
        Answer { status, content_type: "application/json", body }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Subsystem>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subsystem {
    /// Takes a new state in, and logs what changed.
    fn note(&mut self, name: &str, state: State) {
        let starting = state.started == Some(false);
        let before = self.last.as_ref().and_then(State::problem);
        match (before, state.problem()) {
            (_, Some(error)) if starting && before != Some(error) => {
                tracing::warn!(
                    subsystem_name = "health",
                    check = name,
                    error,
                    "Health check has failed. Starting up still."
                );
            }
            (_, Some(error)) if !starting => {
                let details = state.ready_details.to_string();
                tracing::error!(subsystem_name = "health", check = name, error, details, "Health check has failed");
            }
            (Some(error), None) => {
                let duration = self.failing_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
                let failures = self.failures;
                tracing::info!(
                    subsystem_name = "health",
                    check = name,
                    error,
                    failures,
                    duration,
                    "Health check recovered"
                );
            }
            _ => {}
        }
        match state.problem() {
            Some(_) => {
                self.failing_since.get_or_insert_with(Instant::now);
                self.failures += 1;
            }
            None => (self.failing_since, self.failures) = (None, 0),
        }
        self.last = Some(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Supervisor;
    use crate::http::testing::get;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Switch(AtomicBool);
    #[async_trait::async_trait]
    impl Check for Switch {
        async fn check(&self) -> State {
            State { ready: self.0.load(Ordering::SeqCst), ..State::well() }
        }
    }

    #[tokio::test]
    async fn live_and_ready_are_served_as_spire_does() {
        let (supervisor, health) = (Supervisor::default(), Health::default());
        let ca = Arc::new(Switch(AtomicBool::new(false)));
        health.add("server.ca", ca.clone()).expect("new");
        health.add("server", Arc::new(Switch(AtomicBool::new(true)))).expect("new");
        assert!(health.add("server", ca.clone()).is_err());
        let settings = Settings {
            address: Some("127.0.0.1:0".to_owned()),
            live_path: "/live".to_owned(),
            ready_path: "/r".to_owned(),
        };
        let address = health.start(&settings, &supervisor.spawner()).await.expect("listens");
        assert!(!health.run_checks().await);
        assert!(get(address, "/r").await.starts_with("HTTP/1.1 500 "));
        let live = get(address, "/live").await;
        assert!(live.starts_with("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"), "{live}");
        assert!(live.ends_with("\r\n\r\n{\"server\":{},\"server.ca\":{}}\n"), "{live}");
        ca.0.store(true, Ordering::SeqCst);
        assert!(health.run_checks().await);
        assert!(get(address, "/r").await.starts_with("HTTP/1.1 200 "));
        assert!(get(address, "/ready").await.starts_with("HTTP/1.1 404 "));
        supervisor.shutdown().trigger();
        supervisor.run(Duration::from_secs(5)).await.expect("ends well");
    }
}
