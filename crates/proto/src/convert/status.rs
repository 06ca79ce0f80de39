//! Failures: kinds to gRPC codes and back, the status of one item of a batch, and the details of a refusal.

use crate::types::permission_denied_details::Reason;
use crate::{rpc, types};
use bytes::Bytes;
use finial_core::{ErrorKind, Fault};
use prost::Message;
use std::collections::BTreeMap;
use tonic::{Code, Status};

const DETAILS_URL: &str = "type.googleapis.com/spire.api.types.PermissionDeniedDetails";
const ERROR_INFO_URL: &str = "type.googleapis.com/google.rpc.ErrorInfo";

/// `google.rpc.ErrorInfo`: what programs may make of a failure, and people read beside its message.
#[derive(Clone, PartialEq, Message)]
pub struct ErrorInfo {
    /// What went wrong, in `UPPER_SNAKE_CASE`.
    #[prost(string, tag = "1")]
    pub reason: String,
    /// Who says so; reasons are unique within it.
    #[prost(string, tag = "2")]
    pub domain: String,
    /// What more there is to say.
    #[prost(btree_map = "string, string", tag = "3")]
    pub metadata: BTreeMap<String, String>,
}

/// The gRPC code of a kind.
pub fn code_of(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        ErrorKind::Denied => Code::PermissionDenied,
        ErrorKind::Unauthenticated => Code::Unauthenticated,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Timeout => Code::DeadlineExceeded,
        ErrorKind::Unimplemented => Code::Unimplemented,
        ErrorKind::Internal => Code::Internal,
    }
}

/// The kind of a gRPC code, for callers. `Canceled` and `Aborted` count as "try again"; what makes no sense is internal.
pub fn kind_of(code: Code) -> ErrorKind {
    match code {
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::InvalidArgument,
        Code::NotFound => ErrorKind::NotFound,
        Code::AlreadyExists => ErrorKind::AlreadyExists,
        Code::FailedPrecondition => ErrorKind::FailedPrecondition,
        Code::PermissionDenied => ErrorKind::Denied,
        Code::Unauthenticated => ErrorKind::Unauthenticated,
        Code::ResourceExhausted => ErrorKind::Exhausted,
        Code::Unavailable | Code::Cancelled | Code::Aborted => ErrorKind::Unavailable,
        Code::DeadlineExceeded => ErrorKind::Timeout,
        Code::Unimplemented => ErrorKind::Unimplemented,
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => ErrorKind::Internal,
    }
}

/// The answer to a call that failed. The private cause stays here: log it first.
pub fn status_of(fault: &Fault) -> Status {
    Status::new(code_of(fault.kind), fault.message.clone())
}

/// What a caller makes of an answer.
pub fn fault_of_status(status: Status) -> Fault {
    Fault::new(kind_of(status.code()), status.message()).because(status)
}

/// The status of an item of a batch that went well.
pub fn item_ok() -> types::Status {
    types::Status { code: Code::Ok as i32, message: "OK".to_owned() }
}

/// The status of an item of a batch that failed.
pub fn item_fault(fault: &Fault) -> types::Status {
    types::Status { code: code_of(fault.kind) as i32, message: fault.message.clone() }
}

/// A failure with the one detail that it has.
fn with_detail(code: Code, message: &str, type_url: &str, detail: &impl Message) -> Status {
    let any = prost_types::Any { type_url: type_url.to_owned(), value: detail.encode_to_vec() };
    let status = rpc::Status { code: code as i32, message: message.to_owned(), details: vec![any] };
    Status::with_details(code, message, Bytes::from(status.encode_to_vec()))
}

/// The first detail of a type.
fn detail<T: Message + Default>(status: &Status, type_url: &str) -> Option<T> {
    let status = rpc::Status::decode(status.details()).ok()?;
    let any = status.details.iter().find(|any| any.type_url == type_url)?;
    T::decode(&any.value[..]).ok()
}

/// A refusal that tells an agent what to do next.
pub fn permission_denied(message: &str, reason: Reason) -> Status {
    let details = types::PermissionDeniedDetails { reason: reason.into() };
    with_detail(Code::PermissionDenied, message, DETAILS_URL, &details)
}

/// The same failure, and why.
pub fn with_error_info(status: &Status, info: &ErrorInfo) -> Status {
    with_detail(status.code(), status.message(), ERROR_INFO_URL, info)
}

/// Reads what [`with_error_info`] and others attach.
pub fn error_info(status: &Status) -> Option<ErrorInfo> {
    detail(status, ERROR_INFO_URL)
}

/// Reads what [`permission_denied`] and SPIRE attach.
pub fn permission_denied_reason(status: &Status) -> Option<Reason> {
    if status.code() != Code::PermissionDenied {
        return None;
    }
    Reason::try_from(detail::<types::PermissionDeniedDetails>(status, DETAILS_URL)?.reason).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_survive_the_wire() {
        for kind in [
            ErrorKind::InvalidArgument,
            ErrorKind::NotFound,
            ErrorKind::AlreadyExists,
            ErrorKind::FailedPrecondition,
            ErrorKind::Denied,
            ErrorKind::Unauthenticated,
            ErrorKind::Exhausted,
            ErrorKind::Unavailable,
            ErrorKind::Timeout,
            ErrorKind::Unimplemented,
            ErrorKind::Internal,
        ] {
            assert_eq!(kind_of(code_of(kind)), kind);
        }
    }

    #[test]
    fn a_private_cause_is_not_sent() {
        let fault = Fault::new(ErrorKind::Internal, "failed to sign").because("the key is on fire");
        let status = status_of(&fault);
        assert_eq!((status.code(), status.message()), (Code::Internal, "failed to sign"));
        assert_eq!(item_fault(&fault), types::Status { code: 13, message: "failed to sign".into() });
    }

    #[test]
    fn refusals_carry_their_reason_through_headers() {
        let sent = permission_denied("agent is banned", Reason::AgentBanned);
        let http = sent.into_http::<tonic::body::Body>();
        let got = Status::from_header_map(http.headers()).unwrap();
        assert_eq!(permission_denied_reason(&got), Some(Reason::AgentBanned));
        assert_eq!(got.message(), "agent is banned");
        assert_eq!(permission_denied_reason(&Status::permission_denied("x")), None);
        assert_eq!(
            permission_denied_reason(&Status::with_details(Code::PermissionDenied, "x", Bytes::from("\u{1}"))),
            None
        );
    }

    #[test]
    fn failures_carry_their_why_through_headers() {
        let metadata = BTreeMap::from([("k8s".to_owned(), "did not answer in time".to_owned())]);
        let info = ErrorInfo { reason: "SLOW".into(), domain: "finial".into(), metadata };
        let sent = with_error_info(&Status::unavailable("no"), &info).into_http::<tonic::body::Body>();
        let got = Status::from_header_map(sent.headers()).unwrap();
        assert_eq!((got.code(), got.message(), error_info(&got)), (Code::Unavailable, "no", Some(info)));
        assert_eq!(error_info(&Status::unavailable("no")), None);
    }
}
