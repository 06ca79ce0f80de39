//! Our own bundle for others: the bundle endpoint, verified by SPIFFE or by a certificate from files.

use crate::publish::BundleFeed;
use finial_config::{BundleEndpointProfile, BundleEndpointSettings};
use finial_core::{Bundle, Clock};
use finial_crypto::bundle::{BundleFormat, bundle_to_json};
use finial_crypto::tls::{KeyExchange, TlsIdentity, server_config_with};
use finial_net::https_server;
use finial_net::serving_cert::{self, CertFiles, CertFilesError};
use finial_net::tls::bind;
use finial_runtime::Spawner;
use finial_runtime::http::Answer;
use http::StatusCode;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

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
    #[error("bundle endpoint: {0}")]
    Certificate(#[from] CertFilesError),
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
            let files = CertFiles { certificate: cert_file_path.clone(), key: key_file_path.clone() };
            serving_cert::serve(files, *file_sync_interval, SUBSYSTEM, &parts.spawner).await?
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
