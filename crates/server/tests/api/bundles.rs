//! The Bundle service.

use crate::harness::*;
use finial_core::KeyType;
use finial_crypto::PrivateKey;
use finial_proto::server::bundle::batch_delete_federated_bundle_request::Mode;
use finial_proto::server::bundle::*;
use finial_proto::server::entry::ListEntriesRequest;
use finial_proto::types;
use tonic::Code;

on_every_database!(
    the_own_bundle_is_for_everyone_and_can_be_masked,
    authorities_can_be_appended,
    federated_bundles_live_and_die,
    deleting_a_federated_bundle_asks_about_its_entries,
);

fn jwt_key(key_id: &str) -> types::JwtKey {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let public_key = bytes::Bytes::copy_from_slice(key.public_key().spki_der());
    types::JwtKey { public_key, key_id: key_id.into(), expires_at: NOW + 5, tainted: false }
}

fn foreign(name: &str) -> types::Bundle {
    types::Bundle {
        trust_domain: name.into(),
        jwt_authorities: vec![jwt_key("k")],
        refresh_hint: 10,
        sequence_number: 3,
        ..Default::default()
    }
}

async fn create(server: &Server, bundle: Vec<types::Bundle>) -> Vec<(types::Status, Option<types::Bundle>)> {
    let request = BatchCreateFederatedBundleRequest { bundle, output_mask: None };
    let results = server.bundles().batch_create_federated_bundle(request).await.unwrap().into_inner().results;
    results.into_iter().map(|r| (r.status.unwrap(), r.bundle)).collect()
}

async fn the_own_bundle_is_for_everyone_and_can_be_masked(lab: Lab) {
    let server = lab.start().await;
    let mut anyone = bundle_client::BundleClient::new(server.remote(None).await);
    let bundle = anyone.get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert_eq!(bundle.trust_domain, "example.org");
    assert_eq!((bundle.x509_authorities.len(), bundle.jwt_authorities.len()), (1, 1));
    let mask = types::BundleMask { jwt_authorities: true, ..Default::default() };
    let masked = anyone.get_bundle(GetBundleRequest { output_mask: Some(mask) }).await.unwrap().into_inner();
    let expected = types::Bundle {
        trust_domain: "example.org".into(),
        jwt_authorities: bundle.jwt_authorities,
        ..Default::default()
    };
    assert_eq!(masked, expected);
}

async fn authorities_can_be_appended(lab: Lab) {
    let server = lab.start().await;
    let before = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    let append = |x509: Vec<types::X509Certificate>, jwt: Vec<types::JwtKey>| {
        let mut client = server.bundles();
        async move {
            let request = AppendBundleRequest { x509_authorities: x509, jwt_authorities: jwt, ..Default::default() };
            client.append_bundle(request).await.map(tonic::Response::into_inner)
        }
    };
    let key = jwt_key("mine");
    // What is there already is not added again.
    let after = append(before.x509_authorities.clone(), vec![key.clone()]).await.unwrap();
    assert_eq!((after.x509_authorities.len(), after.jwt_authorities.len()), (1, 2));
    assert!(after.sequence_number > before.sequence_number);
    let seen = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert_eq!(seen, after);
    assert_eq!(refused(append(vec![], vec![]).await, Code::InvalidArgument), "no authorities to append");
    let bad = types::X509Certificate { asn1: "garbage".into(), tainted: false };
    let message = refused(append(vec![bad], vec![]).await, Code::InvalidArgument);
    assert!(message.starts_with("failed to convert X.509 authority: "), "{message}");
    let nameless = types::JwtKey { key_id: String::new(), ..key.clone() };
    let message = refused(append(vec![], vec![nameless]).await, Code::InvalidArgument);
    assert_eq!(message, "failed to convert JWT authority: missing key ID");
    let bad = types::JwtKey { public_key: "garbage".into(), ..key };
    let message = refused(append(vec![], vec![bad]).await, Code::InvalidArgument);
    assert!(message.starts_with("failed to convert JWT authority: "), "{message}");
}

