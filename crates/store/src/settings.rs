//! The `DataStore "sql"` block, and what it resolves to.

use crate::StoreError;
use crate::dsn::{mysql, postgres};
use crate::sql::{Connector, Dialect, Place};
use serde::Deserialize;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

/// Connections to a database server at most, unless the configuration says otherwise.
const OPEN_MAX: u32 = 100;
/// What takes the place of "no limit", which Go writes as 0.
const UNLIMITED: u32 = 10_000;

/// The `plugin_data` of `DataStore "sql"`, with SPIRE's keys.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub struct SqlConfig {
    /// `sqlite3`, `postgres` or `mysql`.
    #[serde(deserialize_with = "database_type")]
    pub database_type: String,
    /// SQLite: a path, or a `file:` URI. PostgreSQL: as libpq reads it. MySQL: as Go's driver reads it.
    pub connection_string: String,
    /// A read-only replica, in the same form; without meaning for SQLite.
    pub ro_connection_string: String,
    /// MySQL: PEM file of the roots that vouch for the server.
    pub root_ca_path: String,
    /// MySQL: PEM file of this client's certificate.
    pub client_cert_path: String,
    /// MySQL: PEM file of this client's key.
    pub client_key_path: String,
    /// No connection is used for longer (Go's form, `30m`); forever without it.
    pub conn_max_lifetime: Option<String>,
    /// At most this many connections; 0 or less for no limit, 100 without it.
    pub max_open_conns: Option<i64>,
    /// At most this many of them stay open unused; 100 without it.
    pub max_idle_conns: Option<i64>,
    /// Leave the schema as it is.
    pub disable_migration: bool,
}

impl std::fmt::Debug for SqlConfig {
    /// Without the connection strings, which may hold passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqlConfig").field("database_type", &self.database_type).finish_non_exhaustive()
    }
}

/// Either a text, or a block whose label is the type: `database_type "aws_postgres" { region = "…" }`.
fn database_type<'de, D: serde::Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Text(String),
        Block(std::collections::BTreeMap<String, serde::de::IgnoredAny>),
        Blocks(Vec<std::collections::BTreeMap<String, serde::de::IgnoredAny>>),
    }
    let mut blocks = match Form::deserialize(from)? {
        Form::Text(text) => return Ok(text),
        Form::Block(block) => vec![block],
        Form::Blocks(blocks) => blocks,
    };
    match (blocks.pop().and_then(|block| block.into_keys().next()), blocks.is_empty()) {
        (Some(name), true) => Ok(name),
        _ => Err(serde::de::Error::custom("exactly one database type is expected")),
    }
}

/// How to open the datastore.
#[derive(Clone, Debug)]
pub struct StoreSettings {
    /// The database file; `None` is a database in memory, gone with the process (tests), or a database server.
    pub path: Option<PathBuf>,
    /// Open without the right to write (`mode=ro`): every write fails. SQLite only.
    pub read_only: bool,
    /// At most this many reading connections. SQLite only.
    pub readers_max: u32,
    /// Leave the schema as it is.
    pub disable_migration: bool,
    /// A database server, in place of a file; made by [`SqlConfig::resolve`].
    pub server: Option<ServerSettings>,
}

/// How to reach a database server.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    pub(crate) primary: Connector,
    pub(crate) replica: Option<Connector>,
    pub(crate) open_max: u32,
    pub(crate) idle_max: u32,
    pub(crate) lifetime: Option<Duration>,
}

impl StoreSettings {
    /// The database file at `path` with the usual settings.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()), readers_max: 4, ..Self::memory() }
    }

    /// A database in memory.
    pub fn memory() -> Self {
        Self { path: None, read_only: false, readers_max: 1, disable_migration: false, server: None }
    }

    /// A database server gets this long to answer a statement, in place of 30 s.
    #[must_use]
    pub fn statement_max(mut self, most: Duration) -> Self {
        if let Some(server) = &mut self.server {
            let connectors = [Some(&mut server.primary), server.replica.as_mut()];
            connectors.into_iter().flatten().for_each(|connector| connector.set_statement_max(most));
        }
        self
    }

    /// Where the data is, for people: a path, or a server and its database. Never a password.
    pub fn place(&self) -> String {
        match (&self.server, &self.path) {
            (Some(server), _) => match server.primary.place() {
                Place::Server(name) => name.clone(),
                _ => String::new(),
            },
            (None, Some(path)) => path.display().to_string(),
            (None, None) => "memory".into(),
        }
    }
}

impl SqlConfig {
    /// Checks the keys, in SPIRE's words.
    pub fn resolve(&self) -> Result<StoreSettings, StoreError> {
        let refuse = |text: String| Err(StoreError::Settings(text));
        match self.database_type.as_str() {
            "" => return refuse("database_type must be set".into()),
            "sqlite3" | "postgres" | "mysql" => {}
            known @ ("aws_postgres" | "aws_mysql") => {
                return refuse(format!(
                    "database_type {known:?} is not supported yet; use \"postgres\" or \"mysql\" with a password"
                ));
            }
            other => return refuse(format!("unsupported database_type: {other}")),
        }
        if self.connection_string.is_empty() {
            return refuse("connection_string must be set".into());
        }
        let mut settings = match self.database_type.as_str() {
            "sqlite3" => self.file_settings()?,
            _ => StoreSettings { server: Some(self.server_settings()?), ..StoreSettings::memory() },
        };
        settings.disable_migration = self.disable_migration;
        Ok(settings)
    }

