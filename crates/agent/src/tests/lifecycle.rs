//! The agent's own identity: attesting, renewing, being refused, ending and coming back.

use super::harness::{StandsStill, World, next, until, within};
use finial_proto::agent::debug::{GetInfoRequest, debug_client::DebugClient};
use finial_proto::agent::delegatedidentity::delegated_identity_client::DelegatedIdentityClient;
use finial_proto::types::permission_denied_details::Reason;

fn data(world: &World) -> String {
    std::fs::read_to_string(world.dir.path().join("data/agent-data.json")).unwrap()
}

#[tokio::test]
async fn a_restarted_agent_uses_its_svid_again() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    agent.stop().await;
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    assert_eq!(world.server.calls("AttestAgent"), 1);
    assert_eq!(world.server.state().serials.len(), 1);
    agent.stop().await;
}

#[tokio::test]
async fn an_attestor_with_challenges_works() {
    let mut world = World::new().await;
    world.puzzle = true;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    agent.stop().await;
}

#[tokio::test]
async fn insecure_bootstrap_believes_the_first_server_and_keeps_its_bundle() {
    let mut world = World::new().await;
    world.settings.bootstrap = finial_config::Bootstrap::Insecure;
    let agent = world.started().await;
    agent.stop().await;
    assert!(data(&world).contains("\"bundle\":[\""));
}

#[tokio::test]
async fn an_svid_is_renewed_with_a_new_key_and_used_at_once() {
    let world = World::new().await;
    world.server.state().agent_ttl = 2; // past its half-life at once
    let agent = world.start();
    until("the agent renewed", || world.server.calls("RenewAgent") > 0).await;
    until("the new SVID is presented", || world.server.state().serials.len() > 1).await;
    assert_eq!(world.server.calls("AttestAgent"), 1);
    let kept = data(&world);
    agent.stop().await;
    assert!(kept.contains("\"svid\":[\""));
    // and a restart goes on with it
    let agent = world.started().await;
    assert_eq!(world.server.calls("AttestAgent"), 1);
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_may_attests_again_instead_of_renewing() {
    let mut world = World::new().await;
    world.puzzle = true;
    {
        let mut state = world.server.state();
        state.reattestable = true;
        state.agent_ttl = 2;
    }
    let agent = world.start();
    until("the agent attested again", || world.server.calls("AttestAgent") > 1).await;
    assert_eq!(world.server.calls("RenewAgent"), 0);
    agent.stop().await;
}

#[tokio::test]
async fn a_banned_agent_drops_its_svid_and_ends() {
    let world = World::new().await;
    let agent = world.started().await;
    world.server.state().refuse = Some(Reason::AgentBanned);
    let error = agent.failure().await;
    assert_eq!(error.kind(), finial_core::ErrorKind::Denied);
    assert!(error.to_string().contains("agent is refused"), "{error}");
    assert!(data(&world).contains("\"svid\":null"));
}

#[tokio::test]
async fn an_evicted_agent_ends_or_attests_again_if_it_may() {
    let world = World::new().await;
    let agent = world.started().await;
    world.server.state().refuse = Some(Reason::AgentNotAttested);
    agent.failure().await;
    assert!(data(&world).contains("\"svid\":null"));

    let mut world = World::new().await;
    world.puzzle = true;
    world.server.state().reattestable = true;
    let agent = world.started().await;
    world.server.state().refuse = Some(Reason::AgentNotAttested);
    until("it attests again", || world.server.calls("AttestAgent") > 1).await;
    world.server.state().refuse = None;
    let syncs = world.server.calls("SyncAuthorizedEntries");
    until("it syncs again", || world.server.calls("SyncAuthorizedEntries") > syncs + 1).await;
    assert!(!agent.has_ended());
    agent.stop().await;
}

#[tokio::test]
async fn a_refusal_at_start_drops_the_svid_so_that_the_next_start_attests() {
    let world = World::new().await;
    world.started().await.stop().await;
    world.server.state().refuse = Some(Reason::AgentNotActive);
    world.start().failure().await;
    world.server.state().refuse = None;
    let agent = world.started().await;
    assert_eq!(world.server.calls("AttestAgent"), 2);
    agent.stop().await;
}

#[tokio::test]
async fn a_stop_while_attesting_is_no_failure() {
    let world = World::new().await;
    world.server.state().away = true;
    let agent = world.start();
    until("it has tried", || world.server.calls("AttestAgent") > 0).await;
    agent.stop().await;
}

#[tokio::test]
async fn open_streams_end_when_the_agent_does() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut stream = agent.x509().await.unwrap();
    next(&mut stream).await.unwrap();
    // So that no one waits for the drain to end.
    let _still = StandsStill::begin();
    agent.stop().await;
    assert_eq!(within(stream.message()).await.unwrap_err().code(), tonic::Code::Unavailable);
}

