//! Orders to replace the authorities of all servers.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod common;
use common::*;
use finial_core::{Bundle, ErrorKind, JwtAuthority};
use finial_store::{Rotation, RotationNote, Store};

on_every_database!(
    one_order_of_a_kind_is_open,
    servers_tell_what_they_did,
    of_many_at_once_one_begins,
    without_the_tables_it_says_so_and_all_else_goes_on,
    marks_are_taken_away_again,
);

fn order(kind: i64) -> Rotation {
    Rotation { kind, goal: 1, revoke: true, asked_by: "me".into(), ..Rotation::default() }
}

async fn beat(store: &Store) -> String {
    store.feed(std::time::Duration::ZERO).beat(&[], &[]).await.unwrap().rotations
}

async fn one_order_of_a_kind_is_open(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let first = opened.begin_rotation(&order(1)).await.unwrap();
    assert_eq!(first, Rotation { id: first.id, created_at: NOW, ..order(1) });
    assert_eq!(opened.begin_rotation(&order(1)).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    let other = opened.begin_rotation(&order(2)).await.unwrap();
    assert_eq!(opened.newest_rotations().await.unwrap(), [first.clone(), other.clone()]);
    assert!(opened.advance_rotation(&first, 2, true).await.unwrap());
    assert!(!opened.advance_rotation(&first, 2, false).await.unwrap(), "another did it meanwhile");
    let first = Rotation { goal: 2, forced: true, ..first };
    assert!(opened.advance_rotation(&first, 3, false).await.unwrap());
    let first = Rotation { goal: 3, ..first };
    opened.close_rotation(&Rotation { goal: 2, ..first.clone() }).await.unwrap();
    assert_eq!(opened.newest_rotations().await.unwrap()[0], first, "forced once is forced, and it went on meanwhile");
    opened.close_rotation(&first).await.unwrap();
    assert_eq!(opened.newest_rotations().await.unwrap()[0], Rotation { done: true, ..first.clone() });
    assert!(opened.advance_rotation(&first, 5, false).await.unwrap(), "what came to its end can still be taken back");
    assert!(!opened.newest_rotations().await.unwrap()[0].done);
    opened.close_rotation(&Rotation { goal: 5, ..first.clone() }).await.unwrap();
    let note = |of: &Rotation| RotationNote { rotation_id: of.id, journal_id: 7, data: b"long".into(), seen_at: NOW };
    opened.set_rotation_note(&note(&first)).await.unwrap();
    opened.set_rotation_note(&note(&other)).await.unwrap();
    let next = opened.begin_rotation(&order(1)).await.unwrap();
    assert!(next.id > first.id);
    assert_eq!(opened.rotation_notes(first.id).await.unwrap(), [], "nobody asks for it any more");
    assert_eq!(opened.rotation_notes(other.id).await.unwrap(), [note(&other)]);
    assert_eq!(opened.newest_rotations().await.unwrap(), [next, other]);
}

async fn servers_tell_what_they_did(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let shared = opened.is_shared();
    let id = opened.begin_rotation(&order(1)).await.unwrap().id;
    let note =
        |journal_id, data: &[u8], seen_at| RotationNote { rotation_id: id, journal_id, data: data.to_vec(), seen_at };
    opened.set_rotation_note(&note(7, b"a", 0)).await.unwrap();
    opened.set_rotation_note(&note(8, b"b", 0)).await.unwrap();
    opened.clock.advance(5);
    opened.set_rotation_note(&note(7, b"", 0)).await.unwrap();
    assert_eq!(opened.rotation_notes(id).await.unwrap(), [note(7, b"", NOW + 5), note(8, b"b", NOW)]);
    assert_eq!(opened.rotation_beats(id).await.unwrap().len(), 2);
    opened.clock.advance(5);
    opened.touch_rotation_note(id, 8).await.unwrap();
    opened.touch_rotation_note(id, 9).await.unwrap();
    assert_eq!(opened.rotation_beats(id).await.unwrap(), [(7, NOW + 5), (8, NOW + 10)]);
    assert_eq!(opened.rotation_notes(id).await.unwrap(), [note(7, b"", NOW + 5), note(8, b"b", NOW + 10)]);
    assert_eq!(opened.rotation_notes(id + 1).await.unwrap(), []);
    // A late word of an order that a restored database does not have.
    opened.set_rotation_note(&RotationNote { rotation_id: id + 1, ..note(7, b"late", 0) }).await.unwrap();
    assert_eq!(opened.begin_rotation(&order(2)).await.unwrap().id, id + 1);
    assert_eq!(opened.rotation_notes(id + 1).await.unwrap(), []);
    let told = if shared { beat(&opened).await } else { String::new() };
    opened.set_rotation_note(&note(7, b"", 0)).await.unwrap();
    if shared {
        assert_eq!(beat(&opened).await, told, "notes wake nobody");
        let seen = Rotation { id, ..order(1) };
        opened.advance_rotation(&seen, 2, false).await.unwrap();
        assert_ne!(beat(&opened).await, told, "goals do");
    }
}

async fn of_many_at_once_one_begins(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let store = if opened.is_shared() { opened.another().await } else { opened.store.clone() };
        callers.spawn(async move { store.begin_rotation(&order(1)).await.map_err(|e| e.kind()) });
    }
    let results = callers.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert!(results.iter().all(|result| result.as_ref().err().is_none_or(|kind| *kind == ErrorKind::AlreadyExists)));
}

