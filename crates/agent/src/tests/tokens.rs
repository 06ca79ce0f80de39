//! JWT-SVIDs: fetching and validating.

use super::fake::{wire_bundle, wire_entry};
use super::harness::{World, secure, until};
use finial_core::{KeyType, SpiffeId};
use finial_crypto::{JwtAuthoritySigner, JwtSvidClaims, PrivateKey};
use finial_proto::types::Entry;
use finial_proto::types::entry::AdditionalAttributes;
use finial_proto::workload::*;
use std::sync::Arc;
use tonic::Code;

fn ask(audience: &[&str], spiffe_id: &str) -> tonic::Request<JwtsvidRequest> {
    secure(JwtsvidRequest { audience: audience.iter().map(|a| (*a).into()).collect(), spiffe_id: spiffe_id.into() })
}

fn validate(audience: &str, svid: &str) -> tonic::Request<ValidateJwtsvidRequest> {
    secure(ValidateJwtsvidRequest { audience: audience.into(), svid: svid.into() })
}

#[tokio::test]
async fn tokens_are_fetched_once_and_validate() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    world.entry("e2", "/api", &["test:any"]);
    let agent = world.started().await;
    let mut client = agent.client();
    let first = client.fetch_jwtsvid(ask(&["a", "b"], "")).await.unwrap().into_inner();
    assert_eq!(
        first.svids.iter().map(|s| s.spiffe_id.as_str()).collect::<Vec<_>>(),
        ["spiffe://td/web", "spiffe://td/api"]
    );
    assert_eq!(world.server.calls("NewJWTSVID"), 2);
    let again = client.fetch_jwtsvid(ask(&["b", "a"], "")).await.unwrap().into_inner();
    assert_eq!(first, again);
    assert_eq!(world.server.calls("NewJWTSVID"), 2, "from the cache");
    let one = client.fetch_jwtsvid(ask(&["a", "b"], "spiffe://td/api")).await.unwrap().into_inner();
    assert_eq!(one.svids, first.svids[1..]);

    let valid = client.validate_jwtsvid(validate("b", &one.svids[0].svid)).await.unwrap().into_inner();
    assert_eq!(valid.spiffe_id, "spiffe://td/api");
    let fields = valid.claims.unwrap().fields;
    assert!(fields.contains_key("sub") && fields.contains_key("exp"));
    let wrong = client.validate_jwtsvid(validate("c", &one.svids[0].svid)).await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    assert!(wrong.message().starts_with("expected audience in [\"c\"]"), "{}", wrong.message());
    agent.stop().await;
}

/// The agent hears later that the entry was given another ID, which may be for other workloads.
#[tokio::test]
async fn a_token_of_an_id_that_the_entry_did_not_have_is_given_to_nobody() {
    let mut world = World::new().await;
    world.settings.sync_interval = std::time::Duration::from_secs(3600);
    for (id, include_jti) in [("e1", false), ("e2", true)] {
        let attributes = Some(AdditionalAttributes { jwt_svid_include_jti: include_jti, ..Default::default() });
        world.server.state().entries.insert(
            id.into(),
            Entry { additional_attributes: attributes, ..wire_entry(id, &format!("/{id}"), &["test:any"]) },
        );
    }
    let agent = world.started().await;
    for id in ["e1", "e2"] {
        let asked = format!("spiffe://td/{id}");
        assert!(agent.client().fetch_jwtsvid(ask(&["a"], &asked)).await.is_ok());
        let other = wire_entry(id, "/other", &["test:any"]);
        world.server.state().entries.get_mut(id).unwrap().spiffe_id = other.spiffe_id;
        // Two at once, of whom one joins the call of the other.
        let (mut one, mut two) = (agent.client(), agent.client());
        let (one, two) = tokio::join!(one.fetch_jwtsvid(ask(&["b"], &asked)), two.fetch_jwtsvid(ask(&["b"], &asked)));
        for error in [one.unwrap_err(), two.unwrap_err()] {
            assert_eq!(error.code(), Code::Unavailable);
            assert!(error.message().contains("the server issued it for spiffe://td/other"), "{}", error.message());
        }
    }
    agent.stop().await;
}

