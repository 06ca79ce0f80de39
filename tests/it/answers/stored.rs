//! Good requests about what is stored: filters that find something, pages, masks, batches; entries, bundles, relationships,
//! tokens, agents and the authorities of the server. Nothing here differs in case only: on MySQL and MariaDB that is the same
//! for SPIRE, and not for Finial.

use super::entries::counting;
use super::joined::{Joined, KEY};
use super::{Answers, ask, id, in_order, of_servers, refusal, selector, show};
use finial_net::client::uds_channel;
use finial_proto::server::agent::{self as agents, agent_client::AgentClient};
use finial_proto::server::bundle::{self as bundles, bundle_client::BundleClient};
use finial_proto::server::entry::{self as entries, entry_client::EntryClient};
use finial_proto::server::localauthority::{self as local, local_authority_client::LocalAuthorityClient};
use finial_proto::server::trustdomain::{self as domains, trust_domain_client::TrustDomainClient};
use finial_proto::types::federation_relationship::BundleEndpointProfile as Profile;
use finial_proto::types::{self, AgentMask, Bundle, BundleMask, Entry, EntryMask, FederationRelationship};
use finial_proto::types::{FederatesWithMatch, FederationRelationshipMask, SelectorMatch};
use testkit::{Server, ServerOptions};
use tonic::transport::Channel;

#[test]
fn what_is_stored() {
    of_servers(&ServerOptions::default(), asked);
}

pub(super) async fn asked(server: &Server) -> Answers {
    let mut answers = Answers::new();
    bundles(server, &mut answers).await;
    entries(server, &mut answers).await;
    relationships(server, &mut answers).await;
    agents(server, &mut answers).await;
    authorities(server, &mut answers).await;
    // So that others find no more than they left.
    let mut client = BundleClient::new(uds_channel(server.socket()));
    let names = ["a.org", "b.org", "c.org", "d.org"].map(str::to_owned).to_vec();
    for mode in [0, 1, 2] {
        let trust_domains = names.clone();
        let request = bundles::BatchDeleteFederatedBundleRequest { trust_domains, mode };
        ask!(answers, client.batch_delete_federated_bundle, request);
        answers.push((format!("entries after {mode}"), page(server, None, 0, "").await.0));
    }
    answers
}

fn bundle(name: &str, refresh_hint: i64) -> Bundle {
    let public_key = KEY.public_key().spki_der().to_vec().into();
    let key = types::JwtKey { public_key, key_id: format!("{name}-key"), expires_at: 4_000_000_000, tainted: false };
    Bundle {
        trust_domain: name.into(),
        jwt_authorities: vec![key],
        refresh_hint,
        sequence_number: 3,
        ..Default::default()
    }
}

