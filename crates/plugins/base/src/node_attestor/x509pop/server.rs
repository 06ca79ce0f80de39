//! The server's half.

use super::template::Template;
use super::{Answer, NAME, Payload, proof};
use async_trait::async_trait;
use finial_core::{ErrorKind, Selector, SpiffeId};
use finial_crypto::{Certificate, KeyUsage, PublicKey, TrustRoots, hex, pem, sha1_hex, verify_x509_chain};
use finial_hcl::Value;
use finial_plugin::{
    AttestVerdict, Challenger, PluginContext, PluginError, ServerNodeAttestor, decode, prefixed_selectors,
};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    mode: String,
    #[serde(default)]
    ca_bundle_path: String,
    #[serde(default)]
    ca_bundle_paths: Vec<String>,
    #[serde(default)]
    agent_path_template: String,
    #[serde(default)]
    max_intermediates: Option<i64>,
    #[serde(default)]
    max_rsa_key_size: Option<i64>,
    #[serde(default)]
    verify_client_ip: bool,
}

/// Accepts agents that hold the key of a certificate below the configured roots.
pub struct X509PopServer {
    context: PluginContext,
    roots: TrustRoots,
    template: Template,
    max_intermediates: usize,
    max_rsa_bits: usize,
}

/// The limit that is in force when none is configured.
fn positive(value: Option<i64>, default: usize, name: &str) -> Result<usize, PluginError> {
    match value {
        None => Ok(default),
        Some(value) => usize::try_from(value)
            .ok()
            .filter(|v| *v > 0)
            .ok_or_else(|| PluginError::invalid(format!("{name} must be greater than 0"))),
    }
}

