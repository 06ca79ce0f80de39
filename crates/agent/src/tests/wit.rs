//! WIT-SVIDs and their bundles.

use super::fake::wire_entry;
use super::harness::{Running, World, next, secure, until};
use finial_core::{Clock, SystemClock};
use finial_crypto::bundle::public_key_from_jwk;
use finial_crypto::{WitSvid, verify_wit_svid};
use finial_proto::workload::*;
use std::sync::Arc;
use tonic::{Code, Request, Status, Streaming};

async fn world() -> World {
    let mut world = World::new().await;
    world.settings.wit_svids_enabled = true;
    world.server.sign_wits("wit-1");
    world
}

async fn stream(agent: &Running, spiffe_id: &str) -> Result<Streaming<WitsvidResponse>, Status> {
    let request = secure(WitsvidRequest { spiffe_id: spiffe_id.into() });
    Ok(agent.client().fetch_witsvid(request).await?.into_inner())
}

/// The token as a validator sees it, whose holder has the key of the answer.
fn verified(svid: &Witsvid, jwks: &str) -> WitSvid {
    let mut bundle = finial_core::Bundle::empty(finial_core::TrustDomain::parse("td").unwrap());
    let jwks: serde_json::Value = serde_json::from_str(jwks).unwrap();
    for key in jwks["keys"].as_array().unwrap() {
        let public = public_key_from_jwk(key.as_object().unwrap()).unwrap();
        bundle.wit_authorities.push(finial_core::JwtAuthority {
            key_id: key["kid"].as_str().unwrap().into(),
            public_key: public.spki_der().clone(),
            expires_at: 0,
            tainted: false,
        });
    }
    let keys = Arc::new(finial_crypto::JwtKeys::wit_from_bundle(&bundle).unwrap());
    let seen = verify_wit_svid(&svid.wit_svid, |td| (td == "td").then_some(keys), SystemClock.now()).unwrap();
    let key: serde_json::Value = serde_json::from_str(&svid.wit_svid_key).unwrap();
    assert_eq!(&public_key_from_jwk(key.as_object().unwrap()).unwrap(), &seen.key);
    assert_eq!(key["alg"], seen.key_algorithm.jwa());
    assert!(key["d"].is_string());
    seen
}

#[tokio::test]
async fn without_the_flag_there_are_none() {
    let world = World::new().await;
    let agent = world.started().await;
    let mut client = agent.client();
    let refused = stream(&agent, "").await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unimplemented, "fetching WIT-SVIDs is not implemented"));
    let refused = client.fetch_wit_bundles(secure(WitBundlesRequest {})).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unimplemented, "fetching WIT bundles is not implemented"));
    let bare = client.fetch_witsvid(Request::new(WitsvidRequest::default())).await.unwrap_err();
    assert_eq!((bare.code(), bare.message()), (Code::InvalidArgument, "security header missing from request"));
    agent.stop().await;
}

#[tokio::test]
async fn tokens_come_with_their_keys_and_verify_by_the_bundle() {
    let world = world().await;
    world.entry("e1", "/web", &["test:any"]);
    let hinted = |id: &str, path: &str, created_at| {
        let entry = finial_proto::types::Entry { hint: "h".into(), created_at, ..wire_entry(id, path, &["test:any"]) };
        world.server.state().entries.insert(id.into(), entry);
    };
    hinted("e2", "/older", 1);
    hinted("e3", "/younger", 2);
    let agent = world.started().await;
    let mut bundles = agent.client().fetch_wit_bundles(secure(WitBundlesRequest {})).await.unwrap().into_inner();
    let bundles = next(&mut bundles).await.unwrap().bundles;
    let jwks = &bundles["spiffe://td"];
    assert!(!jwks.contains("\"use\""), "a plain set: {jwks}");
    let answer = next(&mut stream(&agent, "").await.unwrap()).await.unwrap();
    let ids: Vec<_> = answer.svids.iter().map(|s| (s.spiffe_id.as_str(), s.hint.as_str())).collect();
    assert_eq!(ids, [("spiffe://td/web", ""), ("spiffe://td/older", "h")], "one for each hint");
    for svid in &answer.svids {
        assert_eq!(verified(svid, jwks).id.as_str(), svid.spiffe_id);
    }
    assert_ne!(answer.svids[0].wit_svid_key, answer.svids[1].wit_svid_key);
    assert_eq!(world.server.calls("BatchNewWITSVID"), 1);
    let one = next(&mut stream(&agent, "spiffe://td/older").await.unwrap()).await.unwrap();
    assert_eq!(one.svids, answer.svids[1..], "from the cache");
    assert_eq!(world.server.calls("BatchNewWITSVID"), 1);
    for (id, code, text) in [
        ("spiffe://td/other", Code::PermissionDenied, "no identity issued"),
        ("web", Code::InvalidArgument, "invalid requested SPIFFE ID: scheme is missing or invalid"),
    ] {
        let error = stream(&agent, id).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (code, text));
    }
    agent.stop().await;
}

