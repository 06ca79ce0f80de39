//! SVID stores.

use crate::Plugin;
use crate::host::wiped;
use async_trait::async_trait;
use finial_plugin::{PluginError, StoredSvid, SvidStore};
use finial_proto::plugin::svid_store::{
    DeleteX509svidRequest, DeleteX509svidResponse, PutX509svidRequest, PutX509svidResponse, X509svid,
};
use std::time::Duration;

/// How long it may take to store or delete one.
const DEADLINE: Duration = Duration::from_secs(60);

/// An SVID store that is an external plugin.
pub struct ExternalSvidStore(pub Plugin);

#[async_trait]
impl SvidStore for ExternalSvidStore {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn put(&self, svid: &StoredSvid, metadata: &[String]) -> Result<(), PluginError> {
        let request = PutX509svidRequest {
            svid: Some(X509svid {
                spiffe_id: svid.spiffe_id.as_str().to_owned(),
                cert_chain: svid.cert_chain.iter().map(|der| der.to_vec().into()).collect(),
                private_key: wiped(&svid.private_key),
                bundle: svid.bundle.iter().map(|der| der.to_vec().into()).collect(),
                expires_at: svid.expires_at,
            }),
            metadata: metadata.to_vec(),
            federated_bundles: svid
                .federated_bundles
                .iter()
                .map(|(domain, roots)| (domain.clone(), roots.concat().into()))
                .collect(),
        };
        let PutX509svidResponse {} = self.0.call("PutX509SVID", request, DEADLINE).await?;
        Ok(())
    }

    async fn delete(&self, metadata: &[String]) -> Result<(), PluginError> {
        let request = DeleteX509svidRequest { metadata: metadata.to_vec() };
        let DeleteX509svidResponse {} = self.0.call("DeleteX509SVID", request, DEADLINE).await?;
        Ok(())
    }
}
