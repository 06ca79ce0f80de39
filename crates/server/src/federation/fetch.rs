//! Fetching the bundle of one foreign trust domain from its endpoint.

use crate::publish::BundleFeed;
use finial_config::FederatesWith;
use finial_core::{Bundle, Clock, EndpointProfile, ErrorKind, TrustDomain};
use finial_crypto::bundle::{BUNDLE_BYTES_MAX, BundleError, bundle_from_json};
use finial_crypto::tls::{KeyExchange, PeerPolicy, ServerAuth, client_config_with, explain};
use finial_crypto::web::{NotWebButSpiffe, web_client_config};
use finial_net::DialError;
use finial_net::https::{self, FetchLimits};
use finial_runtime::Spawner;
use finial_store::StoreError;
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use std::time::Duration;

/// What a fetch may cost.
pub(super) const LIMITS: FetchLimits = FetchLimits { time: Duration::from_secs(30), body: BUNDLE_BYTES_MAX };
/// So much of an error page is shown.
const ERROR_PAGE_BYTES: usize = 1024;

/// Why a bundle was not refreshed. The texts are SPIRE's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FederationError {
    /// The endpoint is to be verified by SPIFFE, and nothing is known to verify it with.
    #[error("can't perform SPIFFE Authentication: local copy of bundle not found")]
    NoEndpointBundle,
    /// The endpoint's trust domain has withdrawn all that it could be verified with.
    #[error(
        "can't perform SPIFFE Authentication: the bundle of {0:?} has no X.509 authorities, as its endpoint served it last: \
         get the new ones from its operator and set them with `bundle set`"
    )]
    EmptyEndpointBundle(String),
    /// Nothing came from the endpoint.
    #[error("failed to fetch federated bundle from endpoint: failed to fetch bundle: Get {url:?}: {cause}")]
    Fetch {
        /// Where it was asked for.
        url: String,
        /// What went wrong.
        cause: String,
    },
    /// The endpoint shows an SVID where the relationship says that it has a certificate of the web.
    #[error(
        "failed to fetch federated bundle from endpoint: failed to authenticate bundle endpoint using web authentication \
         but the server certificate contains SPIFFE ID {claimed:?}: maybe use https_spiffe instead of https_web: Get {url:?}: {cause}"
    )]
    NotWeb {
        /// Who it claims to be.
        claimed: String,
        /// Where it was asked for.
        url: String,
        /// What went wrong.
        cause: String,
    },
    /// The endpoint answered with something else.
    #[error("failed to fetch federated bundle from endpoint: unexpected status {status} fetching bundle: {page}")]
    Status {
        /// What it is.
        status: u16,
        /// The beginning of what it said.
        page: String,
    },
    /// What came is not a bundle.
    #[error("failed to fetch federated bundle from endpoint: failed to decode bundle: {cause} (served by {url:?})")]
    Decode {
        /// Where it came from.
        url: String,
        /// What is wrong with it.
        cause: BundleError,
    },
    /// The endpoint went back to an older bundle: a server or a cache behind the others, most likely.
    #[error(
        "{url:?} serves a bundle with sequence number {found}, older than {known} that it had before: not taken unless it stays so \
         for an hour, or `federation refresh` asks for it"
    )]
    Older {
        /// Where it came from.
        url: String,
        /// Of the bundle that came.
        found: u64,
        /// Of the bundle before.
        known: u64,
    },
    /// What the endpoint serves says of itself that it is another trust domain's.
    #[error(
        "{url:?} serves the bundle of trust domain {found:?} instead of {wanted:?}: so its X.509 authorities are named; if they \
         are meant, `bundle set` them once"
    )]
    OtherDomain {
        /// Where it came from.
        url: String,
        /// Whose it is.
        found: String,
        /// Whose it was to be.
        wanted: String,
    },
    /// The relationships cannot be read.
    #[error("failed to fetch local federated bundle: {0}")]
    Read(#[source] StoreError),
    /// The bundle cannot be stored.
    #[error("failed to store fetched federated bundle: {0}")]
    Save(#[source] StoreError),
}

impl FederationError {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read(e) | Self::Save(e) => e.kind(),
            _ => ErrorKind::Internal,
        }
    }
}

/// Fetches bundles over the network.
pub(super) struct Fetcher {
    pub(super) bundles: Arc<BundleFeed>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) spawner: Spawner,
    /// `require_pq_kem` holds for endpoints too.
    pub(super) exchange: KeyExchange,
    pub(super) limits: FetchLimits,
    /// Whom this machine trusts for the web. Reads files.
    pub(super) web_roots: Arc<dyn Fn() -> RootCertStore + Send + Sync>,
}

