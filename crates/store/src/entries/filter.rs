//! Filters: of entries, which are listed from memory, and of agents' selectors as SQL.

use crate::StoreError;
use crate::sql::{Dialect, Query};
use finial_core::{MatchBehavior, Selector, SpiffeId, TrustDomain};

/// Which entries are wanted; every part that is set must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntryFilter {
    /// Exactly this SPIFFE ID.
    pub spiffe_id: Option<SpiffeId>,
    /// Exactly this parent.
    pub parent_id: Option<SpiffeId>,
    /// The selectors relate so to the given ones; never an empty list.
    pub selectors: Option<(MatchBehavior, Vec<Selector>)>,
    /// The federated trust domains relate so to the given ones; never an empty list.
    pub federates_with: Option<(MatchBehavior, Vec<TrustDomain>)>,
    /// Exactly this hint.
    pub hint: Option<String>,
    /// `Some(true)`: only downstream servers. `Some(false)` filters nothing, as in SPIRE, whose CLI always sends it.
    pub downstream: Option<bool>,
}

/// The rows of agents' selectors; the agent's row is called `e`.
const OF_AGENT: &str = "(SELECT s.spiffe_id FROM node_resolver_map_entries s WHERE ";

/// Appends ` AND …`: the agent's selectors relate so to the given ones.
pub(crate) fn selector_clauses<'q>(
    query: &mut Query<'q>,
    dialect: Dialect,
    behavior: MatchBehavior,
    selectors: &'q [Selector],
) -> Result<(), StoreError> {
    if selectors.is_empty() {
        return Err(StoreError::InvalidArgument("cannot list by empty selectors set".into()));
    }
    let is = |query: &mut Query<'q>, selector: &'q Selector| {
        query.push("(").equals(dialect, "s.type", &selector.kind);
        query.and_equals(dialect, "s.value", &selector.value).push(")");
    };
    let any_of = |query: &mut Query<'q>| {
        for (i, selector) in selectors.iter().enumerate() {
            query.push(if i == 0 { "(" } else { " OR " });
            is(query, selector);
        }
        query.push(")");
    };
    match behavior {
        MatchBehavior::Any | MatchBehavior::Subset => {
            query.push(" AND e.spiffe_id IN ").push(OF_AGENT);
            any_of(query);
            query.push(")");
        }
        MatchBehavior::Exact | MatchBehavior::Superset => {
            for selector in selectors {
                query.push(" AND e.spiffe_id IN ").push(OF_AGENT);
                is(query, selector);
                query.push(")");
            }
        }
    }
    if matches!(behavior, MatchBehavior::Exact | MatchBehavior::Subset) {
        query.push(" AND NOT EXISTS ").push(OF_AGENT).push("s.spiffe_id = e.spiffe_id AND NOT ");
        any_of(query);
        query.push(")");
    }
    Ok(())
}
