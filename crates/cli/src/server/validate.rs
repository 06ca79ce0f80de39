//! `spire-server validate`: everything that is wrong with a file, in one run, with its place and what to do.

use super::run::{config_path, load};
use crate::app::Exit;
use crate::context::Context;
use crate::launch::{self, LeftOut};
use finial_catalog::CatalogError;
use finial_config::{Loaded, Notice, PluginConfig, Problem, Readable, ServerSettings};
use finial_core::{SystemClock, TrustDomain};
use finial_plugin::PluginContext;
use finial_store::SqlConfig;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

/// A problem with the plugins: of whom, and whether SPIRE tells it before any other.
struct Found {
    /// As SPIRE's list names it: `KeyManager "disk"`.
    who: String,
    problem: Problem,
    is_fatal: bool,
}

pub(super) fn validate(cx: Context) -> anyhow::Result<()> {
    let text = match load(&cx) {
        Ok(loaded) => {
            say_warnings(&cx, &loaded);
            let found = plugin_problems(&loaded.settings.plugins, &loaded.settings.trust_domain);
            if found.is_empty() {
                cx.println("SPIRE server configuration file is valid.");
                return Ok(());
            }
            in_spires_form(config_path(&cx), &found)
        }
        Err(mut error) => {
            if let Some(Readable::Server(loaded)) = &error.readable {
                say_warnings(&cx, loaded);
            }
            // any name will do where the file has none
            let trust_domain = error.trust_domain.clone().or_else(|| TrustDomain::parse("invalid").ok());
            if let (Some(plugins), Some(trust_domain)) = (&error.plugins, trust_domain) {
                let found = plugin_problems(plugins, &trust_domain);
                error.problems.extend(found.into_iter().map(|found| {
                    let message = format!("{}: {}", found.who, found.problem.message);
                    Problem { message, ..found.problem }
                }));
            }
            format!("SPIRE server configuration file is invalid: {error}\n")
        }
    };
    cx.io.err(&text);
    Err(Exit(1).into())
}

/// What `run` would warn of. SPIRE keeps silent here.
fn say_warnings(cx: &Context, loaded: &Loaded<ServerSettings>) {
    for notice in &loaded.notices {
        if let Notice::Warn(text) | Notice::Deprecated(text) = notice {
            cx.eprintln(format!("warning: {text}"));
        }
    }
    launch::warn_of_left_out(cx, config_path(cx), loaded, &left_out(&loaded.settings));
    for text in finial_server::issue::ttl_warnings(&loaded.settings) {
        cx.eprintln(format!("warning: {text}"));
    }
}

/// What is configured and has no effect yet.
fn left_out(settings: &ServerSettings) -> Vec<LeftOut> {
    let mut all = launch::telemetry_left_out(&settings.telemetry);
    if settings.profiling.enabled {
        all.push(LeftOut("profiling_enabled", &["server", "profiling_enabled"]));
    }
    all
}

fn plugin_problems(plugins: &[PluginConfig], trust_domain: &TrustDomain) -> Vec<Found> {
    let context = PluginContext { trust_domain: trust_domain.clone(), clock: Arc::new(SystemClock) };
    let mut found: Vec<Found> = finial_catalog::check_server_plugins(plugins, &context)
        .into_iter()
        .map(|(plugin, error)| {
            let (who, message, is_fatal) = spires_words(plugin, &error);
            Found { who, problem: Problem { message, pos: plugin.and_then(|p| p.pos), hint: error.hint() }, is_fatal }
        })
        .collect();
    for plugin in plugins.iter().filter(|p| p.enabled && p.kind == "DataStore" && p.name == "sql") {
        if let Err((message, pos)) = datastore(plugin) {
            let who = format!("DataStore {:?}", plugin.name);
            found.push(Found {
                who,
                problem: Problem { message, pos: pos.or(plugin.pos), hint: None },
                is_fatal: false,
            });
        }
    }
    found
}

/// What is wrong with the datastore's keys; nothing is connected to.
fn datastore(plugin: &PluginConfig) -> Result<(), (String, Option<finial_hcl::Pos>)> {
    // what cannot be read at all is told with the other plugins
    let Ok(data) = plugin.load_data() else { return Ok(()) };
    let config: SqlConfig = data.parse_into().map_err(|error| (error.to_string(), Some(error.pos)))?;
    config.resolve().map(drop).map_err(|error| (error.to_string(), Some(data.pos)))
}

fn spires_words(plugin: Option<&PluginConfig>, error: &CatalogError) -> (String, String, bool) {
    let who = plugin.map(|p| format!("{} {:?}", p.kind, p.name)).unwrap_or_default();
    match error {
        CatalogError::Count { kind: "DataStore", got: 0, .. } => {
            ("DataStore \"sql\"".into(), "'datastore' must be configured".into(), false)
        }
        CatalogError::Count { kind, expected, got } => {
            ((*kind).into(), format!("constraint not satisfied: expected {expected} but got {got}"), false)
        }
        CatalogError::Configure { source, .. } => (who, source.to_string(), false),
        CatalogError::Data { source, .. } => (who, format!("failed to read plugin configuration: {source}"), false),
        CatalogError::Unknown { name, .. } => (who, format!("failed to load plugin {name:?}: {error}"), true),
        other => (who, other.to_string(), true),
    }
}

/// SPIRE's list, with the place and the advice below each line of it. What SPIRE stops at stands first.
fn in_spires_form(file: &Path, found: &[Found]) -> String {
    let mut out = String::new();
    // writing to memory does not fail
    let rest = |out: &mut String, indent: &str, problem: &Problem| {
        if let Some(pos) = problem.pos {
            let _ = writeln!(out, "{indent}  at {}:{pos}", file.display());
        }
        if let Some(hint) = &problem.hint {
            let _ = writeln!(out, "{indent}  hint: {hint}");
        }
    };
    for found in found.iter().filter(|found| found.is_fatal) {
        let _ = writeln!(out, "Could not validate configuration file: {}", found.problem.message);
        rest(&mut out, "", &found.problem);
    }
    let mut others: Vec<&Found> = found.iter().filter(|found| !found.is_fatal).collect();
    if others.is_empty() {
        return out;
    }
    others.sort_by(|a, b| a.who.cmp(&b.who));
    out.push_str("SPIRE server configuration file is invalid.\nValidation errors:\n");
    let mut who = "";
    for found in others {
        if found.who != who {
            let _ = writeln!(out, "\t{}:", found.who);
            who = &found.who;
        }
        let _ = writeln!(out, "\t\t{}", found.problem.message);
        rest(&mut out, "\t\t", &found.problem);
    }
    out
}
