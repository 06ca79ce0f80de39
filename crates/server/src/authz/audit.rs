//! The audit log: one line per call, or per item of a batch, with who called and what came of it.

use super::Call;
use finial_proto::types;
use std::borrow::Cow;
use tonic::{Code, Status};

/// Named values of a line, in SPIRE's names. Only gathered when the audit log is on.
pub type Fields = Vec<(Cow<'static, str>, String)>;

/// Separates names and values, and pairs, in the one text field by which they travel to the log's formatter.
pub(super) const UNIT: char = '\u{1f}';
pub(super) const RECORD: char = '\u{1e}';
/// What no value may contain.
pub(super) const SEPARATORS: [char; 2] = [UNIT, RECORD];

pub(super) fn emit(call: &Call, fields: &Fields, code: Code, message: &str) {
    let mut line = String::new();
    let mut add = |name: &str, value: &str| {
        if !line.is_empty() {
            line.push(RECORD);
        }
        line.push_str(name);
        line.push(UNIT);
        line.extend(value.chars().filter(|c| !SEPARATORS.contains(c)));
    };
    add("type", "audit");
    if code == Code::Ok {
        add("status", "success");
    } else {
        add("status", "error");
        add("status_code", code_name(code));
        add("status_message", message);
    }
    for (name, value) in call.who().iter().chain(fields) {
        add(name, value);
    }
    tracing::info!(
        subsystem_name = "api",
        service = call.row.service,
        method = call.row.name,
        request_id = call.request_id(),
        authorized_as = call.authorized_as,
        authorized_via = call.authorized_via,
        fields = line.as_str(),
        "API accessed"
    );
}

pub(super) fn emit_item(call: &Call, fields: &Fields, status: &types::Status) {
    emit(call, fields, Code::from(status.code), &status.message);
}

pub(super) fn emit_error(call: &Call, fields: &Fields, status: &Status) {
    emit(call, fields, status.code(), status.message());
}

/// The name that grpc-go prints for a code.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}
