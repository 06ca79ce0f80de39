//! How keys and labels become names.

use finial_core::ErrorKind;
use std::fmt::Write;

/// The name of the gRPC status that a kind of error becomes, as Go writes it in the label `status`.
pub fn status_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::InvalidArgument => "InvalidArgument",
        ErrorKind::NotFound => "NotFound",
        ErrorKind::AlreadyExists => "AlreadyExists",
        ErrorKind::FailedPrecondition => "FailedPrecondition",
        ErrorKind::Denied => "PermissionDenied",
        ErrorKind::Unauthenticated => "Unauthenticated",
        ErrorKind::Exhausted => "ResourceExhausted",
        ErrorKind::Unavailable => "Unavailable",
        ErrorKind::Timeout => "DeadlineExceeded",
        ErrorKind::Unimplemented => "Unimplemented",
        ErrorKind::Internal => "Internal",
    }
}

/// The call counter's key of a gRPC method: `/spire.api.server.agent.v1.Agent/CreateJoinToken` gives
/// `rpc.agent.v1.agent.create_join_token`, `/SpiffeWorkloadAPI/FetchX509SVID` gives `rpc.workload_api.fetch_x509svid`.
pub fn rpc_key(full_method: &str) -> String {
    let path = full_method.strip_prefix('/').unwrap_or(full_method);
    let (service, method) = path.split_once('/').unwrap_or((path, ""));
    let service = match service {
        "SpiffeWorkloadAPI" => "WorkloadAPI",
        "envoy.service.secret.v3.SecretDiscoveryService" => "SDS.v3",
        "grpc.health.v1.Health" => "Health",
        "spire.api.server.logger.v1.Logger" | "spire.api.agent.logger.v1.Logger" => "Logger",
        "spire.api.agent.delegatedidentity.v1.DelegatedIdentity" => "DelegatedIdentity",
        "spire.agent.debug.v1.Debug" => "Debug",
        other => other.strip_prefix("spire.api.server.").unwrap_or(other),
    };
    let mut key = "rpc".to_owned();
    for part in service.split('.') {
        key.push('.');
        push_snake_case(&mut key, part);
    }
    key.push('.');
    match method {
        "SubscribeToX509SVIDs" => key.push_str("subscribe_to_x509_svids"),
        method => push_snake_case(&mut key, method),
    }
    key
}

/// Pascal case to snake case; a run of capitals is one word.
fn push_snake_case(out: &mut String, text: &str) {
    let chars: Vec<char> = text.chars().collect();
    for (i, &c) in chars.iter().enumerate() {
        if !c.is_alphanumeric() {
            out.push('_');
            continue;
        }
        let lower = |i: Option<usize>| i.and_then(|i| chars.get(i)).is_some_and(|c| c.is_lowercase());
        let neighbour = lower(i.checked_add(1)) || lower(i.checked_sub(1));
        if c.is_uppercase() && i > 0 && i + 1 < chars.len() && neighbour && !out.ends_with('_') {
            out.push('_');
        }
        out.extend(c.to_lowercase());
    }
}

/// Prefix and key as Prometheus allows them.
pub(super) fn metric_name(prefix: &str, key: &str) -> String {
    let mut name = String::with_capacity(prefix.len() + 1 + key.len());
    name.push_str(prefix);
    name.push('_');
    name.push_str(key);
    name.chars().map(|c| if matches!(c, ' ' | '.' | '=' | '-' | '/') { '_' } else { c }).collect()
}

/// The labels in order of their names, as text without braces: `host="vm",status="OK"`. A later label replaces an earlier
/// one of the same name.
pub(super) fn label_text<'a>(labels: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let sorted: std::collections::BTreeMap<_, _> = labels.collect();
    let mut text = String::new();
    for (name, value) in sorted {
        let separator = if text.is_empty() { "" } else { "," };
        let _ = write!(text, "{separator}{}=\"{}\"", sanitize(name), sanitize(value));
    }
    text
}

/// Each run of characters other than letters, digits and `_` becomes one `_`, together with a `_` that follows it.
pub(super) fn sanitize(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_run = false;
    for c in text.chars().take(256) {
        if c.is_ascii_alphanumeric() {
            out.push(c);
            in_run = false;
        } else if c == '_' {
            if !in_run {
                out.push('_');
            }
            in_run = false;
        } else {
            if !in_run {
                out.push('_');
            }
            in_run = true;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_have_the_keys_that_spire_gives_them() {
        for (method, key) in [
            ("/spire.api.server.agent.v1.Agent/CreateJoinToken", "rpc.agent.v1.agent.create_join_token"),
            ("/spire.api.server.entry.v1.Entry/ListEntries", "rpc.entry.v1.entry.list_entries"),
            ("/spire.api.server.svid.v1.SVID/BatchNewX509SVID", "rpc.svid.v1.svid.batch_new_x509svid"),
            ("/SpiffeWorkloadAPI/FetchX509SVID", "rpc.workload_api.fetch_x509svid"),
            ("/SpiffeWorkloadAPI/FetchJWTBundles", "rpc.workload_api.fetch_jwt_bundles"),
            ("/grpc.health.v1.Health/Check", "rpc.health.check"),
        ] {
            assert_eq!(rpc_key(method), key);
        }
    }

    #[test]
    fn labels_are_made_harmless() {
        assert_eq!(sanitize("spiffe://example.org/a"), "spiffe_example_org_a");
        assert_eq!(sanitize("a._b"), "a_b");
        assert_eq!(sanitize("a\"} 1\n"), "a_1_");
        assert_eq!(
            label_text([("status", "OK"), ("host", "a-b"), ("host", "c")].into_iter()),
            "host=\"c\",status=\"OK\""
        );
    }
}
