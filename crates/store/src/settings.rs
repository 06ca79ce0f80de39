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
        let refuse = |text: String| Err(StoreError::Settings(text));
        match self.database_type.as_str() {
            "" => return refuse("database_type must be set".into()),
            "sqlite3" => {}
            known @ ("postgres" | "mysql" | "aws_postgres" | "aws_mysql") => {
                return refuse(format!("database_type {known:?} is not supported yet; use \"sqlite3\""));
            }
            other => return refuse(format!("unsupported database_type: {other}")),
        }
        if self.connection_string.is_empty() {
            return refuse("connection_string must be set".into());
        }
        if !self.ro_connection_string.is_empty() {
            tracing::warn!("Read-only connection is not applicable for sqlite3. Falling back to primary connection");
        }
        let (path, query) = split_uri(&self.connection_string)?;
        let mut settings = StoreSettings { disable_migration: self.disable_migration, ..StoreSettings::file(path) };
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            match (key, value) {
                ("mode", "memory") => settings = StoreSettings::memory(),
                ("mode", "ro") => settings.read_only = true,
                ("mode", "rw" | "rwc") | ("cache" | "_foreign_keys" | "_journal_mode", _) => {}
                _ => tracing::warn!(key, value, "connection_string: parameter has no effect here"),
            }
        }
        if settings.path.as_deref() == Some(std::path::Path::new(":memory:")) {
            settings = StoreSettings::memory();
        }
        if let Some(most) = self.max_open_conns {
            settings.readers_max = settings.readers_max.min(most.max(1));
        }
        Ok(settings)
    }
}

/// Splits a path or `file:` URI into the path and the query.
fn split_uri(text: &str) -> Result<(PathBuf, &str), StoreError> {
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    let path = match path.split_once(':') {
        Some(("file", rest)) => match rest.strip_prefix("//") {
            // an authority may only be empty or this host
            Some(full) => full.strip_prefix("localhost").unwrap_or(full),
            None => rest,
        },
        Some((scheme, _)) if !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric()) => {
            return Err(StoreError::Settings(format!("unsupported scheme {scheme:?}")));
        }
        _ => path,
    };
    Ok((percent_decoded(path).into(), query))
}

/// Undoes `%20` and the like; what is not such an escape stays.
fn percent_decoded(text: &str) -> std::ffi::OsString {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let escape = (first == b'%').then(|| after.get(..2)).flatten();
        let value = escape.and_then(|h| std::str::from_utf8(h).ok()).and_then(|h| u8::from_str_radix(h, 16).ok());
        bytes.push(value.unwrap_or(first));
        rest = if value.is_some() { after.get(2..).unwrap_or_default() } else { after };
    }
    std::ffi::OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(connection_string: &str) -> Result<StoreSettings, String> {
        let config = SqlConfig {
            database_type: "sqlite3".into(),
            connection_string: connection_string.into(),
            ..SqlConfig::default()
        };
        config.resolve().map_err(|e| e.to_string())
    }

    #[test]
    fn reads_every_form_of_connection_string() {
        for (text, path) in [
            ("data.db", "data.db"),
            ("./data.db", "./data.db"),
            ("/home/fred/data.db", "/home/fred/data.db"),
            ("file:data.db", "data.db"),
            ("file:/home/fred/data.db", "/home/fred/data.db"),
            ("file:///home/fred/data.db", "/home/fred/data.db"),
            ("file://localhost/home/fred/data.db", "/home/fred/data.db"),
            ("file:///a%20b%zz?cache=shared", "/a b%zz"),
        ] {
            assert_eq!(resolved(text), Ok(StoreSettings::file(path)), "{text}");
        }
        assert_eq!(resolved("file:x?mode=memory&cache=shared"), Ok(StoreSettings::memory()));
        assert_eq!(resolved(":memory:"), Ok(StoreSettings::memory()));
        assert!(resolved("file:data.db?mode=ro").unwrap().read_only);
        assert_eq!(resolved("mysql://data.db").unwrap_err(), "datastore-sql: unsupported scheme \"mysql\"");
    }

    #[test]
    fn says_what_is_missing() {
        let mut config = SqlConfig::default();
        assert_eq!(config.resolve().unwrap_err().to_string(), "datastore-sql: database_type must be set");
        config.database_type = "sqlite3".into();
        assert_eq!(config.resolve().unwrap_err().to_string(), "datastore-sql: connection_string must be set");
        config.database_type = "oracle".into();
        assert_eq!(config.resolve().unwrap_err().to_string(), "datastore-sql: unsupported database_type: oracle");
    }
}
