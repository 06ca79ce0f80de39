//! Callers without a certificate.

use super::{Answers, ask, csrs, of_servers, show, stranger};
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::{self as agents, attest_agent_request as attest};
use finial_proto::server::bundle::{self as bundles, bundle_client::BundleClient};
use finial_proto::server::entry::{self as entries, entry_client::EntryClient};
use finial_proto::server::logger::{SetLogLevelRequest, logger_client::LoggerClient};
use finial_proto::server::svid::{self as svids, svid_client::SvidClient};
use finial_proto::types;
use testkit::{Server, ServerOptions};
use tonic::Response;

#[test]
fn strangers() {
    of_servers(&ServerOptions::default(), asked);
}

async fn asked(server: &Server) -> Answers {
    let channel = stranger(server);
    let mut client = AgentClient::new(channel.clone());
    let mut answers = Answers::new();
    let step = |step| agents::AttestAgentRequest { step };
    let params = |kind: Option<&str>, payload: &'static [u8], csr: Option<Vec<u8>>| {
        step(Some(attest::Step::Params(attest::Params {
            data: kind.map(|k| types::AttestationData { r#type: k.into(), payload: payload.into() }),
            params: csr.map(|c| agents::AgentX509svidParams { csr: c.into() }),
        })))
    };
    let csr = csrs().await;
    // SPIRE looks at the CSR after it has used the token up, Finial before: so all of these have a good one.
    let attempts = vec![
        step(None),
        step(Some(attest::Step::ChallengeResponse("x".into()))),
        params(None, b"", None),
        params(Some("join_token"), b"t", None),
        params(Some(""), b"t", csr.get(6).cloned()),
        params(Some("nonsense"), b"t", csr.get(6).cloned()),
        params(Some("join_token"), b"", csr.get(6).cloned()),
        params(Some("join_token"), b"no such token", csr.get(6).cloned()),
    ];
    for attempt in attempts {
        let what = format!("{attempt:?}");
        let answer = match client.attest_agent(tokio_stream::once(attempt)).await {
            Ok(stream) => show(stream.into_inner().message().await.map(Response::new)),
            Err(status) => show::<()>(Err(status)),
        };
        answers.push((what, answer));
    }
    let empty = client.attest_agent(tokio_stream::empty::<agents::AttestAgentRequest>()).await;
    let empty = match empty {
        Ok(stream) => show(stream.into_inner().message().await.map(Response::new)),
        Err(status) => show::<()>(Err(status)),
    };
    answers.push(("nothing at all".into(), empty));

    // What strangers may not do.
    ask!(answers, client.list_agents, agents::ListAgentsRequest::default());
    ask!(answers, client.create_join_token, agents::CreateJoinTokenRequest::default());
    ask!(answers, client.renew_agent, agents::RenewAgentRequest::default());
    ask!(answers, client.post_status, agents::PostStatusRequest::default());
    let mut entry = EntryClient::new(channel.clone());
    ask!(answers, entry.list_entries, entries::ListEntriesRequest::default());
    ask!(answers, entry.get_authorized_entries, entries::GetAuthorizedEntriesRequest::default());
    let mut svid = SvidClient::new(channel.clone());
    ask!(answers, svid.mint_x509svid, svids::MintX509svidRequest::default());
    ask!(answers, svid.batch_new_x509svid, svids::BatchNewX509svidRequest::default());
    ask!(answers, svid.new_jwtsvid, svids::NewJwtsvidRequest::default());
    let mut bundle = BundleClient::new(channel.clone());
    ask!(answers, bundle.append_bundle, bundles::AppendBundleRequest::default());
    ask!(answers, bundle.get_federated_bundle, bundles::GetFederatedBundleRequest::default());
    let got = bundle.get_bundle(bundles::GetBundleRequest::default()).await;
    answers.push(("anyone may have the bundle".into(), got.is_ok().to_string()));
    // On the local socket only; the words are gRPC's own.
    let mut logger = LoggerClient::new(channel);
    let refused = logger.set_log_level(SetLogLevelRequest { new_level: 6 }).await.map_err(|s| s.code());
    answers.push(("the log level".into(), format!("{:?}", refused.err())));
    answers
}
