//! The handle: connections, lock, transactions.

use crate::{StoreError, StoreSettings};
use finial_core::Clock;
use std::sync::Arc;

/// A handle to the open datastore; clones share it.
#[derive(Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) clock: Arc<dyn Clock>,
}

impl Store {
    /// Opens (and, if new, creates) the database, takes its lock for the life of this handle, and migrates the schema.
    pub async fn open(settings: StoreSettings, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        todo!()
    }

    /// Waits for running work, folds the write-ahead log into the file, and lets the lock go.
    pub async fn close(&self) {
        todo!()
    }
}
