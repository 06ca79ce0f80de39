//! The SPIFFE Workload API. Each call: the security header, the caller's view, the view's ready-made answer.

mod call;
mod caller;
mod patience;
mod stream;
mod waiting;
mod wit;

pub(crate) use call::{ApiNames, Call, Calls, answered};
pub(crate) use caller::{ATTESTOR_TIMEOUT, Attestation, Caller, CallerConnection, LOOKS_MAX, Report};
pub(crate) use waiting::Waiting;

use crate::cache::{Cache, Subscription, View, ViewState};
use crate::sync::jwt::JwtFetcher;
use crate::sync::wit::WitFetcher;
use finial_config::AgentRateLimits;
use finial_core::{Clock, Selector, SelectorSet, SpiffeId, TrustDomain};
use finial_crypto::verify_jwt_svid;
use finial_proto::convert::json_to_struct;
use finial_proto::encoded::Encoded;
use finial_proto::workload;
use finial_proto::workload::server::SpiffeWorkloadApi;
use finial_runtime::{Metrics, RateLimiter};
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use stream::AnswerStream;
use tonic::{Request, Response, Status};
use wit::WitStream;

/// As log lines say it.
const SUBSYSTEM: &str = "endpoints";

/// What each request must carry.
const SECURITY_HEADER: &str = "workload.spiffe.io";
/// All audiences of a request together, bytes. The server puts them into a token that must stay of use.
const AUDIENCE_BYTES_MAX: usize = 8 << 10;
/// Selector sets that a rate limiter remembers.
const LIMITED_CALLERS_MAX: usize = 4096;

pub(crate) type Limiter = Option<RateLimiter<SelectorSet>>;

/// How many calls of a method each set of selectors may make.
pub(crate) fn limiter(method: &str, limit: u32) -> Limiter {
    (limit > 0).then(|| {
        tracing::info!(subsystem_name = SUBSYSTEM, method, limit, "Workload API/SDS rate limiting enabled");
        RateLimiter::new(limit, LIMITED_CALLERS_MAX)
    })
}

/// Refuses a call that is one too many, of a method with this label and name; the agent's own calls are not counted.
pub(crate) fn limited(
    limiter: &Limiter,
    metrics: &Metrics,
    (label, name): (&str, fmt::Arguments<'_>),
    caller: &Caller,
    view: &View,
) -> Result<(), Status> {
    let Some(limiter) = limiter.as_ref().filter(|_| !caller.is_agent()) else { return Ok(()) };
    limiter.try_acquire(&view.selectors, 1).map_err(|_| {
        metrics.count("workload_api.rate_limit_exceeded", 1.0, &[("method", label)]);
        Status::unavailable(format!("rate limit exceeded for {name}"))
    })
}

/// Who calls, as its connection says.
pub(crate) fn caller_of<T>(request: &Request<T>) -> Result<&Arc<Caller>, Status> {
    let caller = request.extensions().get::<Arc<Caller>>();
    caller.ok_or_else(|| Status::internal("peer tracker watcher missing from context"))
}

/// How many calls each set of selectors may make.
struct Limits {
    x509_svid: Limiter,
    x509_bundles: Limiter,
    jwt_svid: Limiter,
    jwt_bundles: Limiter,
}

impl Limits {
    fn new(settings: &AgentRateLimits) -> Self {
        Self {
            x509_svid: limiter("/SpiffeWorkloadAPI/FetchX509SVID", settings.fetch_x509_svid),
            x509_bundles: limiter("/SpiffeWorkloadAPI/FetchX509Bundles", settings.fetch_x509_bundles),
            jwt_svid: limiter("/SpiffeWorkloadAPI/FetchJWTSVID", settings.fetch_jwt_svid),
            jwt_bundles: limiter("/SpiffeWorkloadAPI/FetchJWTBundles", settings.fetch_jwt_bundles),
        }
    }
}

/// What the service is told.
pub(crate) struct Settings {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) allow_unauthenticated_verifiers: bool,
    pub(crate) allowed_foreign_jwt_claims: HashSet<String>,
    /// Selector types, or longer prefixes up to a colon, that may be logged.
    pub(crate) log_selectors: Vec<String>,
    pub(crate) rate_limits: AgentRateLimits,
    /// Where a workload without an entry waits for one.
    pub(crate) waiting: Option<Waiting>,
}

struct Inner {
    settings: Settings,
    cache: Arc<Cache>,
    attestation: Arc<Attestation>,
    jwt: Arc<JwtFetcher>,
    /// None: there are no WIT-SVIDs.
    wit: Option<Arc<WitFetcher>>,
    clock: Arc<dyn Clock>,
    limits: Limits,
    calls: Calls,
}

/// The service. Cheap to clone.
#[derive(Clone)]
pub(crate) struct WorkloadApi(Arc<Inner>);

impl WorkloadApi {
    pub(crate) fn new(
        settings: Settings,
        cache: Arc<Cache>,
        attestation: Arc<Attestation>,
        jwt: Arc<JwtFetcher>,
        wit: Option<Arc<WitFetcher>>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let limits = Limits::new(&settings.rate_limits);
        let calls = Calls::new(attestation.metrics.clone(), ApiNames::WORKLOAD);
        Self(Arc::new(Inner { settings, cache, attestation, jwt, wit, clock, limits, calls }))
    }

