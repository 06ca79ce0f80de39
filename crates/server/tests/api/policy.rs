//! A policy of the operator's own, in place of the method table.

use crate::authorization::every_row_holds;
use crate::harness::*;
use finial_config::{PolicySettings, ServerSettings};
use finial_proto::server::agent::{CountAgentsRequest, ListAgentsRequest, agent_client::AgentClient};
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::server::entry::{BatchCreateEntryRequest, BatchDeleteEntryRequest, CountEntriesRequest};
use finial_server::StartError;
use serde_json::json;
use std::path::{Path, PathBuf};
use tonic::Code;

/// Passes the verdicts on under SPIRE's names; nothing is allowed unless a rule says so.
const HEAD: &str = r#"
package spire

result := {
    "allow": allow, "allow_if_admin": admin, "allow_if_local": local_, "allow_if_downstream": downstream,
    "allow_if_agent": agent,
}

default allow := false
default admin := false
default local_ := false
default downstream := false
default agent := false
"#;

/// Follows a list of methods in the data, as SPIRE's default policy does.
const BY_LIST: &str = r#"
may(whom) if {
    some api in data.apis
    api.full_method == input.full_method
    whom in api.to
}
allow if may("*")
local_ if may("L")
admin if may("A")
downstream if may("D")
agent if may("G")
"#;

/// To whom SPIRE's default policy allows what.
fn apis() -> serde_json::Value {
    let lines = include_str!("policy_matrix.txt").lines().filter(|line| !line.starts_with('#'));
    let apis: Vec<serde_json::Value> = lines
        .flat_map(|line| {
            let mut words = line.split(' ');
            let (to, service) = (words.next().unwrap(), words.next().unwrap());
            let to: Vec<String> = to.chars().map(String::from).collect();
            words.map(move |method| json!({"full_method": format!("/{service}/{method}"), "to": to}))
        })
        .collect();
    assert_eq!(apis.len(), 65);
    json!({ "apis": apis })
}

fn write(folder: &Path, rules: &str, data: &serde_json::Value) -> PolicySettings {
    let (rego_path, data_path) = (folder.join("policy.rego"), folder.join("data.json"));
    std::fs::write(&rego_path, format!("{HEAD}\n{rules}")).unwrap();
    std::fs::write(&data_path, data.to_string()).unwrap();
    PolicySettings { rego_path, data_path: Some(data_path) }
}

fn with_policy(rules: &str, data: serde_json::Value) -> impl FnOnce(&mut ServerSettings) {
    let rules = rules.to_owned();
    move |settings| settings.policy = Some(write(&settings.data_dir, &rules, &data))
}

/// The same verdict for every method and every kind of caller, by the policy as by the table.
#[tokio::test]
async fn spires_default_policy_is_our_table() {
    every_row_holds(with_policy(BY_LIST, apis())).await;
}

/// The policy and its data as SPIRE 1.15.3 carries them within it. `None` where nobody promised them; a promise
/// (`FINIAL_REAL_SPIRE`, which `./test` sets) that is not kept fails.
#[allow(clippy::print_stderr)]
fn of_spire() -> Option<PolicySettings> {
    let promised = std::env::var_os("FINIAL_REAL_SPIRE").map(PathBuf::from);
    let folder = match &promised {
        Some(folder) => folder.clone(),
        None => Path::new(&std::env::var_os("HOME")?).join(".cache/finial/spire-1.15.3"),
    };
    let (rego_path, data_path) = (folder.join("policy.rego"), folder.join("policy_data.json"));
    let there = rego_path.exists() && data_path.exists();
    assert!(there || promised.is_none(), "no policy in {}: run tests/real-spire/build.sh", folder.display());
    if !there {
        eprintln!("SKIPPED: no policy of SPIRE's in {}", folder.display());
    }
    there.then_some(PolicySettings { rego_path, data_path: Some(data_path) })
}

