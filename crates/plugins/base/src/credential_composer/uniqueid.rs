//! `uniqueid`: the subjects of workloads' X.509-SVIDs get an X.500 unique identifier, so that no two IDs share a subject, as
//! RFC 5280 has it.

use async_trait::async_trait;
use finial_core::SpiffeId;
use finial_crypto::{Oid, sha256_hex};
use finial_plugin::{CredentialComposer, Holder, PluginError, X509SvidAttributes};

/// x500UniqueIdentifier
const UNIQUE_ID: &str = "2.5.4.45";
/// Hexadecimal digits of the hash that are taken: 128 bits.
const DIGITS: usize = 32;

/// The `uniqueid` credential composer.
pub struct UniqueId {
    attribute: Oid,
}

impl UniqueId {
    /// The name in configuration.
    pub const NAME: &'static str = "uniqueid";

    /// There is nothing to configure.
    ///
    /// # Errors
    /// None.
    pub fn new() -> Result<Self, PluginError> {
        let attribute = Oid::parse(UNIQUE_ID).map_err(|e| PluginError::internal(e.to_string()))?;
        Ok(Self { attribute })
    }
}

fn value(id: &SpiffeId) -> String {
    let mut hash = sha256_hex(id.as_str().as_bytes());
    hash.truncate(DIGITS);
    hash
}

#[async_trait]
impl CredentialComposer for UniqueId {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn workload_x509_svid(
        &self,
        holder: Holder<'_>,
        mut attributes: X509SvidAttributes,
    ) -> Result<X509SvidAttributes, PluginError> {
        let (names, value) = (&mut attributes.subject.extra_names, value(holder.id));
        match names.iter_mut().find(|(attribute, _)| *attribute == self.attribute) {
            Some(known) => known.1 = value,
            None => names.push((self.attribute.clone(), value)),
        }
        Ok(attributes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::KeyType;
    use finial_crypto::PrivateKey;
    use std::sync::Arc;

    finial_plugin::credential_composer_conformance!(Arc::new(UniqueId::new().unwrap()));

    #[tokio::test]
    async fn the_hash_of_the_id_is_there_once_however_often_it_is_composed() {
        let (composer, key) = (UniqueId::new().unwrap(), PrivateKey::generate(KeyType::EcP256).unwrap());
        let id = SpiffeId::parse("spiffe://example.org/foo").unwrap();
        let holder = Holder { id: &id, public_key: key.public_key() };
        let mut attributes = X509SvidAttributes::default();
        for _ in 0..2 {
            attributes = composer.workload_x509_svid(holder, attributes).await.unwrap();
        }
        // printf spiffe://example.org/foo | sha256sum | cut -c 1-32
        let expected = (Oid::parse("2.5.4.45").unwrap(), "c3406f9b12ceb4f9c948318c579b905b".to_owned());
        assert_eq!(attributes.subject.extra_names, [expected]);
        let agent = composer.agent_x509_svid(holder, X509SvidAttributes::default()).await.unwrap();
        assert_eq!(agent, X509SvidAttributes::default(), "workloads only");
    }
}
