//! What downstream servers get: authorities below ours, and their keys in our bundle.

use crate::harness::*;
use finial_core::{KeyType, SpiffeId};
use finial_crypto::{
    Certificate, DistinguishedName, PrivateKey, SerialNumber, SvidTemplate, TrustRoots, X509Ca, create_ca_csr,
    verify_x509_svid,
};
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::bundle::*;
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::server::svid::{NewDownstreamX509caRequest, NewDownstreamX509caResponse};
use finial_proto::types;
use std::sync::Arc;
use tonic::transport::Channel;
use tonic::{Code, Status};

on_every_database!(
    an_authority_for_a_downstream_server_signs_what_our_bundle_verifies,
    a_published_jwt_key_is_in_the_bundle_once,
);

/// A channel of someone with a downstream entry.
async fn downstream(server: &Server) -> Channel {
    let mut wanted = entry("/downstream", "/spire/server", &["a:b"]);
    wanted.downstream = true;
    server.create(vec![wanted]).await;
    server.remote(Some(&server.mint("/downstream").await)).await
}

async fn ask(channel: &Channel, csr: Vec<u8>, preferred_ttl: i32) -> Result<NewDownstreamX509caResponse, Status> {
    let request = NewDownstreamX509caRequest { csr: csr.into(), preferred_ttl };
    SvidClient::new(channel.clone()).new_downstream_x509ca(request).await.map(tonic::Response::into_inner)
}

fn ders(list: &[bytes::Bytes]) -> Vec<Arc<[u8]>> {
    list.iter().map(|der| Arc::from(&**der)).collect()
}

async fn an_authority_for_a_downstream_server_signs_what_our_bundle_verifies(lab: Lab) {
    let server = lab.start().await;
    let channel = downstream(&server).await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let csr = create_ca_csr(&key, &DistinguishedName::ca_default(), &trust_domain()).await.unwrap();
    let answer = ask(&channel, csr.clone(), 7200).await.unwrap();
    let roots = ders(&answer.x509_authorities);
    let chain = ders(&answer.ca_cert_chain);
    assert_eq!((chain.len(), roots.len()), (1, 1), "never the root");
    let (certificate, root) =
        (Certificate::parse(chain[0].clone()).unwrap(), Certificate::parse(roots[0].clone()).unwrap());
    assert!(certificate.is_ca());
    assert_eq!((certificate.not_before(), certificate.not_after()), (NOW - 10, NOW + 7200));
    assert_eq!(certificate.uri_sans().iter().map(|uri| &**uri).collect::<Vec<_>>(), ["spiffe://example.org"]);
    let (subject, above) = (certificate.subject().unwrap(), root.subject().unwrap());
    assert_eq!(subject.parts().organizational_unit, ["DOWNSTREAM-1"]);
    assert_eq!(subject.parts().serial_number, above.parts().serial_number);
    assert_eq!(subject.parts().organization, above.parts().organization);

    // What it signs verifies, with its own certificate on the way.
    let ca = X509Ca::new(Arc::new(key), chain[0].clone(), chain.clone()).unwrap();
    let (leaf, below) =
        (PrivateKey::generate(KeyType::EcP256).unwrap(), SpiffeId::parse("spiffe://example.org/x").unwrap());
    let template = SvidTemplate {
        id: &below,
        public_key: leaf.public_key(),
        subject: &DistinguishedName::svid_default(),
        dns_names: &[],
        not_before: NOW,
        not_after: NOW + 60,
        serial: SerialNumber::random(),
    };
    let svid = ca.chain_of(ca.issue_svid(&template).await.unwrap());
    assert_eq!(verify_x509_svid(&svid, &TrustRoots::new(&roots).unwrap(), NOW).unwrap(), below);

    let ends = |answer: NewDownstreamX509caResponse| {
        Certificate::parse(ders(&answer.ca_cert_chain)[0].clone()).unwrap().not_after() - NOW
    };
    assert_eq!(ends(ask(&channel, csr.clone(), 0).await.unwrap()), 24 * 3600, "ca_ttl");
    assert_eq!(ends(ask(&channel, csr, i32::MAX).await.unwrap()), 24 * 3600, "never longer than ours");
}

