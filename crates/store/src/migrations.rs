//! Brings a database to the schema version of this code, or says why it must not.

use crate::schema::{CODE_VERSION, MIGRATIONS, OWN, VERSION, VERSION_MIN, own_tables, statements};
use crate::sql::{Conn, Dialect, Moment, POSTGRES_SETUP, Query};
use crate::store::transact;
use crate::{Store, StoreError};

/// The lock that servers of ours take while they look at the schema and change it (any number that others do not use).
const LOCK: &str = "7381099713271426916";
/// The lock of the one that makes our own index on PostgreSQL.
const OWN_LOCK: &str = "7381099713271426917";

/// How long the writers of a live deployment on MySQL may have to wait for our own index to begin. The next start tries
/// again.
const OWN_WAIT_SECS: u32 = 2;

/// Schema version and release, as a database states them.
struct Stated {
    version: i64,
    code: Release,
}

/// Major, minor, patch.
type Release = (u64, u64, u64);

/// Checks without writing, for a database that is open for reading only.
pub(crate) async fn check(conn: &mut Conn) -> Result<(), StoreError> {
    match stated(conn).await? {
        None => Err(StoreError::Schema("the database has no schema yet, and is open for reading only".into())),
        Some(found) if found.version == VERSION => Ok(()),
        Some(found) => compatible(&found, "auto-migration must be enabled for current DB"),
    }
}

/// Creates or migrates: in one transaction on SQLite and PostgreSQL; MySQL has none for schemas, so there each step can
/// be taken again. Of several servers that start at once, one does it.
pub(crate) async fn run(store: &Store, disabled: bool) -> Result<(), StoreError> {
    let now = store.now();
    let own_index = transact!(store, |tx| {
        lock(&mut tx).await?;
        let result = bring_up(&mut tx, disabled, now).await;
        unlock(&mut tx).await;
        result
    })?;
    if own_index && let Err(error) = own(store).await {
        tracing::warn!(subsystem_name = "sql", %error, "An index could not be made; creating entries is slower without it");
    }
    Ok(())
}

/// Whether our own index is to be looked for.
async fn bring_up(conn: &mut Conn, disabled: bool, now: Moment) -> Result<bool, StoreError> {
    let Some(found) = stated(conn).await? else { return create(conn, now).await };
    if found.version == VERSION {
        let (major, minor, patch) = found.code;
        tracing::debug!(
            subsystem_name = "sql",
            schema = VERSION,
            version_info = format_args!("{major}.{minor}.{patch}"),
            "Code and DB schema versions are the same. No migration needed"
        );
        if release(CODE_VERSION)? > found.code {
            note(conn, VERSION, now).await?;
        }
    } else if disabled {
        compatible(&found, "auto-migration must be enabled for current DB")?;
    } else if found.version > VERSION {
        compatible(&found, "incompatible DB schema and code version")?;
        tracing::warn!(
            subsystem_name = "sql",
            schema = found.version,
            "DB schema is ahead of code version, upgrading SPIRE Server is recommended"
        );
        return Ok(false);
    } else {
        migrate(conn, found.version, now).await?;
    }
    Ok(!disabled)
}

async fn lock(conn: &mut Conn) -> Result<(), StoreError> {
    match conn.dialect() {
        Dialect::Sqlite => Ok(()),
        Dialect::Postgres => conn.run(format!("SELECT pg_advisory_xact_lock({LOCK})")).await.map(drop),
        Dialect::MySql => {
            let got = conn.one(Query::new("SELECT GET_LOCK('finial.schema', 20)")).await?;
            match got.int(0)? {
                1 => Ok(()),
                _ => Err(StoreError::Schema("another server has been changing the schema for 20 s; try again".into())),
            }
        }
    }
}

/// PostgreSQL's lock ends with the transaction.
async fn unlock(conn: &mut Conn) {
    if conn.dialect() == Dialect::MySql
        && let Err(error) = conn.all(Query::new("SELECT RELEASE_LOCK('finial.schema')")).await
    {
        tracing::debug!(%error, "the schema lock ends with its connection");
    }
}

