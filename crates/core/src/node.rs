//! Attested agents and the tokens with which they join, as the datastore keeps them.

use crate::{SelectorSet, SpiffeId, UnixSeconds};

/// An attested agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentRecord {
    /// `spiffe://TD/spire/agent/…`.
    pub id: SpiffeId,
    /// The attestor's name, such as `join_token`.
    pub attestation_type: String,
    /// Serial of the current SVID in decimal; empty = banned.
    pub serial_number: String,
    /// When the current SVID ends.
    pub expires_at: UnixSeconds,
    /// Serial of a renewed SVID that was not used yet; empty = none.
    pub new_serial_number: String,
    /// When the renewed SVID ends; 0 = none.
    pub new_expires_at: UnixSeconds,
    /// Whether it may attest again with the same evidence.
    pub can_reattest: bool,
    /// What the agent said of its version; at most 255 characters.
    pub agent_version: String,
    /// What its attestor found out.
    pub selectors: SelectorSet,
}

impl AgentRecord {
    /// A banned agent keeps its row but has no serial.
    pub fn is_banned(&self) -> bool {
        self.serial_number.is_empty() && self.new_serial_number.is_empty()
    }
}

/// A token with which one agent may join once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    /// The token's text: 1 to 255 bytes, also the last part of the agent's path.
    pub token: String,
    /// When it stops being accepted.
    pub expires_at: UnixSeconds,
}