#[tokio::test]
async fn bad_requests_for_authorities_are_told_apart() {
    let server = Server::start().await;
    let channel = downstream(&server).await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let csr = create_ca_csr(&key, &DistinguishedName::ca_default(), &trust_domain()).await.unwrap();
    let mut forged = csr.clone();
    *forged.last_mut().unwrap() ^= 1;
    for (bad, want) in
        [(vec![], "malformed CSR: "), (b"x".to_vec(), "malformed CSR: "), (forged, "invalid CSR signature: ")]
    {
        let message = refused(ask(&channel, bad, 0).await, Code::InvalidArgument);
        assert!(message.starts_with(want), "{message}");
    }
    for stranger in
        [server.local.clone(), server.agent().await.channel, server.remote(Some(&server.mint("/w").await)).await]
    {
        refused(ask(&stranger, csr.clone(), 0).await, Code::PermissionDenied);
    }
}

fn jwt_key(key_id: &str) -> types::JwtKey {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let public_key = bytes::Bytes::copy_from_slice(key.public_key().spki_der());
    types::JwtKey { public_key, key_id: key_id.into(), expires_at: NOW + 5, tainted: false }
}

async fn a_published_jwt_key_is_in_the_bundle_once(lab: Lab) {
    let server = lab.start().await;
    let mut client = BundleClient::new(downstream(&server).await);
    let key = jwt_key("below");
    for _ in 0..2 {
        let request = PublishJwtAuthorityRequest { jwt_authority: Some(key.clone()) };
        let all = client.publish_jwt_authority(request).await.unwrap().into_inner().jwt_authorities;
        assert_eq!(all.len(), 2, "with our own");
        assert_eq!(all.last(), Some(&key));
    }
    let bundle = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert_eq!(bundle.jwt_authorities.last(), Some(&key));

    let none = client.publish_jwt_authority(PublishJwtAuthorityRequest::default()).await;
    assert_eq!(refused(none, Code::InvalidArgument), "missing JWT authority");
    let nameless =
        PublishJwtAuthorityRequest { jwt_authority: Some(types::JwtKey { key_id: String::new(), ..key.clone() }) };
    let message = refused(client.publish_jwt_authority(nameless).await, Code::InvalidArgument);
    assert_eq!(message, "invalid JWT authority: missing key ID");
    let request = PublishJwtAuthorityRequest { jwt_authority: Some(key) };
    refused(server.bundles().publish_jwt_authority(request).await, Code::PermissionDenied);
}

#[tokio::test]
async fn a_published_wit_key_is_in_the_bundle_where_wit_svids_are_enabled() {
    let wit = |key_id: &str| {
        let types::JwtKey { public_key, key_id, expires_at, tainted } = jwt_key(key_id);
        types::WitKey { public_key, key_id, expires_at, tainted }
    };
    let server = Server::with(|settings| settings.wit_svids_enabled = true).await;
    let mut client = BundleClient::new(downstream(&server).await);
    let key = wit("below");
    let request = PublishWitAuthorityRequest { wit_authority: Some(key.clone()) };
    let all = client.publish_wit_authority(request).await.unwrap().into_inner().wit_authorities;
    assert_eq!((all.len(), all.last()), (2, Some(&key)));
    let none = client.publish_wit_authority(PublishWitAuthorityRequest::default()).await;
    assert_eq!(refused(none, Code::InvalidArgument), "missing WIT authority");

    // They can be appended like the others, too, and federated bundles keep theirs.
    let request = AppendBundleRequest { wit_authorities: vec![wit("appended")], ..Default::default() };
    assert_eq!(server.bundles().append_bundle(request).await.unwrap().into_inner().wit_authorities.len(), 3);
    let foreign =
        types::Bundle { trust_domain: "a.test".into(), wit_authorities: vec![wit("theirs")], ..Default::default() };
    let request = BatchSetFederatedBundleRequest { bundle: vec![foreign.clone()], output_mask: None };
    let results = server.bundles().batch_set_federated_bundle(request).await.unwrap().into_inner().results;
    assert_eq!(results[0].bundle.as_ref(), Some(&foreign));

    let without = Server::start().await;
    let mut client = BundleClient::new(downstream(&without).await);
    let message =
        refused(client.publish_wit_authority(PublishWitAuthorityRequest::default()).await, Code::Unimplemented);
    assert_eq!(message, "WIT-SVID functionality is not yet implemented");
}
