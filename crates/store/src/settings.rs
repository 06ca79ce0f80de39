//! The `DataStore "sql"` block, and what it resolves to.

use crate::StoreError;
use std::path::PathBuf;

/// The `plugin_data` of `DataStore "sql"`, with SPIRE's keys.
#[derive(Clone, Debug, Default, serde::Deserialize)]
#[serde(default)]
pub struct SqlConfig {
    /// `sqlite3`, `postgres` or `mysql`.
    pub database_type: String,
    /// A path, or a `file:` URI.
    pub connection_string: String,
    /// A read-only replica; without meaning for SQLite.
    pub ro_connection_string: String,
    /// At most this many connections.
    pub max_open_conns: Option<u32>,
    /// Leave the schema as it is.
    pub disable_migration: bool,
}

/// How to open the datastore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreSettings {
    /// The database file; `None` is a database in memory, gone with the process (tests).
    pub path: Option<PathBuf>,
    /// Open without the right to write (`mode=ro`): every write fails.
    pub read_only: bool,
    /// At most this many reading connections.
    pub readers_max: u32,
    /// Leave the schema as it is.
    pub disable_migration: bool,
}

impl StoreSettings {
    /// The database file at `path` with the usual settings.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()), read_only: false, readers_max: 4, disable_migration: false }
    }

    /// A database in memory.
    pub fn memory() -> Self {
        Self { path: None, read_only: false, readers_max: 1, disable_migration: false }
    }
}

impl SqlConfig {
    /// Checks the keys, in SPIRE's words.
    pub fn resolve(&self) -> Result<StoreSettings, StoreError> {
        todo!()
    }
}
