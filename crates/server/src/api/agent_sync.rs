//! `finial.server.sync.v1.AgentSync`: what an agent may have, pushed as it changes.

use super::Service;
use crate::authz::{Identity, Method, Peer, Permit, code_name, method};
use crate::endpoints::Streams;
use crate::watch::{Opening, WatchStream};
use finial_proto::sync::server::AgentSync;
use finial_proto::sync::{BundleSeenRequest, BundleSeenResponse, WatchRequest};
use finial_runtime::telemetry::CallTimer;
use tonic::{Request, Response, Status, async_trait};

impl Service {
    async fn open(&self, request: Request<WatchRequest>, timer: &mut Option<CallTimer>) -> Result<WatchStream, Status> {
        let permit = self.gate.check::<method::WatchAuthorized, _>(&request).await?;
        let call = permit.call();
        let Peer::Remote { identity: Identity::Svid { not_after, .. }, .. } = call.peer() else {
            return Err(Status::internal("an agent without an SVID")); // the gate lets none in
        };
        let not_after = *not_after;
        let (agent, selectors) = call.agent().map(|(agent, selectors)| (agent.clone(), selectors))?;
        let timer = timer.take().unwrap_or_else(|| self.gate.timer(method::WatchAuthorized::ROW));
        call.audit();
        let held = request.extensions().get::<Streams>().cloned().unwrap_or_default().hold();
        let request = request.into_inner();
        if let Some((agent, issuer)) = call.peer().agent() {
            // By builds that do not call `BundleSeen`, this is all that is heard.
            let has = self.watchers.has_own(&request.bundles).unwrap_or_default();
            self.domain.agents.has(&agent.clone(), issuer, has);
        }
        WatchStream::open(
            &self.watchers,
            &self.entries,
            Opening { call, timer, agent, selectors, not_after, request, held },
        )
    }
}

#[async_trait]
impl AgentSync for Service {
    type WatchAuthorizedStream = WatchStream;

    async fn watch_authorized(&self, request: Request<WatchRequest>) -> Result<Response<WatchStream>, Status> {
        let mut timer = Some(self.gate.timer(method::WatchAuthorized::ROW));
        let opened = self.open(request, &mut timer).await;
        if let (Err(status), Some(timer)) = (&opened, timer) {
            timer.finish(code_name(status.code()));
        }
        opened.map(Response::new)
    }

    async fn bundle_seen(&self, request: Request<BundleSeenRequest>) -> Result<Response<BundleSeenResponse>, Status> {
        let answer = |permit: Permit<method::BundleSeen>, request: BundleSeenRequest| async move {
            if let Some((agent, issuer)) = permit.peer().agent() {
                self.domain.agents.has(agent, issuer, request.sequence_number);
            }
            permit.audit();
            Ok(BundleSeenResponse {})
        };
        self.gate.unary(request, answer).await
    }
}
