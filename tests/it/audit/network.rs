//! Calls over the network: by strangers, members and agents.

use super::{id, selector};
use crate::answers::{Joined, KEY, csr, until};
use finial_core::TrustDomain;
use finial_crypto::{DistinguishedName, create_ca_csr};
use finial_net::client::uds_channel;
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::{self as agents, attest_agent_request as attest};
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::bundle::{self as bundles};
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::server::entry::{self as entries};
use finial_proto::server::localauthority::local_authority_client::LocalAuthorityClient;
use finial_proto::server::localauthority::{self as local};
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::server::svid::{self as svids};
use finial_proto::server::trustdomain::trust_domain_client::TrustDomainClient;
use finial_proto::server::trustdomain::{self as domains};
use finial_proto::types;
use testkit::Server;
use tonic::transport::Channel;

/// What somebody who is not on the machine is granted and denied.
pub(super) async fn outsider(channel: &Channel) {
    let _ = BundleClient::new(channel.clone()).get_bundle(bundles::GetBundleRequest::default()).await;
    let mut client = EntryClient::new(channel.clone());
    let _ = client.list_entries(entries::ListEntriesRequest::default()).await;
    let entry = types::Entry {
        spiffe_id: id("/by-outsider"),
        parent_id: id("/parent"),
        selectors: vec![selector()],
        ..Default::default()
    };
    let create = entries::BatchCreateEntryRequest { entries: vec![entry], output_mask: None };
    let _ = client.batch_create_entry(create).await;
    let mut client = AgentClient::new(channel.clone());
    let _ = client.count_agents(agents::CountAgentsRequest::default()).await;
    let token = agents::CreateJoinTokenRequest { ttl: 60, token: "by-outsider".into(), agent_id: None };
    let _ = client.create_join_token(token).await;
    let good = csr(None).await;
    let step = |payload: &'static [u8]| {
        let data = types::AttestationData { r#type: "join_token".into(), payload: payload.into() };
        let params = Some(agents::AgentX509svidParams { csr: good.clone().into() });
        let params = attest::Params { data: Some(data), params };
        agents::AttestAgentRequest { step: Some(attest::Step::Params(params)) }
    };
    for step in [step(b"no such token"), agents::AttestAgentRequest { step: None }] {
        if let Ok(answers) = client.attest_agent(tokio_stream::once(step)).await {
            let _ = answers.into_inner().message().await;
        }
    }
    let mut client = SvidClient::new(channel.clone());
    let _ =
        client.mint_jwtsvid(svids::MintJwtsvidRequest { id: id("/minted"), audience: vec!["a".into()], ttl: 60 }).await;
    let csr = csr(None).await;
    let _ =
        client.new_downstream_x509ca(svids::NewDownstreamX509caRequest { csr: csr.into(), preferred_ttl: 60 }).await;
    let _ = client.new_downstream_x509ca(svids::NewDownstreamX509caRequest::default()).await;
    let ca = TrustDomain::parse("example.org").expect("a name");
    let csr = create_ca_csr(&*KEY, &DistinguishedName::of(&["DE"], &["x"], ""), &ca).await.expect("a CSR");
    let _ =
        client.new_downstream_x509ca(svids::NewDownstreamX509caRequest { csr: csr.into(), preferred_ttl: 60 }).await;
    let mut client = BundleClient::new(channel.clone());
    let public_key = KEY.public_key().spki_der().to_vec().into();
    let key = types::JwtKey { public_key, key_id: "k".into(), expires_at: 4_000_000_000, tainted: false };
    for jwt_authority in [Some(key), None] {
        let _ = client.publish_jwt_authority(bundles::PublishJwtAuthorityRequest { jwt_authority }).await;
    }
    let mut client = TrustDomainClient::new(channel.clone());
    let _ = client.list_federation_relationships(domains::ListFederationRelationshipsRequest::default()).await;
    let mut client = LocalAuthorityClient::new(channel.clone());
    let _ = client.get_jwt_authority_state(local::GetJwtAuthorityStateRequest {}).await;
}

