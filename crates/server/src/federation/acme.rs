//! The bundle endpoint's certificate from an ACME authority: what SPIRE keeps in the key manager is there.

use async_trait::async_trait;
use finial_acme::{AcmeSettings, KeyStore};
use finial_config::BundleEndpointAcme;
use finial_core::KeyType;
use finial_crypto::{PrivateKey, Signer};
use finial_plugin::KeyManager;
use std::sync::Arc;

/// Before the names of its keys.
const KEY_PREFIX: &str = "bundle-acme-";

pub(super) fn acme_settings(settings: &BundleEndpointAcme) -> AcmeSettings {
    AcmeSettings {
        directory_url: settings.directory_url.clone(),
        email: settings.email.clone(),
        tos_accepted: settings.tos_accepted,
        domains: vec![settings.domain_name.clone()],
        cache_dir: Some(settings.cache_dir.clone()),
        subsystem: "bundle_acme",
    }
}

/// The keys of a key manager that has them in this process's memory.
pub(super) struct AcmeKeys(Arc<dyn KeyManager>);

impl AcmeKeys {
    /// `None` where keys sign elsewhere: each handshake would wait for that, and whoever connects could keep it busy. Then the
    /// key lies beside its certificate.
    pub(super) async fn of(keys: &Arc<dyn KeyManager>) -> Option<Arc<dyn KeyStore>> {
        let all = keys.keys().await.ok()?;
        let here = all.iter().all(|(_, signer)| signer.local().is_some());
        here.then(|| Arc::new(Self(keys.clone())) as Arc<dyn KeyStore>)
    }
}

#[async_trait]
impl KeyStore for AcmeKeys {
    async fn key(&self, name: &str) -> Result<Option<PrivateKey>, String> {
        let key = self.0.key(&format!("{KEY_PREFIX}{name}")).await.map_err(|e| e.to_string())?;
        key.map(|signer| local(&*signer)).transpose()
    }

    async fn generate(&self, name: &str) -> Result<PrivateKey, String> {
        let made = self.0.generate_key(&format!("{KEY_PREFIX}{name}"), KeyType::EcP256).await;
        local(&*made.map_err(|e| e.to_string())?)
    }
}

fn local(signer: &dyn Signer) -> Result<PrivateKey, String> {
    signer.local().cloned().ok_or_else(|| "the key manager does not hold it in memory".into())
}
