//! SPIRE's Delegated Identity API, on the admin socket: a process that is configured for it (`authorized_delegates`) gets SVIDs in
//! the name of other workloads, which it names by their selectors or by a process ID. It sees what those workloads see, from
//! the same views; identities of administrators and of downstream servers are given to nobody this way.

use crate::cache::{Bundles, Cache, View, ViewState};
use crate::sync::jwt::JwtFetcher;
use crate::updates::{Check, Updates};
use crate::workload_api::{ApiNames, Attestation, Call, Caller, Calls, answered, caller_of, check_audience};
use bytes::Bytes;
use finial_core::{Selector, SelectorSet, SpiffeId};
use finial_crypto::Certificate;
use finial_proto::agent::delegatedidentity as api;
use finial_proto::agent::delegatedidentity::delegated_identity_server::DelegatedIdentity;
use finial_proto::convert::id_to_proto;
use finial_proto::types;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};

/// As log lines say it.
const SUBSYSTEM: &str = "delegated_identity_api";

/// Selectors in one request.
const SELECTORS_MAX: usize = 1_000;
/// How long a delegate with a pid waited for the first SVID.
const FIRST_UPDATE: &str = "delegated_identity_api.subscribe_x509_svid.first_x509_svid_update";

struct Inner {
    delegates: HashSet<SpiffeId>,
    cache: Arc<Cache>,
    attestation: Arc<Attestation>,
    jwt: Arc<JwtFetcher>,
    calls: Calls,
}

/// The service. Cheap to clone.
#[derive(Clone)]
pub(crate) struct DelegatedApi(Arc<Inner>);

impl DelegatedApi {
    pub(crate) fn new(
        delegates: &[SpiffeId],
        cache: Arc<Cache>,
        attestation: Arc<Attestation>,
        jwt: Arc<JwtFetcher>,
    ) -> Self {
        let calls = Calls::new(attestation.metrics.clone(), ApiNames::DELEGATED);
        Self(Arc::new(Inner { delegates: delegates.iter().cloned().collect(), cache, attestation, jwt, calls }))
    }

    /// The view of who calls, if that is a delegate.
    async fn delegate<T>(&self, request: &Request<T>) -> Result<Arc<View>, Status> {
        let caller = caller_of(request)?;
        let view = self.0.attestation.view(caller).await.map_err(|status| attestation_failed(&status))?;
        self.check(&view.now()).map_err(|status| caller.refused(status))?;
        Ok(view)
    }

    /// Whether who sees this is a delegate.
    fn check(&self, state: &ViewState) -> Result<(), Status> {
        let mut ids = state.records().iter().map(|record| &record.entry.spiffe_id);
        if ids.clone().any(|id| self.0.delegates.contains(id)) {
            return Ok(());
        }
        let Some(default_id) = ids.next() else {
            tracing::error!(subsystem_name = SUBSYSTEM, "No identity issued");
            return Err(Status::permission_denied("no identity issued"));
        };
        let num_registered_entries = state.records().len();
        tracing::error!(subsystem_name = SUBSYSTEM, num_registered_entries, %default_id, "Permission denied; caller not configured as an authorized delegate.");
        Err(Status::permission_denied("caller not configured as an authorized delegate"))
    }

    fn still_delegate(&self) -> Check {
        let this = self.clone();
        Box::new(move |state| this.check(state))
    }

    /// The view of the workload that is asked for, and its process, if it was named by that.
    async fn workload(&self, pid: i32, selectors: Vec<types::Selector>) -> Result<(Arc<View>, Option<Caller>), Status> {
        match (selectors.is_empty(), pid) {
            (true, 0) | (false, 1.. | ..=-1) => {
                Err(Status::invalid_argument("must provide either selectors or non-zero PID, but not both"))
            }
            (false, 0) => Ok((self.0.cache.view(&parse(selectors)?), None)),
            (true, pid) => {
                let process = Caller::of_pid(pid).map_err(|error| {
                    tracing::error!(subsystem_name = SUBSYSTEM, pid, %error, "Workload attestation failed");
                    attestation_failed(&Status::unknown("there is no such process"))
                })?;
                let view = self.0.attestation.view(&process).await.map_err(|status| attestation_failed(&status))?;
                Ok((view, Some(process)))
            }
        }
    }

