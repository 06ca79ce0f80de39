//! Creation of entries. A batch is looked up, decided on and written with a few statements, however many entries it has.

use super::{CreatedEntry, rows};
use crate::sql::{Conn, LIST_MAX, Moment, Query, insert_rows};
use crate::{EventFeed, StoreError, events};
use finial_core::{Entry, EntryId, SelectorSet, SpiffeId};
use std::collections::{HashMap, HashSet};

type Outcome = Result<CreatedEntry, StoreError>;

/// What makes two entries similar: SPIFFE ID, parent, and exactly the same selectors.
type Likeness<'e> = (&'e SpiffeId, &'e SpiffeId, &'e SelectorSet);

fn likeness(entry: &Entry) -> Likeness<'_> {
    (&entry.spiffe_id, &entry.parent_id, &entry.selectors)
}

/// Creates each entry unless a similar one exists. A refused entry leaves the others alone; an error of the database
/// ends the whole batch.
pub(crate) async fn create(conn: &mut Conn, entries: &[Entry], now: Moment) -> Result<Vec<Outcome>, StoreError> {
    let mut outcomes = Vec::with_capacity(entries.len());
    for some in entries.chunks(LIST_MAX) {
        outcomes.extend(create_some(conn, some, now).await?);
    }
    Ok(outcomes)
}

/// A batch of one, whose refusal is the error of the whole.
pub(crate) async fn create_one(conn: &mut Conn, entry: Entry, now: Moment) -> Outcome {
    create(conn, &[entry], now).await?.pop().unwrap_or(Err(StoreError::NotFound))
}

/// What is known of the entries that exist, as far as it concerns a batch.
struct Known {
    /// With their row IDs.
    similar: Vec<(i64, Entry)>,
    /// Entry IDs of the batch that are taken.
    taken: HashSet<String>,
}

async fn create_some(conn: &mut Conn, entries: &[Entry], now: Moment) -> Result<Vec<Outcome>, StoreError> {
    let mut outcomes: Vec<Outcome> = Vec::with_capacity(entries.len());
    let known = look_up(conn, entries).await?;
    let federated = entries.iter().flat_map(|entry| &entry.federates_with).collect();
    let bundles = rows::bundle_ids(conn, federated).await?;
    let mut taken = known.taken;
    let mut similar: HashMap<Likeness<'_>, &Entry> = HashMap::with_capacity(known.similar.len() + entries.len());
    for (_, entry) in &known.similar {
        similar.entry(likeness(entry)).or_insert(entry);
    }
    let mut planned = Vec::with_capacity(entries.len());
    for entry in entries {
        let outcome = match rows::validate(entry) {
            Err(refusal) => Err(refusal),
            Ok(()) => match similar.get(&likeness(entry)) {
                Some(first) => Ok(CreatedEntry { entry: stored(first, now), row: 0, existing: true }),
                None if taken.contains(entry.id.as_str()) => {
                    let id = entry.id.as_str();
                    Err(StoreError::AlreadyExists(conn.dialect().duplicate("registered_entries", "entry_id", id)))
                }
                None => match entry.federates_with.iter().find(|td| !bundles.contains_key(td)) {
                    Some(unknown) => Err(StoreError::NoFederatedBundle(unknown.id_string())),
                    None => {
                        taken.insert(entry.id.as_str().to_owned());
                        similar.insert(likeness(entry), entry);
                        planned.push(entry);
                        Ok(CreatedEntry { entry: stored(entry, now), row: 0, existing: false })
                    }
                },
            },
        };
        outcomes.push(outcome);
    }
    let by_id = insert(conn, &planned, &bundles, now).await?;
    for created in outcomes.iter_mut().flatten() {
        match by_id.get(created.entry.id.as_str()) {
            Some(row) => created.row = *row,
            // one that was there before comes back as it is in the database
            None => {
                let old = known.similar.iter().find(|(_, old)| likeness(old) == likeness(&created.entry));
                if let Some((row, old)) = old {
                    (created.row, created.entry) = (*row, old.clone());
                }
            }
        }
    }
    Ok(outcomes)
}

/// As it will be read.
fn stored(entry: &Entry, now: Moment) -> Entry {
    Entry {
        dns_names: rows::distinct(&entry.dns_names).into_iter().map(str::to_owned).collect(),
        revision_number: 0,
        created_at: now.rounded(),
        ..entry.clone()
    }
}

