//! Entries as rows: one in `registered_entries`, and one per selector, DNS name and federated trust domain beside it.

use super::{CreatedEntry, EntryFilter};
use crate::sql::{Columns, Conn, DbRow, LIST_MAX, parse_time};
use crate::store::run;
use crate::{EventFeed, Listed, Page, StoreError, events};
use finial_core::{Entry, EntryId, Selector, SelectorSet, SpiffeId, TrustDomain, UnixSeconds};
use finial_proto::common::registration_entry::AdditionalAttributes;
use prost::Message;
use sqlx::{AssertSqlSafe, QueryBuilder};
use std::collections::HashMap;

const SELECT: &str = "SELECT e.id, e.entry_id, e.spiffe_id, e.parent_id, e.ttl, e.jwt_svid_ttl, e.admin, e.downstream, \
    e.expiry, e.revision_number, e.store_svid, e.hint, e.additional_attributes, e.created_at FROM registered_entries e";

/// Row IDs of bundles by trust domain, so that a batch looks each up once.
type BundleIds = HashMap<TrustDomain, i64>;

/// The rules of the datastore, in SPIRE's words and order.
pub(crate) fn validate(entry: &Entry) -> Result<(), StoreError> {
    let refuse = |text: &str| Err(StoreError::Validation(text.into()));
    let selectors = entry.selectors.as_slice();
    let Some(first) = selectors.first() else { return refuse("invalid registration entry: missing selector list") };
    if entry.store_svid {
        if entry.disable_x509_svid_prefetch {
            return refuse("specifying cache behaviour is incompatible with storable SVIDs");
        }
        if selectors.iter().any(|s| s.kind != first.kind) {
            return refuse("invalid registration entry: selector types must be the same when store SVID is enabled");
        }
    }
    if entry.x509_svid_ttl < 0 {
        return refuse("invalid registration entry: X509SvidTtl is not set");
    }
    if entry.jwt_svid_ttl < 0 {
        return refuse("invalid registration entry: JwtSvidTtl is not set");
    }
    Ok(())
}

/// Creates each entry unless a similar one exists. A refused entry leaves the others alone; an error of the database
/// ends the whole batch.
pub(crate) async fn create(
    conn: &mut Conn,
    entries: Vec<Entry>,
    now: &str,
) -> Result<Vec<Result<CreatedEntry, StoreError>>, StoreError> {
    let mut bundles = BundleIds::new();
    let mut results = Vec::with_capacity(entries.len());
    for entry in entries {
        match create_row(conn, entry, &mut bundles, now).await {
            Err(fatal @ (StoreError::Sql(_) | StoreError::BadRow { .. })) => return Err(fatal),
            result => results.push(result),
        }
    }
    let created = |result: &Result<CreatedEntry, _>| match result {
        Ok(created) if !created.existing => Some(created.entry.id.clone()),
        _ => None,
    };
    let ids: Vec<EntryId> = results.iter().filter_map(created).collect();
    let ids: Vec<&str> = ids.iter().map(EntryId::as_str).collect();
    events::write(conn, EventFeed::Entries, &ids, now).await?;
    Ok(results)
}

/// A batch of one, whose refusal is the error of the whole.
pub(crate) async fn create_one(conn: &mut Conn, entry: Entry, now: &str) -> Result<CreatedEntry, StoreError> {
    create(conn, vec![entry], now).await?.pop().unwrap_or(Err(StoreError::NotFound))
}

