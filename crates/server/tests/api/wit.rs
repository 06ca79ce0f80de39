//! WIT-SVIDs: minted, by entries, and their authorities in the bundle.

use crate::harness::*;
use bytes::Bytes;
use finial_core::KeyType;
use finial_crypto::{JwtKeys, PrivateKey, WitSvid, verify_wit_svid};
use finial_proto::convert::bundle_from_proto;
use finial_proto::server::bundle::GetBundleRequest;
use finial_proto::server::svid::*;
use finial_proto::types;
use std::sync::Arc;
use tonic::{Code, Status};

async fn server() -> Server {
    Server::with(|settings| settings.wit_svids_enabled = true).await
}

fn spki(key: &PrivateKey) -> Bytes {
    Bytes::copy_from_slice(key.public_key().spki_der())
}

/// The token as someone who knows the trust domain's bundle sees it.
async fn verified(server: &Server, token: &str) -> WitSvid {
    let bundle = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert_eq!(bundle.wit_authorities.len(), 1);
    let keys = Arc::new(JwtKeys::wit_from_bundle(&bundle_from_proto(&bundle).unwrap()).unwrap());
    verify_wit_svid(token, |name| (name == "example.org").then_some(keys), NOW).unwrap()
}

async fn mint(
    server: &Server,
    path: &str,
    public_key: Bytes,
    algorithm: &str,
    ttl: i32,
) -> Result<types::Witsvid, Status> {
    let request = MintWitsvidRequest { id: id(path), public_key, ttl, signing_algorithm: algorithm.into() };
    server.svids().mint_witsvid(request).await.map(|answer| answer.into_inner().svid.unwrap())
}

#[tokio::test]
async fn a_minted_wit_svid_binds_the_key_and_verifies_by_the_bundle() {
    let server = server().await;
    for (kind, algorithm) in [(KeyType::EcP256, "ES256"), (KeyType::EcP384, "ES384"), (KeyType::Rsa2048, "PS512")] {
        let key = PrivateKey::generate(kind).unwrap();
        let svid = mint(&server, "/w", spki(&key), algorithm, 90).await.unwrap();
        assert_eq!((svid.id, svid.issued_at, svid.expires_at), (id("/w"), NOW, NOW + 90));
        let seen = verified(&server, &svid.token).await;
        assert_eq!((seen.id.as_str(), seen.expires_at), ("spiffe://example.org/w", NOW + 90));
        assert_eq!((&seen.key, seen.key_algorithm.jwa()), (key.public_key(), algorithm));
    }
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    assert_eq!(mint(&server, "/w", spki(&key), "ES256", 0).await.unwrap().expires_at, NOW + 3600);
    let long = mint(&server, "/w", spki(&key), "ES256", i32::MAX).await.unwrap();
    assert_eq!(long.expires_at, NOW + 24 * 3600, "never longer than its authority");
}

#[tokio::test]
async fn what_cannot_be_minted_is_said_in_spires_words() {
    let server = server().await;
    let key = spki(&PrivateKey::generate(KeyType::EcP256).unwrap());
    let no_id = MintWitsvidRequest { public_key: key.clone(), ..Default::default() };
    let message = refused(server.svids().mint_witsvid(no_id).await, Code::InvalidArgument);
    assert_eq!(message, "invalid SPIFFE ID: request must specify SPIFFE ID");
    for (path, key, algorithm, want) in [
        (
            "/spire/server",
            key.clone(),
            "ES256",
            "invalid SPIFFE ID: \"spiffe://example.org/spire/server\" is not a workload",
        ),
        ("/w", Bytes::new(), "ES256", "invalid public key: "),
        ("/w", Bytes::from_static(b"garbage"), "ES256", "invalid public key: "),
        (
            "/w",
            key.clone(),
            "",
            "invalid signing algorithm or key type: unsupported signing algorithm for ec-p256 key: ",
        ),
        (
            "/w",
            key,
            "RS256",
            "invalid signing algorithm or key type: unsupported signing algorithm for ec-p256 key: RS256",
        ),
    ] {
        let message = refused(mint(&server, path, key, algorithm, 0).await, Code::InvalidArgument);
        assert!(message.starts_with(want), "{message}");
    }
}

