//! Envoy's secret discovery service (SDS, version 3): X.509-SVIDs and bundles as Envoy takes them. Who calls and what they may
//! see is found out as for the Workload API; [`names`] says what a proxy may ask for, [`world`] and [`delta`] are the two
//! protocols, [`stream`] what both have in common.

mod delta;
mod names;
mod stream;
#[cfg(test)]
mod tests;
mod world;

use crate::cache::{Cache, Subscription, View};
use crate::workload_api::{ApiNames, Attestation, Call, Caller, Calls, Limiter, Waiting, caller_of, limited, limiter};
use delta::Delta;
use finial_config::{AgentRateLimits, SdsSettings};
use finial_crypto::{hex, random_bytes};
use finial_proto::encoded;
use finial_proto::envoy::discovery::{DeltaDiscoveryRequest, DiscoveryRequest};
use finial_proto::envoy::secret::server::SecretDiscoveryService;
use finial_proto::rpc;
use std::sync::Arc;
use std::time::Duration;
use stream::SecretStream;
use tonic::{Request, Response, Status, Streaming};
use world::{Wanted, World};

/// As log lines say it.
const SUBSYSTEM: &str = "endpoints";

const STREAM_SECRETS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
const FETCH_SECRETS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets";

/// Names that a proxy may want at a time, and their bytes together.
const NAMES_MAX: usize = 1_000;
const NAMES_BYTES_MAX: usize = 32 << 10;
/// How much of what a proxy reports is logged.
const REPORT_CHARS_MAX: usize = 1_000;
/// How long one that fetches waits for SVIDs that are being issued.
const ISSUED_WITHIN: Duration = Duration::from_secs(5);

struct Inner {
    settings: Arc<SdsSettings>,
    cache: Arc<Cache>,
    attestation: Arc<Attestation>,
    stream_secrets: Limiter,
    fetch_secrets: Limiter,
    /// Where a proxy without an entry waits for one.
    waiting: Option<Waiting>,
    calls: Calls,
}

/// A stream of which all is known but what is asked.
struct Begun<Q> {
    caller: Arc<Caller>,
    requests: Streaming<Q>,
    subscription: Subscription,
    call: Call,
}

/// The service. Cheap to clone.
#[derive(Clone)]
pub(crate) struct SdsApi(Arc<Inner>);

impl SdsApi {
    pub(crate) fn new(
        settings: SdsSettings,
        limits: AgentRateLimits,
        waiting: Option<Waiting>,
        cache: Arc<Cache>,
        attestation: Arc<Attestation>,
    ) -> Self {
        Self(Arc::new(Inner {
            settings: Arc::new(settings),
            cache,
            stream_secrets: limiter(STREAM_SECRETS, limits.stream_secrets),
            fetch_secrets: limiter(FETCH_SECRETS, limits.fetch_secrets),
            waiting,
            calls: Calls::new(attestation.metrics.clone(), ApiNames::SDS),
            attestation,
        }))
    }

    /// Who calls, and what they may see.
    async fn enter<T>(
        &self,
        request: &Request<T>,
        method: &str,
        limiter: &Limiter,
    ) -> Result<(Arc<Caller>, Arc<View>), Status> {
        let caller = caller_of(request)?;
        let view = self.0.attestation.view(caller).await?;
        limited(limiter, &self.0.attestation.metrics, (method, format_args!("{method}")), caller, &view)?;
        Ok((caller.clone(), view))
    }

    /// Begins a stream, or refuses at once what it would refuse.
    async fn begin<Q>(&self, request: Request<Streaming<Q>>, key: &'static str) -> Result<Begun<Q>, Status> {
        let mut call = self.0.calls.begin_for(key, &request);
        match self.enter(&request, STREAM_SECRETS, &self.0.stream_secrets).await {
            Ok((caller, view)) => {
                Ok(Begun { caller, requests: request.into_inner(), subscription: self.0.cache.subscribe(&view), call })
            }
            Err(status) => {
                call.finish(status.code());
                Err(status)
            }
        }
    }

