//! A proxy that believes what it is told, by either protocol, knows after each step exactly what there is for it.

use super::delta::Delta;
use super::names::{Roots, Secrets};
use super::stream::Protocol;
use super::world::World;
use crate::cache::testing::entry;
use crate::cache::{BundleForms, Bundles, Record, Snapshot, ViewState, WorkloadSvid};
use crate::testing::TestCa;
use bytes::Bytes;
use finial_config::SdsSettings;
use finial_core::{Bundle, KeyType, SpiffeId, TrustDomain, X509Authority};
use finial_crypto::PrivateKey;
use finial_proto::envoy::discovery::{DeltaDiscoveryRequest, DiscoveryRequest};
use finial_proto::envoy::tls::Secret;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};

/// What may be asked for: what is there sometimes, always, and never.
const NAMES: [&str; 7] = ["*", "default", "ROOTCA", "ALL", "spiffe://td/0", "spiffe://td/1", "spiffe://none"];

/// Two SVIDs for each of two identities.
static SVIDS: LazyLock<[[Arc<WorkloadSvid>; 2]; 2]> = LazyLock::new(|| {
    let ca = TestCa::new("td");
    [0, 1].map(|identity| {
        [0, 1].map(|_| {
            let id = SpiffeId::parse(&format!("spiffe://td/{identity}")).unwrap();
            let key = PrivateKey::generate(KeyType::EcP256).unwrap();
            let chain = Bytes::from(ca.issue(&id, key.public_key(), 3600).to_vec());
            Arc::new(WorkloadSvid {
                id,
                chain,
                key: key.pkcs8_der().expose().clone().into(),
                not_after: 0,
                rotate_at_ms: 0,
                revision_number: 0,
                created_at: 0,
                signed_by: Vec::new(),
                issued_in: 0,
            })
        })
    })
});

static BUNDLE: LazyLock<Arc<BundleForms>> = LazyLock::new(|| {
    let mut bundle = Bundle::empty(TrustDomain::parse("td").unwrap());
    bundle.x509_authorities = vec![X509Authority { der: TestCa::new("td").root, tainted: false }];
    Arc::new(BundleForms::new(bundle).unwrap())
});

/// A state with, of each identity, none or one of its SVIDs.
fn state(svids: [Option<usize>; 2]) -> ViewState {
    let record = |(at, which): (usize, &Option<usize>)| {
        let svid = SVIDS[at][(*which)?].clone();
        let entry = entry(&format!("e{at}"), svid.id.as_str(), &["unix:uid:1"]);
        Some(Record { svid: Some(svid), ..Record::new(Arc::new(entry)) })
    };
    let records: Vec<Record> = svids.iter().enumerate().filter_map(record).collect();
    let index = Arc::new(crate::cache::testing::index(&records));
    let bundles = Bundles { own: BUNDLE.clone(), federated: BTreeMap::new() };
    let selectors = crate::cache::testing::selectors(&["unix:uid:1"]);
    ViewState::new(&Snapshot { records: records.into(), index, bundles }, &selectors, false)
}

/// What goes by each of the names, with its version.
fn there(state: &ViewState, names: &BTreeSet<&str>) -> BTreeMap<String, String> {
    let settings = SdsSettings::default();
    let secrets = Secrets { state, settings: &settings, roots: Roots::Spiffe };
    let named = names.iter().map(|n| (*n).to_owned()).filter(|n| n != "*").collect();
    let mut all = secrets.present(&named).unwrap();
    if names.contains("*") {
        all.extend(secrets.all().unwrap());
    }
    all.into_iter().map(|r| (r.name, r.version)).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Subscribe(Vec<usize>),
    Unsubscribe(Vec<usize>),
    State([Option<usize>; 2]),
    /// The proxy comes back with what it has.
    Again,
}

fn step() -> impl Strategy<Value = Step> {
    let names = || proptest::collection::vec(0..NAMES.len(), 1..4);
    let svid = || proptest::option::of(0..2usize);
    prop_oneof![
        3 => names().prop_map(Step::Subscribe),
        3 => names().prop_map(Step::Unsubscribe),
        4 => (svid(), svid()).prop_map(|(a, b)| Step::State([a, b])),
        1 => Just(Step::Again),
    ]
}

