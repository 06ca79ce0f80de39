//! The audit log: the same calls at the real SPIRE and at Finial leave the same lines, field for field and, in JSON, type
//! for type.

use finial_net::client::uds_channel;
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::{self as agents};
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::bundle::{self as bundles};
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::server::entry::{self as entries};
use finial_proto::server::logger::logger_client::LoggerClient;
use finial_proto::server::logger::{ResetLogLevelRequest, SetLogLevelRequest};
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::server::svid::{self as svids};
use finial_proto::types::{self, Selector, SelectorMatch, Spiffeid};
use serde_json::Value;
use testkit::Flavor::{Finial, Spire};
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, eventually};

fn id(path: &str) -> Option<Spiffeid> {
    Some(Spiffeid { trust_domain: "example.org".into(), path: path.into() })
}

fn selector() -> Selector {
    Selector { r#type: "unix".into(), value: "uid:1".into() }
}

async fn entries(server: &Server) {
    let mut client = EntryClient::new(uds_channel(server.socket()));
    let full = types::Entry {
        id: "full".into(),
        spiffe_id: id("/full"),
        parent_id: id("/parent"),
        selectors: vec![selector(), Selector { r#type: "unix".into(), value: "gid:1".into() }],
        x509_svid_ttl: 60,
        jwt_svid_ttl: 30,
        federates_with: vec!["other.test".into()],
        admin: true,
        downstream: true,
        expires_at: 4_000_000_000,
        dns_names: vec!["a.test".into(), "b.test".into()],
        hint: "5".into(),
        ..Default::default()
    };
    let plain = types::Entry {
        id: "plain".into(),
        spiffe_id: id("/plain"),
        parent_id: id("/parent"),
        selectors: vec![selector()],
        ..Default::default()
    };
    let create = vec![full.clone(), plain.clone(), plain.clone(), types::Entry::default()];
    let _ = client.batch_create_entry(entries::BatchCreateEntryRequest { entries: create, output_mask: None }).await;
    let mask = types::EntryMask { hint: true, x509_svid_ttl: true, admin: true, ..Default::default() };
    for (entry, input_mask) in [(full.clone(), Some(mask)), (plain, None), (types::Entry::default(), None)] {
        let request = entries::BatchUpdateEntryRequest { entries: vec![entry], input_mask, output_mask: None };
        let _ = client.batch_update_entry(request).await;
    }
    for id in ["full", "none", ""] {
        let _ = client.get_entry(entries::GetEntryRequest { id: id.into(), output_mask: None }).await;
    }
    let by_selectors = Some(SelectorMatch { selectors: vec![selector()], r#match: 1 });
    let by_federates_with = Some(types::FederatesWithMatch { trust_domains: vec!["other.test".into()], r#match: 2 });
    let filter = entries::list_entries_request::Filter {
        by_spiffe_id: id("/full"),
        by_parent_id: id("/parent"),
        by_selectors,
        by_federates_with,
        by_hint: Some("h".into()),
        ..Default::default()
    };
    for filter in [None, Some(filter)] {
        let _ = client.list_entries(entries::ListEntriesRequest { filter, ..Default::default() }).await;
    }
    let _ = client.count_entries(entries::CountEntriesRequest::default()).await;
    let ids = vec!["plain".into(), "none".into(), String::new()];
    let _ = client.batch_delete_entry(entries::BatchDeleteEntryRequest { ids }).await;
}

async fn agents(server: &Server) {
    let mut client = AgentClient::new(uds_channel(server.socket()));
    let token = |ttl, agent_id| agents::CreateJoinTokenRequest { ttl, token: "1234-token".into(), agent_id };
    for request in [token(60, id("/token")), token(0, None), token(60, id("bad"))] {
        let _ = client.create_join_token(request).await;
    }
    for agent in [id("/spire/agent/join_token/none"), id("/x"), None] {
        let _ = client.get_agent(agents::GetAgentRequest { id: agent.clone(), output_mask: None }).await;
        let _ = client.ban_agent(agents::BanAgentRequest { id: agent.clone() }).await;
        let _ = client.delete_agent(agents::DeleteAgentRequest { id: agent }).await;
    }
    let by_selector_match = Some(SelectorMatch { selectors: vec![selector()], r#match: 0 });
    let filter = agents::list_agents_request::Filter {
        by_banned: Some(false),
        by_can_reattest: Some(true),
        by_attestation_type: "join_token".into(),
        by_selector_match,
        ..Default::default()
    };
    for filter in [None, Some(filter)] {
        let _ = client.list_agents(agents::ListAgentsRequest { filter, ..Default::default() }).await;
    }
    let _ = client.count_agents(agents::CountAgentsRequest::default()).await;
}

async fn others(server: &Server) {
    let mut client = BundleClient::new(uds_channel(server.socket()));
    let _ = client.get_bundle(bundles::GetBundleRequest::default()).await;
    let _ = client.count_bundles(bundles::CountBundlesRequest::default()).await;
    let other = |refresh_hint| types::Bundle {
        trust_domain: "other.test".into(),
        refresh_hint,
        sequence_number: 3,
        ..Default::default()
    };
    for hint in [60, 61] {
        let bundle = vec![other(hint)];
        let _ = client
            .batch_set_federated_bundle(bundles::BatchSetFederatedBundleRequest { bundle, output_mask: None })
            .await;
    }
    for trust_domain in ["other.test", "none.test", ""] {
        let trust_domain = trust_domain.to_owned();
        let _ =
            client.get_federated_bundle(bundles::GetFederatedBundleRequest { trust_domain, output_mask: None }).await;
    }
    entries(server).await;
    let trust_domains = vec!["other.test".into(), "none.test".into()];
    for mode in [0, 2] {
        let trust_domains = trust_domains.clone();
        let _ = client
            .batch_delete_federated_bundle(bundles::BatchDeleteFederatedBundleRequest { trust_domains, mode })
            .await;
    }
    let mut client = SvidClient::new(uds_channel(server.socket()));
    for audience in [vec!["a".into(), "b".into()], vec![]] {
        let _ = client.mint_jwtsvid(svids::MintJwtsvidRequest { id: id("/minted"), audience, ttl: 60 }).await;
    }
    let _ = client.mint_x509svid(svids::MintX509svidRequest { csr: "x".into(), ttl: 5 }).await;
    let mut client = LoggerClient::new(uds_channel(server.socket()));
    let _ = client.set_log_level(SetLogLevelRequest { new_level: 5 }).await;
    let _ = client.reset_log_level(ResetLogLevelRequest {}).await;
}

/// The audit lines, in order, without what differs from run to run.
fn lines(flavor: Flavor) -> Vec<Value> {
    let options =
        ServerOptions { server: "audit_log_enabled = true\n log_format = \"JSON\"".into(), ..Default::default() };
    let server = Server::start(flavor, &options);
    let before = server.process.log().len();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        others(&server).await;
        agents(&server).await;
    });
    let agent = Agent::start(Spire, &server, &AgentOptions::default());
    let attested = |line: &Value| line["method"] == "AttestAgent";
    let all = eventually("the agent has attested", || {
        let log = server.process.log();
        // The last line may still be on its way.
        let whole = log[before..].rsplit_once('\n').map_or("", |(whole, _)| whole);
        let all = whole.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let all: Vec<Value> = all.filter(|line| line["msg"] == "API accessed").collect();
        if all.iter().any(attested) { Ok(all) } else { Err(format!("{} lines", all.len())) }
    });
    drop(agent);
    // What the agent does after that, and the health checks of commands, come in any order.
    let end = all.iter().position(attested).unwrap();
    let ours = |line: &&Value| attested(line) || line.get("caller_uid").is_some();
    all[..=end].iter().filter(ours).filter(|l| l["method"] != "Check").map(plain).collect()
}

/// With the types of values that differ from run to run in their place.
fn plain(line: &Value) -> Value {
    let mut line = line.clone();
    // The words of Go's parser, after SPIRE's own.
    if let Some((known, _)) = line["status_message"].as_str().and_then(|said| said.split_once("malformed CSR: ")) {
        line["status_message"] = format!("{known}malformed CSR").into();
    }
    for (name, value) in line.as_object_mut().unwrap() {
        let varies = matches!(
            name.as_str(),
            "time" | "request_id" | "caller_path" | "caller_addr" | "agent_id" | "created_at" | "csr" | "expires_at"
        );
        if varies {
            *value = match &*value {
                Value::String(_) => "a text".into(),
                Value::Number(_) => "a number".into(),
                other => other.to_string().into(),
            };
        }
    }
    line
}

#[test]
fn the_same_calls_leave_the_same_audit_lines() {
    let (theirs, ours) = (lines(Spire), lines(Finial));
    let mut differences = Vec::new();
    for (number, theirs) in theirs.iter().enumerate() {
        match ours.get(number) {
            Some(ours) if ours == theirs => {}
            ours => differences.push(format!(" SPIRE: {theirs}\nFinial: {}", ours.unwrap_or(&Value::Null))),
        }
    }
    assert!(differences.is_empty(), "{} lines differ:\n{}", differences.len(), differences.join("\n"));
    assert_eq!(theirs.len(), ours.len());
    assert!(theirs.len() > 40, "only {} lines", theirs.len());
}