    async fn fetched(&self, request: Request<DiscoveryRequest>) -> Result<encoded::DiscoveryResponse, Status> {
        let (caller, mut view) = self.enter(&request, FETCH_SECRETS, &self.0.fetch_secrets).await?;
        let wanted = Wanted::new(&self.0.settings, request.into_inner())?;
        let settings = &self.0.settings;
        let mut subscription = self.0.cache.subscribe(&view);
        // An SVID that is not there yet may be the one that is asked for; what there is then is what it gets.
        let mut states = subscription.states();
        let _ = tokio::time::timeout(ISSUED_WITHIN, states.wait_for(|state| !state.incomplete || state.closed)).await;
        if wanted.answer(&view.now(), settings).is_err()
            && let Some(waiting) = &self.0.waiting
            && let Some(_place) = waiting.enter(&caller)
        {
            let came = states.wait_for(|state| state.closed || wanted.answer(state, settings).is_ok());
            let came = tokio::time::timeout(waiting.longest, came).await;
            if came.is_ok_and(|state| state.map_or(true, |state| state.closed)) {
                return Err(Status::unavailable("the agent is shutting down"));
            }
            // Much may have happened to the process meanwhile.
            view = self.0.attestation.view(&caller).await?;
            subscription = self.0.cache.subscribe(&view);
        }
        let answer = wanted.answer(&view.now(), settings);
        drop(subscription);
        answer.map_err(|status| {
            let (pid, error) = (caller.peer.pid, status.message());
            tracing::error!(subsystem_name = SUBSYSTEM, pid, error, "Error building fetch secrets response");
            caller.refused(status)
        })
    }
}

#[tonic::async_trait]
impl SecretDiscoveryService for SdsApi {
    type StreamSecretsStream = SecretStream<World>;
    type DeltaSecretsStream = SecretStream<Delta>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let begun = self.begin(request, "rpc.sds.v3.stream_secrets").await?;
        let world = World::new(self.0.settings.clone(), begun.caller.peer.pid);
        Ok(Response::new(SecretStream::new(world, begun, self.0.waiting.clone())))
    }

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        let begun = self.begin(request, "rpc.sds.v3.delta_secrets").await?;
        let delta = Delta::new(self.0.settings.clone(), begun.caller.peer.pid);
        // It is told that there is nothing, and of what comes later.
        Ok(Response::new(SecretStream::new(delta, begun, None)))
    }

    async fn fetch_secrets(
        &self,
        request: Request<DiscoveryRequest>,
    ) -> Result<Response<encoded::DiscoveryResponse>, Status> {
        let mut call = self.0.calls.begin_for("rpc.sds.v3.fetch_secrets", &request);
        let result = self.fetched(request).await;
        call.finish_with(&result);
        result.map(Response::new)
    }
}

/// Refuses more names than a proxy can need.
fn check_names<'a>(names: impl Iterator<Item = &'a String>) -> Result<(), Status> {
    let (count, bytes) = names.fold((0, 0), |(count, bytes), name| (count + 1, bytes + name.len()));
    if count > NAMES_MAX || bytes > NAMES_BYTES_MAX {
        let message = format!("too many resource names: at most {NAMES_MAX}, of {NAMES_BYTES_MAX} bytes together");
        return Err(Status::invalid_argument(message));
    }
    Ok(())
}

/// Something that no other answer of the stream has.
fn nonce() -> String {
    hex(&random_bytes::<4>())
}

/// Logs what a proxy could not do with an answer.
fn report(error: Option<&rpc::Status>, pid: i32) {
    if let Some(error) = error {
        let message: String = error.message.chars().take(REPORT_CHARS_MAX).collect();
        tracing::error!(subsystem_name = SUBSYSTEM, pid, error = %message, "Envoy reported errors applying secrets");
    }
}
