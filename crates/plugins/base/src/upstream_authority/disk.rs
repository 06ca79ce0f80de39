//! `disk`: an upstream CA whose certificate and key are files. They are read again at each signature, so that they can be
//! replaced while the server runs; what was read last serves on while they cannot be read.

use async_trait::async_trait;
use finial_crypto::pem;
use finial_hcl::Value;
use finial_plugin::{MintedX509Ca, PluginContext, PluginError, SigningCa, UpstreamAuthority, check_ca_csr, decode};
use finial_runtime::files;
use serde::Deserialize;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Largest file that is read, in bytes.
const FILE_BYTES_MAX: usize = 1 << 20;

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Config {
    cert_file_path: String,
    key_file_path: String,
    bundle_file_path: String,
}

/// The `disk` upstream authority.
pub struct Disk {
    config: Config,
    context: PluginContext,
    last: Mutex<Arc<SigningCa>>,
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    files::read_limited(Path::new(path), FILE_BYTES_MAX)
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

/// What the files hold, verified.
fn signing_ca(config: &Config, context: &PluginContext) -> Result<SigningCa, PluginError> {
    let key = load("key", &config.key_file_path, pem::private_key)?;
    let certificates = load("cert", &config.cert_file_path, pem::certificates)?;
    let bundle = Some(&config.bundle_file_path).filter(|path| !path.is_empty());
    let roots = bundle.map(|path| load("bundle", path, pem::certificates)).transpose()?;
    let around = (&context.trust_domain, context.clock.now());
    SigningCa::new(key, certificates, roots, "bundle_file_path", around).map_err(|e| {
        let Config { cert_file_path: cert, key_file_path: key, bundle_file_path: bundle } = config;
        let files = if bundle.is_empty() { format!("{cert}, {key}") } else { format!("{cert}, {key}, {bundle}") };
        PluginError { message: format!("{} ({files})", e.message), ..e }
    })
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
        let last = Mutex::new(Arc::new(signing_ca(&config, context)?));
        Ok(Self { config, context: context.clone(), last })
    }

    fn ca(&self) -> Arc<SigningCa> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match signing_ca(&self.config, &self.context) {
            Ok(ca) => *last = Arc::new(ca),
            Err(error) => tracing::warn!(%error, "Upstream CA could not be read again; the one read last is used"),
        }
        last.clone()
    }
}

#[async_trait]
impl UpstreamAuthority for Disk {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        let csr = check_ca_csr(csr, &self.context.trust_domain)?;
        self.ca().mint(&csr, ttl_seconds, (&self.context.trust_domain, self.context.clock.now())).await
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
