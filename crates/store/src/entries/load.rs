//! Reading many entries at once: a page of rows, and what belongs to all of them by ranges of their row IDs.

use super::rows::{SELECT, from_row, readable};
use crate::sql::{Conn, Dialect, Query, Row};
use crate::{Store, StoreError};
use finial_core::{Entry, EntryId, Selector, SelectorSet};

/// An entry and its row ID.
pub type EntryRow = (i64, Entry);

/// How many entries are read at once when all are.
const PAGE: u32 = 1000;

/// A page as it came from the datastore.
enum Page {
    Read(Vec<EntryRow>),
    Packed(super::packed::Page),
}

impl Store {
    /// At most `count` entries after a row ID, in order of their row IDs, and the row ID to go on from; `None` when there
    /// are no more. All of one page are of one moment.
    pub async fn entries_after(&self, after: i64, count: u32) -> Result<(Vec<EntryRow>, Option<i64>), StoreError> {
        let (page, next) = self.page_after(after, count).await?;
        Ok((self.unpacked(page, after, count).await?, next))
    }

    /// Hands every entry over with its row ID, in order of these. Each page is of one moment; while it is looked at the
    /// datastore reads the next.
    pub async fn each_entry(&self, mut take: impl FnMut(i64, &Entry) + Send) -> Result<(), StoreError> {
        let mut next = Some((0, self.page_after(0, PAGE).await?));
        while let Some((after, (page, following))) = next {
            let fetch = async {
                let Some(row) = following else { return Ok(None) };
                self.page_after(row, PAGE).await.map(|page| Some((row, page)))
            };
            let look = async {
                let entries = self.unpacked(page, after, PAGE).await?;
                entries.iter().for_each(|(row, entry)| take(*row, entry));
                Ok::<_, StoreError>(())
            };
            // The datastore is asked first, and works while the page before is taken in.
            let (fetched, looked) = tokio::join!(fetch, look);
            looked?;
            next = fetched?;
        }
        Ok(())
    }

    async fn page_after(&self, after: i64, count: u32) -> Result<(Page, Option<i64>), StoreError> {
        self.counted("datastore.registration_entry.list", async {
            if self.dialect() == Dialect::Sqlite {
                // one statement needs no transaction
                match super::packed::read(&mut *self.connection().await?, after, count).await {
                    Ok((packed, next)) => return Ok((Page::Packed(packed), next)),
                    // A value that JSON cannot hold, bytes for example; row by row it is told whose it is.
                    Err(StoreError::Sql(_) | StoreError::BadRow { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            let (entries, next) = self.rows_after(after, count).await?;
            Ok((Page::Read(entries), next))
        })
        .await
    }

    async fn unpacked(&self, page: Page, after: i64, count: u32) -> Result<Vec<EntryRow>, StoreError> {
        match page {
            Page::Read(entries) => Ok(entries),
            Page::Packed(packed) => match packed.entries() {
                Some(entries) => Ok(entries),
                None => Ok(self.rows_after(after, count).await?.0),
            },
        }
    }

    async fn rows_after(&self, after: i64, count: u32) -> Result<(Vec<EntryRow>, Option<i64>), StoreError> {
        loop {
            let mut tx = self.read_page().await?;
            let page = page(&mut tx, after, count).await;
            match self.finish_read(tx, page).await {
                Err(error) if self.leave_replica(&error) => {}
                result => return result,
            }
        }
    }

    /// The entries with these IDs, with their row IDs; missing ones are left out.
    pub async fn entry_rows(&self, ids: &[EntryId]) -> Result<Vec<EntryRow>, StoreError> {
        self.counted("datastore.registration_entry.fetch", async {
            let mut tx = self.read().await?;
            let found = super::rows::fetch(&mut tx, ids, "").await;
            self.finish_read(tx, found).await
        })
        .await
    }
}

async fn page(conn: &mut Conn, after: i64, count: u32) -> Result<(Vec<EntryRow>, Option<i64>), StoreError> {
    let query = Query::new(format!("{SELECT} WHERE e.id > ? ORDER BY e.id LIMIT ?"));
    let rows = conn.all(query.bind(after).bind(count)).await?;
    let Some(last) = rows.last() else { return Ok((Vec::new(), None)) };
    let last = last.int(0)?;
    let range = (after, last);
    let mut selectors = Parts::read(conn, "type, value FROM selectors", "id", range).await?;
    let mut names = Parts::read(conn, "value FROM dns_names", "id", range).await?;
    let bundles = "b.trust_domain FROM federated_registration_entries JOIN bundles b ON b.id = bundle_id";
    let mut bundles = Parts::read(conn, bundles, "bundle_id", range).await?;
    let mut entries = Vec::with_capacity(rows.len());
    for row in &rows {
        let id = row.int(0)?;
        let selector = |row: &Row| Ok(Selector { kind: row.text(1)?, value: row.text(2)? });
        let text = |row: &Row| row.text(1);
        // A part that cannot be read takes its entry with it: with fewer selectors it would be for more workloads.
        let entry = selectors.of(id, selector).and_then(|selectors| {
            from_row(row, SelectorSet::new(selectors), names.of(id, text)?, &bundles.of(id, text)?)
        });
        entries.extend(readable(row, entry).map(|entry| (id, entry)));
    }
    Ok((entries, (rows.len() >= usize::try_from(count).unwrap_or(usize::MAX)).then_some(last)))
}

/// What belongs to the entries of a page, in their order.
struct Parts(std::iter::Peekable<std::vec::IntoIter<Row>>);

impl Parts {
    async fn read(conn: &mut Conn, what: &str, order: &str, (after, last): (i64, i64)) -> Result<Self, StoreError> {
        let query = format!(
            "SELECT registered_entry_id, {what} WHERE registered_entry_id > ? AND registered_entry_id <= ? \
             ORDER BY registered_entry_id, {order}"
        );
        Ok(Self(conn.all(Query::new(query).bind(after).bind(last)).await?.into_iter().peekable()))
    }

    /// Those of one entry; entries are asked for in order, and what was left of one is passed over with the next.
    fn of<T>(&mut self, id: i64, read: impl Fn(&Row) -> Result<T, StoreError>) -> Result<Vec<T>, StoreError> {
        let mut parts = Vec::new();
        while let Some(row) = self.0.peek() {
            let owner = row.int(0)?;
            if owner > id {
                break;
            }
            // rows without an entry are of no use
            if owner == id {
                parts.push(read(row)?);
            }
            self.0.next();
        }
        Ok(parts)
    }
}
