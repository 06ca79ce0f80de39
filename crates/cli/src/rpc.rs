//! gRPC for commands: a channel to a Unix socket, and errors in the words of grpc-go, which SPIRE's commands print.

use crate::context::errno_text;
use hyper_util::rt::TokioIo;
use std::path::Path;
use std::sync::Arc;
use tonic::transport::{Channel, Endpoint};

/// A failed dial, kept through tonic's layers so that its words reach the person.
#[derive(Clone, Debug, thiserror::Error)]
#[error("transport: Error while dialing: dial unix {socket}: connect: {reason}")]
struct DialError {
    socket: String,
    reason: String,
}

/// For the refusal that everybody meets first.
const NO_IDENTITY_HINT: &str = "no entry fits this process, or the agent does not have it yet (it asks every 5 s by default). \
     `spire-server entry show` lists the entries: the parent must be this agent or an alias of it, and all selectors must fit; \
     `finial explain -pid PID` asks a Finial agent's admin socket which entry came nearest";

/// A channel to a Unix socket. It connects when it is first used.
pub(crate) fn channel(socket: &Path) -> Channel {
    let socket: Arc<Path> = socket.into();
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(tower::service_fn(move |_| {
        let socket = Arc::clone(&socket);
        async move {
            tokio::net::UnixStream::connect(&socket)
                .await
                .map(TokioIo::new)
                .map_err(|error| DialError { socket: socket.display().to_string(), reason: errno_text(&error) })
        }
    }))
}

/// A refused or failed call. Prints as grpc-go does: `rpc error: code = NotFound desc = …`.
#[derive(Debug)]
pub(crate) struct RpcError(tonic::Status);

impl RpcError {
    /// The code.
    pub(crate) fn code(&self) -> tonic::Code {
        self.0.code()
    }

    /// The server's sentence.
    pub(crate) fn message(&self) -> &str {
        self.0.message()
    }

    /// What the person who typed the command can do, where the error alone does not tell.
    pub(crate) fn hint(&self) -> Option<String> {
        let Some(DialError { socket, reason }) = self.dial() else {
            return self.is_no_identity().then(|| NO_IDENTITY_HINT.into());
        };
        Some(if reason == "permission denied" {
            format!("your user may not use {socket}: look at the permissions of the socket and of the folders above it")
        } else {
            format!("is it running, and is {socket} its socket? Name another with -socketPath")
        })
    }

    /// Whether the agent has nothing for whoever asked.
    pub(crate) fn is_no_identity(&self) -> bool {
        self.code() == tonic::Code::PermissionDenied && self.message() == "no identity issued"
    }

    /// Whether the socket could not be connected to.
    pub(crate) fn is_unreachable(&self) -> bool {
        self.dial().is_some()
    }

    fn dial(&self) -> Option<&DialError> {
        let mut source = std::error::Error::source(&self.0);
        while let Some(error) = source {
            if let Some(dial) = error.downcast_ref::<DialError>() {
                return Some(dial);
            }
            source = error.source();
        }
        None
    }
}

impl From<tonic::Status> for RpcError {
    fn from(status: tonic::Status) -> Self {
        Self(status)
    }
}

impl std::error::Error for RpcError {}

impl std::fmt::Display for RpcError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(dial) = self.dial() {
            let dial = dial.to_string();
            return write!(f, "rpc error: code = Unavailable desc = connection error: desc = {dial:?}");
        }
        write!(f, "rpc error: code = {} desc = {}", code_name(self.code()), self.message())
    }
}

/// `client.list_entries(request).await.rpc()?` gives the message, or an error in grpc-go's words.
pub(crate) trait RpcExt<T> {
    /// The answer, or the error for people.
    ///
    /// # Errors
    /// The call failed.
    fn rpc(self) -> Result<T, RpcError>;
}

impl<T> RpcExt<T> for Result<tonic::Response<T>, tonic::Status> {
    fn rpc(self) -> Result<T, RpcError> {
        self.map(tonic::Response::into_inner).map_err(RpcError)
    }
}

/// The name of a code in Go: `NotFound`, `AlreadyExists`, …; `OK` for success.
pub(crate) fn code_name(code: tonic::Code) -> String {
    match code {
        tonic::Code::Ok => "OK".into(),
        tonic::Code::Cancelled => "Canceled".into(),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_says_who_has_to_change_what() {
        let dial = |reason: &str| {
            let error = DialError { socket: "/s".into(), reason: reason.into() };
            RpcError(tonic::Status::from_error(Box::new(error))).hint().unwrap_or_default()
        };
        assert!(dial("permission denied").contains("your user may not use /s"));
        assert!(dial("no such file or directory").contains("is it running"));
        assert!(RpcError(tonic::Status::permission_denied("no identity issued")).hint().is_some());
        assert_eq!(RpcError(tonic::Status::permission_denied("something else")).hint(), None);
    }
}
