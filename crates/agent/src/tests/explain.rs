//! Why a process has its identities: asked on the admin socket.

use super::harness::{World, until};
use finial_net::client::uds_channel;
use finial_proto::agent::explain::explain_client::ExplainClient;
use finial_proto::agent::explain::{ExplainProcessRequest, ExplainProcessResponse, State};
use tonic::{Code, Status};

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap()
}

async fn ask(world: &World, pid: i32) -> Result<ExplainProcessResponse, Status> {
    let socket = world.settings.admin_socket_path.clone().unwrap();
    let mut client = ExplainClient::new(uds_channel(socket));
    client.explain_process(ExplainProcessRequest { pid }).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn a_process_with_an_identity_hears_which_entry_gives_it_and_until_when() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    world.entry("e2", "/other", &["test:any", "test:exe:other"]);
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    let answer = ask(&world, own_pid()).await.unwrap();
    assert_eq!(answer.verdict, "Served: 1 identity");
    assert_eq!((answer.pid, answer.uid), (own_pid(), rustix::process::geteuid().as_raw()));
    assert_eq!(answer.agent_id.as_ref().unwrap().path, "/spire/agent/join_token/1");
    assert_eq!((answer.entry_count, answer.attestors[0].name.as_str()), (2, "test"));
    let found: Vec<_> = answer.attestors[0].selectors.iter().map(|s| s.value.as_str()).collect();
    assert_eq!(found, ["any", "exe:finial_agent"]);
    let identity = &answer.identities[0];
    assert_eq!((identity.entry_id.as_str(), identity.state()), ("e1", State::Issued));
    assert!(identity.expires_at > world.clock.now() && identity.reason.is_empty());
    let near = &answer.nearest[0];
    assert_eq!((near.entry_id.as_str(), near.present, near.missing.len()), ("e2", 1, 1));
    assert_eq!(near.missing[0].found[0].value, "exe:finial_agent");
    assert!(answer.hints.is_empty(), "{:?}", answer.hints);
    agent.stop().await;
}

#[tokio::test]
async fn a_process_without_one_hears_what_came_nearest_and_which_command_changes_it() {
    let world = World::new().await;
    let agent = world.started().await;
    let answer = ask(&world, own_pid()).await.unwrap();
    assert_eq!(answer.verdict, "Refused: no entry fits (PermissionDenied: no identity issued)");
    assert!(answer.hints[0].starts_with("this agent has no entries at all"), "{:?}", answer.hints);
    assert!(answer.hints[0].contains("entry create -parentID spiffe://td/spire/agent/join_token/1"));

    world.entry("e1", "/web", &["test:exe:web", "nosuch:thing"]);
    let mut answer = answer;
    while answer.entry_count == 0 {
        answer = ask(&world, own_pid()).await.unwrap();
    }
    let missing = &answer.nearest[0].missing;
    assert_eq!(missing[0].reason, "this agent has no such attestor");
    assert_eq!(missing[1].found[0].value, "exe:finial_agent");
    assert!(answer.hints[0].contains("entry show -entryID e1"), "{:?}", answer.hints);
    agent.stop().await;
}

#[tokio::test]
async fn failed_attestation_a_refusing_server_and_one_that_is_away_are_told() {
    let world = World::new().await;
    let agent = world.started().await;
    *world.attestor.fail.lock().unwrap() = true;
    let answer = ask(&world, own_pid()).await.unwrap();
    assert!(answer.verdict.starts_with("Refused: every attestor failed"), "{}", answer.verdict);
    assert!(answer.attestors[0].error.contains("broken"), "{:?}", answer.attestors);
    *world.attestor.fail.lock().unwrap() = false;

    // What it issues is for someone else.
    world.server.state().issue_as = Some("/elsewhere".into());
    world.entry("e1", "/web", &["test:any"]);
    until("the agent has asked", || world.server.calls("BatchNewX509SVID") > 0).await;
    let mut reason = String::new();
    while !reason.starts_with("the server did not issue it") {
        let answer = ask(&world, own_pid()).await.unwrap();
        reason = answer.identities.first().map(|one| one.reason.clone()).unwrap_or_default();
    }
    assert!(reason.ends_with("its answer cannot be used: certificate is for spiffe://td/elsewhere"), "{reason}");

    world.server.state().away = true;
    let mut answer = ask(&world, own_pid()).await.unwrap();
    while answer.server_error.is_empty() {
        answer = ask(&world, own_pid()).await.unwrap();
    }
    assert!(answer.server_error.contains("away"), "{}", answer.server_error);
    assert!(answer.hints.iter().any(|hint| hint.contains("its server cannot be asked")), "{:?}", answer.hints);
    agent.stop().await;
}

#[tokio::test]
async fn no_such_process_and_no_such_service_on_the_public_socket() {
    let world = World::new().await;
    let agent = world.started().await;
    for pid in [0, -1, i32::MAX] {
        assert_eq!(ask(&world, pid).await.unwrap_err().code(), Code::NotFound);
    }
    let mut public = ExplainClient::new(uds_channel(&agent.socket));
    let refused = public.explain_process(ExplainProcessRequest { pid: own_pid() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    agent.stop().await;
}