#[tokio::test]
async fn what_is_asked_is_checked() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut client = agent.client();
    let cases = [
        (ask(&[], ""), "audience must be specified"),
        (ask(&["a"], "web"), "invalid requested SPIFFE ID: scheme is missing or invalid"),
        (ask(&[&"x".repeat(9000)], ""), "audience must not be longer than 8192 bytes"),
    ];
    for (request, text) in cases {
        let error = client.fetch_jwtsvid(request).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (Code::InvalidArgument, text));
    }
    let other = client.fetch_jwtsvid(ask(&["a"], "spiffe://td/other")).await.unwrap_err();
    assert_eq!((other.code(), other.message()), (Code::PermissionDenied, "no identity issued"));
    for (request, text) in
        [(validate("", "x"), "audience must be specified"), (validate("a", ""), "svid must be specified")]
    {
        let error = client.validate_jwtsvid(request).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (Code::InvalidArgument, text));
    }
    assert_eq!(client.validate_jwtsvid(validate("a", "garbage")).await.unwrap_err().code(), Code::InvalidArgument);
    let wit = client.fetch_witsvid(secure(WitsvidRequest::default())).await.unwrap_err();
    assert_eq!((wit.code(), wit.message()), (Code::Unimplemented, "fetching WIT-SVIDs is not implemented"));
    agent.stop().await;
}

#[tokio::test]
async fn tokens_of_another_trust_domain_keep_only_the_allowed_claims() {
    let mut world = World::new().await;
    world.settings.allowed_foreign_jwt_claims = vec!["iat".into()];
    let key = JwtAuthoritySigner::new(Arc::new(PrivateKey::generate(KeyType::EcP256).unwrap()), "other-1");
    let other = crate::testing::TestCa::new("other");
    let mut entry = wire_entry("e1", "/web", &["test:any"]);
    entry.federates_with = vec!["other".into()];
    world.server.state().entries.insert("e1".into(), entry);
    world.server.state().federated.insert("other".into(), wire_bundle("other", &other.root, Some(&key)));
    let agent = world.started().await;
    let now = world.clock.now();
    let sub = SpiffeId::parse("spiffe://other/x").unwrap();
    let aud = ["me".to_owned()];
    let claims = JwtSvidClaims { sub: &sub, aud: &aud, exp: now + 60, iat: now, iss: Some("i"), jti: Some("j") };
    let token = key.sign(&claims).await.unwrap();
    let valid = agent.client().validate_jwtsvid(validate("me", &token)).await.unwrap().into_inner();
    let names: Vec<_> = valid.claims.unwrap().fields.into_keys().collect();
    assert_eq!(names, ["aud", "exp", "iat", "sub"]);
    agent.stop().await;
}

#[tokio::test]
async fn a_tainted_key_empties_the_cache_of_its_tokens() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut client = agent.client();
    client.fetch_jwtsvid(ask(&["a"], "")).await.unwrap();
    world.server.state().bundle.jwt_authorities[0].tainted = true;
    let syncs = world.server.calls("SyncAuthorizedEntries");
    until("the agent knows", || world.server.calls("SyncAuthorizedEntries") > syncs + 2).await;
    client.fetch_jwtsvid(ask(&["a"], "")).await.unwrap();
    assert_eq!(world.server.calls("NewJWTSVID"), 2);
    agent.stop().await;
}

#[tokio::test]
async fn a_failed_fetch_says_why() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    world.server.state().away = true;
    let error = agent.client().fetch_jwtsvid(ask(&["a"], "")).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(
        error.message(),
        "could not fetch JWT-SVID: failed to fetch JWT SVID: rpc error: code = Unavailable desc = away"
    );
    agent.stop().await;
}
