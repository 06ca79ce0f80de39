//! Our own bundle for others: the bundle endpoint, verified by SPIFFE or by a certificate of the web.

use super::acme::{AcmeKeys, acme_settings};
use super::peers::Peers;
use crate::publish::BundleFeed;
use finial_config::{BundleEndpointProfile, BundleEndpointSettings};
use finial_core::{Bundle, Clock};
use finial_crypto::bundle::{BundleFormat, bundle_to_json};
use finial_crypto::tls::{KeyExchange, TlsIdentity, server_config_with};
use finial_net::https_server::{self, Asker};
use finial_net::serving_cert::{self, CertFiles, CertFilesError};
use finial_net::tls::bind;
use finial_plugin::KeyManager;
use finial_runtime::Spawner;
use finial_runtime::http::Answer;
use http::StatusCode;
use rustls::ServerConfig;
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
    /// Those of ACME are there too.
    pub(crate) keys: Arc<dyn KeyManager>,
    /// The server's own SVID.
    pub(crate) svid: Arc<TlsIdentity>,
    pub(crate) exchange: KeyExchange,
    pub(crate) clock: Arc<dyn Clock>,
    /// Remembers who fetched what.
    pub(crate) peers: Arc<Peers>,
    pub(crate) spawner: Spawner,
}

/// Serves our bundle until shutdown. Gives the address it got.
pub(crate) async fn serve(
    settings: &BundleEndpointSettings,
    parts: EndpointParts,
) -> Result<SocketAddr, EndpointError> {
    let tls = tls(&settings.profile, &parts).await?;
    let failed = |error| EndpointError::Listen(settings.address, error);
    let listener = bind(settings.address).map_err(failed)?;
    let hint_seconds = i64::try_from(settings.refresh_hint.as_secs()).unwrap_or(i64::MAX);
    let EndpointParts { bundles, clock, peers, spawner, .. } = parts;
    let page = Arc::new(move |asker: &Asker<'_>| {
        let (answer, sequence_number) = page(&bundles, hint_seconds);
        if let Some(sequence_number) = sequence_number {
            peers.note(asker.address.ip(), asker.user_agent, sequence_number, clock.now());
        }
        answer
    });
    let address = https_server::serve(listener, tls, page, "bundle endpoint", &spawner).map_err(failed)?;
    let refresh_hint = crate::issue::go_duration(hint_seconds);
    tracing::info!(subsystem_name = SUBSYSTEM, addr = %address, %refresh_hint, "Serving bundle endpoint");
    Ok(address)
}

/// How it proves who it is.
async fn tls(profile: &BundleEndpointProfile, parts: &EndpointParts) -> Result<ServerConfig, EndpointError> {
    let identity = match profile {
        BundleEndpointProfile::HttpsSpiffe => parts.svid.clone(),
        BundleEndpointProfile::ServingCertFile { cert_file_path, key_file_path, file_sync_interval } => {
            let files = CertFiles { certificate: cert_file_path.clone(), key: key_file_path.clone() };
            serving_cert::serve(files, *file_sync_interval, SUBSYSTEM, &parts.spawner).await?
        }
        BundleEndpointProfile::Acme(acme) => {
            let keys = AcmeKeys::of(&parts.keys).await;
            let identity = finial_acme::start(acme_settings(acme), keys, parts.clock.clone(), &parts.spawner).await;
            return Ok(identity.server_config(parts.exchange, parts.clock.clone())?);
        }
    };
    Ok(server_config_with(parts.exchange, identity, None, parts.clock.clone())?)
}

/// The page, and the number of the bundle in it.
fn page(bundles: &BundleFeed, refresh_hint: i64) -> (Answer, Option<u64>) {
    let Some(own) = bundles.own() else {
        tracing::error!(subsystem_name = SUBSYSTEM, "Unable to retrieve local bundle");
        return (Answer::text(StatusCode::INTERNAL_SERVER_ERROR, "500 unable to retrieve local bundle"), None);
    };
    let body = bundle_to_json(&Bundle { refresh_hint, ..own.bundle.clone() }, BundleFormat::SPIFFE);
    let answer = Answer { status: StatusCode::OK, content_type: "application/json", body };
    (answer, Some(own.bundle.sequence_number))
}
