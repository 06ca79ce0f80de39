//! The in-memory index of registration entries: what each agent may have, and who is an admin, without a query.
//!
//! Each entry is kept once, in its protobuf form (about 150 bytes), with the three texts that lookups need found by their
//! position in it: 100,000 entries stay below 30 MB. The maps hold shared pointers only.

use finial_core::{Entry, EntryId, Selector, SelectorSet, SpiffeId, TrustDomain};
use finial_proto::types;
use prost::Message;
use std::borrow::Borrow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;

/// Children of the server are node aliases: they name groups of agents and are never handed out themselves.
const SERVER_PATH: &str = "/spire/server";

/// One entry, immutable; an update makes a new one.
pub struct Indexed {
    /// `spire.api.types.Entry`.
    encoded: Box<[u8]>,
    id: Range<u16>,
    path: Range<u16>,
    parent: Range<u16>,
    /// As in the entry.
    pub admin: bool,
    /// As in the entry.
    pub downstream: bool,
    /// As in the entry.
    pub revision_number: i64,
    /// As in the entry, unix seconds.
    pub created_at: i64,
}

impl Indexed {
    fn new(entry: &Entry) -> Self {
        let encoded = finial_proto::convert::entry_to_proto(entry).encode_to_vec().into_boxed_slice();
        let (id, path, parent) = spans(&encoded).unwrap_or_default();
        Self {
            encoded,
            id,
            path,
            parent,
            admin: entry.admin,
            downstream: entry.downstream,
            revision_number: entry.revision_number,
            created_at: entry.created_at,
        }
    }

    fn text(&self, span: &Range<u16>) -> &str {
        let bytes = self.encoded.get(usize::from(span.start)..usize::from(span.end));
        bytes.and_then(|b| std::str::from_utf8(b).ok()).unwrap_or_default()
    }

    /// The entry's ID.
    pub fn id(&self) -> &str {
        self.text(&self.id)
    }

    /// The path of its SPIFFE ID.
    pub fn path(&self) -> &str {
        self.text(&self.path)
    }

    /// The path of its parent's ID.
    pub fn parent_path(&self) -> &str {
        self.text(&self.parent)
    }

    /// The whole entry as the API has it.
    pub fn to_proto(&self) -> types::Entry {
        types::Entry::decode(&*self.encoded).unwrap_or_default()
    }
}

/// Where ID, path and parent path lie in an encoded entry: fields 1, 2.2 and 3.2, which come first and in order. IDs are at
/// most 255 bytes and SPIFFE IDs 2048, so that all of it lies below 64 KiB.
fn spans(encoded: &[u8]) -> Option<(Range<u16>, Range<u16>, Range<u16>)> {
    let mut at = 0;
    let id = field(encoded, &mut at, 1)?;
    let mut spiffe_id = field(encoded, &mut at, 2)?;
    let mut parent_id = field(encoded, &mut at, 3)?;
    let path = |outer: &mut Range<usize>| {
        field(encoded, &mut outer.start, 1)?;
        field(encoded, &mut outer.start, 2)
    };
    let (path, parent) = (path(&mut spiffe_id)?, path(&mut parent_id)?);
    let narrow = |r: Range<usize>| Some(u16::try_from(r.start).ok()?..u16::try_from(r.end).ok()?);
    Some((narrow(id)?, narrow(path)?, narrow(parent)?))
}

/// The content of the length-delimited field `number` that begins at `at`, which then points behind it.
fn field(bytes: &[u8], at: &mut usize, number: u8) -> Option<Range<usize>> {
    if *bytes.get(*at)? != number << 3 | 2 {
        return None;
    }
    let mut rest = bytes.get(*at + 1..)?;
    let before = rest.len();
    let len = usize::try_from(prost::encoding::decode_varint(&mut rest).ok()?).ok()?;
    let start = *at + 1 + (before - rest.len());
    *at = start.checked_add(len)?;
    Some(start..*at)
}

/// Orders and hashes an entry as its ID.
struct ById(Arc<Indexed>);
/// Hashes an entry as its path.
struct ByPath(Arc<Indexed>);

macro_rules! keyed {
    ($type:ident by $key:ident) => {
        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                self.0.$key()
            }
        }
        impl PartialEq for $type {
            fn eq(&self, other: &Self) -> bool {
                self.0.$key() == other.0.$key()
            }
        }
        impl Eq for $type {}
        impl PartialOrd for $type {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }
        impl Ord for $type {
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                self.0.$key().cmp(other.0.$key())
            }
        }
        impl Hash for $type {
            fn hash<H: Hasher>(&self, state: &mut H) {
                self.0.$key().hash(state);
            }
        }
    };
}
keyed!(ById by id);
keyed!(ByPath by path);

struct Alias {
    entry: Arc<Indexed>,
    selectors: SelectorSet,
}

/// The maps. Only entries whose parent and ID lie in the own trust domain are kept: others can reach nobody.
pub struct Index {
    trust_domain: TrustDomain,
    by_id: HashSet<ById>,
    /// All entries that give a path; the first is the key, so that the usual single one costs no vector.
    by_path: HashMap<ByPath, Vec<Arc<Indexed>>>,
    /// By parent path; without the children of the server.
    children: HashMap<Box<str>, BTreeSet<ById>>,
    /// Each alias once, under that of its selectors which the fewest share: an agent with all of them has that one.
    aliases: HashMap<Selector, Vec<Alias>>,
}

impl Index {
    /// Without entries.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            by_id: HashSet::new(),
            by_path: HashMap::new(),
            children: HashMap::new(),
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

