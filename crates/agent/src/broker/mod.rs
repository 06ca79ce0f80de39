//! The SPIFFE Broker API (experimental): brokers that are configured for it get SVIDs, tokens and bundles of the workloads
//! that they name by references. mTLS with X.509-SVIDs on a socket of its own, or on TCP; [`reference`] says who is meant,
//! [`endpoint`] who listens.

mod endpoint;
mod reference;

#[cfg(test)]
pub(crate) use endpoint::LIFETIME;
pub(crate) use endpoint::start;

use crate::cache::{Bundles, Cache, View, ViewState};
use crate::sync::jwt::JwtFetcher;
use crate::updates::Updates;
use crate::workload_api::{ApiNames, Attestation, Call, Calls, answered, check_audience, check_header};
use finial_config::{BrokerReference, BrokerUser};
use finial_core::{Clock, SpiffeId, UnixSeconds};
use finial_crypto::Certificate;
use finial_net::tls::TlsPeer;
use finial_net::unix_tls::UnixTlsPeer;
use finial_proto::broker as api;
use finial_proto::broker::api_server::Api;
use reference::{Resolved, Resolver};
use std::collections::HashMap;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// As log lines say it.
const SUBSYSTEM: &str = "broker_api";

/// What each request must carry.
const SECURITY_HEADER: &str = "broker.spiffe.io";
/// In place of all types of references.
const ANY_TYPE: &str = "*";

struct Inner {
    /// What each broker may use.
    brokers: HashMap<SpiffeId, Vec<BrokerReference>>,
    cache: Arc<Cache>,
    resolver: Resolver,
    jwt: Arc<JwtFetcher>,
    clock: Arc<dyn Clock>,
    calls: Calls,
}

/// A workload, for whoever is its broker until then.
struct Entered {
    resolved: Resolved,
    view: Arc<View>,
    clock: Arc<dyn Clock>,
    until: UnixSeconds,
}

impl Entered {
    /// Whether more may be said of it.
    fn check(&self) -> Result<(), Status> {
        check_unexpired(self.clock.as_ref(), self.until)?;
        self.resolved.check_alive()
    }
}

/// The service. Cheap to clone.
#[derive(Clone)]
pub(crate) struct BrokerApi(Arc<Inner>);

impl BrokerApi {
    fn new(
        brokers: &[BrokerUser],
        cache: Arc<Cache>,
        attestation: Arc<Attestation>,
        jwt: Arc<JwtFetcher>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let brokers = brokers.iter().map(|b| (b.id.clone(), b.allowed_reference_types.clone())).collect();
        let calls = Calls::new(attestation.metrics.clone(), ApiNames::BROKER);
        Self(Arc::new(Inner { brokers, cache, resolver: Resolver::new(attestation), jwt, clock, calls }))
    }

    fn begin(&self, key: &'static str) -> Call {
        self.0.calls.begin(key, false)
    }

    /// The workload that is meant, if this broker may name it like that.
    async fn enter<T>(
        &self,
        request: &Request<T>,
        reference: Option<&api::WorkloadReference>,
    ) -> Result<Entered, Status> {
        let Broker { id: broker, by_tcp, until } = caller(request)?;
        let clock = self.0.clock.clone();
        check_unexpired(clock.as_ref(), until)?;
        let reference = reference.and_then(|r| r.reference.as_ref()).filter(|r| !r.type_url.is_empty());
        let reference = reference.ok_or_else(|| Status::invalid_argument("workload reference must be provided"))?;
        self.authorize(&broker, &reference.type_url, by_tcp)?;
        let resolved = self.0.resolver.resolve(reference, &broker).await?;
        let view = self.0.cache.view(&resolved.selectors);
        Ok(Entered { resolved, view, clock, until })
    }

