//! `spire-server run` and `validate`.

use crate::app::{Command, Run};
use crate::context::Context;
use crate::goflag::FlagSet;
use crate::launch;
use crate::server::reload::{Load, Reloader};
use finial_config::{
    ConfigError, Loaded, PrometheusSettings, SERVER_CONFIG_DEFAULT, ServerOverrides, ServerSettings, load_server,
};
use finial_core::{Clock, SystemClock};
use finial_crypto::TrustRoots;
use finial_crypto::tls::{BundleSource, KeyExchange};
use finial_net::prometheus::{self, MetricsError, MetricsTls};
use finial_net::serving_cert::CertFiles;
use finial_plugin::PluginContext;
use finial_runtime::health::Health;
use finial_runtime::log::LogHandle;
use finial_runtime::{BoxError, Metrics, Spawner, telemetry};
use finial_server::publish::BundleFeed;
use finial_server::{Environment, Running};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Weak};

pub(crate) const COMMANDS: &[Command] = &[
    Command::own("run", "Runs the server", flags, Run::Blocking(run), Some(""), true),
    Command::own(
        "validate",
        "Validates a SPIRE server configuration file",
        flags,
        Run::Blocking(super::validate::validate),
        Some("SPIRE server configuration file is invalid: "),
        true,
    ),
];

fn flags(set: &mut FlagSet) {
    set.string("bindAddress", "", "IP address or DNS name of the SPIRE server");
    set.int("serverPort", 0, "Port number of the SPIRE server");
    set.string("config", "", "Path to a SPIRE config file");
    set.string("dataDir", "", "Directory to store runtime data to");
    set.string("logFile", "", "File to write logs to");
    set.string("logFormat", "", "'text' or 'json'");
    set.bool("logSourceLocation", "Include source file, line number and function name in log lines");
    set.string("logLevel", "", "'debug', 'info', 'warn', or 'error'");
    set.string("trustDomain", "", "The trust domain that this server belongs to");
    set.bool("expandEnv", "Expand environment variables in SPIRE config file");
    set.string("socketPath", "", "Path to bind the SPIRE Server API socket to");
}

pub(super) fn load(cx: &Context) -> Result<Loaded<ServerSettings>, Box<ConfigError>> {
    let text = |name| cx.flags.string(name).to_owned();
    let overrides = ServerOverrides {
        bind_address: text("bindAddress"),
        bind_port: cx.flags.int("serverPort"),
        data_dir: text("dataDir"),
        log_file: text("logFile"),
        log_format: text("logFormat"),
        log_level: text("logLevel"),
        log_source_location: cx.flags.bool("logSourceLocation"),
        socket_path: text("socketPath"),
        trust_domain: text("trustDomain"),
    };
    load_server(config_path(cx), cx.flags.bool("expandEnv"), &|name| cx.io.var(name), &overrides)
}

pub(super) fn config_path(cx: &Context) -> &Path {
    match cx.flags.string("config") {
        "" => Path::new(SERVER_CONFIG_DEFAULT),
        path => Path::new(path),
    }
}

fn run(cx: Context) -> anyhow::Result<()> {
    let Loaded { settings, notices, .. } = load(&cx).map_err(|error| launch::refuse_config(&cx, &error))?;
    let log = launch::prepare(&cx, &settings.log, &notices)?;
    let workers = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).max(2);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?;
    let reload: Arc<Load> = Arc::new(move || load(&cx));
    launch::run("Server", runtime, log.clone(), |spawner| serve(settings, reload, spawner, log))
}

/// Those that the server knows, while it runs.
struct Bundles(Weak<BundleFeed>);

impl BundleSource for Bundles {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        self.0.upgrade()?.x509_roots(trust_domain)
    }
}

fn could_not_serve_metrics(error: &str, address: &str) {
    tracing::warn!(subsystem_name = "telemetry", error, address, "Could not serve metrics");
}

