//! Metrics with SPIRE's names, in Prometheus' text form and pushed to StatsD and DogStatsD.

mod filter;
mod names;
mod process;
mod push;
mod store;

pub use filter::Filter;
pub use names::{rpc_key, status_name};
pub use push::Form;

use crate::Spawner;
use crate::http::{Answer, serve};
use finial_core::ErrorKind;
use http::StatusCode;
use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;
use store::{Kind, Store};
use tokio::signal::unix::{SignalKind, signal};

/// What names look like and which labels all of them have.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// First part of each name: `spire_server` or `spire_agent` unless configured.
    pub prefix: String,
    /// Adds the label `host` with this value (on by default in SPIRE: the machine's name).
    pub host: Option<String>,
    /// Adds the label `trust_domain_id` with this value (off by default).
    pub trust_domain: Option<String>,
    /// What is let through.
    pub filter: Filter,
}

struct Inner {
    settings: Settings,
    started: Instant,
    store: Mutex<Store>,
    sinks: RwLock<Vec<push::Sink>>,
}

/// Takes measurements. Clones share one store; a disabled one does nothing and costs nothing.
///
/// Keys are written as SPIRE documents them, parts joined by dots (`server_ca.sign.x509_svid`); Prometheus shows
/// `spire_server_server_ca_sign_x509_svid`. Label values keep letters, digits and `_` only, as SPIRE's do.
#[derive(Clone, Default)]
pub struct Metrics(Option<Arc<Inner>>);

impl Metrics {
    /// Measures nothing.
    pub fn disabled() -> Self {
        Self::default()
    }

    /// Measures.
    pub fn new(settings: Settings) -> Self {
        Self(Some(Arc::new(Inner {
            settings,
            started: Instant::now(),
            store: Mutex::default(),
            sinks: RwLock::default(),
        })))
    }

    /// From now on sends each measurement to `address` (`host:port`) over UDP, until shutdown. Does nothing when disabled.
    ///
    /// # Errors
    /// When the name is not known or there is no socket to be had. Whether anybody listens there is not known.
    pub async fn push_to(&self, form: Form, address: &str, spawner: &Spawner) -> std::io::Result<()> {
        let Some(inner) = &self.0 else { return Ok(()) };
        let sink = push::Sink::open(form, address, spawner).await?;
        inner.sinks.write().unwrap_or_else(PoisonError::into_inner).push(sink);
        Ok(())
    }

    /// [`Metrics::push_to`] each of these addresses.
    ///
    /// # Errors
    /// Names the first sink that cannot be sent to.
    pub async fn push_to_all(&self, statsd: &[String], dogstatsd: &[String], spawner: &Spawner) -> Result<(), String> {
        let statsd = statsd.iter().map(|address| (Form::Statsd, address));
        for (form, address) in statsd.chain(dogstatsd.iter().map(|address| (Form::DogStatsd, address))) {
            let failed = |error| format!("telemetry {form:?} {address}: {}", crate::errno_text(&error));
            self.push_to(form, address, spawner).await.map_err(failed)?;
        }
        Ok(())
    }

    /// `InMem { }`: on SIGUSR1 all that was measured is written to the log, until shutdown, as lines of Prometheus' text form.
    ///
    /// # Errors
    /// When the signal cannot be listened for.
    pub fn log_on_sigusr1(&self, spawner: &Spawner) -> std::io::Result<()> {
        let mut asked = signal(SignalKind::user_defined1())?;
        let (metrics, shutdown) = (self.clone(), spawner.shutdown());
        spawner.service("metrics on SIGUSR1", async move {
            loop {
                tokio::select! {
                    _ = asked.recv() => {}
                    () = shutdown.cancelled() => return Ok::<(), std::convert::Infallible>(()),
                }
                for line in metrics.render().lines().filter(|line| !line.starts_with('#')) {
                    tracing::info!(subsystem_name = "telemetry", "{line}");
                }
            }
        });
        Ok(())
    }

    /// Whether anything is measured at all.
    pub fn is_enabled(&self) -> bool {
        self.0.is_some()
    }

    /// Adds to a counter.
    pub fn count(&self, key: &str, by: f64, labels: &[(&str, &str)]) {
        self.put(Kind::Counter, key, by, labels);
    }

    /// Sets a gauge.
    pub fn gauge(&self, key: &str, value: f64, labels: &[(&str, &str)]) {
        self.put(Kind::Gauge, key, value, labels);
    }

    /// Adds a sample to a summary; times are in milliseconds.
    pub fn sample(&self, key: &str, value: f64, labels: &[(&str, &str)]) {
        self.put(Kind::Summary, key, value, labels);
    }

