//! The audit log: one line per call, or per item of a batch, with who called and what came of it.

use super::Call;
use finial_proto::types;
use finial_runtime::log::{FIELD_MARKS, literal};
use std::borrow::Cow;
use tonic::{Code, Status};

/// Named values of a line, in SPIRE's names. Only gathered when the audit log is on.
pub type Fields = Vec<(Cow<'static, str>, String)>;

/// Separates names and values, and pairs, in the one text field by which they travel to the log's formatter.
pub(super) const UNIT: char = '\u{1f}';
pub(super) const RECORD: char = '\u{1e}';

/// Those of SPIRE's fields that are numbers in JSON lines, where the value is one, and those that are booleans.
const NUMBERS: [&str; 14] = [
    "bundle_jwt_authority_expires_at",
    "bundle_refresh_hint",
    "bundle_sequence_number",
    "caller_gid",
    "caller_uid",
    "created_at",
    "expires_at",
    "jwt_authority_expires_at",
    "jwt_svid_ttl",
    "refresh_hint",
    "revision_number",
    "sequence_number",
    "ttl",
    "x509_svid_ttl",
];
const BOOLEANS: [&str; 5] = ["admin", "by_banned", "by_can_reattest", "downstream", "store_svid"];

/// How bundles are deleted, by number.
const MODES: [&str; 3] = ["RESTRICT", "DELETE", "DISSOCIATE"];

/// A value as it travels to the log's formatter. Without what separates fields: a caller must not write fields of its own
/// into our log.
pub(super) fn travelling(name: &str, value: &str) -> String {
    if let (true, Some(number)) = (name == "mode", MODES.iter().position(|mode| *mode == value)) {
        return literal(number, value);
    }
    let base = name.rsplit_once('.').map_or(name, |(base, _)| base);
    let typed = NUMBERS.contains(&base) && value.parse::<i64>().is_ok()
        || BOOLEANS.contains(&base) && value.parse::<bool>().is_ok();
    if typed { literal(value, value) } else { value.chars().filter(|c| !FIELD_MARKS.contains(c)).collect() }
}

pub(super) fn emit(call: &Call, fields: &Fields, code: Code, message: &str) {
    let mut line = String::new();
    let mut add = |name: &str, value: &str| {
        if !line.is_empty() {
            line.push(RECORD);
        }
        line.push_str(name);
        line.push(UNIT);
        line.push_str(value);
    };
    add("type", "audit");
    if code == Code::Ok {
        add("status", "success");
    } else {
        add("status", "error");
        add("status_code", &literal(code as i32, code_name(code)));
        add("status_message", &travelling("", message));
    }
    for (name, value) in call.who().iter().chain(fields) {
        add(name, &travelling(name, value));
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
