//! Fetching the bundle of one foreign trust domain from its endpoint.

use crate::publish::BundleFeed;
use finial_config::FederatesWith;
use finial_core::{Bundle, Clock, EndpointProfile, ErrorKind, TrustDomain};
use finial_crypto::bundle::{BUNDLE_BYTES_MAX, BundleError, bundle_from_json};
use finial_crypto::tls::{KeyExchange, PeerPolicy, ServerAuth, client_config_with, explain};
use finial_crypto::web::{NotWebButSpiffe, web_client_config};
use finial_net::https::{self, FetchLimits};
use finial_runtime::Spawner;
use finial_store::StoreError;
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Duration;

const LIMITS: FetchLimits = FetchLimits { time: Duration::from_secs(30), body: BUNDLE_BYTES_MAX };
/// So much of an error page is shown.
const ERROR_PAGE_BYTES: usize = 1024;

/// Why a bundle was not refreshed. The texts are SPIRE's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FederationError {
    /// The endpoint is to be verified by SPIFFE, and nothing is known to verify it with.
    #[error("can't perform SPIFFE Authentication: local copy of bundle not found")]
    NoEndpointBundle,
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
    #[error("failed to fetch federated bundle from endpoint: failed to decode bundle: {0}")]
    Decode(#[from] BundleError),
    /// The endpoint went back to an older bundle: a server behind the others, most likely.
    #[error("the endpoint's bundle has sequence number {found}, older than {known} that it had before; not taken yet")]
    Older {
        /// Of the bundle that came.
        found: u64,
        /// Of the bundle before.
        known: u64,
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
        let fetched = https::get(url, Arc::new(tls), LIMITS).await.map_err(|error| match error {
            https::FetchError::Tls(cause) => tls_failed(url, &cause),
            other => failed(other.to_string()),
        })?;
        if fetched.status != http::StatusCode::OK {
            let page = fetched.body.get(..ERROR_PAGE_BYTES).unwrap_or(&fetched.body);
            let page = String::from_utf8_lossy(page).into_owned();
            return Err(FederationError::Status { status: fetched.status.as_u16(), page });
        }
        Ok(bundle_from_json(trust_domain, &fetched.body)?)
    }

    /// How the endpoint is verified.
    async fn tls(&self, profile: &EndpointProfile) -> Result<Result<ClientConfig, rustls::Error>, FederationError> {
        match profile {
            EndpointProfile::HttpsWeb => {
                // Files are read: not on the threads that answer.
                let roots = self.spawner.blocking(https::system_roots).await;
                let roots = roots.unwrap_or_else(|_| rustls::RootCertStore::empty());
                Ok(web_client_config(self.exchange, roots, self.clock.clone()))
            }
            EndpointProfile::HttpsSpiffe { endpoint_id: id } => {
                let known = self.bundles.bundle(id.trust_domain_name());
                if known.is_none_or(|bundle| bundle.roots.is_none()) {
                    return Err(FederationError::NoEndpointBundle);
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

fn tls_failed(url: &str, error: &rustls::Error) -> FederationError {
    let url = url.to_owned();
    match NotWebButSpiffe::of(error) {
        Some(told) => FederationError::NotWeb { claimed: told.claimed.to_string(), url, cause: told.to_string() },
        None => FederationError::Fetch { url, cause: format!("tls: failed to verify certificate: {}", explain(error)) },
    }
}
