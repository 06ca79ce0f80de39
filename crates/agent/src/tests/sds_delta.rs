//! Envoy's incremental secret discovery, by the rules of its protocol.

use super::harness::{Running, World, next, within};
use super::sds::{TYPE_URL, words, world};
use finial_proto::envoy::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use std::collections::BTreeMap;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// A proxy's stream.
struct Proxy {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    answers: Streaming<DeltaDiscoveryResponse>,
}

fn texts(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

fn change(subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: TYPE_URL.to_owned(),
        resource_names_subscribe: texts(subscribe),
        resource_names_unsubscribe: texts(unsubscribe),
        ..Default::default()
    }
}

impl Proxy {
    async fn begin(agent: &Running, first: DeltaDiscoveryRequest) -> Self {
        let (requests, sent) = mpsc::channel(4);
        let answers = within(agent.sds().delta_secrets(ReceiverStream::new(sent))).await.unwrap().into_inner();
        requests.send(first).await.unwrap();
        Self { requests, answers }
    }

    async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let answer = next(&mut self.answers).await?;
        assert_eq!((&*answer.type_url, answer.nonce.len()), (TYPE_URL, 8));
        // They are acknowledged as Envoy does it.
        let response_nonce = answer.nonce.clone();
        self.send(DeltaDiscoveryRequest { type_url: TYPE_URL.to_owned(), response_nonce, ..Default::default() }).await;
        Ok(answer)
    }

    /// The next answer in words: what it has, then what it takes away.
    async fn told(&mut self) -> Vec<String> {
        let answer = self.next().await.unwrap();
        let there = answer.resources.iter().map(|r| {
            let words = words(r.resource.as_ref().unwrap());
            assert!(words.starts_with(&format!("{} = ", r.name)) && !r.version.is_empty(), "{r:?}");
            words
        });
        there.chain(answer.removed_resources.iter().map(|name| format!("no {name}"))).collect()
    }
}

async fn started() -> (World, Running) {
    let world = world().await;
    let agent = world.started().await;
    (world, agent)
}

