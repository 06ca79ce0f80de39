//! Attested agents and their selectors.

use crate::{Listed, Page, Store, StoreError};
use finial_core::{
    AgentRecord, Entry, EntryId, JoinToken, MatchBehavior, Selector, SelectorSet, SpiffeId, UnixSeconds,
};

/// Which agents are wanted; every part that is set must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentFilter {
    /// Exactly this attestor.
    pub attestation_type: Option<String>,
    /// The selectors relate so to the given ones; never an empty list.
    pub selectors: Option<(MatchBehavior, Vec<Selector>)>,
    /// Banned or not.
    pub banned: Option<bool>,
    /// May attest again or not.
    pub can_reattest: Option<bool>,
    /// The SVID ends before this moment.
    pub expires_before: Option<UnixSeconds>,
    /// The SVID ends at or after this moment.
    pub valid_at: Option<UnixSeconds>,
}

/// Which parts of an agent an update replaces; `None` leaves a part as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are those of `AgentRecord`
pub struct AgentUpdate {
    pub attestation_type: Option<String>,
    pub serial_number: Option<String>,
    pub expires_at: Option<UnixSeconds>,
    pub new_serial_number: Option<String>,
    pub new_expires_at: Option<UnixSeconds>,
    pub can_reattest: Option<bool>,
    pub agent_version: Option<String>,
}

impl Store {
    /// Stores an attested agent with its selectors (`record.selectors` replaces what was there). An agent that exists is
    /// updated: type, serials, expiry and `can_reattest`; its version stays when `record.agent_version` is empty.
    pub async fn create_or_update_node(&self, record: &AgentRecord) -> Result<AgentRecord, StoreError> {
        todo!()
    }

    /// In one transaction: uses up the join token and stores the agent, so that a crash cannot burn the token.
    /// The token as it was comes back; `None` (and nothing stored) when it does not exist or was used. A token that has
    /// expired at `now` is used up and comes back, but no agent is stored: compare `expires_at`.
    pub async fn attest_by_join_token(
        &self,
        token: &str,
        record: &AgentRecord,
        now: UnixSeconds,
    ) -> Result<Option<JoinToken>, StoreError> {
        todo!()
    }

    /// Replaces the selectors of an agent.
    pub async fn set_node_selectors(&self, id: &SpiffeId, selectors: &SelectorSet) -> Result<(), StoreError> {
        todo!()
    }

    /// One agent with its selectors.
    pub async fn fetch_node(&self, id: &SpiffeId) -> Result<Option<AgentRecord>, StoreError> {
        todo!()
    }

    /// The agents that match, with their selectors.
    pub async fn list_nodes(
        &self,
        filter: &AgentFilter,
        page: Option<&Page>,
    ) -> Result<Listed<AgentRecord>, StoreError> {
        todo!()
    }

    /// How many agents match.
    pub async fn count_nodes(&self, filter: &AgentFilter) -> Result<u64, StoreError> {
        todo!()
    }

    /// Hands every agent with its selectors to `each`, in pages of bounded size.
    pub async fn load_nodes(&self, each: impl FnMut(AgentRecord) + Send) -> Result<(), StoreError> {
        todo!()
    }

    /// Changes an agent. `NotFound` when there is none.
    pub async fn update_node(&self, id: &SpiffeId, update: AgentUpdate) -> Result<AgentRecord, StoreError> {
        todo!()
    }

    /// The renewed SVID was used: it becomes the current one, if `new_serial` is still the renewed one.
    pub async fn promote_serial(&self, id: &SpiffeId, new_serial: &str) -> Result<AgentRecord, StoreError> {
        todo!()
    }

    /// Clears both serials: the agent stays listed and can never come back until it is deleted.
    pub async fn ban_node(&self, id: &SpiffeId) -> Result<AgentRecord, StoreError> {
        todo!()
    }

    /// Deletes an agent, its selectors and, for a join-token agent, the alias entry made with the token.
    /// Returns the agent and the alias entries that went with it. `NotFound` when there is none.
    pub async fn delete_node(&self, id: &SpiffeId) -> Result<(AgentRecord, Vec<Entry>), StoreError> {
        todo!()
    }

    /// Deletes at most `batch` agents whose SVID ended before `expired_before` (never banned ones; those that cannot
    /// attest again only when asked). Returns their IDs and those of the alias entries that went with them.
    pub async fn prune_nodes(
        &self,
        expired_before: UnixSeconds,
        include_non_reattestable: bool,
        batch: u32,
    ) -> Result<(Vec<SpiffeId>, Vec<EntryId>), StoreError> {
        todo!()
    }
}
