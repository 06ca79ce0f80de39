//! Certificates of the web from an ACME authority (RFC 8555), by the challenge `tls-alpn-01` (RFC 8737): the endpoint that needs the
//! certificate answers the challenge itself, on its own port.
//!
//! `keeper` decides when to ask; `order` asks; `kept` remembers on disk; `identity` is what TLS presents to whom.

mod error;
mod http;
mod identity;
mod keeper;
mod kept;
mod order;

pub use error::AcmeError;
pub use identity::AcmeIdentity;
pub use keeper::start;

use async_trait::async_trait;
use finial_crypto::PrivateKey;
use std::path::PathBuf;

/// The authority that is asked where none is named: Let's Encrypt.
const DIRECTORY_DEFAULT: &str = "https://acme-v02.api.letsencrypt.org/directory";

/// What to get, and from whom.
#[derive(Clone, Debug)]
pub struct AcmeSettings {
    /// The authority; empty: Let's Encrypt.
    pub directory_url: String,
    /// Whom the authority may write to.
    pub email: String,
    /// Whether its terms of service are accepted.
    pub tos_accepted: bool,
    /// The names; each gets a certificate of its own.
    pub domains: Vec<String>,
    /// Where account key, certificates and keys are kept; `None`: nowhere.
    pub cache_dir: Option<PathBuf>,
    /// Who speaks in the log.
    pub subsystem: &'static str,
}

/// Keeps private keys somewhere else than in the folder: a server's key manager.
#[async_trait]
pub trait KeyStore: Send + Sync {
    /// The key of that name.
    async fn key(&self, name: &str) -> Result<Option<PrivateKey>, String>;

    /// Makes a key of that name, for ECDSA with P-256.
    async fn generate(&self, name: &str) -> Result<PrivateKey, String>;
}

/// Whether an authority of the web could certify that name: a DNS name in ASCII of two labels or more, and no address.
pub fn is_public_name(domain: &str) -> bool {
    let label = |l: &str| {
        let good = l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        !l.is_empty() && l.len() <= 63 && good && !l.starts_with('-') && !l.ends_with('-')
    };
    let last = domain.rsplit('.').next().unwrap_or_default();
    domain.len() <= 253
        && domain.contains('.')
        && domain.split('.').all(label)
        && last.bytes().any(|b| b.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_the_web_are_asked_for() {
        for good in ["a.test", "x-1.example.org", "1.2.3.a", "xn--bcher-kva.example"] {
            assert!(is_public_name(good), "{good}");
        }
        for bad in [
            "",
            "localhost",
            ".",
            "a.",
            ".a",
            "a..b",
            "1.2.3.4",
            "[::1]",
            "a.test:1",
            "../a.b",
            "a/b.c",
            "-a.b",
            "ü.de",
            "*.a.b",
        ] {
            assert!(!is_public_name(bad), "{bad}");
        }
    }
}
