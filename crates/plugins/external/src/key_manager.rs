//! Key managers.

use crate::Plugin;
use async_trait::async_trait;
use aws_lc_rs::digest::{self, digest};
use finial_core::{ErrorKind, KeyType};
use finial_crypto::{PublicKey, SignError, SignatureAlgorithm, Signer};
use finial_plugin::{KeyManager, PluginError};
use finial_proto::plugin::key_manager as wire;
use finial_proto::plugin::key_manager::sign_data_request::{PssOptions, SignerOpts};
use std::sync::Arc;
use std::time::Duration;

/// SPIRE's deadline for each call.
const DEADLINE: Duration = Duration::from_secs(30);
/// As long as the hash: `rsa.PSSSaltLengthEqualsHash`.
const SALT_AS_HASH: i32 = -1;

/// A key manager that is an external plugin. Its keys stay with it; a name holds one key, so that signers of a replaced key
/// fail.
pub struct ExternalKeyManager(pub Plugin);

impl ExternalKeyManager {
    fn signer(&self, id: &str, key: Option<wire::PublicKey>) -> Result<Arc<dyn Signer>, PluginError> {
        let Some(key) = key else {
            return Err(PluginError::internal(format!("plugin response empty for key {id:?}")));
        };
        if key.id != id {
            let message = format!("plugin response has unexpected key id {:?} for key {id:?}", key.id);
            return Err(PluginError::internal(message));
        }
        let public = PublicKey::from_spki(&key.pkix_data).map_err(|e| {
            PluginError::internal(format!("unable to parse public key PKIX data for key {id:?}: {e}")).because(e)
        })?;
        Ok(Arc::new(RemoteKey { plugin: self.0.clone(), id: id.to_owned(), fingerprint: key.fingerprint, public }))
    }
}

#[async_trait]
impl KeyManager for ExternalKeyManager {
    async fn generate_key(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, PluginError> {
        let wire_type = match key_type {
            KeyType::EcP256 => wire::KeyType::EcP256,
            KeyType::EcP384 => wire::KeyType::EcP384,
            KeyType::Rsa2048 => wire::KeyType::Rsa2048,
            KeyType::Rsa4096 => wire::KeyType::Rsa4096,
        };
        let request = wire::GenerateKeyRequest { key_id: id.to_owned(), key_type: wire_type.into() };
        let wire::GenerateKeyResponse { public_key } = self.0.call("GenerateKey", request, DEADLINE).await?;
        let signer = self.signer(id, public_key)?;
        if signer.public_key().key_type() != Some(key_type) {
            let message = format!("the plugin made another type of key for {id:?} than was asked for");
            return Err(PluginError::internal(message));
        }
        Ok(signer)
    }

    async fn key(&self, id: &str) -> Result<Option<Arc<dyn Signer>>, PluginError> {
        let request = wire::GetPublicKeyRequest { key_id: id.to_owned() };
        match self.0.call("GetPublicKey", request, DEADLINE).await {
            Ok(wire::GetPublicKeyResponse { public_key: None }) => Ok(None),
            Ok(wire::GetPublicKeyResponse { public_key }) => self.signer(id, public_key).map(Some),
            Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn keys(&self) -> Result<Vec<(String, Arc<dyn Signer>)>, PluginError> {
        let request = wire::GetPublicKeysRequest {};
        let wire::GetPublicKeysResponse { public_keys } = self.0.call("GetPublicKeys", request, DEADLINE).await?;
        let named = |key: wire::PublicKey| Ok((key.id.clone(), self.signer(&key.id.clone(), Some(key))?));
        let mut keys = public_keys.into_iter().map(named).collect::<Result<Vec<_>, PluginError>>()?;
        keys.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(keys)
    }
}

/// A key of the plugin.
struct RemoteKey {
    plugin: Plugin,
    id: String,
    fingerprint: String,
    public: PublicKey,
}

#[async_trait]
impl Signer for RemoteKey {
    fn public_key(&self) -> &PublicKey {
        &self.public
    }

    async fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError> {
        use SignatureAlgorithm as A;
        if !self.public.supports(algorithm) {
            return Err(SignError::WrongAlgorithm(algorithm.jwa()));
        }
        let (hash, hash_name) = match algorithm {
            A::EcdsaP256Sha256 | A::RsaPkcs1Sha256 | A::RsaPssSha256 => (&digest::SHA256, wire::HashAlgorithm::Sha256),
            A::EcdsaP384Sha384 | A::RsaPkcs1Sha384 | A::RsaPssSha384 => (&digest::SHA384, wire::HashAlgorithm::Sha384),
            A::EcdsaP521Sha512 | A::RsaPkcs1Sha512 | A::RsaPssSha512 => (&digest::SHA512, wire::HashAlgorithm::Sha512),
        };
        let options = match algorithm {
            A::RsaPssSha256 | A::RsaPssSha384 | A::RsaPssSha512 => {
                SignerOpts::PssOptions(PssOptions { salt_length: SALT_AS_HASH, hash_algorithm: hash_name.into() })
            }
            _ => SignerOpts::HashAlgorithm(hash_name.into()),
        };
        let request = wire::SignDataRequest {
            key_id: self.id.clone(),
            data: digest(hash, message).as_ref().to_vec().into(),
            signer_opts: Some(options),
        };
        let remote = |error: PluginError| SignError::Remote(Box::new(error));
        let signed: wire::SignDataResponse = self.plugin.call("SignData", request, DEADLINE).await.map_err(remote)?;
        if signed.signature.is_empty() {
            return Err(remote(PluginError::internal("plugin returned empty signature data")));
        }
        if signed.key_fingerprint != self.fingerprint {
            let message = format!(
                "fingerprint {:?} on key {:?} does not match {:?}",
                self.fingerprint, self.id, signed.key_fingerprint
            );
            return Err(remote(PluginError::internal(message)));
        }
        Ok(signed.signature.into())
    }
}