async fn create_row(
    conn: &mut Conn,
    mut entry: Entry,
    bundles: &mut BundleIds,
    now: &str,
) -> Result<CreatedEntry, StoreError> {
    validate(&entry)?;
    if let Some(similar) = similar(conn, &entry).await? {
        return Ok(CreatedEntry { entry: similar, existing: true });
    }
    // before the first row is written, so that a refusal leaves nothing behind
    let bundle_ids = bundle_ids(conn, &entry.federates_with, bundles).await?;
    let row = sqlx::query(
        "INSERT INTO registered_entries (created_at, updated_at, entry_id, spiffe_id, parent_id, ttl, admin, downstream, \
         expiry, revision_number, store_svid, hint, jwt_svid_ttl, additional_attributes) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING id",
    )
    .bind(now)
    .bind(now)
    .bind(entry.id.as_str())
    .bind(entry.spiffe_id.as_str())
    .bind(entry.parent_id.as_str())
    .bind(entry.x509_svid_ttl)
    .bind(entry.admin)
    .bind(entry.downstream)
    .bind(entry.expires_at)
    .bind(entry.store_svid)
    .bind(&entry.hint)
    .bind(entry.jwt_svid_ttl)
    .bind(attributes_blob(&entry))
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row else {
        return Err(StoreError::AlreadyExists("UNIQUE constraint failed: registered_entries.entry_id".into()));
    };
    let row = Columns(&row).int(0)?;
    insert_selectors(conn, row, &entry.selectors, now).await?;
    dedup_in_order(&mut entry.dns_names);
    insert_dns_names(conn, row, &entry.dns_names, now).await?;
    insert_bundles(conn, row, &bundle_ids).await?;
    entry.revision_number = 0;
    entry.created_at = parse_time(now).map_or(0, |t| t.unix_timestamp() + i64::from(t.nanosecond() >= 500_000_000));
    Ok(CreatedEntry { entry, existing: false })
}

/// The entry with the same SPIFFE ID, the same parent and exactly the same selectors. Equal counts and every given
/// selector present make the sets equal, for `(entry, type, value)` is unique.
async fn similar(conn: &mut Conn, entry: &Entry) -> Result<Option<Entry>, StoreError> {
    let candidate = sqlx::query("SELECT id FROM registered_entries WHERE spiffe_id = ? AND parent_id = ? LIMIT 1")
        .bind(entry.spiffe_id.as_str())
        .bind(entry.parent_id.as_str())
        .fetch_optional(&mut *conn)
        .await?;
    if candidate.is_none() {
        return Ok(None);
    }
    let mut query = QueryBuilder::new(SELECT);
    query.push(" WHERE e.spiffe_id = ").push_bind(entry.spiffe_id.as_str());
    query.push(" AND e.parent_id = ").push_bind(entry.parent_id.as_str());
    for selector in &entry.selectors {
        query.push(" AND EXISTS (SELECT 1 FROM selectors s WHERE s.registered_entry_id = e.id AND s.type = ");
        query.push_bind(&selector.kind).push(" AND s.value = ").push_bind(&selector.value).push(")");
    }
    query.push(" AND (SELECT COUNT(*) FROM selectors s WHERE s.registered_entry_id = e.id) = ");
    query.push_bind(i64::try_from(entry.selectors.len()).unwrap_or(i64::MAX)).push(" ORDER BY e.id LIMIT 1");
    let found = query.build().persistent(entry.selectors.len() <= 8).fetch_all(&mut *conn).await?;
    Ok(hydrate(conn, &found).await?.pop().map(|(_, entry)| entry))
}