/// The rows with the SPIFFE ID and parent, or the entry ID, of one of these entries.
async fn look_up(conn: &mut Conn, entries: &[Entry]) -> Result<Known, StoreError> {
    let pairs: HashSet<(&str, &str)> = entries.iter().map(|e| (e.spiffe_id.as_str(), e.parent_id.as_str())).collect();
    let ids: HashSet<&str> = entries.iter().map(|e| e.id.as_str()).collect();
    let mut query = Query::new(
        "SELECT id, entry_id, spiffe_id, parent_id FROM registered_entries WHERE (spiffe_id, parent_id) IN (",
    );
    query.push(conn.dialect().pairs());
    for (i, (spiffe_id, parent_id)) in pairs.iter().enumerate() {
        query.push(if i == 0 { "" } else { ", " }).push_list([*spiffe_id, *parent_id]);
    }
    query.push(") UNION SELECT id, entry_id, spiffe_id, parent_id FROM registered_entries WHERE entry_id IN ");
    query.push_list(ids.iter().copied());
    let (mut similar, mut taken) = (Vec::new(), HashSet::new());
    for row in conn.all(query.keep(entries.len() == 1)).await? {
        if pairs.contains(&(row.str(2)?, row.str(3)?)) {
            similar.push(row.int(0)?);
        }
        // on MySQL also one that differs in case only, as its index takes that for the same
        let id = row.str(1)?;
        if ids.contains(id) {
            taken.insert(id.to_owned());
        } else if let Some(id) = ids.iter().find(|other| other.eq_ignore_ascii_case(id)) {
            taken.insert((*id).to_owned());
        }
    }
    similar.sort_unstable();
    let found = rows::fetch_rows(conn, &similar).await?;
    Ok(Known { similar: found, taken })
}

/// Returns the row IDs by entry ID.
async fn insert(
    conn: &mut Conn,
    planned: &[&Entry],
    bundles: &rows::BundleIds<'_>,
    now: Moment,
) -> Result<HashMap<String, i64>, StoreError> {
    if planned.is_empty() {
        return Ok(HashMap::new());
    }
    let by_id = insert_own_rows(conn, planned, now).await?;
    let mut with_rows = Vec::with_capacity(planned.len());
    for entry in planned {
        let row = by_id.get(entry.id.as_str()).copied();
        let row = row.ok_or_else(|| StoreError::BadRow {
            what: format!("registration entry {:?}", entry.id.as_str()),
            cause: "not found after it was stored".into(),
        })?;
        with_rows.push((row, *entry));
    }
    rows::insert_selectors(conn, &with_rows, now).await?;
    rows::insert_dns_names(conn, &with_rows, now).await?;
    rows::insert_bundles(conn, &with_rows, bundles).await?;
    let ids: Vec<&str> = planned.iter().map(|entry| entry.id.as_str()).collect();
    events::write(conn, EventFeed::Entries, &ids, now).await?;
    Ok(by_id)
}

/// Returns the row IDs by entry ID.
async fn insert_own_rows(conn: &mut Conn, planned: &[&Entry], now: Moment) -> Result<HashMap<String, i64>, StoreError> {
    const INTO: &str = "registered_entries (created_at, updated_at, entry_id, spiffe_id, parent_id, ttl, admin, \
        downstream, expiry, revision_number, store_svid, hint, jwt_svid_ttl, additional_attributes)";
    let rows = planned.iter().map(|entry| {
        [
            now.into(),
            now.into(),
            entry.id.as_str().into(),
            entry.spiffe_id.as_str().into(),
            entry.parent_id.as_str().into(),
            entry.x509_svid_ttl.into(),
            entry.admin.into(),
            entry.downstream.into(),
            entry.expires_at.into(),
            0_i64.into(),
            entry.store_svid.into(),
            (&entry.hint).into(),
            entry.jwt_svid_ttl.into(),
            rows::attributes_blob(entry).into(),
        ]
    });
    // only another server can have taken an ID since the look-up: the next try sees it
    let contended = |error| match error {
        StoreError::AlreadyExists(text) => StoreError::Contended(text),
        error => error,
    };
    let found = if conn.dialect().has_returning() {
        let mut query = crate::sql::rows_query(INTO, rows);
        query.push(" RETURNING id, entry_id");
        conn.all(query).await.map_err(contended)?
    } else {
        conn.execute_all(insert_rows(INTO, rows)).await.map_err(contended)?;
        let mut query = Query::new("SELECT id, entry_id FROM registered_entries WHERE entry_id IN ");
        query.push_list(planned.iter().map(|entry| EntryId::as_str(&entry.id)));
        conn.all(query.keep(planned.len() == 1)).await?
    };
    found.iter().map(|row| Ok((row.text(1)?, row.int(0)?))).collect()
}
