//! The same lists on PostgreSQL and on MariaDB, with the real SPIRE on the same kind of database.

use super::{Answers, agents, attested, both, bundles, entries, stored};
use crate::answers_trust::odd_answers;
use testkit::{Database, Server, ServerOptions, datastore};

/// One server of each answers all lists, one after the other.
fn all_lists_on(database: fn() -> Option<Database>) {
    if database().is_none() {
        return;
    }
    both(async |flavor| {
        let database = database().expect("it was there");
        let on_it = Some(datastore(&database, database.port()));
        let server = Server::start(flavor, &ServerOptions { datastore: on_it, ..attested::options() });
        let mut answers = Answers::new();
        answers.extend(stored::asked(&server).await);
        answers.extend(entries::odd(&server).await);
        answers.extend(agents::odd(&server).await);
        answers.extend(odd_answers(&server).await);
        answers.extend(bundles::odd(&server).await);
        answers.extend(attested::asked(&server).await);
        answers
    });
}

#[test]
fn all_lists_on_postgresql() {
    all_lists_on(testkit::postgres);
}

#[test]
fn all_lists_on_mariadb() {
    all_lists_on(testkit::mariadb);
}
