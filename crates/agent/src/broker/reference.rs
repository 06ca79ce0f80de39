//! Which workload a broker means: a process, or whatever an attestor understands.

use crate::workload_api::{ATTESTOR_TIMEOUT, Attestation, Caller};
use finial_core::{Selector, SelectorSet, SpiffeId};
use finial_plugin::{Peer, PluginError, Reference, WorkloadAttestor};
use finial_proto::broker::WorkloadPidReference;
use finial_proto::convert::code_of;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use prost::Message;
use prost_types::Any;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Code, Status};

/// As log lines say it.
const SUBSYSTEM: &str = "workload_attestor";
/// Processes that are watched for brokers at a time.
const PROCESSES_MAX: usize = 4_096;
/// A process.
const PID_REFERENCE: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";

/// A workload that was found.
pub(super) struct Resolved {
    pub(super) selectors: SelectorSet,
    process: Option<Held>,
}

/// A process that is watched; each costs file descriptors.
struct Held {
    caller: Caller,
    _place: OwnedSemaphorePermit,
}

impl Resolved {
    /// Nothing may be said for a process that has ended.
    pub(super) fn check_alive(&self) -> Result<(), Status> {
        match &self.process {
            Some(Held { caller, .. }) if !caller.peer.handle.is_alive() => Err(not_found(caller.peer.pid)),
            _ => Ok(()),
        }
    }
}

fn not_found(pid: i32) -> Status {
    Status::not_found(format!("workload attestation failed: there is no process {pid}"))
}

/// What one attestor says.
enum Said {
    Selectors(Vec<Selector>),
    /// It knows no such references.
    Nothing,
    Failed(PluginError),
}

/// Asks all attestors.
pub(super) struct Resolver {
    attestation: Arc<Attestation>,
    places: Arc<Semaphore>,
}

impl Resolver {
    pub(super) fn new(attestation: Arc<Attestation>) -> Self {
        Self { attestation, places: Arc::new(Semaphore::new(PROCESSES_MAX)) }
    }

    /// The process that is meant, held, if one is.
    fn process(&self, reference: &Any) -> Result<Option<Held>, Status> {
        let Some(pid) = pid_of(reference)? else { return Ok(None) };
        let place = self.places.clone().try_acquire_owned();
        let _place = place.map_err(|_| Status::resource_exhausted("too many processes are watched for brokers"))?;
        let caller = Caller::of_pid(pid).map_err(|_| not_found(pid))?;
        Ok(Some(Held { caller, _place }))
    }

    pub(super) async fn resolve(&self, reference: &Any, broker: &SpiffeId) -> Result<Resolved, Status> {
        let process = self.process(reference)?;
        let asked = Reference { type_url: &reference.type_url, value: &reference.value, broker };
        let ask = |attestor: &Arc<dyn WorkloadAttestor>| {
            let (attestor, process) = (attestor.clone(), process.as_ref().map(|held| &held.caller));
            async move {
                let said = tokio::time::timeout(ATTESTOR_TIMEOUT, say(attestor.as_ref(), &asked, process)).await;
                (attestor, said.unwrap_or_else(|_| Said::Failed(PluginError::internal("it took too long"))))
            }
        };
        let mut answers: FuturesUnordered<_> = self.attestation.attestors.iter().map(ask).collect();
        let (mut selectors, mut understood, mut failed) = (Vec::new(), false, Vec::new());
        while let Some((attestor, said)) = answers.next().await {
            match said {
                Said::Selectors(found) => {
                    understood = true;
                    selectors.extend(found);
                }
                Said::Nothing => {}
                Said::Failed(error) => {
                    tracing::error!(subsystem_name = SUBSYSTEM, reference_type = %reference.type_url, %error, "workload attestor {:?} failed", attestor.name());
                    failed.push((
                        code_of(error.kind),
                        format!("workload attestor {:?} failed: {error}", attestor.name()),
                    ));
                }
            }
        }
        drop(answers);
        let resolved = Resolved { selectors: SelectorSet::new(selectors), process };
        resolved.check_alive()?;
        match failed.first() {
            _ if understood || self.attestation.attestors.is_empty() => Ok(resolved),
            Some((code, _)) => {
                let texts: Vec<&str> = failed.iter().map(|(_, text)| text.as_str()).collect();
                Err(Status::new(*code, texts.join("\n")))
            }
            None => Err(Status::new(Code::Unimplemented, "no workload attestor handled reference")),
        }
    }
}

async fn say(attestor: &dyn WorkloadAttestor, reference: &Reference<'_>, process: Option<&Caller>) -> Said {
    let said = match (attestor.attest_reference(reference).await, process) {
        (Ok(None), Some(process)) => {
            let peer = Peer { pid: process.peer.pid, proc_dir: process.peer.handle.proc_dir() };
            attestor.attest(&peer).await.map(Some)
        }
        (said, _) => said,
    };
    match said {
        Ok(Some(selectors)) => Said::Selectors(selectors),
        Ok(None) => Said::Nothing,
        Err(error) => Said::Failed(error),
    }
}

/// The number of the process that is meant, if one is.
fn pid_of(reference: &Any) -> Result<Option<i32>, Status> {
    if reference.type_url != PID_REFERENCE {
        return Ok(None);
    }
    let invalid = || Status::invalid_argument("workload reference must name a process by a positive number");
    let WorkloadPidReference { pid } =
        WorkloadPidReference::decode(reference.value.as_slice()).map_err(|_| invalid())?;
    if pid <= 0 {
        return Err(invalid());
    }
    Ok(Some(pid))
}
