//! Our own bundle for others: the bundle endpoint, verified by SPIFFE or by a certificate from files.

use crate::publish::BundleFeed;
use finial_config::{BundleEndpointProfile, BundleEndpointSettings};
use finial_core::{Bundle, Clock, Secret};
use finial_crypto::bundle::{BundleFormat, bundle_to_json};
use finial_crypto::pem;
use finial_crypto::tls::{KeyExchange, TlsIdentity, server_config_with};
use finial_net::https_server;
use finial_net::tls::bind;
use finial_runtime::http::Answer;
use finial_runtime::{Shutdown, Spawner};
use http::StatusCode;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Who speaks in the log.
const SUBSYSTEM: &str = "bundle_endpoint";

/// Why the bundle endpoint is not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// Nobody can listen there.
    #[error("bundle endpoint: {}", finial_runtime::listen_text(.0, .1))]
    Listen(SocketAddr, io::Error),
    /// TLS cannot be set up.
    #[error("bundle endpoint: TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// Certificate and key cannot be used.
    #[error("bundle endpoint: failed to load certificate {}: {cause}", certificate.display())]
    Certificate {
        /// The file of the certificate.
        certificate: PathBuf,
        /// What is wrong with it or with its key.
        cause: String,
    },
}

/// What the endpoint needs.
pub(crate) struct EndpointParts {
    pub(crate) bundles: Arc<BundleFeed>,
    /// The server's own SVID.
    pub(crate) svid: Arc<TlsIdentity>,
    pub(crate) exchange: KeyExchange,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) spawner: Spawner,
}

/// Serves our bundle until shutdown. Gives the address it got; `None` for the profile that is not there yet.
pub(crate) async fn serve(
    settings: &BundleEndpointSettings,
    parts: EndpointParts,
) -> Result<Option<SocketAddr>, EndpointError> {
    let identity = match &settings.profile {
        BundleEndpointProfile::HttpsSpiffe => parts.svid.clone(),
        BundleEndpointProfile::ServingCertFile { cert_file_path, key_file_path, file_sync_interval } => {
            let files = Files { certificate: cert_file_path.clone(), key: key_file_path.clone() };
            let (every, identity) = (*file_sync_interval, Arc::new(TlsIdentity::empty()));
            let read = files.clone().read(&parts.spawner).await?;
            read.put(&files, &identity)?;
            let watching = watch(files, read, every, identity.clone(), parts.spawner.clone(), parts.spawner.shutdown());
            parts.spawner.service("bundle endpoint's certificate", async move {
                watching.await;
                Ok::<(), Infallible>(())
            });
            identity
        }
        BundleEndpointProfile::Acme { .. } => {
            tracing::warn!(
                subsystem_name = SUBSYSTEM,
                "federation.bundle_endpoint with ACME is not supported yet and has no effect: use serving_cert_file"
            );
            return Ok(None);
        }
    };
    let failed = |error| EndpointError::Listen(settings.address, error);
    let listener = bind(settings.address).map_err(failed)?;
    let tls = server_config_with(parts.exchange, identity, None, parts.clock)?;
    let hint_seconds = i64::try_from(settings.refresh_hint.as_secs()).unwrap_or(i64::MAX);
    let bundles = parts.bundles;
    let page = Arc::new(move || page(&bundles, hint_seconds));
    let address = https_server::serve(listener, tls, page, "bundle endpoint", &parts.spawner).map_err(failed)?;
    let refresh_hint = crate::issue::go_duration(hint_seconds);
    tracing::info!(subsystem_name = SUBSYSTEM, addr = %address, %refresh_hint, "Serving bundle endpoint");
    Ok(Some(address))
}

fn page(bundles: &BundleFeed, refresh_hint: i64) -> Answer {
    let Some(own) = bundles.own() else {
        tracing::error!(subsystem_name = SUBSYSTEM, "Unable to retrieve local bundle");
        return Answer::text(StatusCode::INTERNAL_SERVER_ERROR, "500 unable to retrieve local bundle");
    };
    match bundle_to_json(&Bundle { refresh_hint, ..own.bundle.clone() }, BundleFormat::SPIFFE) {
        Ok(body) => Answer { status: StatusCode::OK, content_type: "application/json", body },
        Err(error) => {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "Unable to marshal local bundle");
            Answer::text(StatusCode::INTERNAL_SERVER_ERROR, "500 unable to marshal local bundle")
        }
    }
}

/// A certificate and its key, PEM.
#[derive(Clone)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

/// What was in the files.
struct Read {
    certificate: Vec<u8>,
    key: Secret<Vec<u8>>,
}

impl Files {
    fn bad(&self, cause: String) -> EndpointError {
        EndpointError::Certificate { certificate: self.certificate.clone(), cause }
    }

    async fn read(self, spawner: &Spawner) -> Result<Read, EndpointError> {
        let files = self.clone();
        let reading = spawner.blocking(move || {
            let read = |path: &Path| std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
            Ok::<_, String>(Read { certificate: read(&files.certificate)?, key: Secret::new(read(&files.key)?) })
        });
        reading.await.unwrap_or_else(|e| Err(e.to_string())).map_err(|cause| self.bad(cause))
    }
}

impl Read {
    fn is(&self, other: &Self) -> bool {
        self.certificate == other.certificate && self.key.expose() == other.key.expose()
    }

    fn put(&self, files: &Files, identity: &TlsIdentity) -> Result<(), EndpointError> {
        let bad = |cause: &dyn std::fmt::Display| files.bad(cause.to_string());
        let chain = pem::certificates(&self.certificate).map_err(|e| bad(&e))?;
        let key = pem::private_key(self.key.expose()).map_err(|e| bad(&e))?;
        identity.set(&chain, &key).map_err(|e| bad(&e))
    }
}

/// Looks whether the files have changed, again and again; what cannot be used leaves the last ones in place.
async fn watch(
    files: Files,
    mut last: Read,
    every: Duration,
    identity: Arc<TlsIdentity>,
    spawner: Spawner,
    shutdown: Shutdown,
) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
        let changed = match files.clone().read(&spawner).await {
            Ok(read) if read.is(&last) => continue,
            Ok(read) => read.put(&files, &identity).map(|()| last = read),
            Err(error) => Err(error),
        };
        match changed {
            Ok(()) => tracing::info!(subsystem_name = SUBSYSTEM, "Loaded new certificate of the bundle endpoint"),
            Err(error) => tracing::error!(subsystem_name = SUBSYSTEM, %error, "The last certificate is kept"),
        }
    }
}
