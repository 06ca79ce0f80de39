//! Brings a database to the schema version of this code, or says why it must not.

use crate::StoreError;
use crate::schema::{CODE_VERSION, MIGRATIONS, OWN, VERSION, VERSION_MIN, statements};
use crate::sql::{Columns, Conn};
use crate::store::run as execute;

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

/// Creates or migrates; all of it in the caller's transaction.
pub(crate) async fn run(conn: &mut Conn, disabled: bool, now: &str) -> Result<(), StoreError> {
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
        return Ok(());
    } else if found.version > VERSION {
        compatible(&found, "incompatible DB schema and code version")?;
        tracing::warn!(
            subsystem_name = "sql",
            schema = found.version,
            "DB schema is ahead of code version, upgrading SPIRE Server is recommended"
        );
        return Ok(());
    } else {
        migrate(conn, found.version, now).await?;
    }
    own(conn).await
}

async fn create(conn: &mut Conn, now: &str) -> Result<(), StoreError> {
    tracing::info!(subsystem_name = "sql", "Initializing new database");
    execute(conn, statements().join(";")).await?;
    sqlx::query("INSERT INTO migrations (created_at, updated_at, version, code_version) VALUES (?, ?, ?, ?)")
        .bind(now)
        .bind(now)
        .bind(VERSION)
        .bind(CODE_VERSION)
        .execute(&mut *conn)
        .await?;
    own(conn).await
}

async fn migrate(conn: &mut Conn, from: i64, now: &str) -> Result<(), StoreError> {
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
        let present = sqlx::query("SELECT COUNT(*) FROM pragma_table_info(?) WHERE name = ?")
            .bind(table)
            .bind(column)
            .fetch_one(&mut *conn)
            .await?;
        if Columns(&present).int(0)? == 0 {
            execute(conn, format!("ALTER TABLE \"{table}\" ADD \"{column}\" {kind}")).await?;
        }
    }
    note(conn, VERSION, now).await?;
    tracing::info!(subsystem_name = "sql", "Done running migrations");
    Ok(())
}

async fn own(conn: &mut Conn) -> Result<(), StoreError> {
    for statement in OWN {
        execute(conn, statement.to_owned()).await?;
    }
    Ok(())
}

async fn note(conn: &mut Conn, version: i64, now: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE migrations SET version = ?, code_version = ?, updated_at = ?")
        .bind(version)
        .bind(CODE_VERSION)
        .bind(now)
        .execute(conn)
        .await?;
    Ok(())
}

async fn stated(conn: &mut Conn) -> Result<Option<Stated>, StoreError> {
    let table = sqlx::query("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'migrations'")
        .fetch_optional(&mut *conn)
        .await?;
    if table.is_none() {
        return Ok(None);
    }
    let row =
        sqlx::query("SELECT version, code_version FROM migrations ORDER BY id LIMIT 1").fetch_optional(conn).await?;
    let Some(row) = row else { return Ok(Some(Stated { version: 0, code: (0, 0, 0) })) };
    let row = Columns(&row);
    Ok(Some(Stated { version: row.int(0)?, code: release(&row.text(1)?)? }))
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
