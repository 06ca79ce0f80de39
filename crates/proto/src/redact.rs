//! `Debug` for messages that carry secrets: who it is about, never the secret.

use crate::{agent, broker, envoy, plugin, server, types, workload};
use std::fmt;

macro_rules! redacted {
    ($($message:ty => $name:literal { $($field:ident),* };)*) => {$(
        impl fmt::Debug for $message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct($name)$(.field(stringify!($field), &self.$field))*.finish_non_exhaustive()
            }
        }
    )*};
}

redacted! {
    workload::X509svid => "X509SVID" { spiffe_id, hint };
    workload::Jwtsvid => "JWTSVID" { spiffe_id, hint };
    workload::Witsvid => "WITSVID" { spiffe_id, hint };
    workload::ValidateJwtsvidRequest => "ValidateJWTSVIDRequest" { audience };
    types::Jwtsvid => "JWTSVID" { id, expires_at, issued_at, hint };
    types::Witsvid => "WITSVID" { id, expires_at, issued_at, hint };
    types::JoinToken => "JoinToken" { expires_at };
    types::AttestationData => "AttestationData" { r#type };
    server::agent::CreateJoinTokenRequest => "CreateJoinTokenRequest" { ttl, agent_id };
    broker::X509svid => "X509SVID" { spiffe_id, hint };
    broker::Jwtsvid => "JWTSVID" { spiffe_id, hint };
    agent::delegatedidentity::X509svidWithKey => "X509SVIDWithKey" { x509_svid };
    envoy::tls::TlsCertificate => "TlsCertificate" { certificate_chain };
    plugin::svid_store::X509svid => "X509SVID" { spiffe_id, expires_at };
    plugin::host_identity_provider::X509Identity => "X509Identity" {};
}