    /// Says that the program has started: the gauge `started`.
    pub fn started(&self, version: &str, trust_domain: &str) {
        self.gauge("started", 1.0, &[("version", version), ("trust_domain_id", trust_domain)]);
    }

    /// Starts a call: when it ends, `key` is counted and `key.elapsed_time` sampled, both with the label `status`.
    pub fn call(&self, key: impl Into<Cow<'static, str>>) -> CallTimer {
        let state = self.is_enabled().then(|| (key.into(), Instant::now(), Vec::new()));
        CallTimer { metrics: self.clone(), state }
    }

    /// All that was measured, in Prometheus' text form, ordered by name.
    pub fn render(&self) -> String {
        let Some(inner) = &self.0 else { return String::new() };
        self.gauge("uptime_in_ms", inner.started.elapsed().as_millis() as f64, &[]);
        inner.store.lock().unwrap_or_else(PoisonError::into_inner).render()
    }

    fn put(&self, kind: Kind, key: &str, value: f64, labels: &[(&str, &str)]) {
        let Some(inner) = &self.0 else { return };
        let settings = &inner.settings;
        if !settings.filter.allows(&settings.prefix, key) {
            return;
        }
        let name = names::metric_name(&settings.prefix, key);
        let fixed = [("trust_domain_id", &settings.trust_domain), ("host", &settings.host)];
        let passes = |name: &str| settings.filter.allows_label(name);
        let fixed = fixed.into_iter().filter_map(|(name, value)| value.as_deref().map(|value| (name, value)));
        let fixed = fixed.filter(|(name, _)| passes(name));
        let labels = labels.iter().copied().filter(|(name, _)| passes(name));
        for sink in inner.sinks.read().unwrap_or_else(PoisonError::into_inner).iter() {
            sink.put(kind, &settings.prefix, key, value, labels.clone().chain(fixed.clone()));
        }
        let labels = names::label_text(fixed.chain(labels));
        inner.store.lock().unwrap_or_else(PoisonError::into_inner).put(kind, name, labels, value);
    }
}

/// A call that is being measured. Dropped unfinished it counts as `Canceled`: its caller went away.
pub struct CallTimer {
    metrics: Metrics,
    #[allow(clippy::type_complexity)]
    state: Option<(Cow<'static, str>, Instant, Vec<(&'static str, String)>)>,
}

impl CallTimer {
    /// Adds a label.
    pub fn label(&mut self, name: &'static str, value: &str) {
        if let Some((_, _, labels)) = &mut self.state {
            labels.push((name, value.to_owned()));
        }
    }

    /// Ends it with a gRPC status name, such as `OK` or `InvalidArgument`.
    pub fn finish(mut self, status: &'static str) {
        self.end(status);
    }

    /// Ends it with `OK`, or the status of the error's kind.
    pub fn finish_with<T, E>(mut self, result: &Result<T, E>, kind: impl FnOnce(&E) -> ErrorKind) {
        self.end(match result {
            Ok(_) => "OK",
            Err(error) => status_name(kind(error)),
        });
    }

    /// Forgets it.
    pub fn discard(mut self) {
        self.state = None;
    }

    fn end(&mut self, status: &str) {
        let Some((key, start, labels)) = self.state.take() else { return };
        let mut all: Vec<_> = labels.iter().map(|(name, value)| (*name, value.as_str())).collect();
        all.push(("status", status));
        self.metrics.count(&key, 1.0, &all);
        self.metrics.sample(&format!("{key}.elapsed_time"), start.elapsed().as_secs_f64() * 1000.0, &all);
    }
}

impl Drop for CallTimer {
    fn drop(&mut self) {
        self.end("Canceled");
    }
}

/// Serves the metrics over HTTP on `address` (`host:port`) until shutdown, on any path, as SPIRE does.
///
/// # Errors
/// When the address cannot be listened on. SPIRE warns then and goes on.
pub async fn serve_prometheus(metrics: Metrics, address: &str, spawner: &Spawner) -> std::io::Result<SocketAddr> {
    let local = serve("prometheus", address, Arc::new(move |_: &str| page(&metrics)), spawner).await?;
    log_prometheus(address);
    Ok(local)
}

/// What a scraper is answered: what was measured, and the process itself, which no filter keeps back (as in SPIRE).
pub fn page(metrics: &Metrics) -> Answer {
    Answer {
        status: StatusCode::OK,
        content_type: "text/plain; version=0.0.4; charset=utf-8; escaping=underscores",
        body: metrics.render() + &process::render(),
    }
}