impl X509PopServer {
    /// Checks the configuration and reads the roots.
    ///
    /// # Errors
    /// Names the key or the file.
    pub fn new(data: &Value, context: PluginContext) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        match config.mode.as_str() {
            "" | "external_pki" => {}
            "spiffe" => {
                let message = "mode \"spiffe\" is not supported yet: use \"external_pki\"";
                return Err(PluginError::new(ErrorKind::Unimplemented, message));
            }
            _ => return Err(PluginError::invalid("mode can only be either spiffe or external_pki")),
        }
        if config.verify_client_ip {
            return Err(PluginError::new(ErrorKind::Unimplemented, "verify_client_ip is not supported yet"));
        }
        let paths = match (config.ca_bundle_path.as_str(), config.ca_bundle_paths.as_slice()) {
            ("", []) => {
                return Err(PluginError::invalid("one of ca_bundle_path or ca_bundle_paths must be configured"));
            }
            ("", paths) => paths.to_vec(),
            (path, []) => vec![path.to_owned()],
            _ => {
                let message = "only one of ca_bundle_path or ca_bundle_paths can be configured, not both";
                return Err(PluginError::invalid(message));
            }
        };
        let mut roots = Vec::new();
        for path in &paths {
            let failed = |e: String| PluginError::invalid(format!("unable to load trust bundle {path:?}: {e}"));
            let text = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
            roots.extend(pem::certificates(&text).map_err(|e| failed(e.to_string()))?);
        }
        let roots =
            TrustRoots::new(&roots).map_err(|e| PluginError::invalid(format!("unable to load trust bundle: {e}")))?;
        let template = match config.agent_path_template.as_str() {
            "" => "/{{ .PluginName }}/{{ .Fingerprint }}",
            other => other,
        };
        let template = Template::parse(template)
            .map_err(|e| PluginError::invalid(format!("failed to parse agent svid template: {template:?}: {e}")))?;
        Ok(Self {
            context,
            roots,
            template,
            max_intermediates: positive(config.max_intermediates, 4, "max_intermediates")?,
            max_rsa_bits: positive(config.max_rsa_key_size, 8192, "max_rsa_key_size")?,
        })
    }

    /// Parses the chain, cheapest checks first: nothing is verified, and no large number is calculated with, before the
    /// chain's length and its keys are known to be within the limits.
    fn parse(&self, payload: &[u8]) -> Result<Vec<Certificate>, PluginError> {
        let payload: Payload = serde_json::from_slice(payload)
            .map_err(|e| PluginError::invalid(format!("failed to unmarshal data: {e}")))?;
        let certificates = payload.certificates.unwrap_or_default();
        if certificates.is_empty() {
            return Err(PluginError::invalid("no certificate to attest"));
        }
        if certificates.len() - 1 > self.max_intermediates {
            return Err(PluginError::invalid("too many intermediate certificates"));
        }
        let mut chain = Vec::with_capacity(certificates.len());
        for (index, der) in certificates.into_iter().enumerate() {
            let what = match index.checked_sub(1) {
                None => "leaf certificate".to_owned(),
                Some(number) => format!("intermediate certificate {number}"),
            };
            let certificate =
                Certificate::parse(der.0).map_err(|e| PluginError::invalid(format!("unable to parse {what}: {e}")))?;
            if rsa_bits(certificate.spki_der()).is_some_and(|bits| bits > self.max_rsa_bits) {
                return Err(PluginError::invalid(format!("{what} key size too large")));
            }
            chain.push(certificate);
        }
        Ok(chain)
    }

    /// Each certificate that may stand above the leaf, the leaf's issuers first: from the chain or from the roots.
    fn authorities(&self, chain: &[Certificate]) -> Vec<Certificate> {
        let candidates: Vec<&Certificate> = chain.iter().skip(1).chain(self.roots.certificates()).collect();
        let mut found: Vec<Certificate> = Vec::new();
        let mut below: Vec<Certificate> = chain.first().cloned().into_iter().collect();
        while let Some(child) = below.pop() {
            for candidate in &candidates {
                let issued = candidate.subject_der() == child.issuer_der()
                    && candidate.is_ca()
                    && candidate.public_key().is_ok_and(|key| child.verify_signed_by(&key).is_ok());
                if issued && !found.contains(candidate) {
                    found.push((*candidate).clone());
                    below.push((*candidate).clone());
                }
            }
        }
        found
    }

    fn agent_id(
        &self,
        leaf: &Certificate,
        common_name: &str,
        san: &BTreeMap<String, String>,
    ) -> Result<SpiffeId, String> {
        let path = self.template.fill(|field| {
            Some(match field {
                "PluginName" => NAME.to_owned(),
                "TrustDomain" => self.context.trust_domain.as_str().to_owned(),
                "Fingerprint" => sha1_hex(leaf.der()),
                "SerialNumberHex" => hex(leaf.serial()),
                "Subject.CommonName" => common_name.to_owned(),
                other => san.get(other.strip_prefix("URISanSelectors.")?)?.clone(),
            })
        })?;
        let suffix = path.strip_prefix('/').ok_or("path must have a leading slash")?;
        self.context.trust_domain.agent_id(suffix).map_err(|e| e.to_string())
    }
}

#[async_trait]
impl ServerNodeAttestor for X509PopServer {
    async fn attest(&self, payload: &[u8], challenger: &mut dyn Challenger) -> Result<AttestVerdict, PluginError> {
        let chain = self.parse(payload)?;
        let ders: Vec<&Arc<[u8]>> = chain.iter().map(Certificate::der).collect();
        let leaf = verify_x509_chain(&ders, &self.roots, self.context.clock.now())
            .map_err(|e| PluginError::denied(format!("certificate verification failed: {e}")))?;
        let key = leaf.public_key().map_err(|e| PluginError::internal(format!("unable to generate challenge: {e}")))?;
        prove(&leaf, &key, challenger).await?;
        let common_name = leaf.subject().map(|s| s.parts().common_name.clone()).unwrap_or_default();
        let san = uri_selectors(&leaf, self.context.trust_domain.as_str());
        let agent_id = self
            .agent_id(&leaf, &common_name, &san)
            .map_err(|e| PluginError::internal(format!("failed to make spiffe id: {e}")))?;
        let selectors = selectors(&leaf, &common_name, &self.authorities(&chain), &san);
        Ok(AttestVerdict { agent_id, selectors, can_reattest: true })
    }
}