    fn file_settings(&self) -> Result<StoreSettings, StoreError> {
        if !self.ro_connection_string.is_empty() {
            tracing::warn!("Read-only connection is not applicable for sqlite3. Falling back to primary connection");
        }
        let (path, query) = split_uri(&self.connection_string)?;
        let mut settings = StoreSettings::file(path);
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
        if let Some(most) = self.max_open_conns.and_then(limit) {
            settings.readers_max = settings.readers_max.min(most);
        }
        Ok(settings)
    }

    fn server_settings(&self) -> Result<ServerSettings, StoreError> {
        let lifetime = match &self.conn_max_lifetime {
            None => None,
            Some(text) => {
                let nanos = finial_config::parse_go_duration(text)
                    .map_err(|e| StoreError::Settings(format!("failed to parse conn_max_lifetime {text:?}: {e}")))?;
                u64::try_from(nanos).ok().filter(|nanos| *nanos > 0).map(Duration::from_nanos)
            }
        };
        let replica = Some(&self.ro_connection_string).filter(|text| !text.is_empty());
        let replica = replica.map(|text| self.connector(text, "ro_connection_string: ")).transpose()?;
        let usable = |replica: &Connector| {
            let usable = replica.dialect() == Dialect::Postgres;
            if !usable {
                tracing::warn!(
                    "ro_connection_string has no effect on MySQL, which does not tell whether a replica is behind"
                );
            }
            usable
        };
        Ok(ServerSettings {
            primary: self.connector(&self.connection_string, "")?,
            replica: replica.filter(usable),
            open_max: self.max_open_conns.map_or(OPEN_MAX, |most| limit(most).unwrap_or(UNLIMITED)),
            idle_max: self.max_idle_conns.map_or(OPEN_MAX, |most| limit(most).unwrap_or(0)),
            lifetime,
        })
    }

    fn connector(&self, text: &str, which: &str) -> Result<Connector, StoreError> {
        let refuse = |text: String| StoreError::Settings(format!("{which}{text}"));
        if self.database_type == "postgres" {
            return Ok(Connector::postgres(postgres::parse(text).map_err(refuse)?));
        }
        let path = |text: &String| Some(PathBuf::from(text)).filter(|path| !path.as_os_str().is_empty());
        let files = mysql::TlsFiles {
            root: path(&self.root_ca_path),
            client: path(&self.client_cert_path).zip(path(&self.client_key_path)),
        };
        Ok(Connector::mysql(mysql::parse(text, &files).map_err(refuse)?))
    }
}

/// A number of connections; `None` for what Go takes for no limit, or for none.
fn limit(most: i64) -> Option<u32> {
    u32::try_from(most).ok().filter(|most| *most > 0)
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
    // What is no escape stays.
    let path = percent_encoding::percent_decode_str(path).collect();
    Ok((std::ffi::OsString::from_vec(path).into(), query))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(connection_string: &str) -> Result<(Option<PathBuf>, bool), String> {
        let config = SqlConfig {
            database_type: "sqlite3".into(),
            connection_string: connection_string.into(),
            ..SqlConfig::default()
        };
        config.resolve().map(|s| (s.path, s.read_only)).map_err(|e| e.to_string())
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
            ("file:a%+1%2", "a%+1%2"),
        ] {
            assert_eq!(resolved(text), Ok((Some(path.into()), false)), "{text}");
        }
        assert_eq!(resolved("file:x?mode=memory&cache=shared"), Ok((None, false)));
        assert_eq!(resolved(":memory:"), Ok((None, false)));
        assert_eq!(resolved("file:data.db?mode=ro"), Ok((Some("data.db".into()), true)));
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
    #[test]
    fn a_server_is_named_without_its_password() {
        let config = |kind: &str, text: &str| SqlConfig {
            database_type: kind.into(),
            connection_string: text.into(),
            ..SqlConfig::default()
        };
        for (kind, text, place) in [
            ("postgres", "host=h user=u password=hunter2 dbname=d", "PostgreSQL at h:5432 (database d)"),
            ("mysql", "u:hunter2@tcp(h)/d?parseTime=true", "MySQL at h:3306 (database d)"),
        ] {
            let settings = config(kind, text).resolve().unwrap();
            assert_eq!(settings.place(), place);
            assert!(!format!("{settings:?}").contains("hunter2"), "{settings:?}");
        }
        assert!(!format!("{:?}", config("mysql", "u:hunter2@/d")).contains("hunter2"));
        let aws: SqlConfig = serde_json::from_str(r#"{"database_type": [{"aws_postgres": {"region": "x"}}]}"#).unwrap();
        assert_eq!(aws.database_type, "aws_postgres");
        let wrong = SqlConfig { conn_max_lifetime: Some("soon".into()), ..config("mysql", "u@/d?parseTime=true") };
        let error = wrong.resolve().unwrap_err().to_string();
        assert!(error.starts_with("datastore-sql: failed to parse conn_max_lifetime \"soon\""), "{error}");
    }
}
