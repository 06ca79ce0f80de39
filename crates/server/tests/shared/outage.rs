//! The database goes away and comes back, the same or another.

use crate::lab::*;
use finial_core::{Bundle, ErrorKind, JwtAuthority};
use finial_server::nodes::{Renewal, Standing};
use testkit::{Postgres, PostgresPair};
use testkit::{Proxy, Weather};

#[tokio::test]
async fn writes_are_refused_at_once_and_all_heals() {
    for database in databases() {
        let proxy = Proxy::to(database.port());
        let server = Server::at(&database, database.dsn_at(proxy.port())).await;
        let other = Server::on(&database).await;
        server.run();
        server.nodes.attest(record(1, "1")).await.unwrap();
        server.entries.create(vec![entry(1, 1)]).await.unwrap();
        proxy.weather(Weather::Refusing);
        proxy.cut(None);
        until("the outage is noticed", async || server.link.is_away()).await;

        let refused = server.entries.create(vec![entry(2, 1)]).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
        assert_eq!(server.entries.authorized(&agent_id(1), &Default::default()).len(), 1);
        assert_eq!(server.nodes.judge(&agent_id(1), "1", &[]).await.unwrap(), Standing::Current);
        // An agent that is not known may have come at another server: that is no reason to send it away.
        let unsure = server.nodes.judge(&agent_id(2), "1", &[]).await.unwrap_err();
        assert_eq!(unsure.kind(), ErrorKind::Unavailable);
        // Others go on, and this one hears of it later.
        other.entries.create(vec![entry(3, 1)]).await.unwrap();
        other.nodes.attest(record(3, "1")).await.unwrap();

        proxy.weather(Weather::Fair);
        until("it answers again", async || !server.link.is_away()).await;
        server.entries.create(vec![entry(4, 1)]).await.unwrap();
        server.assert_current().await;
        assert_eq!(server.entries.count(), 3);
    }
}

#[tokio::test]
async fn agents_renew_while_the_database_is_away() {
    for database in databases() {
        let proxy = Proxy::to(database.port());
        let here = Server::at(&database, database.dsn_at(proxy.port())).await;
        let there = Server::at(&database, database.dsn_at(proxy.port())).await;
        here.nodes.attest(record(1, "1")).await.unwrap();
        here.nodes.attest(record(2, "1")).await.unwrap();
        here.nodes.ban(agent_id(2)).await.unwrap();
        assert!(here.follower.catch_up().await && there.follower.catch_up().await);
        here.run();
        there.run();
        proxy.weather(Weather::Refusing);
        proxy.cut(None);
        until("both notice", async || here.link.is_away() && there.link.is_away()).await;

        let id = agent_id(1);
        let renew = async |own: &str, serial: &str| {
            assert_eq!(here.nodes.renew(&id, own, serial.into(), 9).await.unwrap(), Renewal::DatastoreAway);
            let follows = here.nodes.serials(&id).unwrap();
            assert!(here.nodes.renew_without_datastore(&id, own, follows.clone(), serial, 9));
            assert_eq!(here.nodes.standing(&id, serial, &[]), Standing::Current);
            follows
        };
        let follows = renew("1", "2").await;
        // The other server does not know it; the certificate says whose it is.
        assert_eq!(there.nodes.standing(&id, "2", &[]), Standing::Superseded);
        assert_eq!(there.nodes.standing(&id, "2", &follows), Standing::Ahead);
        there.nodes.adopt(&id, "2", 9, &follows).await;
        assert_eq!(there.nodes.standing(&id, "2", &follows), Standing::Current);
        // The agent uses it, and renews once more.
        let follows = renew("2", "3").await;
        assert_eq!(follows, ["1".into(), "2".into()].into(), "one of them is recorded at any time");
        assert!(here.nodes.serials(&agent_id(2)).is_none(), "no banned agent renews");
        assert!(here.nodes.serials(&agent_id(9)).is_none(), "no unknown agent renews");

        proxy.weather(Weather::Fair);
        until("both hear it", async || !here.link.is_away() && !there.link.is_away()).await;
        until("all is stored", async || {
            let stored = here.store.fetch_node(&id).await.unwrap().unwrap();
            (stored.serial_number.as_str(), stored.new_serial_number.as_str()) == ("2", "3")
        })
        .await;
        for server in [&here, &there] {
            server.assert_current().await;
            assert_eq!(server.nodes.standing(&id, "3", &[]), Standing::Renewed);
            assert_eq!(server.nodes.standing(&id, "2", &[]), Standing::Current);
            assert_eq!(server.nodes.standing(&id, "1", &[]), Standing::Superseded);
        }
    }
}

/// Evicted and attested anew elsewhere: what was renewed meanwhile is void.
#[tokio::test]
async fn a_renewal_in_an_outage_does_not_outlive_the_agent() {
    let Some(database) = testkit::postgres() else { return };
    let proxy = Proxy::to(database.port());
    let here = Server::at(&database, database.dsn_at(proxy.port())).await;
    let there = Server::on(&database).await;
    here.nodes.attest(record(1, "1")).await.unwrap();
    here.run();
    proxy.weather(Weather::Refusing);
    proxy.cut(None);
    until("it notices", async || here.link.is_away()).await;
    let id = agent_id(1);
    let follows = here.nodes.serials(&id).unwrap();
    assert!(here.nodes.renew_without_datastore(&id, "1", follows.clone(), "2", 9));
    assert!(there.follower.catch_up().await);
    there.nodes.delete(id.clone()).await.unwrap();
    there.nodes.attest(record(1, "5")).await.unwrap();
    assert_eq!(there.nodes.standing(&id, "2", &follows), Standing::Superseded);
    proxy.weather(Weather::Fair);
    until("it hears", async || here.nodes.standing(&id, "5", &[]) == Standing::Current).await;
    assert_eq!(here.nodes.standing(&id, "2", &follows), Standing::Superseded);
    here.assert_current().await;
}