async fn bundles(server: &Server, answers: &mut Answers) {
    let mut client = BundleClient::new(uds_channel(server.socket()));
    let none = BundleMask::default();
    let hint = Some(BundleMask { refresh_hint: true, ..none });
    let keys = Some(BundleMask { jwt_authorities: true, ..none });
    let batch = ["a.org", "b.org", "a.org", "c.org", "example.org", "no td", "d.org"].map(|n| bundle(n, 60)).to_vec();
    let create = |output_mask| bundles::BatchCreateFederatedBundleRequest { bundle: batch.clone(), output_mask };
    ask!(answers, client.batch_create_federated_bundle, create(None), create(hint));
    for (input_mask, output_mask) in [(None, None), (hint, keys), (keys, hint), (Some(none), Some(none))] {
        let bundle = vec![Bundle { sequence_number: 9, ..bundle("b.org", 70) }, bundle("none.org", 1)];
        let request = bundles::BatchUpdateFederatedBundleRequest { bundle, input_mask, output_mask };
        ask!(answers, client.batch_update_federated_bundle, request);
    }
    let set = vec![Bundle { jwt_authorities: vec![], ..bundle("c.org", 80) }, bundle("a.org", 90)];
    ask!(
        answers,
        client.batch_set_federated_bundle,
        bundles::BatchSetFederatedBundleRequest { bundle: set, output_mask: None }
    );
    for output_mask in [None, Some(none), hint, keys] {
        let mut page_token = String::new();
        loop {
            let request = bundles::ListFederatedBundlesRequest { output_mask, page_size: 3, page_token };
            let answer = client.list_federated_bundles(request).await.expect("bundles").into_inner();
            answers.push((format!("bundles by {output_mask:?}"), format!("{:?}", answer.bundles)));
            page_token = answer.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        let trust_domain = "a.org".to_owned();
        ask!(answers, client.get_federated_bundle, bundles::GetFederatedBundleRequest { trust_domain, output_mask });
    }
    let answer = client.list_federated_bundles(bundles::ListFederatedBundlesRequest::default()).await;
    let mut all = answer.expect("bundles").into_inner().bundles;
    in_order(&mut all);
    answers.push(("all bundles".into(), format!("{all:?}")));
    ask!(answers, client.count_bundles, bundles::CountBundlesRequest {});
}

fn all_entries() -> Vec<Entry> {
    let base = |name: &str, parent: &str, selectors: &[(&str, &str)], federates: &[&str]| Entry {
        id: name.into(),
        spiffe_id: id("example.org", &format!("/{name}")),
        parent_id: id("example.org", parent),
        selectors: selectors.iter().map(|(kind, value)| selector(kind, value)).collect(),
        federates_with: federates.iter().map(|name| (*name).to_owned()).collect(),
        ..Entry::default()
    };
    let (a1, a2, b1) = (("a", "1"), ("a", "2"), ("b", "1"));
    vec![
        base("e1", "/p", &[a1], &[]),
        base("e2", "/p", &[a1, a2], &["a.org"]),
        base("e3", "/p", &[a1, a2, b1], &["b.org", "a.org"]),
        Entry { hint: "h".into(), ..base("e4", "/q", &[a2], &["c.org"]) },
        Entry { hint: "h".into(), downstream: true, ..base("e5", "/q", &[b1], &["a.org", "b.org", "c.org"]) },
        Entry { admin: true, expires_at: 4_000_000_000, ..base("e6", "/q", &[("c", "1")], &[]) },
        Entry {
            dns_names: vec!["z.org".into(), "a.org".into()],
            x509_svid_ttl: 60,
            jwt_svid_ttl: 30,
            store_svid: true,
            spiffe_id: id("example.org", "/e1"),
            ..base("e7", "/p", &[("c", "2"), ("c", "1")], &["d.org"])
        },
        base("e8", "/r", &[a1], &[]),
    ]
}

type Filter = entries::list_entries_request::Filter;

fn filters() -> Vec<Option<Filter>> {
    let mut filters = vec![None, Some(Filter::default())];
    for path in ["/e1", "/e2", "/none"] {
        filters.push(Some(Filter { by_spiffe_id: id("example.org", path), ..Filter::default() }));
    }
    for path in ["/p", "/q", "/none"] {
        filters.push(Some(Filter { by_parent_id: id("example.org", path), ..Filter::default() }));
    }
    for r#match in 0..4 {
        let sets: [&[(&str, &str)]; 7] = [
            &[("a", "1")],
            &[("a", "2")],
            &[("a", "1"), ("a", "2")],
            &[("a", "2"), ("b", "1"), ("a", "1")],
            &[("c", "1"), ("c", "2")],
            &[("b", "1"), ("z", "1")],
            &[("a", "1"), ("a", "1")],
        ];
        for set in sets {
            let selectors = set.iter().map(|(kind, value)| selector(kind, value)).collect();
            let by_selectors = Some(SelectorMatch { selectors, r#match });
            filters.push(Some(Filter { by_selectors: by_selectors.clone(), ..Filter::default() }));
            let by_parent_id = id("example.org", "/p");
            filters.push(Some(Filter { by_selectors, by_parent_id, ..Filter::default() }));
        }
        for set in [&["a.org"][..], &["a.org", "b.org"], &["c.org", "b.org", "a.org"], &["d.org"], &["none.org"]] {
            let trust_domains = set.iter().map(|name| (*name).to_owned()).collect();
            let by_federates_with = Some(FederatesWithMatch { trust_domains, r#match });
            filters.push(Some(Filter { by_federates_with: by_federates_with.clone(), ..Filter::default() }));
            let selectors = vec![selector("a", "2")];
            let by_selectors = Some(SelectorMatch { selectors, r#match: 3 });
            filters.push(Some(Filter { by_federates_with, by_selectors, ..Filter::default() }));
        }
    }
    for by_hint in ["h", ""] {
        filters.push(Some(Filter { by_hint: Some(by_hint.into()), ..Filter::default() }));
    }
    for by_downstream in [true, false] {
        filters.push(Some(Filter { by_downstream: Some(by_downstream), ..Filter::default() }));
    }
    filters
}

/// Without what differs: when it was made, and the order of its selectors, which are a set.
fn without_time(mut entry: Entry) -> Entry {
    entry.created_at = i64::from(entry.created_at > 0);
    entry.selectors.sort_by(|a, b| (&a.r#type, &a.value).cmp(&(&b.r#type, &b.value)));
    // In no order on PostgreSQL.
    entry.federates_with.sort();
    entry
}

/// Which entries are on this page, and where the next begins.
async fn page(server: &Server, filter: Option<Filter>, page_size: i32, token: &str) -> (String, String) {
    let output_mask = Some(EntryMask { federates_with: true, ..EntryMask::default() });
    let request = entries::ListEntriesRequest { filter, output_mask, page_size, page_token: token.into() };
    let mut client = EntryClient::new(uds_channel(server.socket()));
    match client.list_entries(request).await {
        Ok(answer) => {
            let answer = answer.into_inner();
            // One is made by the server, whose IDs come in any order.
            let id = |id: String| if id.len() == 36 { "{uuid}".into() } else { id };
            let mut ids: Vec<_> = answer.entries.into_iter().map(|e| (id(e.id), e.federates_with)).collect();
            // In pages they have an order.
            if page_size == 0 {
                ids.sort();
            }
            ids.iter_mut().for_each(|(_, names)| names.sort());
            (ids.iter().map(|entry| format!("{entry:?} ")).collect(), answer.next_page_token)
        }
        Err(status) => (refusal(&status), String::new()),
    }
}

async fn listed(server: &Server, answers: &mut Answers) {
    let mut client = EntryClient::new(uds_channel(server.socket()));
    for filter in filters() {
        let what = format!("entries by {filter:?}");
        answers.push((what.clone(), page(server, filter.clone(), 0, "").await.0));
        // SPIRE looks for downstream entries after it has cut the page, and takes a page without one for the end.
        let page_sizes =
            if filter.as_ref().is_some_and(|f| f.by_downstream == Some(true)) { &[][..] } else { &[1, 2, 1_000] };
        for &page_size in page_sizes {
            let (mut token, mut pages) = (String::new(), Vec::new());
            for _ in 0..12 {
                let (ids, next) = page(server, filter.clone(), page_size, &token).await;
                pages.push(ids);
                token = next;
                if token.is_empty() {
                    break;
                }
            }
            // SPIRE filters some pages after it has read them: they may be shorter, but never are in another order.
            let pages = if filter.is_none() { pages.join(" | ") } else { pages.concat() };
            answers.push((format!("{what}, {page_size} a page"), pages));
        }
        ask!(answers, client.count_entries, counting(filter));
    }
}

async fn entries(server: &Server, answers: &mut Answers) {
    let mut client = EntryClient::new(uds_channel(server.socket()));
    let all = all_entries();
    // Some twice, some bad, in one batch.
    let mut batch = all.clone();
    batch.push(all[0].clone());
    batch.push(Entry { id: "other".into(), ..all[1].clone() });
    batch.push(Entry { federates_with: vec!["none.org".into()], id: "lost".into(), ..all[2].clone() });
    batch.push(Entry::default());
    let request = entries::BatchCreateEntryRequest { entries: batch, output_mask: None };
    for result in client.batch_create_entry(request).await.expect("results").into_inner().results {
        let entry = result.entry.map(without_time).map(|mut entry| {
            // SPIRE sorts them here, and nowhere else.
            entry.dns_names.sort();
            entry
        });
        answers.push(("created".into(), format!("{:?} {entry:?}", result.status)));
    }
    listed(server, answers).await;
    let masks: [fn(&mut EntryMask) -> &mut bool; 9] = [
        |m| &mut m.spiffe_id,
        |m| &mut m.selectors,
        |m| &mut m.federates_with,
        |m| &mut m.dns_names,
        |m| &mut m.hint,
        |m| &mut m.x509_svid_ttl,
        |m| &mut m.expires_at,
        |m| &mut m.store_svid,
        |m| &mut m.additional_attributes,
    ];
    let changed = Entry {
        id: "e3".into(),
        spiffe_id: id("example.org", "/changed"),
        parent_id: id("example.org", "/changed"),
        selectors: vec![selector("c", "1"), selector("c", "2")],
        federates_with: vec!["c.org".into()],
        dns_names: vec!["c.org".into()],
        hint: "c".into(),
        x509_svid_ttl: 7,
        expires_at: 4_000_000_007,
        ..Entry::default()
    };
    for field in masks {
        let mut mask = EntryMask::default();
        *field(&mut mask) = true;
        let entries = vec![changed.clone(), Entry { id: "none".into(), ..changed.clone() }];
        let request = entries::BatchUpdateEntryRequest { entries, input_mask: Some(mask), output_mask: None };
        for result in client.batch_update_entry(request).await.expect("results").into_inner().results {
            let entry = result.entry.map(without_time);
            answers.push((format!("updated {mask:?}"), format!("{:?} {entry:?}", result.status)));
        }
        let output_mask = Some(EntryMask { revision_number: true, ..mask });
        ask!(answers, client.get_entry, entries::GetEntryRequest { id: "e3".into(), output_mask });
    }
    // Made the same as another.
    let twin = Entry { id: "e4".into(), ..all[0].clone() };
    let whole = vec![twin, Entry { id: "e5".into(), selectors: vec![], ..all[4].clone() }];
    let request = entries::BatchUpdateEntryRequest { entries: whole, input_mask: None, output_mask: None };
    for result in client.batch_update_entry(request).await.expect("results").into_inner().results {
        let entry = result.entry.map(without_time);
        answers.push(("updated whole".into(), format!("{:?} {entry:?}", result.status)));
    }
    let ids = ["e1", "none", "", "e1", "e8"].map(str::to_owned).to_vec();
    ask!(answers, client.batch_delete_entry, entries::BatchDeleteEntryRequest { ids });
    listed(server, answers).await;
}

async fn relationships(server: &Server, answers: &mut Answers) {
    let mut client = TrustDomainClient::new(uds_channel(server.socket()));
    let of = |name: &str| FederationRelationship {
        trust_domain: name.into(),
        bundle_endpoint_url: format!("https://127.0.0.1:1/{name}"),
        bundle_endpoint_profile: Some(Profile::HttpsSpiffe(types::HttpsspiffeProfile {
            endpoint_spiffe_id: format!("spiffe://{name}/endpoint"),
        })),
        trust_domain_bundle: (name != "s.org").then(|| bundle(name, 60)),
    };
    let names = ["r.org", "q.org", "r.org", "s.org", "t.org", "u.org"];
    let mask = FederationRelationshipMask { bundle_endpoint_url: true, ..Default::default() };
    for output_mask in [None, Some(mask)] {
        let federation_relationships = names.map(of).to_vec();
        let request = domains::BatchCreateFederationRelationshipRequest { federation_relationships, output_mask };
        ask!(answers, client.batch_create_federation_relationship, request);
    }
    for output_mask in [None, Some(mask), Some(FederationRelationshipMask::default())] {
        for page_size in [0, 2, 100] {
            let mut page_token = String::new();
            for n in 0..6 {
                let request = domains::ListFederationRelationshipsRequest { output_mask, page_size, page_token };
                let mut answer = client.list_federation_relationships(request).await.expect("a page").into_inner();
                if page_size == 0 {
                    in_order(&mut answer.federation_relationships);
                }
                let what = format!("relationships, page {n} of {page_size} by {output_mask:?}");
                answers.push((what, format!("{:?}", answer.federation_relationships)));
                page_token = answer.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
        }
    }
    let trust_domains = names.iter().map(|name| (*name).to_owned()).chain(["none.org".into()]).collect();
    ask!(
        answers,
        client.batch_delete_federation_relationship,
        domains::BatchDeleteFederationRelationshipRequest { trust_domains }
    );
    // The bundles stay.
    let mut client = BundleClient::new(uds_channel(server.socket()));
    ask!(answers, client.count_bundles, bundles::CountBundlesRequest {});
    let trust_domains = names.iter().map(|name| (*name).to_owned()).collect();
    ask!(
        answers,
        client.batch_delete_federated_bundle,
        bundles::BatchDeleteFederatedBundleRequest { trust_domains, mode: 0 }
    );
}

fn agent_filters() -> Vec<agents::list_agents_request::Filter> {
    use agents::list_agents_request::Filter;
    let by_selectors = |r#match| Filter {
        by_selector_match: Some(SelectorMatch { selectors: vec![selector("a", "b")], r#match }),
        ..Filter::default()
    };
    let mut filters = vec![
        Filter::default(),
        Filter { by_banned: Some(true), ..Filter::default() },
        Filter { by_banned: Some(false), ..Filter::default() },
        Filter { by_can_reattest: Some(true), ..Filter::default() },
        Filter { by_can_reattest: Some(false), by_banned: Some(false), ..Filter::default() },
        Filter { by_attestation_type: "join_token".into(), ..Filter::default() },
        Filter { by_attestation_type: "none".into(), ..Filter::default() },
        Filter { by_expires_before: "2020-01-01 00:00:00 +0000 +00".into(), ..Filter::default() },
        Filter { by_expires_before: "2090-01-01 00:00:00 +0000 +00".into(), ..Filter::default() },
    ];
    filters.extend((0..4).map(by_selectors));
    filters
}

async fn agents(server: &Server, answers: &mut Answers) {
    let mut client = AgentClient::new(uds_channel(server.socket()));
    let mut joined = Vec::new();
    for token in ["t-1", "t-2", "t-0", "t-3", "t-4"] {
        joined.push(Joined::new(server, token).await.id);
    }
    let token = |ttl, token: &str, path: &str| agents::CreateJoinTokenRequest {
        ttl,
        token: token.into(),
        agent_id: id("example.org", path).filter(|_| !path.is_empty()),
    };
    for request in [token(60, "again", "/alias"), token(60, "again", ""), token(60, "t-1", "")] {
        let answer = client.create_join_token(request.clone()).await;
        let answer = answer.map(|token| token.into_inner().value).unwrap_or_else(|status| {
            // A fault of its own in SPIRE's answer.
            refusal(&status).replace("Internal: failed to create token", "AlreadyExists: failed to create token")
        });
        answers.push((format!("{request:?}"), answer));
    }
    ask!(answers, client.ban_agent, agents::BanAgentRequest { id: Some(joined[1].clone()) });
    let masks = [
        Some(AgentMask { attestation_type: true, banned: true, can_reattest: true, ..AgentMask::default() }),
        Some(AgentMask { selectors: true, agent_version: true, ..AgentMask::default() }),
    ];
    for filter in agent_filters() {
        for (output_mask, page_size) in [(masks[0], 0), (masks[1], 2), (masks[0], 1_000)] {
            let what = format!("agents by {filter:?}, {page_size} a page");
            let (mut page_token, filter) = (String::new(), Some(filter.clone()));
            for n in 0..6 {
                let request = agents::ListAgentsRequest { filter: filter.clone(), output_mask, page_size, page_token };
                let answer = client.list_agents(request).await.expect("agents").into_inner();
                let mut all = answer.agents;
                if page_size == 0 {
                    in_order(&mut all);
                }
                answers.push((format!("{what}: {n}"), format!("{all:?}")));
                page_token = answer.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
        }
        let filter = Some(agents::count_agents_request::Filter {
            by_attestation_type: filter.by_attestation_type,
            by_banned: filter.by_banned,
            by_can_reattest: filter.by_can_reattest,
            by_selector_match: filter.by_selector_match,
            by_expires_before: filter.by_expires_before,
        });
        ask!(answers, client.count_agents, agents::CountAgentsRequest { filter });
    }
    for agent in joined {
        ask!(answers, client.delete_agent, agents::DeleteAgentRequest { id: Some(agent) });
    }
}

/// An authority's name stands for whether there is one.
fn slot(state: Option<&str>) -> bool {
    state.is_some_and(|id| !id.is_empty())
}

async fn authorities(server: &Server, answers: &mut Answers) {
    let mut client = LocalAuthorityClient::new(uds_channel(server.socket()));
    let authorities = async |client: &mut LocalAuthorityClient<Channel>| {
        let x509 = client.get_x509_authority_state(local::GetX509AuthorityStateRequest {}).await.expect("a state");
        let jwt = client.get_jwt_authority_state(local::GetJwtAuthorityStateRequest {}).await.expect("a state");
        let (x509, jwt) = (x509.into_inner(), jwt.into_inner());
        let of = |state: &Option<local::AuthorityState>| state.as_ref().map(|s| s.authority_id.clone());
        ([of(&x509.active), of(&x509.prepared), of(&x509.old)], [of(&jwt.active), of(&jwt.prepared), of(&jwt.old)])
    };
    for round in 0..2 {
        let prepared = client.prepare_x509_authority(local::PrepareX509AuthorityRequest {}).await;
        answers
            .push((format!("prepare {round}"), prepared.map(drop).map_err(|s| refusal(&s)).err().unwrap_or_default()));
        let prepared = client.prepare_jwt_authority(local::PrepareJwtAuthorityRequest {}).await;
        answers
            .push((format!("prepare {round}"), prepared.map(drop).map_err(|s| refusal(&s)).err().unwrap_or_default()));
        let (x509, jwt) = authorities(&mut client).await;
        answers.push(("there are".into(), format!("{:?}", x509.each_ref().map(|s| slot(s.as_deref())))));
        answers.push(("there are".into(), format!("{:?}", jwt.each_ref().map(|s| slot(s.as_deref())))));
        let authority_id = x509[1].clone().expect("one is prepared");
        let done = client.activate_x509_authority(local::ActivateX509AuthorityRequest { authority_id }).await;
        answers.push((format!("activate {round}"), done.map(drop).map_err(|s| refusal(&s)).err().unwrap_or_default()));
        let authority_id = jwt[1].clone().expect("one is prepared");
        let done = client.activate_jwt_authority(local::ActivateJwtAuthorityRequest { authority_id }).await;
        answers.push((format!("activate {round}"), done.map(drop).map_err(|s| refusal(&s)).err().unwrap_or_default()));
        let (x509, jwt) = authorities(&mut client).await;
        answers.push(("there are".into(), format!("{:?}", x509.each_ref().map(|s| slot(s.as_deref())))));
        let mut bundle = BundleClient::new(uds_channel(server.socket()));
        let taint = local::TaintX509AuthorityRequest { authority_id: x509[2].clone().expect("an old one") };
        client.taint_x509_authority(taint).await.map_err(|s| refusal(&s)).expect("it is tainted");
        let taint = local::TaintJwtAuthorityRequest { authority_id: jwt[2].clone().expect("an old one") };
        client.taint_jwt_authority(taint).await.map_err(|s| refusal(&s)).expect("it is tainted");
        let now = bundle.get_bundle(bundles::GetBundleRequest::default()).await.expect("a bundle").into_inner();
        let tainted = now.x509_authorities.iter().map(|a| a.tainted).collect::<Vec<_>>();
        let keys = now.jwt_authorities.iter().map(|a| a.tainted).collect::<Vec<_>>();
        answers.push(("tainted".into(), format!("{tainted:?} {keys:?}")));
        let revoke = local::RevokeX509AuthorityRequest { authority_id: x509[2].clone().expect("an old one") };
        client.revoke_x509_authority(revoke).await.map_err(|s| refusal(&s)).expect("it is revoked");
        let now = bundle.get_bundle(bundles::GetBundleRequest::default()).await.expect("a bundle").into_inner();
        answers.push(("left".into(), format!("{} {}", now.x509_authorities.len(), now.jwt_authorities.len())));
    }
}
