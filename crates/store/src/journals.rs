//! CA journals: which authorities each server prepared, activated and retired.

use crate::sql::{Query, Row};
use crate::store::transact;
use crate::{Store, StoreError};
use finial_core::UnixSeconds;
use finial_proto::journal::Entries;
use prost::Message;

/// The journal of one server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaJournal {
    /// Row ID; 0 = not stored yet.
    pub id: i64,
    /// `journal.Entries`, protobuf.
    pub data: Vec<u8>,
    /// Subject key ID of the active X.509 authority, lowercase hex.
    pub active_x509_authority_id: String,
}

impl Store {
    /// Creates (`id` = 0) or replaces a journal. `NotFound` when a row with another ID does not exist.
    pub async fn set_ca_journal(&self, journal: &CaJournal) -> Result<CaJournal, StoreError> {
        self.counted("datastore.ca_journal.set", async {
            let now = self.now();
            let (data, active) = (journal.data.as_slice(), &journal.active_x509_authority_id);
            transact!(self, |tx| {
                if journal.id == 0 {
                    let query = Query::new(
                        "INSERT INTO ca_journals (created_at, updated_at, data, active_x509_authority_id, \
                         active_jwt_authority_id) VALUES (?, ?, ?, ?, '')",
                    );
                    let id = tx.insert(query.bind(now).bind(now).bind(data).bind(active)).await?;
                    return Ok(CaJournal { id, ..journal.clone() });
                }
                let query = Query::new(
                    "UPDATE ca_journals SET updated_at = ?, data = ?, active_x509_authority_id = ? WHERE id = ?",
                );
                match tx.execute(query.bind(now).bind(data).bind(active).bind(journal.id)).await? {
                    0 => Err(StoreError::NotFound),
                    _ => Ok(journal.clone()),
                }
            })
        })
        .await
    }

    /// The journal of the server whose active X.509 authority this is.
    pub async fn fetch_ca_journal(&self, active_x509_authority_id: &str) -> Result<Option<CaJournal>, StoreError> {
        self.counted("datastore.ca_journal.fetch", async {
            if active_x509_authority_id.is_empty() {
                return Err(StoreError::InvalidArgument("active X509 authority ID is required".into()));
            }
            let query = Query::new(
                "SELECT id, data, active_x509_authority_id FROM ca_journals WHERE active_x509_authority_id = ? ORDER BY id LIMIT 1",
            );
            let row = self.connection().await?.optional(query.bind(active_x509_authority_id)).await?;
            row.as_ref().map(from_row).transpose()
        })
        .await
    }

    /// All journals.
    pub async fn list_ca_journals(&self) -> Result<Vec<CaJournal>, StoreError> {
        let query = Query::new("SELECT id, data, active_x509_authority_id FROM ca_journals ORDER BY id");
        self.connection().await?.all(query).await?.iter().map(from_row).collect()
    }

    /// Deletes the journals whose authorities all ended before this moment, and returns how many.
    pub async fn prune_ca_journals(&self, all_authorities_expire_before: UnixSeconds) -> Result<u64, StoreError> {
        self.counted("datastore.ca_journal.prune", async {
            let mut stale = Vec::new();
            for journal in self.list_ca_journals().await? {
                let entries = Entries::decode(journal.data.as_slice()).map_err(|e| StoreError::BadRow {
                    what: format!("unable to unmarshal entries from CA journal record {}", journal.id),
                    cause: e.to_string(),
                })?;
                let x509 = entries.x509_c_as.iter().map(|ca| ca.not_after);
                let jwt = entries.jwt_keys.iter().map(|key| key.not_after);
                let mut ends = x509.chain(jwt).chain(entries.wit_keys.iter().map(|key| key.not_after));
                if ends.all(|end| end <= all_authorities_expire_before) {
                    stale.push(journal);
                }
            }
            if stale.is_empty() {
                return Ok(0);
            }
            transact!(self, |tx| {
                let mut deleted = 0;
                for journal in &stale {
                    // only as it was read: its server may have come back in between
                    let query = Query::new("DELETE FROM ca_journals WHERE id = ? AND data = ?");
                    deleted += tx.execute(query.bind(journal.id).bind(journal.data.as_slice())).await?;
                }
                Ok(deleted)
            })
        })
        .await
    }
}

fn from_row(row: &Row) -> Result<CaJournal, StoreError> {
    Ok(CaJournal { id: row.int(0)?, data: row.blob(1)?.to_vec(), active_x509_authority_id: row.text(2)? })
}