/// Metrics with the server's own SVID, or for clients with one: once the server has its own.
async fn metrics_over_tls(
    prometheus: &PrometheusSettings,
    settings: &ServerSettings,
    metrics: Metrics,
    running: &Running,
    clock: Arc<dyn Clock>,
    spawner: &Spawner,
) -> Result<(), BoxError> {
    let Some(tls) = &prometheus.tls else { return Ok(()) };
    let tls = MetricsTls {
        files: tls.files.clone().map(|(certificate, key)| CertFiles { certificate, key }),
        own: running.identity.clone(),
        client_ca: tls.client_ca_file.clone(),
        authorized: tls.authorized_spiffe_ids.clone(),
        bundles: Arc::new(Bundles(running.bundles.clone())),
        exchange: KeyExchange::post_quantum(settings.require_pq_kem),
    };
    let address = launch::host_port(&prometheus.host, prometheus.port);
    match prometheus::serve(metrics, &address, tls, clock, spawner).await {
        Err(MetricsError::Listen(error)) => could_not_serve_metrics(&error, &address),
        served => served?,
    }
    Ok(())
}

async fn serve(settings: ServerSettings, reload: Arc<Load>, spawner: Spawner, log: LogHandle) -> Result<(), BoxError> {
    let admin_ids: Vec<&str> = settings.admin_ids.iter().map(finial_core::SpiffeId::as_str).collect();
    tracing::info!(
        admin_ids = format!("[{}]", admin_ids.join(" ")),
        data_dir = %settings.data_dir.display(),
        launch_log_level = log.launch_level().as_str(),
        version = crate::version(),
        "Configured"
    );
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&settings.data_dir).map_err(|error| {
        let reason = crate::context::errno_text(&error);
        format!("failed to create data directory {}: {reason}", settings.data_dir.display())
    })?;
    launch::log_left_out(&launch::telemetry_left_out(&settings.telemetry));
    let metrics = launch::metrics(&settings.telemetry, "spire_server", &settings.trust_domain);
    metrics.push_to_all(&settings.telemetry.statsd, &settings.telemetry.dogstatsd, &spawner).await?;
    metrics.started(&crate::version(), settings.trust_domain.as_str());
    if settings.telemetry.in_mem {
        metrics.log_on_sigusr1(&spawner)?;
    }
    let prometheus = settings.telemetry.prometheus.as_ref();
    if let Some(plain) = prometheus.filter(|p| p.tls.is_none()) {
        let address = launch::host_port(&plain.host, plain.port);
        if let Err(error) = telemetry::serve_prometheus(metrics.clone(), &address, &spawner).await {
            could_not_serve_metrics(&finial_runtime::listen_text(&address, &error), &address);
        }
    }
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let context = PluginContext { trust_domain: settings.trust_domain.clone(), clock: clock.clone() };
    let plugins = finial_catalog::build_server_plugins(&settings.plugins, &context, &spawner);
    let Some(plugins) = launch::unless_shutdown(spawner.shutdown(), plugins).await else { return Ok(()) };
    let plugins = plugins?;
    let health = Health::default();
    let environment = Environment {
        clock: clock.clone(),
        spawner: spawner.clone(),
        metrics: metrics.clone(),
        health: health.clone(),
        log: Some(log.clone()),
    };
    let starting = finial_server::start(&settings, plugins, environment);
    let running = match launch::unless_shutdown(spawner.shutdown(), starting).await {
        Some(started) => started?,
        None => return Ok(()),
    };
    if let Some(endpoint) = &settings.oidc {
        let serving = crate::oidc::beside(endpoint.clone(), running.bundles.clone(), clock.clone(), &spawner).await;
        serving.map_err(|error| format!("experimental oidc: {error}"))?;
    }
    if let Some(prometheus) = prometheus {
        metrics_over_tls(prometheus, &settings, metrics, &running, clock, &spawner).await?;
    }
    health.start(&launch::health_settings(&settings.health), &spawner).await;
    Reloader { load: reload, settings, live: running.live, log }.start(&spawner)?;
    Ok(())
}
