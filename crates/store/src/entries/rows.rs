//! Entries as rows: one in `registered_entries`, and one per selector, DNS name and federated trust domain beside it.

use super::EntryUpdate;
use crate::StoreError;
use crate::sql::{Conn, Dialect, LIST_MAX, Moment, Query, Row, insert_rows};
use finial_core::{Entry, EntryId, Selector, SelectorSet, SpiffeId, TrustDomain, UnixSeconds};
use finial_proto::common::registration_entry::AdditionalAttributes;
use prost::Message;
use std::collections::{BTreeSet, HashMap, HashSet};

pub(super) const SELECT: &str = "SELECT e.id, e.entry_id, e.spiffe_id, e.parent_id, e.ttl, e.jwt_svid_ttl, e.admin, e.downstream, \
    e.expiry, e.revision_number, e.store_svid, e.hint, e.additional_attributes, e.created_at FROM registered_entries e";

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

/// Writes the entry's own row.
pub(crate) async fn update(conn: &mut Conn, row: i64, entry: &Entry, now: Moment) -> Result<(), StoreError> {
    let query = Query::new(
        "UPDATE registered_entries SET updated_at = ?, spiffe_id = ?, parent_id = ?, ttl = ?, admin = ?, downstream = ?, \
         expiry = ?, revision_number = ?, store_svid = ?, hint = ?, jwt_svid_ttl = ?, additional_attributes = ? WHERE id = ?",
    );
    let query = query.bind(now).bind(entry.spiffe_id.as_str()).bind(entry.parent_id.as_str());
    let query = query.bind(entry.x509_svid_ttl).bind(entry.admin).bind(entry.downstream).bind(entry.expires_at);
    let query = query.bind(entry.revision_number).bind(entry.store_svid).bind(&entry.hint);
    let query = query.bind(entry.jwt_svid_ttl).bind(attributes_blob(entry)).bind(row);
    conn.execute(query).await.map(drop)
}

/// Row IDs of the entries whose selectors, DNS names or federated trust domains are written anew.
#[derive(Default)]
pub(super) struct Parts {
    selectors: HashSet<i64>,
    dns_names: HashSet<i64>,
    bundles: HashSet<i64>,
}

impl Parts {
    /// What `update` replaces of the entry in `row`.
    pub(super) fn add(&mut self, row: i64, update: &EntryUpdate) {
        for (rows, named) in [
            (&mut self.selectors, update.selectors.is_some()),
            (&mut self.dns_names, update.dns_names.is_some()),
            (&mut self.bundles, update.federates_with.is_some()),
        ] {
            rows.extend(named.then_some(row));
        }
    }
}

/// Writes `parts` of these entries anew; `bundles` are those of all trust domains that they name.
pub(super) async fn replace_parts(
    conn: &mut Conn,
    entries: &[(i64, Entry)],
    parts: &Parts,
    bundles: &BundleIds<'_>,
    now: Moment,
) -> Result<(), StoreError> {
    let of = |rows: &HashSet<i64>| -> Vec<(i64, &Entry)> {
        entries.iter().filter(|(row, _)| rows.contains(row)).map(|(row, entry)| (*row, entry)).collect()
    };
    for (table, rows) in [
        ("selectors", &parts.selectors),
        ("dns_names", &parts.dns_names),
        ("federated_registration_entries", &parts.bundles),
    ] {
        if !rows.is_empty() {
            let list = id_list(rows.iter().copied());
            conn.run(format!("DELETE FROM {table} WHERE registered_entry_id IN ({list})")).await?;
        }
    }
    insert_selectors(conn, &of(&parts.selectors), now).await?;
    insert_dns_names(conn, &of(&parts.dns_names), now).await?;
    insert_bundles(conn, &of(&parts.bundles), bundles).await
}

/// Row IDs of bundles by trust domain.
pub(crate) type BundleIds<'e> = HashMap<&'e TrustDomain, i64>;

/// The bundles of these trust domains, which stay until the transaction ends; what has none is left out.
pub(crate) async fn bundle_ids<'e>(
    conn: &mut Conn,
    trust_domains: Vec<&'e TrustDomain>,
) -> Result<BundleIds<'e>, StoreError> {
    let mut by_name: HashMap<String, &TrustDomain> = HashMap::with_capacity(trust_domains.len());
    by_name.extend(trust_domains.into_iter().map(|td| (td.id_string(), td)));
    let names: Vec<String> = by_name.keys().cloned().collect();
    let mut ids = BundleIds::with_capacity(names.len());
    for some in names.chunks(LIST_MAX) {
        let mut query = Query::new("SELECT id, trust_domain FROM bundles WHERE trust_domain IN ");
        query.push_list(some).push(" ORDER BY id").push(conn.dialect().for_share());
        for row in conn.all(query.keep(some.len() == 1)).await? {
            if let Some(trust_domain) = by_name.remove(row.str(1)?) {
                ids.insert(trust_domain, row.int(0)?);
            }
        }
    }
    Ok(ids)
}

