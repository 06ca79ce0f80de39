//! Filters as SQL: a page is filled by the database itself, so none has to be topped up.

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

/// Where the parts to match are found: `SELECT {owner} FROM {from} WHERE …` gives the rows that have a part, and
/// `{correlated}` ties that query to the row `e` in question.
struct Parts {
    owner: &'static str,
    from: &'static str,
    correlated: &'static str,
    key: &'static str,
}

const ENTRY_SELECTORS: Parts = Parts {
    owner: "s.registered_entry_id",
    from: "selectors s",
    correlated: "s.registered_entry_id = e.id",
    key: "e.id",
};
const NODE_SELECTORS: Parts = Parts {
    owner: "s.spiffe_id",
    from: "node_resolver_map_entries s",
    correlated: "s.spiffe_id = e.spiffe_id",
    key: "e.spiffe_id",
};
const FEDERATED: Parts = Parts {
    owner: "f.registered_entry_id",
    from: "federated_registration_entries f JOIN bundles b ON b.id = f.bundle_id",
    correlated: "f.registered_entry_id = e.id",
    key: "e.id",
};

impl EntryFilter {
    /// Appends ` AND …` for each part; the entry's row is called `e`.
    pub(crate) fn clauses<'q>(&'q self, query: &mut Query<'q>, dialect: Dialect) -> Result<(), StoreError> {
        if let Some(id) = &self.spiffe_id {
            query.and_equals(dialect, "e.spiffe_id", id.as_str());
        }
        if let Some(id) = &self.parent_id {
            query.and_equals(dialect, "e.parent_id", id.as_str());
        }
        if let Some(hint) = &self.hint {
            query.and_equals(dialect, "e.hint", hint);
        }
        if self.downstream == Some(true) {
            query.push(" AND e.downstream = ").push_bind(true);
        }
        if let Some((behavior, selectors)) = &self.selectors {
            if selectors.is_empty() {
                return Err(StoreError::InvalidArgument("cannot list by empty selector set".into()));
            }
            matching(query, &ENTRY_SELECTORS, *behavior, selectors, |query, s| is_selector(query, dialect, s));
        }
        if let Some((behavior, trust_domains)) = &self.federates_with {
            if trust_domains.is_empty() {
                return Err(StoreError::InvalidArgument("cannot list by empty trust domain set".into()));
            }
            matching(query, &FEDERATED, *behavior, trust_domains, |query, trust_domain| {
                query.push("b.trust_domain = ").push_bind(trust_domain.id_string());
            });
        }
        Ok(())
    }
}

/// The same for the selectors of agents; the agent's row is called `e`.
pub(crate) fn selector_clauses<'q>(
    query: &mut Query<'q>,
    dialect: Dialect,
    behavior: MatchBehavior,
    selectors: &'q [Selector],
) -> Result<(), StoreError> {
    if selectors.is_empty() {
        return Err(StoreError::InvalidArgument("cannot list by empty selectors set".into()));
    }
    matching(query, &NODE_SELECTORS, behavior, selectors, |query, s| is_selector(query, dialect, s));
    Ok(())
}

fn is_selector<'q>(query: &mut Query<'q>, dialect: Dialect, selector: &'q Selector) {
    query.push("(").equals(dialect, "s.type", &selector.kind);
    query.and_equals(dialect, "s.value", &selector.value).push(")");
}

fn matching<'q, T>(
    query: &mut Query<'q>,
    parts: &Parts,
    behavior: MatchBehavior,
    given: &'q [T],
    is: impl Fn(&mut Query<'q>, &'q T),
) {
    let Parts { owner, from, correlated, key } = parts;
    let any_of = |query: &mut Query<'q>| {
        for (i, part) in given.iter().enumerate() {
            query.push(if i == 0 { "(" } else { " OR " });
            is(query, part);
        }
        query.push(")");
    };
    match behavior {
        MatchBehavior::Any | MatchBehavior::Subset => {
            query.push(&format!(" AND {key} IN (SELECT {owner} FROM {from} WHERE "));
            any_of(query);
            query.push(")");
        }
        MatchBehavior::Exact | MatchBehavior::Superset => {
            for part in given {
                query.push(&format!(" AND {key} IN (SELECT {owner} FROM {from} WHERE "));
                is(query, part);
                query.push(")");
            }
        }
    }
    if matches!(behavior, MatchBehavior::Exact | MatchBehavior::Subset) {
        query.push(&format!(" AND NOT EXISTS (SELECT 1 FROM {from} WHERE {correlated} AND NOT "));
        any_of(query);
        query.push(")");
    }
}