/// Says that metrics are served on `address` (`host:port`).
pub fn log_prometheus(address: &str) {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
    if host != "localhost" {
        tracing::warn!(
            subsystem_name = "telemetry",
            "Agent is now configured to accept remote network connections for Prometheus stats collection. Please ensure \
             access to this port is tightly controlled"
        );
    }
    tracing::info!(subsystem_name = "telemetry", host, port, "Starting prometheus exporter");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Supervisor;

    fn metrics() -> Metrics {
        Metrics::new(Settings { prefix: "spire_server".to_owned(), host: Some("vm".to_owned()), ..Settings::default() })
    }

    /// The expected text follows what SPIRE 1.15.3 shows.
    #[test]
    fn the_text_is_that_of_spire() {
        let metrics = metrics();
        metrics.count("ca.manager.x509_ca.activate", 1.0, &[]);
        metrics.count("rpc.agent.v1.agent.create_join_token", 1.0, &[("status", "OK")]);
        metrics.count("rpc.agent.v1.agent.create_join_token", 1.0, &[("status", "OK")]);
        metrics.gauge("manager.x509_ca.rotate.expiration", 1_795_471_767.0, &[("trust_domain_id", "example.org")]);
        metrics.started("1.15.3", "example.org");
        metrics.sample("svid.rotate.elapsed_time", 0.5, &[("status", "OK")]);
        let text = metrics.render();
        for expected in [
            "# HELP spire_server_ca_manager_x509_ca_activate spire_server_ca_manager_x509_ca_activate\n\
             # TYPE spire_server_ca_manager_x509_ca_activate counter\n\
             spire_server_ca_manager_x509_ca_activate{host=\"vm\"} 1\n",
            "spire_server_rpc_agent_v1_agent_create_join_token{host=\"vm\",status=\"OK\"} 2\n",
            "# TYPE spire_server_manager_x509_ca_rotate_expiration gauge\n\
             spire_server_manager_x509_ca_rotate_expiration{host=\"vm\",trust_domain_id=\"example_org\"} 1.795471767e+09\n",
            "spire_server_started{host=\"vm\",trust_domain_id=\"example_org\",version=\"1_15_3\"} 1\n",
            "# TYPE spire_server_svid_rotate_elapsed_time summary\n\
             spire_server_svid_rotate_elapsed_time{host=\"vm\",status=\"OK\",quantile=\"0.5\"} 0.5\n\
             spire_server_svid_rotate_elapsed_time{host=\"vm\",status=\"OK\",quantile=\"0.9\"} 0.5\n\
             spire_server_svid_rotate_elapsed_time{host=\"vm\",status=\"OK\",quantile=\"0.99\"} 0.5\n\
             spire_server_svid_rotate_elapsed_time_sum{host=\"vm\",status=\"OK\"} 0.5\n\
             spire_server_svid_rotate_elapsed_time_count{host=\"vm\",status=\"OK\"} 1\n",
            "# TYPE spire_server_uptime_in_ms gauge\n",
        ] {
            assert!(text.contains(expected), "missing:\n{expected}\nin:\n{text}");
        }
    }

    #[test]
    fn what_is_filtered_reaches_no_sink() {
        let filter = Filter::new(&[], &["spire_server.rpc".into()], &[], &["host".into()]);
        let metrics = Metrics::new(Settings {
            prefix: "spire_server".into(),
            host: Some("vm".into()),
            filter,
            ..Settings::default()
        });
        metrics.count("rpc.agent.v1.agent.ban_agent", 1.0, &[]);
        metrics.count("svid.rotate", 1.0, &[("status", "OK"), ("host", "x")]);
        let text = metrics.render();
        assert!(text.contains("spire_server_svid_rotate{status=\"OK\"} 1\n") && !text.contains("rpc"), "{text}");
    }

    #[test]
    fn a_call_counts_with_its_status_however_it_ends() {
        let metrics = metrics();
        let mut call = metrics.call("svid.rotate");
        call.label("attestor", "x509pop");
        call.finish_with(&Err::<(), _>("no"), |_| ErrorKind::Denied);
        drop(metrics.call("svid.rotate"));
        metrics.call("svid.rotate").discard();
        let text = metrics.render();
        assert!(
            text.contains("svid_rotate{attestor=\"x509pop\",host=\"vm\",status=\"PermissionDenied\"} 1\n"),
            "{text}"
        );
        assert!(text.contains("svid_rotate_elapsed_time_count{host=\"vm\",status=\"Canceled\"} 1\n"), "{text}");
        assert!(!text.contains("OK"));
        assert_eq!(Metrics::disabled().render(), "");
    }

    #[tokio::test]
    async fn they_are_served_on_any_path() {
        let supervisor = Supervisor::default();
        let metrics = metrics();
        metrics.count("svid.rotate", 1.0, &[]);
        let address = serve_prometheus(metrics, "127.0.0.1:0", &supervisor.spawner()).await.expect("listens");
        let answer = crate::http::testing::get(address, "/other").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        assert!(answer.contains("spire_server_svid_rotate{host=\"vm\"} 1"));
    }
}
