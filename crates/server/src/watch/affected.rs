//! Whom a change of entries concerns: everyone from whom a changed entry can be reached, of the index as it is.
//!
//! Asked before the change and after it, the two answers together hold every agent whose entries differ: what it gains or
//! loses it reaches through a changed entry, in one of the two.

use super::Ids;
use crate::entries::{Index, Indexed};
use finial_core::{Selector, SelectorSet};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// The path of the server: the parent of aliases.
const SERVER_PATH: &str = "/spire/server";

/// From where something hangs down.
#[derive(Default)]
pub(super) struct Roots {
    /// Paths of IDs, some of them agents'.
    pub(super) paths: HashSet<Box<str>>,
    /// What agents have who have one of the aliases.
    pub(super) aliases: Vec<SelectorSet>,
}

fn selectors_of(alias: &Indexed) -> SelectorSet {
    alias.to_proto().selectors.into_iter().map(|s| Selector { kind: s.r#type, value: s.value }).collect()
}

impl Roots {
    /// All above `path`, itself included.
    fn above(index: &Index, path: &str) -> Self {
        let mut roots = Self { paths: HashSet::from([path.into()]), aliases: Vec::new() };
        let mut open: Vec<Box<str>> = vec![path.into()];
        while let Some(path) = open.pop() {
            for entry in index.named(&path).filter(|entry| !entry.is_foreign()) {
                if entry.parent_path() == SERVER_PATH {
                    roots.aliases.push(selectors_of(entry));
                } else if roots.paths.insert(entry.parent_path().into()) {
                    open.push(entry.parent_path().into());
                }
            }
        }
        roots
    }
}

/// Adds the IDs of all entries below `path`; `false` if `ids` would be more than `max`.
fn add_below(index: &Index, path: &str, ids: &mut HashSet<Box<str>>, max: usize) -> bool {
    let mut seen = HashSet::from([path]);
    let mut open = vec![path];
    while let Some(path) = open.pop() {
        for entry in index.below(path) {
            if ids.len() > max {
                return false;
            }
            ids.insert(entry.id().into());
            if seen.insert(entry.path()) {
                open.push(entry.path());
            }
        }
    }
    ids.len() <= max
}

fn sorted(ids: HashSet<Box<str>>) -> Arc<[Box<str>]> {
    let mut ids: Vec<_> = ids.into_iter().collect();
    ids.sort_unstable();
    ids.into()
}

/// From where the entries with these IDs hang, and which IDs, with those below them, that concerns; all, if there are more
/// than `max`.
pub(super) fn of(index: &Index, ids: &[&str], max: usize) -> Vec<(Roots, Ids)> {
    let mut found = Vec::new();
    let mut by_parent: HashMap<&str, Vec<&Indexed>> = HashMap::new();
    for entry in ids.iter().filter_map(|id| index.get(id)).filter(|entry| !entry.is_foreign()) {
        if entry.parent_path() == SERVER_PATH {
            // Not handed out itself.
            if index.below(entry.path()).next().is_some() {
                let mut below = HashSet::new();
                let fits = add_below(index, entry.path(), &mut below, max);
                let roots = Roots { paths: HashSet::new(), aliases: vec![selectors_of(entry)] };
                found.push((roots, fits.then(|| sorted(below))));
            }
        } else {
            by_parent.entry(entry.parent_path()).or_default().push(entry);
        }
    }
    for (parent, entries) in by_parent {
        let mut below: HashSet<Box<str>> = HashSet::new();
        let fits = entries.iter().all(|entry| {
            below.insert(entry.id().into());
            below.len() <= max && add_below(index, entry.path(), &mut below, max)
        });
        found.push((Roots::above(index, parent), fits.then(|| sorted(below))));
    }
    found
}
