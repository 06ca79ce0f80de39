//! WIT-SVIDs of the Workload API, under our own server and under the real SPIRE's. SPIRE's agent has none, and says so.

use crate::answers::{Answers, both, show, with_header};
use finial_core::{Clock, JwtAuthority, SystemClock, TrustDomain};
use finial_crypto::bundle::public_key_from_jwk;
use finial_crypto::{JwtKeys, verify_wit_svid};
use finial_net::client::uds_channel;
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{WitBundlesRequest, WitsvidRequest, WitsvidResponse};
use std::sync::Arc;
use std::time::Duration;
use testkit::Flavor::{Finial, Spire};
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions};
use tonic::{Response, Streaming};

const DEADLINE: Duration = Duration::from_secs(30);

#[test]
fn without_the_feature_flag() {
    both(async |flavor| {
        let server = Server::start(flavor, &ServerOptions::default());
        server.entry("/workload", &[]);
        let agent = Agent::serving(flavor, &server, &AgentOptions::default());
        let mut client = SpiffeWorkloadApiClient::new(uds_channel(agent.socket()));
        let mut answers = Answers::new();
        for spiffe_id in ["", "spiffe://example.org/workload", "spiffe://example.org/other", "x", "spiffe://other.org"]
        {
            let request = || WitsvidRequest { spiffe_id: spiffe_id.into() };
            answers.push((
                spiffe_id.into(),
                show(first(client.fetch_witsvid(with_header("workload", request())).await).await),
            ));
            answers.push((format!("{spiffe_id} bare"), show(first(client.fetch_witsvid(request()).await).await)));
        }
        answers.push((
            "bundles".into(),
            show(first(client.fetch_wit_bundles(with_header("workload", WitBundlesRequest {})).await).await),
        ));
        answers.push(("bundles, bare".into(), show(first(client.fetch_wit_bundles(WitBundlesRequest {}).await).await)));
        answers
    });
}

/// The first message of a stream, without what is in it.
async fn first<T>(answer: Result<Response<Streaming<T>>, tonic::Status>) -> Result<Response<()>, tonic::Status> {
    answer?.into_inner().message().await.map(|_| Response::new(()))
}

/// A workload gets tokens that verify by the bundle it gets, with their keys, and new ones in time.
fn under(flavor: Flavor) {
    let reload = if flavor == Spire { "cache_reload_interval = \"1s\"" } else { "" };
    let options = ServerOptions {
        server: format!("experimental {{ {reload}\n feature_flags = [\"wit-svid\"] }}"),
        ..Default::default()
    };
    let server = Server::start(flavor, &options);
    let id = server.entry("/workload", &["-x509SVIDTTL", "12", "-hint", "inside"]);
    let options = AgentOptions { experimental: "feature_flags = [\"wit-svid\"]".into(), ..Default::default() };
    let agent = Agent::serving(Finial, &server, &options);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut client = SpiffeWorkloadApiClient::new(uds_channel(agent.socket()));
        let bundles = client.fetch_wit_bundles(with_header("workload", WitBundlesRequest {})).await.expect("a stream");
        let bundles = next(&mut bundles.into_inner()).await.bundles;
        let keys = Arc::new(keys(&bundles["spiffe://example.org"]).1);
        let svids = client.fetch_witsvid(with_header("workload", WitsvidRequest::default())).await.expect("a stream");
        let mut svids = svids.into_inner();
        let mut seen = Vec::new();
        for _ in 0..2 {
            let WitsvidResponse { svids } = next(&mut svids).await;
            assert_eq!(svids.len(), 1);
            assert_eq!((svids[0].spiffe_id.as_str(), svids[0].hint.as_str()), (id.as_str(), "inside"));
            let wit = verify_wit_svid(&svids[0].wit_svid, |_| Some(keys.clone()), SystemClock.now()).expect("a token");
            let jwk: serde_json::Value = serde_json::from_str(&svids[0].wit_svid_key).expect("JSON");
            assert_eq!(public_key_from_jwk(jwk.as_object().expect("a key")).expect("a key"), wit.key);
            seen.push(svids[0].wit_svid_key.clone());
        }
        assert_ne!(seen[0], seen[1], "renewed with another key");
    });
}

pub(crate) async fn next<T>(stream: &mut Streaming<T>) -> T {
    let message = tokio::time::timeout(DEADLINE, stream.message()).await.expect("an answer in time");
    message.expect("an answer").expect("no end")
}

/// The keys of a JWKS, and their IDs.
pub(crate) fn keys(jwks: &str) -> (Vec<String>, JwtKeys) {
    let jwks: serde_json::Value = serde_json::from_str(jwks).expect("JSON");
    let mut bundle = finial_core::Bundle::empty(TrustDomain::parse("example.org").expect("a name"));
    for key in jwks["keys"].as_array().expect("keys") {
        let public = public_key_from_jwk(key.as_object().expect("a key")).expect("a key");
        let key_id = key["kid"].as_str().expect("an ID").to_owned();
        let public_key = public.spki_der().clone();
        bundle.wit_authorities.push(JwtAuthority { key_id, public_key, expires_at: 0, tainted: false });
    }
    let names = bundle.wit_authorities.iter().map(|key| key.key_id.clone()).collect();
    (names, JwtKeys::wit_from_bundle(&bundle).expect("keys"))
}

#[test]
fn under_our_own_server() {
    under(Finial);
}

#[test]
fn under_the_real_spire_server() {
    under(Spire);
}