fn key(key_id: &str) -> JwtAuthority {
    JwtAuthority { key_id: key_id.into(), public_key: vec![1].into(), expires_at: 0, tainted: false }
}

#[tokio::test]
async fn a_standby_takes_over_and_what_was_lost_is_forgotten() {
    let Some(pair) = PostgresPair::start() else { return };
    let database = pair.primary.database();
    let proxy = Proxy::to(database.port());
    let server = Server::at(&database, database.dsn_at(proxy.port())).await;
    server.run();
    server.entries.create(vec![entry(1, 1)]).await.unwrap();
    let append = async |key_id: &str| {
        let jwt_authorities = vec![key(key_id)];
        let more = Bundle { jwt_authorities, ..Bundle::empty(trust_domain()) };
        let begun = server.bundles.history();
        server.bundles.publish_since(begun, server.store.append_bundle(&more).await.unwrap());
    };
    append("kept").await;
    server.nodes.attest(record(2, "1")).await.unwrap();
    pair.wait_caught_up();
    // The standby is down; what is written now dies with the primary.
    pair.standby.stop();
    server.entries.create(vec![entry(2, 1)]).await.unwrap();
    server.nodes.attest(record(1, "1")).await.unwrap();
    append("lost").await;
    let id = agent_id(2);
    assert_eq!(server.nodes.renew(&id, "1", "2".into(), 9).await.unwrap(), Renewal::Stored);
    server.nodes.promote(&id, "2").await.unwrap();
    assert_eq!(server.entries.count(), 2);
    pair.primary.kill();
    proxy.cut(None);
    pair.standby.start_again();
    until("the outage is noticed", async || server.link.is_away()).await;
    pair.standby.promote();
    proxy.set_targets(&[pair.standby.port()]);
    until("it answers again", async || !server.link.is_away()).await;
    // By the server itself, so that nothing is compared before.
    until("what the agent has is stored again", async || {
        let stored = server.store.fetch_node(&id).await.unwrap().unwrap();
        (stored.serial_number.as_str(), stored.new_serial_number.as_str()) == ("1", "2")
    })
    .await;
    server.assert_current().await;
    assert_eq!((server.entries.count(), server.nodes.count()), (1, 1), "memory is what the new primary holds");
    let own = server.bundles.own().unwrap();
    assert_eq!(own.bundle.jwt_authorities, [key("kept")], "an authority that nobody can verify is not known as good");
    assert_eq!(server.nodes.standing(&id, "2", &[]), Standing::Renewed);
    server.entries.create(vec![entry(3, 1)]).await.unwrap();
    server.assert_current().await;
}

#[tokio::test]
async fn a_restart_and_a_read_only_time_are_lived_through() {
    let Some(postgres) = Postgres::start() else { return };
    let database = postgres.database();
    let server = Server::on(&database).await;
    server.run();
    server.nodes.attest(record(1, "1")).await.unwrap();
    server.entries.create(vec![entry(1, 1)]).await.unwrap();
    postgres.crash();
    postgres.start_again();
    until("it answers again", async || server.follower.catch_up().await).await;
    server.entries.create(vec![entry(2, 1)]).await.unwrap();
    server.assert_current().await;

    postgres.read_only(true);
    until("writes are refused", async || {
        let refused = server.entries.create(vec![entry(3, 1)]).await;
        refused.is_err_and(|error| error.kind() == ErrorKind::Unavailable)
    })
    .await;
    assert_eq!(server.nodes.renew(&agent_id(1), "1", "2".into(), 9).await.unwrap(), Renewal::Doubtful);
    postgres.read_only(false);
    until("writes work again", async || server.entries.create(vec![entry(3, 1)]).await.is_ok()).await;
    server.assert_current().await;
    assert_eq!(server.entries.count(), 3);
}

/// What nobody waited for any more was on its way already, and the agent never gets it.
#[tokio::test]
async fn a_renewal_that_the_database_stores_too_late_makes_way_for_the_one_given_out() {
    let Some(database) = testkit::postgres() else { return };
    let proxy = Proxy::to(database.port());
    let server = Server::at(&database, database.dsn_at(proxy.port())).await;
    let beside = Server::on(&database).await;
    let id = agent_id(1);
    server.nodes.attest(record(1, "1")).await.unwrap();
    let stored = async |want: (&str, &str)| {
        let stored = beside.store.fetch_node(&id).await.unwrap().unwrap();
        (stored.serial_number.as_str(), stored.new_serial_number.as_str()) == want
    };
    proxy.weather(Weather::Hung);
    assert_eq!(server.nodes.renew(&id, "1", "2".into(), 9).await.unwrap(), Renewal::Doubtful);
    proxy.weather(Weather::Fair);
    until("it is stored all the same", async || stored(("1", "2")).await).await;
    let follows: Box<[Box<str>]> = ["1".into(), "2".into()].into();
    assert!(server.nodes.renew_without_datastore(&id, "1", follows, "3", 9));
    server.run();
    until("what the agent has is stored", async || stored(("1", "3")).await).await;
    server.assert_current().await;
}
