//! Credential composers: who has a say in what credentials say.

use crate::PluginError;
use async_trait::async_trait;
use finial_core::SpiffeId;
use finial_crypto::{Extension, NameParts, Oid, PublicKey};
use serde_json::{Map, Value};

/// What a composer may change of an X.509 authority.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct X509CaAttributes {
    /// The subject.
    pub subject: NameParts,
    /// Certificate policies.
    pub policies: Vec<Oid>,
    /// Further extensions. One takes the place of what would be there with its identifier.
    pub extra_extensions: Vec<Extension>,
}

/// What a composer may change of an X.509-SVID.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct X509SvidAttributes {
    /// The subject.
    pub subject: NameParts,
    /// DNS SANs.
    pub dns_names: Vec<String>,
    /// Further extensions, as of an authority.
    pub extra_extensions: Vec<Extension>,
}

/// Whose X.509-SVID it is to be.
#[derive(Clone, Copy, Debug)]
pub struct Holder<'a> {
    /// The ID.
    pub id: &'a SpiffeId,
    /// The key that is certified.
    pub public_key: &'a PublicKey,
}

/// Has a say in credentials before they are signed; several follow each other in the order of the configuration. What comes
/// out is checked by the caller, so that a composer can spoil a credential but not make it another's. Where it has nothing
/// to say it returns what it was given, which each method does by itself. The caller gives each call its deadline.
#[async_trait]
pub trait CredentialComposer: Send + Sync {
    /// Its configured name.
    fn name(&self) -> &str;

    /// An authority of this server's, or of one below it.
    async fn server_x509_ca(&self, attributes: X509CaAttributes) -> Result<X509CaAttributes, PluginError> {
        Ok(attributes)
    }

    /// The server's own SVID.
    async fn server_x509_svid(&self, attributes: X509SvidAttributes) -> Result<X509SvidAttributes, PluginError> {
        Ok(attributes)
    }

    /// The SVID of an agent.
    async fn agent_x509_svid(
        &self,
        _holder: Holder<'_>,
        attributes: X509SvidAttributes,
    ) -> Result<X509SvidAttributes, PluginError> {
        Ok(attributes)
    }

    /// The SVID of a workload.
    async fn workload_x509_svid(
        &self,
        _holder: Holder<'_>,
        attributes: X509SvidAttributes,
    ) -> Result<X509SvidAttributes, PluginError> {
        Ok(attributes)
    }

    /// The claims of a workload's JWT-SVID.
    async fn workload_jwt_svid(
        &self,
        _id: &SpiffeId,
        claims: Map<String, Value>,
    ) -> Result<Map<String, Value>, PluginError> {
        Ok(claims)
    }
}