    /// Who calls, and what they may see.
    async fn enter<T>(&self, request: &Request<T>) -> Result<(Arc<Caller>, Arc<View>), Status> {
        check_header(request, SECURITY_HEADER)?;
        let caller = caller_of(request)?;
        let view = self.0.attestation.view(caller).await?;
        Ok((caller.clone(), view))
    }

    fn limit(&self, limiter: &Limiter, method: &str, caller: &Caller, view: &View) -> Result<(), Status> {
        let metrics = &self.0.attestation.metrics;
        limited(limiter, metrics, (method, format_args!("/SpiffeWorkloadAPI/{method}")), caller, view)
    }

    /// Begins a stream, or refuses at once what it would refuse.
    async fn stream<Q, T: 'static>(
        &self,
        request: &Request<Q>,
        method: Method<'_, T>,
    ) -> Result<Response<AnswerStream<T>>, Status> {
        let mut call = self.0.calls.begin_for(method.key, request);
        let begun = self.begin_stream(request, &method).await;
        match begun {
            Ok((subscription, answer)) => Ok(Response::new(AnswerStream::new(subscription, answer, call))),
            Err(status) => {
                call.finish(status.code());
                Err(status)
            }
        }
    }

    async fn begin_stream<Q, T: 'static>(
        &self,
        request: &Request<Q>,
        method: &Method<'_, T>,
    ) -> Result<(Subscription, stream::Answer<T>), Status> {
        let (caller, view) = self.enter(request).await?;
        self.limit(method.limiter, method.name, &caller, &view)?;
        let (open_to_all, ready_made) = (method.open_to_all, method.ready_made);
        let enough = |state: &ViewState| open_to_all || state.has_identity() || state.incomplete;
        let view = self.entitled(&caller, view, enough).await?;
        let subscription = self.0.cache.subscribe(&view);
        let this = self.clone();
        let answer = move |state: &ViewState| {
            if open_to_all || state.has_identity() {
                Ok(ready_made(state).clone())
            } else {
                Err(this.denied(&caller, &view.selectors))
            }
        };
        Ok((subscription, Box::new(answer)))
    }

    fn denied(&self, caller: &Caller, selectors: &SelectorSet) -> Status {
        if !caller.is_agent() {
            let shown: Vec<String> = selectors.iter().filter(|s| self.may_log(s)).map(ToString::to_string).collect();
            if shown.is_empty() {
                tracing::error!(
                    subsystem_name = SUBSYSTEM,
                    pid = caller.peer.pid,
                    registered = false,
                    "No identity issued"
                );
            } else {
                tracing::error!(subsystem_name = SUBSYSTEM, pid = caller.peer.pid, registered = false, selectors = %shown.join(","), "No identity issued");
            }
        }
        caller.refused(Status::permission_denied("no identity issued"))
    }

    fn may_log(&self, selector: &Selector) -> bool {
        let text = selector.to_string();
        let within = |prefix: &String| {
            text.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
        };
        self.0.settings.log_selectors.iter().any(within)
    }

    async fn jwt_svids(
        &self,
        request: Request<workload::JwtsvidRequest>,
    ) -> Result<Response<workload::JwtsvidResponse>, Status> {
        let (caller, view) = self.enter(&request).await?;
        let request = request.into_inner();
        check_audience(&request.audience)?;
        if !request.spiffe_id.is_empty() {
            SpiffeId::parse(&request.spiffe_id)
                .map_err(|e| Status::invalid_argument(format!("invalid requested SPIFFE ID: {e}")))?;
        }
        self.limit(&self.0.limits.jwt_svid, "FetchJWTSVID", &caller, &view)?;
        let asked = |id: &SpiffeId| request.spiffe_id.is_empty() || id.as_str() == request.spiffe_id;
        let enough = |state: &ViewState| state.entries.iter().any(|entry| asked(&entry.spiffe_id));
        let view = self.entitled(&caller, view, enough).await?;
        let state = view.now();
        let mut svids = Vec::new();
        for entry in state.entries.iter().filter(|e| asked(&e.spiffe_id)) {
            let svid = self.0.jwt.fetch(entry, &request.audience).await;
            let svid = svid.map_err(|error| Status::unavailable(format!("could not fetch JWT-SVID: {error}")))?;
            svids.push(workload::Jwtsvid {
                spiffe_id: entry.spiffe_id.as_str().to_owned(),
                svid: svid.token.clone(),
                hint: entry.hint.clone(),
            });
        }
        if svids.is_empty() {
            return Err(self.denied(&caller, &view.selectors));
        }
        Ok(Response::new(workload::JwtsvidResponse { svids }))
    }

    async fn validated(
        &self,
        request: Request<workload::ValidateJwtsvidRequest>,
    ) -> Result<Response<workload::ValidateJwtsvidResponse>, Status> {
        let (_, view) = self.enter(&request).await?;
        let workload::ValidateJwtsvidRequest { audience, svid } = request.into_inner();
        if audience.is_empty() {
            return Err(Status::invalid_argument("audience must be specified"));
        }
        if svid.is_empty() {
            return Err(Status::invalid_argument("svid must be specified"));
        }
        let valid = verify_jwt_svid(&svid, view.now().as_ref(), std::slice::from_ref(&audience), self.0.clock.now());
        let valid = valid.map_err(|error| {
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, %audience, "Failed to validate JWT");
            Status::invalid_argument(error.to_string())
        })?;
        let mut claims = valid.claims;
        if !valid.id.is_member_of(&self.0.settings.trust_domain) {
            let allowed = &self.0.settings.allowed_foreign_jwt_claims;
            claims.retain(|name, _| matches!(name.as_str(), "sub" | "exp" | "aud") || allowed.contains(name));
        }
        // A single audience may be written as a string; it is always answered as a list.
        claims.insert("aud".to_owned(), valid.audience.into());
        Ok(Response::new(workload::ValidateJwtsvidResponse {
            spiffe_id: valid.id.as_str().to_owned(),
            claims: Some(json_to_struct(&claims)),
        }))
    }
}

