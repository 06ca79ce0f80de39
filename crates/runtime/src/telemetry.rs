//! Metrics with SPIRE's names.

use finial_core::ErrorKind;
use std::net::SocketAddr;

/// What to measure and where to show it.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// First part of each name: `spire_server` or `spire_agent` unless configured.
    pub prefix: String,
    /// Adds the label `host` with this value.
    pub host: Option<String>,
    /// Adds the label `trust_domain_id` with this value.
    pub trust_domain: Option<String>,
}

/// Takes measurements. Clones share one store; a disabled one does nothing.
#[derive(Clone, Default)]
pub struct Metrics(());

impl Metrics {
    /// Measures nothing.
    pub fn disabled() -> Self {
        Self::default()
    }
    /// Measures.
    pub fn new(_settings: Settings) -> Self {
        Self::default()
    }
    /// Adds to a counter. `key` is joined by dots, as SPIRE documents it: `server_ca.sign.x509_svid`.
    pub fn count(&self, _key: &str, _by: f64, _labels: &[(&str, &str)]) {}
    /// Sets a gauge.
    pub fn gauge(&self, _key: &str, _value: f64, _labels: &[(&str, &str)]) {}
    /// Adds a sample to a summary; times are in milliseconds.
    pub fn sample(&self, _key: &str, _value: f64, _labels: &[(&str, &str)]) {}
    /// Starts a call: when finished it counts `key` and samples `key.elapsed_time`, both with the label `status`.
    pub fn call(&self, _key: &str) -> CallTimer {
        CallTimer(())
    }
    /// The Prometheus text form of all that was measured.
    pub fn render(&self) -> String {
        String::new()
    }
}

/// A call that is being measured. Dropped without [`CallTimer::finish`], it counts as `Canceled`.
pub struct CallTimer(());

impl CallTimer {
    /// Adds a label.
    pub fn label(&mut self, _name: &'static str, _value: &str) {}
    /// Ends it with a gRPC status name, such as `OK` or `InvalidArgument`.
    pub fn finish(self, _status: &'static str) {}
    /// Ends it with `OK` or the status of the kind.
    pub fn finish_with<T, E>(self, _result: &Result<T, E>, _kind: impl FnOnce(&E) -> ErrorKind) {}
    /// Forgets it.
    pub fn discard(self) {}
}

/// Serves `GET /metrics` (any path, as SPIRE does) until shutdown.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve_prometheus(_metrics: Metrics, _address: SocketAddr, _spawner: &crate::Spawner) -> std::io::Result<SocketAddr> {
    todo!()
}
