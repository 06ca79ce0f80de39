//! A page of entries from SQLite as one value: each row and each column that crosses from SQLite's thread costs more than
//! reading it does, and a server reads all entries before it answers.

use super::load::EntryRow;
use crate::StoreError;
use crate::sql::{Conn, Query, parse_time};
use finial_core::{Entry, EntryId, Selector, SelectorSet, SpiffeId, TrustDomain};
use serde::Deserialize;
use std::borrow::Cow;

const PAGE: &str = "SELECT COUNT(*), MAX(p.id), json_group_array(json_array(p.id, p.entry_id, p.spiffe_id, p.parent_id, p.ttl, \
    p.jwt_svid_ttl, p.admin, p.downstream, p.expiry, p.revision_number, p.store_svid, p.hint, hex(p.additional_attributes), \
    p.created_at, \
    json((SELECT json_group_array(json_array(s.type, s.value)) FROM selectors s WHERE s.registered_entry_id = p.id)), \
    json((SELECT json_group_array(n.value) FROM (SELECT value FROM dns_names WHERE registered_entry_id = p.id ORDER BY id) n)), \
    json((SELECT json_group_array(f.trust_domain) FROM (SELECT b.trust_domain FROM federated_registration_entries \
      JOIN bundles b ON b.id = bundle_id WHERE registered_entry_id = p.id ORDER BY bundle_id) f)))) \
    FROM (SELECT * FROM registered_entries WHERE id > ? ORDER BY id LIMIT ?) p";

/// One entry, in the order of the columns; NULL is the empty value.
#[derive(Deserialize)]
struct Packed<'a>(
    i64,
    #[serde(borrow)] Cow<'a, str>,
    #[serde(borrow)] Cow<'a, str>,
    #[serde(borrow)] Cow<'a, str>,
    Option<i32>,
    Option<i32>,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<String>,
    #[serde(borrow)] Cow<'a, str>,
    #[serde(borrow)] Cow<'a, str>,
    Vec<(String, String)>,
    Vec<String>,
    Vec<String>,
);

/// A page as SQLite packed it.
pub(super) struct Page(String);

/// Reads a page; with it the last row ID if the page is full.
pub(super) async fn read(conn: &mut Conn, after: i64, count: u32) -> Result<(Page, Option<i64>), StoreError> {
    let row = conn.one(Query::new(PAGE).bind(after).bind(count)).await?;
    let last = (row.int(0)? >= count.into()).then_some(row.int(1)?);
    Ok((Page(row.text(2)?), last))
}

impl Page {
    /// The entries with their row IDs, in order of these. `None` where something in it is not as expected, so that it has
    /// to be read row by row, which tells the bad ones apart.
    pub(super) fn entries(&self) -> Option<Vec<EntryRow>> {
        let mut packed = serde_json::from_str::<Vec<Packed<'_>>>(&self.0).ok()?;
        packed.sort_by_key(|entry| entry.0);
        packed.into_iter().map(|one| Some((one.0, entry(one)?))).collect()
    }
}

fn entry(packed: Packed<'_>) -> Option<Entry> {
    let flag = |column: Option<i64>| column.unwrap_or_default() != 0;
    let selectors = packed.14.into_iter().map(|(kind, value)| Selector { kind, value });
    let federates_with = packed.16.iter().map(|text| TrustDomain::parse(text).ok());
    let attributes = super::rows::attributes(&unhex(&packed.12)?).ok()?;
    let created = parse_time(&packed.13)?;
    Some(Entry {
        id: EntryId::parse(&packed.1).ok()?,
        spiffe_id: SpiffeId::parse(&packed.2).ok()?,
        parent_id: SpiffeId::parse(&packed.3).ok()?,
        selectors: SelectorSet::new(selectors.collect()),
        x509_svid_ttl: packed.4.unwrap_or_default(),
        jwt_svid_ttl: packed.5.unwrap_or_default(),
        federates_with: federates_with.collect::<Option<_>>()?,
        admin: flag(packed.6),
        downstream: flag(packed.7),
        expires_at: packed.8.unwrap_or_default(),
        dns_names: packed.15,
        revision_number: packed.9.unwrap_or_default(),
        store_svid: flag(packed.10),
        hint: packed.11.unwrap_or_default(),
        created_at: created.unix_timestamp() + i64::from(created.nanosecond() >= 500_000_000),
        disable_x509_svid_prefetch: attributes.disable_x509_svid_prefetch,
        jwt_svid_include_jti: attributes.jwt_svid_include_jti,
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    text.as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        })
        .collect()
}
