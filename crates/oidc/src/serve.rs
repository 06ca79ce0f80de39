//! The provider as a whole: source, documents, listeners.

use crate::documents::Documents;
use crate::health::Probes;
use crate::keys::Keys;
use crate::source;
use finial_acme::AcmeSettings;
use finial_config::{OidcEndpoint, OidcListen, OidcSettings, socket_address};
use finial_core::Clock;
use finial_crypto::tls::{KeyExchange, server_config_with};
use finial_net::https_server::{LIMITS, Listen, serve_with};
use finial_net::serving_cert::{self, CertFiles, CertFilesError};
use finial_net::{tls, unix};
use finial_runtime::Spawner;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpListener;

/// Who speaks in the log.
const SUBSYSTEM: &str = "oidc";

/// Why a provider does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Not an address.
    #[error("{0}")]
    Address(String),
    /// Nobody can listen there.
    #[error("{}", finial_runtime::listen_text(.0, .1))]
    Listen(SocketAddr, io::Error),
    /// Nobody can listen on the socket.
    #[error(transparent)]
    Socket(#[from] unix::BindError),
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// Certificate and key cannot be used.
    #[error(transparent)]
    Certificate(#[from] CertFilesError),
    /// The system refuses something.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Runs a provider until shutdown: follows its source, answers requests and probes.
///
/// # Errors
/// When it cannot listen as it was told.
pub async fn run(settings: OidcSettings, clock: Arc<dyn Clock>, spawner: &Spawner) -> Result<(), ServeError> {
    let keys = Keys::new(clock.clone(), settings.endpoint.documents.set_key_use);
    serve(settings.endpoint, keys.clone(), clock, spawner).await?;
    let following = source::follow(settings.source, settings.poll_interval, keys.clone(), spawner.clone());
    spawner.service("key source", async move {
        following.await;
        Ok::<(), Infallible>(())
    });
    if let Some(health) = settings.health {
        let all = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), health.port);
        let listener = bind(all)?;
        let probes = Probes::new(keys, health, settings.poll_interval);
        serve_with(Listen::Plain(listener), Arc::new(move |r| probes.respond(r)), "health checks", spawner)?;
    }
    Ok(())
}

/// Answers requests with `keys`, which somebody else keeps current, until shutdown. Gives the address it got, if it listens on
/// TCP.
///
/// # Errors
/// When it cannot listen as it was told.
pub async fn serve(
    endpoint: OidcEndpoint,
    keys: Keys,
    clock: Arc<dyn Clock>,
    spawner: &Spawner,
) -> Result<Option<SocketAddr>, ServeError> {
    let (listen, address) = listen(&endpoint, clock, spawner).await?;
    if endpoint.log_requests {
        tracing::info!(subsystem_name = SUBSYSTEM, "Logging all requests");
    }
    let secure = matches!(listen, Listen::Tls(..));
    let documents = Documents::new(keys, endpoint, secure);
    serve_with(listen, Arc::new(move |r| documents.respond(r)), SUBSYSTEM, spawner)?;
    Ok(address)
}

async fn listen(
    endpoint: &OidcEndpoint,
    clock: Arc<dyn Clock>,
    spawner: &Spawner,
) -> Result<(Listen, Option<SocketAddr>), ServeError> {
    let bind = |address| {
        let listener = bind(address)?;
        let local = listener.local_addr()?;
        Ok::<_, ServeError>((listener, local))
    };
    match &endpoint.listen {
        OidcListen::Insecure(address) => {
            let (listener, local) = bind(socket_address(address).map_err(ServeError::Address)?)?;
            tracing::warn!(subsystem_name = SUBSYSTEM, address = %local, "Serving HTTP (insecure)");
            Ok((Listen::Plain(listener), Some(local)))
        }
        OidcListen::Socket(path) => {
            let incoming = unix::bind(path, 0o777, 0o755, LIMITS)?;
            tracing::info!(subsystem_name = SUBSYSTEM, network = "unix", address = %path.display(), "Serving HTTP");
            Ok((Listen::Unix(incoming), None))
        }
        OidcListen::ServingCert { certificate, key, address, file_sync_interval } => {
            let files = CertFiles { certificate: certificate.clone(), key: key.clone() };
            let identity = serving_cert::serve(files, *file_sync_interval, SUBSYSTEM, spawner).await?;
            let config = server_config_with(KeyExchange::default(), identity, None, clock)?;
            let (listener, local) = bind(*address)?;
            tracing::info!(
                subsystem_name = SUBSYSTEM,
                cert_file_path = %certificate.display(),
                address = %local,
                "Serving HTTPS using certificate loaded from disk"
            );
            Ok((Listen::Tls(listener, Box::new(config)), Some(local)))
        }
        OidcListen::Acme { directory_url, email, cache_dir, address } => {
            let (listener, local) = bind(*address)?;
            let settings = AcmeSettings {
                directory_url: directory_url.clone(),
                email: email.clone(),
                tos_accepted: true,
                domains: endpoint.domains.clone(),
                cache_dir: Some(cache_dir.clone()).filter(|dir| !dir.as_os_str().is_empty()),
                subsystem: SUBSYSTEM,
            };
            let identity = finial_acme::start(settings, None, clock.clone(), spawner).await;
            let config = identity.server_config(KeyExchange::default(), clock)?;
            tracing::info!(subsystem_name = SUBSYSTEM, address = %local, "Serving HTTPS via ACME");
            Ok((Listen::Tls(listener, Box::new(config)), Some(local)))
        }
    }
}

/// Listens; on all addresses of IPv4 where there is no IPv6 and all were meant.
fn bind(address: SocketAddr) -> Result<TcpListener, ServeError> {
    let bound = tls::bind(address);
    let bound = match bound {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && error.kind() != io::ErrorKind::AddrInUse => {
            tls::bind((Ipv4Addr::UNSPECIFIED, address.port()).into()).map_err(|_| error)
        }
        bound => bound,
    };
    bound.map_err(|error| ServeError::Listen(address, error))
}
