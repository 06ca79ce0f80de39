//! Events that become visible in another order than that of their numbers.

use crate::lab::*;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{Connection, PgConnection};

/// A session of some other server's.
async fn session(database: &testkit::Database) -> PgConnection {
    let options = PgConnectOptions::new().host("127.0.0.1").port(database.port()).ssl_mode(PgSslMode::Disable);
    let options = options.username(testkit::database::USER).password(testkit::database::PASSWORD);
    PgConnection::connect_with(&options.database(database.name())).await.unwrap()
}

async fn run(session: &mut PgConnection, text: String) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(text)).execute(session).await.unwrap();
}

fn change(n: u32, hint: &str) -> String {
    format!("UPDATE registered_entries SET hint = '{hint}' WHERE entry_id = 'e{n}'")
}

fn event(n: u32) -> String {
    format!("INSERT INTO registered_entries_events (created_at, updated_at, entry_id) VALUES (now(), now(), 'e{n}')")
}

fn hint(server: &Server, n: u32) -> String {
    server.entries.get(&format!("e{n}")).unwrap().to_proto().hint
}

#[tokio::test]
async fn a_change_that_is_committed_late_is_seen() {
    let Some(database) = testkit::postgres() else { return };
    let server = Server::on(&database).await;
    server.entries.create(vec![entry(1, 1), entry(2, 1), entry(3, 1)]).await.unwrap();
    server.assert_current().await;
    let (mut one, mut two) = (session(&database).await, session(&database).await);
    // The second begins last and takes its number first: it is above what a snapshot calls its end.
    run(&mut one, format!("BEGIN; {}", change(1, "first"))).await;
    run(&mut two, format!("BEGIN; {}; {}", change(2, "second"), event(2))).await;
    run(&mut one, format!("{}; COMMIT", event(1))).await;
    for _ in 0..5 {
        assert!(server.follower.catch_up().await);
    }
    assert_eq!((hint(&server, 1), hint(&server, 2)), ("first".into(), String::new()));
    run(&mut two, "COMMIT".into()).await;
    server.assert_current().await;
    assert_eq!(hint(&server, 2), "second");
}

#[tokio::test]
async fn what_was_rolled_back_is_forgotten() {
    let Some(database) = testkit::postgres() else { return };
    let server = Server::on(&database).await;
    server.entries.create(vec![entry(1, 1)]).await.unwrap();
    let mut one = session(&database).await;
    for _ in 0..30 {
        run(&mut one, format!("BEGIN; {}; {}; ROLLBACK", change(1, "never"), event(1))).await;
        server.entries.create(vec![entry(7, 1)]).await.unwrap();
        server.entries.delete(vec![entry_id(7)]).await.unwrap();
    }
    for _ in 0..3 {
        server.assert_current().await;
    }
    // Nothing is left to watch: looks are single statements again.
    let before = database.statements();
    for _ in 0..10 {
        assert!(server.follower.catch_up().await);
    }
    assert!(database.statements() - before <= 11);
}

#[tokio::test]
async fn a_start_amid_open_transactions_misses_nothing() {
    let Some(database) = testkit::postgres() else { return };
    let first = Server::on(&database).await;
    first.entries.create((0..5).map(|n| entry(n, 1)).collect()).await.unwrap();
    let (mut one, mut two) = (session(&database).await, session(&database).await);
    run(&mut one, format!("BEGIN; {}; {}", change(1, "late"), event(1))).await;
    run(&mut two, format!("BEGIN; {}; {}; COMMIT", change(2, "early"), event(2))).await;
    let second = Server::on(&database).await;
    assert_eq!((hint(&second, 1), hint(&second, 2)), (String::new(), "early".into()));
    for _ in 0..3 {
        assert!(second.follower.catch_up().await);
    }
    run(&mut one, "COMMIT".into()).await;
    second.assert_current().await;
    assert_eq!(hint(&second, 1), "late");
    first.assert_current().await;
}

#[tokio::test]
async fn mariadb_sees_late_commits_too() {
    let Some(database) = testkit::mariadb() else { return };
    let server = Server::on(&database).await;
    server.entries.create(vec![entry(1, 1), entry(2, 1)]).await.unwrap();
    server.assert_current().await;
    let options = sqlx::mysql::MySqlConnectOptions::new().host("127.0.0.1").port(database.port());
    let options = options.username(testkit::database::USER).password(testkit::database::PASSWORD);
    let mut late = sqlx::MySqlConnection::connect_with(&options.database(database.name())).await.unwrap();
    let text = format!("BEGIN; {}; {}", change(1, "late"), event(1));
    sqlx::raw_sql(sqlx::AssertSqlSafe(text)).execute(&mut late).await.unwrap();
    database.sql(&format!("BEGIN; {}; {}; COMMIT", change(2, "early"), event(2)));
    for _ in 0..3 {
        assert!(server.follower.catch_up().await);
    }
    assert_eq!((hint(&server, 1), hint(&server, 2)), (String::new(), "early".into()));
    sqlx::raw_sql("COMMIT").execute(&mut late).await.unwrap();
    server.assert_current().await;
    assert_eq!(hint(&server, 1), "late");
}