#[tokio::test]
async fn an_agent_gets_the_wit_svids_of_its_entries() {
    let server = server().await;
    let agent = server.agent().await;
    let mut wanted = agent.entry("/w");
    wanted.x509_svid_ttl = 77;
    let entry = server.create(vec![wanted]).await.remove(0);
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let params = |entry_id: &str, public_key: Bytes, algorithm: &str| NewWitsvidParams {
        entry_id: entry_id.into(),
        public_key,
        signing_algorithm: algorithm.into(),
    };
    let request = BatchNewWitsvidRequest {
        params: vec![
            params(&entry.id, spki(&key), "ES256"),
            params("no-such", spki(&key), "ES256"),
            params("", spki(&key), "ES256"),
            params(&entry.id, Bytes::new(), "ES256"),
            params(&entry.id, Bytes::from_static(b"garbage"), "ES256"),
            params(&entry.id, spki(&key), "ES384"),
        ],
    };
    let results = agent.svids().batch_new_witsvid(request).await.unwrap().into_inner().results;
    let outcome: Vec<_> = results.iter().map(|r| r.status.clone().unwrap()).map(|s| (s.code, s.message)).collect();
    assert_eq!(outcome[0], (0, "OK".into()));
    assert_eq!(outcome[1], (Code::NotFound as i32, "entry not found or not authorized".into()));
    assert_eq!(outcome[2], (Code::InvalidArgument as i32, "missing entry ID".into()));
    assert_eq!(outcome[3], (Code::InvalidArgument as i32, "missing public key".into()));
    assert!(outcome[4].1.starts_with("malformed public key: "), "{}", outcome[4].1);
    assert!(outcome[5].1.starts_with("invalid signing algorithm or key type: "), "{}", outcome[5].1);
    let svid = results[0].svid.clone().unwrap();
    assert_eq!((&svid.id, svid.expires_at), (&id("/w"), NOW + 77));
    assert_eq!(&verified(&server, &svid.token).await.key, key.public_key());

    let none = agent.svids().batch_new_witsvid(BatchNewWitsvidRequest::default()).await;
    assert_eq!(refused(none, Code::InvalidArgument), "missing parameters");
    let unbound = server.svids().batch_new_witsvid(BatchNewWitsvidRequest::default()).await;
    refused(unbound, Code::PermissionDenied);
}

#[tokio::test]
async fn an_issuer_is_named_when_one_is_configured_and_authorities_survive_a_restart() {
    let server = Server::with(|settings| {
        settings.wit_svids_enabled = true;
        settings.wit_issuer = Some("urn:example:issuer".into());
    });
    let server = server.await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let svid = mint(&server, "/w", spki(&key), "ES256", 0).await.unwrap();
    assert_eq!(verified(&server, &svid.token).await.claims["iss"], "urn:example:issuer");
    let server = server.restart(|settings| settings.wit_svids_enabled = true).await;
    verified(&server, &svid.token).await;
    let again = mint(&server, "/w", spki(&key), "ES256", 0).await.unwrap();
    assert!(!verified(&server, &again.token).await.claims.contains_key("iss"));
    assert_eq!(again.token.split('.').next(), svid.token.split('.').next(), "the same authority");
}

#[tokio::test]
async fn without_the_feature_flag_there_are_none() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let message = refused(server.svids().mint_witsvid(MintWitsvidRequest::default()).await, Code::Unimplemented);
    assert_eq!(message, "WIT functionality is disabled");
    let request = BatchNewWitsvidRequest { params: vec![NewWitsvidParams::default()] };
    let message = refused(agent.svids().batch_new_witsvid(request).await, Code::Unimplemented);
    assert_eq!(message, "WIT functionality is disabled");
    let bundle = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert!(bundle.wit_authorities.is_empty());
}
