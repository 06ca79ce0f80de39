//! Registration entries.

mod change;
mod create;
mod filter;
mod load;
mod packed;
pub(crate) mod rows;

pub(crate) use create::create_one;
pub use filter::EntryFilter;
pub(crate) use filter::selector_clauses;
pub use load::EntryRow;

use crate::store::transact;
use crate::{EventFeed, Store, StoreError, events};
use finial_core::{Entry, EntryId, SelectorSet, SpiffeId, TrustDomain, UnixSeconds};

/// What became of one entry of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreatedEntry {
    /// As stored.
    pub entry: Entry,
    /// Row ID, by which pages are told apart.
    pub row: i64,
    /// An entry with the same SPIFFE ID, parent and selectors was there before: this is that one, and nothing was stored.
    pub existing: bool,
}

/// Which parts of an entry an update replaces; `None` leaves a part as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are those of `Entry`
pub struct EntryUpdate {
    pub spiffe_id: Option<SpiffeId>,
    pub parent_id: Option<SpiffeId>,
    pub selectors: Option<SelectorSet>,
    pub x509_svid_ttl: Option<i32>,
    pub jwt_svid_ttl: Option<i32>,
    pub federates_with: Option<Vec<TrustDomain>>,
    pub admin: Option<bool>,
    pub downstream: Option<bool>,
    pub expires_at: Option<UnixSeconds>,
    pub dns_names: Option<Vec<String>>,
    pub store_svid: Option<bool>,
    pub hint: Option<String>,
    pub disable_x509_svid_prefetch: Option<bool>,
    pub jwt_svid_include_jti: Option<bool>,
}

impl EntryUpdate {
    fn apply(self, entry: &mut Entry) {
        fn set<T>(field: &mut T, new: Option<T>) {
            if let Some(new) = new {
                *field = new;
            }
        }
        set(&mut entry.spiffe_id, self.spiffe_id);
        set(&mut entry.parent_id, self.parent_id);
        set(&mut entry.selectors, self.selectors);
        set(&mut entry.x509_svid_ttl, self.x509_svid_ttl);
        set(&mut entry.jwt_svid_ttl, self.jwt_svid_ttl);
        set(&mut entry.federates_with, self.federates_with);
        set(&mut entry.admin, self.admin);
        set(&mut entry.downstream, self.downstream);
        set(&mut entry.expires_at, self.expires_at);
        set(&mut entry.dns_names, self.dns_names);
        set(&mut entry.store_svid, self.store_svid);
        set(&mut entry.hint, self.hint);
        set(&mut entry.disable_x509_svid_prefetch, self.disable_x509_svid_prefetch);
        set(&mut entry.jwt_svid_include_jti, self.jwt_svid_include_jti);
    }
}

/// How many transactions a batch that the database refuses may take: all who write wait for it.
const TRIES_MAX: usize = 256;

/// Runs a block for a batch in one transaction. If the database itself refuses (a value that is too long for its column,
/// say), halves of it tell which item it is. After [`TRIES_MAX`] of them, what is refused is refused together. What fails
/// otherwise then ends the batch only where nobody knows what was stored.
macro_rules! each_of {
    ($store:expr, $items:expr, |$tx:ident, $some:ident| $work:expr) => {{
        let all = &$items[..];
        let mut results = Vec::with_capacity(all.len());
        let (mut waiting, mut tries) = (vec![all], 0);
        while let Some($some) = waiting.pop().filter(|some| !some.is_empty()) {
            tries += 1;
            match async { transact!($store, |$tx| $work) }.await {
                Ok(done) => results.extend(done),
                Err(refused @ (StoreError::AlreadyExists(_) | StoreError::Database(_))) => {
                    if $some.len() == 1 {
                        results.push(Err(refused));
                    } else if tries < TRIES_MAX {
                        let (first, rest) = $some.split_at($some.len() / 2);
                        waiting.extend([rest, first]);
                    } else {
                        results.extend($some.iter().map(|_| Err(refused_together(&refused))));
                    }
                }
                Err(error) if tries == 1 || error.leaves_doubt() => return Err(error),
                // Where no connection is to be had those that were stored before are told all the same.
                Err(StoreError::Busy(seconds)) => {
                    let rest = all.len().saturating_sub(results.len());
                    results.extend((0..rest).map(|_| Err(StoreError::Busy(seconds))));
                    break;
                }
                Err(error) if $some.len() == 1 => results.push(Err(error)),
                Err(error) => results.extend($some.iter().map(|_| Err(for_each(&error)))),
            }
        }
        Ok(results)
    }};
}

/// What ended several together.
fn for_each(error: &StoreError) -> StoreError {
    match error {
        StoreError::Contended(text) => StoreError::Contended(text.clone()),
        StoreError::Full { path, detail } => StoreError::Full { path: path.clone(), detail: detail.clone() },
        StoreError::ReadOnly { path, detail } => StoreError::ReadOnly { path: path.clone(), detail: detail.clone() },
        StoreError::Locked { path, detail } => StoreError::Locked { path: path.clone(), detail: detail.clone() },
        error => StoreError::Database(error.to_string()),
    }
}

