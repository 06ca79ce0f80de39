//! How many calls the database gets: each costs two switches to its thread and back, which is most of what a small
//! transaction costs, and each commit is a write to the disk that somebody waits for. Alone in its process, as it listens
//! to the log of all of it.
#![allow(clippy::unwrap_used)]

mod common;

use common::{NOW, agent, clock, entry};
use finial_core::{AgentRecord, JoinToken};
use finial_store::{Store, StoreSettings};
use std::sync::{Arc, Mutex};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Notes the statements that sqlx logs.
#[derive(Clone, Default)]
struct Calls(Arc<Mutex<Vec<String>>>);

impl Visit for Calls {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "summary" {
            self.0.lock().unwrap().push(format!("{value:?}"));
        }
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

impl Subscriber for Calls {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "sqlx::query"
    }
    fn event(&self, event: &Event<'_>) {
        event.record(&mut self.clone());
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

impl Calls {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

#[tokio::test]
async fn what_is_done_often_takes_few_calls() {
    let calls = Calls::default();
    tracing::subscriber::set_global_default(calls.clone()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(StoreSettings::file(folder.path().join("db")), clock()).await.unwrap();
    let opened = calls.take();
    assert!(opened.len() <= 8, "a new database: {opened:#?}");
    assert_eq!(opened.iter().filter(|call| call.contains("COMMIT")).count(), 1, "{opened:#?}");

    let token = JoinToken { token: "t".into(), expires_at: NOW + 60 };
    store.create_join_token(&token, None).await.unwrap();
    assert_eq!(calls.take().len(), 3);
    assert!(store.fetch_join_token("t").await.unwrap().is_some());
    assert_eq!(calls.take().len(), 1);
    let record = AgentRecord { selectors: Default::default(), ..agent("/spire/agent/join_token/t") };
    store.attest_by_join_token("t", &record, NOW).await.unwrap().unwrap();
    let attested = calls.take();
    assert_eq!(attested.len(), 2, "an attestation: {attested:#?}");
    assert!(attested.first().is_some_and(|call| call.contains("BEGIN")), "one transaction: {attested:#?}");

    let entries = (0..50).map(|n| entry(&format!("e{n}"), &format!("/w{n}"), "/a", &["unix:uid:1"])).collect();
    store.create_entries(entries).await.unwrap();
    let created = calls.take();
    assert_eq!(created.iter().filter(|call| call.contains("COMMIT")).count(), 1, "{created:#?}");
}
