//! Lists of agents from memory, for when the datastore is away: what it would answer as of the last time.

use super::Nodes;
use super::node::Node;
use finial_core::{AgentRecord, SpiffeId, UnixSeconds};
use finial_store::{AgentFilter, Listed, Page, StoreError};
use std::sync::PoisonError;

/// As the datastore has it: an agent without selectors matches no set of them.
fn matches(filter: &AgentFilter, node: &Node) -> bool {
    let AgentFilter { attestation_type, selectors, banned, can_reattest, expires_before, valid_at } = filter;
    attestation_type.as_ref().is_none_or(|kind| **kind == *node.kind)
        && banned.is_none_or(|banned| banned == node.is_banned())
        && can_reattest.is_none_or(|can| can == node.can_reattest)
        && expires_before.is_none_or(|before| node.expires_at < before)
        && valid_at.is_none_or(|at| node.expires_at >= at)
        && selectors.as_ref().is_none_or(|(behavior, given)| {
            !node.selectors.is_empty() && behavior.matches(node.selectors.as_slice(), given)
        })
}

impl Nodes {
    /// One agent.
    pub fn record(&self, id: &SpiffeId) -> Option<AgentRecord> {
        self.with(id, |node| node.map(|node| node.to_record(id)))
    }

    /// Each agent that is not banned and has an SVID that has not ended. Nothing else of agents may be asked meanwhile.
    pub(crate) fn each_living(&self, now: UnixSeconds, mut each: impl FnMut(&SpiffeId)) {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let lives = |node: &Node| {
            let pending = node.pending.iter().map(|given| given.expires_at).max().unwrap_or_default();
            !node.is_banned() && node.expires_at.max(node.new_expires_at).max(pending) >= now
        };
        map.iter().filter(|(_, node)| lives(node)).for_each(|(id, _)| each(id));
    }

    /// How many agents match.
    pub fn count_matching(&self, filter: &AgentFilter) -> usize {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.values().filter(|node| matches(filter, node)).count()
    }

    /// The agents that match.
    pub fn list(&self, filter: &AgentFilter, page: Option<&Page>) -> Result<Listed<AgentRecord>, StoreError> {
        let after = page.map_or(Ok(0), Page::after)?;
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let chosen = map.iter().filter(|(_, node)| node.row > after && matches(filter, node));
        let mut chosen: Vec<_> = chosen.map(|(id, node)| (node.row, id)).collect();
        chosen.sort_unstable();
        if let Some(page) = page {
            chosen.truncate(usize::try_from(page.size).unwrap_or(usize::MAX));
        }
        let last = chosen.last().map(|(row, _)| *row);
        let items = chosen.iter().filter_map(|(_, id)| map.get(*id).map(|node| node.to_record(id))).collect();
        Ok(Listed::new(items, page, last))
    }
}
