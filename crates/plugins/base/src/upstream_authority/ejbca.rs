//! `ejbca`: EJBCA signs, asked by its REST interface with a client certificate.

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use finial_core::{ErrorKind, Secret, TrustDomain};
use finial_crypto::{Certificate, Csr, pem};
use finial_hcl::Value;
use finial_net::rest::{Client, Identity, Limits, Trust, client_config};
use finial_plugin::{MintedX509Ca, PluginContext, PluginError, UpstreamAuthority, check_ca_csr, decode};
use finial_runtime::{errno_text, files};
use http::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::json;
use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// What the one call may cost.
const LIMITS: Limits = Limits { time: Duration::from_secs(25), body: 1 << 20 };
/// Largest file that is read.
const FILE_BYTES_MAX: usize = 4 << 20;
const PATH: &str = "/ejbca/ejbca-rest-api/v1/certificate/pkcs10enroll";

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    hostname: String,
    ca_cert_path: String,
    client_cert_path: String,
    client_cert_key_path: String,
    ca_name: String,
    end_entity_profile_name: String,
    certificate_profile_name: String,
    end_entity_name: String,
    account_binding_id: String,
}

/// The `ejbca` upstream authority.
pub struct Ejbca {
    config: Arc<Config>,
    trust_domain: TrustDomain,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Enrolled {
    certificate: String,
    response_format: String,
    certificate_chain: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Refusal {
    error_message: String,
}

impl Config {
    fn client(&self) -> Result<Client, PluginError> {
        let read = |path: &str, what: &str| {
            let read = files::read_limited(Path::new(path), FILE_BYTES_MAX);
            read.map_err(|e| {
                PluginError::invalid(format!("failed to read {what} from file: {path}: {}", errno_text(&e)))
            })
        };
        let trust = match self.ca_cert_path.as_str() {
            "" => Trust::System,
            path => Trust::Named(read(path, "CA chain")?),
        };
        let identity = Identity {
            certificate: read(&self.client_cert_path, "client certificate")?,
            key: Secret::new(read(&self.client_cert_key_path, "client key")?),
        };
        let tls = client_config(&trust, Some(&identity), "EJBCA").map_err(PluginError::invalid)?;
        let url = format!("https://{}", self.hostname);
        Client::to(&url, Arc::new(tls)).map_err(|e| PluginError::invalid(format!("hostname: {e}")))
    }
}

impl Ejbca {
    /// The name in configuration.
    pub const NAME: &'static str = "ejbca";

    /// Understands the configuration. EJBCA is asked when there is something to sign.
    ///
    /// # Errors
    /// What is missing or malformed, all of it.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        Self::within(data, context, |name| std::env::var(name).ok())
    }

    fn within(
        data: &Value,
        context: &PluginContext,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, PluginError> {
        let mut config: Config = decode(data)?;
        for (value, name) in [
            (&mut config.ca_cert_path, "EJBCA_CA_CERT_PATH"),
            (&mut config.client_cert_path, "EJBCA_CLIENT_CERT_PATH"),
            (&mut config.client_cert_key_path, "EJBCA_CLIENT_CERT_KEY_PATH"),
        ] {
            if value.is_empty() {
                *value = variable(name).unwrap_or_default();
            }
        }
        let missing: Vec<_> = [
            ("hostname is required", &config.hostname),
            ("ca_name is required", &config.ca_name),
            ("end_entity_profile_name is required", &config.end_entity_profile_name),
            ("certificate_profile_name is required", &config.certificate_profile_name),
            (
                "client_cert_path or EJBCA_CLIENT_CERT_PATH is required for mTLS authentication",
                &config.client_cert_path,
            ),
            (
                "client_cert_key_path or EJBCA_CLIENT_CERT_KEY_PATH is required for mTLS authentication",
                &config.client_cert_key_path,
            ),
        ]
        .into_iter()
        .filter_map(|(text, value)| value.is_empty().then_some(text))
        .collect();
        if !missing.is_empty() {
            return Err(PluginError::invalid(missing.join("; ")));
        }
        Ok(Self { config: Arc::new(config), trust_domain: context.trust_domain.clone() })
    }

    /// Reads the files, on a thread where that delays nobody.
    async fn client(&self) -> Result<Client, PluginError> {
        let config = self.config.clone();
        let read = tokio::task::spawn_blocking(move || config.client()).await;
        read.unwrap_or_else(|e| Err(PluginError::internal(e.to_string())))
    }

    /// What EJBCA is to call who asks.
    fn end_entity(&self, csr: &Csr) -> Result<String, PluginError> {
        let wanted = self.config.end_entity_name.as_str();
        let common_name = csr.subject().map(|subject| subject.parts().common_name.clone()).unwrap_or_default();
        let first = |names: &[Box<str>]| names.first().map(|name| name.to_string()).unwrap_or_default();
        let found = [("cn", common_name), ("dns", first(csr.dns_names())), ("uri", first(csr.uri_sans()))];
        let fits = |(kind, value): &(&str, String)| (wanted.is_empty() || wanted == *kind) && !value.is_empty();
        if let Some((_, value)) = found.iter().find(|found| fits(found)) {
            return Ok(value.clone());
        }
        // A server's request has no address.
        if matches!(wanted, "" | "cn" | "dns" | "uri" | "ip") {
            let message = format!(
                "unable to determine end entity name: no valid end entity name could be determined from the \
                 CertificateRequest (end_entity_name is {wanted:?})"
            );
            return Err(PluginError::internal(message));
        }
        Ok(wanted.to_owned())
    }

    async fn enroll(&self, csr: &[u8], end_entity: &str) -> Result<Enrolled, PluginError> {
        let client = self.client().await?;
        let mut random = [0; 16];
        aws_lc_rs::rand::fill(&mut random).map_err(|_| PluginError::internal("failed to generate random password"))?;
        let body = json!({
            "certificate_request": pem::encode("CERTIFICATE REQUEST", csr),
            "certificate_profile_name": self.config.certificate_profile_name,
            "end_entity_profile_name": self.config.end_entity_profile_name,
            "certificate_authority_name": self.config.ca_name,
            "username": end_entity,
            // For this one request.
            "password": STANDARD.encode(random),
            "account_binding_id": self.config.account_binding_id,
            "include_chain": true,
        });
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let body = Bytes::from_owner(Zeroizing::new(body.to_string().into_bytes()));
        let unable = |kind, why: &dyn Display| {
            PluginError::new(kind, format!("failed to enroll CSR: POST {}{PATH}: {why}", client.target()))
        };
        let answer = client.send(Method::POST, PATH, &headers, body, LIMITS).await;
        let answer = answer.map_err(|e| unable(ErrorKind::Unavailable, &e))?;
        if !answer.status.is_success() {
            let refusal: Refusal = serde_json::from_slice(&answer.body).unwrap_or_default();
            let said: String = refusal.error_message.chars().take(300).collect();
            let kind = match answer.status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ErrorKind::Denied,
                status if status.is_server_error() => ErrorKind::Unavailable,
                _ => ErrorKind::Internal,
            };
            let separator = if said.is_empty() { "" } else { ": " };
            return Err(unable(kind, &format!("{}{separator}{said}", answer.status)));
        }
        serde_json::from_slice(&answer.body)
            .map_err(|e| unable(ErrorKind::Internal, &format!("the answer is not EJBCA's: {e}")))
    }
}

fn minted(enrolled: &Enrolled) -> Result<MintedX509Ca, PluginError> {
    let bad = |what: &str, why: &dyn Display| PluginError::internal(format!("failed to parse {what}: {why}"));
    let read = |what: &str, text: &str| -> Result<Arc<[u8]>, PluginError> {
        match enrolled.response_format.as_str() {
            "PEM" => {
                let found = pem::certificates(text.as_bytes()).map_err(|e| bad(what, &e))?;
                found.into_iter().next().ok_or_else(|| bad(what, &"no certificate"))
            }
            "DER" => {
                let der = STANDARD.decode(text).map_err(|e| bad(what, &e))?;
                Ok(Certificate::parse(der).map_err(|e| bad(what, &e))?.der().clone())
            }
            other => Err(PluginError::internal(format!("ejbca returned unsupported certificate format: {other:?}"))),
        }
    };
    let own = read("certificate issued by EJBCA", &enrolled.certificate)?;
    let above = enrolled.certificate_chain.iter().map(|text| read("CA chain returned by EJBCA", text));
    let mut above = above.collect::<Result<Vec<_>, _>>()?;
    let root = above.pop().ok_or_else(|| PluginError::internal("EJBCA did not return a CA chain"))?;
    Ok(MintedX509Ca { chain: std::iter::once(own).chain(above).collect(), roots: vec![root] })
}

#[async_trait]
impl UpstreamAuthority for Ejbca {
    fn name(&self) -> &str {
        Self::NAME
    }

    /// How long it lives is for the certificate profile to say.
    async fn mint_x509_ca(&self, csr: &[u8], _ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        let parsed = check_ca_csr(csr, &self.trust_domain)?;
        let end_entity = self.end_entity(&parsed)?;
        minted(&self.enroll(csr, &end_entity).await?)
    }
}

#[cfg(test)]
#[path = "ejbca_tests.rs"]
mod tests;
