//! What only the local socket offers, the socket itself, limits, and the audit log.

use crate::harness::*;
use finial_proto::health::HealthCheckRequest;
use finial_proto::health::health_check_response::ServingStatus;
use finial_proto::health::health_client::HealthClient;
use finial_proto::server::debug::GetInfoRequest;
use finial_proto::server::debug::debug_client::DebugClient;
use finial_proto::server::logger::logger_client::LoggerClient;
use finial_proto::server::logger::{GetLoggerRequest, SetLogLevelRequest};
use std::os::unix::fs::PermissionsExt;
use tonic::Code;

#[tokio::test]
async fn the_socket_is_for_owner_and_group() {
    let server = Server::start().await;
    let mode = std::fs::metadata(&server.running.socket_path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o770);
}

#[tokio::test]
async fn health_and_debug_answer() {
    let server = Server::start().await;
    let agent = server.agent().await;
    server.create(vec![agent.entry("/a")]).await;
    let mut health = HealthClient::new(server.local.clone());
    let status = health.check(HealthCheckRequest::default()).await.unwrap().into_inner().status;
    assert_eq!(status, i32::from(ServingStatus::Serving));
    let named = HealthCheckRequest { service: "x".into() };
    assert_eq!(refused(health.check(named).await, Code::InvalidArgument), "per-service health is not supported");
    let named = HealthCheckRequest { service: "x".into() };
    let watched = health.watch(named).await.unwrap().into_inner().message().await;
    assert_eq!(refused(watched, Code::InvalidArgument), "per-service health is not supported");
    let mut watched = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let first = watched.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);
    server.clock.advance(7);
    let info = DebugClient::new(server.local.clone()).get_info(GetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.agents_count, info.entries_count, info.federated_bundles_count, info.uptime), (1, 1, 1, 7));
    let ids: Vec<_> = info.svid_chain.iter().map(|c| c.id.clone().unwrap().path).collect();
    assert_eq!(ids, ["/spire/server", ""], "leaf and root");
    assert_eq!(info.svid_chain[0].subject, "O=SPIRE,C=US");
    server.supervisor.shutdown().trigger();
    assert_eq!(refused(watched.message().await, Code::Unavailable), "the server is shutting down");
}

#[tokio::test]
async fn log_levels_are_checked() {
    let server = Server::start().await;
    let mut logger = LoggerClient::new(server.local.clone());
    let set = logger.set_log_level(SetLogLevelRequest { new_level: 0 }).await;
    assert_eq!(refused(set, Code::InvalidArgument), "newLevel value cannot be LogLevel_UNSPECIFIED");
    let set = logger.set_log_level(SetLogLevelRequest { new_level: 99 }).await;
    assert_eq!(refused(set, Code::InvalidArgument), "unsupported log level");
    // This server shares its log with the test.
    refused(logger.get_logger(GetLoggerRequest {}).await, Code::Unimplemented);
}

#[tokio::test]
async fn attestation_is_limited_by_address_and_deadline() {
    let server = Server::with(|settings| settings.rate_limit.attestation = true).await;
    let token = server.token().await;
    // The next turn is a second away; this call gives up earlier, which the server sees at once.
    let mut client = finial_proto::server::agent::agent_client::AgentClient::new(server.remote(None).await);
    let mut request = tonic::Request::new(tokio_stream::iter([first_step("join_token", b"x", b"y")]));
    request.set_timeout(std::time::Duration::from_millis(300));
    let refusal = while_time_stands(async {
        server.attest_token(&token).await.unwrap();
        let mut answers = client.attest_agent(request).await.unwrap().into_inner();
        refused(answers.message().await, Code::ResourceExhausted)
    });
    assert_eq!(
        refusal.await,
        "rejecting request due to attest agent rate limiting: rate: Wait(n=1) would exceed context deadline"
    );
    // The local socket is never limited.
    for _ in 0..3 {
        server.token().await;
    }
}

#[tokio::test]
async fn signing_is_limited_by_batch() {
    use finial_proto::server::svid::*;
    let server = Server::with(|settings| settings.rate_limit.signing = true).await;
    let agent = server.agent().await;
    let params = vec![NewX509svidParams::default(); 501];
    let answer = agent.svids().batch_new_x509svid(BatchNewX509svidRequest { params }).await;
    let message = refused(answer, Code::ResourceExhausted);
    assert_eq!(
        message,
        "rejecting request due to certificate signing rate limiting: rate (501) exceeds burst size (500)"
    );
    let none = agent.svids().batch_new_x509svid(BatchNewX509svidRequest::default()).await;
    assert_eq!(refused(none, Code::InvalidArgument), "missing parameters");
}

