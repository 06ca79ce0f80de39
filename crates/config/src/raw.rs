//! The keys as they are written in files, shared by server and agent. Empty and zero mean "not set", as in SPIRE.

use crate::problem::Notice;
use crate::resolve::Resolver;
use crate::{
    HealthSettings, M3Sink, PluginConfig, PluginData, ProfilingSettings, PrometheusSettings, PrometheusTls,
    TelemetrySettings, nearest,
};
use finial_core::SpiffeId;
use finial_hcl::{Item, Kind, Value};
use serde::Deserialize;
use serde::de::IgnoredAny;

#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct RawTelemetry {
    #[serde(rename = "Prometheus")]
    prometheus: Option<RawPrometheus>,
    #[serde(rename = "DogStatsd")]
    dogstatsd: Vec<RawSink>,
    #[serde(rename = "Statsd")]
    statsd: Vec<RawSink>,
    #[serde(rename = "M3")]
    m3: Vec<RawM3>,
    #[serde(rename = "InMem")]
    in_mem: Option<RawInMem>,
    #[serde(rename = "MetricPrefix")]
    metric_prefix: String,
    #[serde(rename = "EnableTrustDomainLabel")]
    trust_domain_label: Option<bool>,
    #[serde(rename = "EnableHostnameLabel")]
    hostname_label: Option<bool>,
    #[serde(rename = "AllowedPrefixes")]
    allowed_prefixes: Vec<String>,
    #[serde(rename = "BlockedPrefixes")]
    blocked_prefixes: Vec<String>,
    #[serde(rename = "AllowedLabels")]
    allowed_labels: Vec<String>,
    #[serde(rename = "BlockedLabels")]
    blocked_labels: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawPrometheus {
    host: String,
    port: i64,
    tls: Option<RawPrometheusTls>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawPrometheusTls {
    cert_file: String,
    key_file: String,
    client_ca_file: String,
    use_spire_svid: bool,
    authorized_spiffe_ids: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawSink {
    address: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawM3 {
    address: String,
    env: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawInMem {}

impl RawPrometheusTls {
    fn resolve(self, resolver: &mut Resolver) -> PrometheusTls {
        const TLS: &[&str] = &["telemetry", "Prometheus", "tls"];
        let has = |path: &str| !path.is_empty();
        let ids: Vec<_> = self.authorized_spiffe_ids.iter().map(|id| (id, id.parse::<SpiffeId>())).collect();
        let files = [&self.cert_file, &self.key_file].map(|path| has(path));
        let wrong = if self.use_spire_svid && files != [false; 2] {
            Some("cert_file and key_file cannot be configured when use_spire_svid is enabled".to_owned())
        } else if !self.use_spire_svid && files != [true; 2] {
            Some("cert_file and key_file must both be configured unless use_spire_svid is enabled".into())
        } else if !ids.is_empty() && has(&self.client_ca_file) {
            Some("client_ca_file cannot be configured with authorized_spiffe_ids".into())
        } else {
            let first = ids.iter().find_map(|(id, parsed)| parsed.as_ref().err().map(|error| (id, error)));
            first.map(|(id, error)| format!("invalid authorized SPIFFE ID {id:?}: {error}"))
        };
        if let Some(wrong) = wrong {
            resolver.problem(TLS, format!("failed to create TLS config for Prometheus: {wrong}"), "");
        }
        PrometheusTls {
            files: (!self.use_spire_svid).then(|| (self.cert_file.into(), self.key_file.into())),
            client_ca_file: has(&self.client_ca_file).then(|| self.client_ca_file.into()),
            authorized_spiffe_ids: ids.into_iter().filter_map(|(_, parsed)| parsed.ok()).collect(),
        }
    }
}

impl RawTelemetry {
    pub(crate) fn resolve(self, resolver: &mut Resolver) -> TelemetrySettings {
        let prometheus = self.prometheus.map(|p| {
            let port = u16::try_from(p.port).unwrap_or_else(|_| {
                resolver.problem(
                    &["telemetry", "Prometheus", "port"],
                    format!("telemetry: Prometheus port {} is not a TCP port", p.port),
                    "ports go from 0 to 65535",
                );
                0
            });
            let host = if p.host.is_empty() { "localhost".into() } else { p.host.trim_matches(['[', ']']).to_owned() };
            let tls = p.tls.map(|tls| tls.resolve(resolver));
            PrometheusSettings { host, port, tls }
        });
        let addresses = |sinks: Vec<RawSink>| sinks.into_iter().map(|s| s.address).collect();
        TelemetrySettings {
            prometheus,
            dogstatsd: addresses(self.dogstatsd),
            statsd: addresses(self.statsd),
            m3: self.m3.into_iter().map(|m| M3Sink { address: m.address, env: m.env }).collect(),
            in_mem: self.in_mem.is_some(),
            metric_prefix: (!self.metric_prefix.is_empty()).then_some(self.metric_prefix),
            trust_domain_label: self.trust_domain_label.unwrap_or(false),
            hostname_label: self.hostname_label,
            allowed_prefixes: self.allowed_prefixes,
            blocked_prefixes: self.blocked_prefixes,
            allowed_labels: self.allowed_labels,
            blocked_labels: self.blocked_labels,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct RawHealth {
    listener_enabled: bool,
    bind_address: String,
    bind_port: String,
    ready_path: String,
    live_path: String,
}

impl RawHealth {
    pub(crate) fn resolve(self, resolver: &mut Resolver) -> HealthSettings {
        let mut health = HealthSettings { listener_enabled: self.listener_enabled, ..HealthSettings::default() };
        if !self.bind_address.is_empty() {
            health.bind_address = self.bind_address.trim_matches(['[', ']']).into();
        }
        if !self.bind_port.is_empty() {
            match self.bind_port.parse() {
                Ok(port) => health.bind_port = port,
                Err(_) => resolver.problem(
                    &["health_checks", "bind_port"],
                    format!("health_checks: bind_port {:?} is not a TCP port", self.bind_port),
                    "ports go from 0 to 65535",
                ),
            }
        }
        for (written, kept) in [(self.ready_path, &mut health.ready_path), (self.live_path, &mut health.live_path)] {
            if !written.is_empty() {
                *kept = written;
            }
        }
        health
    }
}

pub(crate) fn profiling(
    resolver: &mut Resolver,
    section: &str,
    enabled: bool,
    port: i64,
    frequency: i64,
    names: Vec<String>,
) -> ProfilingSettings {
    let port = u16::try_from(port).unwrap_or_else(|_| {
        resolver.problem(&[section, "profiling_port"], format!("profiling_port {port} is not a TCP port"), "");
        0
    });
    let frequency_seconds = u32::try_from(frequency.max(0)).unwrap_or(u32::MAX);
    ProfilingSettings { enabled, port, frequency_seconds, names }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawPlugin {
    plugin_cmd: String,
    plugin_args: Vec<String>,
    plugin_checksum: String,
    plugin_data: Option<IgnoredAny>,
    plugin_data_file: Option<String>,
    enabled: Option<bool>,
}

/// The plugins in the order of the file; None if there is no `plugins` section.
pub(crate) fn plugins(resolver: &mut Resolver) -> Option<Vec<PluginConfig>> {
    let root = resolver.root.clone();
    let mut sections = root.as_object()?.all("plugins").peekable();
    sections.peek()?;
    let mut found: Vec<PluginConfig> = Vec::new();
    for (kind, name) in sections
        .flat_map(|section| items(&section.value))
        .flat_map(|kind| items(&kind.value).into_iter().map(move |name| (kind, name)))
    {
        let path = ["plugins", kind.key.as_str(), name.key.as_str()];
        if found.iter().any(|p| p.kind == kind.key && p.name == name.key) {
            let message = format!("plugin {:?}/{:?} declared more than once", kind.key, name.key);
            resolver.problem(&path, message, "keep one of them");
            continue;
        }
        if let Some(plugin) = plugin(resolver, kind, name) {
            found.push(plugin);
        }
    }
    resolver.plugins = Some(found.clone());
    Some(found)
}

/// The items of an object, or of all objects of a list: JSON writes repeated blocks as lists.
fn items(value: &Value) -> Vec<&Item> {
    match &value.kind {
        Kind::Object(object) => object.items.iter().collect(),
        Kind::List(list) => list.iter().flat_map(items).collect(),
        _ => Vec::new(),
    }
}

fn plugin(resolver: &mut Resolver, kind: &Item, name: &Item) -> Option<PluginConfig> {
    let path = ["plugins", kind.key.as_str(), name.key.as_str()];
    let (raw, unused) = match name.value.parse_reporting::<RawPlugin>() {
        Ok(read) => read,
        Err(error) => {
            let message = format!("failed to decode plugins config: {error}");
            resolver.problems.push(crate::Problem { message, pos: Some(error.pos), hint: None });
            return None;
        }
    };
    for key in unused {
        let plugin = path.join(".");
        let meant = nearest(&key.key, key.known.iter().copied());
        let meant = meant.map(|meant| format!(" (did you mean {meant:?}?)")).unwrap_or_default();
        let message = format!("Unknown configuration key {plugin}.{} at {} is ignored{meant}", key.key, key.pos);
        resolver.notices.push(Notice::Warn(message));
    }
    let data = match (raw.plugin_data, raw.plugin_data_file) {
        (Some(_), Some(_)) => {
            let message = format!(
                "failed to create plugin config for {:?}/{:?}: only one of [plugin_data, plugin_data_file] can be used",
                kind.key, name.key
            );
            resolver.problem(&path, message, "");
            return None;
        }
        (_, Some(file)) => PluginData::File(file.into()),
        _ => PluginData::Inline(inline_data(&name.value)),
    };
    Some(PluginConfig {
        kind: kind.key.clone(),
        name: name.key.clone(),
        enabled: raw.enabled.unwrap_or(true),
        data,
        command: (!raw.plugin_cmd.is_empty()).then(|| raw.plugin_cmd.into()),
        args: raw.plugin_args,
        checksum: raw.plugin_checksum,
        pos: Some(name.pos),
    })
}

/// All `plugin_data` blocks of a plugin as one object.
fn inline_data(plugin: &Value) -> Value {
    let blocks: Vec<&Item> = items(plugin).into_iter().filter(|i| i.key.eq_ignore_ascii_case("plugin_data")).collect();
    match blocks.as_slice() {
        [] => Value::empty(),
        [only] => only.value.clone(),
        [first, ..] => {
            let items = blocks.iter().flat_map(|b| items(&b.value)).cloned().collect();
            Value { pos: first.value.pos, kind: Kind::Object(finial_hcl::Object { items }) }
        }
    }
}
