//! Measuring calls. Costs nothing where nothing is measured.

use super::caller_of;
use finial_runtime::Metrics;
use finial_runtime::telemetry::CallTimer;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use tonic::{Code, Request, Response, Status};

/// Counts the calls that are under way.
#[derive(Clone)]
pub(crate) struct Calls {
    metrics: Metrics,
    names: ApiNames,
    open: Arc<AtomicI64>,
}

/// What an API's calls are counted as.
#[derive(Clone, Copy)]
pub(crate) struct ApiNames {
    begun: &'static str,
    open: &'static str,
}

impl ApiNames {
    pub(crate) const WORKLOAD: Self = Self { begun: "workload_api.connection", open: "workload_api.connections" };
    pub(crate) const SDS: Self = Self { begun: "sds_api.connection", open: "sds_api.connections" };
    pub(crate) const DEBUG: Self = Self { begun: "debug_api.connection", open: "debug_api.connections" };
    pub(crate) const LOGGER: Self = Self { begun: "logger_api.connection", open: "logger_api.connections" };
    pub(crate) const BROKER: Self = Self { begun: "broker_api.connection", open: "broker_api.connections" };
    pub(crate) const DELEGATED: Self =
        Self { begun: "delegated_identity_api.connection", open: "delegated_identity_api.connections" };
}

/// A call under way; when dropped unfinished its caller went away.
pub(crate) struct Call(Option<Box<Measured>>);

struct Measured {
    calls: Calls,
    timer: Option<CallTimer>,
}

impl Calls {
    pub(crate) fn new(metrics: Metrics, names: ApiNames) -> Self {
        Self { metrics, names, open: Arc::default() }
    }

    /// Begins to measure a call, by its metric key; not those of the agent itself.
    pub(crate) fn begin(&self, key: &'static str, by_agent: bool) -> Call {
        if by_agent || !self.metrics.is_enabled() {
            return Call(None);
        }
        self.metrics.count(self.names.begun, 1.0, &[]);
        self.moved(1);
        Call(Some(Box::new(Measured { calls: self.clone(), timer: Some(self.metrics.call(key)) })))
    }

    /// The same, for whoever makes this request.
    pub(crate) fn begin_for<T>(&self, key: &'static str, request: &Request<T>) -> Call {
        self.begin(key, caller_of(request).is_ok_and(|caller| caller.is_agent()))
    }

    fn moved(&self, by: i64) {
        let open = self.open.fetch_add(by, Ordering::Relaxed) + by;
        self.metrics.gauge(self.names.open, open as f64, &[]);
    }
}

impl Call {
    /// For the stream with which it goes on.
    pub(crate) fn take(&mut self) -> Self {
        Self(self.0.take())
    }

    /// The call ended with `code`.
    pub(crate) fn finish(&mut self, code: Code) {
        if let Some(timer) = self.0.as_mut().and_then(|m| m.timer.take()) {
            timer.finish(name(code));
        }
    }

    /// The call ended like this.
    pub(crate) fn finish_with<T>(&mut self, result: &Result<T, Status>) {
        self.finish(result.as_ref().map_or_else(Status::code, |_| Code::Ok));
    }
}

/// What a call is answered. It ends with that, unless a stream took it.
pub(crate) fn answered<T>(result: Result<T, Status>, mut call: Call) -> Result<Response<T>, Status> {
    call.finish_with(&result);
    result.map(Response::new)
}

impl Drop for Measured {
    fn drop(&mut self) {
        self.calls.moved(-1);
    }
}

/// As Go writes it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::InvalidArgument => "InvalidArgument",
        Code::PermissionDenied => "PermissionDenied",
        Code::Unauthenticated => "Unauthenticated",
        Code::Unavailable => "Unavailable",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Cancelled => "Canceled",
        _ => "Unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_runtime::telemetry::Settings;

    #[test]
    fn calls_are_counted_by_status_and_those_under_way_are_shown() {
        let metrics = Metrics::new(Settings { prefix: "spire_agent".into(), ..Settings::default() });
        let calls = Calls::new(metrics.clone(), ApiNames::WORKLOAD);
        let mut one = calls.begin("rpc.workload_api.fetch_x509svid", false);
        let two = calls.begin("rpc.workload_api.fetch_x509svid", false);
        drop(calls.begin("rpc.workload_api.fetch_x509svid", true));
        one.finish_with(&Err::<(), _>(Status::permission_denied("no")));
        drop((one, two));
        let text = metrics.render();
        let has = |line: &str| assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        has("spire_agent_rpc_workload_api_fetch_x509svid{status=\"PermissionDenied\"} 1");
        has("spire_agent_rpc_workload_api_fetch_x509svid{status=\"Canceled\"} 1");
        has("spire_agent_workload_api_connection 2");
        has("spire_agent_workload_api_connections 0");
    }

    #[test]
    fn keys_are_those_that_spire_makes_of_the_methods() {
        let sources = [include_str!("../delegated.rs"), include_str!("../broker/mod.rs"), include_str!("wit.rs")];
        let sources = [sources.concat(), include_str!("mod.rs").into(), include_str!("../admin/debug.rs").into()];
        let all = sources.concat() + include_str!("../admin/logger.rs");
        const DELEGATED: &str = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity";
        for (service, method) in [
            (DELEGATED, "SubscribeToX509SVIDs"),
            (DELEGATED, "SubscribeToX509Bundles"),
            (DELEGATED, "FetchJWTSVIDs"),
            (DELEGATED, "SubscribeToJWTBundles"),
            ("/spiffe.broker.API", "SubscribeToX509SVID"),
            ("/spiffe.broker.API", "SubscribeToX509Bundles"),
            ("/spiffe.broker.API", "FetchJWTSVID"),
            ("/spiffe.broker.API", "SubscribeToJWTBundles"),
            ("/SpiffeWorkloadAPI", "FetchWITSVID"),
            ("/SpiffeWorkloadAPI", "FetchWITBundles"),
            ("/spire.agent.debug.v1.Debug", "GetInfo"),
            ("/spire.api.agent.logger.v1.Logger", "GetLogger"),
            ("/spire.api.agent.logger.v1.Logger", "SetLogLevel"),
            ("/spire.api.agent.logger.v1.Logger", "ResetLogLevel"),
        ] {
            let key = finial_runtime::telemetry::rpc_key(&format!("{service}/{method}"));
            assert!(all.contains(&format!("\"{key}\"")), "{key} is counted nowhere");
        }
    }
}
