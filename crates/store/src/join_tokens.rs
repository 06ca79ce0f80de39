//! Join tokens: each lets one agent in, once.

use crate::entries::rows as entry_rows;
use crate::sql::{Columns, Conn, DbRow};
use crate::{CreatedEntry, Store, StoreError};
use finial_core::{Entry, JoinToken, UnixSeconds};

impl Store {
    /// Stores a token and, in the same transaction, the alias entry that goes with it. `AlreadyExists` when the token does.
    pub async fn create_join_token(
        &self,
        token: &JoinToken,
        alias: Option<Entry>,
    ) -> Result<Option<CreatedEntry>, StoreError> {
        self.counted("datastore.join_token.create", async {
            if token.token.is_empty() || token.expires_at == 0 {
                return Err(StoreError::InvalidArgument("token and expiry are required".into()));
            }
            let now = self.now_text();
            let mut tx = self.begin().await?;
            let result = async {
                sqlx::query("INSERT INTO join_tokens (created_at, updated_at, token, expiry) VALUES (?, ?, ?, ?)")
                    .bind(&now)
                    .bind(&now)
                    .bind(&token.token)
                    .bind(token.expires_at)
                    .execute(&mut *tx)
                    .await?;
                match alias {
                    Some(entry) => entry_rows::create_one(&mut tx, entry, &now).await.map(Some),
                    None => Ok(None),
                }
            }
            .await;
            self.finish(tx, result).await
        })
        .await
    }

    /// A token that was not used yet.
    pub async fn fetch_join_token(&self, token: &str) -> Result<Option<JoinToken>, StoreError> {
        self.counted("datastore.join_token.fetch", async {
            let mut conn = self.connection().await?;
            let row = sqlx::query("SELECT token, expiry FROM join_tokens WHERE token = ?")
                .bind(token)
                .fetch_optional(&mut *conn)
                .await;
            self.seen(row.map_err(StoreError::from).and_then(|row| row.map(|row| from_row(&row)).transpose()))
        })
        .await
    }

    /// Uses up a token: of any number of callers exactly one gets it.
    pub async fn consume_join_token(&self, token: &str) -> Result<Option<JoinToken>, StoreError> {
        self.counted("datastore.join_token.delete", async {
            let mut tx = self.begin().await?;
            let result = consume(&mut tx, token).await;
            self.finish(tx, result).await
        })
        .await
    }

    /// Deletes the tokens that expired before `expires_before`, and returns how many.
    pub async fn prune_join_tokens(&self, expires_before: UnixSeconds) -> Result<u64, StoreError> {
        self.counted("datastore.join_token.prune", async {
            let mut tx = self.begin().await?;
            let result =
                sqlx::query("DELETE FROM join_tokens WHERE expiry < ?").bind(expires_before).execute(&mut *tx).await;
            self.finish(tx, result.map(|done| done.rows_affected()).map_err(StoreError::from)).await
        })
        .await
    }
}

/// The row is deleted, and who deleted it has the token: whoever else read it before deletes nothing.
pub(crate) async fn consume(conn: &mut Conn, token: &str) -> Result<Option<JoinToken>, StoreError> {
    let deleted = sqlx::query("DELETE FROM join_tokens WHERE token = ? RETURNING token, expiry");
    deleted.bind(token).fetch_optional(conn).await?.map(|row| from_row(&row)).transpose()
}

/// The same, with the beginning of the transaction in the same call.
pub(crate) async fn begin_consume(conn: &mut Conn, token: &str) -> Result<Option<JoinToken>, StoreError> {
    let deleted = sqlx::query("BEGIN IMMEDIATE; DELETE FROM join_tokens WHERE token = ? RETURNING token, expiry");
    deleted.bind(token).fetch_optional(conn).await?.map(|row| from_row(&row)).transpose()
}

fn from_row(row: &DbRow) -> Result<JoinToken, StoreError> {
    Ok(JoinToken { token: Columns(row).text(0)?, expires_at: Columns(row).int(1)? })
}