pub(crate) async fn insert_selectors(
    conn: &mut Conn,
    entries: &[(i64, &Entry)],
    now: Moment,
) -> Result<(), StoreError> {
    let rows = entries.iter().flat_map(|(row, entry)| {
        entry.selectors.iter().map(move |selector| {
            [now.into(), now.into(), (*row).into(), (&selector.kind).into(), (&selector.value).into()]
        })
    });
    conn.execute_all(insert_rows("selectors (created_at, updated_at, registered_entry_id, type, value)", rows)).await
}

pub(crate) async fn insert_dns_names(
    conn: &mut Conn,
    entries: &[(i64, &Entry)],
    now: Moment,
) -> Result<(), StoreError> {
    let rows = entries.iter().flat_map(|(row, entry)| {
        let names = distinct(&entry.dns_names).into_iter();
        names.map(move |name| [now.into(), now.into(), (*row).into(), name.into()])
    });
    conn.execute_all(insert_rows("dns_names (created_at, updated_at, registered_entry_id, value)", rows)).await
}

pub(crate) async fn insert_bundles(
    conn: &mut Conn,
    entries: &[(i64, &Entry)],
    ids: &BundleIds<'_>,
) -> Result<(), StoreError> {
    let rows = entries.iter().flat_map(|(row, entry)| {
        let bundles: BTreeSet<i64> = entry.federates_with.iter().filter_map(|td| ids.get(td).copied()).collect();
        bundles.into_iter().map(move |bundle| [bundle.into(), (*row).into()])
    });
    conn.execute_all(insert_rows("federated_registration_entries (bundle_id, registered_entry_id)", rows)).await
}

/// Deletes entries by row ID, with all that belongs to them.
pub(crate) async fn delete(conn: &mut Conn, rows: &[i64]) -> Result<(), StoreError> {
    for some in rows.chunks(LIST_MAX) {
        let list = id_list(some.iter().copied());
        for table in ["federated_registration_entries", "selectors", "dns_names"] {
            conn.run(format!("DELETE FROM {table} WHERE registered_entry_id IN ({list})")).await?;
        }
        conn.run(format!("DELETE FROM registered_entries WHERE id IN ({list})")).await?;
    }
    Ok(())
}

/// Row and entry IDs of what expired.
pub(crate) async fn expired(conn: &mut Conn, before: UnixSeconds) -> Result<Vec<(i64, String)>, StoreError> {
    let mut query =
        Query::new("SELECT id, entry_id FROM registered_entries WHERE expiry <> 0 AND expiry < ? ORDER BY id");
    query.push(conn.dialect().for_update());
    let rows = conn.all(query.bind(before)).await?;
    rows.iter().map(|row| Ok((row.int(0)?, row.text(1)?))).collect()
}

/// The entries that are there; `lock` keeps others from changing them until the transaction ends.
pub(crate) async fn fetch(conn: &mut Conn, ids: &[EntryId], lock: &str) -> Result<Vec<(i64, Entry)>, StoreError> {
    let mut entries = Vec::with_capacity(ids.len());
    for some in ids.chunks(LIST_MAX) {
        let mut query = Query::new(format!("{SELECT} WHERE e.entry_id IN "));
        query.push_list(some.iter().map(EntryId::as_str)).push(" ORDER BY e.id").push(lock);
        let rows = conn.all(query.keep(some.len() == 1)).await?;
        entries.extend(hydrate(conn, &rows).await?);
    }
    // MySQL finds rows whatever their case
    if conn.dialect() == Dialect::MySql {
        let wanted: HashSet<&EntryId> = ids.iter().collect();
        entries.retain(|(_, entry)| wanted.contains(&entry.id));
    }
    Ok(entries)
}

/// Entries by row ID.
pub(crate) async fn fetch_rows(conn: &mut Conn, rows: &[i64]) -> Result<Vec<(i64, Entry)>, StoreError> {
    let mut entries = Vec::with_capacity(rows.len());
    for some in rows.chunks(LIST_MAX) {
        let list = id_list(some.iter().copied());
        let rows = conn.all(Query::once(format!("{SELECT} WHERE e.id IN ({list}) ORDER BY e.id"))).await?;
        entries.extend(hydrate(conn, &rows).await?);
    }
    Ok(entries)
}

/// Entries below this parent, for the alias of a join token.
pub(crate) async fn children(conn: &mut Conn, parent: &SpiffeId) -> Result<Vec<(i64, Entry)>, StoreError> {
    let mut query = Query::new(format!("{SELECT} WHERE "));
    query.equals(conn.dialect(), "e.parent_id", parent.as_str()).push(" ORDER BY e.id");
    let rows = conn.all(query).await?;
    hydrate(conn, &rows).await
}

