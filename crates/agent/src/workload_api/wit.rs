//! WIT-SVIDs (section 7 of the Workload API's standard), with the feature flag `wit-svid`.

use super::call::Call;
use super::{Caller, SECURITY_HEADER, WorkloadApi, check_header};
use crate::cache::{View, ViewState};
use crate::sync::wit::Held;
use finial_core::SpiffeId;
use finial_proto::encoded::WitSvidResponse;
use finial_proto::workload;
use futures::Stream;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tonic::{Code, Request, Response, Status};
use zeroize::Zeroize;

/// Clocks may jump: due renewals are looked for at least this often.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

pub(crate) type WitStream = Pin<Box<dyn Stream<Item = Result<WitSvidResponse, Status>> + Send>>;

/// The stream of one call.
struct Wanted {
    api: WorkloadApi,
    caller: Arc<Caller>,
    view: Arc<View>,
    states: watch::Receiver<Arc<ViewState>>,
    id: Option<SpiffeId>,
    call: Call,
    last: Option<WitSvidResponse>,
    /// Keeps them in the cache.
    held: Option<Held>,
    ended: bool,
}

impl WorkloadApi {
    pub(super) async fn wit_svids(
        &self,
        request: Request<workload::WitsvidRequest>,
    ) -> Result<Response<WitStream>, Status> {
        if self.0.wit.is_none() {
            return Err(unimplemented(&request, "WIT-SVIDs"));
        }
        let mut call = self.0.calls.begin_for("rpc.workload_api.fetch_witsvid", &request);
        match self.begin_wit(&request).await {
            Ok((caller, view, id)) => {
                let (api, states) = (self.clone(), view.subscribe_states());
                let wanted = Wanted { api, caller, view, states, id, call, last: None, held: None, ended: false };
                Ok(Response::new(Box::pin(futures::stream::unfold(wanted, Wanted::next))))
            }
            Err(status) => {
                call.finish(status.code());
                Err(status)
            }
        }
    }

    async fn begin_wit(
        &self,
        request: &Request<workload::WitsvidRequest>,
    ) -> Result<(Arc<Caller>, Arc<View>, Option<SpiffeId>), Status> {
        let (caller, view) = self.enter(request).await?;
        let id = match request.get_ref().spiffe_id.as_str() {
            "" => None,
            id => Some(
                SpiffeId::parse(id)
                    .map_err(|e| Status::invalid_argument(format!("invalid requested SPIFFE ID: {e}")))?,
            ),
        };
        let asked = |entry_id: &SpiffeId| id.as_ref().is_none_or(|id| id == entry_id);
        let enough = |state: &ViewState| state.entries.iter().any(|entry| asked(&entry.spiffe_id));
        let view = self.entitled(&caller, view, enough).await?;
        Ok((caller, view, id))
    }
}

impl Wanted {
    /// The next answer that differs from the last, and the rest of the stream.
    async fn next(mut self) -> Option<(Result<WitSvidResponse, Status>, Self)> {
        if self.ended {
            return None;
        }
        let answer = self.answer().await;
        if let Err(status) = &answer {
            self.ended = true;
            self.held = None;
            self.call.finish(status.code());
        }
        Some((answer, self))
    }

    async fn answer(&mut self) -> Result<WitSvidResponse, Status> {
        loop {
            let state = self.states.borrow_and_update().clone();
            if state.closed {
                return Err(Status::new(Code::Unavailable, "the agent is shutting down"));
            }
            let asked = |id: &SpiffeId| self.id.as_ref().is_none_or(|wanted| wanted == id);
            let entries: Vec<_> = state.entries.iter().filter(|e| asked(&e.spiffe_id)).cloned().collect();
            if entries.is_empty() {
                return Err(self.api.denied(&self.caller, &self.view.selectors));
            }
            let Some(fetcher) = &self.api.0.wit else { return Err(Status::internal("there are no WIT-SVIDs")) };
            let held = fetcher.get(&entries, &state.tainted_wit()).await?;
            let wait = held.again_at_ms.saturating_sub(self.api.0.clock.now_ms());
            let answer = encode(&held);
            let none = held.svids.is_empty();
            self.held = Some(held);
            if !none && self.last.as_ref() != Some(&answer) {
                self.last = Some(answer.clone());
                return Ok(answer);
            }
            let wait = Duration::from_millis(u64::try_from(wait).unwrap_or_default()).min(LOOK_AGAIN);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                changed = self.states.changed() => {
                    changed.map_err(|_| Status::unavailable("the agent is shutting down"))?;
                }
            }
        }
    }
}

fn encode(held: &Held) -> WitSvidResponse {
    let svids = held.svids.iter().map(|(entry, svid)| workload::Witsvid {
        spiffe_id: svid.id.as_str().to_owned(),
        wit_svid: svid.token.clone(),
        wit_svid_key: svid.key.expose().clone(),
        hint: entry.hint.clone(),
    });
    let mut message = workload::WitsvidResponse { svids: svids.collect() };
    let encoded = WitSvidResponse::new_secret(&message);
    message.svids.iter_mut().for_each(|svid| svid.wit_svid_key.zeroize());
    encoded
}

/// As SPIRE's agent says it, which has none.
pub(super) fn unimplemented<T>(request: &Request<T>, what: &str) -> Status {
    let unimplemented = || Status::unimplemented(format!("fetching {what} is not implemented"));
    check_header(request, SECURITY_HEADER).err().unwrap_or_else(unimplemented)
}
