//! What both long-running programs do around their work: log, umask, runtime, signals, the last line and the exit code.

use crate::app::Exit;
use crate::context::Context;
use finial_config::{ConfigError, HealthSettings, Loaded, LogFormat, LogLevel, LogSettings, Notice, TelemetrySettings};
use finial_core::TrustDomain;
use finial_runtime::log::{self, LogHandle};
use finial_runtime::{Metrics, Shutdown, Supervisor, health, signals, telemetry};
use std::future::Future;
use std::path::Path;
use std::time::Duration;

/// How long tasks may take to end after a signal.
const GRACE: Duration = Duration::from_secs(15);
/// What files of ours must not grant: writing by the group, anything to others.
const UMASK_MIN: u32 = 0o027;

/// Says what is wrong with a file: in the log what SPIRE logs, on standard error all of it.
pub(crate) fn refuse_config(cx: &Context, error: &ConfigError) -> anyhow::Error {
    log_now(&error.log, &error.notices);
    cx.eprintln(error.to_string());
    Exit(1).into()
}

/// Says in the log what there is to be said of a file, without more to come.
pub(crate) fn log_now(settings: &LogSettings, notices: &[Notice]) {
    if !notices.is_empty() && start_log(settings).is_ok() {
        log_notices(notices);
    }
}

/// Sets up the process, which has one thread yet: allocator, log, umask. What opens after this is not open to others.
pub(crate) fn prepare(cx: &Context, settings: &LogSettings, notices: &[Notice]) -> anyhow::Result<LogHandle> {
    finial_net::memory::give_back_what_is_freed();
    let handle = match start_log(settings) {
        Ok(handle) => handle,
        Err(error) => {
            let file = settings.file.as_deref().map(|f| f.display().to_string()).unwrap_or_default();
            cx.eprintln(format!("open {file}: {}", crate::context::errno_text(&error)));
            return Err(Exit(1).into());
        }
    };
    log_notices(notices);
    let current = rustix::process::umask(rustix::fs::Mode::from_bits_truncate(UMASK_MIN)).bits();
    let strict = current | UMASK_MIN;
    if strict != current {
        tracing::warn!("Current umask {current:04o} is too permissive; setting umask {strict:04o}");
    }
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(strict));
    Ok(handle)
}

fn start_log(settings: &LogSettings) -> std::io::Result<LogHandle> {
    log::init(&log::Settings {
        level: level(settings.level),
        format: match settings.format {
            LogFormat::Default => log::Format::Default,
            LogFormat::Text => log::Format::Text,
            LogFormat::Json => log::Format::Json,
        },
        file: settings.file.clone(),
        source_location: settings.source_location,
    })
}

/// The log's name for a configured level.
pub(crate) fn level(configured: LogLevel) -> log::Level {
    match configured {
        LogLevel::Panic => log::Level::Panic,
        LogLevel::Fatal => log::Level::Fatal,
        LogLevel::Error => log::Level::Error,
        LogLevel::Warn => log::Level::Warning,
        LogLevel::Info => log::Level::Info,
        LogLevel::Debug => log::Level::Debug,
        LogLevel::Trace => log::Level::Trace,
    }
}

pub(crate) fn log_notices(notices: &[Notice]) {
    for notice in notices {
        match notice {
            Notice::Info(text) => tracing::info!("{text}"),
            Notice::Warn(text) => tracing::warn!("{text}"),
            Notice::Deprecated(text) => tracing::warn!(alert = true, alert_type = "deprecated_config", "{text}"),
            Notice::Unknown { section, keys } => tracing::error!(section, keys, "Unknown configuration detected"),
        }
    }
}