    fn authorize(&self, broker: &SpiffeId, type_url: &str, by_tcp: bool) -> Result<(), Status> {
        let allowed = self.0.brokers.get(broker).into_iter().flatten();
        let named: Vec<_> = allowed.filter(|a| a.type_url == ANY_TYPE || a.type_url == type_url).collect();
        let denied = |text: String| {
            tracing::error!(subsystem_name = SUBSYSTEM, broker_peer = %broker, "{text}");
            Err(Status::permission_denied(text))
        };
        if named.is_empty() {
            return denied(format!("broker {:?} is not allowed to use reference type {type_url:?}", broker.as_str()));
        }
        if by_tcp && !named.iter().any(|a| a.allow_over_tcp) {
            let broker = broker.as_str();
            return denied(format!("reference type {type_url:?} is not allowed over TCP for broker {broker:?}"));
        }
        Ok(())
    }

    /// What the workload sees, for as long as it lives.
    fn updates<T: 'static>(
        &self,
        entered: Entered,
        answer: fn(&ViewState) -> T,
        call: &mut Call,
    ) -> Updates<Arc<ViewState>, T> {
        let subscription = self.0.cache.subscribe(&entered.view);
        let (states, mut waiting) = (subscription.states(), true);
        let answer = move |state: &Arc<ViewState>| {
            entered.check()?;
            waiting &= state.incomplete;
            Ok((!waiting).then(|| answer(state)))
        };
        Updates::new(vec![subscription], Box::new(|_| Ok(())), states, Box::new(answer), call.take())
    }

    fn bundles<T: 'static>(&self, entered: Entered, answer: fn(&Bundles) -> T, call: &mut Call) -> Updates<Bundles, T> {
        let holds = vec![self.0.cache.subscribe(&entered.view)];
        let answer = move |bundles: &Bundles| {
            entered.check()?;
            Ok(Some(answer(bundles)))
        };
        Updates::new(holds, Box::new(|_| Ok(())), self.0.cache.bundles(), Box::new(answer), call.take())
    }

    async fn jwt_svids(&self, request: Request<api::FetchJwtsvidRequest>) -> Result<api::FetchJwtsvidResponse, Status> {
        check_header(&request, SECURITY_HEADER)?;
        check_audience(&request.get_ref().audience)?;
        let Entered { view, .. } = self.enter(&request, request.get_ref().reference.as_ref()).await?;
        let api::FetchJwtsvidRequest { audience, spiffe_id, .. } = request.into_inner();
        let asked = |id: &SpiffeId| spiffe_id.is_empty() || id.as_str() == spiffe_id;
        let state = view.now();
        let mut svids = Vec::new();
        for entry in state.entries.iter().filter(|e| !e.is_privileged() && asked(&e.spiffe_id)) {
            let svid = self.0.jwt.fetch(entry, &audience).await;
            let svid = svid.map_err(|error| Status::unavailable(format!("could not fetch JWT-SVID: {error}")))?;
            svids.push(api::Jwtsvid {
                spiffe_id: entry.spiffe_id.as_str().to_owned(),
                svid: svid.token.clone(),
                hint: entry.hint.clone(),
            });
        }
        if svids.is_empty() {
            tracing::error!(subsystem_name = SUBSYSTEM, "No identity issued");
            return Err(Status::permission_denied("no identity issued"));
        }
        Ok(api::FetchJwtsvidResponse { svids })
    }
}

/// Who calls.
struct Broker {
    id: SpiffeId,
    by_tcp: bool,
    /// The end of its X.509-SVID.
    until: UnixSeconds,
}

/// A handshake proves nothing for longer than what was presented in it.
fn check_unexpired(clock: &dyn Clock, until: UnixSeconds) -> Result<(), Status> {
    if clock.now() > until {
        return Err(Status::unauthenticated("the X.509-SVID that was presented for this connection has expired"));
    }
    Ok(())
}