fn texts(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

#[test]
fn names_that_were_given_up_count_until_the_next_answer() {
    let mut stream = Delta::new(Arc::new(SdsSettings::default()), 1);
    let names = |from: usize| (from..from + 600).map(|n| format!("spiffe://none/{n}")).collect::<Vec<_>>();
    let subscribe = |names| DeltaDiscoveryRequest { resource_names_subscribe: names, ..Default::default() };
    let unsubscribe = |names| DeltaDiscoveryRequest { resource_names_unsubscribe: names, ..Default::default() };
    stream.receive(subscribe(vec!["*".to_owned()])).unwrap();
    stream.receive(subscribe(names(0))).unwrap();
    stream.receive(unsubscribe(names(0))).unwrap();
    let error = stream.receive(subscribe(names(600))).unwrap_err();
    assert!(error.message().starts_with("too many resource names"), "{}", error.message());
    stream.answer(&state([Some(0), None]), true).unwrap().unwrap();
    stream.receive(subscribe(names(600))).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn changes_add_up_to_what_there_is(first in proptest::collection::vec(0..NAMES.len(), 1..4), steps in proptest::collection::vec(step(), 0..20)) {
        let settings = Arc::new(SdsSettings::default());
        let mut now = state([Some(0), None]);
        let mut wanted: BTreeSet<&str> = first.iter().map(|at| NAMES[*at]).collect();
        let mut has: BTreeMap<String, String> = BTreeMap::new();
        let mut none: BTreeSet<String> = BTreeSet::new();
        let mut stream = Delta::new(settings.clone(), 1);
        let begin = |wanted: &BTreeSet<&str>, has: &BTreeMap<String, String>| DeltaDiscoveryRequest {
            resource_names_subscribe: texts(&wanted.iter().copied().collect::<Vec<_>>()),
            initial_resource_versions: has.clone(),
            ..Default::default()
        };
        stream.receive(begin(&wanted, &has)).unwrap();
        for step in std::iter::once(None).chain(steps.into_iter().map(Some)) {
            let mut news = false;
            // Under a star, a name that is given up is said again, or said to be gone.
            let mut given_up: Vec<&str> = Vec::new();
            match step {
                None => {}
                Some(Step::Subscribe(names)) => {
                    let names: Vec<&str> = names.into_iter().map(|at| NAMES[at]).collect();
                    wanted.extend(&names);
                    // Who asks is owed an answer, whatever was said before.
                    names.iter().for_each(|name| { has.remove(*name); none.remove(*name); });
                    stream.receive(DeltaDiscoveryRequest { resource_names_subscribe: texts(&names), ..Default::default() }).unwrap();
                }
                Some(Step::Unsubscribe(names)) => {
                    let names: Vec<&str> = names.into_iter().map(|at| NAMES[at]).collect();
                    names.iter().for_each(|name| { wanted.remove(name); });
                    if wanted.is_empty() {
                        wanted.insert("ROOTCA");
                        has.remove("ROOTCA");
                        none.remove("ROOTCA");
                        let request = DeltaDiscoveryRequest { resource_names_subscribe: texts(&["ROOTCA"]), ..Default::default() };
                        stream.receive(request).unwrap();
                    }
                    let unsubscribe: Vec<&str> = names.into_iter().filter(|name| !wanted.contains(name)).collect();
                    given_up.clone_from(&unsubscribe);
                    stream.receive(DeltaDiscoveryRequest { resource_names_unsubscribe: texts(&unsubscribe), ..Default::default() }).unwrap();
                    if !wanted.contains("*") {
                        has.retain(|name, _| wanted.contains(name.as_str()));
                    }
                    none.retain(|name| wanted.contains(name.as_str()));
                }
                Some(Step::State(svids)) => {
                    now = state(svids);
                    news = true;
                }
                Some(Step::Again) => {
                    stream = Delta::new(settings.clone(), 1);
                    stream.receive(begin(&wanted, &has)).unwrap();
                    none.clear();
                }
            }
            if let Some(answer) = stream.answer(&now, news).unwrap() {
                let answer = answer.decode().unwrap();
                for resource in answer.resources {
                    let secret: Secret = resource.resource.unwrap().open().unwrap();
                    prop_assert_eq!(&secret.name, &resource.name);
                    let again = has.get(&resource.name) == Some(&resource.version);
                    prop_assert!(!again || given_up.contains(&resource.name.as_str()), "told twice");
                    none.remove(&resource.name);
                    has.insert(resource.name, resource.version);
                }
                for name in answer.removed_resources {
                    has.remove(&name);
                    if wanted.contains(name.as_str()) {
                        prop_assert!(none.insert(name), "told twice that there is none");
                    }
                }
            }
            prop_assert_eq!(stream.answer(&now, false).unwrap().is_none(), true, "all is said at once");
            prop_assert!(!stream.owes());
            let there = there(&now, &wanted);
            prop_assert_eq!(&has, &there);
            let missing: BTreeSet<String> = wanted.iter().filter(|n| **n != "*" && !there.contains_key(**n)).map(|n| (*n).to_owned()).collect();
            prop_assert_eq!(&none, &missing);
        }
    }

    #[test]
    fn the_whole_world_is_told_when_it_or_the_names_change(steps in proptest::collection::vec((proptest::collection::btree_set(1..NAMES.len(), 0..4), proptest::option::of(0..2usize)), 1..12)) {
        let mut stream = World::new(Arc::new(SdsSettings::default()), 1);
        let mut nonce = String::new();
        let (mut before, mut versions) = (None, Vec::new());
        for (names, svid) in steps {
            let now = state([Some(0), svid]);
            let names: BTreeSet<&str> = names.iter().map(|at| NAMES[*at]).filter(|n| *n != "spiffe://none").collect();
            let request = DiscoveryRequest {
                resource_names: texts(&names.iter().copied().collect::<Vec<_>>()),
                response_nonce: nonce.clone(),
                ..Default::default()
            };
            stream.receive(request).unwrap();
            let asked: BTreeSet<&str> = if names.is_empty() { ["*"].into() } else { names };
            let expected = there(&now, &asked);
            match stream.answer(&now, true) {
                Err(status) => {
                    prop_assert!(svid.is_none() && asked.contains("spiffe://td/1"), "{}", status);
                    break;
                }
                Ok(None) => prop_assert_eq!(before, Some((asked.clone(), expected.clone()))),
                Ok(Some(answer)) => {
                    prop_assert_ne!(before, Some((asked.clone(), expected.clone())), "told twice");
                    let answer = answer.decode().unwrap();
                    let told: BTreeSet<String> = answer.resources.iter().map(|any| any.open::<Secret>().unwrap().name).collect();
                    prop_assert_eq!(told, expected.keys().cloned().collect::<BTreeSet<_>>());
                    prop_assert_ne!(&answer.nonce, &nonce);
                    versions.push(answer.version_info.parse::<u64>().unwrap());
                    nonce = answer.nonce;
                }
            }
            before = Some((asked, expected));
            prop_assert!(versions.is_sorted() && versions.first() == Some(&1));
        }
    }
}
