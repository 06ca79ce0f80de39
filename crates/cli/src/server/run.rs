//! `spire-server run` and `validate`.

use crate::app::{Command, Exit, Run};
use crate::context::Context;
use crate::goflag::FlagSet;
use crate::launch;
use finial_catalog::CatalogError;
use finial_config::{
    ConfigError, Loaded, PluginConfig, SERVER_CONFIG_DEFAULT, ServerOverrides, ServerSettings, load_server,
};
use finial_core::SystemClock;
use finial_plugin::PluginContext;
use finial_runtime::health::Health;
use finial_runtime::log::LogHandle;
use finial_runtime::{BoxError, Spawner, telemetry};
use finial_server::Environment;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

pub(crate) const COMMANDS: &[Command] = &[
    Command::own("run", "Runs the server", flags, Run::Blocking(run), Some(""), true),
    Command::own(
        "validate",
        "Validates a SPIRE server configuration file",
        flags,
        Run::Blocking(validate),
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

fn load(cx: &Context) -> Result<Loaded<ServerSettings>, Box<ConfigError>> {
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
    let path = match cx.flags.string("config") {
        "" => SERVER_CONFIG_DEFAULT,
        path => path,
    };
    load_server(Path::new(path), cx.flags.bool("expandEnv"), &|name| cx.io.var(name), &overrides)
}

fn validate(cx: Context) -> anyhow::Result<()> {
    let settings = match load(&cx) {
        Ok(loaded) => loaded.settings,
        Err(error) => {
            cx.eprintln(format!("SPIRE server configuration file is invalid: {error}"));
            return Err(Exit(1).into());
        }
    };
    let context = PluginContext { trust_domain: settings.trust_domain.clone(), clock: Arc::new(SystemClock) };
    if let Err(error) = finial_catalog::build_server_plugins(&settings.plugins, &context) {
        cx.io.err(&plugin_problem(&error, &settings.plugins));
        return Err(Exit(1).into());
    }
    cx.println("SPIRE server configuration file is valid.");
    Ok(())
}

/// What is wrong with the plugins, in the form that SPIRE gives it.
fn plugin_problem(error: &CatalogError, plugins: &[PluginConfig]) -> String {
    let called = |name: &str| {
        let kind = plugins.iter().find(|p| p.enabled && p.name == name).map(|p| p.kind.as_str()).unwrap_or_default();
        format!("{kind} {name:?}")
    };
    let (who, what) = match error {
        CatalogError::Count { kind: "DataStore", .. } => {
            ("DataStore \"sql\"".into(), "'datastore' must be configured".into())
        }
        CatalogError::Count { kind, expected, got } => {
            ((*kind).into(), format!("constraint not satisfied: expected {expected} but got {got}"))
        }
        CatalogError::Configure { name, source } => (called(name), source.to_string()),
        CatalogError::Data { name, source } => (called(name), format!("failed to read plugin configuration: {source}")),
        CatalogError::Unknown { name, .. } => {
            return format!("Could not validate configuration file: failed to load plugin {name:?}: {error}\n");
        }
        other => return format!("Could not validate configuration file: {other}\n"),
    };
    format!("SPIRE server configuration file is invalid.\nValidation errors:\n\t{who}:\n\t\t{what}\n")
}

fn run(cx: Context) -> anyhow::Result<()> {
    let Loaded { settings, notices } = load(&cx).map_err(|error| launch::refuse_config(&cx, &error))?;
    let log = launch::prepare(&cx, &settings.log, &notices)?;
    let workers = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).max(2);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?;
    launch::run("Server", runtime, log.clone(), |spawner| serve(settings, spawner, log))
}

async fn serve(settings: ServerSettings, spawner: Spawner, log: LogHandle) -> Result<(), BoxError> {
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
    launch::check_telemetry(&settings.telemetry)?;
    let metrics = launch::metrics(&settings.telemetry, "spire_server", &settings.trust_domain);
    metrics.started(&crate::version(), settings.trust_domain.as_str());
    if let Some(prometheus) = &settings.telemetry.prometheus {
        let address = launch::host_port(&prometheus.host, prometheus.port);
        if let Err(error) = telemetry::serve_prometheus(metrics.clone(), &address, &spawner).await {
            let error = finial_runtime::listen_text(&address, &error);
            tracing::warn!(subsystem_name = "telemetry", error, address, "Could not serve metrics");
        }
    }
    let clock: Arc<dyn finial_core::Clock> = Arc::new(SystemClock);
    let context = PluginContext { trust_domain: settings.trust_domain.clone(), clock: clock.clone() };
    let plugins = finial_catalog::build_server_plugins(&settings.plugins, &context)?;
    let health = Health::default();
    let environment = Environment { clock, spawner: spawner.clone(), metrics, health: health.clone(), log: Some(log) };
    let starting = finial_server::start(&settings, plugins, environment);
    match launch::unless_shutdown(spawner.shutdown(), starting).await {
        Some(started) => started?,
        None => return Ok(()),
    };
    health.start(&launch::health_settings(&settings.health), &spawner).await;
    Ok(())
}
