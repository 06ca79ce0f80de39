//! What the store's tests share.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use finial_core::{AgentRecord, Bundle, Entry, EntryId, ManualClock, Selector, SelectorSet, SpiffeId, TrustDomain};
use finial_store::{Event, EventFeed, SqlConfig, Store, StoreSettings};
use std::sync::Arc;

pub const NOW: i64 = 1_795_385_010;

pub fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at(NOW))
}

/// Which database a test runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lab {
    Sqlite,
    Postgres,
    MySql,
}

/// A store on a database of its own, which goes with it.
pub struct Opened {
    pub store: Store,
    pub settings: StoreSettings,
    pub database: Option<testkit::Database>,
    pub clock: Arc<ManualClock>,
    folder: Option<tempfile::TempDir>,
}

impl std::ops::Deref for Opened {
    type Target = Store;
    fn deref(&self) -> &Store {
        &self.store
    }
}

impl Opened {
    /// The same database without the store, so that another may open it.
    pub async fn closed(self) -> Closed {
        self.store.close().await;
        Closed { settings: self.settings, database: self.database, _folder: self.folder }
    }

    /// Another server on the same database (not for SQLite).
    pub async fn another(&self) -> Store {
        Store::open(self.settings.clone(), self.clock.clone()).await.unwrap()
    }
}

/// A database that nobody has open.
pub struct Closed {
    pub settings: StoreSettings,
    pub database: Option<testkit::Database>,
    _folder: Option<tempfile::TempDir>,
}

impl Closed {
    /// Runs statements behind the store's back.
    pub async fn edit(&self, statements: &[&str]) {
        if let Some(database) = &self.database {
            statements.iter().for_each(|statement| drop(database.sql(statement)));
            return;
        }
        let pool = self.pool().await;
        for statement in statements {
            sqlx::query(sqlx::AssertSqlSafe(*statement)).execute(&pool).await.unwrap();
        }
        pool.close().await;
    }

    /// Schema version and release as the database states them.
    pub async fn stated(&self) -> (i64, String) {
        if let Some(database) = &self.database {
            let row = database.sql("SELECT version, code_version FROM migrations");
            let (version, code) = row.trim().split_once('\t').unwrap();
            return (version.parse().unwrap(), code.to_owned());
        }
        let pool = self.pool().await;
        let row = sqlx::query_as("SELECT version, code_version FROM migrations").fetch_one(&pool).await.unwrap();
        pool.close().await;
        row
    }

    async fn pool(&self) -> sqlx::SqlitePool {
        let path = self.settings.path.as_ref().unwrap();
        sqlx::SqlitePool::connect_with(sqlx::sqlite::SqliteConnectOptions::new().filename(path)).await.unwrap()
    }
}

/// A connection string, resolved.
pub fn settings(kind: &str, dsn: &str) -> StoreSettings {
    let config = SqlConfig { database_type: kind.into(), connection_string: dsn.into(), ..SqlConfig::default() };
    config.resolve().unwrap()
}

impl Lab {
    /// What the database says of a second row with this value of a unique column, in SPIRE's words.
    pub fn duplicate(self, table: &str, column: &str, value: &str) -> String {
        match self {
            Self::Sqlite => format!("datastore-sql: UNIQUE constraint failed: {table}.{column}"),
            Self::Postgres => format!(
                "datastore-sql: pq: duplicate key value violates unique constraint \"uix_{table}_{column}\" (23505)"
            ),
            Self::MySql => {
                format!("datastore-sql: Error 1062 (23000): Duplicate entry '{value}' for key 'uix_{table}_{column}'")
            }
        }
    }

    /// `None` where the database is not installed, which testkit says.
    pub async fn open(self) -> Option<Opened> {
        let (settings, database, folder) = match self {
            Self::Sqlite => {
                let folder = tempfile::tempdir().unwrap();
                (StoreSettings::file(folder.path().join("db")), None, Some(folder))
            }
            Self::Postgres => {
                let database = testkit::postgres()?;
                (settings("postgres", &database.dsn()), Some(database), None)
            }
            Self::MySql => {
                let database = testkit::mariadb()?;
                (settings("mysql", &database.dsn()), Some(database), None)
            }
        };
        let clock = clock();
        let store = Store::open(settings.clone(), clock.clone()).await.unwrap();
        Some(Opened { store, settings, database, clock, folder })
    }
}

/// Makes three tests of each function, which takes a [`Lab`].
#[macro_export]
macro_rules! on_every_database {
    ($($name:ident),* $(,)?) => {
        $(mod $name {
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn sqlite() {
                super::$name(super::Lab::Sqlite).await;
            }
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn postgresql() {
                super::$name(super::Lab::Postgres).await;
            }
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn mariadb() {
                super::$name(super::Lab::MySql).await;
            }
        })*
    };
}

pub async fn memory() -> Store {
    Store::open(StoreSettings::memory(), clock()).await.unwrap()
}

pub fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org{path}")).unwrap()
}

pub fn td(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

pub fn selectors(texts: &[&str]) -> SelectorSet {
    texts.iter().map(|text| Selector::parse(text).unwrap()).collect()
}

/// An entry with nothing but the needful.
pub fn entry(entry_id: &str, path: &str, parent: &str, with: &[&str]) -> Entry {
    Entry { created_at: NOW, ..Entry::new(EntryId::parse(entry_id).unwrap(), id(path), id(parent), selectors(with)) }
}

/// An entry with every field set, which federates with `federates`.
pub fn full_entry(entry_id: &str, federates: &[&str]) -> Entry {
    Entry {
        x509_svid_ttl: 60,
        jwt_svid_ttl: 30,
        federates_with: federates.iter().map(|name| td(name)).collect(),
        admin: true,
        downstream: true,
        expires_at: 2_000_000_000,
        dns_names: vec!["z.example".into(), "a.example".into()],
        hint: "a hint".into(),
        disable_x509_svid_prefetch: true,
        jwt_svid_include_jti: true,
        ..entry(entry_id, "/full", "/spire/agent/x", &["unix:uid:1000", "unix:gid:1"])
    }
}

pub fn agent(path: &str) -> AgentRecord {
    AgentRecord {
        id: id(path),
        attestation_type: "x509pop".into(),
        serial_number: "12345".into(),
        expires_at: NOW + 3600,
        new_serial_number: String::new(),
        new_expires_at: 0,
        can_reattest: true,
        agent_version: "1.15.3".into(),
        selectors: selectors(&["x509pop:subject:cn:a", "x509pop:ca:fingerprint:b"]),
    }
}

pub fn bundle(name: &str) -> Bundle {
    Bundle::empty(td(name))
}

/// All entries, as a server reads them.
pub async fn entries(store: &Store) -> Vec<Entry> {
    store.entries_after(0, u32::MAX).await.unwrap().0.into_iter().map(|(_, entry)| entry).collect()
}

/// The events so far.
pub async fn events(store: &Store, feed: EventFeed) -> Vec<Event> {
    store.feed(std::time::Duration::ZERO).events_after(feed, 0, 1000).await.unwrap()
}

/// Creates one entry that must succeed and be new.
pub async fn create(store: &Store, new: Entry) -> Entry {
    let created = store.create_entries(vec![new]).await.unwrap().pop().unwrap().unwrap();
    assert!(!created.existing);
    created.entry
}
