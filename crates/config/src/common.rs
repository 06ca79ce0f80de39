//! What server and agent settings share.

use finial_core::SpiffeId;
use std::path::PathBuf;

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Only what ends the process.
    Panic,
    /// Only what ends the process.
    Fatal,
    /// What went wrong.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what happens (default).
    #[default]
    Info,
    /// And how.
    Debug,
    /// And everything else.
    Trace,
}

impl LogLevel {
    /// Parses logrus's names, in any case; `warning` is `warn`.
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text.to_ascii_lowercase().as_str() {
            "panic" => Self::Panic,
            "fatal" => Self::Fatal,
            "error" => Self::Error,
            "warn" | "warning" => Self::Warn,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return None,
        })
    }

    /// The name as logrus prints it: `warning` for [`LogLevel::Warn`].
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Panic => "panic",
            Self::Fatal => "fatal",
            Self::Error => "error",
            Self::Warn => "warning",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// `time=… level=… msg=…`, times to the second: nothing configured (default).
    #[default]
    Default,
    /// The same, times with fractions: `text`.
    Text,
    /// One JSON object a line.
    Json,
}

/// Where and how to log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogSettings {
    /// `log_level`, default info.
    pub level: LogLevel,
    /// `log_format`, default text.
    pub format: LogFormat,
    /// `log_file`: appended to, reopened on SIGUSR2. None: standard output, as SPIRE does.
    pub file: Option<PathBuf>,
    /// `log_source_location`: adds the source file and line, default false.
    pub source_location: bool,
}

/// `profiling_*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProfilingSettings {
    /// Default false.
    pub enabled: bool,
    /// TCP port on localhost, 0 if not set.
    pub port: u16,
    /// How often profiles are dumped, in seconds; 0: never.
    pub frequency_seconds: u32,
    /// Which profiles.
    pub names: Vec<String>,
}

/// `telemetry { }`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TelemetrySettings {
    /// Serves metrics for Prometheus to fetch.
    pub prometheus: Option<PrometheusSettings>,
    /// Addresses (`host:port`) of DogStatsd sinks.
    pub dogstatsd: Vec<String>,
    /// Addresses (`host:port`) of Statsd sinks.
    pub statsd: Vec<String>,
    /// M3 sinks.
    pub m3: Vec<M3Sink>,
    /// Keeps metrics in memory and dumps them on SIGUSR1.
    pub in_mem: bool,
    /// `MetricPrefix`; None: `spire_server` or `spire_agent`.
    pub metric_prefix: Option<String>,
    /// `EnableTrustDomainLabel`, default false.
    pub trust_domain_label: bool,
    /// `EnableHostnameLabel`, default true. None if not written.
    pub hostname_label: Option<bool>,
    /// Metric name prefixes to let through, parts joined by `.`; empty: all.
    pub allowed_prefixes: Vec<String>,
    /// Metric name prefixes to drop.
    pub blocked_prefixes: Vec<String>,
    /// Labels to let through; empty: all.
    pub allowed_labels: Vec<String>,
    /// Labels to drop.
    pub blocked_labels: Vec<String>,
}

impl TelemetrySettings {
    /// Whether any sink is configured.
    pub fn enabled(&self) -> bool {
        self.prometheus.is_some()
            || self.in_mem
            || !self.dogstatsd.is_empty()
            || !self.statsd.is_empty()
            || !self.m3.is_empty()
    }
}

/// `Prometheus { }`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrometheusSettings {
    /// Host to listen on; default `localhost`.
    pub host: String,
    /// TCP port to listen on.
    pub port: u16,
    /// Serve over TLS.
    pub tls: Option<PrometheusTls>,
}

/// `Prometheus { tls { } }`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrometheusTls {
    /// `cert_file` and `key_file`: a chain and its key, PEM. None (`use_spire_svid`): the server's or agent's own SVID.
    pub files: Option<(PathBuf, PathBuf)>,
    /// `client_ca_file`: PEM roots of the certificates that clients must have; not with `authorized_spiffe_ids`.
    pub client_ca_file: Option<PathBuf>,
    /// `authorized_spiffe_ids`: whose SVIDs may fetch; empty: no SVID is asked for.
    pub authorized_spiffe_ids: Vec<SpiffeId>,
}

/// `M3 { }`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct M3Sink {
    /// `host:port`.
    pub address: String,
    /// Environment tag.
    pub env: String,
}

/// `health_checks { }`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthSettings {
    /// `listener_enabled`, default false.
    pub listener_enabled: bool,
    /// `bind_address`, default `localhost`; without brackets.
    pub bind_address: String,
    /// `bind_port`, default 80.
    pub bind_port: u16,
    /// `live_path`, default `/live`.
    pub live_path: String,
    /// `ready_path`, default `/ready`.
    pub ready_path: String,
}

impl Default for HealthSettings {
    fn default() -> Self {
        Self {
            listener_enabled: false,
            bind_address: "localhost".into(),
            bind_port: 80,
            live_path: "/live".into(),
            ready_path: "/ready".into(),
        }
    }
}
