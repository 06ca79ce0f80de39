//! The in-memory index of registration entries: what each agent may have, and who is an admin, without a query.
//!
//! An entry lies once in memory, in its protobuf form; all else is a number of four bytes: its slot. Tables find the slot
//! by ID, and the first slot of those that share a path or a parent; slots of one path, or of one parent, are linked.
//! A million entries of usual size take about 300 MB.

use super::Indexed;
use finial_core::{Entry, EntryId, Selector, SelectorSet, SpiffeId, TrustDomain};
use hashbrown::HashTable;
use hashbrown::hash_table::Entry as Place;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::ops::Bound;

/// Where an entry is.
type SlotId = u32;
const NONE: SlotId = SlotId::MAX;
/// Entries looked at on the way up before it is tried from above.
const CLIMB_MAX: usize = 64;

/// Neighbours in a chain.
#[derive(Clone, Copy)]
struct Link {
    before: SlotId,
    after: SlotId,
}

const ALONE: Link = Link { before: NONE, after: NONE };

struct Slot {
    /// Empty in slots that are free.
    entry: Option<Indexed>,
    /// Those that give the same path.
    same_path: Link,
    /// Those below the same parent.
    same_parent: Link,
}

/// What slots are found by.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Id,
    Path,
    Parent,
}

/// The entries, by slot.
#[derive(Default)]
struct Slots(Vec<Slot>);

impl Slots {
    fn entry(&self, slot: SlotId) -> Option<&Indexed> {
        self.0.get(slot as usize).and_then(|s| s.entry.as_ref())
    }

    fn key(&self, by: By, slot: SlotId) -> &str {
        self.entry(slot).map_or("", |entry| match by {
            By::Id => entry.id(),
            By::Path => entry.path(),
            By::Parent => entry.parent_path(),
        })
    }

    fn link(&self, by: By, slot: SlotId) -> Link {
        self.0.get(slot as usize).map_or(ALONE, |s| if by == By::Path { s.same_path } else { s.same_parent })
    }

    fn link_mut(&mut self, by: By, slot: SlotId) -> Option<&mut Link> {
        let slot = self.0.get_mut(slot as usize)?;
        Some(if by == By::Path { &mut slot.same_path } else { &mut slot.same_parent })
    }
}

/// Chains of slots that share a key; the table knows the first of each.
struct Chains {
    by: By,
    first: HashTable<SlotId>,
}

impl Chains {
    fn new(by: By) -> Self {
        Self { by, first: HashTable::new() }
    }

    fn head(&self, slots: &Slots, hasher: &RandomState, key: &str) -> SlotId {
        let found = self.first.find(hasher.hash_one(key), |slot| slots.key(self.by, *slot) == key);
        found.copied().unwrap_or(NONE)
    }

    /// Puts the slot at the head of its chain.
    fn insert(&mut self, slots: &mut Slots, hasher: &RandomState, slot: SlotId) {
        let by = self.by;
        let key = slots.key(by, slot);
        let rehash = |slot: &SlotId| hasher.hash_one(slots.key(by, *slot));
        let place = self.first.entry(hasher.hash_one(key), |other| slots.key(by, *other) == key, rehash);
        let after = match place {
            Place::Occupied(mut head) => std::mem::replace(head.get_mut(), slot),
            Place::Vacant(place) => {
                place.insert(slot);
                NONE
            }
        };
        if let Some(link) = slots.link_mut(by, slot) {
            *link = Link { before: NONE, after };
        }
        if let Some(link) = slots.link_mut(by, after) {
            link.before = slot;
        }
    }

    fn remove(&mut self, slots: &mut Slots, hasher: &RandomState, slot: SlotId) {
        let Link { before, after } = slots.link(self.by, slot);
        if let Some(link) = slots.link_mut(self.by, after) {
            link.before = before;
        }
        if let Some(link) = slots.link_mut(self.by, before) {
            link.after = after;
            return;
        }
        let hash = hasher.hash_one(slots.key(self.by, slot));
        if let Ok(mut head) = self.first.find_entry(hash, |other| *other == slot) {
            if after == NONE {
                head.remove();
            } else {
                *head.get_mut() = after;
            }
        }
    }
}

struct Alias {
    slot: SlotId,
    selectors: SelectorSet,
}

/// The tables. Of entries in other trust domains only ID and row are known: they are listed, and reach nobody.
pub struct Index {
    trust_domain: TrustDomain,
    hasher: RandomState,
    slots: Slots,
    free: Vec<SlotId>,
    by_id: HashTable<SlotId>,
    by_path: Chains,
    /// By parent path; without the children of the server.
    children: Chains,
    /// By row ID, which is the order of lists.
    by_row: BTreeMap<i64, SlotId>,
    /// Each alias once, under that of its selectors which the fewest share: an agent with all of them has that one.
    aliases: HashMap<Selector, Vec<Alias>>,
}

