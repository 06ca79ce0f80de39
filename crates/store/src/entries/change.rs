//! Changes and deletions of entries. A batch is looked up and locked, decided on and written with few statements.

use super::{EntryUpdate, rows};
use crate::sql::{Conn, LIST_MAX, Moment};
use crate::{EventFeed, StoreError, events};
use finial_core::{Entry, EntryId};
use std::collections::{HashMap, HashSet};

type Outcome = Result<Entry, StoreError>;

/// Changes each entry that is there. A refused change leaves the others alone; an error of the database ends the batch.
pub(super) async fn update(
    conn: &mut Conn,
    updates: &[(EntryId, EntryUpdate)],
    now: Moment,
) -> Result<Vec<Outcome>, StoreError> {
    let mut outcomes = Vec::with_capacity(updates.len());
    let mut rest = updates;
    while !rest.is_empty() {
        // of two changes of one entry the second builds on the first
        let mut ids = HashSet::with_capacity(rest.len().min(LIST_MAX));
        let (some, more) = rest.split_at(rest.iter().take(LIST_MAX).take_while(|(id, _)| ids.insert(id)).count());
        outcomes.extend(update_some(conn, some, now).await?);
        rest = more;
    }
    Ok(outcomes)
}

/// The same for different entries.
async fn update_some(
    conn: &mut Conn,
    updates: &[(EntryId, EntryUpdate)],
    now: Moment,
) -> Result<Vec<Outcome>, StoreError> {
    let ids: Vec<EntryId> = updates.iter().map(|(id, _)| id.clone()).collect();
    let mut found = by_id(rows::fetch(conn, &ids, conn.dialect().for_update()).await?);
    let federated = updates.iter().filter_map(|(_, update)| update.federates_with.as_ref()).flatten();
    let bundles = rows::bundle_ids(conn, federated.collect()).await?;
    let mut changed: Vec<(i64, Entry)> = Vec::with_capacity(updates.len());
    let mut parts = rows::Parts::default();
    let mut outcomes = Vec::with_capacity(updates.len());
    for (id, update) in updates {
        let outcome = match found.remove(id) {
            None => Err(StoreError::NotFound),
            Some((row, mut entry)) => {
                update.clone().apply(&mut entry);
                let unknown = update.federates_with.iter().flatten().find(|td| !bundles.contains_key(td));
                match (rows::validate(&entry), unknown) {
                    (Err(refusal), _) => Err(refusal),
                    (Ok(()), Some(unknown)) => Err(StoreError::NoFederatedBundle(unknown.id_string())),
                    (Ok(()), None) => {
                        parts.add(row, update);
                        entry.revision_number = entry.revision_number.saturating_add(1);
                        changed.push((row, entry));
                        Ok(row)
                    }
                }
            }
        };
        outcomes.push(outcome);
    }
    for (row, entry) in &changed {
        rows::update(conn, *row, entry, now).await?;
    }
    rows::replace_parts(conn, &changed, &parts, &bundles, now).await?;
    let ids: Vec<&str> = changed.iter().map(|(_, entry)| entry.id.as_str()).collect();
    events::write(conn, EventFeed::Entries, &ids, now).await?;
    // as they are in the database now
    let rows: Vec<i64> = changed.iter().map(|(row, _)| *row).collect();
    let mut stored: HashMap<i64, Entry> = rows::fetch_rows(conn, &rows).await?.into_iter().collect();
    Ok(outcomes.into_iter().map(|row| stored.remove(&row?).ok_or(StoreError::NotFound)).collect())
}

/// Deletes each entry that is there, with all that belongs to it.
pub(super) async fn delete(conn: &mut Conn, ids: &[EntryId], now: Moment) -> Result<Vec<Outcome>, StoreError> {
    let mut found = by_id(rows::fetch(conn, ids, conn.dialect().for_update()).await?);
    let rows: Vec<i64> = found.values().map(|(row, _)| *row).collect();
    rows::delete(conn, &rows).await?;
    let outcomes: Vec<Outcome> =
        ids.iter().map(|id| found.remove(id).map(|(_, entry)| entry).ok_or(StoreError::NotFound)).collect();
    let gone: Vec<&str> = outcomes.iter().flatten().map(|entry| entry.id.as_str()).collect();
    events::write(conn, EventFeed::Entries, &gone, now).await?;
    Ok(outcomes)
}

fn by_id(found: Vec<(i64, Entry)>) -> HashMap<EntryId, (i64, Entry)> {
    found.into_iter().map(|(row, entry)| (entry.id.clone(), (row, entry))).collect()
}
