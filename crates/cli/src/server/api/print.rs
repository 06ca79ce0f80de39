//! How results are printed: a block per entry or agent for people, or the API's own message as JSON.

use crate::context::Context;
use crate::json;
use crate::rpc::code_name;
use crate::server::api::gotime;
use finial_proto::types;
use std::fmt::Write as _;

/// Prints the message as JSON if asked to. Whether it did.
pub(crate) fn json_message(cx: &Context, name: &str, message: &impl prost::Message) -> anyhow::Result<bool> {
    if cx.json() {
        cx.print(json::lines(vec![json::message(name, message)?]));
    }
    Ok(cx.json())
}

/// An entry, as all commands show it.
pub(crate) fn entry(e: &types::Entry) -> String {
    let mut out = String::new();
    let mut line = |label: &str, value: &dyn std::fmt::Display| {
        // writing to memory does not fail
        let _ = writeln!(out, "{label:<24}: {value}");
    };
    let ttl = |seconds: i32| if seconds == 0 { "default".to_owned() } else { seconds.to_string() };
    line("Entry ID", &if e.id.is_empty() { "(none)" } else { &e.id });
    line("SPIFFE ID", &id(e.spiffe_id.as_ref()));
    line("Parent ID", &id(e.parent_id.as_ref()));
    line("Revision", &e.revision_number);
    if e.downstream {
        line("Downstream", &true);
    }
    line("X509-SVID TTL", &ttl(e.x509_svid_ttl));
    line("JWT-SVID TTL", &ttl(e.jwt_svid_ttl));
    if e.expires_at != 0 {
        line("Expiration time", &gotime::utc(e.expires_at));
    }
    for selector in &e.selectors {
        line("Selector", &format!("{}:{}", selector.r#type, selector.value));
    }
    for trust_domain in &e.federates_with {
        line("FederatesWith", trust_domain);
    }
    for name in &e.dns_names {
        line("DNS name", name);
    }
    if e.admin {
        line("Admin", &true);
    }
    if e.store_svid {
        line("StoreSvid", &true);
    }
    if !e.hint.is_empty() {
        line("Hint", &e.hint);
    }
    if e.additional_attributes.as_ref().is_some_and(|a| a.disable_x509_svid_prefetch) {
        line("DisableX509SvidPrefetch", &true);
    }
    if e.additional_attributes.as_ref().is_some_and(|a| a.jwt_svid_include_jti) {
        line("JwtSvidIncludeJti", &true);
    }
    out.push('\n');
    out
}

/// An agent, as all commands show it.
pub(crate) fn agent(a: &types::Agent) -> String {
    let mut out = String::new();
    let mut line = |label: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(out, "{label:<18}: {value}");
    };
    line("SPIFFE ID", &id(a.id.as_ref()));
    line("Attestation type", &a.attestation_type);
    line("Expiration time", &gotime::local(a.x509svid_expires_at));
    if a.banned {
        line("Banned", &true);
    } else {
        line("Serial number", &a.x509svid_serial_number);
    }
    line("Can re-attest", &a.can_reattest);
    if !a.agent_version.is_empty() {
        line("Agent version", &a.agent_version);
    }
    out.push('\n');
    out
}

/// A SPIFFE ID of the wire as text; empty if there is none.
pub(crate) fn id(id: Option<&types::Spiffeid>) -> String {
    id.map(|id| format!("spiffe://{}{}", id.trust_domain, id.path)).unwrap_or_default()
}

/// Whether the item of a batch succeeded.
pub(crate) fn is_ok(status: Option<&types::Status>) -> bool {
    status.is_none_or(|s| s.code == 0)
}

/// `code: NotFound, msg: "entry not found"`.
pub(crate) fn status(status: Option<&types::Status>) -> String {
    let (code, message) = status.map_or((0, ""), |s| (s.code, s.message.as_str()));
    format!("code: {}, msg: {message:?}", code_name(tonic::Code::from_i32(code)))
}