#[tokio::test]
async fn the_admin_socket_tells_what_is_in_the_cache() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    let socket = world.settings.admin_socket_path.clone().unwrap();
    let mut debug = DebugClient::new(finial_net::client::uds_channel(socket));
    let info = debug.get_info(GetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.cached_x509_svids_count, info.cached_jwt_svids_count), (1, 0));
    assert_eq!(info.svid_chain.len(), 2, "up to the root");
    assert_eq!(info.svid_chain[0].id.as_ref().unwrap().path, "/spire/agent/join_token/1");
    assert!(info.last_sync_success > 0);
    agent.stop().await;
}

#[tokio::test]
async fn a_server_that_hangs_does_not_hold_up_the_end() {
    let world = World::new().await;
    let agent = world.started().await;
    world.server.state().hangs = true;
    let syncs = world.server.calls("SyncAuthorizedEntries");
    until("a sync hangs", || world.server.calls("SyncAuthorizedEntries") > syncs).await;
    let _still = StandsStill::begin();
    agent.stop().await;
}

#[tokio::test]
async fn metrics_have_spires_names() {
    let mut world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let prometheus = finial_config::PrometheusSettings { host: "127.0.0.1".into(), port, tls: None };
    world.settings.telemetry.prometheus = Some(prometheus);
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    let admin = finial_net::client::uds_channel(world.settings.admin_socket_path.clone().unwrap());
    DebugClient::new(admin.clone()).get_info(GetInfoRequest {}).await.unwrap();
    let mut delegated = DelegatedIdentityClient::new(admin);
    let delegated = delegated.subscribe_to_x509svi_ds(tonic::Request::new(Default::default())).await;
    assert_eq!(delegated.unwrap_err().code(), tonic::Code::PermissionDenied);
    let fetch = async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut http = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        http.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut text = String::new();
        http.read_to_string(&mut text).await.unwrap();
        text
    };
    let text = within(fetch).await;
    for name in [
        "spire_agent_started",
        "spire_agent_bootstrapped 1",
        "spire_agent_node_attestor_new_svid{status=\"OK\"} 1",
        "spire_agent_lru_cache_svid_map_size 1",
        "spire_agent_lru_cache_entry_add",
        "spire_agent_sync_entries_total 1",
        "spire_agent_sync_bundles_total 1",
        "spire_agent_manager_sync_fetch_entries_updates{status=\"OK\"}",
        "spire_agent_workload_api_workload_attestation",
        "spire_agent_debug_api_connection 1",
        "spire_agent_rpc_debug_get_info{status=\"OK\"} 1",
        "spire_agent_delegated_identity_api_connection 1",
        "spire_agent_delegated_identity_api_connections 0",
        "spire_agent_rpc_delegated_identity_subscribe_to_x509_svids{status=\"PermissionDenied\"} 1",
    ] {
        assert!(text.lines().any(|line| line.starts_with(name)), "{name} is not in\n{text}");
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_damaged_data_file_is_named_and_nothing_is_overwritten() {
    let world = World::new().await;
    std::fs::create_dir_all(&world.settings.data_dir).unwrap();
    let file = world.settings.data_dir.join("agent-data.json");
    std::fs::write(&file, "{\"svid\": [").unwrap();
    let error = world.start().failure().await.to_string();
    assert!(error.starts_with("failed to open storage: failed to unmarshal data: "), "{error}");
    assert!(error.contains("agent-data.json") && error.contains("line 1 column"), "{error}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "{\"svid\": [");
}

#[tokio::test]
async fn a_missing_bootstrap_bundle_is_waited_for_and_a_stop_meanwhile_is_no_failure() {
    let mut world = World::new().await;
    world.settings.bootstrap = finial_config::Bootstrap::Path("/no/such/bundle.pem".into());
    let agent = world.start();
    until("it has begun", || world.settings.data_dir.exists()).await;
    agent.stop().await;
    assert_eq!(world.server.calls("AttestAgent"), 0);
}
