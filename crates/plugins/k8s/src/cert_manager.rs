//! `cert-manager`: an issuer of cert-manager's signs, asked by CertificateRequest objects.

use crate::api::{Api, ApiError, JSON, from_base64, items, segment, text, to_base64};
use crate::kubeconfig::Place;
use async_trait::async_trait;
use finial_core::{ErrorKind, TrustDomain};
use finial_crypto::pem;
use finial_hcl::Value as Data;
use finial_plugin::{MintedX509Ca, PluginContext, PluginError, UpstreamAuthority, all_given, check_ca_csr, decode};
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// How often the request is looked at, as by SPIRE.
const POLL: Duration = Duration::from_millis(250);
/// How long it may wait for its issuer, as in SPIRE.
const WAIT: Duration = Duration::from_secs(75);
/// How long a signature takes at most: with what comes before the wait, and after it.
const MINT_SECONDS: u64 = 90;
/// The label by which this trust domain's requests are found again.
const LABEL: &str = "cert-manager.spiffe.io/trust-domain";
/// How long cleaning up may take, which nobody waits for.
const CLEAN_UP: Duration = Duration::from_secs(3);

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    issuer_name: String,
    issuer_kind: String,
    issuer_group: String,
    namespace: String,
    kube_config_file: String,
}

/// The `cert-manager` upstream authority.
pub struct CertManager {
    issuer: Value,
    place: Place,
    namespace: String,
    trust_domain: TrustDomain,
}

impl CertManager {
    /// The name in configuration.
    pub const NAME: &'static str = "cert-manager";

    /// Understands the configuration; the cluster is asked when there is something to sign.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Data, context: &PluginContext) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        all_given([(&config.namespace, "namespace"), (&config.issuer_name, "issuer_name")], |key| {
            format!("plugin configuration has empty {key} property")
        })?;
        let or = |value: String, default: &str| if value.is_empty() { default.to_owned() } else { value };
        let (kind, group) = (or(config.issuer_kind, "Issuer"), or(config.issuer_group, "cert-manager.io"));
        Ok(Self {
            issuer: json!({"name": config.issuer_name, "kind": kind, "group": group}),
            place: Place::of(&config.kube_config_file),
            namespace: config.namespace,
            trust_domain: context.trust_domain.clone(),
        })
    }

    fn path(&self) -> String {
        format!("/apis/cert-manager.io/v1/namespaces/{}/certificaterequests", segment(&self.namespace))
    }

    fn request(&self, csr: &[u8], ttl_seconds: i64) -> Value {
        let duration = if ttl_seconds > 0 { json!(format!("{ttl_seconds}s")) } else { Value::Null };
        json!({
            "apiVersion": "cert-manager.io/v1", "kind": "CertificateRequest",
            "metadata": {
                "generateName": "spiffe-ca-", "namespace": self.namespace,
                "labels": {LABEL: self.trust_domain.as_str()}
            },
            "spec": {
                "duration": duration, "issuerRef": self.issuer, "isCA": true, "usages": ["cert sign", "crl sign"],
                "request": to_base64(pem::encode("CERTIFICATE REQUEST", csr).as_bytes())
            }
        })
    }

    /// Waits until the request called `name` is answered.
    async fn wait(&self, api: &Api, name: &str) -> Result<MintedX509Ca, PluginError> {
        let path = format!("{}/{}", self.path(), segment(name));
        let whose = || format!("CertificateRequest {}/{name}", self.namespace);
        let answered = async {
            loop {
                let request = api.get(&path).await;
                let request = request.map_err(|e| e.during("kubernetes cluster client failed to get object"))?;
                if let Some(answer) = answer(&request, &whose()) {
                    return answer;
                }
                tokio::time::sleep(POLL).await;
            }
        };
        let late = || {
            let issuer = (text(&self.issuer, "/kind"), text(&self.issuer, "/name"));
            let message = format!(
                "request did not become ready in time: {}; does {} {:?} exist, and is the request approved?",
                whose(),
                issuer.0,
                issuer.1
            );
            Err(PluginError::new(ErrorKind::Timeout, message))
        };
        tokio::time::timeout(WAIT, answered).await.unwrap_or_else(|_| late())
    }

    /// Deletes this trust domain's requests that are answered.
    async fn clean_up(&self, api: &Api) -> Result<(), ApiError> {
        let selector = segment(&format!("{LABEL}={}", self.trust_domain.as_str()));
        let found = api.get(&format!("{}?labelSelector={selector}", self.path())).await?;
        for request in items(&found).filter(|request| is_done(request)) {
            let path = format!("{}/{}", self.path(), segment(text(request, "/metadata/name")));
            api.call(Method::DELETE, &path, JSON, None).await?;
        }
        Ok(())
    }
}

