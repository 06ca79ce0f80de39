//! Why an agent ends, and what a server's refusal means for it.

use finial_core::ErrorKind;
use finial_crypto::VerifyError;
use finial_proto::convert;
use finial_proto::types::permission_denied_details::Reason;
use std::error::Error;
use tonic::{Code, Status};

/// Why an agent could not start or go on. The text is what SPIRE's agent says.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct AgentError {
    kind: ErrorKind,
    message: String,
    #[source]
    cause: Option<Box<dyn Error + Send + Sync>>,
}

impl AgentError {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), cause: None }
    }

    /// Our own fault, or that of the machine.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    pub(crate) fn because(mut self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl From<crate::storage::StorageError> for AgentError {
    fn from(error: crate::storage::StorageError) -> Self {
        Self::internal(error.to_string()).because(error)
    }
}

impl From<finial_plugin::PluginError> for AgentError {
    fn from(error: finial_plugin::PluginError) -> Self {
        Self::new(error.kind, error.message.clone()).because(error)
    }
}

impl From<ServerError> for AgentError {
    fn from(error: ServerError) -> Self {
        Self::new(convert::kind_of(error.status.code()), error.to_string()).because(error)
    }
}

/// What a failed call to the server means for the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Try again later.
    Retry,
    /// The server does not know this agent's SVID: attest again, or drop it and end.
    Reattest,
    /// The agent is banned: drop the SVID and end.
    Banned,
    /// The server is not signed by an authority of our bundle.
    UnknownAuthority,
}

/// A failed call to the server.
#[derive(Debug)]
pub(crate) struct ServerError {
    what: &'static str,
    pub(crate) status: Status,
}

impl ServerError {
    pub(crate) fn new(what: &'static str, status: Status) -> Self {
        Self { what, status }
    }

    /// An answer that makes no sense; the text says all.
    pub(crate) fn bare(status: Status) -> Self {
        Self { what: "", status }
    }

    /// The server says that the agent's SVID has expired.
    pub(crate) fn is_expired(&self) -> bool {
        self.status.code() == Code::PermissionDenied
            && convert::permission_denied_reason(&self.status) == Some(Reason::AgentExpired)
    }

    /// No server answered, neither well nor badly: the connection ended, or none came about. What can be asked twice can be asked
    /// again.
    pub(crate) fn was_lost(&self) -> bool {
        matches!(self.status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
            && self.status.source().is_some()
            && tls_error(&self.status).is_none()
    }

    pub(crate) fn verdict(&self) -> Verdict {
        if is_unknown_authority(&self.status) {
            return Verdict::UnknownAuthority;
        }
        if self.status.code() != Code::PermissionDenied {
            return Verdict::Retry;
        }
        match convert::permission_denied_reason(&self.status) {
            Some(Reason::AgentBanned) => Verdict::Banned,
            Some(
                Reason::AgentExpired | Reason::AgentNotActive | Reason::AgentNotAttested | Reason::AgentMustReattest,
            ) => Verdict::Reattest,
            _ => Verdict::Retry,
        }
    }
}

/// The handshake that failed, if it is that. An io::Error's source is that of the error inside it.
fn tls_error(status: &Status) -> Option<&rustls::Error> {
    let mut next: Option<&(dyn Error + 'static)> = status.source();
    while let Some(error) = next {
        let inside = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls = error.downcast_ref().or_else(|| inside.and_then(|e| e.downcast_ref()));
        if tls.is_some() {
            return tls;
        }
        next = error.source();
    }
    None
}

fn is_unexpected_id(error: &rustls::Error) -> bool {
    let rustls::Error::InvalidCertificate(rustls::CertificateError::Other(cause)) = error else { return false };
    matches!(cause.0.downcast_ref(), Some(VerifyError::UnexpectedId { .. }))
}

/// A server of another trust domain: the operator's mistake, on this side.
const UNEXPECTED_ID_HINT: &str = "; check trust_domain and server_address in the agent's configuration";

/// The bundle of another domain or another day, most often.
const UNKNOWN_AUTHORITY_HINT: &str = "; the trust bundle that this agent has (by trust_bundle_path or trust_bundle_url at first, in \
     data_dir later) is not that server's, or older than its authorities: compare it with `spire-server bundle show`";

/// As grpc-go words it.
impl std::fmt::Display for ServerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.what.is_empty() {
            return f.write_str(self.status.message());
        }
        write!(f, "{}: rpc error: code = {:?} desc = ", self.what, self.status.code())?;
        if is_unknown_authority(&self.status) {
            f.write_str(concat!(
                "connection error: desc = \"transport: authentication handshake failed: x509svid: ",
                "could not verify leaf certificate: x509: certificate signed by unknown authority\""
            ))?;
            return f.write_str(UNKNOWN_AUTHORITY_HINT);
        }
        if let Some(tls) = tls_error(&self.status) {
            let reason = finial_crypto::tls::explain(tls);
            write!(f, "connection error: desc = \"transport: authentication handshake failed: {reason}\"")?;
            return f.write_str(if is_unexpected_id(tls) { UNEXPECTED_ID_HINT } else { "" });
        }
        match innermost(&self.status) {
            // tonic's own words for a failed connection do not say why.
            Some(cause) if self.status.code() == Code::Unavailable => {
                write!(f, "connection error: desc = \"transport: {cause}\"")
            }
            _ => f.write_str(self.status.message()),
        }
    }
}