    async fn svids(
        &self,
        request: Request<api::SubscribeToX509sviDsRequest>,
        call: &mut Call,
    ) -> Result<Updates<Arc<ViewState>, api::SubscribeToX509sviDsResponse>, Status> {
        let started = Instant::now();
        let delegate = self.delegate(&request).await?;
        let api::SubscribeToX509sviDsRequest { selectors, pid } = request.into_inner();
        let (view, _) = self.workload(pid, selectors).await?;
        let subscription = self.0.cache.subscribe(&view);
        let states = subscription.states();
        let metrics = self.0.attestation.metrics.clone();
        let (mut waiting, mut first) = (true, true);
        let answer = move |state: &Arc<ViewState>| {
            if waiting && state.incomplete {
                return Ok(None); // until there is an SVID for each entry
            }
            waiting = false;
            let answer = x509_answer(state);
            if first && !answer.x509_svids.is_empty() {
                first = false;
                metrics.sample(FIRST_UPDATE, started.elapsed().as_secs_f64() * 1e3, &[]);
            }
            Ok(Some(answer))
        };
        let holds = vec![self.0.cache.subscribe(&delegate), subscription];
        Ok(Updates::new(holds, self.still_delegate(), states, Box::new(answer), call.take()))
    }

    async fn bundles<Q, T: 'static>(
        &self,
        request: Request<Q>,
        answer: fn(&Bundles) -> T,
        call: &mut Call,
    ) -> Result<Updates<Bundles, T>, Status> {
        let delegate = self.delegate(&request).await?;
        let holds = vec![self.0.cache.subscribe(&delegate)];
        let answer = Box::new(move |bundles: &Bundles| Ok(Some(answer(bundles))));
        Ok(Updates::new(holds, self.still_delegate(), self.0.cache.bundles(), answer, call.take()))
    }

    async fn jwt_svids(
        &self,
        request: Request<api::FetchJwtsviDsRequest>,
    ) -> Result<api::FetchJwtsviDsResponse, Status> {
        check_audience(&request.get_ref().audience)?;
        self.delegate(&request).await?;
        let api::FetchJwtsviDsRequest { audience, selectors, pid } = request.into_inner();
        let (view, process) = self.workload(pid, selectors).await?;
        let mut svids = Vec::new();
        for entry in view.now().records().iter().map(|r| &r.entry).filter(|e| !e.is_privileged()) {
            let svid = self.0.jwt.fetch(entry, &audience).await;
            let svid = svid.map_err(|error| Status::unavailable(format!("could not fetch JWT-SVID: {error}")))?;
            svids.push(types::Jwtsvid {
                token: svid.token.clone(),
                id: Some(id_to_proto(&entry.spiffe_id)),
                expires_at: svid.expires_at,
                issued_at: svid.issued_at,
                hint: entry.hint.clone(),
            });
        }
        if svids.is_empty() {
            tracing::error!(subsystem_name = SUBSYSTEM, "No identity issued");
            let status = Status::permission_denied("no identity issued");
            return Err(match process {
                Some(process) => process.refused(status),
                None => status,
            });
        }
        Ok(api::FetchJwtsviDsResponse { svids })
    }

    fn begin(&self, key: &'static str) -> Call {
        self.0.calls.begin(key, false)
    }
}

/// As SPIRE says it, whatever it was; attestors that failed are named.
fn attestation_failed(status: &Status) -> Status {
    Status::with_details(Code::Unavailable, "workload attestation failed", Bytes::copy_from_slice(status.details()))
}

