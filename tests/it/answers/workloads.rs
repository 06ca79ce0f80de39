//! The Workload API.

use super::{Answers, both, show, with_header};
use finial_net::client::uds_channel;
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{self};
use testkit::{Agent, AgentOptions, Server, ServerOptions};
use tonic::{Request, Response, Status};

#[test]
fn workload_api() {
    both(async |flavor| {
        let server = Server::start(flavor, &ServerOptions::default());
        server.entry("/workload", &[]);
        let agent = Agent::serving(flavor, &server, &AgentOptions::default());
        let mut client = SpiffeWorkloadApiClient::new(uds_channel(agent.socket()));
        let mut answers = Answers::new();
        // Without the header, or with a wrong one, nobody gets anything.
        for header in [None, Some("false"), Some("TRUE"), Some("")] {
            let mut request =
                Request::new(workload::JwtsvidRequest { audience: vec!["a".into()], ..Default::default() });
            if let Some(value) = header {
                request.metadata_mut().insert("workload.spiffe.io", value.parse().expect("a value"));
            }
            answers.push((
                format!("header {header:?}"),
                show(client.fetch_jwtsvid(request).await.map(|_| Response::new(()))),
            ));
        }
        let bare = client.fetch_x509svid(workload::X509svidRequest {}).await;
        answers.push(("x509 without header".into(), show(first(bare).await)));
        for (spiffe_id, audience) in [
            ("", &[][..]),
            ("", &[""]),
            ("x", &["a"]),
            ("spiffe://example.org/other", &["a"]),
            ("spiffe://other.org/x", &["a"]),
            ("spiffe://example.org", &["a"]),
        ] {
            let audience = audience.iter().map(|a| (*a).to_owned()).collect();
            let request = workload::JwtsvidRequest { audience, spiffe_id: spiffe_id.into() };
            let what = format!("{request:?}");
            let answer = client.fetch_jwtsvid(with_header("workload", request)).await;
            answers.push((what, show(answer.map(|_| Response::new(())))));
        }
        let granted = workload::JwtsvidRequest { audience: vec!["a".into()], spiffe_id: String::new() };
        let granted = client.fetch_jwtsvid(with_header("workload", granted)).await.expect("a JWT-SVID").into_inner();
        let good = granted.svids.first().expect("one").svid.clone();
        let cut = format!("{}.AAAA", good.rsplit_once('.').expect("a signature").0);
        // Claims made up, signature gone, no algorithm.
        let none = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy94In0.";
        let hs256 =
            "eyJhbGciOiJIUzI1NiIsImtpZCI6IngifQ.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy94IiwiYXVkIjpbImEiXX0.AAAA";
        let unknown_kid = "eyJhbGciOiJFUzI1NiIsImtpZCI6IngiLCJ0eXAiOiJKV1QifQ.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy94IiwiYXVkIjpbImEiXSwiZXhwIjo0MDAwMDAwMDAwfQ.AAAA";
        for (audience, svid) in [
            ("", good.as_str()),
            ("a", ""),
            ("wrong", &good),
            ("a", &cut),
            ("a", "garbage"),
            ("a", "a.b"),
            ("a", "a.b.c"),
            ("a", none),
            ("a", hs256),
            ("a", unknown_kid),
        ] {
            let request = workload::ValidateJwtsvidRequest { audience: audience.into(), svid: svid.into() };
            let answer =
                show(client.validate_jwtsvid(with_header("workload", request)).await.map(|_| Response::new(())));
            answers.push((format!("validate for {audience:?}: {}", svid.get(..20).unwrap_or(svid)), answer));
        }
        answers
    });
}

/// The first message of a stream, without what is in it.
async fn first<T>(answer: Result<Response<tonic::Streaming<T>>, Status>) -> Result<Response<()>, Status> {
    answer?.into_inner().message().await.map(|_| Response::new(()))
}
