//! What can go wrong in the datastore. Texts that API callers see are SPIRE's, with its prefixes.

use finial_core::ErrorKind;
use std::path::PathBuf;

/// A failure of the datastore.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The row asked for is not there.
    #[error("datastore-sql: record not found")]
    NotFound,
    /// The row exists already; the text names what.
    #[error("datastore-sql: {0}")]
    AlreadyExists(String),
    /// A rule of the datastore forbids it, such as an entry without selectors.
    #[error("datastore-validation: {0}")]
    Validation(String),
    /// The request makes no sense, such as a page token that is not a number.
    #[error("{0}")]
    InvalidArgument(String),
    /// Something is missing and the text says what.
    #[error("{0}")]
    Missing(String),
    /// The state of the data forbids it, such as deleting a bundle that entries federate with.
    #[error("datastore-sql: {0}")]
    FailedPrecondition(String),
    /// The agent is banned, and stays so until it is deleted.
    #[error("agent is banned")]
    Banned,
    /// Another process holds the database.
    #[error("datastore-sql: database {} is in use by another process{detail}; stop it, or give this server its own connection_string", path.display())]
    Locked {
        /// The database file.
        path: PathBuf,
        /// What is known of the holder, or empty.
        detail: String,
    },
    /// The file is not an intact SQLite database.
    #[error("datastore-sql: database {} is damaged ({detail}); stop the server, keep a copy of the file, and restore a backup or try `sqlite3 FILE .recover`", path.display())]
    Corrupt {
        /// The database file.
        path: PathBuf,
        /// What SQLite says.
        detail: String,
    },
    /// The file or its folder cannot be written.
    #[error("datastore-sql: database {} cannot be written ({detail}); check the owner and mode of the file and its folder, and the mount", path.display())]
    ReadOnly {
        /// The database file.
        path: PathBuf,
        /// What SQLite says.
        detail: String,
    },
    /// No room is left for the file.
    #[error("datastore-sql: no room left for database {} ({detail}); free space on its file system: nothing of the failed change was kept", path.display())]
    Full {
        /// The database file.
        path: PathBuf,
        /// What SQLite says.
        detail: String,
    },
    /// The file cannot be opened or made.
    #[error("datastore-sql: cannot open database {} ({detail}); check that its folder exists and may be written", path.display())]
    CannotOpen {
        /// The database file.
        path: PathBuf,
        /// What the system says.
        detail: String,
    },
    /// The schema is one this version must not touch.
    #[error("datastore-sql: {0}")]
    Schema(String),
    /// The settings do not make sense.
    #[error("datastore-sql: {0}")]
    Settings(String),
    /// A stored value cannot be read.
    #[error("datastore-sql: {what}: {cause}")]
    BadRow {
        /// Table and row.
        what: String,
        /// What is wrong with it.
        cause: String,
    },
    /// Reading or writing the file failed.
    #[error("datastore-sql: reading or writing database {} failed ({detail}); check the disk and its file system", path.display())]
    Io {
        /// The database file.
        path: PathBuf,
        /// What SQLite says.
        detail: String,
    },
    /// An entry names a trust domain whose bundle is not here.
    #[error("unable to find federated bundle {0:?}")]
    NoFederatedBundle(String),
    /// No connection became free in time.
    #[error("datastore-sql: no connection became free within {0} s")]
    Busy(u64),
    /// The database server cannot serve now. A change may have been stored or not when this ended its commit.
    #[error("datastore-sql: {what} {detail}; {advice}")]
    Unavailable {
        /// Which server.
        what: String,
        /// What it said or did.
        detail: String,
        /// What to do.
        advice: &'static str,
    },
    /// Others change the same rows at the same time; nothing of this change was kept, and it can be tried again.
    #[error("datastore-sql: {0}; others change the same rows, try again")]
    Contended(String),
    /// The database server refuses the statement, in its own words.
    #[error("datastore-sql: {0}")]
    Database(String),
    /// Anything else the driver said.
    #[error("datastore-sql: {0}")]
    Sql(#[source] sqlx::Error),
}

impl StoreError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound | Self::Missing(_) => ErrorKind::NotFound,
            Self::AlreadyExists(_) => ErrorKind::AlreadyExists,
            Self::Validation(_) | Self::InvalidArgument(_) | Self::Settings(_) => ErrorKind::InvalidArgument,
            Self::FailedPrecondition(_) | Self::Schema(_) => ErrorKind::FailedPrecondition,
            Self::Locked { .. } | Self::Busy(_) | Self::Unavailable { .. } | Self::Contended(_) => {
                ErrorKind::Unavailable
            }
            Self::Banned => ErrorKind::Denied,
            Self::Full { .. } => ErrorKind::Exhausted,
            Self::Corrupt { .. }
            | Self::ReadOnly { .. }
            | Self::CannotOpen { .. }
            | Self::BadRow { .. }
            | Self::Io { .. }
            | Self::NoFederatedBundle(_)
            | Self::Database(_)
            | Self::Sql(_) => ErrorKind::Internal,
        }
    }
}

impl StoreError {
    /// Whether the datastore cannot store now, whatever is asked of it: what can wait may be tried again later.
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Full { .. } | Self::ReadOnly { .. } | Self::Io { .. } | Self::Corrupt { .. } => true,
            Self::CannotOpen { .. } => true,
            error => error.kind() == ErrorKind::Unavailable,
        }
    }

    /// Whether the change that failed so may have been stored all the same: read again what it concerned.
    pub fn leaves_doubt(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Corrupt { .. } | Self::Sql(_) | Self::Unavailable { .. })
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::RowNotFound => Self::NotFound,
            other => Self::Sql(other),
        }
    }
}
