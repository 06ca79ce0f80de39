//! gRPC reflection of the agent's public socket: the same services as SPIRE's, and their files.

use finial_net::client::uds_channel;
use prost::Message;
use prost_types::FileDescriptorProto;
use std::time::Duration;
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions};
use tonic_reflection::pb::{v1, v1alpha};

const DEADLINE: Duration = Duration::from_secs(30);

/// Asks these questions, one version of the protocol.
macro_rules! ask {
    ($version:ident, $channel:expr, $questions:expr) => {{
        use $version::server_reflection_client::ServerReflectionClient;
        use $version::server_reflection_request::MessageRequest as Question;
        use $version::server_reflection_response::MessageResponse as Answer;
        let mut said = Vec::new();
        for (kind, text) in $questions {
            let question = match kind {
                "list" => Question::ListServices(String::new()),
                _ => Question::FileContainingSymbol(String::from(text)),
            };
            let request = $version::ServerReflectionRequest { host: String::new(), message_request: Some(question) };
            let asking = async {
                let mut client = ServerReflectionClient::new($channel);
                let mut answers = client.server_reflection_info(tokio_stream::iter([request])).await?.into_inner();
                answers.message().await
            };
            let answer = tokio::time::timeout(DEADLINE, asking).await.expect("an answer in time").expect("an answer");
            said.push(match answer.expect("no end before it").message_response.expect("something") {
                Answer::ListServicesResponse(list) => {
                    let mut names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
                    names.sort();
                    names.join(" ")
                }
                Answer::FileDescriptorResponse(files) => {
                    let file = FileDescriptorProto::decode(files.file_descriptor_proto[0].as_slice()).expect("a file");
                    let mut methods: Vec<String> =
                        file.service[0].method.iter().map(|method| method.name().to_owned()).collect();
                    methods.sort();
                    methods.join(" ")
                }
                other => format!("{other:?}"),
            });
        }
        said
    }};
}

/// What is said of the services and of their methods.
async fn said(agent: &Agent) -> [Vec<String>; 2] {
    let questions = [("list", ""), ("of", "SpiffeWorkloadAPI"), ("of", "grpc.reflection.v1.ServerReflection")];
    let first = ask!(v1, uds_channel(agent.socket()), questions);
    let questions = [("list", ""), ("of", "SpiffeWorkloadAPI")];
    [first, ask!(v1alpha, uds_channel(agent.socket()), questions)]
}

#[test]
fn the_public_socket_tells_of_its_services() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    server.entry("/workload", &[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let [ours, theirs] = [Flavor::Finial, Flavor::Spire].map(|flavor| {
        let agent = Agent::serving(flavor, &server, &AgentOptions::default());
        runtime.block_on(said(&agent))
    });
    assert_eq!(ours, theirs);
    assert!(ours[0][0].contains("SpiffeWorkloadAPI"), "{ours:?}");
}
