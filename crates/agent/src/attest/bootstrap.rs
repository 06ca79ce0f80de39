//! How the server is known at the first contact.

use crate::error::AgentError;
use finial_config::{Bootstrap, TrustBundleFormat};
use finial_core::TrustDomain;
use finial_crypto::{bundle, pem};
use std::path::Path;
use std::sync::Arc;

/// The roots for the first contact; `None` = whoever answers is believed (`insecure_bootstrap`).
pub(super) fn roots(
    source: &Bootstrap,
    format: TrustBundleFormat,
    trust_domain: &TrustDomain,
) -> Result<Option<Vec<Arc<[u8]>>>, AgentError> {
    match source {
        Bootstrap::Insecure => Ok(None),
        Bootstrap::Path(path) => read(path, format, trust_domain).map(Some),
        Bootstrap::Url { .. } => {
            Err(AgentError::internal("trust_bundle_url is not supported yet: use trust_bundle_path"))
        }
        Bootstrap::WorkloadApi(_) => {
            Err(AgentError::internal("trust_bundle_spiffe_workload_api is not supported yet: use trust_bundle_path"))
        }
    }
}

fn read(path: &Path, format: TrustBundleFormat, trust_domain: &TrustDomain) -> Result<Vec<Arc<[u8]>>, AgentError> {
    let failed = |e: String| AgentError::internal(format!("could not parse trust bundle: {}: {e}", path.display()));
    let text = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
    let roots = match format {
        TrustBundleFormat::Pem => pem::certificates(&text).map_err(|e| failed(e.to_string()))?,
        TrustBundleFormat::Spiffe => {
            let bundle = bundle::bundle_from_json(trust_domain, &text).map_err(|e| failed(e.to_string()))?;
            bundle.x509_authorities.into_iter().map(|a| a.der).collect()
        }
    };
    if roots.is_empty() {
        return Err(AgentError::internal("no certificates found in trust bundle"));
    }
    Ok(roots)
}