/// Has the agent prove that it holds the key of its certificate.
async fn prove(leaf: &Certificate, key: &PublicKey, challenger: &mut dyn Challenger) -> Result<(), PluginError> {
    if !leaf.key_usage().is_some_and(|usage| usage.contains(KeyUsage::DIGITAL_SIGNATURE)) {
        let message = "unable to generate challenge: certificate not intended for digital signature use";
        return Err(PluginError::internal(message));
    }
    let challenge = proof::challenge(key);
    let bytes =
        serde_json::to_vec(&challenge).map_err(|e| PluginError::internal("unable to marshal challenge").because(e))?;
    let answer = challenger.challenge(bytes).await?;
    let answer: Answer = serde_json::from_slice(&answer)
        .map_err(|e| PluginError::invalid(format!("unable to unmarshal challenge response: {e}")))?;
    proof::verify(key, &challenge, &answer)
        .map_err(|e| PluginError::denied(format!("challenge response verification failed: {e}")))
}

/// URI SANs of the form `x509pop://<trust domain>/<key>/<value>` become selectors.
fn uri_selectors(leaf: &Certificate, trust_domain: &str) -> BTreeMap<String, String> {
    let prefix = format!("x509pop://{trust_domain}/");
    let mut found = BTreeMap::new();
    for path in leaf.uri_sans().iter().filter_map(|uri| uri.strip_prefix(&prefix)) {
        let path = path.split(['?', '#']).next().unwrap_or_default().trim_matches('/');
        match path.split_once('/') {
            Some((key, value)) => drop(found.insert(key.to_owned(), value.to_owned())),
            None => tracing::warn!(plugin_name = NAME, path, "cannot extract x509pop san selectors from URI SAN"),
        }
    }
    found
}

fn selectors(
    leaf: &Certificate,
    common_name: &str,
    authorities: &[Certificate],
    san: &BTreeMap<String, String>,
) -> Vec<Selector> {
    let mut values = Vec::new();
    if !common_name.is_empty() {
        values.push(format!("subject:cn:{common_name}"));
    }
    values.extend(authorities.iter().map(|ca| format!("ca:fingerprint:{}", sha1_hex(ca.der()))));
    values.push(format!("serialnumber:{}", hex(leaf.serial())));
    values.extend(san.iter().map(|(key, value)| format!("san:{key}:{value}")));
    prefixed_selectors(NAME, values)
}

/// The size of an RSA key's modulus, read from the DER SubjectPublicKeyInfo without taking the key in. `None`: not RSA,
/// or not readable (which parsing the key reports).
fn rsa_bits(spki: &[u8]) -> Option<usize> {
    /// `rsaEncryption`, 1.2.840.113549.1.1.1, as an OBJECT IDENTIFIER
    const RSA_ENCRYPTION: [u8; 11] = [6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1];
    let (content, _) = element(spki, 0x30)?;
    let (algorithm, rest) = element(content, 0x30)?;
    if !algorithm.starts_with(&RSA_ENCRYPTION) {
        return None;
    }
    let (bits, _) = element(rest, 3)?;
    let (key, _) = element(bits.get(1..)?, 0x30)?;
    let (modulus, _) = element(key, 2)?;
    let zeros = modulus.iter().take_while(|b| **b == 0).count();
    let digits = modulus.get(zeros..)?;
    Some(digits.len() * 8 - digits.first()?.leading_zeros() as usize)
}

/// Content of the DER element with this tag, and what follows it.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (length, rest) = match der {
        [t, n @ 0..=0x7f, rest @ ..] if *t == tag => (usize::from(*n), rest),
        [t, 0x81, n, rest @ ..] if *t == tag => (usize::from(*n), rest),
        [t, 0x82, n, m, rest @ ..] if *t == tag => (usize::from(*n) << 8 | usize::from(*m), rest),
        _ => return None,
    };
    Some((rest.get(..length)?, rest.get(length..)?))
}
