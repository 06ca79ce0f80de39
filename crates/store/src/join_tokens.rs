//! Join tokens: each lets one agent in, once.

use crate::{CreatedEntry, Store, StoreError};
use finial_core::{Entry, JoinToken, UnixSeconds};

impl Store {
    /// Stores a token and, in the same transaction, the alias entry that goes with it. `AlreadyExists` when the token does.
    pub async fn create_join_token(
        &self,
        token: &JoinToken,
        alias: Option<Entry>,
    ) -> Result<Option<CreatedEntry>, StoreError> {
        todo!()
    }

    /// A token that was not used yet.
    pub async fn fetch_join_token(&self, token: &str) -> Result<Option<JoinToken>, StoreError> {
        todo!()
    }

    /// Uses up a token: of any number of callers exactly one gets it.
    pub async fn consume_join_token(&self, token: &str) -> Result<Option<JoinToken>, StoreError> {
        todo!()
    }

    /// Deletes the tokens that expired before `expires_before`, and returns how many.
    pub async fn prune_join_tokens(&self, expires_before: UnixSeconds) -> Result<u64, StoreError> {
        todo!()
    }
}