#[tokio::test]
async fn shutdown_ends_open_connections_and_frees_the_data() {
    let server = Server::start().await;
    let agent = server.agent().await;
    agent.bundles().get_bundle(finial_proto::server::bundle::GetBundleRequest::default()).await.unwrap();
    let path = server.running.socket_path.clone();
    let server = server.restart(|_| {}).await;
    assert!(path.exists());
    drop(server);
}

#[tokio::test]
async fn the_audit_log_has_a_line_for_each_call_and_each_item() {
    use finial_proto::server::entry::{BatchDeleteEntryRequest, GetEntryRequest};
    let server = Server::with(|settings| settings.audit_log_enabled = true).await;
    let agent = server.agent().await;
    let agent_id = agent.identity.id.as_str();
    let entry = server.create(vec![agent.entry("/a")]).await.remove(0);
    let unique = format!("no-such-{}", entry.id);
    let missing = GetEntryRequest { id: unique.clone(), output_mask: None };
    refused(server.entries().get_entry(missing).await, Code::NotFound);
    let ids = vec![entry.id.clone(), unique.clone()];
    server.entries().batch_delete_entry(BatchDeleteEntryRequest { ids }).await.unwrap();

    // The ordinary lines are there too.
    let completed = logged("Agent attestation request completed", "agent_id", agent_id).remove(0);
    assert_eq!(
        (&completed["node_attestor_type"], &completed["service"]),
        (&"join_token".into(), &"agent.v1.Agent".into())
    );
    assert_eq!(completed["address"], completed["caller_addr"]);
    assert_eq!(logged("Entry not found", "entry_id", &unique).len(), 2);

    let attest = logged("API accessed", "agent_id", agent_id).remove(0);
    assert_eq!((&attest["type"], &attest["status"]), (&"audit".into(), &"success".into()));
    assert_eq!((&attest["method"], &attest["node_attestor_type"]), (&"AttestAgent".into(), &"join_token".into()));
    assert!(attest["caller_addr"].as_str().unwrap().starts_with("127.0.0.1:"));
    let [get, delete_missing] = logged("API accessed", "entry_id", &unique).try_into().unwrap();
    assert_eq!(
        (&get["method"], &get["status"], &get["status_code"], &get["status_message"]),
        (&"GetEntry".into(), &"error".into(), &5.into(), &"entry not found".into())
    );
    assert_eq!((&get["authorized_as"], &get["authorized_via"]), (&"local".into(), &"transport".into()));
    assert!(get["caller_uid"].is_number() && get["request_id"].as_str().unwrap().len() == 36);
    assert!(get["caller_path"].as_str().unwrap().contains("api"), "{get}");
    let delete = logged("API accessed", "entry_id", &entry.id).remove(0);
    assert_eq!((&delete["method"], &delete["status"]), (&"BatchDeleteEntry".into(), &"success".into()));
    assert_eq!(delete_missing["status"], "error");
    assert_eq!(delete["request_id"], delete_missing["request_id"], "one call");
    let created = logged("API accessed", "parent_id", agent_id).remove(0);
    assert_eq!((&created["method"], &created["selectors"]), (&"BatchCreateEntry".into(), &"unix:uid:1000".into()));
}

#[tokio::test]
async fn without_the_audit_log_there_are_no_such_lines() {
    let server = Server::start().await;
    let agent = server.agent().await;
    assert!(logged("API accessed", "agent_id", agent.identity.id.as_str()).is_empty());
    assert_eq!(logged("Agent attestation request completed", "agent_id", agent.identity.id.as_str()).len(), 1);
}

#[tokio::test]
async fn a_second_server_on_the_same_data_is_refused() {
    let server = Server::start().await;
    let again = Server::on(server.folder.clone(), server.clock.clone(), server.keys.clone(), |settings| {
        settings.socket_path = settings.data_dir.join("other.sock");
    });
    let error = again.await.map(drop).unwrap_err().to_string();
    assert!(error.contains("in use by another process") && error.contains("datastore.sqlite3"), "{error}");
    server.agent().await;
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let server = Server::start().await;
    let address = server.running.address;
    let error = Server::try_with(|settings| settings.bind_address = address).await.map(drop).unwrap_err().to_string();
    assert!(error.starts_with(&format!("listen tcp {address}: bind: address already in use; stop what")), "{error}");
}

#[tokio::test]
async fn services_that_are_not_there_are_named() {
    let server = Server::start().await;
    let mut missing = DebugClient::new(server.remote(None).await);
    let message = refused(missing.get_info(GetInfoRequest {}).await, Code::Unimplemented);
    assert_eq!(message, "unknown service spire.api.server.debug.v1.Debug");
}