/// What is told of each when there are too many to find out which of them it is.
fn refused_together(refused: &StoreError) -> StoreError {
    let text = refused.to_string();
    let cause = text.strip_prefix("datastore-sql: ").unwrap_or(&text);
    StoreError::Database(format!(
        "not stored, as the database refuses too much of the batch: try fewer at once ({cause})"
    ))
}

impl Store {
    /// Stores a batch in one transaction (one for each where the database itself refuses some); each entry has its own
    /// result, in order. `entry.id` is kept, so the caller
    /// makes it when the operator did not; `created_at` is set here; the revision starts at 0.
    pub async fn create_entries(
        &self,
        entries: Vec<Entry>,
    ) -> Result<Vec<Result<CreatedEntry, StoreError>>, StoreError> {
        self.counted("datastore.registration_entry.create", async {
            let now = self.now();
            each_of!(self, &entries, |tx, some| create::create(&mut tx, some, now).await)
        })
        .await
    }

    /// One entry.
    pub async fn fetch_entry(&self, id: &EntryId) -> Result<Option<Entry>, StoreError> {
        Ok(self.fetch_entries(std::slice::from_ref(id)).await?.pop())
    }

    /// The entries with these IDs; missing ones are left out.
    pub async fn fetch_entries(&self, ids: &[EntryId]) -> Result<Vec<Entry>, StoreError> {
        self.counted("datastore.registration_entry.fetch", async {
            let mut tx = self.read().await?;
            let found = rows::fetch(&mut tx, ids, "").await;
            let found = self.finish_read(tx, found).await?;
            Ok(found.into_iter().map(|(_, entry)| entry).collect())
        })
        .await
    }

    /// Changes entries, as [`Store::create_entries`] creates them; each has its own result, in order. The revision grows
    /// even when nothing differs. `NotFound` where there is none.
    pub async fn update_entries(
        &self,
        updates: &[(EntryId, EntryUpdate)],
    ) -> Result<Vec<Result<Entry, StoreError>>, StoreError> {
        self.counted("datastore.registration_entry.update", async {
            let now = self.now();
            each_of!(self, updates, |tx, some| change::update(&mut tx, some, now).await)
        })
        .await
    }

    /// Changes one entry.
    pub async fn update_entry(&self, id: &EntryId, update: EntryUpdate) -> Result<Entry, StoreError> {
        self.update_entries(&[(id.clone(), update)]).await?.pop().unwrap_or(Err(StoreError::NotFound))
    }

    /// Deletes entries with all that belongs to them, and returns them; in one transaction, as [`Store::create_entries`].
    /// `NotFound` where there is none (any more).
    pub async fn delete_entries(&self, ids: &[EntryId]) -> Result<Vec<Result<Entry, StoreError>>, StoreError> {
        self.counted("datastore.registration_entry.delete", async {
            let now = self.now();
            each_of!(self, ids, |tx, some| change::delete(&mut tx, some, now).await)
        })
        .await
    }

    /// Deletes one entry.
    pub async fn delete_entry(&self, id: &EntryId) -> Result<Entry, StoreError> {
        self.delete_entries(std::slice::from_ref(id)).await?.pop().unwrap_or(Err(StoreError::NotFound))
    }

    /// Deletes the entries that expired before `expires_before`, and returns their IDs.
    pub async fn prune_entries(&self, expires_before: UnixSeconds) -> Result<Vec<EntryId>, StoreError> {
        self.counted("datastore.registration_entry.prune", async {
            let now = self.now();
            transact!(self, |tx| {
                let expired = rows::expired(&mut tx, expires_before).await?;
                let (rows, ids): (Vec<i64>, Vec<String>) = expired.into_iter().unzip();
                rows::delete(&mut tx, &rows).await?;
                events::write(&mut tx, EventFeed::Entries, &ids, now).await?;
                Ok(ids.iter().filter_map(|id| EntryId::parse(id).ok()).collect())
            })
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::ErrorKind;

    #[test]
    fn what_ended_several_is_told_to_each_as_what_it_is() {
        let (path, detail) = (std::path::PathBuf::from("/d"), String::from("why"));
        for (error, kind) in [
            (StoreError::Full { path: path.clone(), detail: detail.clone() }, ErrorKind::Exhausted),
            (StoreError::Locked { path: path.clone(), detail: detail.clone() }, ErrorKind::Unavailable),
            (StoreError::ReadOnly { path, detail }, ErrorKind::Internal),
            (StoreError::Contended("x".into()), ErrorKind::Unavailable),
        ] {
            let each = for_each(&error);
            assert_eq!((each.kind(), each.is_outage(), each.to_string()), (kind, error.is_outage(), error.to_string()));
        }
    }
}