async fn without_the_tables_it_says_so_and_all_else_goes_on(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    if let Some(database) = opened.database.as_ref() {
        // behind the back of a server that runs
        beat(&opened).await;
        database.sql("DROP TABLE finial_rotations");
        assert_eq!(beat(&opened).await, "");
        assert!(!opened.has_rotations());
    }
    let closed = opened.closed().await;
    let drop = ["DROP TABLE IF EXISTS finial_rotations", "DROP TABLE IF EXISTS finial_rotation_servers"];
    closed.edit(&drop).await;
    let settings = finial_store::StoreSettings { disable_migration: true, ..closed.settings.clone() };
    let store = Store::open(settings, clock()).await.unwrap();
    let error = store.begin_rotation(&order(1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.to_string().contains("finial_rotations"), "{error}");
    assert_eq!(store.newest_rotations().await.unwrap(), []);
    store.create_bundle(&bundle("a.test")).await.unwrap();
    if closed.database.is_some() {
        // Another server makes them, and this one follows from then on, whether somebody orders something here or not.
        let another = Store::open(closed.settings.clone(), clock()).await.unwrap();
        another.begin_rotation(&order(1)).await.unwrap();
        assert!(!store.has_rotations());
        assert_ne!(beat(&store).await, "");
        assert_eq!(store.newest_rotations().await.unwrap().len(), 1);
        another.close().await;
    }
    store.close().await;
    drop_store(store);
    let store = Store::open(closed.settings.clone(), clock()).await.unwrap();
    store.begin_rotation(&order(2)).await.unwrap();
    store.close().await;
}

fn drop_store(_: Store) {}

async fn marks_are_taken_away_again(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let key = |id: &str, tainted| JwtAuthority {
        key_id: id.into(),
        public_key: [1u8].as_slice().into(),
        expires_at: 0,
        tainted,
    };
    let keys = |tainted| Bundle { jwt_authorities: vec![key("a", tainted), key("b", true)], ..bundle("a.test") };
    opened.create_bundle(&keys(true)).await.unwrap();
    for _ in 0..2 {
        opened.untaint_authorities(&td("a.test"), &["a".into(), "c".into()]).await.unwrap();
        let stored = opened.fetch_bundle(&td("a.test")).await.unwrap().unwrap();
        assert_eq!(stored, Bundle { sequence_number: 1, ..keys(false) }, "and the second time there is nothing to do");
    }
}