/// Completes rows of [`SELECT`] with their selectors, DNS names and trust domains, those of them that are entries.
async fn hydrate(conn: &mut Conn, rows: &[Row]) -> Result<Vec<(i64, Entry)>, StoreError> {
    let mut entries = Vec::with_capacity(rows.len());
    for some in rows.chunks(LIST_MAX) {
        let ids = some.iter().map(|row| row.int(0)).collect::<Result<Vec<_>, _>>()?;
        let selector = |row: &Row| Ok(Selector { kind: row.text(1)?, value: row.text(2)? });
        let mut selectors = parts(conn, "type, value FROM selectors", &ids, "id", selector).await?;
        let text = |row: &Row| row.text(1);
        let mut names = parts(conn, "value FROM dns_names", &ids, "id", text).await?;
        let federated = "b.trust_domain FROM federated_registration_entries JOIN bundles b ON b.id = bundle_id";
        let mut bundles = parts(conn, federated, &ids, "bundle_id", text).await?;
        for (id, row) in ids.iter().zip(some) {
            let take = |map: &mut HashMap<i64, Result<Vec<String>, StoreError>>| map.remove(id).unwrap_or(Ok(vec![]));
            let entry = selectors.remove(id).unwrap_or(Ok(vec![])).and_then(|selectors| {
                from_row(row, SelectorSet::new(selectors), take(&mut names)?, &take(&mut bundles)?)
            });
            entries.extend(readable(row, entry).map(|entry| (*id, entry)));
        }
    }
    Ok(entries)
}

/// The entry, if it is one: a bad row is named in the log and left out, as it must not take the others away.
pub(super) fn readable(row: &Row, entry: Result<Entry, StoreError>) -> Option<Entry> {
    let name = |error: &StoreError| {
        let (row, entry_id) = (row.int(0).unwrap_or_default(), row.str(1).unwrap_or_default());
        tracing::error!(row, entry_id, %error, "Invalid registration entry in the datastore; left out");
    };
    entry.inspect_err(name).ok()
}

/// What belongs to each of these entries; an error where a part of it cannot be read.
async fn parts<T>(
    conn: &mut Conn,
    what: &str,
    ids: &[i64],
    order: &str,
    read: impl Fn(&Row) -> Result<T, StoreError>,
) -> Result<HashMap<i64, Result<Vec<T>, StoreError>>, StoreError> {
    let list = id_list(ids.iter().copied());
    let query = format!("SELECT registered_entry_id, {what} WHERE registered_entry_id IN ({list}) ORDER BY {order}");
    let mut parts = HashMap::with_capacity(ids.len());
    for row in conn.all(Query::once(query)).await? {
        add_part(parts.entry(row.int(0)?).or_insert(Ok(Vec::new())), read(&row));
    }
    Ok(parts)
}

/// Adds to what belongs to one row; what cannot be read stays as an error.
pub(crate) fn add_part<T>(parts: &mut Result<Vec<T>, StoreError>, part: Result<T, StoreError>) {
    match (parts, part) {
        (Ok(all), Ok(part)) => all.push(part),
        (parts @ Ok(_), Err(error)) => *parts = Err(error),
        (Err(_), _) => {}
    }
}

fn id_list(ids: impl Iterator<Item = i64>) -> String {
    ids.map(|id| id.to_string()).collect::<Vec<_>>().join(",")
}

pub(super) fn from_row(
    row: &Row,
    selectors: SelectorSet,
    dns_names: Vec<String>,
    bundles: &[String],
) -> Result<Entry, StoreError> {
    let name = row.str(1)?;
    let bad = |cause: &dyn std::fmt::Display| StoreError::BadRow {
        what: format!("registration entry {name:?}"),
        cause: cause.to_string(),
    };
    let spiffe_id = |at: usize| SpiffeId::parse(row.str(at)?).map_err(|e| bad(&e));
    let seconds = |at: usize| i32::try_from(row.int(at)?).map_err(|e| bad(&e));
    let attributes = attributes(row.blob(12)?).map_err(|e| bad(&e))?;
    let mut federates_with = Vec::with_capacity(bundles.len());
    for text in bundles {
        federates_with.push(TrustDomain::parse(text).map_err(|e| bad(&e))?);
    }
    Ok(Entry {
        id: EntryId::parse(name).map_err(|e| bad(&e))?,
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

pub(super) fn attributes(blob: &[u8]) -> Result<AdditionalAttributes, prost::DecodeError> {
    AdditionalAttributes::decode(blob)
}

/// NULL when there is nothing to say, as SPIRE stores it.
pub(super) fn attributes_blob(entry: &Entry) -> Option<Vec<u8>> {
    let attributes = AdditionalAttributes {
        disable_x509_svid_prefetch: entry.disable_x509_svid_prefetch,
        jwt_svid_include_jti: entry.jwt_svid_include_jti,
    };
    Some(attributes.encode_to_vec()).filter(|blob| !blob.is_empty())
}

/// The order of DNS names has a meaning (the first is the common name), so they are no set.
pub(crate) fn distinct(names: &[String]) -> Vec<&str> {
    let mut seen = HashSet::with_capacity(names.len());
    names.iter().map(String::as_str).filter(|name| seen.insert(*name)).collect()
}
