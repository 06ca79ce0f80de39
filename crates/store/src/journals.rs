//! CA journals: which authorities each server prepared, activated and retired.

use crate::sql::{Columns, DbRow};
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
        let now = self.now_text();
        let mut tx = self.begin().await?;
        let result = async {
            let mut stored = journal.clone();
            if journal.id == 0 {
                let row = sqlx::query(
                    "INSERT INTO ca_journals (created_at, updated_at, data, active_x509_authority_id, active_jwt_authority_id) \
                     VALUES (?, ?, ?, ?, '') RETURNING id",
                )
                .bind(&now)
                .bind(&now)
                .bind(&journal.data)
                .bind(&journal.active_x509_authority_id)
                .fetch_one(&mut *tx)
                .await?;
                stored.id = Columns(&row).int(0)?;
                return Ok(stored);
            }
            let updated =
                sqlx::query("UPDATE ca_journals SET updated_at = ?, data = ?, active_x509_authority_id = ? WHERE id = ?")
                    .bind(&now)
                    .bind(&journal.data)
                    .bind(&journal.active_x509_authority_id)
                    .bind(journal.id)
                    .execute(&mut *tx)
                    .await?;
            if updated.rows_affected() == 0 { Err(StoreError::NotFound) } else { Ok(stored) }
        }
        .await;
        self.finish(tx, result).await
    }).await
    }

    /// The journal of the server whose active X.509 authority this is.
    pub async fn fetch_ca_journal(&self, active_x509_authority_id: &str) -> Result<Option<CaJournal>, StoreError> {
        self.counted("datastore.ca_journal.fetch", async {
        if active_x509_authority_id.is_empty() {
            return Err(StoreError::InvalidArgument("active X509 authority ID is required".into()));
        }
        let mut conn = self.connection().await?;
        let row = sqlx::query(
            "SELECT id, data, active_x509_authority_id FROM ca_journals WHERE active_x509_authority_id = ? ORDER BY id LIMIT 1",
        )
        .bind(active_x509_authority_id)
        .fetch_optional(&mut *conn)
        .await;
        self.seen(row.map_err(StoreError::from).and_then(|row| row.map(|row| from_row(&row)).transpose()))
    }).await
    }

    /// All journals.
    pub async fn list_ca_journals(&self) -> Result<Vec<CaJournal>, StoreError> {
        let mut conn = self.connection().await?;
        let rows = sqlx::query("SELECT id, data, active_x509_authority_id FROM ca_journals ORDER BY id");
        let rows = rows.fetch_all(&mut *conn).await.map_err(StoreError::from);
        self.seen(rows.and_then(|rows| rows.iter().map(from_row).collect()))
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
            let mut tx = self.begin().await?;
            let result = async {
                let mut deleted = 0;
                for journal in stale {
                    // only as it was read: its server may have come back in between
                    let done = sqlx::query("DELETE FROM ca_journals WHERE id = ? AND data = ?");
                    deleted += done.bind(journal.id).bind(journal.data).execute(&mut *tx).await?.rows_affected();
                }
                Ok(deleted)
            }
            .await;
            self.finish(tx, result).await
        })
        .await
    }
}

fn from_row(row: &DbRow) -> Result<CaJournal, StoreError> {
    let row = Columns(row);
    Ok(CaJournal { id: row.int(0)?, data: row.blob(1)?, active_x509_authority_id: row.text(2)? })
}