#[tokio::test]
async fn only_what_changed_is_told() {
    let (world, agent) = started().await;
    let mut proxy = Proxy::begin(&agent, change(&["default", "ROOTCA"], &[])).await;
    assert_eq!(proxy.told().await, ["ROOTCA = td 1", "default = spiffe://td/one"]);
    proxy.send(change(&["spiffe://td/two"], &[])).await;
    assert_eq!(proxy.told().await, ["spiffe://td/two = spiffe://td/two"]);
    world.server.state().entries.get_mut("e1").unwrap().revision_number += 1;
    assert_eq!(proxy.told().await, ["default = spiffe://td/one"]);
    // Who asks again gets it again; what is no longer wanted is no longer told of.
    proxy.send(change(&["ROOTCA"], &["default"])).await;
    assert_eq!(proxy.told().await, ["ROOTCA = td 1"]);
    for entry in ["e1", "e2"] {
        world.server.state().entries.get_mut(entry).unwrap().revision_number += 1;
    }
    assert_eq!(proxy.told().await, ["spiffe://td/two = spiffe://td/two"]);
    agent.stop().await;
    assert_eq!(proxy.next().await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn what_is_not_there_is_said_to_be_gone_until_it_comes() {
    let (world, agent) = started().await;
    let mut proxy = Proxy::begin(&agent, change(&["default", "spiffe://td/three"], &[])).await;
    assert_eq!(proxy.told().await, ["default = spiffe://td/one", "no spiffe://td/three"]);
    world.entry("e3", "/three", &["test:any"]);
    assert_eq!(proxy.told().await, ["spiffe://td/three = spiffe://td/three"]);
    world.server.state().entries.remove("e3");
    assert_eq!(proxy.told().await, ["no spiffe://td/three"]);
    world.server.state().entries.clear();
    assert_eq!(proxy.told().await, ["no default"]);
    world.entry("e3", "/three", &["test:any"]);
    assert_eq!(proxy.told().await, ["spiffe://td/three = spiffe://td/three", "default = spiffe://td/three"]);
    agent.stop().await;
}

#[tokio::test]
async fn everything_is_what_no_name_or_a_star_asks_for() {
    let (world, agent) = started().await;
    let everything = [
        "spiffe://td = td 1",
        "spiffe://other = other 1",
        "spiffe://td/one = spiffe://td/one",
        "spiffe://td/two = spiffe://td/two",
    ];
    let mut proxy = Proxy::begin(&agent, change(&[], &[])).await;
    assert_eq!(proxy.told().await, everything);
    let mut star = Proxy::begin(&agent, change(&["*", "default"], &[])).await;
    assert_eq!(star.told().await.len(), 5);
    world.server.state().entries.remove("e2");
    assert_eq!(proxy.told().await, ["no spiffe://td/two"]);
    assert_eq!(star.told().await, ["no spiffe://td/two"]);
    // A name that is among everything is sent again, one that is not is gone.
    star.send(change(&["spiffe://td/one"], &[])).await;
    assert_eq!(star.told().await, ["spiffe://td/one = spiffe://td/one"]);
    star.send(change(&[], &["spiffe://td/one", "default"])).await;
    assert_eq!(star.told().await, ["spiffe://td/one = spiffe://td/one", "no default"]);
    star.send(change(&["ROOTCA"], &["*"])).await;
    assert_eq!(star.told().await, ["ROOTCA = td 1"]);
    world.entry("e4", "/four", &["test:any"]);
    assert_eq!(proxy.told().await, ["spiffe://td/four = spiffe://td/four"]);
    star.send(change(&["spiffe://td/four"], &[])).await;
    assert_eq!(star.told().await, ["spiffe://td/four = spiffe://td/four"], "and nothing before it");
    agent.stop().await;
}

#[tokio::test]
async fn a_proxy_that_comes_back_gets_what_it_has_not() {
    let (world, agent) = started().await;
    let mut proxy = Proxy::begin(&agent, change(&["default", "ROOTCA"], &[])).await;
    let first = proxy.next().await.unwrap();
    drop(proxy);
    world.server.state().entries.get_mut("e1").unwrap().revision_number += 1;
    let before = &first.resources[1];
    let mut renewed = Proxy::begin(&agent, change(&["default"], &[])).await;
    while renewed.next().await.unwrap().resources[0].version == before.version {}
    let versions: BTreeMap<String, String> =
        first.resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect();
    let again = DeltaDiscoveryRequest { initial_resource_versions: versions, ..change(&["default", "ROOTCA"], &[]) };
    let mut proxy = Proxy::begin(&agent, again).await;
    assert_eq!(proxy.told().await, ["default = spiffe://td/one"], "its roots it still has");
    // What it still has of everything, and is no more.
    let gone = [("spiffe://td/gone".to_owned(), "1".to_owned())].into();
    let mut proxy =
        Proxy::begin(&agent, DeltaDiscoveryRequest { initial_resource_versions: gone, ..change(&[], &[]) }).await;
    assert_eq!(proxy.told().await.last().unwrap(), "no spiffe://td/gone");
    agent.stop().await;
}

#[tokio::test]
async fn names_are_limited_all_together() {
    let (_world, agent) = started().await;
    let names: Vec<String> = (0..1200).map(|n| n.to_string()).collect();
    let mut parts = names.chunks(300).map(|part| change(&part.iter().map(String::as_str).collect::<Vec<_>>(), &[]));
    let mut proxy = Proxy::begin(&agent, parts.next().unwrap()).await;
    assert_eq!(proxy.told().await.len(), 300);
    for expected in [Some(300), Some(300), None] {
        proxy.send(parts.next().unwrap()).await;
        if expected.is_some() {
            assert_eq!(Some(proxy.told().await.len()), expected);
        }
    }
    let refused = proxy.next().await.unwrap_err();
    assert_eq!(refused.message(), "too many resource names: at most 1000, of 32768 bytes together");
    agent.stop().await;
}
