//! What would have to be done so that a server's entries are those of a file: a pure function.

use super::file::{Identity, Placed, canonical, identity};
use crate::server::api::print;
use finial_config::Problem;
use finial_proto::types::{self, Entry};
use std::collections::{HashMap, HashSet};

/// How far a plan may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Entries that are missing are created; nothing that is there is touched.
    Add,
    /// And those that differ are changed.
    Match,
    /// And those that the file does not have are deleted.
    Prune,
}

/// An entry that is there and differs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Update {
    pub(crate) before: Entry,
    /// With the ID of `before`.
    pub(crate) after: Entry,
}

/// What is to be done, in this order: updates, creations, deletions. All entries are canonical.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) update: Vec<Update>,
    pub(crate) create: Vec<Entry>,
    pub(crate) delete: Vec<Entry>,
    /// Differ, and are left so ([`Mode::Add`]).
    pub(crate) left: Vec<Update>,
    /// Are as the file says.
    pub(crate) unchanged: usize,
    /// Are at the server, not in the file, and are left alone.
    pub(crate) others: usize,
    /// What a person should know.
    pub(crate) notes: Vec<String>,
}

impl Plan {
    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.update.is_empty() && self.create.is_empty() && self.delete.is_empty()
    }
}

/// Entries are the same if their IDs are; a file's entry without an ID, or with one that the server does not know, is the
/// one of the same SPIFFE ID, parent and selectors. `wanted` has each ID and each of these at most once.
///
/// # Errors
/// The file asks for what would make two entries of one SPIFFE ID, parent and selectors.
pub(crate) fn plan(wanted: &[Placed], existing: Vec<Entry>, mode: Mode) -> Result<Plan, Vec<Problem>> {
    let existing: Vec<Entry> = existing.into_iter().map(canonical).collect();
    let by_id: HashMap<&str, usize> = existing.iter().enumerate().map(|(at, e)| (e.id.as_str(), at)).collect();
    let mut by_identity: HashMap<Identity, Vec<usize>> = HashMap::new();
    for (at, entry) in existing.iter().enumerate() {
        by_identity.entry(identity(entry)).or_default().push(at);
    }
    let mut matched: Vec<Option<usize>> = wanted.iter().map(|w| by_id.get(w.entry.id.as_str()).copied()).collect();
    let mut taken: HashSet<usize> = matched.iter().flatten().copied().collect();
    let mut plan = Plan::default();
    for (wanted, matched) in wanted.iter().zip(&mut matched).filter(|(_, matched)| matched.is_none()) {
        let same = by_identity.get(&identity(&wanted.entry)).into_iter().flatten().copied();
        let free: Vec<usize> = same.filter(|at| !taken.contains(at)).collect();
        // databases may hold several such entries; one that needs no change is the best
        let equal = free.iter().copied().find(|at| existing.get(*at).is_some_and(|e| is_same(&wanted.entry, e)));
        let Some(at) = equal.or(free.first().copied()) else { continue };
        taken.insert(at);
        *matched = Some(at);
        if let Some(found) = existing.get(at).filter(|_| !wanted.entry.id.is_empty()) {
            plan.notes.push(format!(
                "{}: the file calls it {}, the server {}; the server's ID stays",
                print::id(wanted.entry.spiffe_id.as_ref()),
                wanted.entry.id,
                found.id
            ));
        }
    }
    for (wanted, matched) in wanted.iter().zip(&matched) {
        match matched.and_then(|at| existing.get(at)) {
            None => plan.create.push(wanted.entry.clone()),
            Some(before) if is_same(&wanted.entry, before) => plan.unchanged += 1,
            Some(before) => {
                let after = Entry { id: before.id.clone(), ..wanted.entry.clone() };
                let update = Update { before: before.clone(), after };
                if mode == Mode::Add { plan.left.push(update) } else { plan.update.push(update) }
            }
        }
    }
    let problems = collisions(wanted, &matched, &existing, &taken, &by_identity, mode);
    let others = existing.iter().enumerate().filter(|(at, _)| !taken.contains(at)).map(|(_, entry)| entry);
    if mode == Mode::Prune {
        plan.delete = others.cloned().collect();
    } else {
        plan.others = others.count();
    }
    if problems.is_empty() { Ok(plan) } else { Err(problems) }
}

