//! `finial.agent.v1.Explain`, on the admin socket.

use super::state::{Circumstances, state};
use super::words::Findings;
use super::{Missing, Near, explain};
use crate::cache::{Cache, Record, drop_duplicate_hints};
use crate::status::AgentStatus;
use crate::workload_api::{Attestation, Caller, Report};
use finial_core::{Clock, EntryId, Selector, SelectorSet, SpiffeId};
use finial_net::unix::PeerError;
use finial_proto::agent::explain as api;
use finial_proto::agent::explain::explain_server::Explain;
use finial_proto::convert::id_to_proto;
use finial_proto::types;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

/// Processes that are looked at at the same time.
const AT_ONCE: usize = 4;

/// The service.
pub(crate) struct ExplainApi {
    pub(crate) cache: Arc<Cache>,
    pub(crate) attestation: Arc<Attestation>,
    pub(crate) status: Arc<AgentStatus>,
    pub(crate) clock: Arc<dyn Clock>,
    /// How long a workload waits for its entry; none = it does not.
    pub(crate) waits: Option<Duration>,
    turns: Semaphore,
}

impl ExplainApi {
    pub(crate) fn new(
        cache: Arc<Cache>,
        attestation: Arc<Attestation>,
        status: Arc<AgentStatus>,
        clock: Arc<dyn Clock>,
        waits: Option<Duration>,
    ) -> Self {
        Self { cache, attestation, status, clock, waits, turns: Semaphore::new(AT_ONCE) }
    }

    fn agent_id(&self) -> Result<SpiffeId, Status> {
        self.status.id().ok_or_else(|| Status::unavailable("the agent has no SVID"))
    }

    fn answer(&self, caller: &Caller, reports: &[Report]) -> Result<api::ExplainProcessResponse, Status> {
        let agent_id = self.agent_id()?;
        let selectors: SelectorSet = reports.iter().filter_map(|r| r.result.as_ref().ok()).flatten().cloned().collect();
        let snapshot = self.cache.snapshot();
        let explanation = explain(&selectors, &snapshot.records);
        let away = self.status.away_because();
        let identities = self.identities(&explanation.fitting, away.as_deref());
        let public = Public::new(&snapshot.records);
        let findings = Findings {
            agent_id: &agent_id,
            selectors: &selectors,
            reports,
            explanation: &explanation,
            identities: &identities,
            waits: self.waits,
            away: away.as_deref(),
        };
        Ok(api::ExplainProcessResponse {
            pid: caller.peer.pid,
            uid: caller.peer.uid,
            gid: caller.peer.gid,
            verdict: findings.verdict(),
            hints: findings.hints(),
            agent_id: Some(id_to_proto(&agent_id)),
            attestors: reports.iter().map(|report| attestor(report, &public)).collect(),
            entry_count: i64::try_from(explanation.all).unwrap_or(i64::MAX),
            nearest: explanation.nearest.iter().map(|one| near(one, reports, &public)).collect(),
            identities,
            last_sync: self.status.last_sync(),
            server_error: away.unwrap_or_default(),
        })
    }

    fn identities(&self, fitting: &[&Record], away: Option<&str>) -> Vec<api::Identity> {
        let on_the_api = fitting.iter().copied().filter(|record| !record.entry.store_svid);
        let (shown, _) = drop_duplicate_hints(on_the_api.collect(), |record| &record.entry);
        let shown_ids: HashSet<&EntryId> = shown.iter().map(|record| &record.entry.id).collect();
        let identity = |record: &&Record| {
            let entry = &record.entry;
            let instead = shown.iter().find(|other| other.entry.hint == entry.hint).map(|other| &other.entry.id);
            let refused = self.status.refusal(&entry.id);
            let around = Circumstances {
                now_ms: self.clock.now_ms(),
                hidden_by: instead.filter(|_| !shown_ids.contains(&entry.id)),
                refused: refused.as_deref(),
                away,
            };
            let (state, reason) = state(record, &around);
            api::Identity {
                entry_id: entry.id.as_str().to_owned(),
                spiffe_id: Some(id_to_proto(&entry.spiffe_id)),
                selectors: entry.selectors.iter().map(|selector| to_proto(&selector)).collect(),
                hint: entry.hint.clone(),
                state: state.into(),
                expires_at: record.svid.as_ref().map(|svid| svid.not_after).unwrap_or_default(),
                reason,
            }
        };
        fitting.iter().map(identity).collect()
    }
}

