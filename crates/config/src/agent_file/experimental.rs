//! `experimental { }` of agents.

use super::below;
use crate::duration::format_go_duration;
use crate::resolve::Resolver;
use crate::{AgentRateLimits, AgentSettings, BrokerReference, BrokerSettings, BrokerUser, OfflineCache, WaitForEntry};
use finial_core::SpiffeId;
use serde::Deserialize;
use std::path::Path;
use std::time::Duration;

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct RawExperimental {
    sync_interval: String,
    jwt_svid_cache_hit_timeout: String,
    named_pipe_name: String,
    admin_named_pipe_name: String,
    use_sync_authorized_entries: Option<bool>,
    require_pq_kem: bool,
    offline_cache: String,
    offline_cache_host_key_path: String,
    handover: Option<bool>,
    wait_for_entry: String,
    wait_for_entry_max_waiters: i64,
    ratelimit: RawLimits,
    broker: Option<RawBroker>,
    feature_flags: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawLimits {
    fetch_x509_svid: i64,
    fetch_jwt_svid: i64,
    fetch_x509_bundles: i64,
    fetch_jwt_bundles: i64,
    stream_secrets: i64,
    fetch_secrets: i64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawBroker {
    socket_path: String,
    bind_address: String,
    brokers: Vec<RawBrokerUser>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawBrokerUser {
    id: String,
    allowed_reference_types: Vec<RawReference>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawReference {
    type_url: String,
    allow_over_tcp: bool,
}

pub(super) fn resolve(r: &mut Resolver, e: RawExperimental, out: &mut AgentSettings) {
    r.feature_flags("agent", &e.feature_flags);
    for (key, written, instead) in [
        ("named_pipe_name", &e.named_pipe_name, "socket_path"),
        ("admin_named_pipe_name", &e.admin_named_pipe_name, "admin_socket_path"),
    ] {
        if !written.is_empty() {
            let message =
                format!("invalid configuration: {key} is not supported in this platform; please use {instead} instead");
            r.problem(&["agent", "experimental", key], message, "");
        }
    }
    let path = ["agent", "experimental", "sync_interval"];
    if let Some(interval) = r.duration(&path, &e.sync_interval, "could not parse synchronization interval") {
        out.sync_interval = interval;
    }
    let path = ["agent", "experimental", "jwt_svid_cache_hit_timeout"];
    let (low, high) = (Duration::from_secs(5), Duration::from_secs(30));
    let label = "could not parse jwt_svid_cache_hit_timeout";
    if let Some(timeout) = r.duration(&path, &e.jwt_svid_cache_hit_timeout, label) {
        let shown = format_go_duration(timeout);
        if timeout < low {
            r.problem(&path, format!("jwt_svid_cache_hit_timeout ({shown}) must be greater than 5s"), "");
        } else if timeout >= high {
            r.problem(&path, format!("jwt_svid_cache_hit_timeout ({shown}) must be less than 30s"), "");
        }
        out.jwt_svid_cache_hit_timeout = timeout;
        r.warn("The use of 'jwt_svid_cache_hit_timeout' is experimental");
    }
    if let Some(written) = e.use_sync_authorized_entries {
        r.deprecated("The 'use_sync_authorized_entries' configuration is deprecated. The option to disable it will be removed in SPIRE 1.13.");
        out.use_sync_authorized_entries = written;
    }
    out.require_pq_kem = e.require_pq_kem;
    out.wit_svids_enabled = e.feature_flags.iter().any(|flag| flag == "wit-svid");
    outages(r, &e, out);
    wait_for_entry(r, &e, out);
    let mut limit = |key: &str, value: i64| {
        u32::try_from(value).unwrap_or_else(|_| {
            let message = format!("experimental.ratelimit.{key} must not be negative");
            r.problem(&["agent", "experimental", "ratelimit", key], message, "");
            0
        })
    };
    out.rate_limits = AgentRateLimits {
        fetch_x509_svid: limit("fetch_x509_svid", e.ratelimit.fetch_x509_svid),
        fetch_jwt_svid: limit("fetch_jwt_svid", e.ratelimit.fetch_jwt_svid),
        fetch_x509_bundles: limit("fetch_x509_bundles", e.ratelimit.fetch_x509_bundles),
        fetch_jwt_bundles: limit("fetch_jwt_bundles", e.ratelimit.fetch_jwt_bundles),
        stream_secrets: limit("stream_secrets", e.ratelimit.stream_secrets),
        fetch_secrets: limit("fetch_secrets", e.ratelimit.fetch_secrets),
    };
    if let Some(raw) = e.broker {
        out.broker = Some(broker(r, raw, out.socket_path.as_deref()));
    }
    r.experimental_warning("agent");
    r.feature_flag_warnings(&e.feature_flags);
}

/// Keys of ours.
fn outages(r: &mut Resolver, e: &RawExperimental, out: &mut AgentSettings) {
    out.offline_cache = match e.offline_cache.as_str() {
        "" | "auto" => OfflineCache::Auto,
        "host_key" => OfflineCache::HostKey,
        "keyring" => OfflineCache::Keyring,
        "off" => OfflineCache::Off,
        other => {
            let message = format!("experimental.offline_cache {other:?} is unknown");
            r.problem(&["agent", "experimental", "offline_cache"], message, "use auto, host_key, keyring or off");
            OfflineCache::Off
        }
    };
    if !e.offline_cache_host_key_path.is_empty() {
        out.offline_cache_host_key_path = e.offline_cache_host_key_path.as_str().into();
    }
    out.handover = e.handover.unwrap_or(true);
}

/// Keys of ours.
fn wait_for_entry(r: &mut Resolver, e: &RawExperimental, out: &mut AgentSettings) {
    const LONGEST: Duration = Duration::from_secs(600);
    const WAITERS: i64 = 16_384;
    let key = |key| ["agent", "experimental", key];
    let label = "could not parse wait_for_entry";
    let longest = r.duration(&key("wait_for_entry"), &e.wait_for_entry, label).filter(|longest| !longest.is_zero());
    if longest.is_some_and(|longest| longest > LONGEST) {
        let message = format!("wait_for_entry must be at most {}", format_go_duration(LONGEST));
        r.problem(&key("wait_for_entry"), message, "workloads ask again by themselves when they are refused");
    }
    let waiters = match e.wait_for_entry_max_waiters {
        0 => 1_000,
        written => written,
    };
    if !(1..=WAITERS).contains(&waiters) {
        let message = format!("wait_for_entry_max_waiters must be between 1 and {WAITERS}");
        r.problem(&key("wait_for_entry_max_waiters"), message, "0, or nothing, is 1000");
    } else if longest.is_none() && e.wait_for_entry_max_waiters != 0 {
        r.warn("wait_for_entry_max_waiters has no effect without wait_for_entry");
    }
    let waiters_max = usize::try_from(waiters).unwrap_or(1);
    out.wait_for_entry = longest.map(|longest| WaitForEntry { longest, waiters_max });
}

fn broker(r: &mut Resolver, raw: RawBroker, workload_socket: Option<&Path>) -> BrokerSettings {
    let key = |key| ["agent", "experimental", "broker", key];
    let mut out = BrokerSettings { socket_path: None, bind_address: None, brokers: Vec::new() };
    if raw.socket_path.is_empty() && raw.bind_address.is_empty() {
        let message = "experimental.broker requires socket_path, bind_address, or both";
        r.problem(&["agent", "experimental", "broker"], message, "");
    }
    if !raw.socket_path.is_empty() {
        let label = "failed to get absolute path for experimental.broker.socket_path";
        out.socket_path = r.absolute(&key("socket_path"), &raw.socket_path, label);
        if below(out.socket_path.as_deref(), workload_socket) {
            let message = "broker socket cannot be in the same directory or a subdirectory as that containing the Workload API socket";
            r.problem(&key("socket_path"), message, "");
        }
    }
    if !raw.bind_address.is_empty() {
        let label = format!("invalid experimental.broker.bind_address {:?}", raw.bind_address);
        match raw.bind_address.rsplit_once(':').map(|(host, port)| (host, port.parse::<i64>())) {
            Some((host, Ok(port))) => out.bind_address = r.address(&key("bind_address"), host, port, &label),
            _ => {
                let message = format!("{label}: address {}: missing port in address", raw.bind_address);
                r.problem(&key("bind_address"), message, "write host:port");
            }
        }
    }
    let path = key("brokers");
    for (index, user) in raw.brokers.into_iter().enumerate() {
        let id = user.id;
        if id.is_empty() {
            r.problem(&path, format!("experimental.broker.brokers[{index}].id: must be specified"), "");
            continue;
        }
        let id = match SpiffeId::parse(&id) {
            Ok(id) => id,
            Err(error) => {
                r.problem(&path, format!("experimental.broker.brokers[{id}].id: {error}"), "");
                continue;
            }
        };
        if out.brokers.iter().any(|b| b.id == id) {
            r.problem(&path, format!("experimental.broker.brokers[{id}].id: duplicate broker id"), "");
        }
        let label = format!("experimental.broker.brokers[{id}].allowed_reference_types");
        let types = user.allowed_reference_types;
        if types.is_empty() {
            r.problem(&path, format!("{label}: must list at least one reference type URL"), "");
        }
        if types.len() > 1 && types.iter().any(|t| t.type_url == "*") {
            r.problem(&path, format!("{label}: wildcard \"*\" must be the only allowed reference type"), "");
        }
        for (at, _) in types.iter().enumerate().filter(|(_, t)| t.type_url.is_empty()) {
            r.problem(&path, format!("{label}[{at}].type_url: must be specified"), "");
        }
        let allowed_reference_types = types
            .into_iter()
            .map(|t| BrokerReference { type_url: t.type_url, allow_over_tcp: t.allow_over_tcp })
            .collect();
        out.brokers.push(BrokerUser { id, allowed_reference_types });
    }
    out
}
