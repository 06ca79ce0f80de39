//! `disk`: an upstream CA whose certificate and key are files. They are read again at each signature, so that they can be
//! replaced while the server runs; what was read last serves on while they cannot be read.

use async_trait::async_trait;
use finial_core::{Clock, TrustDomain, UnixSeconds};
use finial_crypto::{
    CaTemplate, Csr, DistinguishedName, SerialNumber, Signer, SvidTemplate, TrustRoots, X509Ca, pem, verify_x509_chain,
};
use finial_hcl::Value;
use finial_plugin::{MintedX509Ca, PluginContext, PluginError, UpstreamAuthority, decode};
use serde::Deserialize;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Certificates are valid from this long before they are signed, for verifiers whose clocks run late.
const BACKDATE_SECONDS: i64 = 10;
/// The lifetime of what is signed when the server has no preference.
const DEFAULT_TTL_SECONDS: i64 = 3600;
/// Largest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Config {
    cert_file_path: String,
    key_file_path: String,
    bundle_file_path: String,
}

/// What the files hold, verified.
struct Files {
    ca: X509Ca,
    /// What follows a certificate that the CA signs: nothing when the CA is a root.
    chain: Vec<Arc<[u8]>>,
    roots: Vec<Arc<[u8]>>,
}

/// The `disk` upstream authority.
pub struct Disk {
    config: Config,
    trust_domain: TrustDomain,
    clock: Arc<dyn Clock>,
    last: Mutex<Arc<Files>>,
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(Path::new(path))?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("larger than {FILE_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

fn load<T, E: std::fmt::Display>(
    what: &str,
    path: &str,
    parse: impl FnOnce(&[u8]) -> Result<T, E>,
) -> Result<T, PluginError> {
    let failed =
        |e: &dyn std::fmt::Display| PluginError::invalid(format!("unable to load upstream CA {what}: {path}: {e}"));
    let bytes = read(path).map_err(|e| failed(&e))?;
    parse(&bytes).map_err(|e| failed(&e))
}

impl Files {
    fn load(config: &Config, trust_domain: &TrustDomain, now: UnixSeconds) -> Result<Self, PluginError> {
        let key = load("key", &config.key_file_path, pem::private_key)?;
        let certificates = load("cert", &config.cert_file_path, pem::certificates)?;
        let Some(own) = certificates.first().cloned() else {
            return Err(PluginError::invalid("unable to load upstream CA cert: no certificate found"));
        };
        let (chain, roots) = if config.bundle_file_path.is_empty() {
            if certificates.len() != 1 {
                let message = "with no bundle_file_path configured only self-signed CAs are supported";
                return Err(PluginError::invalid(message));
            }
            (Vec::new(), certificates)
        } else {
            (certificates, load("bundle", &config.bundle_file_path, pem::certificates)?)
        };
        let ca = X509Ca::new(Arc::new(key) as Arc<dyn Signer>, own, chain.clone()).map_err(|e| match e {
            finial_crypto::IssueError::KeyMismatch => {
                PluginError::invalid("unable to load upstream CA: certificate and private key do not match")
            }
            e => PluginError::invalid(format!("unable to load upstream CA: {e}")),
        })?;
        if !verifies(&ca, trust_domain, &roots, now) {
            let message = "unable to load upstream CA: certificate cannot be validated with the provided bundle or is not \
                           self-signed";
            return Err(PluginError::invalid(message));
        }
        Ok(Self { ca, chain, roots })
    }
}

/// Whether what the CA signs now hangs from one of the roots. A certificate without a bundle is its own root, also, as in
/// SPIRE, when it is not self-signed.
fn verifies(ca: &X509Ca, trust_domain: &TrustDomain, roots: &[Arc<[u8]>], now: UnixSeconds) -> bool {
    let trial = SvidTemplate {
        id: &trust_domain.server_id(),
        public_key: ca.signer().public_key(),
        subject: &DistinguishedName::svid_default(),
        dns_names: &[],
        not_before: now,
        not_after: now.saturating_add(1),
        serial: SerialNumber::new(1),
    };
    let Some(Ok(leaf)) = ca.issue_svid_now(&trial) else { return false };
    TrustRoots::new(roots).is_ok_and(|roots| verify_x509_chain(&ca.chain_of(leaf), &roots, now).is_ok())
}

impl Disk {
    /// The name in configuration.
    pub const NAME: &'static str = "disk";

    /// Reads the files once, so that a wrong path ends the start and not the first rotation.
    ///
    /// # Errors
    /// When the configuration is incomplete, or certificate, key and bundle cannot be read or do not belong together.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        if config.cert_file_path.is_empty() || config.key_file_path.is_empty() {
            return Err(PluginError::invalid("'cert_file_path' and 'key_file_path' must be set and not empty"));
        }
        let last = Mutex::new(Arc::new(Files::load(&config, &context.trust_domain, context.clock.now())?));
        Ok(Self { config, trust_domain: context.trust_domain.clone(), clock: context.clock.clone(), last })
    }

    fn files(&self) -> Arc<Files> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match Files::load(&self.config, &self.trust_domain, self.clock.now()) {
            Ok(files) => *last = Arc::new(files),
            Err(error) => tracing::warn!(%error, "Upstream CA could not be read again; the one read last is used"),
        }
        last.clone()
    }

    /// The key of a request that names the trust domain and proves that its sender has the key.
    fn check(&self, csr: &[u8]) -> Result<Csr, String> {
        let csr = Csr::parse(csr).map_err(|e| format!("unable to parse CSR: {e}"))?;
        csr.verify_proof_of_possession().map_err(|e| format!("CSR signature check failed: {e}"))?;
        match csr.uri_sans() {
            [uri] if **uri == *self.trust_domain.id_string() => Ok(csr),
            [uri] => Err(format!(
                "CSR with SPIFFE ID {uri:?} is invalid: must use the trust domain ID for trust domain {:?}",
                self.trust_domain.as_str()
            )),
            _ => Err("CSR must have exactly one URI SAN".into()),
        }
    }
}

#[async_trait]
impl UpstreamAuthority for Disk {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        let unable = |why: &dyn std::fmt::Display| PluginError::internal(format!("unable to sign CSR: {why}"));
        let csr = self.check(csr).map_err(|e| unable(&e))?;
        let subject = csr.subject().map_err(|e| unable(&e))?;
        let files = self.files();
        let now = self.clock.now();
        let ttl_seconds = if ttl_seconds > 0 { ttl_seconds } else { DEFAULT_TTL_SECONDS };
        let template = CaTemplate {
            subject: &subject,
            trust_domain: &self.trust_domain,
            not_before: now - BACKDATE_SECONDS,
            not_after: now.saturating_add(ttl_seconds),
            serial: SerialNumber::random(),
        };
        let certificate = files.ca.issue_ca(csr.public_key(), &template).await.map_err(|e| unable(&e))?;
        let chain = std::iter::once(certificate).chain(files.chain.iter().cloned()).collect();
        Ok(MintedX509Ca { chain, roots: files.roots.clone() })
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