/// What an agent asks for, and is denied as soon as it is banned.
pub(super) async fn agent(server: &Server) {
    let agent = Joined::new(server, "agent").await;
    let entry = |name: &str, parent_id| types::Entry {
        id: name.into(),
        spiffe_id: id(&format!("/{name}")),
        parent_id,
        selectors: vec![selector()],
        ..Default::default()
    };
    let create = vec![entry("mine", Some(agent.id.clone())), entry("not-mine", id("/parent"))];
    let mut client = EntryClient::new(uds_channel(server.socket()));
    let _ = client.batch_create_entry(entries::BatchCreateEntryRequest { entries: create, output_mask: None }).await;
    let mut client = EntryClient::new(agent.channel.clone());
    until("the agent sees its entry", async || {
        let seen = client.get_authorized_entries(entries::GetAuthorizedEntriesRequest::default()).await;
        if seen.expect("entries").into_inner().entries.is_empty() { Err("nothing".into()) } else { Ok(()) }
    })
    .await;
    for first in [sync_request(&[]), sync_request(&["mine"])] {
        if let Ok(answers) = client.sync_authorized_entries(tokio_stream::once(first)).await {
            let mut answers = answers.into_inner();
            while let Ok(Some(_)) = answers.message().await {}
        }
    }
    outsider(&agent.channel).await;
    let mut client = SvidClient::new(agent.channel.clone());
    let csr = csr(None).await;
    let params =
        |entry_id: &str, csr: &[u8]| svids::NewX509svidParams { entry_id: entry_id.into(), csr: csr.to_vec().into() };
    let few = vec![params("mine", &csr), params("mine", b""), params("", &csr), params("not-mine", &csr)];
    for params in [few, vec![params("mine", b"x")], vec![params("mine", &csr); 501], vec![]] {
        let _ = client.batch_new_x509svid(svids::BatchNewX509svidRequest { params }).await;
    }
    for (entry_id, audience) in [("mine", &["a", "b"][..]), ("mine", &[]), ("not-mine", &["a"]), ("", &["a"])] {
        let audience = audience.iter().map(|a| (*a).to_owned()).collect();
        let _ = client.new_jwtsvid(svids::NewJwtsvidRequest { entry_id: entry_id.into(), audience }).await;
    }
    let _ = client.batch_new_witsvid(svids::BatchNewWitsvidRequest::default()).await;
    let key = KEY.public_key().spki_der().to_vec();
    let wit = |entry_id: &str, public_key: &[u8], algorithm: &str| svids::NewWitsvidParams {
        entry_id: entry_id.into(),
        public_key: public_key.to_vec().into(),
        signing_algorithm: algorithm.into(),
    };
    // None that is granted: SPIRE's audit log crashes the server then, for want of a status.
    let params = vec![
        wit("mine", &key, "none"),
        wit("mine", b"x", "ES256"),
        wit("not-mine", &key, "ES256"),
        wit("", &key, "ES256"),
    ];
    let _ = client.batch_new_witsvid(svids::BatchNewWitsvidRequest { params }).await.expect("answers");
    let mut client = BundleClient::new(agent.channel.clone());
    for trust_domain in ["none.test", "example.org", ""] {
        let trust_domain = trust_domain.to_owned();
        let _ =
            client.get_federated_bundle(bundles::GetFederatedBundleRequest { trust_domain, output_mask: None }).await;
    }
    let mut client = AgentClient::new(agent.channel.clone());
    for version in ["1.15.3", "", &"v".repeat(256)] {
        let _ =
            client.post_status(agents::PostStatusRequest { agent_version: version.into(), ..Default::default() }).await;
    }
    let renew = |csr: &[u8]| Some(agents::AgentX509svidParams { csr: csr.to_vec().into() });
    for params in [None, renew(b""), renew(b"x"), renew(&csr)] {
        let _ = client.renew_agent(agents::RenewAgentRequest { params }).await;
    }
    let mut local = AgentClient::new(uds_channel(server.socket()));
    let _ = local.ban_agent(agents::BanAgentRequest { id: Some(agent.id.clone()) }).await;
    until("the agent is refused", async || match client.post_status(agents::PostStatusRequest::default()).await {
        Ok(_) => Err("not yet".into()),
        Err(_) => Ok(()),
    })
    .await;
    let _ = local.delete_agent(agents::DeleteAgentRequest { id: Some(agent.id.clone()) }).await;
    let _ = client.post_status(agents::PostStatusRequest::default()).await;
}

fn sync_request(ids: &[&str]) -> entries::SyncAuthorizedEntriesRequest {
    entries::SyncAuthorizedEntriesRequest { ids: ids.iter().map(|id| (*id).to_owned()).collect(), output_mask: None }
}
