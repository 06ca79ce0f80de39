//! Workloads that come before their entry, where they may wait for it. They are processes of their own, as the agent itself
//! never waits.

use super::fake::wire_entry;
use super::harness::{Running, StandsStill, World, secure, until, within};
use super::sds::{asked, words};
use finial_config::WaitForEntry;
use finial_net::client::uds_channel;
use finial_proto::envoy::secret::secret_discovery_service_client::SecretDiscoveryServiceClient;
use finial_proto::sync::WatchResponse;
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::*;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Not a test by itself: the process that other tests start. It makes the calls that it is told at the same time, on one
/// connection, and says what came of each.
#[tokio::test]
async fn workload_process() {
    let (Ok(socket), Ok(calls)) = (std::env::var("FINIAL_TEST_SOCKET"), std::env::var("FINIAL_TEST_CALLS")) else {
        return;
    };
    let channel = uds_channel(socket);
    let made = calls.split(' ').map(|call| {
        let channel = channel.clone();
        async move {
            match make(channel, call).await {
                Ok(got) => println!("\nRESULT {call} {got}"),
                Err(status) => println!("\nRESULT {call} {:?}: {}", status.code(), status.message()),
            }
        }
    });
    futures::future::join_all(made).await;
}

async fn make(channel: Channel, call: &str) -> Result<String, Status> {
    let mut client = SpiffeWorkloadApiClient::new(channel.clone());
    let none = || Status::unknown("the stream ended");
    match call {
        "x509" => {
            let mut stream = client.fetch_x509svid(secure(X509svidRequest {})).await?.into_inner();
            Ok(stream.message().await?.ok_or_else(none)?.svids[0].spiffe_id.clone())
        }
        "x509-bundles" => {
            let mut stream = client.fetch_x509_bundles(secure(X509BundlesRequest {})).await?.into_inner();
            Ok(stream.message().await?.ok_or_else(none)?.bundles.into_keys().collect())
        }
        "jwt-bundles" => {
            let mut stream = client.fetch_jwt_bundles(secure(JwtBundlesRequest {})).await?.into_inner();
            Ok(stream.message().await?.ok_or_else(none)?.bundles.into_keys().collect())
        }
        "sds-fetch" => {
            let answer = SecretDiscoveryServiceClient::new(channel).fetch_secrets(asked(&["default"])).await?;
            Ok(answer.into_inner().resources.iter().map(words).collect())
        }
        "sds-stream" => {
            // The proxy says no more, and does not go away.
            let requests = tokio_stream::once(asked(&["default"])).chain(tokio_stream::pending());
            let mut stream = SecretDiscoveryServiceClient::new(channel).stream_secrets(requests).await?.into_inner();
            Ok(stream.message().await?.ok_or_else(none)?.resources.iter().map(words).collect())
        }
        jwt => {
            let spiffe_id = jwt.strip_prefix("jwt=").unwrap_or_default().to_owned();
            let request = JwtsvidRequest { audience: vec!["a".into()], spiffe_id };
            Ok(client.fetch_jwtsvid(secure(request)).await?.into_inner().svids[0].spiffe_id.clone())
        }
    }
}

struct Workload {
    child: Child,
    said: Lines<BufReader<ChildStdout>>,
}

impl Workload {
    /// Starts a workload that makes these calls.
    fn start(agent: &Running, calls: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "tests::waiting::workload_process", "--nocapture"]).kill_on_drop(true);
        command.env("FINIAL_TEST_SOCKET", &agent.socket).env("FINIAL_TEST_CALLS", calls);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, said }
    }

    /// What came of the next call that ends.
    async fn result(&mut self) -> String {
        within(async {
            loop {
                let line = self.said.next_line().await.unwrap().expect("the workload ended early");
                if let Some(result) = line.strip_prefix("RESULT ") {
                    return result.to_owned();
                }
            }
        })
        .await
    }
}

/// An agent that is told of changes, and lets workloads wait for longer than a test lasts.
async fn world(waiters_max: usize) -> World {
    let mut world = World::new().await;
    world.settings.sync_interval = Duration::from_secs(3600);
    world.settings.wait_for_entry = Some(WaitForEntry { longest: Duration::from_secs(600), waiters_max });
    world.server.state().pushes = true;
    world
}

async fn started(world: &World) -> Running {
    let agent = world.started().await;
    until("the agent listens to the server", || world.server.listeners() == 1).await;
    agent
}

async fn attested(world: &World, times: usize) {
    until("the workload was attested", || world.attestor.asked.load(Ordering::SeqCst) >= times).await;
}

async fn create(world: &World, id: &str, path: &str) {
    let entry = wire_entry(id, path, &["test:any"]);
    world.server.state().entries.insert(id.into(), entry.clone());
    world.server.push(WatchResponse { entries: vec![entry], ..Default::default() }).await;
}

