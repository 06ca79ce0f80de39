//! Join tokens: each lets one agent in, once.

use crate::entries::create_one;
use crate::sql::{Conn, Dialect, Query, Row};
use crate::store::transact;
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
            let now = self.now();
            transact!(self, |tx| {
                let query =
                    Query::new("INSERT INTO join_tokens (created_at, updated_at, token, expiry) VALUES (?, ?, ?, ?)");
                tx.execute(query.bind(now).bind(now).bind(&token.token).bind(token.expires_at)).await?;
                match &alias {
                    Some(entry) => create_one(&mut tx, entry.clone(), now).await.map(Some),
                    None => Ok(None),
                }
            })
        })
        .await
    }

    /// A token that was not used yet.
    pub async fn fetch_join_token(&self, token: &str) -> Result<Option<JoinToken>, StoreError> {
        self.counted("datastore.join_token.fetch", async {
            let query = Query::new("SELECT token, expiry FROM join_tokens WHERE token = ?").bind(token);
            exact(self.connection().await?.optional(query).await?, token)
        })
        .await
    }

    /// Deletes the tokens that expired before `expires_before`, and returns how many.
    pub async fn prune_join_tokens(&self, expires_before: UnixSeconds) -> Result<u64, StoreError> {
        self.counted("datastore.join_token.prune", async {
            transact!(self, |tx| {
                tx.execute(Query::new("DELETE FROM join_tokens WHERE expiry < ?").bind(expires_before)).await
            })
        })
        .await
    }
}

const DELETE: &str = "DELETE FROM join_tokens WHERE token = ? RETURNING token, expiry";

/// Uses up a token: of any number of callers exactly one gets it. The row is deleted, and who deleted it has the token:
/// whoever else read it before deletes nothing.
async fn consume(conn: &mut Conn, token: &str) -> Result<Option<JoinToken>, StoreError> {
    if conn.dialect().has_returning() {
        return exact(conn.optional(Query::new(DELETE).bind(token)).await?, token);
    }
    // of several that ask for the lock, the second finds no row
    let query = Query::new("SELECT token, expiry FROM join_tokens WHERE token = ? FOR UPDATE").bind(token);
    let Some(found) = exact(conn.optional(query).await?, token)? else { return Ok(None) };
    let deleted = conn.execute(Query::new("DELETE FROM join_tokens WHERE token = ?").bind(token)).await?;
    Ok((deleted > 0).then_some(found))
}

/// The same in a transaction that [`Store::lend`] gave, whose beginning is in the same call on SQLite.
pub(crate) async fn begin_consume(conn: &mut Conn, token: &str) -> Result<Option<JoinToken>, StoreError> {
    if conn.dialect() != Dialect::Sqlite {
        return consume(conn, token).await;
    }
    let query = Query::new(format!("{}; {DELETE}", Dialect::Sqlite.begin_write())).bind(token);
    exact(conn.optional(query).await?, token)
}

/// MySQL finds rows whatever their case.
fn exact(row: Option<Row>, token: &str) -> Result<Option<JoinToken>, StoreError> {
    match row {
        Some(row) if row.str(0)? == token => Ok(Some(JoinToken { token: row.text(0)?, expires_at: row.int(1)? })),
        _ => Ok(None),
    }
}
