//! Where the first bundle comes from.

use super::RawAgent;
use crate::Bootstrap;
use crate::resolve::Resolver;
use std::net::SocketAddr;

pub(super) fn resolve(r: &mut Resolver, a: &RawAgent) -> Option<Bootstrap> {
    let url = &a.trust_bundle_url;
    let path = &a.trust_bundle_path;
    let api = &a.trust_bundle_spiffe_workload_api;
    let given = |text: &String| !text.is_empty();
    if given(api) {
        let other = if a.insecure_bootstrap {
            Some("only one of insecure_bootstrap or trust_bundle_spiffe_workload_api can be specified, not both")
        } else if given(url) {
            Some("only one of trust_bundle_url or trust_bundle_spiffe_workload_api can be specified, not both")
        } else if given(path) {
            Some("only one of trust_bundle_path or trust_bundle_spiffe_workload_api can be specified, not both")
        } else if given(&a.trust_bundle_unix_socket) {
            Some("trust_bundle_unix_socket can not be used with trust_bundle_spiffe_workload_api")
        } else {
            None
        };
        if let Some(message) = other {
            r.problem(&["agent", "trust_bundle_spiffe_workload_api"], message, "keep one source of the first bundle");
            return None;
        }
        if let Err(error) = check_workload_api_address(api) {
            let label = "trust_bundle_spiffe_workload_api is not a valid SPIFFE Workload API endpoint address";
            r.problem(&["agent", "trust_bundle_spiffe_workload_api"], format!("{label}: {error}"), "");
            return None;
        }
        return Some(Bootstrap::WorkloadApi(api.clone()));
    }
    let conflict = match (a.insecure_bootstrap, given(url), given(path)) {
        (true, true, true) => Some(
            "only one of insecure_bootstrap, trust_bundle_url, or trust_bundle_path can be specified, not the three options",
        ),
        (true, true, false) => Some("only one of insecure_bootstrap or trust_bundle_url can be specified, not both"),
        (true, false, true) => Some("only one of insecure_bootstrap or trust_bundle_path can be specified, not both"),
        (false, true, true) => Some("only one of trust_bundle_url or trust_bundle_path can be specified, not both"),
        _ => None,
    };
    if let Some(message) = conflict {
        let key = if a.insecure_bootstrap { "insecure_bootstrap" } else { "trust_bundle_url" };
        r.problem(&["agent", key], message, "keep one source of the first bundle");
        return None;
    }
    if given(&a.trust_bundle_unix_socket) && !given(url) {
        let message = "if trust_bundle_unix_socket is specified, so must be trust_bundle_url";
        r.problem(&["agent", "trust_bundle_unix_socket"], message, "");
    }
    if a.insecure_bootstrap {
        return Some(Bootstrap::Insecure);
    }
    if given(path) {
        return Some(Bootstrap::Path(path.into()));
    }
    if given(url) {
        return bundle_url(r, url, &a.trust_bundle_unix_socket);
    }
    r.problem(
        &["agent"],
        "trust_bundle_path, trust_bundle_url, or trust_bundle_spiffe_workload_api must be configured unless insecure_bootstrap is set",
        "write the output of `spire-server bundle show` to a file and name it as trust_bundle_path",
    );
    None
}

fn bundle_url(r: &mut Resolver, url: &str, unix_socket: &str) -> Option<Bootstrap> {
    let path = ["agent", "trust_bundle_url"];
    let scheme = url.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase()).unwrap_or_default();
    if unix_socket.is_empty() {
        if scheme != "https" {
            r.problem(&path, "trust bundle URL must start with https://", "");
            return None;
        }
        return Some(Bootstrap::Url { url: url.into(), unix_socket: None });
    }
    if scheme != "http" {
        r.problem(&path, "trust bundle URL must start with http:// when used with trust bundle unix socket", "");
        return None;
    }
    let query = url.split('#').next().and_then(|u| u.split_once('?')).map(|(_, query)| query).unwrap_or_default();
    for reserved in ["spiffe-", "spire-"] {
        if query.split('&').any(|part| part.starts_with(reserved)) {
            r.problem(&path, format!("trust_bundle_url query params can not start with {reserved}"), "");
            return None;
        }
    }
    Some(Bootstrap::Url { url: url.into(), unix_socket: Some(unix_socket.into()) })
}

/// Section 4 of the SPIFFE Workload Endpoint standard: `unix:` with a path, or `tcp:` with an IP address and a port.
fn check_workload_api_address(address: &str) -> Result<(), &'static str> {
    let (body, fragment) = address.split_once('#').unwrap_or((address, ""));
    let (body, query) = body.split_once('?').unwrap_or((body, ""));
    if let Some(rest) = body.strip_prefix("unix:") {
        return match rest {
            _ if !rest.starts_with('/') => Err("workload endpoint unix socket URI must not be opaque"),
            _ if rest.starts_with("//") && rest.contains('@') => {
                Err("workload endpoint unix socket URI must not include user info")
            }
            "//" => Err("workload endpoint unix socket URI must include a path"),
            _ if !query.is_empty() => Err("workload endpoint unix socket URI must not include query values"),
            _ if !fragment.is_empty() => Err("workload endpoint unix socket URI must not include a fragment"),
            _ => Ok(()),
        };
    }
    let Some(rest) = body.strip_prefix("tcp:") else {
        return Err("workload endpoint socket URI must have a \"tcp\" or \"unix\" scheme");
    };
    let Some(host) = rest.strip_prefix("//") else {
        return Err("workload endpoint tcp socket URI must not be opaque");
    };
    match host {
        _ if host.contains('@') => Err("workload endpoint tcp socket URI must not include user info"),
        _ if host.is_empty() || host.starts_with('/') => Err("workload endpoint tcp socket URI must include a host"),
        _ if host.contains('/') => Err("workload endpoint tcp socket URI must not include a path"),
        _ if !query.is_empty() => Err("workload endpoint tcp socket URI must not include query values"),
        _ if !fragment.is_empty() => Err("workload endpoint tcp socket URI must not include a fragment"),
        _ if host.parse::<SocketAddr>().is_ok() => Ok(()),
        _ if host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok() => {
            Err("workload endpoint tcp socket URI host component must include a port")
        }
        _ => Err("workload endpoint tcp socket URI host component must be an IP:port"),
    }
}