/// What makes one streaming method differ from another.
struct Method<'a, T> {
    name: &'static str,
    key: &'static str,
    limiter: &'a Limiter,
    open_to_all: bool,
    ready_made: fn(&ViewState) -> &Encoded<T>,
}

/// The header must be there exactly once, so that a confused HTTP client cannot be made to call us.
pub(crate) fn check_header<T>(request: &Request<T>, name: &str) -> Result<(), Status> {
    let mut headers = request.metadata().get_all(name).iter();
    let (first, second) = (headers.next(), headers.next());
    if first.is_none_or(|value| value.as_bytes() != b"true") || second.is_some() {
        return Err(Status::invalid_argument("security header missing from request"));
    }
    Ok(())
}

pub(crate) fn check_audience(audience: &[String]) -> Result<(), Status> {
    if audience.is_empty() {
        return Err(Status::invalid_argument("audience must be specified"));
    }
    if audience.iter().map(String::len).sum::<usize>() > AUDIENCE_BYTES_MAX {
        return Err(Status::invalid_argument(format!("audience must not be longer than {AUDIENCE_BYTES_MAX} bytes")));
    }
    Ok(())
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for WorkloadApi {
    type FetchX509SVIDStream = AnswerStream<workload::X509svidResponse>;
    type FetchX509BundlesStream = AnswerStream<workload::X509BundlesResponse>;
    type FetchJWTBundlesStream = AnswerStream<workload::JwtBundlesResponse>;
    type FetchWITSVIDStream = WitStream;
    type FetchWITBundlesStream = AnswerStream<workload::WitBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<workload::X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let method = Method {
            name: "FetchX509SVID",
            key: "rpc.workload_api.fetch_x509svid",
            limiter: &self.0.limits.x509_svid,
            open_to_all: false,
            ready_made: ViewState::x509_svids,
        };
        self.stream(&request, method).await
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<workload::X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        let method = Method {
            name: "FetchX509Bundles",
            key: "rpc.workload_api.fetch_x509_bundles",
            limiter: &self.0.limits.x509_bundles,
            open_to_all: self.0.settings.allow_unauthenticated_verifiers,
            ready_made: ViewState::x509_bundles,
        };
        self.stream(&request, method).await
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<workload::JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        let method = Method {
            name: "FetchJWTBundles",
            key: "rpc.workload_api.fetch_jwt_bundles",
            limiter: &self.0.limits.jwt_bundles,
            open_to_all: self.0.settings.allow_unauthenticated_verifiers,
            ready_made: ViewState::jwt_bundles,
        };
        self.stream(&request, method).await
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<workload::JwtsvidRequest>,
    ) -> Result<Response<workload::JwtsvidResponse>, Status> {
        let mut call = self.0.calls.begin_for("rpc.workload_api.fetch_jwtsvid", &request);
        let result = self.jwt_svids(request).await;
        call.finish_with(&result);
        result
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<workload::ValidateJwtsvidRequest>,
    ) -> Result<Response<workload::ValidateJwtsvidResponse>, Status> {
        let mut call = self.0.calls.begin_for("rpc.workload_api.validate_jwtsvid", &request);
        let result = self.validated(request).await;
        call.finish_with(&result);
        result
    }

    async fn fetch_witsvid(
        &self,
        request: Request<workload::WitsvidRequest>,
    ) -> Result<Response<Self::FetchWITSVIDStream>, Status> {
        self.wit_svids(request).await
    }

    async fn fetch_wit_bundles(
        &self,
        request: Request<workload::WitBundlesRequest>,
    ) -> Result<Response<Self::FetchWITBundlesStream>, Status> {
        if self.0.wit.is_none() {
            return Err(wit::unimplemented(&request, "WIT bundles"));
        }
        let method = Method {
            name: "FetchWITBundles",
            key: "rpc.workload_api.fetch_wit_bundles",
            limiter: &None,
            open_to_all: self.0.settings.allow_unauthenticated_verifiers,
            ready_made: ViewState::wit_bundles,
        };
        self.stream(&request, method).await
    }
}