async fn bundle_ids(
    conn: &mut Conn,
    trust_domains: &[TrustDomain],
    known: &mut BundleIds,
) -> Result<Vec<i64>, StoreError> {
    let mut ids = Vec::with_capacity(trust_domains.len());
    for trust_domain in trust_domains {
        let id = match known.get(trust_domain) {
            Some(id) => *id,
            None => {
                let row = sqlx::query("SELECT id FROM bundles WHERE trust_domain = ?")
                    .bind(trust_domain.id_string())
                    .fetch_optional(&mut *conn)
                    .await?;
                let Some(row) = row else { return Err(StoreError::NoFederatedBundle(trust_domain.id_string())) };
                let id = Columns(&row).int(0)?;
                known.insert(trust_domain.clone(), id);
                id
            }
        };
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

async fn insert_selectors(conn: &mut Conn, row: i64, set: &SelectorSet, now: &str) -> Result<(), StoreError> {
    for some in set.as_slice().chunks(LIST_MAX) {
        let mut query =
            QueryBuilder::new("INSERT INTO selectors (created_at, updated_at, registered_entry_id, type, value) ");
        query.push_values(some, |mut values, selector| {
            values.push_bind(now).push_bind(now).push_bind(row).push_bind(&selector.kind).push_bind(&selector.value);
        });
        query.build().persistent(some.len() <= 8).execute(&mut *conn).await?;
    }
    Ok(())
}

async fn insert_dns_names(conn: &mut Conn, row: i64, names: &[String], now: &str) -> Result<(), StoreError> {
    for some in names.chunks(LIST_MAX) {
        let mut query =
            QueryBuilder::new("INSERT INTO dns_names (created_at, updated_at, registered_entry_id, value) ");
        query.push_values(some, |mut values, name| {
            values.push_bind(now).push_bind(now).push_bind(row).push_bind(name);
        });
        query.build().persistent(some.len() <= 8).execute(&mut *conn).await?;
    }
    Ok(())
}

async fn insert_bundles(conn: &mut Conn, row: i64, bundles: &[i64]) -> Result<(), StoreError> {
    for bundle in bundles {
        sqlx::query("INSERT INTO federated_registration_entries (bundle_id, registered_entry_id) VALUES (?, ?)")
            .bind(bundle)
            .bind(row)
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}

/// Writes the entry's own row.
pub(crate) async fn update(conn: &mut Conn, row: i64, entry: &Entry, now: &str) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE registered_entries SET updated_at = ?, spiffe_id = ?, parent_id = ?, ttl = ?, admin = ?, downstream = ?, \
         expiry = ?, revision_number = ?, store_svid = ?, hint = ?, jwt_svid_ttl = ?, additional_attributes = ? WHERE id = ?",
    )
    .bind(now)
    .bind(entry.spiffe_id.as_str())
    .bind(entry.parent_id.as_str())
    .bind(entry.x509_svid_ttl)
    .bind(entry.admin)
    .bind(entry.downstream)
    .bind(entry.expires_at)
    .bind(entry.revision_number)
    .bind(entry.store_svid)
    .bind(&entry.hint)
    .bind(entry.jwt_svid_ttl)
    .bind(attributes_blob(entry))
    .bind(row)
    .execute(conn)
    .await?;
    Ok(())
}

/// Writes anew those of selectors, DNS names and federated trust domains that are asked for.
pub(crate) async fn replace_parts(
    conn: &mut Conn,
    row: i64,
    entry: &Entry,
    (selectors, dns_names, bundles): (bool, bool, bool),
    now: &str,
) -> Result<(), StoreError> {
    if selectors {
        run(conn, format!("DELETE FROM selectors WHERE registered_entry_id = {row}")).await?;
        insert_selectors(conn, row, &entry.selectors, now).await?;
    }
    if dns_names {
        run(conn, format!("DELETE FROM dns_names WHERE registered_entry_id = {row}")).await?;
        let mut names = entry.dns_names.clone();
        dedup_in_order(&mut names);
        insert_dns_names(conn, row, &names, now).await?;
    }
    if bundles {
        let ids = bundle_ids(conn, &entry.federates_with, &mut BundleIds::new()).await?;
        run(conn, format!("DELETE FROM federated_registration_entries WHERE registered_entry_id = {row}")).await?;
        insert_bundles(conn, row, &ids).await?;
    }
    Ok(())
}

/// Deletes entries by row ID, with all that belongs to them.
pub(crate) async fn delete(conn: &mut Conn, rows: &[i64]) -> Result<(), StoreError> {
    for some in rows.chunks(LIST_MAX) {
        let list = id_list(some.iter().copied());
        for table in ["federated_registration_entries", "selectors", "dns_names"] {
            run(conn, format!("DELETE FROM {table} WHERE registered_entry_id IN ({list})")).await?;
        }
        run(conn, format!("DELETE FROM registered_entries WHERE id IN ({list})")).await?;
    }
    Ok(())
}

/// Row and entry IDs of what expired.
pub(crate) async fn expired(conn: &mut Conn, before: UnixSeconds) -> Result<Vec<(i64, String)>, StoreError> {
    let rows = sqlx::query("SELECT id, entry_id FROM registered_entries WHERE expiry <> 0 AND expiry < ? ORDER BY id")
        .bind(before)
        .fetch_all(conn)
        .await?;
    rows.iter().map(|row| Ok((Columns(row).int(0)?, Columns(row).text(1)?))).collect()
}

pub(crate) async fn fetch_one(conn: &mut Conn, id: &EntryId) -> Result<(i64, Entry), StoreError> {
    fetch(conn, std::slice::from_ref(id)).await?.pop().ok_or(StoreError::NotFound)
}

pub(crate) async fn fetch(conn: &mut Conn, ids: &[EntryId]) -> Result<Vec<(i64, Entry)>, StoreError> {
    let mut entries = Vec::with_capacity(ids.len());
    for some in ids.chunks(LIST_MAX) {
        let mut query = QueryBuilder::new(SELECT);
        query.push(" WHERE e.entry_id IN (");
        let mut list = query.separated(", ");
        for id in some {
            list.push_bind(id.as_str());
        }
        query.push(") ORDER BY e.id");
        let rows = query.build().persistent(some.len() == 1).fetch_all(&mut *conn).await?;
        entries.extend(hydrate(conn, &rows).await?);
    }
    Ok(entries)
}

/// Entries below this parent, for the alias of a join token.
pub(crate) async fn children(conn: &mut Conn, parent: &SpiffeId) -> Result<Vec<(i64, Entry)>, StoreError> {
    let mut query = QueryBuilder::new(SELECT);
    query.push(" WHERE e.parent_id = ").push_bind(parent.as_str()).push(" ORDER BY e.id");
    let rows = query.build().fetch_all(&mut *conn).await?;
    hydrate(conn, &rows).await
}

pub(crate) async fn list(
    conn: &mut Conn,
    filter: &EntryFilter,
    page: Option<&Page>,
) -> Result<Listed<Entry>, StoreError> {
    let mut query = QueryBuilder::new(SELECT);
    query.push(" WHERE e.id > ").push_bind(page.map_or(Ok(0), Page::after)?);
    filter.clauses(&mut query)?;
    query.push(" ORDER BY e.id");
    if let Some(page) = page {
        query.push(" LIMIT ").push_bind(page.size);
    }
    let rows = query.build().persistent(false).fetch_all(&mut *conn).await?;
    let last = rows.last().map(|row| Columns(row).int(0)).transpose()?;
    let entries = hydrate(conn, &rows).await?;
    Ok(Listed::new(entries.into_iter().map(|(_, entry)| entry).collect(), page, last))
}

pub(crate) async fn count(conn: &mut Conn, filter: &EntryFilter) -> Result<u64, StoreError> {
    let mut query = QueryBuilder::new("SELECT COUNT(*) FROM registered_entries e WHERE 1 = 1");
    filter.clauses(&mut query)?;
    let row = query.build().persistent(false).fetch_one(conn).await?;
    Ok(Columns(&row).int(0)?.unsigned_abs())
}

/// Completes rows of [`SELECT`] with their selectors, DNS names and trust domains. A row that cannot be an entry is
/// logged and left out, as one bad row must not take the others away.
async fn hydrate(conn: &mut Conn, rows: &[DbRow]) -> Result<Vec<(i64, Entry)>, StoreError> {
    let mut entries = Vec::with_capacity(rows.len());
    for some in rows.chunks(LIST_MAX) {
        let ids = some.iter().map(|row| Columns(row).int(0)).collect::<Result<Vec<_>, _>>()?;
        let mut selectors: HashMap<i64, Vec<Selector>> = HashMap::with_capacity(ids.len());
        for row in parts(conn, "type, value FROM selectors", &ids, "id").await? {
            let row = Columns(&row);
            selectors.entry(row.int(0)?).or_default().push(Selector { kind: row.text(1)?, value: row.text(2)? });
        }
        let mut names: HashMap<i64, Vec<String>> = HashMap::new();
        for row in parts(conn, "value FROM dns_names", &ids, "id").await? {
            names.entry(Columns(&row).int(0)?).or_default().push(Columns(&row).text(1)?);
        }
        let mut bundles: HashMap<i64, Vec<String>> = HashMap::new();
        let federated = "b.trust_domain FROM federated_registration_entries JOIN bundles b ON b.id = bundle_id";
        for row in parts(conn, federated, &ids, "bundle_id").await? {
            bundles.entry(Columns(&row).int(0)?).or_default().push(Columns(&row).text(1)?);
        }
        for (id, row) in ids.iter().zip(some) {
            let take = |map: &mut HashMap<i64, Vec<String>>| map.remove(id).unwrap_or_default();
            let set = SelectorSet::new(selectors.remove(id).unwrap_or_default());
            match from_row(row, set, take(&mut names), &take(&mut bundles)) {
                Ok(entry) => entries.push((*id, entry)),
                Err(error) => {
                    tracing::error!(row = id, %error, "Invalid registration entry in the datastore; left out")
                }
            }
        }
    }
    Ok(entries)
}

async fn parts(conn: &mut Conn, what: &str, ids: &[i64], order: &str) -> Result<Vec<DbRow>, StoreError> {
    let list = id_list(ids.iter().copied());
    let query = format!("SELECT registered_entry_id, {what} WHERE registered_entry_id IN ({list}) ORDER BY {order}");
    Ok(sqlx::query(AssertSqlSafe(query)).persistent(false).fetch_all(conn).await?)
}

fn id_list(ids: impl Iterator<Item = i64>) -> String {
    ids.map(|id| id.to_string()).collect::<Vec<_>>().join(",")
}

fn from_row(
    row: &DbRow,
    selectors: SelectorSet,
    dns_names: Vec<String>,
    bundles: &[String],
) -> Result<Entry, StoreError> {
    let row = Columns(row);
    let name = row.text(1)?;
    let bad = |cause: &dyn std::fmt::Display| StoreError::BadRow {
        what: format!("registration entry {name:?}"),
        cause: cause.to_string(),
    };
    let spiffe_id = |at: usize| SpiffeId::parse(&row.text(at)?).map_err(|e| bad(&e));
    let seconds = |at: usize| i32::try_from(row.int(at)?).map_err(|e| bad(&e));
    let attributes = AdditionalAttributes::decode(row.blob(12)?.as_slice()).map_err(|e| bad(&e))?;
    let mut federates_with = Vec::with_capacity(bundles.len());
    for text in bundles {
        federates_with.push(TrustDomain::parse(text).map_err(|e| bad(&e))?);
    }
    Ok(Entry {
        id: EntryId::parse(&name).map_err(|e| bad(&e))?,
        spiffe_id: spiffe_id(2)?,
        parent_id: spiffe_id(3)?,
        selectors,
        x509_svid_ttl: seconds(4)?,
        jwt_svid_ttl: seconds(5)?,
        federates_with,
        admin: row.flag(6)?,
        downstream: row.flag(7)?,
        expires_at: row.int(8)?,
        dns_names,
        revision_number: row.int(9)?,
        store_svid: row.flag(10)?,
        hint: row.text(11)?,
        created_at: row.seconds_rounded(13)?,
        disable_x509_svid_prefetch: attributes.disable_x509_svid_prefetch,
        jwt_svid_include_jti: attributes.jwt_svid_include_jti,
    })
}

/// NULL when there is nothing to say, as SPIRE stores it.
fn attributes_blob(entry: &Entry) -> Option<Vec<u8>> {
    let attributes = AdditionalAttributes {
        disable_x509_svid_prefetch: entry.disable_x509_svid_prefetch,
        jwt_svid_include_jti: entry.jwt_svid_include_jti,
    };
    Some(attributes.encode_to_vec()).filter(|blob| !blob.is_empty())
}

/// The order of DNS names has a meaning (the first is the common name), so they are no set.
fn dedup_in_order(names: &mut Vec<String>) {
    let mut seen = std::collections::HashSet::with_capacity(names.len());
    names.retain(|name| seen.insert(name.clone()));
}
