//! Who this server is at the one above: the X.509-SVID that an agent of the upstream server gives it.

use super::rpc_failure;
use finial_core::{ErrorKind, SpiffeId, TrustDomain, UnixSeconds};
use finial_crypto::tls::{BundleSource, TlsIdentity};
use finial_crypto::{Certificate, PrivateKey, TrustRoots};
use finial_net::client::uds_channel;
use finial_plugin::PluginError;
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{X509svid, X509svidRequest};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status};
use zeroize::Zeroizing;

/// How long the agent may take in all, waiting for an identity included. The server asks what is new above from the beginning
/// every ten seconds: this and the pause after a failure must fit in twice.
const DEADLINE: Duration = Duration::from_secs(7);
/// How long it may take where the server above is waiting to be asked with what it gave before.
const DEADLINE_AGAIN: Duration = Duration::from_secs(2);
/// How soon it is asked again while it has none.
const PAUSE: Duration = Duration::from_millis(500);

/// An X.509-SVID, and the roots that its agent knows.
pub(super) struct Identity {
    pub(super) id: SpiffeId,
    pub(super) tls: TlsIdentity,
    pub(super) roots: Arc<TrustRoots>,
    pub(super) not_after: UnixSeconds,
    /// So many others this process has there: of which one is used, the agent decides.
    pub(super) others: usize,
}

/// Roots of one trust domain.
pub(super) struct Roots(pub(super) TrustDomain, pub(super) Arc<TrustRoots>);

impl BundleSource for Roots {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        (trust_domain == self.0.as_str()).then(|| self.1.clone())
    }
}

/// Asks the Workload API. Without an identity that still holds for a while also again: the agent may have begun just now, or the
/// entry may be on its way.
pub(super) async fn fetch(socket: &Path, trust_domain: &TrustDomain, holds: bool) -> Result<Identity, PluginError> {
    let deadline = if holds { DEADLINE_AGAIN } else { DEADLINE };
    let mut last = None;
    let asked = async {
        loop {
            match ask(socket).await {
                Ok((svid, others)) => return read(&svid, others, socket, trust_domain),
                Err(status) if !holds && matches!(status.code(), Code::PermissionDenied | Code::Unavailable) => {
                    last = Some(status);
                    tokio::time::sleep(PAUSE).await;
                }
                Err(status) => return Err(failed(socket, &status)),
            }
        }
    };
    match tokio::time::timeout(deadline, asked).await {
        Ok(answer) => answer,
        Err(_) => {
            let silent = || Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs()));
            Err(failed(socket, &last.unwrap_or_else(silent)))
        }
    }
}

/// The first SVID, and how many follow.
async fn ask(socket: &Path) -> Result<(X509svid, usize), Status> {
    let mut request = Request::new(X509svidRequest {});
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    let mut answers = SpiffeWorkloadApiClient::new(uds_channel(socket)).fetch_x509svid(request).await?.into_inner();
    let answer = answers.message().await?.ok_or_else(|| Status::unavailable("the agent ended the stream"))?;
    let mut svids = answer.svids.into_iter();
    let first = svids.next().map(|first| (first, svids.len()));
    first.ok_or_else(|| Status::permission_denied("no identity issued"))
}

/// Says that the agent is at fault, or who gives it its entries.
fn failed(socket: &Path, status: &Status) -> PluginError {
    let hint = match status.code() {
        Code::PermissionDenied => {
            "; the upstream server needs an entry for this server, with the downstream flag, below that agent"
        }
        Code::Unavailable => "; is the upstream server's agent on this node running?",
        _ => "",
    };
    let error = rpc_failure(&format!("unable to create X509Source: Workload API at {}", socket.display()), status);
    PluginError { kind: ErrorKind::Unavailable, message: format!("{}{hint}", error.message), ..error }
}

fn read(svid: &X509svid, others: usize, socket: &Path, trust_domain: &TrustDomain) -> Result<Identity, PluginError> {
    let wrong = |why: &dyn std::fmt::Display| {
        PluginError::internal(format!("unable to create X509Source: Workload API at {}: {why}", socket.display()))
    };
    let chain = Certificate::parse_chain(&svid.x509_svid).map_err(|e| wrong(&e))?;
    let leaf = chain.first().ok_or_else(|| wrong(&"an SVID without a certificate"))?;
    let id = leaf.check_leaf().map_err(|e| wrong(&e))?;
    if !id.is_member_of(trust_domain) {
        let text = "this server's trust domain is";
        return Err(wrong(&format!(
            "its agent belongs to another trust domain: it says {id}, and {text} {trust_domain}"
        )));
    }
    let der = Zeroizing::new(svid.x509_svid_key.to_vec());
    let key = PrivateKey::from_pkcs8(&der).map_err(|e| wrong(&e))?;
    let ders: Vec<_> = chain.iter().map(|certificate| certificate.der().clone()).collect();
    let tls = TlsIdentity::new(&ders, &key).map_err(|e| wrong(&e))?;
    let roots = Certificate::parse_bundle(&svid.bundle).map_err(|e| wrong(&e))?;
    let roots: Vec<_> = roots.iter().map(|root| root.der().clone()).collect();
    let roots = Arc::new(TrustRoots::new(&roots).map_err(|e| wrong(&e))?);
    Ok(Identity { id, tls, roots, not_after: leaf.not_after(), others })
}