/// Runs `work` under a supervisor with signals until it fails or a signal comes; then drains. `work` gets the supervisor's
/// spawner and ends by itself or when told. `name` is `Server` or `Agent`.
pub(crate) fn run<F, E>(
    name: &str,
    runtime: tokio::runtime::Runtime,
    log: LogHandle,
    work: impl FnOnce(finial_runtime::Spawner) -> F,
) -> anyhow::Result<()>
where
    F: Future<Output = Result<(), E>>,
    E: std::fmt::Display,
{
    let ended = runtime.block_on(async {
        let supervisor = Supervisor::default();
        signals(&supervisor.spawner(), supervisor.shutdown(), Some(log)).map_err(|e| format!("signals: {e}"))?;
        let shutdown = supervisor.shutdown();
        let worked = work(supervisor.spawner()).await.map_err(|e| e.to_string());
        if worked.is_err() {
            shutdown.trigger();
        }
        let drained = supervisor.run(GRACE).await.map_err(|e| e.to_string());
        worked.and(drained)
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    match ended {
        Ok(()) => {
            tracing::info!("{name} stopped gracefully");
            Ok(())
        }
        Err(error) => {
            // SPIRE's agent says the second only
            if name == "Server" {
                tracing::error!(error, "Fatal run error");
            }
            tracing::error!(error, "{name} crashed");
            Err(Exit(1).into())
        }
    }
}

/// Waits for `work`, or for the shutdown if that comes first.
pub(crate) async fn unless_shutdown<T>(shutdown: Shutdown, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        done = work => Some(done),
        () = shutdown.cancelled() => None,
    }
}

/// What is configured and has no effect yet: how it is called, and the path to its key.
pub(crate) struct LeftOut(pub(crate) &'static str, pub(crate) &'static [&'static str]);

/// As `run` and `validate` say it.
fn no_effect_text(name: &str) -> String {
    format!("{name} is not supported yet and has no effect")
}

/// What `validate` says of what has no effect yet, with its place. Nothing of it makes a file invalid.
pub(crate) fn warn_of_left_out<T>(cx: &Context, file: &Path, loaded: &Loaded<T>, left_out: &[LeftOut]) {
    for LeftOut(name, path) in left_out {
        let problem = loaded.problem(path, no_effect_text(name), "take it out if you can do without");
        cx.eprintln(format!("warning: {}", problem.text(file)));
    }
}

/// Which telemetry has no effect yet.
pub(crate) fn telemetry_left_out(settings: &TelemetrySettings) -> Vec<LeftOut> {
    let m3 = (!settings.m3.is_empty()).then_some(LeftOut("telemetry M3", &["telemetry", "M3"]));
    m3.into_iter().collect()
}

/// Warns of what is configured and does not work yet.
pub(crate) fn log_left_out(left_out: &[LeftOut]) {
    for LeftOut(name, _) in left_out {
        tracing::warn!("{}", no_effect_text(name));
    }
}

/// Metrics, if a sink that we have is configured.
pub(crate) fn metrics(settings: &TelemetrySettings, prefix: &str, trust_domain: &TrustDomain) -> Metrics {
    let has_sink = settings.prometheus.is_some() || settings.in_mem;
    if !has_sink && settings.statsd.is_empty() && settings.dogstatsd.is_empty() {
        return Metrics::disabled();
    }
    let host = settings.hostname_label.unwrap_or(true);
    Metrics::new(telemetry::Settings {
        prefix: settings.metric_prefix.clone().unwrap_or_else(|| prefix.into()),
        host: host.then(|| rustix::system::uname().nodename().to_string_lossy().into_owned()),
        trust_domain: settings.trust_domain_label.then(|| trust_domain.as_str().into()),
        filter: telemetry::Filter::new(
            &settings.allowed_prefixes,
            &settings.blocked_prefixes,
            &settings.allowed_labels,
            &settings.blocked_labels,
        ),
    })
}

/// `host:port` with brackets where they are needed.
pub(crate) fn host_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

pub(crate) fn health_settings(settings: &HealthSettings) -> health::Settings {
    health::Settings {
        address: settings.listener_enabled.then(|| host_port(&settings.bind_address, settings.bind_port)),
        live_path: settings.live_path.clone(),
        ready_path: settings.ready_path.clone(),
    }
}