impl Fetcher {
    pub(super) async fn fetch(
        &self,
        trust_domain: &TrustDomain,
        endpoint: &FederatesWith,
    ) -> Result<Bundle, FederationError> {
        let url = &endpoint.bundle_endpoint_url;
        let failed = |cause: String| FederationError::Fetch { url: url.clone(), cause };
        let mut tls = self.tls(&endpoint.profile).await?.map_err(|e| failed(e.to_string()))?;
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let fetched = https::get(url, Arc::new(tls), self.limits).await;
        let fetched = fetched.map_err(|error| failed_at(url.clone(), error, &endpoint.profile))?;
        if fetched.status != http::StatusCode::OK {
            let page = fetched.body.get(..ERROR_PAGE_BYTES).unwrap_or(&fetched.body);
            let page = String::from_utf8_lossy(page).into_owned();
            return Err(FederationError::Status { status: fetched.status.as_u16(), page });
        }
        bundle_from_json(trust_domain, &fetched.body)
            .map_err(|cause| FederationError::Decode { url: url.clone(), cause })
    }

    /// How the endpoint is verified.
    async fn tls(&self, profile: &EndpointProfile) -> Result<Result<ClientConfig, rustls::Error>, FederationError> {
        match profile {
            EndpointProfile::HttpsWeb => {
                // Files are read: not on the threads that answer.
                let read = self.web_roots.clone();
                let roots = self.spawner.blocking(move || read()).await;
                let roots = roots.unwrap_or_else(|_| rustls::RootCertStore::empty());
                Ok(web_client_config(self.exchange, roots, self.clock.clone()))
            }
            EndpointProfile::HttpsSpiffe { endpoint_id: id } => {
                let name = id.trust_domain_name();
                let known = self.bundles.bundle(name).ok_or(FederationError::NoEndpointBundle)?;
                if known.bundle.x509_authorities.is_empty() {
                    return Err(FederationError::EmptyEndpointBundle(name.to_owned()));
                }
                let auth = ServerAuth::Spiffe { bundles: self.bundles.clone(), policy: PeerPolicy::Exact(id.clone()) };
                Ok(client_config_with(self.exchange, None, auth, self.clock.clone()).map(|mut config| {
                    // Load balancers choose by it.
                    config.enable_sni = true;
                    config
                }))
            }
        }
    }
}

/// Names who failed: where a redirect led, if one did.
fn failed_at(url: String, error: https::FetchError, profile: &EndpointProfile) -> FederationError {
    match error {
        https::FetchError::Redirected { to, cause } => failed_at(to, *cause, profile),
        https::FetchError::Dial(DialError::Tls(cause)) => match NotWebButSpiffe::of(&cause) {
            Some(told) => FederationError::NotWeb { claimed: told.claimed.to_string(), url, cause: told.to_string() },
            None => FederationError::Fetch { url, cause: tls_text(&cause, profile) },
        },
        other => FederationError::Fetch { url, cause: other.to_string() },
    }
}

/// A failed handshake, in Go's words where it has some.
fn tls_text(error: &rustls::Error, profile: &EndpointProfile) -> String {
    use rustls::{AlertDescription, CertificateError as Bad, Error, InvalidMessage};
    let verified = match error {
        Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. } | Bad::NotValidYet) => {
            "x509: certificate has expired or is not yet valid".to_owned()
        }
        Error::InvalidCertificate(Bad::UnknownIssuer) => match profile {
            EndpointProfile::HttpsWeb => {
                "x509: certificate signed by unknown authority: not by any web root of this machine".to_owned()
            }
            EndpointProfile::HttpsSpiffe { endpoint_id } => format!(
                "x509: certificate signed by unknown authority: not by any that is known here of {:?}",
                endpoint_id.trust_domain_name()
            ),
        },
        Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
            format!("x509: {}", explain(error))
        }
        Error::InvalidCertificate(_) => explain(error),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            return "tls: first record does not look like a TLS handshake".to_owned();
        }
        Error::AlertReceived(AlertDescription::ProtocolVersion) => {
            return "remote error: tls: protocol version not supported".to_owned();
        }
        Error::AlertReceived(alert) => return format!("remote error: tls: {alert:?}"),
        other => return format!("tls: {}", explain(other)),
    };
    format!("tls: failed to verify certificate: {verified}")
}
