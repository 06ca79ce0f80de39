//! The agent's half.

use super::{Answer, Bytes, Challenge, NAME, Payload, proof};
use async_trait::async_trait;
use finial_core::ErrorKind;
use finial_crypto::{Certificate, PrivateKey, pem};
use finial_hcl::Value;
use finial_plugin::{AgentNodeAttestor, AttestSession, PluginError, decode};
use serde::Deserialize;

/// Reads certificate and key from files, anew for each attempt, so that a renewed certificate is used without a restart.
pub struct X509PopAgent {
    config: Config,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    private_key_path: String,
    #[serde(default)]
    certificate_path: String,
    #[serde(default)]
    intermediates_path: String,
    #[serde(default)]
    spiffe_endpoint_socket: String,
}

impl X509PopAgent {
    /// Checks the configuration, and that the files it names go together.
    ///
    /// # Errors
    /// Names the key or the file.
    pub fn new(data: &Value) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        if !config.spiffe_endpoint_socket.is_empty() {
            return Err(PluginError::new(ErrorKind::Unimplemented, "spiffe_endpoint_socket is not supported yet"));
        }
        for (key, value) in
            [("private_key_path", &config.private_key_path), ("certificate_path", &config.certificate_path)]
        {
            if value.is_empty() {
                return Err(PluginError::invalid(format!("{key} is required")));
            }
        }
        load(&config)?;
        Ok(Self { config })
    }
}

#[async_trait]
impl AgentNodeAttestor for X509PopAgent {
    async fn begin(&self) -> Result<Box<dyn AttestSession>, PluginError> {
        let (payload, key) = load(&self.config)?;
        Ok(Box::new(Session { payload, key }))
    }
}

struct Session {
    payload: Vec<u8>,
    key: PrivateKey,
}

#[async_trait]
impl AttestSession for Session {
    fn payload(&self) -> &[u8] {
        &self.payload
    }

    async fn respond(&mut self, challenge: &[u8]) -> Result<Vec<u8>, PluginError> {
        let challenge: Challenge = serde_json::from_slice(challenge)
            .map_err(|e| PluginError::internal(format!("unable to unmarshal challenge: {e}")))?;
        let answer: Answer = proof::answer(&self.key, &challenge)
            .map_err(|e| PluginError::internal(format!("failed to calculate challenge response: {e}")))?;
        serde_json::to_vec(&answer)
            .map_err(|e| PluginError::internal("unable to marshal challenge response").because(e))
    }
}

/// The payload, and the key that goes with its first certificate.
fn load(config: &Config) -> Result<(Vec<u8>, PrivateKey), PluginError> {
    let read = |path: &str| std::fs::read(path).map_err(|e| format!("{path}: {e}"));
    let pair = || -> Result<_, String> {
        let chain = read(&config.certificate_path)?;
        let chain = pem::certificates(&chain).map_err(|e| format!("{}: {e}", config.certificate_path))?;
        let key = finial_core::Secret::new(read(&config.private_key_path)?);
        let key = pem::private_key(key.expose()).map_err(|e| format!("{}: {e}", config.private_key_path))?;
        let leaf = chain.first().cloned().ok_or("no certificate")?;
        let leaf = Certificate::parse(leaf).map_err(|e| format!("{}: {e}", config.certificate_path))?;
        let public = leaf.public_key().map_err(|e| format!("{}: {e}", config.certificate_path))?;
        if public != *finial_crypto::Signer::public_key(&key) {
            return Err("private key does not match public key".to_owned());
        }
        Ok((chain, key))
    };
    let (mut chain, key) = pair().map_err(|e| PluginError::invalid(format!("unable to load keypair: {e}")))?;
    let intermediates_path = config.intermediates_path.trim();
    if !intermediates_path.is_empty() {
        let failed = |e: String| PluginError::invalid(format!("unable to load intermediate certificates: {e}"));
        let text = read(intermediates_path).map_err(failed)?;
        let more = pem::certificates(&text).map_err(|e| failed(format!("{intermediates_path}: {e}")))?;
        chain.extend(more);
    }
    let certificates = Some(chain.iter().map(|der| Bytes(der.to_vec())).collect());
    let payload = serde_json::to_vec(&Payload { certificates })
        .map_err(|e| PluginError::internal(format!("unable to marshal attestation data for {NAME}")).because(e))?;
    Ok((payload, key))
}
