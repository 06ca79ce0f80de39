//! Every method by every kind of caller, with an empty message: who is let in, and what everybody else is told.

use super::joined::{Joined, stranger, workload};
use super::{Answers, of_servers, refusal};
use finial_net::client::uds_channel;
use testkit::{Server, ServerOptions};
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;

const METHODS: &str = include_str!("../../../crates/server/tests/api/policy_matrix.txt");

fn methods() -> Vec<String> {
    let rows = METHODS.lines().filter(|line| !line.starts_with('#'));
    let of_row = |row: &'static str| {
        let mut words = row.split(' ').skip(1);
        let service = words.next().expect("a service");
        words.map(move |method| format!("/{service}/{method}"))
    };
    // SPIRE serves only the first of Health's methods.
    rows.flat_map(of_row).filter(|path| !path.ends_with("/List") && !path.ends_with("Health/Watch")).collect()
}

async fn call(channel: &Channel, path: &str) -> String {
    let mut client = Grpc::new(channel.clone());
    client.ready().await.expect("a connection");
    let codec = ProstCodec::<(), ()>::default();
    let path: PathAndQuery = path.parse().expect("a path");
    let request = Request::new(tokio_stream::once(()));
    let mut answers = match client.streaming(request, path, codec).await {
        Ok(answers) => answers.into_inner(),
        Err(status) => return refusal(&status),
    };
    loop {
        match answers.message().await {
            Ok(Some(())) => {}
            Ok(None) => return "granted".into(),
            Err(status) => return refusal(&status),
        }
    }
}

#[test]
fn each_method_by_each_kind_of_caller() {
    of_servers(&ServerOptions::default(), asked);
}

async fn asked(server: &Server) -> Answers {
    server.entry("/admin", &["-admin"]);
    server.entry("/downstream", &["-downstream"]);
    let callers = [
        ("a local process", uds_channel(server.socket())),
        ("nobody", stranger(server)),
        ("a workload", workload(server, "/workload").await),
        ("an admin", workload(server, "/admin").await),
        ("a downstream server", workload(server, "/downstream").await),
        ("an agent", Joined::new(server, "agent").await.channel),
    ];
    let mut answers = Answers::new();
    for (who, channel) in callers {
        for path in methods() {
            let answer = call(&channel, &path).await;
            answers.push((format!("{path} by {who}"), answer));
        }
    }
    answers
}