async fn create(conn: &mut Conn, now: Moment) -> Result<bool, StoreError> {
    tracing::info!(subsystem_name = "sql", "Initializing new database");
    let mut all = statements(conn.dialect());
    if conn.dialect() != Dialect::MySql {
        let (name, table, columns) = OWN;
        all.push(format!("CREATE INDEX {name} ON \"{table}\"({columns})"));
    }
    all.extend(own_tables(conn.dialect()));
    conn.run(all.join(";")).await?;
    let row = Query::new("INSERT INTO migrations (created_at, updated_at, version, code_version) VALUES (?, ?, ?, ?)");
    conn.execute(row.bind(now).bind(now).bind(VERSION).bind(CODE_VERSION)).await?;
    Ok(conn.dialect() == Dialect::MySql)
}

async fn migrate(conn: &mut Conn, from: i64, now: Moment) -> Result<(), StoreError> {
    if from < VERSION_MIN {
        return Err(StoreError::Schema(format!(
            "migrating from schema version {from} requires a previous SPIRE release; please follow the upgrade strategy at doc/upgrading.md"
        )));
    }
    tracing::info!(subsystem_name = "sql", "Running migrations...");
    for (step, (table, column, kind)) in (VERSION_MIN..).zip(MIGRATIONS) {
        if step < from {
            continue;
        }
        tracing::info!(subsystem_name = "sql", version_info = step, "Migrating version");
        let present = match conn.dialect() {
            Dialect::Sqlite => "SELECT COUNT(*) FROM pragma_table_info(?) WHERE name = ?",
            Dialect::Postgres => {
                "SELECT COUNT(*) FROM information_schema.columns WHERE table_schema = CURRENT_SCHEMA() AND table_name = ? AND column_name = ?"
            }
            Dialect::MySql => {
                "SELECT COUNT(*) FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = ? AND column_name = ?"
            }
        };
        let present = conn.one(Query::new(present).bind(table).bind(column)).await?;
        if present.int(0)? == 0 {
            let (quote, kind) = (if conn.dialect() == Dialect::MySql { '`' } else { '"' }, kind.sql(conn.dialect()));
            conn.run(format!("ALTER TABLE {quote}{table}{quote} ADD {quote}{column}{quote} {kind}")).await?;
        }
    }
    note(conn, VERSION, now).await?;
    tracing::info!(subsystem_name = "sql", "Done running migrations");
    Ok(())
}

/// Makes our own index unless it is there: asking for it would stop all writers even so.
async fn own(store: &Store) -> Result<(), StoreError> {
    let (name, table, columns) = OWN;
    let present = match store.dialect() {
        Dialect::Sqlite => "SELECT COUNT(*) FROM sqlite_master WHERE type = 'index' AND name = ?",
        Dialect::Postgres => return own_beside_writers(store).await,
        Dialect::MySql => {
            "SELECT COUNT(*) FROM information_schema.statistics WHERE table_schema = DATABASE() AND index_name = ?"
        }
    };
    let present = store.connection().await?.one(Query::once(present).bind(name)).await?;
    if present.int(0)? > 0 {
        return Ok(());
    }
    let create = format!("CREATE INDEX {name} ON {table}({columns})");
    if store.dialect() == Dialect::Sqlite {
        return transact!(store, |tx| tx.run(create.clone()).await.map(drop));
    }
    // MySQL makes it beside writers. But it begins by waiting until nobody is in the middle of a transaction with the
    // table (a backup may be, for hours), and whoever comes later waits behind it.
    let mut conn = store.connection().await?;
    conn.run(format!("SET SESSION lock_wait_timeout = {OWN_WAIT_SECS}")).await?;
    let made = conn.run(create).await.map(drop);
    conn.control("SET SESSION lock_wait_timeout = 20").await?;
    made
}