impl Index {
    /// Without entries.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            hasher: RandomState::new(),
            slots: Slots::default(),
            free: Vec::new(),
            by_id: HashTable::new(),
            by_path: Chains::new(By::Path),
            children: Chains::new(By::Parent),
            by_row: BTreeMap::new(),
            aliases: HashMap::new(),
        }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// The trust domain whose entries these are.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    fn slot(&self, id: &str) -> Option<SlotId> {
        self.by_id.find(self.hasher.hash_one(id), |slot| self.slots.key(By::Id, *slot) == id).copied()
    }

    /// The entry with this ID.
    pub fn get(&self, id: &str) -> Option<&Indexed> {
        self.slots.entry(self.slot(id)?)
    }

    /// Whether an entry with this ID is known.
    pub fn contains(&self, id: &EntryId) -> bool {
        self.slot(id.as_str()).is_some()
    }

    /// Adds an entry, or replaces the one with its ID. `row` is its row ID; 0 when not known, and then that of the entry
    /// it replaces holds.
    pub fn put(&mut self, entry: &Entry, row: i64) {
        let known = if row == 0 { self.get(entry.id.as_str()).map_or(0, Indexed::row) } else { row };
        self.insert(Indexed::new(entry, known, &self.trust_domain));
    }

    /// The same for an entry in its form for memory.
    pub(crate) fn insert(&mut self, entry: Indexed) {
        self.remove(entry.id());
        let (row, is_foreign) = (entry.row(), entry.is_foreign());
        let alias = entry.is_alias().then(|| selectors_of(&entry));
        let filled = Slot { entry: Some(entry), same_path: ALONE, same_parent: ALONE };
        let slot = match self.free.pop() {
            Some(slot) => {
                if let Some(place) = self.slots.0.get_mut(slot as usize) {
                    *place = filled;
                }
                slot
            }
            None => {
                self.slots.0.push(filled);
                // Four billion entries do not fit into memory.
                SlotId::try_from(self.slots.0.len() - 1).unwrap_or(NONE)
            }
        };
        let hash = |slot: &SlotId| self.hasher.hash_one(self.slots.key(By::Id, *slot));
        self.by_id.insert_unique(hash(&slot), slot, hash);
        if row != 0 {
            self.by_row.insert(row, slot);
        }
        if is_foreign {
            return;
        }
        self.by_path.insert(&mut self.slots, &self.hasher, slot);
        match alias {
            None => self.children.insert(&mut self.slots, &self.hasher, slot),
            Some(selectors) => {
                let rarest = selectors.iter().min_by_key(|s| self.aliases.get(s).map_or(0, Vec::len)).cloned();
                if let Some(selector) = rarest {
                    self.aliases.entry(selector).or_default().push(Alias { slot, selectors });
                }
            }
        }
    }

    /// Removes the entry with this ID, if there is one.
    pub fn remove(&mut self, id: &str) {
        let Some(slot) = self.slot(id) else { return };
        let Some(gone) = self.slots.entry(slot).cloned() else { return };
        if !gone.is_foreign() {
            self.by_path.remove(&mut self.slots, &self.hasher, slot);
            if gone.is_alias() {
                // It is under one of its own selectors.
                for selector in selectors_of(&gone).into_vec() {
                    let Some(list) = self.aliases.get_mut(&selector) else { continue };
                    list.retain(|alias| alias.slot != slot);
                    if list.is_empty() {
                        self.aliases.remove(&selector);
                    }
                }
            } else {
                self.children.remove(&mut self.slots, &self.hasher, slot);
            }
        }
        if self.by_row.get(&gone.row()) == Some(&slot) {
            self.by_row.remove(&gone.row());
        }
        if let Ok(place) = self.by_id.find_entry(self.hasher.hash_one(id), |other| *other == slot) {
            place.remove();
        }
        if let Some(place) = self.slots.0.get_mut(slot as usize) {
            *place = Slot { entry: None, same_path: ALONE, same_parent: ALONE };
        }
        self.free.push(slot);
    }

    fn chain<'a>(&'a self, chains: &'a Chains, key: &str) -> impl Iterator<Item = &'a Indexed> + use<'a> {
        let mut slot = chains.head(&self.slots, &self.hasher, key);
        std::iter::from_fn(move || {
            let entry = self.slots.entry(slot)?;
            slot = self.slots.link(chains.by, slot).after;
            Some(entry)
        })
    }

    /// The entries that give the path, in no particular order.
    pub fn named(&self, path: &str) -> impl Iterator<Item = &Indexed> {
        self.chain(&self.by_path, path)
    }

    /// The entries right below the path, in no particular order; none for the server's own.
    pub fn below(&self, path: &str) -> impl Iterator<Item = &Indexed> {
        self.chain(&self.children, path)
    }

    /// At most `count` entries whose row IDs come after `after`, in their order.
    pub fn after(&self, after: i64, count: usize) -> impl Iterator<Item = &Indexed> {
        let rows = self.by_row.range((Bound::Excluded(after), Bound::Unbounded)).take(count);
        rows.filter_map(|(_, slot)| self.slots.entry(*slot))
    }

    /// All entries, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &Indexed> {
        self.slots.0.iter().filter_map(|slot| slot.entry.as_ref())
    }

    /// Whether an entry makes the holder of `id` an admin.
    pub fn is_admin(&self, id: &SpiffeId) -> bool {
        id.is_member_of(&self.trust_domain) && self.named(id.path()).any(Indexed::is_admin)
    }

    /// Whether an entry makes the holder of `id` a downstream server.
    pub fn is_downstream(&self, id: &SpiffeId) -> bool {
        id.is_member_of(&self.trust_domain) && self.named(id.path()).any(Indexed::is_downstream)
    }

    /// The paths under which an agent's entries hang: its own, and those of the aliases whose selectors it has.
    fn roots<'a>(&'a self, agent: &'a SpiffeId, selectors: &SelectorSet) -> HashSet<&'a str> {
        let aliases = selectors.iter().filter_map(|s| self.aliases.get(s)).flatten();
        let matching = aliases.filter(|alias| alias.selectors.is_subset_of(selectors));
        let paths = matching.filter_map(|alias| self.slots.entry(alias.slot)).map(Indexed::path);
        std::iter::once(agent.path()).chain(paths).collect()
    }

    /// All entries that the agent may have: what hangs below its roots, at any depth. In no particular order.
    pub fn authorized(&self, agent: &SpiffeId, selectors: &SelectorSet) -> Vec<Indexed> {
        let mut found = Vec::new();
        let mut seen = self.roots(agent, selectors);
        let mut open: Vec<&str> = seen.iter().copied().collect();
        while let Some(path) = open.pop() {
            for entry in self.below(path) {
                found.push(entry.clone());
                let parent = self.children.head(&self.slots, &self.hasher, entry.path()) != NONE;
                if parent && seen.insert(entry.path()) {
                    open.push(entry.path());
                }
            }
        }
        found
    }

    /// For each ID, in order, its entry if the agent may have it. Walks up from the entry, so that the cost does not
    /// grow with the number of entries that the agent has; and once down instead, where very many lie above it (all nodes of
    /// a fleet that joined by tokens for one ID).
    pub fn authorized_among<'i>(
        &self,
        agent: &SpiffeId,
        selectors: &SelectorSet,
        ids: impl Iterator<Item = &'i str>,
    ) -> Vec<Option<Indexed>> {
        let roots = self.roots(agent, selectors);
        let mut reached = None;
        let mut may = |entry: &&Indexed| {
            self.hangs_below(entry, &roots).unwrap_or_else(|| {
                reached.get_or_insert_with(|| self.reached_from(&roots)).contains(entry.parent_path())
            })
        };
        ids.map(|id| self.get(id).filter(&mut may).cloned()).collect()
    }

    /// `None` when that would take longer than to go down from the roots.
    fn hangs_below(&self, entry: &Indexed, roots: &HashSet<&str>) -> Option<bool> {
        if entry.is_foreign() {
            return Some(false);
        }
        if roots.contains(entry.parent_path()) {
            return Some(true);
        }
        let mut seen = HashSet::from([entry.parent_path()]);
        let mut open = vec![entry.parent_path()];
        let mut steps = 0;
        while let Some(path) = open.pop() {
            for above in self.named(path) {
                if roots.contains(above.parent_path()) {
                    return Some(true);
                }
                if seen.insert(above.parent_path()) {
                    open.push(above.parent_path());
                }
                steps += 1;
                if steps > CLIMB_MAX {
                    return None;
                }
            }
        }
        Some(false)
    }

    /// All paths below which something hangs that can be reached from the roots, these included.
    fn reached_from<'a>(&'a self, roots: &HashSet<&'a str>) -> HashSet<&'a str> {
        let mut seen = roots.clone();
        let mut open: Vec<&str> = seen.iter().copied().collect();
        while let Some(path) = open.pop() {
            for entry in self.below(path) {
                let parent = self.children.head(&self.slots, &self.hasher, entry.path()) != NONE;
                if parent && seen.insert(entry.path()) {
                    open.push(entry.path());
                }
            }
        }
        seen
    }
}

fn selectors_of(entry: &Indexed) -> SelectorSet {
    entry.to_proto().selectors.into_iter().map(|s| Selector { kind: s.r#type, value: s.value }).collect()
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