/// The first cause, if the failure came from below the call.
fn innermost(status: &Status) -> Option<&dyn Error> {
    let mut cause: Option<&dyn Error> = status.source();
    let mut last = None;
    while let Some(error) = cause {
        last = Some(error);
        cause = error.source();
    }
    last
}

impl Error for ServerError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.status)
    }
}

/// Whether a call failed because the peer's certificate leads to no root of ours.
fn is_unknown_authority(status: &Status) -> bool {
    let mut next: Option<&(dyn Error + 'static)> = status.source();
    while let Some(error) = next {
        if blames_authority(error) {
            return true;
        }
        next = error.source();
    }
    false
}

fn blames_authority(error: &(dyn Error + 'static)) -> bool {
    if let Some(VerifyError::UnknownAuthority) = error.downcast_ref() {
        return true;
    }
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return match tls {
            rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer) => true,
            rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => {
                blames_authority(other.0.as_ref())
            }
            rustls::Error::Other(other) => blames_authority(other.0.as_ref()),
            _ => false,
        };
    }
    // An io::Error's source is that of the error inside it, not the error itself.
    let inside = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    inside.is_some_and(|e| blames_authority(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn denied(reason: Reason) -> ServerError {
        ServerError::new("failed to fetch bundle", convert::permission_denied("no", reason))
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        assert_eq!(denied(Reason::AgentBanned).verdict(), Verdict::Banned);
        assert_eq!(denied(Reason::AgentExpired).verdict(), Verdict::Reattest);
        assert_eq!(denied(Reason::AgentNotActive).verdict(), Verdict::Reattest);
        assert_eq!(denied(Reason::AgentNotAttested).verdict(), Verdict::Reattest);
        assert_eq!(denied(Reason::AgentMustReattest).verdict(), Verdict::Reattest);
        assert_eq!(denied(Reason::Unknown).verdict(), Verdict::Retry);
        assert_eq!(ServerError::new("x", Status::permission_denied("plain")).verdict(), Verdict::Retry);
        assert_eq!(
            denied(Reason::Unknown).to_string(),
            "failed to fetch bundle: rpc error: code = PermissionDenied desc = no"
        );
    }

    #[test]
    fn an_unknown_authority_is_found_below_layers_of_errors() {
        let other = rustls::OtherError(Arc::new(VerifyError::UnknownAuthority));
        let tls = rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other));
        let io = std::io::Error::new(std::io::ErrorKind::InvalidData, tls);
        let error = ServerError::new("x", Status::from_error(Box::new(io)));
        assert_eq!(error.verdict(), Verdict::UnknownAuthority);
        let said = error.to_string();
        assert!(
            said.contains("unknown authority\"; the trust bundle") && said.contains("`spire-server bundle show`"),
            "{said}"
        );
        let io = std::io::Error::new(std::io::ErrorKind::InvalidData, rustls::Error::DecryptError);
        assert_eq!(ServerError::new("x", Status::from_error(Box::new(io))).verdict(), Verdict::Retry);
    }

    #[test]
    fn a_server_of_another_trust_domain_is_named_with_what_was_expected() {
        let (got, expected) = ("spiffe://example.org/spire/server".into(), "spiffe://other.org/spire/server".into());
        let other = rustls::OtherError(Arc::new(VerifyError::UnexpectedId { got, expected }));
        let tls = rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other));
        let io = std::io::Error::new(std::io::ErrorKind::InvalidData, tls);
        let mut status = Status::unavailable("tcp connect error");
        status.set_source(Arc::new(io));
        let text = ServerError::new("x", status).to_string();
        let want = concat!(
            "x: rpc error: code = Unavailable desc = connection error: desc = \"transport: authentication handshake failed: ",
            "unexpected ID \"spiffe://example.org/spire/server\", expected \"spiffe://other.org/spire/server\"\"; ",
            "check trust_domain and server_address in the agent's configuration"
        );
        assert_eq!(text, want);
    }
}
