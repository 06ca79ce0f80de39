//! SVIDs in the form in which proxies take them, encoded once for all streams.

use super::snapshot::WorkloadSvid;
use bytes::Bytes;
use finial_core::{Secret, SpiffeId};
use finial_crypto::{Certificate, pem};
use finial_proto::envoy::core::DataSource;
use finial_proto::envoy::tls::TlsCertificate;

/// As log lines say it.
const SUBSYSTEM: &str = "cache_manager";

/// An SVID as PEM.
#[derive(Debug)]
pub(crate) struct TlsSecret {
    pub(crate) id: SpiffeId,
    /// Chain and key.
    pub(crate) certificate: TlsCertificate,
}

/// Wiped when the last user lets go.
struct Text(Secret<String>);

impl AsRef<[u8]> for Text {
    fn as_ref(&self) -> &[u8] {
        self.0.expose().as_bytes()
    }
}

impl TlsSecret {
    /// `None` for a chain that cannot be read, of which the log tells.
    pub(super) fn new(svid: &WorkloadSvid) -> Option<Self> {
        let chain = match Certificate::parse_chain(&svid.chain) {
            Ok(chain) => chain,
            Err(error) => {
                tracing::error!(subsystem_name = SUBSYSTEM, spiffe_id = %svid.id, %error, "Leaving an X.509-SVID out");
                return None;
            }
        };
        let chain = pem::encode_certificates(chain.iter().map(|one| &one.der()[..]));
        let key = Bytes::from_owner(Text(pem::encode_private_key(&svid.key)));
        let certificate = TlsCertificate {
            certificate_chain: Some(DataSource::inline(chain.into())),
            private_key: Some(DataSource::inline(key)),
        };
        Some(Self { id: svid.id.clone(), certificate })
    }
}
