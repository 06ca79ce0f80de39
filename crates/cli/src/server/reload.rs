//! SIGHUP: the server reads its file again and puts in force what can change while it runs.

use crate::launch;
use finial_config::{ConfigError, Loaded, ServerSettings};
use finial_runtime::log::LogHandle;
use finial_runtime::{Shutdown, Spawner};
use finial_server::live::{Live, LiveSettings};
use std::convert::Infallible;
use std::sync::Arc;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Reads and checks the file as at the start.
pub(super) type Load = dyn Fn() -> Result<Loaded<ServerSettings>, Box<ConfigError>> + Send + Sync;

/// What a reload works on.
pub(super) struct Reloader {
    pub(super) load: Arc<Load>,
    /// Those of the last file that was good.
    pub(super) settings: ServerSettings,
    pub(super) live: LiveSettings,
    pub(super) log: LogHandle,
}

impl Reloader {
    /// Reloads at each SIGHUP until shutdown.
    ///
    /// # Errors
    /// When the signal's handler cannot be installed.
    pub(super) fn start(self, spawner: &Spawner) -> std::io::Result<()> {
        let hangup = signal(SignalKind::hangup())?;
        let (reading, shutdown) = (spawner.clone(), spawner.shutdown());
        spawner.service("reload", async move {
            self.run(hangup, reading, shutdown).await;
            Ok::<(), Infallible>(())
        });
        Ok(())
    }

    async fn run(mut self, mut hangup: Signal, spawner: Spawner, shutdown: Shutdown) {
        loop {
            tokio::select! {
                _ = hangup.recv() => {}
                () = shutdown.cancelled() => return,
            }
            let load = self.load.clone();
            // Files and names are looked up: not on the threads that answer.
            match spawner.blocking(move || load()).await {
                Ok(Ok(loaded)) => self.take(loaded),
                Ok(Err(error)) => refuse(&error),
                Err(error) => tracing::error!(%error, "Configuration was not reloaded"),
            }
        }
    }

    fn take(&mut self, loaded: Loaded<ServerSettings>) {
        launch::log_notices(&loaded.notices);
        let settings = loaded.settings;
        let mut changed = Vec::new();
        // Who has set another level by the API keeps it until the file says something new.
        if settings.log.level != self.settings.log.level {
            self.log.relaunch(launch::level(settings.log.level));
            changed.push("log_level");
        }
        let (before, after) = (self.live.now(), Live::of(&settings));
        changed.extend((before.admin_ids != after.admin_ids).then_some("admin_ids"));
        changed.extend((before.rate_limit != after.rate_limit).then_some("ratelimit"));
        changed.extend((before.federates_with != after.federates_with).then_some("federates_with"));
        self.live.set(after);
        for key in restart_needed(&self.settings, &settings) {
            tracing::warn!(key, "{key} has changed in the configuration file: it needs a restart to take effect");
        }
        // What needs a restart is warned of at every reload until then.
        let running = std::mem::replace(&mut self.settings, settings);
        keep_unreloadable(&mut self.settings, running);
        tracing::info!(changed = format!("[{}]", changed.join(" ")), "Configuration reloaded");
    }
}

fn refuse(error: &ConfigError) {
    for problem in &error.problems {
        let at = problem.pos.map(|pos| format!("{}:{pos}", error.file.display()));
        tracing::error!(at, hint = problem.hint.as_deref(), "{}", problem.message);
    }
    let problems = error.problems.len();
    tracing::error!(problems, "Configuration was not reloaded: the settings before stay in force");
}

