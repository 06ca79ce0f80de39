//! Federation relationships.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod common;
use common::*;
use finial_core::{Bundle, EndpointProfile, ErrorKind};
use finial_store::{FederationMask, FederationRelationship, Page};

on_every_database!(relationships_come_and_go, what_is_masked_stays, a_row_that_cannot_be_read_hides_no_other);

fn with(name: &str, profile: EndpointProfile) -> FederationRelationship {
    FederationRelationship {
        trust_domain: td(name),
        bundle_endpoint_url: format!("https://{name}/bundle"),
        profile,
        bundle: None,
    }
}

fn spiffe(name: &str) -> EndpointProfile {
    let text = format!("spiffe://{name}/endpoint");
    EndpointProfile::HttpsSpiffe { endpoint_id: finial_core::SpiffeId::parse(&text).unwrap() }
}

async fn relationships_come_and_go(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let web = with("web.test", EndpointProfile::HttpsWeb);
    assert_eq!(store.create_federation_relationship(&web).await.unwrap(), web);
    let error = store.create_federation_relationship(&web).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(error.to_string(), lab.duplicate("federated_trust_domains", "trust_domain", "web.test"));
    let full = Bundle { sequence_number: 4, ..bundle("spiffe.test") };
    let own = FederationRelationship { bundle: Some(full.clone()), ..with("spiffe.test", spiffe("spiffe.test")) };
    assert_eq!(store.create_federation_relationship(&own).await.unwrap(), own);
    assert_eq!(store.fetch_bundle(&td("spiffe.test")).await.unwrap(), Some(full.clone()));
    assert_eq!(store.fetch_federation_relationship(&td("spiffe.test")).await.unwrap(), Some(own.clone()));
    let page = Page { token: String::new(), size: 1 };
    let first = store.list_federation_relationships(Some(&page)).await.unwrap();
    assert_eq!(first.items, std::slice::from_ref(&web));
    let rest = Page { token: first.next_page_token, size: 5 };
    assert_eq!(store.list_federation_relationships(Some(&rest)).await.unwrap().items, std::slice::from_ref(&own));
    // a bundle that came by another way belongs to it, too
    store.create_bundle(&bundle("web.test")).await.unwrap();
    let listed = store.list_federation_relationships(None).await.unwrap();
    assert_eq!(listed.items[0].bundle, Some(bundle("web.test")));
    assert_eq!(listed.next_page_token, "");
    store.delete_federation_relationship(&td("spiffe.test")).await.unwrap();
    assert_eq!(store.fetch_federation_relationship(&td("spiffe.test")).await.unwrap(), None);
    assert_eq!(store.fetch_bundle(&td("spiffe.test")).await.unwrap(), Some(full), "the bundle stays");
    let error = store.delete_federation_relationship(&td("spiffe.test")).await.unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::NotFound, "datastore-sql: record not found"));
}

/// The bundle is found by a concatenation, which `||` is in MySQL only when `sql_mode` says so.
#[tokio::test]
async fn the_sql_mode_of_the_connection_string_does_not_matter() {
    let Some(database) = testkit::mariadb() else { return };
    let settings = settings("mysql", &format!("{}&sql_mode=%27%27", database.dsn()));
    let store = finial_store::Store::open(settings, clock()).await.unwrap();
    let new = FederationRelationship { bundle: Some(bundle("a.test")), ..with("a.test", spiffe("a.test")) };
    assert_eq!(store.create_federation_relationship(&new).await.unwrap(), new);
    store.close().await;
}

async fn what_is_masked_stays(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let missing = with("no.test", EndpointProfile::HttpsWeb);
    let error = store.update_federation_relationship(&missing, FederationMask::ALL).await.unwrap_err();
    let text = "unable to fetch federation relationship: record not found";
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::NotFound, text));
    let old = FederationRelationship { bundle: Some(bundle("a.test")), ..with("a.test", spiffe("a.test")) };
    store.create_federation_relationship(&old).await.unwrap();
    let new = FederationRelationship {
        bundle_endpoint_url: "https://new.test".into(),
        profile: EndpointProfile::HttpsWeb,
        bundle: Some(Bundle { sequence_number: 9, ..bundle("a.test") }),
        ..old.clone()
    };
    let none =
        FederationMask { bundle_endpoint_url: false, bundle_endpoint_profile: false, trust_domain_bundle: false };
    assert_eq!(store.update_federation_relationship(&new, none).await.unwrap(), old);
    let url = FederationMask { bundle_endpoint_url: true, ..none };
    let moved = FederationRelationship { bundle_endpoint_url: new.bundle_endpoint_url.clone(), ..old.clone() };
    assert_eq!(store.update_federation_relationship(&new, url).await.unwrap(), moved);
    assert_eq!(store.update_federation_relationship(&new, FederationMask::ALL).await.unwrap(), new);
    let without = FederationRelationship { bundle: None, ..new.clone() };
    assert_eq!(store.update_federation_relationship(&without, FederationMask::ALL).await.unwrap(), new);
}

async fn a_row_that_cannot_be_read_hides_no_other(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let Some(database) = &opened.database else { return };
    let good = with("good.test", EndpointProfile::HttpsWeb);
    opened.create_federation_relationship(&with("bad.test", EndpointProfile::HttpsWeb)).await.unwrap();
    opened.create_federation_relationship(&good).await.unwrap();
    database.sql("UPDATE federated_trust_domains SET bundle_endpoint_profile = 'x' WHERE trust_domain = 'bad.test'");
    assert_eq!(opened.list_federation_relationships(None).await.unwrap().items, [good]);
    let error = opened.fetch_federation_relationship(&td("bad.test")).await.unwrap_err();
    assert!(error.to_string().contains("unknown bundle endpoint profile type: \"x\""), "{error}");
}