/// The same on PostgreSQL, where others go on writing meanwhile: outside of transactions, and by one server at a time, as
/// two such builds would wait for each other. Nobody waits for that lock: whoever waited would be what the build waits for.
/// The database has all the time it needs: what it leaves when it is stopped is an index that is not valid, which writers
/// maintain all the same, and which is made anew here at the next start. If this server gives up waiting or is killed, the
/// database goes on and finishes it.
async fn own_beside_writers(store: &Store) -> Result<(), StoreError> {
    let (name, table, columns) = OWN;
    let mut conn = store.connection().await?;
    if own_is_valid(&mut conn).await? == Some(true) {
        return Ok(());
    }
    let locked = conn.one(Query::once(format!("SELECT pg_try_advisory_lock({OWN_LOCK})"))).await?;
    if !locked.flag(0)? {
        return Ok(());
    }
    let result = async {
        conn.control("SET statement_timeout = 0; SET lock_timeout = 0").await?;
        match own_is_valid(&mut conn).await? {
            Some(true) => return Ok(()),
            Some(false) => drop(conn.run(format!("DROP INDEX CONCURRENTLY IF EXISTS {name}")).await?),
            None => {}
        }
        conn.run(format!("CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {table}({columns})")).await.map(drop)
    };
    let result = result.await;
    if result.as_ref().is_err_and(StoreError::leaves_doubt) {
        // It may still work on that: this connection is of no more use.
        conn.abandon("");
        return result;
    }
    let reset = conn.control(POSTGRES_SETUP).await;
    if let Err(error) = conn.all(Query::once(format!("SELECT pg_advisory_unlock({OWN_LOCK})"))).await {
        tracing::debug!(%error, "the index's lock ends with its connection");
    }
    result.and(reset)
}

/// Whether our own index can be used; `None` if there is none.
async fn own_is_valid(conn: &mut Conn) -> Result<Option<bool>, StoreError> {
    let valid = "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
        JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = CURRENT_SCHEMA() AND c.relname = ?";
    conn.optional(Query::once(valid).bind(OWN.0)).await?.map(|row| row.flag(0)).transpose()
}

async fn note(conn: &mut Conn, version: i64, now: Moment) -> Result<(), StoreError> {
    let query = Query::new("UPDATE migrations SET version = ?, code_version = ?, updated_at = ?");
    conn.execute(query.bind(version).bind(CODE_VERSION).bind(now)).await.map(drop)
}

async fn stated(conn: &mut Conn) -> Result<Option<Stated>, StoreError> {
    let table = conn.optional(Query::new(match conn.dialect() {
        Dialect::Sqlite => "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'migrations'",
        Dialect::Postgres => {
            "SELECT 1 FROM information_schema.tables WHERE table_schema = CURRENT_SCHEMA() AND table_name = 'migrations'"
        }
        Dialect::MySql => {
            "SELECT 1 FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = 'migrations'"
        }
    }));
    if table.await?.is_none() {
        return Ok(None);
    }
    let row = conn.optional(Query::new("SELECT version, code_version FROM migrations ORDER BY id LIMIT 1")).await?;
    match row {
        Some(row) => Ok(Some(Stated { version: row.int(0)?, code: release(row.str(1)?)? })),
        // the last step of making the tables was not reached
        None if conn.dialect() == Dialect::MySql => Ok(None),
        None => Ok(Some(Stated { version: 0, code: (0, 0, 0) })),
    }
}

/// The same major version, and minor versions at most one apart.
fn compatible(found: &Stated, otherwise: &str) -> Result<(), StoreError> {
    let ours = release(CODE_VERSION)?;
    if found.code.0 == ours.0 && found.code.1.abs_diff(ours.1) <= 1 {
        return Ok(());
    }
    Err(StoreError::Schema(otherwise.into()))
}

/// Parses `1.15.3`, `1.16.0-dev`; nothing at all is 0.0.0.
fn release(text: &str) -> Result<Release, StoreError> {
    if text.is_empty() {
        return Ok((0, 0, 0));
    }
    let core = text.split(['-', '+']).next().unwrap_or_default();
    let mut parts = core.split('.').map(str::parse::<u64>);
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch)), None) => Ok((major, minor, patch)),
        _ => Err(StoreError::Schema(format!(
            "error getting DB code version: unable to parse code version from DB: {text:?}"
        ))),
    }
}