/// The condition of that type, if it has that status and reason.
fn condition<'a>(request: &'a Value, kind: &str, status: &str, reason: Option<&str>) -> Option<&'a Value> {
    let all = request.pointer("/status/conditions").and_then(Value::as_array)?;
    all.iter().find(|condition| {
        text(condition, "/type") == kind
            && text(condition, "/status") == status
            && reason.is_none_or(|reason| text(condition, "/reason") == reason)
    })
}

fn is_done(request: &Value) -> bool {
    [("Denied", "True", None), ("Ready", "True", None), ("Ready", "False", Some("Failed"))]
        .into_iter()
        .any(|(kind, status, reason)| condition(request, kind, status, reason).is_some())
}

/// What came of it, if something did.
fn answer(request: &Value, whose: &str) -> Option<Result<MintedX509Ca, PluginError>> {
    let with = |what: &str, condition: &Value| {
        let message: String = text(condition, "/message").chars().take(300).collect();
        format!("{what}: {whose}: {message}")
    };
    if let Some(denied) = condition(request, "Denied", "True", None) {
        return Some(Err(PluginError::denied(with("request has been denied", denied))));
    }
    if let Some(failed) = condition(request, "Ready", "False", Some("Failed")) {
        return Some(Err(PluginError::internal(with("request has failed", failed))));
    }
    let certificate = text(request, "/status/certificate");
    (!certificate.is_empty()).then(|| minted(certificate, text(request, "/status/ca")))
}

fn minted(certificate: &str, ca: &str) -> Result<MintedX509Ca, PluginError> {
    let all = |what: &str, base64: &str| -> Result<Vec<Arc<[u8]>>, PluginError> {
        let bad = |e: &dyn std::fmt::Display| PluginError::internal(format!("failed to parse {what}: {e}"));
        let text = from_base64(base64).ok_or_else(|| bad(&"it is not base64"))?;
        pem::certificates(&text).map_err(|e| bad(&e))
    };
    if ca.is_empty() {
        return Err(PluginError::internal("no upstream CA root returned from request"));
    }
    let (chain, roots) = (all("certificate", certificate)?, all("CA certificate", ca)?);
    // Some issuers put the root into the chain as well.
    let chain = chain.into_iter().filter(|der| !roots.contains(der)).collect();
    Ok(MintedX509Ca { chain, roots })
}

#[async_trait]
impl UpstreamAuthority for CertManager {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn mint_seconds(&self) -> u64 {
        MINT_SECONDS
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        check_ca_csr(csr, &self.trust_domain)?;
        let api = Api::open(&self.place).await.map_err(|e| e.during("failed to create cert-manager client"))?;
        let request = self.request(csr, ttl_seconds);
        let created = api.call(Method::POST, &self.path(), JSON, Some(&request)).await;
        let created = created.map_err(|e| e.during("failed to create object"))?;
        let name = text(&created, "/metadata/name");
        tracing::info!(namespace = self.namespace, name, "Waiting for certificaterequest to be signed");
        let minted = self.wait(&api, name).await;
        let cleaned = tokio::time::timeout(CLEAN_UP, self.clean_up(&api)).await;
        if let Ok(Err(error)) = cleaned {
            tracing::error!(error = error.text, "Failed to optimistically clean-up stale CertificateRequests");
        }
        minted
    }
}

#[cfg(test)]
#[path = "cert_manager_tests.rs"]
mod tests;
