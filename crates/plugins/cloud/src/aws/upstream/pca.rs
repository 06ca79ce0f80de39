//! `aws_pca`: a private CA of AWS Certificate Manager signs.

use crate::aws::credentials::Credentials;
use crate::aws::service::{Name, Service, endpoint_given};
use crate::world::{Failure, World, read_file};
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use finial_core::Secret;
use finial_crypto::pem;
use finial_hcl::Value;
use finial_plugin::{MintedX509Ca, PluginContext, PluginError, UpstreamAuthority, all_given, check_ca_csr, decode};
use serde::Deserialize;
use serde_json::json;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Without another, what is signed signs no authorities.
const TEMPLATE: &str = "arn:aws:acm-pca:::template/SubordinateCACertificate_PathLen0/V1";
/// The lifetime of what is signed when the server has no preference.
const DEFAULT_TTL_SECONDS: i64 = 3600;
/// Between two questions whether the certificate is there: the first, and the longest.
const POLLS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// It is asked at most so often; that is some three minutes, as in SPIRE.
const POLLS_MAX: usize = 38;
/// All of it, with the requests.
const MINT_SECONDS: u64 = 240;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    region: String,
    certificate_authority_arn: String,
    ca_signing_template_arn: String,
    signing_algorithm: String,
    assume_role_arn: String,
    endpoint: String,
    supplemental_bundle_path: String,
}

/// The `aws_pca` upstream authority.
pub struct Pca {
    service: Service,
    config: Config,
    /// The CA's own, found out when configuration does not say one.
    algorithm: OnceLock<String>,
    supplemental: Vec<Arc<[u8]>>,
    context: PluginContext,
}

impl Pca {
    /// The name in configuration.
    pub const NAME: &'static str = "aws_pca";

    /// With SPIRE's keys. The CA is not asked yet.
    ///
    /// # Errors
    /// What is missing or malformed, or a supplemental bundle that cannot be read.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        Self::within(data, context, &World::new(context)?)
    }

    pub(in crate::aws) fn within(data: &Value, context: &PluginContext, world: &World) -> Result<Self, PluginError> {
        let mut config: Config = decode(data)?;
        all_given(
            [(&config.region, "region"), (&config.certificate_authority_arn, "certificate_authority_arn")],
            |key| format!("plugin configuration is missing the {key}"),
        )?;
        let supplemental = match config.supplemental_bundle_path.as_str() {
            "" => Vec::new(),
            path => {
                let failed = |e: &dyn std::fmt::Display| {
                    PluginError::invalid(format!("failed to load supplemental bundle: {path}: {e}"))
                };
                pem::certificates(&read_file(path).map_err(|e| failed(&e))?).map_err(|e| failed(&e))?
            }
        };
        if config.ca_signing_template_arn.is_empty() {
            TEMPLATE.clone_into(&mut config.ca_signing_template_arn);
        }
        let none = Secret::default();
        let credentials = Credentials::new("", &none, &none, &config.region).assuming(&config.assume_role_arn);
        let url = endpoint_given(world, Name::AcmPca, &config.endpoint);
        let service = Service::new(Name::AcmPca, &config.region, url, credentials, world)?;
        Ok(Self { service, config, algorithm: OnceLock::new(), supplemental, context: context.clone() })
    }

    async fn ask(&self, operation: &str, fields: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        self.service.operation(&format!("ACMPrivateCA.{operation}"), "1.1", fields).await
    }

    /// The algorithm to sign with; the CA tells its own.
    async fn algorithm(&self) -> Result<&str, PluginError> {
        if let Some(known) = self.algorithm.get() {
            return Ok(known);
        }
        let arn = &self.config.certificate_authority_arn;
        let what = "failed to describe CertificateAuthority";
        let answer = self.ask("DescribeCertificateAuthority", &json!({ "CertificateAuthorityArn": arn })).await;
        let answer = answer.map_err(|e| e.of(what))?;
        let text = |pointer: &str| answer.pointer(pointer).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        let status = text("/CertificateAuthority/Status");
        if status != "ACTIVE" {
            tracing::warn!(certificate_authority_arn = arn, status, "Certificate is in an invalid state for issuance");
        }
        let own = text("/CertificateAuthority/CertificateAuthorityConfiguration/SigningAlgorithm");
        let algorithm =
            if self.config.signing_algorithm.is_empty() { own } else { self.config.signing_algorithm.clone() };
        if algorithm.is_empty() {
            return Err(self.service.odd("the CA has no signing algorithm; set signing_algorithm").of(what));
        }
        Ok(self.algorithm.get_or_init(|| algorithm))
    }

    /// Waits for the certificate and its chain, both PEM.
    async fn issued(&self, certificate: &str) -> Result<(String, String), PluginError> {
        let arns = json!({
            "CertificateAuthorityArn": self.config.certificate_authority_arn,
            "CertificateArn": certificate,
        });
        let mut wait = POLLS.0;
        for _ in 0..POLLS_MAX {
            match self.ask("GetCertificate", &arns).await {
                Ok(answer) => {
                    let text = |key| answer.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
                    return Ok((text("Certificate"), text("CertificateChain")));
                }
                Err(e) if e.code() == "RequestInProgressException" => {}
                Err(e) => return Err(e.of("failed to get certificates")),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(POLLS.1);
        }
        Err(self.service.odd("the certificate is still not issued").of("failed waiting for issuance"))
    }
}

#[async_trait]
impl UpstreamAuthority for Pca {
    fn name(&self) -> &str {
        Self::NAME
    }

    /// AWS may take minutes, and would be asked, and paid, for a certificate more with each attempt.
    fn mint_seconds(&self) -> u64 {
        MINT_SECONDS
    }

    async fn prepare(&self) -> Result<(), PluginError> {
        self.algorithm().await.map(drop)
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        check_ca_csr(csr, &self.context.trust_domain)?;
        let ttl_seconds = if ttl_seconds > 0 { ttl_seconds } else { DEFAULT_TTL_SECONDS };
        let fields = json!({
            "CertificateAuthorityArn": self.config.certificate_authority_arn,
            "Csr": BASE64.encode(pem::encode("CERTIFICATE REQUEST", csr)),
            "SigningAlgorithm": self.algorithm().await?,
            "TemplateArn": self.config.ca_signing_template_arn,
            "Validity": { "Type": "ABSOLUTE", "Value": self.context.clock.now().saturating_add(ttl_seconds) },
            // An attempt that is made again is the same request.
            "IdempotencyToken": uuid::Uuid::new_v4().simple().to_string(),
        });
        let submitting = "failed submitting CSR";
        let answer = self.ask("IssueCertificate", &fields).await.map_err(|e| e.of(submitting))?;
        let arn = answer.get("CertificateArn").and_then(|arn| arn.as_str());
        let arn = arn.ok_or_else(|| self.service.odd("it names no certificate").of(submitting))?;
        let (certificate, chain) = self.issued(arn).await?;
        let parse = |what: &str, text: &str| {
            pem::certificates(text.as_bytes())
                .map_err(|e| self.service.odd(e).of(&format!("failed to parse {what} from response")))
        };
        let mut own = parse("certificate", &certificate)?;
        own.truncate(1);
        // The chain ends with the root.
        let mut chain = parse("certificate chain", &chain)?;
        let mut roots: Vec<_> = chain.pop().into_iter().collect();
        for further in &self.supplemental {
            if !roots.contains(further) {
                roots.push(further.clone());
            }
        }
        own.extend(chain);
        Ok(MintedX509Ca { chain: own, roots })
    }
}
