//! Attestors: who proves what a node or a workload is.

use crate::PluginError;
use async_trait::async_trait;
use finial_core::{Selector, SpiffeId};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

/// What a node attestor found out about an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttestVerdict {
    /// `spiffe://TD/spire/agent/…`.
    pub agent_id: SpiffeId,
    /// Facts about the node.
    pub selectors: Vec<Selector>,
    /// Whether the same evidence may be used again.
    pub can_reattest: bool,
}

/// The agent's end of an attestation, as the server's half of an attestor sees it.
#[async_trait]
pub trait Challenger: Send {
    /// Sends a challenge and waits for the answer; the caller sees to deadline and size limit.
    async fn challenge(&mut self, challenge: Vec<u8>) -> Result<Vec<u8>, PluginError>;

    /// Where the agent connects from, when that is known.
    fn client_ip(&self) -> Option<IpAddr> {
        None
    }
}

/// The server's half of a node attestor.
#[async_trait]
pub trait ServerNodeAttestor: Send + Sync {
    /// Judges `payload`, with as many challenges as it needs. `payload` is not trusted and not yet looked at; the caller
    /// has limited its size.
    async fn attest(&self, payload: &[u8], challenger: &mut dyn Challenger) -> Result<AttestVerdict, PluginError>;
}

/// The agent's half of a node attestor.
#[async_trait]
pub trait AgentNodeAttestor: Send + Sync {
    /// Begins an attempt: gathers the evidence, and what is needed to answer challenges about it.
    async fn begin(&self) -> Result<Box<dyn AttestSession>, PluginError>;
}

/// One attempt to attest.
#[async_trait]
pub trait AttestSession: Send {
    /// The evidence.
    fn payload(&self) -> &[u8];

    /// Answers a challenge.
    async fn respond(&mut self, challenge: &[u8]) -> Result<Vec<u8>, PluginError>;
}

/// The process at the other end of a local connection, held by its `/proc/PID` folder: a later process with the same
/// number is never reached through it.
#[derive(Clone, Copy, Debug)]
pub struct Peer<'a> {
    /// Its number, as the agent's PID namespace knows it. For messages and for external plugins; not an identity.
    pub pid: i32,
    /// Its `/proc/PID`, open. Reading through it fails once the process is gone.
    pub proc_dir: BorrowedFd<'a>,
}

/// A workload as a broker names it. Neither the value nor that there is such a workload is trusted.
#[derive(Clone, Copy, Debug)]
pub struct Reference<'a> {
    /// `type.googleapis.com/…`: of which kind it is. The broker may use this kind.
    pub type_url: &'a str,
    /// The protobuf message of that kind.
    pub value: &'a [u8],
    /// Who asks.
    pub broker: &'a SpiffeId,
}

/// Finds out facts about a local process.
#[async_trait]
pub trait WorkloadAttestor: Send + Sync {
    /// Its name, which is also the type of its selectors.
    fn name(&self) -> &str;

    /// Attests the process at the other end of a connection. The caller checks before and after that it is still alive.
    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError>;

    /// Attests a workload that a broker refers to; `None` if this attestor knows no such references. It is asked for the
    /// process instead where the reference is one.
    async fn attest_reference(&self, _reference: &Reference<'_>) -> Result<Option<Vec<Selector>>, PluginError> {
        Ok(None)
    }
}

/// Makes selectors of `kind` from `values`, leaving out empty ones (which no entry could name).
pub fn prefixed_selectors(kind: &str, values: impl IntoIterator<Item = String>) -> Vec<Selector> {
    let make = |value: String| (!value.is_empty()).then(|| Selector { kind: kind.to_owned(), value });
    values.into_iter().filter_map(make).collect()
}