fn parse(selectors: Vec<types::Selector>) -> Result<SelectorSet, Status> {
    let too_many = selectors.len() > SELECTORS_MAX;
    let parsed: Result<Vec<_>, _> = selectors.into_iter().map(|s| Selector::new(s.r#type, s.value)).collect();
    match parsed {
        Ok(selectors) if !too_many => Ok(SelectorSet::new(selectors)),
        _ => Err(Status::invalid_argument("could not parse provided selectors")),
    }
}

/// All SVIDs of a workload, also those whose hints another has: a delegate is to choose for itself.
fn x509_answer(state: &ViewState) -> api::SubscribeToX509sviDsResponse {
    let svids = state.records().iter().filter(|r| !r.entry.is_privileged()).filter_map(|record| {
        let svid = record.svid.as_ref()?;
        let chain = Certificate::parse_chain(&svid.chain).inspect_err(
            |error| tracing::error!(subsystem_name = SUBSYSTEM, spiffe_id = %svid.id, %error, "Leaving an X.509-SVID out"),
        );
        Some(api::X509svidWithKey {
            x509_svid: Some(types::X509svid {
                cert_chain: chain.ok()?.iter().map(|one| Bytes::copy_from_slice(one.der())).collect(),
                id: Some(id_to_proto(&svid.id)),
                expires_at: svid.not_after,
                hint: record.entry.hint.clone(),
            }),
            x509_svid_key: svid.key.clone(),
        })
    });
    api::SubscribeToX509sviDsResponse {
        x509_svids: svids.collect(),
        federates_with: state.federated().map(|bundle| bundle.id.clone()).collect(),
    }
}

fn x509_bundles(bundles: &Bundles) -> api::SubscribeToX509BundlesResponse {
    let ca_certificates: BTreeMap<_, _> = bundles.all().map(|b| (b.id.clone(), b.x509.clone())).collect();
    api::SubscribeToX509BundlesResponse { ca_certificates }
}

fn jwt_bundles(bundles: &Bundles) -> api::SubscribeToJwtBundlesResponse {
    let bundles: BTreeMap<_, _> = bundles.all().map(|b| (b.id.clone(), b.jwks.clone())).collect();
    api::SubscribeToJwtBundlesResponse { bundles }
}

#[tonic::async_trait]
impl DelegatedIdentity for DelegatedApi {
    type SubscribeToX509SVIDsStream = Updates<Arc<ViewState>, api::SubscribeToX509sviDsResponse>;
    type SubscribeToX509BundlesStream = Updates<Bundles, api::SubscribeToX509BundlesResponse>;
    type SubscribeToJWTBundlesStream = Updates<Bundles, api::SubscribeToJwtBundlesResponse>;

    async fn subscribe_to_x509svi_ds(
        &self,
        request: Request<api::SubscribeToX509sviDsRequest>,
    ) -> Result<Response<Self::SubscribeToX509SVIDsStream>, Status> {
        let mut call = self.begin("rpc.delegated_identity.subscribe_to_x509_svids");
        answered(self.svids(request, &mut call).await, call)
    }

    async fn subscribe_to_x509_bundles(
        &self,
        request: Request<api::SubscribeToX509BundlesRequest>,
    ) -> Result<Response<Self::SubscribeToX509BundlesStream>, Status> {
        let mut call = self.begin("rpc.delegated_identity.subscribe_to_x509_bundles");
        answered(self.bundles(request, x509_bundles, &mut call).await, call)
    }

    async fn fetch_jwtsvi_ds(
        &self,
        request: Request<api::FetchJwtsviDsRequest>,
    ) -> Result<Response<api::FetchJwtsviDsResponse>, Status> {
        let call = self.begin("rpc.delegated_identity.fetch_jwtsvi_ds");
        answered(self.jwt_svids(request).await, call)
    }

    async fn subscribe_to_jwt_bundles(
        &self,
        request: Request<api::SubscribeToJwtBundlesRequest>,
    ) -> Result<Response<Self::SubscribeToJWTBundlesStream>, Status> {
        let mut call = self.begin("rpc.delegated_identity.subscribe_to_jwt_bundles");
        answered(self.bundles(request, jwt_bundles, &mut call).await, call)
    }
}