async fn federated_bundles_live_and_die(lab: Lab) {
    let server = lab.start().await;
    let agent = server.agent().await;
    let results =
        create(&server, vec![foreign("a.test"), foreign("a.test"), foreign("example.org"), foreign("Bad")]).await;
    assert_eq!(results[0].1.as_ref().unwrap().jwt_authorities.len(), 1);
    let outcome: Vec<_> = results.iter().map(|(s, _)| (s.code, s.message.as_str())).collect();
    assert_eq!(outcome[0], (0, "OK"));
    assert_eq!(outcome[1], (Code::AlreadyExists as i32, "bundle already exists"));
    let own = "creating a federated bundle for the server's own trust domain is not allowed";
    assert_eq!(outcome[2], (Code::InvalidArgument as i32, own));
    assert!(outcome[3].1.starts_with("trust domain argument is not valid: "));

    // Agents read them too, at once.
    let get = |name: &str| {
        let mut client = agent.bundles();
        let request = GetFederatedBundleRequest { trust_domain: name.into(), output_mask: None };
        async move { client.get_federated_bundle(request).await.map(tonic::Response::into_inner) }
    };
    assert_eq!(get("a.test").await.unwrap().refresh_hint, 10);
    assert_eq!(refused(get("b.test").await, Code::NotFound), "bundle not found");
    let own = "getting a federated bundle for the server's own trust domain is not allowed";
    assert_eq!(refused(get("example.org").await, Code::InvalidArgument), own);

    let changed = types::Bundle { refresh_hint: 99, sequence_number: 50, ..foreign("a.test") };
    let mask = types::BundleMask { refresh_hint: true, ..Default::default() };
    let bundle = vec![changed.clone(), foreign("b.test")];
    let request = BatchUpdateFederatedBundleRequest { bundle, input_mask: Some(mask), output_mask: None };
    let results = server.bundles().batch_update_federated_bundle(request).await.unwrap().into_inner().results;
    let updated = results[0].bundle.as_ref().unwrap();
    assert_eq!((updated.refresh_hint, updated.sequence_number), (99, 3));
    assert_eq!(results[1].status.as_ref().unwrap().message, "bundle not found");
    assert_eq!(get("a.test").await.unwrap().refresh_hint, 99);

    let request = BatchSetFederatedBundleRequest { bundle: vec![changed, foreign("b.test")], output_mask: None };
    let results = server.bundles().batch_set_federated_bundle(request).await.unwrap().into_inner().results;
    assert!(results.iter().all(|r| r.status.as_ref().unwrap().code == 0));
    let listed = server.bundles().list_federated_bundles(ListFederatedBundlesRequest::default()).await.unwrap();
    let names: Vec<_> = listed.into_inner().bundles.into_iter().map(|b| b.trust_domain).collect();
    assert_eq!(names, ["a.test", "b.test"]);
    let count = server.bundles().count_bundles(CountBundlesRequest {}).await.unwrap().into_inner().count;
    assert_eq!(count, 3, "the own one is counted");
    let bad = ListFederatedBundlesRequest { page_size: 1, page_token: "x".into(), ..Default::default() };
    let message = refused(server.bundles().list_federated_bundles(bad).await, Code::InvalidArgument);
    assert_eq!(message, "failed to list bundles: could not parse token 'x'");
}

async fn deleting_a_federated_bundle_asks_about_its_entries(lab: Lab) {
    let server = lab.start().await;
    let agent = server.agent().await;
    create(&server, vec![foreign("a.test"), foreign("b.test")]).await;
    let with = |path: &str, domains: &[&str]| {
        let federates_with = domains.iter().map(|name| (*name).to_owned()).collect();
        types::Entry { federates_with, ..agent.entry(path) }
    };
    server.create(vec![with("/x", &["a.test"]), with("/y", &["b.test"])]).await;
    let unknown = finial_proto::server::entry::BatchCreateEntryRequest {
        entries: vec![with("/z", &["c.test"])],
        output_mask: None,
    };
    let result = server.entries().batch_create_entry(unknown).await.unwrap().into_inner().results.remove(0);
    assert_ne!(result.status.unwrap().code, 0, "the bundle must be there first");
    let delete = |name: &str, mode: i32| {
        let mut client = server.bundles();
        let request = BatchDeleteFederatedBundleRequest { trust_domains: vec![name.into()], mode };
        async move {
            let results = client.batch_delete_federated_bundle(request).await.map(|r| r.into_inner().results);
            results.map(|mut results| results.remove(0).status.unwrap())
        }
    };
    let status = delete("a.test", Mode::Restrict.into()).await.unwrap();
    assert_eq!(status.code, Code::FailedPrecondition as i32, "{}", status.message);
    assert!(status.message.starts_with("failed to delete federated bundle: datastore-sql: "), "{}", status.message);
    assert_eq!(delete("a.test", Mode::Dissociate.into()).await.unwrap().code, 0);
    assert_eq!(delete("b.test", Mode::Delete.into()).await.unwrap().code, 0);
    assert_eq!(delete("b.test", Mode::Restrict.into()).await.unwrap().message, "bundle not found");
    let own = delete("example.org", Mode::Delete.into()).await.unwrap();
    assert_eq!(own.message, "removing the bundle for the server trust domain is not allowed");
    assert!(refused(delete("a.test", 9).await, Code::InvalidArgument).starts_with("failed to parse deletion mode: "));
    let stored = server.entries().list_entries(ListEntriesRequest::default()).await.unwrap().into_inner().entries;
    assert_eq!((stored.len(), stored[0].federates_with.len()), (1, 0));
    let seen = agent
        .entries()
        .get_authorized_entries(finial_proto::server::entry::GetAuthorizedEntriesRequest::default())
        .await
        .unwrap()
        .into_inner()
        .entries;
    assert_eq!((seen.len(), seen[0].federates_with.len()), (1, 0), "the index follows");
}

#[tokio::test]
async fn an_admin_of_a_federated_trust_domain_comes_in_when_its_bundle_is_known() {
    use finial_core::SpiffeId;
    use finial_proto::server::agent::CountAgentsRequest;
    use finial_proto::server::agent::agent_client::AgentClient;
    let other = Server::with(|settings| settings.trust_domain = finial_core::TrustDomain::parse("other.test").unwrap());
    let other = other.await;
    let admin_id = SpiffeId::parse("spiffe://other.test/admin").unwrap();
    let server = Server::with(|settings| settings.admin_ids.push(admin_id)).await;
    let admin = other.mint_in("other.test", "/admin").await;
    let stranger = other.mint_in("other.test", "/stranger").await;
    let count = |identity: Identity| {
        let server = &server;
        async move {
            let mut client = AgentClient::new(server.remote(Some(&identity)).await);
            client.count_agents(CountAgentsRequest::default()).await
        }
    };
    assert!(count(admin.clone()).await.is_err(), "its bundle is not known yet");
    let bundle = other.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert_eq!(create(&server, vec![bundle]).await[0].0.code, 0);
    count(admin).await.unwrap();
    assert!(count(stranger).await.is_err());
}
