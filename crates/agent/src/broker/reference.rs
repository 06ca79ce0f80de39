//! Which workload a broker means: a process, or whatever an attestor understands.

use crate::workload_api::{ATTESTOR_TIMEOUT, Attestation, Caller, LOOKS_MAX};
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
    process: Process,
}

/// The process that is meant, if one is.
struct Process(Option<Held>);

/// A process that is watched; each costs file descriptors.
struct Held {
    caller: Caller,
    _place: OwnedSemaphorePermit,
}

impl Resolved {
    /// Nothing may be said for a process that has ended.
    pub(super) fn check_alive(&self) -> Result<(), Status> {
        self.process.check_alive()
    }
}

impl Process {
    fn caller(&self) -> Option<&Caller> {
        self.0.as_ref().map(|held| &held.caller)
    }

    fn check_alive(&self) -> Result<(), Status> {
        match self.caller() {
            Some(caller) if !caller.peer.handle.is_alive() => Err(not_found(caller.peer.pid)),
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

    fn process(&self, reference: &Any) -> Result<Process, Status> {
        let Some(pid) = pid_of(reference)? else { return Ok(Process(None)) };
        let place = self.places.clone().try_acquire_owned();
        let _place = place.map_err(|_| Status::resource_exhausted("too many processes are watched for brokers"))?;
        let caller = Caller::of_pid(pid).map_err(|_| not_found(pid))?;
        Ok(Process(Some(Held { caller, _place })))
    }

    pub(super) async fn resolve(&self, reference: &Any, broker: &SpiffeId) -> Result<Resolved, Status> {
        let process = self.process(reference)?;
        for _ in 0..LOOKS_MAX {
            let print = process.caller().map(Caller::print);
            let selectors = self.ask(reference, broker, process.caller()).await;
            process.check_alive()?;
            if process.caller().map(Caller::print) == print {
                return Ok(Resolved { selectors: selectors?, process });
            }
            // The selectors are in part those of the program or user before.
        }
        Err(Status::unavailable("workload attestation failed: the process changed while it was attested"))
    }

    async fn ask(&self, reference: &Any, broker: &SpiffeId, process: Option<&Caller>) -> Result<SelectorSet, Status> {
        let asked = Reference { type_url: &reference.type_url, value: &reference.value, broker };
        let ask = |attestor: &Arc<dyn WorkloadAttestor>| {
            let attestor = attestor.clone();
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
        match failed.first() {
            _ if understood || self.attestation.attestors.is_empty() => Ok(SelectorSet::new(selectors)),
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