#[tokio::test]
async fn an_entry_that_comes_meanwhile_is_served_at_once() {
    let world = world(100).await;
    let agent = started(&world).await;
    let mut workload = Workload::start(&agent, "x509 jwt x509-bundles jwt-bundles sds-fetch sds-stream");
    attested(&world, 1).await;
    // Without any timer: told by the server, and passed on.
    let still = StandsStill::begin();
    create(&world, "e1", "/web").await;
    let mut results = Vec::new();
    for _ in 0..6 {
        results.push(workload.result().await);
    }
    drop(still);
    results.sort();
    let want = [
        "jwt spiffe://td/web",
        "jwt-bundles spiffe://td",
        "sds-fetch default = spiffe://td/web",
        "sds-stream default = spiffe://td/web",
        "x509 spiffe://td/web",
        "x509-bundles spiffe://td",
    ];
    assert_eq!(results, want);
    within(workload.child.wait()).await.unwrap();
    agent.stop().await;
}

#[tokio::test]
async fn a_token_for_one_identity_waits_for_its_entry() {
    let world = world(100).await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = started(&world).await;
    let mut workload = Workload::start(&agent, "jwt=spiffe://td/api");
    attested(&world, 1).await;
    create(&world, "e3", "/other").await;
    create(&world, "e2", "/api").await;
    assert_eq!(workload.result().await, "jwt=spiffe://td/api spiffe://td/api");
    agent.stop().await;
}

#[tokio::test]
async fn waiting_ends_with_the_refusal_that_comes_at_once_otherwise() {
    let mut world = world(100).await;
    world.settings.wait_for_entry = Some(WaitForEntry { longest: Duration::from_millis(20), waiters_max: 100 });
    let agent = started(&world).await;
    let mut workload = Workload::start(&agent, "x509 sds-fetch sds-stream");
    let mut results = [workload.result().await, workload.result().await, workload.result().await];
    results.sort();
    let refused = "InvalidArgument: workload is not authorized for the requested identities [\"default\"]";
    let want = [
        format!("sds-fetch {refused}"),
        format!("sds-stream {refused}"),
        "x509 PermissionDenied: no identity issued".to_owned(),
    ];
    assert_eq!(results, want);
    agent.stop().await;
}

#[tokio::test]
async fn a_proxy_that_is_one_too_many_is_refused_at_once_and_one_that_has_its_secrets_has_no_place() {
    let world = world(2).await; // one of one user
    let agent = started(&world).await;
    let mut first = Workload::start(&agent, "sds-stream sds-fetch");
    let refused = first.result().await;
    assert!(refused.contains("InvalidArgument: workload is not authorized"), "{refused}");
    create(&world, "e1", "/web").await;
    let served = first.result().await;
    assert!(served.ends_with("default = spiffe://td/web"), "{served}");
    let mut other = Workload::start(&agent, "jwt=spiffe://td/api");
    attested(&world, 2).await;
    create(&world, "e2", "/api").await;
    assert_eq!(other.result().await, "jwt=spiffe://td/api spiffe://td/api", "the place is free again");
    agent.stop().await;
}

#[tokio::test]
async fn one_too_many_is_refused_at_once_and_the_others_go_on_waiting() {
    let world = world(4).await; // two of one user
    let agent = started(&world).await;
    let mut workload = Workload::start(&agent, "x509 jwt jwt-bundles");
    assert!(workload.result().await.ends_with("PermissionDenied: no identity issued"));
    create(&world, "e1", "/web").await;
    for _ in 0..2 {
        let result = workload.result().await;
        assert!(result.contains("spiffe://td"), "{result}");
    }
    agent.stop().await;
}

#[tokio::test]
async fn the_agent_itself_is_answered_at_once_and_its_end_ends_the_waiting() {
    let world = world(100).await;
    let agent = started(&world).await;
    // This test is the agent's process: so asks the health check.
    assert_eq!(agent.x509_once().await.unwrap_err().code(), Code::PermissionDenied);
    let mut workload = Workload::start(&agent, "x509");
    attested(&world, 2).await;
    // The end does not wait for those who wait.
    let still = StandsStill::begin();
    agent.stop().await;
    drop(still);
    let result = workload.result().await;
    assert!(result.starts_with("x509 Unavailable"), "{result}");
}

#[tokio::test]
async fn those_who_go_away_leave_their_places() {
    let world = world(2).await; // one of one user
    let agent = started(&world).await;
    for asked in 1..4 {
        let mut gone = Workload::start(&agent, "x509");
        attested(&world, asked).await;
        gone.child.kill().await.unwrap();
    }
    let mut workload = Workload::start(&agent, "x509");
    // Its place may be free a moment later than it asks; then it asks again.
    let mut result = String::new();
    let deadline = tokio::time::Instant::now() + super::harness::DEADLINE;
    create(&world, "e1", "/web").await;
    while !result.ends_with("spiffe://td/web") {
        assert!(tokio::time::Instant::now() < deadline, "{result}");
        result = workload.result().await;
        workload = Workload::start(&agent, "x509");
    }
    agent.stop().await;
}
