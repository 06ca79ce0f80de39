//! Metrics for Prometheus over TLS.

use crate::https_server::{Listen, serve_with};
use crate::rest::trust;
use crate::serving_cert::{self, CertFiles};
use finial_core::{Clock, SpiffeId};
use finial_crypto::pem;
use finial_crypto::tls::{
    BundleSource, ClientAuth, KeyExchange, PeerPolicy, TlsIdentity, server_config_for_web_clients, server_config_with,
};
use finial_runtime::files::read_limited;
use finial_runtime::{Metrics, Spawner, listen_text, telemetry};
use rustls::{RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// How often files are looked at for another certificate.
const LOOK: Duration = Duration::from_secs(60);

/// SPIRE's `Prometheus { tls { } }`.
pub struct MetricsTls {
    /// What to present; None: `own`.
    pub files: Option<CertFiles>,
    /// The program's own SVID, kept current by who owns it.
    pub own: Arc<TlsIdentity>,
    /// Roots (PEM) of the certificates that clients must have; not with `authorized`.
    pub client_ca: Option<PathBuf>,
    /// Whose SVIDs may fetch; empty: any client that `client_ca` does not keep out.
    pub authorized: Vec<SpiffeId>,
    /// To verify them by.
    pub bundles: Arc<dyn BundleSource>,
    /// `require_pq_kem`.
    pub exchange: KeyExchange,
}

/// Why metrics are not served.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// What was configured cannot be used; the text says what.
    #[error("failed to create TLS config for Prometheus: {0}")]
    Tls(String),
    /// The address cannot be listened on.
    #[error("{0}")]
    Listen(String),
}

/// Serves the metrics on `address` (`host:port`) until shutdown, on any path.
///
/// # Errors
/// Files that cannot be used, or an address that cannot be listened on.
pub async fn serve(
    metrics: Metrics,
    address: &str,
    tls: MetricsTls,
    clock: Arc<dyn Clock>,
    spawner: &Spawner,
) -> Result<(), MetricsError> {
    let config = tls.config(clock, spawner).await.map_err(MetricsError::Tls)?;
    let listener = TcpListener::bind(address).await.map_err(|e| MetricsError::Listen(listen_text(&address, &e)))?;
    let respond = Arc::new(move |_: &http::request::Parts| telemetry::page(&metrics).into());
    let served = serve_with(Listen::Tls(listener, Box::new(config)), respond, "prometheus", spawner);
    served.map_err(|e| MetricsError::Listen(listen_text(&address, &e)))?;
    telemetry::log_prometheus(address);
    Ok(())
}

impl MetricsTls {
    async fn config(self, clock: Arc<dyn Clock>, spawner: &Spawner) -> Result<ServerConfig, String> {
        let identity = match self.files {
            Some(files) => serving_cert::serve(files, LOOK, "telemetry", spawner).await.map_err(|e| e.to_string())?,
            None => self.own,
        };
        let config = if let Some(file) = self.client_ca {
            let roots = spawner.blocking(move || roots(&file)).await.map_err(|e| e.to_string())??;
            server_config_for_web_clients(self.exchange, identity, roots, clock)
        } else {
            let policy = PeerPolicy::AnyOf(self.authorized.clone());
            let auth = ClientAuth { bundles: self.bundles, policy, required: true };
            let clients = (!self.authorized.is_empty()).then_some(auth);
            server_config_with(self.exchange, identity, clients, clock)
        };
        config.map_err(|e| e.to_string())
    }
}

fn roots(file: &Path) -> Result<RootCertStore, String> {
    let read = read_limited(file, pem::PEM_BYTES_MAX).map_err(|e| e.to_string());
    read.and_then(|text| trust::roots(&text)).map_err(|cause| format!("client_ca_file {}: {cause}", file.display()))
}
