//! The databases and the proxy of testkit do what tests rely on.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;
use testkit::{Database, MariaDb, Postgres, PostgresPair, Proxy, Weather, eventually, mariadb, postgres};

fn both(test: impl Fn(&Database)) {
    for database in [postgres(), mariadb()].into_iter().flatten() {
        test(&database);
    }
}

#[test]
fn each_test_has_a_fresh_database() {
    both(|one| {
        one.sql("create table t (i int)");
        one.sql("insert into t values (1), (2)");
        assert_eq!(one.sql("select i from t order by i"), "1\n2\n");
        assert!(one.schema().to_lowercase().contains("create table"), "{}", one.schema());
    });
    both(|another| assert_ne!(another.try_sql("select i from t").code, 0));
}

#[test]
fn postgres_counts_statements() {
    let Some(database) = postgres() else { return };
    database.sql("select 1");
    assert_eq!(database.statements(), 1);
    assert_eq!(database.statements_by_text(), [("select $1".to_owned(), 1)].into());
}

#[test]
fn a_server_of_ones_own_comes_back_after_every_kind_of_end() {
    if let Some(server) = Postgres::start() {
        let database = server.database();
        database.sql("create table t (i int)");
        for end in [Postgres::stop, Postgres::crash, Postgres::kill] {
            end(&server);
            assert_ne!(database.try_sql("select 1").code, 0);
            server.start_again();
            database.sql("insert into t values (1)");
        }
        assert_eq!(database.sql("select count(*) from t"), "3\n");
    }
    if let Some(server) = MariaDb::start() {
        let database = server.database();
        database.sql("create table t (i int)");
        for end in [MariaDb::stop, MariaDb::kill] {
            end(&server);
            assert_ne!(database.try_sql("select 1").code, 0);
            server.start_again();
            database.sql("insert into t values (1)");
        }
        assert_eq!(database.sql("select count(*) from t"), "2\n");
    }
}

#[test]
fn a_standby_follows_and_is_promoted() {
    let Some(pair) = PostgresPair::start() else { return };
    let database = pair.primary.database();
    database.sql("create table t (i int)");
    pair.wait_caught_up();
    let standby = pair.standby.view(&database);
    assert!(standby.try_sql("insert into t values (1)").stderr.contains("read-only"));
    pair.primary.crash();
    pair.standby.promote();
    standby.sql("insert into t values (1)");
}

#[test]
fn writes_can_be_refused() {
    let Some(server) = Postgres::start() else { return };
    server.read_only(true); // which waits until it is so
    server.read_only(false);
    let Some(server) = MariaDb::start() else { return };
    let database = server.database();
    for on in [true, false] {
        server.read_only(on);
        assert_eq!(database.sql("select @@global.read_only").trim(), i32::from(on).to_string());
    }
}

/// A server that answers each connection's bytes with its name before them.
fn echo(name: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut stream, mut byte) = (stream, [0; 1]);
                while stream.read_exact(&mut byte).is_ok() && stream.write_all(name.as_bytes()).is_ok() {}
            });
        }
    });
    port
}

fn ask(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut answer = [0; 1];
    stream.write_all(b"?")?;
    stream.read_exact(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn dial(proxy: &Proxy) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", proxy.port()))?;
    stream.set_read_timeout(Some(Duration::from_millis(300)))?;
    Ok(stream)
}

#[test]
fn a_proxy_balances_cuts_refuses_and_hangs() {
    let (a, b) = (echo("a"), echo("b"));
    let proxy = Proxy::balancing(&[a, b]);
    let mut streams: Vec<TcpStream> = Vec::new();
    let mut answers = String::new();
    for _ in 0..4 {
        let mut stream = dial(&proxy).unwrap();
        answers += &ask(&mut stream).unwrap();
        streams.push(stream);
    }
    assert_eq!(answers, "abab");
    assert_eq!((proxy.open(None), proxy.open(Some(a)), proxy.accepted(b)), (4, 2, 2));

    assert_eq!(proxy.cut(Some(a)), 2);
    let kept: Vec<bool> = streams.iter_mut().map(|s| ask(s).is_ok()).collect();
    assert_eq!(kept, [false, true, false, true]);

    proxy.weather(Weather::Refusing);
    assert_eq!(dial(&proxy).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(ask(&mut streams[1]).is_ok(), "old ones go on");

    proxy.weather(Weather::Hung);
    let mut hung = dial(&proxy).unwrap();
    assert!(ask(&mut hung).is_err() && ask(&mut streams[1]).is_err());
    proxy.weather(Weather::Fair);
    hung.read_exact(&mut [0]).unwrap();

    proxy.set_targets(&[b]);
    assert_eq!(ask(&mut dial(&proxy).unwrap()).unwrap(), "b");
    drop((streams, hung));
    eventually("all are gone", || if proxy.open(None) == 0 { Ok(()) } else { Err("still open".into()) });
}

#[test]
fn a_target_that_is_down_is_passed_over() {
    let (up, down) = (echo("u"), testkit::free_port());
    let proxy = Proxy::balancing(&[down, up]);
    for _ in 0..3 {
        assert_eq!(ask(&mut dial(&proxy).unwrap()).unwrap(), "u");
    }
}