fn caller<T>(request: &Request<T>) -> Result<Broker, Status> {
    let unknown = || Status::unauthenticated("unable to determine caller identity");
    let (by_tcp, leaf) = match (request.extensions().get::<TlsPeer>(), request.extensions().get::<UnixTlsPeer>()) {
        (Some(peer), _) => (true, peer.certificates.first()),
        (None, Some(peer)) => (false, peer.certificates.first()),
        (None, None) => return Err(unknown()),
    };
    let leaf = leaf.and_then(|leaf| Certificate::parse(leaf.as_ref()).ok()).ok_or_else(unknown)?;
    Ok(Broker { id: leaf.spiffe_id().map_err(|_| unknown())?, by_tcp, until: leaf.not_after() })
}

fn x509_svids(state: &ViewState) -> api::SubscribeToX509svidResponse {
    let own = state.own_bundle();
    let svids = state.identities.iter().filter(|i| !i.entry.is_privileged()).map(|identity| api::X509svid {
        spiffe_id: identity.svid.id.as_str().to_owned(),
        x509_svid: identity.svid.chain.clone(),
        x509_svid_key: identity.svid.key.clone(),
        bundle: own.x509.clone(),
        hint: identity.entry.hint.clone(),
    });
    api::SubscribeToX509svidResponse {
        svids: svids.collect(),
        crl: Vec::new(),
        federated_bundles: state.federated().map(|b| (b.id.clone(), b.x509.clone())).collect(),
    }
}

fn x509_bundles(bundles: &Bundles) -> api::SubscribeToX509BundlesResponse {
    let bundles = bundles.all().map(|b| (b.id.clone(), b.x509.clone())).collect();
    api::SubscribeToX509BundlesResponse { crl: Vec::new(), bundles }
}

fn jwt_bundles(bundles: &Bundles) -> api::SubscribeToJwtBundlesResponse {
    api::SubscribeToJwtBundlesResponse { bundles: bundles.all().map(|b| (b.id.clone(), b.jwks.clone())).collect() }
}

#[tonic::async_trait]
impl Api for BrokerApi {
    type SubscribeToX509SVIDStream = Updates<Arc<ViewState>, api::SubscribeToX509svidResponse>;
    type SubscribeToX509BundlesStream = Updates<Bundles, api::SubscribeToX509BundlesResponse>;
    type SubscribeToJWTBundlesStream = Updates<Bundles, api::SubscribeToJwtBundlesResponse>;

    async fn subscribe_to_x509svid(
        &self,
        request: Request<api::SubscribeToX509svidRequest>,
    ) -> Result<Response<Self::SubscribeToX509SVIDStream>, Status> {
        check_header(&request, SECURITY_HEADER)?;
        let mut call = self.begin("rpc.spiffe.broker.api.subscribe_to_x509svid");
        let entered = self.enter(&request, request.get_ref().reference.as_ref()).await;
        answered(entered.map(|workload| self.updates(workload, x509_svids, &mut call)), call)
    }

    async fn subscribe_to_x509_bundles(
        &self,
        request: Request<api::SubscribeToX509BundlesRequest>,
    ) -> Result<Response<Self::SubscribeToX509BundlesStream>, Status> {
        check_header(&request, SECURITY_HEADER)?;
        let mut call = self.begin("rpc.spiffe.broker.api.subscribe_to_x509_bundles");
        let entered = self.enter(&request, request.get_ref().reference.as_ref()).await;
        answered(entered.map(|workload| self.bundles(workload, x509_bundles, &mut call)), call)
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<api::FetchJwtsvidRequest>,
    ) -> Result<Response<api::FetchJwtsvidResponse>, Status> {
        let call = self.begin("rpc.spiffe.broker.api.fetch_jwtsvid");
        answered(self.jwt_svids(request).await, call)
    }

    async fn subscribe_to_jwt_bundles(
        &self,
        request: Request<api::SubscribeToJwtBundlesRequest>,
    ) -> Result<Response<Self::SubscribeToJWTBundlesStream>, Status> {
        check_header(&request, SECURITY_HEADER)?;
        let mut call = self.begin("rpc.spiffe.broker.api.subscribe_to_jwt_bundles");
        let entered = self.enter(&request, request.get_ref().reference.as_ref()).await;
        answered(entered.map(|workload| self.bundles(workload, jwt_bundles, &mut call)), call)
    }
}
