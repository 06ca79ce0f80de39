//! What is answered while the database is away, and how what cannot be done is refused.

use crate::harness::*;
use finial_config::PluginConfig;
use finial_proto::server::bundle::*;
use finial_proto::server::debug::GetInfoRequest;
use finial_proto::server::debug::debug_client::DebugClient;
use finial_proto::server::entry::BatchDeleteEntryRequest;
use finial_proto::server::trustdomain::trust_domain_client::TrustDomainClient;
use finial_proto::server::trustdomain::*;
use finial_proto::types::federation_relationship::BundleEndpointProfile as Profile;
use finial_proto::types::{self, FederationRelationship};
use std::time::Instant;
use testkit::{Proxy, Weather};
use tonic::Code;

fn foreign(name: &str) -> types::Bundle {
    types::Bundle { trust_domain: name.into(), sequence_number: 3, ..Default::default() }
}

fn relationship(name: &str) -> FederationRelationship {
    FederationRelationship {
        trust_domain: name.into(),
        // Nobody listens there.
        bundle_endpoint_url: "https://127.0.0.1:1/bundle".into(),
        bundle_endpoint_profile: Some(Profile::HttpsWeb(types::HttpsWebProfile {})),
        trust_domain_bundle: Some(foreign(name)),
    }
}

/// All that can be read of bundles and relationships.
#[derive(Debug, PartialEq)]
struct Read {
    count: i32,
    bundles: Vec<types::Bundle>,
    relationships: Vec<FederationRelationship>,
    one: FederationRelationship,
}

/// A page of two at a time, as far as there are more.
async fn read(server: &Server) -> Read {
    let mut relations = TrustDomainClient::new(server.local.clone());
    let (mut bundles, mut relationships) = (Vec::new(), Vec::new());
    let mut page_token = String::new();
    loop {
        let request = ListFederatedBundlesRequest { page_size: 2, page_token, ..Default::default() };
        let listed = server.bundles().list_federated_bundles(request).await.unwrap().into_inner();
        bundles.extend(listed.bundles);
        page_token = listed.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    loop {
        let request = ListFederationRelationshipsRequest { page_size: 2, page_token, ..Default::default() };
        let listed = relations.list_federation_relationships(request).await.unwrap().into_inner();
        relationships.extend(listed.federation_relationships);
        page_token = listed.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    let request = GetFederationRelationshipRequest { trust_domain: "b.test".into(), output_mask: None };
    let one = relations.get_federation_relationship(request).await.unwrap().into_inner();
    let count = server.bundles().count_bundles(CountBundlesRequest {}).await.unwrap().into_inner().count;
    Read { count, bundles, relationships, one }
}

fn code_of(status: Option<types::Status>) -> (Code, String) {
    let status = status.unwrap();
    (Code::from(status.code), status.message)
}

/// What each write of bundles and entries answers.
async fn write(server: &Server, entry_id: &str) -> Vec<(Code, String)> {
    let mut bundles = server.bundles();
    let (bundle, output_mask) = (vec![foreign("c.test")], None);
    let request = BatchCreateFederatedBundleRequest { bundle: bundle.clone(), output_mask };
    let create = bundles.batch_create_federated_bundle(request).await.unwrap().into_inner().results.remove(0).status;
    let request = BatchUpdateFederatedBundleRequest { bundle: bundle.clone(), ..Default::default() };
    let update = bundles.batch_update_federated_bundle(request).await.unwrap().into_inner().results.remove(0).status;
    let request = BatchSetFederatedBundleRequest { bundle, output_mask };
    let set = bundles.batch_set_federated_bundle(request).await.unwrap().into_inner().results.remove(0).status;
    let request = BatchDeleteEntryRequest { ids: vec![entry_id.into()] };
    let delete = match server.entries().batch_delete_entry(request).await {
        Ok(answer) => answer.into_inner().results.remove(0).status,
        Err(status) => Some(types::Status { code: status.code() as i32, message: status.message().into() }),
    };
    [create, update, set, delete].into_iter().map(code_of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bundles_and_relationships_are_answered_from_memory_and_writes_say_that_the_database_is_away() {
    let Some(database) = testkit::postgres() else { return };
    let proxy = Proxy::to(database.port());
    let data = finial_hcl::parse(&testkit::datastore(&database, proxy.port())).unwrap();
    let server = Server::with(|s| s.plugins = vec![PluginConfig::inline("DataStore", "sql", data)]).await;
    let entry = server.create(vec![entry("/a", "/b", &["t:a"])]).await.remove(0);
    let mut relations = TrustDomainClient::new(server.local.clone());
    let names = ["b.test", "a.test", "d.test"];
    let request = BatchCreateFederationRelationshipRequest {
        federation_relationships: names.map(relationship).to_vec(),
        output_mask: None,
    };
    let created = relations.batch_create_federation_relationship(request).await.unwrap().into_inner().results;
    assert!(created.iter().all(|result| result.status.as_ref().unwrap().code == 0), "{created:?}");
    // It fails, as nobody is there; but the relationships were read by then.
    let request = RefreshBundleRequest { trust_domain: "d.test".into() };
    assert_ne!(relations.refresh_bundle(request).await.unwrap_err().code(), Code::NotFound);
    let before = read(&server).await;
    assert_eq!(before.count, 4, "the own one, too");
    assert_eq!(before.bundles.iter().map(|bundle| &*bundle.trust_domain).collect::<Vec<_>>(), names, "as they came");
    assert_eq!(before.relationships, names.map(relationship));
    assert_eq!(before.one, relationship("b.test"));

    proxy.weather(Weather::Refusing);
    proxy.cut(None);
    let begun = Instant::now();
    let refused = loop {
        let refused = write(&server, &entry.id).await;
        if refused.iter().all(|(code, _)| *code == Code::Unavailable) {
            break refused;
        }
        assert!(begun.elapsed() < DEADLINE, "{refused:?}");
        tokio::task::yield_now().await;
    };
    let words =
        ["unable to create bundle: ", "failed to update bundle: ", "failed to set bundle: ", "failed to delete entry"];
    for ((_, message), word) in refused.iter().zip(words) {
        assert!(message.starts_with(word), "{message}");
    }
    assert_eq!(read(&server).await, before, "as of the last time");
    let mut debug = DebugClient::new(server.local.clone());
    let info = debug.get_info(GetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.federated_bundles_count, info.entries_count), (4, 1));

    proxy.weather(Weather::Fair);
    loop {
        let written = write(&server, &entry.id).await;
        if written.iter().all(|(code, _)| *code != Code::Unavailable) {
            break;
        }
        assert!(begun.elapsed() < DEADLINE * 2, "{written:?}");
        tokio::task::yield_now().await;
    }
    let bundles = read(&server).await.bundles;
    assert_eq!(bundles.last().map(|bundle| &*bundle.trust_domain), Some("c.test"), "the last is what came last");
}
