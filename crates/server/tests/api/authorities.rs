//! LocalAuthority: a rotation by hand through the API, and what it does to what the server signs and shows.

use crate::harness::{DEADLINE, Lab, Server, logged, on_every_database, refused};
use finial_proto::server::bundle::GetBundleRequest;
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::localauthority as pb;
use finial_proto::server::localauthority::local_authority_client::LocalAuthorityClient;
use finial_proto::server::svid::MintJwtsvidRequest;
use tonic::Code;
use tonic::transport::Channel;

on_every_database!(
    an_x509_authority_is_replaced_tainted_and_revoked_and_everything_moves_off,
    tokens_are_signed_by_the_key_that_was_activated,
    kinds_that_are_off_are_said_to_be,
    wit_authorities_rotate_by_hand_too,
);

fn client(server: &Server) -> LocalAuthorityClient<Channel> {
    LocalAuthorityClient::new(server.local.clone())
}

async fn x509(server: &Server) -> pb::GetX509AuthorityStateResponse {
    client(server).get_x509_authority_state(pb::GetX509AuthorityStateRequest {}).await.unwrap().into_inner()
}

fn id(state: Option<pb::AuthorityState>) -> String {
    state.unwrap().authority_id
}

async fn an_x509_authority_is_replaced_tainted_and_revoked_and_everything_moves_off(lab: Lab) {
    let server = lab.start().await;
    let mut client = client(&server);
    let before = x509(&server).await;
    assert!(before.prepared.is_none() && before.old.is_none());
    let first = id(before.active);
    let prepared = client.prepare_x509_authority(pb::PrepareX509AuthorityRequest {}).await.unwrap().into_inner();
    let second = id(prepared.prepared_authority);
    assert_eq!(id(x509(&server).await.prepared), second);
    let request = pb::ActivateX509AuthorityRequest { authority_id: second.clone() };
    client.activate_x509_authority(request).await.unwrap();
    let now = x509(&server).await;
    assert_eq!((id(now.active), id(now.old), now.prepared), (second, first.clone(), None));
    let request = pb::TaintX509AuthorityRequest { authority_id: first.clone() };
    client.taint_x509_authority(request).await.unwrap();
    let bundle = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert_eq!(bundle.x509_authorities.iter().map(|a| a.tainted).collect::<Vec<_>>(), [true, false]);
    let request = pb::RevokeX509AuthorityRequest { authority_id: first.clone() };
    client.revoke_x509_authority(request).await.unwrap();
    let bundle = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert_eq!(bundle.x509_authorities.len(), 1);
    // Who knows only what is left finds the server good: its own SVID moved off as well.
    let good = async {
        loop {
            let mut client = BundleClient::new(server.remote(None).await);
            if client.get_bundle(GetBundleRequest::default()).await.is_ok() {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, good).await.unwrap();
    for message in ["X.509 authority tainted successfully", "X.509 authority revoked successfully"] {
        assert_eq!(logged(message, "local_authority_id", &first).len(), 1);
    }
}

async fn tokens_are_signed_by_the_key_that_was_activated(lab: Lab) {
    let server = lab.start().await;
    let mut client = client(&server);
    let prepared = client.prepare_jwt_authority(pb::PrepareJwtAuthorityRequest {}).await.unwrap().into_inner();
    let authority_id = id(prepared.prepared_authority);
    client
        .activate_jwt_authority(pb::ActivateJwtAuthorityRequest { authority_id: authority_id.clone() })
        .await
        .unwrap();
    let request = MintJwtsvidRequest {
        id: Some(finial_proto::types::Spiffeid { trust_domain: "example.org".into(), path: "/w".into() }),
        audience: vec!["a".into()],
        ttl: 60,
    };
    let token = server.svids().mint_jwtsvid(request).await.unwrap().into_inner().svid.unwrap().token;
    let header = token.split('.').next().unwrap();
    let header = base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, header).unwrap();
    assert!(String::from_utf8(header).unwrap().contains(&authority_id));
}

async fn kinds_that_are_off_are_said_to_be(lab: Lab) {
    let server = lab.with(|settings| settings.disable_jwt_svids = true).await;
    let mut client = client(&server);
    let none = pb::GetJwtAuthorityStateRequest {};
    let message = refused(client.get_jwt_authority_state(none).await, Code::Unimplemented);
    assert_eq!(message, "JWT functionality is disabled");
    let message = refused(client.prepare_jwt_authority(pb::PrepareJwtAuthorityRequest {}).await, Code::Unimplemented);
    assert_eq!(message, "JWT functionality is disabled");
    let none = pb::RevokeJwtAuthorityRequest { authority_id: "x".into() };
    let message = refused(client.revoke_jwt_authority(none).await, Code::Unimplemented);
    assert_eq!(message, "JWT functionality is disabled");
    // SPIRE's words, which has none at all.
    let words = "WIT-SVID functionality is not yet implemented";
    let none = pb::GetWitAuthorityStateRequest {};
    assert_eq!(refused(client.get_wit_authority_state(none).await, Code::Unimplemented), words);
    let none = pb::TaintWitAuthorityRequest { authority_id: "x".into() };
    assert_eq!(refused(client.taint_wit_authority(none).await, Code::Unimplemented), words);
}

async fn wit_authorities_rotate_by_hand_too(lab: Lab) {
    let server = lab.with(|settings| settings.wit_svids_enabled = true).await;
    let mut client = client(&server);
    let state = client.get_wit_authority_state(pb::GetWitAuthorityStateRequest {}).await.unwrap().into_inner();
    let first = id(state.active);
    let prepared = client.prepare_wit_authority(pb::PrepareWitAuthorityRequest {}).await.unwrap().into_inner();
    let second = id(prepared.prepared_authority);
    client.activate_wit_authority(pb::ActivateWitAuthorityRequest { authority_id: second.clone() }).await.unwrap();
    client.taint_wit_authority(pb::TaintWitAuthorityRequest { authority_id: first.clone() }).await.unwrap();
    let keys = async || {
        let bundle = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
        bundle.wit_authorities.into_iter().map(|k| (k.key_id, k.tainted)).collect::<Vec<_>>()
    };
    assert_eq!(keys().await, [(first.clone(), true), (second.clone(), false)]);
    client.revoke_wit_authority(pb::RevokeWitAuthorityRequest { authority_id: first }).await.unwrap();
    assert_eq!(keys().await, [(second, false)]);
}