    /// Adds an entry, or replaces the one with its ID.
    pub fn put(&mut self, entry: &Entry) {
        self.remove(entry.id.as_str());
        if !entry.spiffe_id.is_member_of(&self.trust_domain) || !entry.parent_id.is_member_of(&self.trust_domain) {
            return;
        }
        let indexed = Arc::new(Indexed::new(entry));
        if indexed.parent_path() == SERVER_PATH {
            let rarest = entry.selectors.iter().min_by_key(|s| self.aliases.get(s).map_or(0, Vec::len));
            if let Some(selector) = rarest {
                let alias = Alias { entry: indexed.clone(), selectors: entry.selectors.clone() };
                self.aliases.entry(selector.clone()).or_default().push(alias);
            }
        } else if let Some(siblings) = self.children.get_mut(indexed.parent_path()) {
            siblings.insert(ById(indexed.clone()));
        } else {
            let parent = indexed.parent_path().into();
            self.children.insert(parent, BTreeSet::from([ById(indexed.clone())]));
        }
        if let Some(more) = self.by_path.get_mut(indexed.path()) {
            more.push(indexed.clone());
        } else {
            self.by_path.insert(ByPath(indexed.clone()), Vec::new());
        }
        self.by_id.insert(ById(indexed));
    }

    /// Removes the entry with this ID, if there is one.
    pub fn remove(&mut self, id: &str) {
        let Some(ById(gone)) = self.by_id.take(id) else { return };
        if gone.parent_path() == SERVER_PATH {
            // It is under one of its own selectors.
            for wire in gone.to_proto().selectors {
                let selector = Selector { kind: wire.r#type, value: wire.value };
                let Some(list) = self.aliases.get_mut(&selector) else { continue };
                list.retain(|alias| !Arc::ptr_eq(&alias.entry, &gone));
                if list.is_empty() {
                    self.aliases.remove(&selector);
                }
            }
        } else if let Some(siblings) = self.children.get_mut(gone.parent_path()) {
            siblings.remove(id);
            if siblings.is_empty() {
                self.children.remove(gone.parent_path());
            }
        }
        if let Some((ByPath(first), mut more)) = self.by_path.remove_entry(gone.path()) {
            more.push(first);
            more.retain(|e| !Arc::ptr_eq(e, &gone));
            if let Some(first) = more.pop() {
                more.shrink_to_fit();
                self.by_path.insert(ByPath(first), more);
            }
        }
    }

    /// The entries that give this ID.
    fn named<'a>(&'a self, path: &str) -> impl Iterator<Item = &'a Arc<Indexed>> {
        let found = self.by_path.get_key_value(path);
        found.into_iter().flat_map(|(ByPath(first), more)| std::iter::once(first).chain(more))
    }

    /// Whether an entry makes the holder of `id` an admin.
    pub fn is_admin(&self, id: &SpiffeId) -> bool {
        id.is_member_of(&self.trust_domain) && self.named(id.path()).any(|e| e.admin)
    }

    /// Whether an entry makes the holder of `id` a downstream server.
    pub fn is_downstream(&self, id: &SpiffeId) -> bool {
        id.is_member_of(&self.trust_domain) && self.named(id.path()).any(|e| e.downstream)
    }

    /// The paths under which an agent's entries hang: its own, and those of the aliases whose selectors it has.
    fn roots<'a>(&'a self, agent: &'a SpiffeId, selectors: &SelectorSet) -> HashSet<&'a str> {
        let aliases = selectors.iter().filter_map(|s| self.aliases.get(s)).flatten();
        let matching = aliases.filter(|alias| alias.selectors.is_subset_of(selectors));
        std::iter::once(agent.path()).chain(matching.map(|alias| alias.entry.path())).collect()
    }

    /// All entries that the agent may have: what hangs below its roots, at any depth. In no particular order.
    pub fn authorized(&self, agent: &SpiffeId, selectors: &SelectorSet) -> Vec<Arc<Indexed>> {
        let mut found = Vec::new();
        let mut seen = self.roots(agent, selectors);
        let mut open: Vec<&str> = seen.iter().copied().collect();
        while let Some(path) = open.pop() {
            for ById(entry) in self.children.get(path).into_iter().flatten() {
                found.push(entry.clone());
                if self.children.contains_key(entry.path()) && seen.insert(entry.path()) {
                    open.push(entry.path());
                }
            }
        }
        found
    }

    /// For each ID, in order, its entry if the agent may have it. Walks up from the entry, so that the cost does not
    /// grow with the number of entries that the agent has.
    pub fn authorized_among<'i>(
        &self,
        agent: &SpiffeId,
        selectors: &SelectorSet,
        ids: impl Iterator<Item = &'i str>,
    ) -> Vec<Option<Arc<Indexed>>> {
        let roots = self.roots(agent, selectors);
        ids.map(|id| {
            let ById(entry) = self.by_id.get(id)?;
            self.hangs_below(entry, &roots).then(|| entry.clone())
        })
        .collect()
    }

    fn hangs_below(&self, entry: &Arc<Indexed>, roots: &HashSet<&str>) -> bool {
        if roots.contains(entry.parent_path()) {
            return true;
        }
        let mut seen = HashSet::from([entry.parent_path()]);
        let mut open = vec![entry.parent_path()];
        while let Some(path) = open.pop() {
            for above in self.named(path) {
                if roots.contains(above.parent_path()) {
                    return true;
                }
                if seen.insert(above.parent_path()) {
                    open.push(above.parent_path());
                }
            }
        }
        false
    }

    /// Whether an entry with this ID is known.
    pub fn contains(&self, id: &EntryId) -> bool {
        self.by_id.contains(id.as_str())
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
