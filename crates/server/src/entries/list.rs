//! Lists of entries from memory: what the datastore would answer, in its order and with its page tokens.

use super::{Entries, Indexed};
use finial_core::{MatchBehavior, Selector};
use finial_proto::types;
use finial_store::{EntryFilter, Listed, Page, StoreError};

/// How many entries are taken from the index and decoded at once, so that writers and other calls wait for little.
const PIECE: usize = 4096;

/// `spiffe://TD/PATH`
fn is(wire: Option<&types::Spiffeid>, id: &finial_core::SpiffeId) -> bool {
    wire.is_some_and(|wire| wire.trust_domain == id.trust_domain_name() && wire.path == id.path())
}

/// Nothing matches no set, as in the datastore.
fn related<T: PartialEq>(behavior: MatchBehavior, have: &[T], given: &[T]) -> bool {
    !have.is_empty() && behavior.matches(have, given)
}

fn matches(filter: &EntryFilter, entry: &types::Entry) -> bool {
    let EntryFilter { spiffe_id, parent_id, selectors, federates_with, hint, downstream } = filter;
    spiffe_id.as_ref().is_none_or(|id| is(entry.spiffe_id.as_ref(), id))
        && parent_id.as_ref().is_none_or(|id| is(entry.parent_id.as_ref(), id))
        && hint.as_ref().is_none_or(|hint| *hint == entry.hint)
        && (*downstream != Some(true) || entry.downstream)
        && selectors.as_ref().is_none_or(|(behavior, given)| {
            let selector = |s: &types::Selector| Selector { kind: s.r#type.clone(), value: s.value.clone() };
            let have: Vec<Selector> = entry.selectors.iter().map(selector).collect();
            related(*behavior, &have, given)
        })
        && federates_with.as_ref().is_none_or(|(behavior, given)| {
            let given: Vec<&str> = given.iter().map(finial_core::TrustDomain::as_str).collect();
            let have: Vec<&str> = entry.federates_with.iter().map(String::as_str).collect();
            related(*behavior, &have, &given)
        })
}

impl Entries {
    /// One entry.
    pub fn get(&self, id: &str) -> Option<Indexed> {
        self.read().get(id).cloned()
    }

    /// The entries that match.
    pub async fn list(&self, filter: &EntryFilter, page: Option<&Page>) -> Result<Listed<types::Entry>, StoreError> {
        let after = page.map_or(Ok(0), Page::after)?;
        let most = page.map_or(usize::MAX, |page| usize::try_from(page.size).unwrap_or(usize::MAX));
        let (mut items, mut last) = (Vec::new(), None);
        let each = |row, entry| {
            last = Some(row);
            items.push(entry);
        };
        self.each_match(filter, after, most, each).await;
        Ok(Listed::new(items, page, last))
    }

    /// How many entries match.
    pub async fn count_matching(&self, filter: &EntryFilter) -> usize {
        if *filter == EntryFilter::default() {
            return self.count();
        }
        let mut count = 0;
        self.each_match(filter, 0, usize::MAX, |_, _| count += 1).await;
        count
    }

    /// Gives `most` of the entries that match, with their rows. Others run after every piece: a million take seconds.
    async fn each_match(
        &self,
        filter: &EntryFilter,
        mut after: i64,
        mut most: usize,
        mut each: impl FnMut(i64, types::Entry) + Send,
    ) {
        while most > 0 {
            let want = if *filter == EntryFilter::default() { PIECE.min(most) } else { PIECE };
            let (candidates, more) = self.candidates(filter, after, want);
            for piece in candidates.chunks(PIECE) {
                for entry in piece {
                    after = entry.row();
                    let wire = entry.to_proto();
                    if matches(filter, &wire) {
                        each(after, wire);
                        most -= 1;
                        if most == 0 {
                            return;
                        }
                    }
                }
                tokio::task::yield_now().await;
            }
            if !more {
                return;
            }
        }
    }

    /// Entries that may match, in their order, and whether there may be more after them.
    fn candidates(&self, filter: &EntryFilter, after: i64, count: usize) -> (Vec<Indexed>, bool) {
        let index = self.read();
        let own = |id: &&finial_core::SpiffeId| id.is_member_of(index.trust_domain());
        let all: Vec<Indexed> = if let Some(id) = filter.spiffe_id.as_ref().filter(own) {
            index.named(id.path()).cloned().collect()
        } else if let Some(id) = filter.parent_id.as_ref().filter(own).filter(|id| !id.is_server()) {
            index.below(id.path()).cloned().collect()
        } else {
            let some: Vec<Indexed> = index.after(after, count).cloned().collect();
            let more = some.len() == count;
            return (some, more);
        };
        drop(index);
        let mut all: Vec<Indexed> = all.into_iter().filter(|entry| entry.row() > after).collect();
        all.sort_by_key(Indexed::row);
        // Foreign entries with this path or parent are in no chain.
        (all, false)
    }
}

#[cfg(test)]
#[path = "list_tests.rs"]
mod tests;
