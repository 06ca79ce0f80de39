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
use std::sync::{Arc, Mutex};
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
    server.clock.advance(7);
    let info = DebugClient::new(server.local.clone()).get_info(GetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.agents_count, info.entries_count, info.federated_bundles_count, info.uptime), (1, 1, 1, 7));
    let ids: Vec<_> = info.svid_chain.iter().map(|c| c.id.clone().unwrap().path).collect();
    assert_eq!(ids, ["/spire/server", ""], "leaf and root");
    assert_eq!(info.svid_chain[0].subject, "O=SPIRE,C=US");
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
    server.attest_token(&token).await.unwrap();
    // The next turn is a second away; this call gives up earlier, which the server sees at once.
    let mut client = finial_proto::server::agent::agent_client::AgentClient::new(server.remote(None).await);
    let mut request = tonic::Request::new(tokio_stream::iter([first_step("join_token", b"x", b"y")]));
    request.set_timeout(std::time::Duration::from_millis(300));
    let mut answers = client.attest_agent(request).await.unwrap().into_inner();
    let message = refused(answers.message().await, Code::ResourceExhausted);
    assert_eq!(
        message,
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

/// Collects what is logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn all(&self) -> Vec<serde_json::Value> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The audit lines for a method.
    fn of(&self, method: &str) -> Vec<serde_json::Value> {
        self.all().into_iter().filter(|line| line["type"] == "audit" && line["method"] == method).collect()
    }

    /// The lines with this message.
    fn saying(&self, message: &str) -> Vec<serde_json::Value> {
        self.all().into_iter().filter(|line| line["msg"] == message).collect()
    }
}

#[tokio::test]
async fn the_audit_log_has_a_line_for_each_call_and_each_item() {
    use finial_proto::server::entry::{BatchDeleteEntryRequest, GetEntryRequest};
    let lines = Lines::default();
    let settings = finial_runtime::log::Settings {
        level: finial_runtime::log::Level::Info,
        format: finial_runtime::log::Format::Json,
        file: None,
        source_location: false,
    };
    let clock = Arc::new(finial_core::ManualClock::at(NOW));
    let (subscriber, _handle) = finial_runtime::log::with_writer(&settings, Box::new(lines.clone()), clock);
    let _guard = tracing::subscriber::set_default(subscriber);
    let server = Server::with(|settings| settings.audit_log_enabled = true).await;
    let agent = server.agent().await;
    let entry = server.create(vec![agent.entry("/a")]).await.remove(0);
    let missing = GetEntryRequest { id: "no-such".into(), output_mask: None };
    refused(server.entries().get_entry(missing).await, Code::NotFound);
    let ids = vec![entry.id.clone(), "no-such".into()];
    server.entries().batch_delete_entry(BatchDeleteEntryRequest { ids }).await.unwrap();

    // The ordinary lines are there too.
    let completed = lines.saying("Agent attestation request completed").remove(0);
    assert_eq!(
        (&completed["node_attestor_type"], &completed["service"]),
        (&"join_token".into(), &"agent.v1.Agent".into())
    );
    assert_eq!(completed["address"], completed["caller_addr"]);
    assert_eq!(lines.saying("Entry not found").len(), 2);

    let attest = lines.of("AttestAgent").remove(0);
    assert_eq!((attest["msg"].as_str(), attest["status"].as_str()), (Some("API accessed"), Some("success")));
    assert_eq!(attest["node_attestor_type"], "join_token");
    assert_eq!(attest["agent_id"], agent.identity.id.as_str());
    assert!(attest["caller_addr"].as_str().unwrap().starts_with("127.0.0.1:"));
    let get = lines.of("GetEntry").remove(0);
    assert_eq!(
        (&get["status"], &get["status_code"], &get["status_message"], &get["entry_id"]),
        (&"error".into(), &"NotFound".into(), &"entry not found".into(), &"no-such".into())
    );
    assert_eq!((&get["authorized_as"], &get["authorized_via"]), (&"local".into(), &"transport".into()));
    assert!(get["caller_uid"].is_string() && get["request_id"].as_str().unwrap().len() == 36);
    assert!(get["caller_path"].as_str().unwrap().contains("api"), "{get}");
    let deletes = lines.of("BatchDeleteEntry");
    assert_eq!(deletes.iter().map(|line| line["status"].as_str().unwrap()).collect::<Vec<_>>(), ["success", "error"]);
    assert_eq!(deletes[0]["request_id"], deletes[1]["request_id"], "one call");
    let created = lines.of("BatchCreateEntry").remove(0);
    assert_eq!(created["selectors"], "unix:uid:1000");
}

#[tokio::test]
async fn without_the_audit_log_there_are_no_such_lines() {
    let lines = Lines::default();
    let settings = finial_runtime::log::Settings {
        level: finial_runtime::log::Level::Info,
        format: finial_runtime::log::Format::Json,
        file: None,
        source_location: false,
    };
    let clock = Arc::new(finial_core::ManualClock::at(NOW));
    let (subscriber, _handle) = finial_runtime::log::with_writer(&settings, Box::new(lines.clone()), clock);
    let _guard = tracing::subscriber::set_default(subscriber);
    let server = Server::start().await;
    server.agent().await;
    assert_eq!(lines.of("AttestAgent"), [serde_json::Value::Null; 0]);
}

#[tokio::test]
async fn what_is_not_there_yet_is_not_left_out_silently() {
    let refused = Server::try_with(|settings| settings.require_pq_kem = true).await.map(drop).unwrap_err();
    let hint = "is not supported yet: remove it from the configuration to start without it";
    assert_eq!(refused.to_string(), format!("require_pq_kem {hint}"));
    let trusted = "10.0.0.0/8".to_owned();
    let refused = Server::try_with(|settings| settings.proxy_protocol_trusted_cidrs = vec![trusted]).await;
    assert_eq!(refused.map(drop).unwrap_err().to_string(), format!("proxy_protocol_trusted_cidrs {hint}"));
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
    assert!(error.starts_with(&format!("listen tcp {address}: ")), "{error}");
}