/// Which settings only a restart changes, and their names in the file. Every field is here or reloaded: the compiler sees to it.
macro_rules! unreloadable {
    ($($field:ident: $key:literal,)*) => {
        fn restart_needed(old: &ServerSettings, new: &ServerSettings) -> Vec<&'static str> {
            let ServerSettings { $($field: _,)* admin_ids: _, rate_limit: _, federation: _, log: _ } = old;
            let mut keys: Vec<&'static str> = [$((old.$field != new.$field).then_some($key)),*].into_iter().flatten().collect();
            let endpoint = old.federation.bundle_endpoint != new.federation.bundle_endpoint;
            keys.extend(endpoint.then_some("bundle_endpoint"));
            keys.extend((old.log.file != new.log.file).then_some("log_file"));
            keys.extend((old.log.format != new.log.format).then_some("log_format"));
            keys.extend((old.log.source_location != new.log.source_location).then_some("log_source_location"));
            keys
        }

        /// Puts back what still runs.
        fn keep_unreloadable(settings: &mut ServerSettings, running: ServerSettings) {
            $(settings.$field = running.$field;)*
            settings.federation.bundle_endpoint = running.federation.bundle_endpoint;
            settings.log = finial_config::LogSettings { level: settings.log.level, ..running.log };
        }
    };
}

unreloadable! {
    trust_domain: "trust_domain",
    data_dir: "data_dir",
    bind_address: "bind_address or bind_port",
    socket_path: "socket_path",
    agent_ttl: "agent_ttl",
    x509_svid_ttl: "default_x509_svid_ttl",
    jwt_svid_ttl: "default_jwt_svid_ttl",
    ca_ttl: "ca_ttl",
    ca_key_type: "ca_key_type",
    jwt_key_type: "jwt_key_type",
    jwt_issuer: "jwt_issuer",
    ca_subject: "ca_subject",
    disable_jwt_svids: "disable_jwt_svids",
    audit_log_enabled: "audit_log_enabled",
    prune_agents: "prune_attested_nodes_expired_for",
    proxy_protocol_trusted_cidrs: "proxy_protocol_trusted_cidrs",
    max_attested_node_info_staleness: "max_attested_node_info_staleness",
    agent_spiffe_id_as_selector: "agent_spiffe_id_as_selector",
    policy: "auth_opa_policy_engine",
    require_pq_kem: "require_pq_kem",
    events: "cache and event intervals",
    wit_key_type: "wit_key_type",
    wit_issuer: "wit_issuer",
    wit_svids_enabled: "feature_flags",
    oidc: "experimental oidc",
    profiling: "profiling_enabled",
    telemetry: "telemetry",
    health: "health_checks",
    plugins: "plugins",
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::{SpiffeId, TrustDomain};
    use std::time::Duration;

    fn settings() -> ServerSettings {
        ServerSettings::minimal(TrustDomain::parse("example.org").unwrap(), "/data".into())
    }

    #[test]
    fn what_needs_a_restart_is_named_and_what_does_not_is_not() {
        let old = settings();
        let mut new = settings();
        new.admin_ids.push(SpiffeId::parse("spiffe://example.org/admin").unwrap());
        new.rate_limit.signing = false;
        new.log.level = finial_config::LogLevel::Debug;
        assert!(restart_needed(&old, &new).is_empty());
        new.ca_ttl = Duration::from_secs(7);
        new.log.file = Some("/other".into());
        new.audit_log_enabled = true;
        assert_eq!(restart_needed(&old, &new), ["ca_ttl", "audit_log_enabled", "log_file"]);
        keep_unreloadable(&mut new, old.clone());
        assert!(restart_needed(&old, &new).is_empty());
        assert_eq!(new.log.level, finial_config::LogLevel::Debug);
        assert_eq!(new.admin_ids.len(), 1);
    }
    #[test]
    fn a_comment_is_no_change_and_a_plugins_new_data_is() {
        let load = |text: &str| {
            let path = std::path::Path::new("server.conf");
            finial_config::parse_server(path, text, &finial_config::ServerOverrides::default()).unwrap().settings
        };
        let text = include_str!("../../../config/tests/data/server.conf");
        let (old, commented) = (load(text), load(&format!("# what this server is for\n{text}")));
        assert_ne!(old.plugins[0].pos, commented.plugins[0].pos);
        assert_eq!(restart_needed(&old, &commented), [""; 0]);
        assert!(text.contains("sqlite3"));
        assert_eq!(restart_needed(&old, &load(&text.replace("sqlite3", "mysql"))), ["plugins"]);
    }
}
