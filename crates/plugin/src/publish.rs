//! Where the bundle goes: notifiers and bundle publishers.

use crate::{HostServices, PluginError};
use async_trait::async_trait;
use finial_config::parse_go_duration;
use finial_core::Bundle;
use finial_crypto::bundle::{BundleFormat as Written, bundle_to_json, readable};
use finial_crypto::pem;
use std::borrow::Cow;
use std::sync::Arc;

/// Hears of the trust domain's bundle. The caller gives each call its deadline.
#[async_trait]
pub trait Notifier: Send + Sync {
    /// Its configured name.
    fn name(&self) -> &str;

    /// Gets hold of the server, which knows the newest bundle: for those who find that another server wrote meanwhile.
    fn use_host(&self, _host: Arc<HostServices>) {}

    /// The server begins, with this bundle. A failure keeps it from starting.
    async fn bundle_loaded(&self, bundle: &Bundle) -> Result<(), PluginError>;

    /// The bundle has changed. A failure is logged.
    async fn bundle_updated(&self, bundle: &Bundle) -> Result<(), PluginError>;

    /// Runs beside the server, once it has begun, for as long as it does: for those who have to do something when no bundle
    /// changes. Does nothing where it ends.
    async fn attend(&self) {}
}

/// Puts the trust domain's bundle where others find it. The caller gives each call its deadline.
#[async_trait]
pub trait BundlePublisher: Send + Sync {
    /// Its configured name.
    fn name(&self) -> &str;

    /// Puts it there. It is asked again and again, also when nothing has changed, so that a failure is made good.
    async fn publish(&self, bundle: &Bundle) -> Result<(), PluginError>;
}

/// The forms in which publishers write a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BundleFormat {
    /// The document of the SPIFFE standard.
    Spiffe,
    /// A plain JWK set of X.509 and JWT authorities.
    Jwks,
    /// X.509 authorities alone.
    Pem,
}

impl BundleFormat {
    /// Reads its name, in any case.
    ///
    /// # Errors
    /// `unknown bundle format: …`
    pub fn parse(name: &str) -> Result<Self, PluginError> {
        match name.to_ascii_lowercase().as_str() {
            "spiffe" => Ok(Self::Spiffe),
            "jwks" => Ok(Self::Jwks),
            "pem" => Ok(Self::Pem),
            _ => Err(PluginError::invalid(format!("unknown bundle format: {name:?}"))),
        }
    }

    /// Writes a bundle, without spaces, as SPIRE's publishers do. WIT authorities are only in the SPIFFE document.
    pub fn write(self, bundle: &Bundle) -> String {
        match self {
            Self::Spiffe => bundle_to_json(bundle, Written { pretty: false, ..Written::SPIFFE }),
            Self::Jwks => {
                bundle_to_json(bundle, Written { wit: false, standard: true, pretty: false, ..Written::SPIFFE })
            }
            Self::Pem => {
                readable(bundle).0.x509_authorities.iter().map(|a| pem::encode("CERTIFICATE", &a.der)).collect()
            }
        }
    }
}

/// How a publisher writes a bundle, by its keys `format` and `refresh_hint`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishedForm {
    format: BundleFormat,
    /// In place of the bundle's own, seconds.
    refresh_hint: Option<i64>,
}

impl PublishedForm {
    /// With the values of `format` and, empty for the bundle's own, `refresh_hint`.
    ///
    /// # Errors
    /// What is wrong with one of them, without the name of its key.
    pub fn read(format: &str, refresh_hint: &str) -> Result<Self, PluginError> {
        let refresh_hint = Some(refresh_hint).filter(|hint| !hint.is_empty()).map(parse_refresh_hint).transpose()?;
        // As in SPIRE: no time at all is the bundle's own.
        Ok(Self { format: BundleFormat::parse(format)?, refresh_hint: refresh_hint.filter(|hint| *hint != 0) })
    }

    /// Writes it.
    pub fn write(self, bundle: &Bundle) -> String {
        let bundle = match self.refresh_hint {
            Some(refresh_hint) => Cow::Owned(Bundle { refresh_hint, ..bundle.clone() }),
            None => Cow::Borrowed(bundle),
        };
        self.format.write(&bundle)
    }
}

/// A refresh hint such as `5m`, in whole seconds.
///
/// # Errors
/// It is not a duration, or negative.
pub fn parse_refresh_hint(hint: &str) -> Result<i64, PluginError> {
    match parse_go_duration(hint) {
        Ok(nanoseconds) if nanoseconds >= 0 => Ok(nanoseconds / 1_000_000_000),
        Ok(_) => Err(PluginError::invalid(format!("could not parse refresh hint {hint:?}: it is negative"))),
        Err(e) => Err(PluginError::invalid(format!("could not parse refresh hint {hint:?}: {e}"))),
    }
}

#[cfg(test)]
#[path = "publish_tests.rs"]
mod tests;
