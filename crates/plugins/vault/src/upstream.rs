//! The upstream authority `vault`: the PKI engine signs.

use crate::api::{Api, Failure};
use crate::config::{Keys, Settings};
use crate::session::{Session, Sessions};
use async_trait::async_trait;
use finial_core::TrustDomain;
use finial_crypto::{Csr, pem};
use finial_hcl::Value;
use finial_plugin::{
    MintedX509Ca, PluginContext, PluginError, UpstreamAuthorities, UpstreamAuthority, check_ca_csr, decode,
};
use http::Method;
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;
use zeroize::Zeroizing;

/// The `vault` upstream authority.
pub struct Vault {
    settings: Arc<Settings>,
    trust_domain: TrustDomain,
    sessions: Sessions,
}

#[derive(Deserialize)]
struct Signed {
    data: Certificates,
}

#[derive(Deserialize)]
struct Certificates {
    certificate: String,
    issuing_ca: String,
    /// Not there when the engine's own CA is the root.
    #[serde(default)]
    ca_chain: Vec<String>,
}

impl Vault {
    /// The name in configuration.
    pub const NAME: &'static str = "vault";

    /// Understands the configuration. Vault is asked when there is something to sign.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        let keys: Keys = decode(data)?;
        let settings = keys.resolve(|variable| std::env::var(variable).ok())?;
        Ok(Self {
            settings: Arc::new(settings),
            trust_domain: context.trust_domain.clone(),
            sessions: Sessions::default(),
        })
    }

    async fn sign(&self, api: &Api, session: &Session, csr: &Csr, der: &[u8], ttl: i64) -> Result<Signed, Failure> {
        let subject =
            csr.subject().map_err(|e| Failure::Other(finial_core::ErrorKind::InvalidArgument, e.to_string()))?;
        let subject = subject.parts();
        let body = json!({
            "common_name": subject.common_name,
            "organization": subject.organization.join(","),
            "country": subject.country.join(","),
            // Unlike SPIRE: authorities of one name are told apart by it.
            "serial_number": subject.serial_number,
            "uri_sans": csr.uri_sans().join(","),
            "csr": pem::encode("CERTIFICATE REQUEST", der),
            "ttl": if ttl > 0 { ttl.to_string() } else { String::new() },
        });
        let path = format!("{}/root/sign-intermediate", self.settings.pki.trim_matches('/'));
        api.call(Method::PUT, &path, Some(&session.token), Zeroizing::new(body.to_string().into_bytes())).await
    }
}

fn minted(answer: &Certificates) -> Result<MintedX509Ca, PluginError> {
    let one = |what: &str, text: &str| {
        let bad = |e: &dyn std::fmt::Display| PluginError::internal(format!("failed to parse {what}: {e}"));
        let first = pem::certificates(text.as_bytes()).map_err(|e| bad(&e))?.into_iter().next();
        first.ok_or_else(|| bad(&"no certificate"))
    };
    let own = one("certificate", &answer.certificate)?;
    let chain = answer.ca_chain.iter().map(|text| one("upstream bundle certificates", text));
    let chain = chain.collect::<Result<Vec<_>, _>>()?;
    let root = match chain.last() {
        Some(last) => last.clone(),
        None => one("Root CA certificate", &answer.issuing_ca)?,
    };
    // Newer versions put the new certificate into the chain as well.
    let between = chain.into_iter().filter(|der| *der != root && *der != own);
    Ok(MintedX509Ca { chain: std::iter::once(own.clone()).chain(between).collect(), roots: vec![root] })
}

#[async_trait]
impl UpstreamAuthority for Vault {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        let parsed = check_ca_csr(csr, &self.trust_domain)?;
        // Read again each time: files are replaced while the server runs.
        let api = Api::open(&self.settings).await?;
        let session = self.sessions.get(&self.settings, &api).await?;
        let mut signed = self.sign(&api, &session, &parsed, csr, ttl_seconds).await;
        if matches!(signed, Err(Failure::Refused(_))) {
            // The token may have been revoked; with a new one it is Vault's last word.
            self.sessions.forget(&session).await;
            let session: Arc<Session> = self.sessions.get(&self.settings, &api).await?;
            signed = self.sign(&api, &session, &parsed, csr, ttl_seconds).await;
        }
        minted(&signed.map_err(|failure| failure.during("failed to sign intermediate"))?.data)
    }

    /// Nothing is heard of roots between signatures; the token is renewed meanwhile.
    async fn next_authorities(&self) -> Result<UpstreamAuthorities, PluginError> {
        match self.sessions.keep(&self.settings).await {}
    }
}

#[cfg(test)]
#[path = "upstream_tests.rs"]
mod tests;