/// The next answer with two SVIDs: on a busy machine one of seconds may end before it is given.
async fn with_two(stream: &mut Streaming<WitsvidResponse>) -> WitsvidResponse {
    loop {
        let answer = next(stream).await.unwrap();
        if answer.svids.len() == 2 {
            return answer;
        }
    }
}

#[tokio::test]
async fn streams_see_renewals_new_entries_and_the_end_of_the_last() {
    let world = world().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let (mut one, mut two) = (stream(&agent, "").await.unwrap(), stream(&agent, "").await.unwrap());
    let first = next(&mut one).await.unwrap();
    assert_eq!(next(&mut two).await.unwrap(), first, "the same for both");
    // One of which the renewal is due in a moment, beside one of which it is not.
    world.server.state().wit_ttl = 2;
    world.entry("e2", "/api", &["test:any"]);
    let (second, third) = (with_two(&mut one).await, with_two(&mut one).await);
    assert_eq!([&second.svids[0], &third.svids[0]], [&first.svids[0]; 2]);
    assert_ne!(third.svids[1].wit_svid_key, second.svids[1].wit_svid_key, "renewed, with another key");
    world.server.state().entries.clear();
    let ended = loop {
        if let Err(status) = next(&mut one).await {
            break status;
        }
    };
    assert_eq!((ended.code(), ended.message()), (Code::PermissionDenied, "no identity issued"));
    agent.stop().await;
}

#[tokio::test]
async fn a_tainted_authority_is_left_at_once() {
    let world = world().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut stream = stream(&agent, "").await.unwrap();
    let first = next(&mut stream).await.unwrap();
    world.server.sign_wits("wit-2");
    world.server.state().bundle.wit_authorities[0].tainted = true;
    let second = next(&mut stream).await.unwrap();
    assert_ne!(first.svids[0].wit_svid, second.svids[0].wit_svid);
    agent.stop().await;
}

#[tokio::test]
async fn a_server_that_is_away_is_felt_only_by_who_has_none_yet() {
    let world = world().await;
    world.server.state().wit_ttl = 3600;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut held = stream(&agent, "").await.unwrap();
    let first = next(&mut held).await.unwrap();
    world.server.state().away = true;
    let again = next(&mut stream(&agent, "").await.unwrap()).await.unwrap();
    assert_eq!(again, first, "from the cache");
    world.server.state().away = false;
    world.entry("e2", "/api", &["test:any"]);
    world.server.state().wit = None;
    // The new entry gets none, the old one keeps what it has.
    let mut x509 = agent.x509().await.unwrap();
    while next(&mut x509).await.unwrap().svids.len() != 2 {}
    until("the server was asked", || world.server.calls("BatchNewWITSVID") > 1).await;
    let kept = next(&mut stream(&agent, "").await.unwrap()).await.unwrap();
    assert_eq!(kept, first);
    let none = stream(&agent, "spiffe://td/api").await.unwrap().message().await.unwrap_err();
    assert_eq!((none.code(), none.message()), (Code::Unimplemented, "WIT functionality is disabled"));
    agent.stop().await;
}

#[tokio::test]
async fn many_are_asked_for_in_pieces() {
    let world = world().await;
    for n in 0..150 {
        world.entry(&format!("e{n}"), &format!("/{n}"), &["test:any"]);
    }
    let agent = world.started().await;
    let answer = next(&mut stream(&agent, "").await.unwrap()).await.unwrap();
    assert_eq!((answer.svids.len(), world.server.calls("BatchNewWITSVID")), (150, 2));
    agent.stop().await;
}

#[tokio::test]
async fn a_restart_without_a_server_serves_the_same_tokens() {
    let mut world = world().await;
    super::outage::keep_sealed(&mut world);
    world.server.state().wit_ttl = 3600;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let first = next(&mut stream(&agent, "").await.unwrap()).await.unwrap();
    agent.stop().await;
    world.server.state().away = true;
    let agent = world.started().await;
    let mut held = stream(&agent, "").await.unwrap();
    assert_eq!(next(&mut held).await.unwrap(), first, "with the key");
    // Who had none waits for the server, and gets one as soon as it is back.
    world.server.state().away = false;
    world.entry("e2", "/api", &["test:any"]);
    let both = next(&mut held).await.unwrap();
    assert_eq!((both.svids.len(), &both.svids[0]), (2, &first.svids[0]));
    agent.stop().await;
}

/// An entry that was deleted and made again may have its old ID and revision.
#[tokio::test]
async fn an_entry_made_again_with_another_spiffe_id_has_its_token_at_once() {
    let world = world().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut held = stream(&agent, "").await.unwrap();
    assert_eq!(next(&mut held).await.unwrap().svids[0].spiffe_id, "spiffe://td/web");
    let again = finial_proto::types::Entry { created_at: 77, ..wire_entry("e1", "/api", &["test:any"]) };
    let calls = world.server.calls("BatchNewWITSVID");
    world.server.state().entries.insert("e1".into(), again);
    assert_eq!(next(&mut held).await.unwrap().svids[0].spiffe_id, "spiffe://td/api");
    assert_eq!(world.server.calls("BatchNewWITSVID"), calls + 1, "asked for once");
    agent.stop().await;
}
