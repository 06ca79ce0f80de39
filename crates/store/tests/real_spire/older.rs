//! Databases as the datastores of SPIRE 1.13.6 (schema 23) and 1.14.7 (schema 24) left them, dumped in `data/older`:
//! brought forward here, no row of any table has changed, and SPIRE 1.15.3 finds what it would have made of them itself.

use super::*;

on_every_database!(what_spire_1_13_left_is_brought_forward, what_spire_1_14_left_is_brought_forward);

/// On SQLite, PostgreSQL, MySQL.
type Dumps = [&'static str; 3];

const OF_1_13: Dumps = [
    include_str!("../data/older/spire-1.13.6-sqlite3.sql"),
    include_str!("../data/older/spire-1.13.6-postgres.sql"),
    include_str!("../data/older/spire-1.13.6-mysql.sql"),
];
const OF_1_14: Dumps = [
    include_str!("../data/older/spire-1.14.7-sqlite3.sql"),
    include_str!("../data/older/spire-1.14.7-postgres.sql"),
    include_str!("../data/older/spire-1.14.7-mysql.sql"),
];

async fn what_spire_1_13_left_is_brought_forward(lab: Lab) {
    brought_forward(lab, OF_1_13, "23\t1.13.6").await;
}

async fn what_spire_1_14_left_is_brought_forward(lab: Lab) {
    brought_forward(lab, OF_1_14, "24\t1.14.7").await;
}

async fn brought_forward(lab: Lab, dumps: Dumps, stated: &str) {
    let Some(bin) = spire() else { return };
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let Some(spire) = Spire::new(lab, bin.clone(), ours.path()) else { return };
    load(&spire, lab, dumps).await;
    assert_eq!(version(&spire).await, stated);
    let tables = tables(&spire).await;
    assert_eq!(tables.len(), 12, "all but `migrations`: {tables:?}");
    let before = rows(&spire, &tables).await;
    assert!(before.iter().all(|rows| !rows.is_empty()), "every table has rows: {before:?}");

    let store = Store::open(spire.database(), Arc::new(SystemClock)).await.unwrap();
    let (entries, agents) = (our_entries(&store).await, our_agents(&store).await);
    store.close().await;
    drop(store);
    assert_eq!(rows(&spire, &tables).await, before);
    assert_eq!(version(&spire).await, "25\t1.15.3");
    assert_eq!((entries.len(), agents.len()), (6, 5), "{entries:?} {agents:?}");

    // The other copy is brought forward by SPIRE.
    let Some(reference) = Spire::new(lab, bin, theirs.path()) else { return };
    load(&reference, lab, dumps).await;
    let server = reference.start();
    let expected = listed(&reference);
    server.stop();
    assert_eq!(schema(&spire).await, schema(&reference).await);
    let server = spire.start();
    assert_eq!((spire.entries(), spire.agents()), (entries, agents));
    assert_eq!(listed(&spire), expected);
    server.stop();
}

/// All that SPIRE tells of its data; the bundle of its own trust domain is new after each start.
fn listed(spire: &Spire) -> [Vec<String>; 4] {
    let bundle =
        |name: &str| spire.must(&["bundle", "list", "-format", "spiffe", "-id", &format!("spiffe://{name}.test")]);
    let relationships = spire.json(&["federation", "list"], "federation_relationships");
    [
        spire.entries(),
        spire.agents(),
        ["web", "spiffe", "empty"].map(bundle).to_vec(),
        sorted(relationships.iter().map(Value::to_string).collect()),
    ]
}

async fn load(spire: &Spire, lab: Lab, dumps: Dumps) {
    let [sqlite, postgres, mysql] = dumps;
    match (&spire.database, lab) {
        (Some(database), Lab::Postgres) => {
            // Every table belongs to whom SPIRE and we log in as.
            database.sql(&format!("SET ROLE {}; {postgres}", testkit::database::USER));
        }
        (Some(database), _) => drop(database.sql(mysql)),
        (None, _) => {
            let pool = sqlite_pool(spire, true).await;
            sqlx::raw_sql(sqlite).execute(&pool).await.unwrap();
            pool.close().await;
        }
    }
}

async fn sqlite_pool(spire: &Spire, create: bool) -> sqlx::SqlitePool {
    let options = sqlx::sqlite::SqliteConnectOptions::new();
    let options = options.filename(spire.database().path.as_ref().unwrap()).create_if_missing(create);
    sqlx::pool::PoolOptions::new().max_connections(1).connect_with(options).await.unwrap()
}

/// A line per row, columns separated by tabs.
async fn lines(spire: &Spire, query: &str) -> Vec<String> {
    if let Some(database) = &spire.database {
        return database.sql(query).lines().map(str::to_owned).collect();
    }
    let pool = sqlite_pool(spire, false).await;
    let rows = sqlx::raw_sql(sqlx::AssertSqlSafe(query)).fetch_all(&pool).await.unwrap();
    pool.close().await;
    let text = |row: &sqlx::sqlite::SqliteRow| {
        let columns = 0..sqlx::Row::len(row);
        columns.map(|at| sqlx::Row::get_unchecked::<String, _>(row, at)).collect::<Vec<_>>().join("\t")
    };
    rows.iter().map(text).collect()
}

async fn version(spire: &Spire) -> String {
    lines(spire, "SELECT version, code_version FROM migrations").await.join("\n")
}

/// The tables but `migrations`, each with its columns, as they are before anything was done to them.
async fn tables(spire: &Spire) -> Vec<(String, Vec<String>)> {
    let query = match spire.database.as_ref().map(testkit::Database::kind) {
        None => {
            "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c \
             WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite%' ORDER BY m.name, c.cid"
        }
        Some(testkit::DatabaseKind::Postgres) => {
            "SELECT table_name, column_name FROM information_schema.columns \
             WHERE table_schema = current_schema() ORDER BY table_name, ordinal_position"
        }
        Some(testkit::DatabaseKind::MariaDb) => {
            "SELECT table_name, column_name FROM information_schema.columns \
             WHERE table_schema = DATABASE() ORDER BY table_name, ordinal_position"
        }
    };
    let mut tables: Vec<(String, Vec<String>)> = Vec::new();
    for line in lines(spire, query).await {
        let (table, column) = line.split_once('\t').unwrap();
        match tables.last_mut() {
            Some((name, columns)) if name == table => columns.push(column.to_owned()),
            _ => tables.push((table.to_owned(), vec![column.to_owned()])),
        }
    }
    tables.retain(|(table, _)| table != "migrations");
    tables
}

/// What these columns hold, NULL told from nothing and every byte to be seen.
async fn rows(spire: &Spire, tables: &[(String, Vec<String>)]) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for (table, columns) in tables {
        let shown = |column: &String| match spire.database.as_ref().map(testkit::Database::kind) {
            None => format!("quote(\"{column}\")"),
            Some(testkit::DatabaseKind::Postgres) => format!("coalesce(quote_literal(\"{column}\"), 'NULL')"),
            Some(testkit::DatabaseKind::MariaDb) => format!("hex(`{column}`)"),
        };
        let columns: Vec<String> = columns.iter().map(shown).collect();
        all.push(lines(spire, &format!("SELECT {} FROM {table} ORDER BY 1, 2", columns.join(", "))).await);
    }
    all
}