/// SPIRE's own two files, word for word: they are evaluated as they are, and their verdicts are the table's.
#[tokio::test]
async fn spires_own_policy_files_give_the_tables_verdicts() {
    let Some(policy) = of_spire() else { return };
    let data: serde_json::Value =
        serde_json::from_slice(&std::fs::read(policy.data_path.as_ref().unwrap()).unwrap()).unwrap();
    assert_eq!(data["apis"].as_array().unwrap().len(), 65);
    every_row_holds(|settings| settings.policy = Some(policy)).await;
}

#[tokio::test]
async fn a_policy_reads_requests_and_callers() {
    let rules = r#"
        local_ if input.full_method != "/spire.api.server.entry.v1.Entry/BatchDeleteEntry"
        allow if {
            input.full_method == "/spire.api.server.entry.v1.Entry/BatchCreateEntry"
            some team in data.teams
            team.caller == input.caller
            every entry in input.req.entries { startswith(entry.spiffe_id.path, team.prefix) }
        }
        allow if input.full_method == "/spire.api.server.agent.v1.Agent/CountAgents"
        allow if {
            input.full_method == "/spire.api.server.agent.v1.Agent/ListAgents"
            endswith(input.caller_file_path, "/registrar")
        }"#;
    let data = json!({"teams": [{"caller": "spiffe://example.org/finance", "prefix": "/finance/"}]});
    let server = Server::with(with_policy(rules, data)).await;
    server.create(vec![entry("/a", "/nobody", &["unix:uid:0"])]).await;

    let denied = server.entries().batch_delete_entry(BatchDeleteEntryRequest::default()).await;
    let message = refused(denied, Code::PermissionDenied);
    assert_eq!(message, "authorization denied for method /spire.api.server.entry.v1.Entry/BatchDeleteEntry");
    refused(
        AgentClient::new(server.remote(None).await).list_agents(ListAgentsRequest::default()).await,
        Code::PermissionDenied,
    );

    let finance = server.mint("/finance").await;
    let mut client = EntryClient::new(server.remote(Some(&finance)).await);
    let create = |path: &str| BatchCreateEntryRequest {
        entries: vec![entry(path, "/nobody", &["unix:uid:1"])],
        output_mask: None,
    };
    client.batch_create_entry(create("/finance/app")).await.unwrap();
    refused(client.batch_create_entry(create("/hr/app")).await, Code::PermissionDenied);
    refused(client.count_entries(CountEntriesRequest::default()).await, Code::PermissionDenied);

    // What is for everyone is for those without a certificate too, though the table would turn them away unread.
    let mut stranger = AgentClient::new(server.remote(None).await);
    stranger.count_agents(CountAgentsRequest::default()).await.unwrap();
}

/// Like SPIRE, with the code of an error that is none of gRPC's; nobody gets in by breaking the policy.
#[tokio::test]
async fn who_gets_no_answer_from_the_policy_is_refused() {
    let rules = r#"
        local_ if true
        allow if input.caller == "spiffe://example.org/odd"
        allow := "perhaps" if input.caller == "spiffe://example.org/odd""#;
    let server = Server::with(with_policy(rules, json!({}))).await;
    let count = |channel| async move { AgentClient::new(channel).count_agents(CountAgentsRequest::default()).await };
    let odd = server.mint("/odd").await;
    refused(count(server.remote(Some(&odd)).await).await, Code::Unknown);
    refused(count(server.remote(None).await).await, Code::PermissionDenied);
    count(server.local.clone()).await.unwrap();
}

#[tokio::test]
async fn a_bad_policy_keeps_the_server_from_starting() {
    let start = |rules: &'static str| Server::try_with(with_policy(rules, json!({})));
    let Err(error @ StartError::Policy(_)) = start("allow := {").await else { panic!("starts") };
    assert!(error.to_string().starts_with("unable to obtain authpolicy engine: "), "{error}");
    let missing = PolicySettings { rego_path: "/nonexistent.rego".into(), data_path: None };
    let Err(error) = Server::try_with(|settings| settings.policy = Some(missing)).await else { panic!("starts") };
    assert_eq!(
        error.to_string(),
        "unable to obtain authpolicy engine: open /nonexistent.rego: no such file or directory"
    );
}