/// Entries that would become like one that stays.
fn collisions(
    wanted: &[Placed],
    matched: &[Option<usize>],
    existing: &[Entry],
    taken: &HashSet<usize>,
    by_identity: &HashMap<Identity, Vec<usize>>,
    mode: Mode,
) -> Vec<Problem> {
    let holder = |wanted: &Placed, is_stable: &dyn Fn(&usize) -> bool| {
        by_identity.get(&identity(&wanted.entry))?.iter().find(|at| is_stable(at)).and_then(|at| existing.get(*at))
    };
    let collision = |(wanted, at): (&Placed, &Option<usize>)| match (mode, at.and_then(|at| existing.get(at))) {
        (Mode::Match, Some(before)) if identity(before) != identity(&wanted.entry) => {
            let other = holder(wanted, &|at| !taken.contains(at))?;
            let message = format!(
                "entry {} would get the SPIFFE ID, parent and selectors of entry {}, which is not in the file",
                before.id, other.id
            );
            let hint = format!("add entry {} to the file, or delete it, or use -prune", other.id);
            Some(Problem { message, pos: Some(wanted.pos), hint: Some(hint) })
        }
        // all that has this identity is something else in the file, which will not come about
        (Mode::Add, None) => {
            let other = holder(wanted, &|_| true)?;
            let message = format!("entry {} has this SPIFFE ID, parent and selectors still", other.id);
            let hint = "import changes nothing that is there: use apply, which changes that entry first";
            Some(Problem { message, pos: Some(wanted.pos), hint: Some(hint.into()) })
        }
        _ => None,
    };
    wanted.iter().zip(matched).filter_map(collision).collect()
}

/// Whether they say the same, whatever their IDs are.
fn is_same(wanted: &Entry, existing: &Entry) -> bool {
    Entry { id: String::new(), ..wanted.clone() } == Entry { id: String::new(), ..existing.clone() }
}

/// One field of an update: its name, and its values before and after; of lists what goes and what comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) field: &'static str,
    pub(crate) before: Vec<String>,
    pub(crate) after: Vec<String>,
}

/// What an update changes; empty only if both say the same.
pub(crate) fn changes(update: &Update) -> Vec<Change> {
    let Update { before, after } = update;
    let id = |id: &Option<types::Spiffeid>| vec![print::id(id.as_ref())];
    let ttl = |seconds: i32| vec![if seconds == 0 { "default".to_owned() } else { format!("{seconds}s") }];
    let text = |text: &dyn ToString| vec![text.to_string()];
    let (old, new) =
        (before.additional_attributes.unwrap_or_default(), after.additional_attributes.unwrap_or_default());
    let mut changes = vec![
        Change { field: "spiffe_id", before: id(&before.spiffe_id), after: id(&after.spiffe_id) },
        Change { field: "parent_id", before: id(&before.parent_id), after: id(&after.parent_id) },
        Change { field: "x509_svid_ttl", before: ttl(before.x509_svid_ttl), after: ttl(after.x509_svid_ttl) },
        Change { field: "jwt_svid_ttl", before: ttl(before.jwt_svid_ttl), after: ttl(after.jwt_svid_ttl) },
        Change { field: "admin", before: text(&before.admin), after: text(&after.admin) },
        Change { field: "downstream", before: text(&before.downstream), after: text(&after.downstream) },
        Change { field: "entryExpiry", before: text(&before.expires_at), after: text(&after.expires_at) },
        Change { field: "store_svid", before: text(&before.store_svid), after: text(&after.store_svid) },
        Change { field: "hint", before: vec![format!("{:?}", before.hint)], after: vec![format!("{:?}", after.hint)] },
        // their order counts: the first is the common name
        Change { field: "dns_names", before: before.dns_names.clone(), after: after.dns_names.clone() },
        Change {
            field: "disable_x509_svid_prefetch",
            before: text(&old.disable_x509_svid_prefetch),
            after: text(&new.disable_x509_svid_prefetch),
        },
        Change {
            field: "jwt_svid_include_jti",
            before: text(&old.jwt_svid_include_jti),
            after: text(&new.jwt_svid_include_jti),
        },
    ];
    let selectors = |e: &Entry| e.selectors.iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect::<Vec<_>>();
    let sets = [
        ("selectors", selectors(before), selectors(after)),
        ("federates_with", before.federates_with.clone(), after.federates_with.clone()),
    ];
    changes.retain(|c| c.before != c.after);
    for (field, old, new) in sets {
        let only = |a: &[String], b: &[String]| a.iter().filter(|v| !b.contains(v)).cloned().collect::<Vec<_>>();
        let (gone, come) = (only(&old, &new), only(&new, &old));
        if !gone.is_empty() || !come.is_empty() {
            changes.push(Change { field, before: gone, after: come });
        }
    }
    changes
}
