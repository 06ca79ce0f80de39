//! Where the bundles of other trust domains come from.

use crate::SpiffeId;

/// How the bundle endpoint of another trust domain proves who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointProfile {
    /// With a certificate that the machine's roots vouch for.
    HttpsWeb,
    /// With an X509-SVID.
    HttpsSpiffe {
        /// Whose.
        endpoint_id: SpiffeId,
    },
}

impl EndpointProfile {
    /// SPIFFE's name of it, which configuration and database have.
    pub fn name(&self) -> &'static str {
        match self {
            Self::HttpsWeb => "https_web",
            Self::HttpsSpiffe { .. } => "https_spiffe",
        }
    }
}