/// What of a process may be shown: the values of its environment variables only where an entry names them anyway.
struct Public {
    named: HashSet<Selector>,
}

impl Public {
    fn new(records: &[Record]) -> Self {
        let all = records.iter().flat_map(|record| record.entry.selectors.iter());
        Self { named: all.filter(is_environment).collect() }
    }

    fn shown(&self, selector: &Selector) -> types::Selector {
        let name = selector.value.split_once('=').map(|(name, _)| name);
        match name.filter(|_| is_environment(selector) && !self.named.contains(selector)) {
            Some(name) => types::Selector { r#type: selector.kind.clone(), value: format!("{name}=(not shown)") },
            None => to_proto(selector),
        }
    }
}

fn is_environment(selector: &Selector) -> bool {
    selector.value.starts_with("env:")
}

fn to_proto(selector: &Selector) -> types::Selector {
    types::Selector { r#type: selector.kind.clone(), value: selector.value.clone() }
}

fn attestor(report: &Report, public: &Public) -> api::Attestor {
    let (selectors, error) = match &report.result {
        Ok(selectors) => (SelectorSet::new(selectors.clone()), String::new()),
        Err(error) => (SelectorSet::default(), error.clone()),
    };
    api::Attestor {
        name: report.name.clone(),
        selectors: selectors.iter().map(|selector| public.shown(selector)).collect(),
        took_us: i64::try_from(report.took.as_micros()).unwrap_or(i64::MAX),
        error,
    }
}

fn near(near: &Near<'_>, reports: &[Report], public: &Public) -> api::Near {
    let missing = |missing: &Missing<'_>| {
        let report = reports.iter().find(|report| report.name == missing.wanted.kind);
        let reason = match report.map(|report| report.result.is_ok()) {
            _ if !missing.found.is_empty() => "",
            None => "this agent has no such attestor",
            Some(false) => "the attestor failed",
            Some(true) => "the attestor found nothing of the kind",
        };
        api::Missing {
            wanted: Some(to_proto(&missing.wanted)),
            found: missing.found.iter().map(|selector| public.shown(selector)).collect(),
            reason: reason.to_owned(),
        }
    };
    let entry = &near.record.entry;
    api::Near {
        entry_id: entry.id.as_str().to_owned(),
        spiffe_id: Some(id_to_proto(&entry.spiffe_id)),
        present: i32::try_from(near.present).unwrap_or(i32::MAX),
        missing: near.missing.iter().map(missing).collect(),
    }
}

fn unknown_process(error: PeerError) -> Status {
    match error {
        PeerError::Gone(pid) => {
            Status::not_found(format!("there is no process {pid} in the PID namespace of the agent"))
        }
        other => Status::unavailable(other.to_string()),
    }
}

#[tonic::async_trait]
impl Explain for ExplainApi {
    async fn explain_process(
        &self,
        request: Request<api::ExplainProcessRequest>,
    ) -> Result<Response<api::ExplainProcessResponse>, Status> {
        let busy = |_| Status::resource_exhausted("the agent explains other processes; try again");
        let _turn = self.turns.try_acquire().map_err(busy)?;
        let caller = Caller::of_pid(request.get_ref().pid).map_err(unknown_process)?;
        let reports = self.attestation.examine(&caller).await?;
        self.answer(&caller, &reports).map(Response::new)
    }
}
