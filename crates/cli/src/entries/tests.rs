//! Files are read as they are written, and a plan that was carried out leaves nothing to do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // all of it is test

use super::file::{Placed, canonical, identity, parse};
use super::plan::{Mode, Plan, changes, plan};
use super::{show, write};
use finial_hcl::Pos;
use finial_proto::types::{self, Entry, entry::AdditionalAttributes};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

fn problems(text: &str) -> Vec<String> {
    let error = parse(Path::new("e.yaml"), text).unwrap_err();
    let one = |p: &finial_config::Problem| {
        let hint = p.hint.as_deref().map(|hint| format!(" ({hint})")).unwrap_or_default();
        format!("{} {}{hint}", p.pos.unwrap(), p.message)
    };
    error.problems.iter().map(one).collect()
}

#[test]
fn everything_that_is_wrong_is_said_at_once_with_its_place() {
    let found = problems(
        "entries:\n  - spiffe_id: example.org/a\n    parent_id: spiffe://example.org/p\n    selectors: [unix, {type: a, value: b}, \"a:b\"]\n    x509_svid_tll: 5\n    jwt_svid_ttl: -1\n    admin: yes\n  - {}\n  - spiffe_id: spiffe://example.org/b\n    spiffe_id: spiffe://example.org/c\n    parent_id: spiffe://example.org/p\n    selectors: [\"a:b\"]\n    federates_with: [A]\n    dns_names: x\n",
    );
    for want in [
        "2:16 spiffe_id: scheme is missing or invalid: \"example.org/a\" (a SPIFFE ID looks like spiffe://your.domain/path)",
        "4:17 selector \"unix\" must be formatted as type:value",
        "4:44 selector a:b is given twice",
        "5:5 unknown field \"x509_svid_tll\" (did you mean x509_svid_ttl?)",
        "6:19 jwt_svid_ttl must be a number of seconds, from 0 (the default) to 2147483647",
        "7:12 admin must be true or false",
        "8:5 spiffe_id is missing (add spiffe_id: spiffe://your.domain/path)",
        "10:5 spiffe_id is given twice (keep one of them)",
        "13:22 federates_with: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores: \"A\"",
        "14:16 dns_names must be a list",
    ] {
        assert!(found.iter().any(|f| f == want), "{want}\n{found:#?}");
    }
    assert!(problems("a: 1")[0].contains("unknown field \"a\""));
    assert!(problems("{\"entries\": 1}")[0].starts_with("1:13 entries must be a list"));
    assert!(problems("{\"entries\": [")[0].contains("JSON"));
    assert!(problems("just text")[0].contains("expected a list of entries"));
    let twice = "- &a {entry_id: x, spiffe_id: spiffe://a/b, parent_id: spiffe://a/c, selectors: [\"a:b\"]}\n- *a\n";
    let found = problems(twice);
    assert!(found[0].contains("entry ID \"x\" is given twice, first at 1:"), "{found:#?}");
    assert!(found[1].contains("SPIFFE ID, parent and selectors are those of the entry at 1:"), "{found:#?}");
}

#[test]
fn what_entry_show_prints_can_be_read() {
    let text = r#"{"entries":[{"additional_attributes":{"disable_x509_svid_prefetch":true,"jwt_svid_include_jti":false},"admin":false,
        "created_at":"1700000000","dns_names":[],"downstream":false,"expires_at":"2000000000","federates_with":["b.test"],"hint":"",
        "id":"one","jwt_svid_ttl":0,"parent_id":{"path":"/p","trust_domain":"example.org"},"revision_number":"7",
        "selectors":[{"type":"unix","value":"uid:1"}],"spiffe_id":{"path":"/w","trust_domain":"example.org"},
        "store_svid":false,"x509_svid_ttl":60}],"next_page_token":""}"#;
    let read = parse(Path::new("e.json"), text).unwrap();
    let entry = &read[0].entry;
    assert_eq!((entry.id.as_str(), entry.expires_at, entry.x509_svid_ttl), ("one", 2_000_000_000, 60));
    assert_eq!(entry.spiffe_id.as_ref().unwrap().path, "/w");
    assert!(entry.additional_attributes.unwrap().disable_x509_svid_prefetch);
    assert_eq!(
        write::yaml(std::slice::from_ref(entry)),
        "entries:\n  - entry_id: one\n    spiffe_id: spiffe://example.org/w\n    parent_id: spiffe://example.org/p\n    selectors:\n      - type: unix\n        value: uid:1\n    x509_svid_ttl: 60\n    federates_with:\n      - b.test\n    entryExpiry: 2000000000\n    additional_attributes:\n      disable_x509_svid_prefetch: true\n"
    );
}

fn entry(id: &str, name: &str, selectors: &[&str]) -> Entry {
    let spiffe_id = |path: &str| Some(types::Spiffeid { trust_domain: "example.org".into(), path: path.into() });
    Entry {
        id: id.into(),
        spiffe_id: spiffe_id(&format!("/{name}")),
        parent_id: spiffe_id("/agent"),
        selectors: selectors.iter().map(|v| types::Selector { r#type: "s".into(), value: (*v).into() }).collect(),
        ..Entry::default()
    }
}

fn placed(entries: &[Entry]) -> Vec<Placed> {
    let place = |(n, entry): (usize, &Entry)| Placed {
        pos: Pos { line: u32::try_from(n).unwrap() + 1, column: 1 },
        entry: canonical(entry.clone()),
    };
    entries.iter().enumerate().map(place).collect()
}

#[test]
fn a_plan_reads_well() {
    let file = [
        Entry { x509_svid_ttl: 60, dns_names: vec!["a".into(), "b".into()], ..entry("", "changed", &["1", "3"]) },
        entry("", "new", &["1"]),
        entry("its-own", "same", &["1"]),
        Entry { x509_svid_ttl: 60, hint: "h".into(), ..entry("", "db", &["1"]) },
    ];
    let mut file = placed(&file);
    file[0].entry.id = "c".into();
    let there = vec![
        entry("c", "changed", &["1", "2"]),
        entry("s", "same", &["1"]),
        entry("o", "other", &["1"]),
        entry("d", "db", &["1"]),
    ];
    let plan_of = |mode| plan(&file, there.clone(), mode).unwrap();
    assert_eq!(
        show::pretty(&plan_of(Mode::Prune), false),
        "~ spiffe://example.org/changed  (entry c)
    x509_svid_ttl: default -> 60s
    + dns_names: a
    + dns_names: b
    - selectors: s:2
    + selectors: s:3
~ spiffe://example.org/db  (entry d)
    x509_svid_ttl: default -> 60s
    hint: \"\" -> \"h\"
+ spiffe://example.org/new
    parent_id: spiffe://example.org/agent
    selectors: s:1
- spiffe://example.org/other  (entry o)
    parent_id: spiffe://example.org/agent
    selectors: s:1
note: spiffe://example.org/same: the file calls it its-own, the server s; the server's ID stays
"
    );
    assert_eq!(show::summary(&plan_of(Mode::Prune)), "1 to create, 2 to change, 1 to delete; 1 unchanged");
    assert_eq!(
        show::summary(&plan_of(Mode::Match)),
        "1 to create, 2 to change, 0 to delete; 1 unchanged, 1 that are not in the file left alone"
    );
    assert_eq!(
        show::summary(&plan_of(Mode::Add)),
        "1 to create, 0 to change, 0 to delete; 1 unchanged, 2 that differ left as they are, 1 that are not in the file left alone"
    );
    let many: Vec<Entry> = (0..60).map(|n| entry("", &format!("n{n}"), &["1"])).collect();
    let many = plan(&placed(&many), Vec::new(), Mode::Add).unwrap();
    assert!(show::pretty(&many, false).ends_with("… and 10 more to create: -full shows all\n"));
    assert!(!show::pretty(&many, true).contains("more to create"));
}

#[test]
fn an_update_never_makes_a_double() {
    let file = placed(&[entry("a", "x", &["2"])]);
    let there = vec![entry("a", "x", &["1"]), entry("b", "x", &["2"])];
    let problems = plan(&file, there.clone(), Mode::Match).unwrap_err();
    assert!(problems[0].message.contains("entry a would get the SPIFFE ID, parent and selectors of entry b"));
    assert_eq!(plan(&file, there, Mode::Prune).unwrap().delete.len(), 1);
}

/// A few names and selectors, so that entries meet.
fn any_entry() -> impl Strategy<Value = Entry> {
    let ids = prop::sample::select(vec!["", "", "", "a", "b", "c", "d"]);
    let names = prop::sample::select(vec!["x", "y"]);
    let selectors = prop::collection::btree_set(prop::sample::select(vec!["1", "2"]), 1..3);
    (
        ids,
        names,
        selectors,
        0..3_i32,
        any::<[bool; 4]>(),
        prop::sample::select(vec!["", "h", "1e3", "no: #\u{feff}\"\\"]),
    )
        .prop_map(|(id, name, selectors, ttl, flags, hint)| {
            let [admin, downstream, attributes, listed] = flags;
            let many =
                |names: &[&str]| if listed { names.iter().map(|n| (*n).to_owned()).collect() } else { Vec::new() };
            Entry {
                x509_svid_ttl: ttl,
                admin,
                downstream,
                hint: hint.into(),
                dns_names: many(&["z.test", "a.test", "1.2"]),
                federates_with: many(&["b.test", "a.test"]),
                additional_attributes: Some(AdditionalAttributes {
                    jwt_svid_include_jti: attributes,
                    ..Default::default()
                }),
                revision_number: 7,
                ..entry(id, name, &selectors.into_iter().collect::<Vec<_>>())
            }
        })
}

/// Each ID once, and each identity at most once: what a file may hold.
fn any_file() -> impl Strategy<Value = Vec<Placed>> {
    prop::collection::vec(any_entry(), 0..6).prop_map(|entries| {
        let (mut ids, mut identities) = (BTreeSet::new(), BTreeSet::new());
        let mut entries = entries.into_iter().map(canonical).collect::<Vec<_>>();
        entries.retain(|e| (e.id.is_empty() || ids.insert(e.id.clone())) && identities.insert(identity(e)));
        placed(&entries)
    })
}

/// What a server may hold: IDs once, identities even twice.
fn any_server() -> impl Strategy<Value = Vec<Entry>> {
    prop::collection::vec(any_entry(), 0..7).prop_map(|mut entries| {
        for (n, entry) in entries.iter_mut().enumerate() {
            entry.id = ["a", "b", "c", "e", "f", "g", "h"][n].into();
        }
        entries
    })
}

/// The server after the plan, done as `apply` does it; refuses what a server would refuse.
fn done(server: Vec<Entry>, plan: &Plan) -> Vec<Entry> {
    let mut by_id: BTreeMap<String, Entry> = server.into_iter().map(|e| (e.id.clone(), canonical(e))).collect();
    for update in &plan.update {
        assert_eq!(update.before.id, update.after.id);
        assert!(by_id.insert(update.after.id.clone(), update.after.clone()).is_some(), "an update of nothing");
    }
    for (n, entry) in plan.create.iter().enumerate() {
        assert!(by_id.values().all(|e| identity(e) != identity(entry)), "similar entry already exists");
        let id = if entry.id.is_empty() { format!("made-{n}") } else { entry.id.clone() };
        assert!(by_id.insert(id.clone(), Entry { id, ..entry.clone() }).is_none(), "ID already exists");
    }
    for entry in &plan.delete {
        assert!(by_id.remove(&entry.id).is_some(), "a deletion of nothing");
    }
    by_id.into_values().collect()
}

fn bare(entry: &Entry) -> String {
    format!("{:?}", canonical(Entry { id: String::new(), ..entry.clone() }))
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(file in any_file()) {
        let entries: Vec<Entry> = file.iter().map(|p| p.entry.clone()).collect();
        for text in [write::yaml(&entries), write::json(&entries)] {
            let read = parse(Path::new("f"), &text).unwrap();
            prop_assert_eq!(&read.into_iter().map(|p| p.entry).collect::<Vec<_>>(), &entries, "{}", text);
        }
    }

    #[test]
    fn any_text_survives_yaml(text in any::<String>()) {
        let entry = Entry { hint: text, ..entry("a", "x", &["1"]) };
        let read = parse(Path::new("f"), &write::yaml(std::slice::from_ref(&entry))).unwrap();
        prop_assert_eq!(&read[0].entry.hint, &entry.hint);
    }

    #[test]
    fn no_file_makes_it_panic(text in "[ -~\n]{0,200}") {
        let _ = parse(Path::new("f"), &text);
        let _ = parse(Path::new("f"), &format!("{{\"entries\":[{text}"));
    }

    #[test]
    fn changes_are_there_exactly_if_entries_differ(before in any_entry(), after in any_entry()) {
        let (before, after) = (canonical(before), canonical(Entry { id: String::new(), ..after }));
        let update = super::plan::Update { before: Entry { id: String::new(), ..before }, after };
        prop_assert_eq!(changes(&update).is_empty(), update.before == update.after);
    }

    #[test]
    fn a_plan_leads_to_the_file_and_a_second_has_nothing_to_do(
        file in any_file(), server in any_server(), mode in prop::sample::select(vec![Mode::Add, Mode::Match, Mode::Prune])
    ) {
        let Ok(first) = plan(&file, server.clone(), mode) else {
            prop_assert_ne!(mode, Mode::Prune);
            return Ok(());
        };
        let after = done(server.clone(), &first);
        let second = plan(&file, after.clone(), mode).unwrap();
        prop_assert!(second.is_empty(), "{:?}", second);
        let there: Vec<String> = after.iter().map(bare).collect();
        let left: BTreeSet<String> = first.left.iter().map(|u| bare(&u.after)).collect();
        for Placed { entry, .. } in &file {
            prop_assert!(there.contains(&bare(entry)) || left.contains(&bare(entry)), "{:?} is missing", entry);
        }
        match mode {
            Mode::Prune => prop_assert_eq!(after.len(), file.len()),
            _ => prop_assert!(first.delete.is_empty() && after.len() >= server.len()),
        }
        if mode == Mode::Add {
            prop_assert!(first.update.is_empty());
            for before in server.into_iter().map(canonical) {
                prop_assert!(after.contains(&before), "{:?} was touched", before);
            }
        } else {
            prop_assert!(first.left.is_empty());
        }
    }
}
