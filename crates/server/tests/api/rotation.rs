//! Orders to rotate that reach all servers: who waits for whom, who is refused and what of it is seen.

use crate::harness::{Agent, DEADLINE, Identity, Lab, Server, csr, on_every_database, refused, trust_domain};
use finial_core::KeyType;
use finial_crypto::PrivateKey;
use finial_proto::rotation::rotation_client::RotationClient;
use finial_proto::rotation::{
    AdvanceRotationRequest, BeginRotationRequest, GetRotationRequest, Goal, Kind, RotationState, ServerNote,
    TakeBackRotationRequest, WatchRotationRequest,
};
use finial_proto::server::agent::{AgentX509svidParams, BanAgentRequest, RenewAgentRequest};
use finial_proto::server::bundle::GetBundleRequest;
use finial_proto::sync::BundleSeenRequest;
use finial_proto::sync::agent_sync_client::AgentSyncClient;
use finial_store::RotationNote;
use prost::Message;
use tonic::transport::Channel;
use tonic::{Code, Status};

on_every_database!(
    an_order_waits_for_agents_until_all_is_replaced,
    of_two_operators_the_second_is_told_of_the_first,
    what_was_activated_is_taken_back,
    who_forces_need_not_wait_and_who_watches_sees_it,
    nobody_is_judged_by_a_bundle_that_is_behind,
);

fn client(server: &Server) -> RotationClient<Channel> {
    RotationClient::new(server.local.clone())
}

async fn begin(server: &Server, kind: Kind, revoke: bool) -> RotationState {
    client(server).begin_rotation(BeginRotationRequest { kind: kind.into(), revoke }).await.unwrap().into_inner()
}

async fn advance(server: &Server, id: i64, goal: Goal, force: bool) -> Result<RotationState, Status> {
    let request = AdvanceRotationRequest { id, goal: goal.into(), force };
    client(server).advance_rotation(request).await.map(tonic::Response::into_inner)
}

/// Looks until it is so.
async fn until(server: &Server, kind: Kind, is_so: impl Fn(&RotationState) -> bool) -> RotationState {
    let mut last = RotationState::default();
    crate::until::until("the order stands so", async || {
        let request = GetRotationRequest { kind: kind.into() };
        last = client(server).get_rotation(request).await.unwrap().into_inner().rotations.remove(0);
        is_so(&last)
    })
    .await;
    last
}

/// All servers have come to the goal.
fn reached(goal: Goal) -> impl Fn(&RotationState) -> bool {
    move |state| state.servers.iter().all(|server| server.reached() == goal)
}

async fn has_seen(agent: &Agent, sequence_number: u64) {
    let mut client = AgentSyncClient::new(agent.channel.clone());
    client.bundle_seen(BundleSeenRequest { sequence_number }).await.unwrap();
}

async fn renewed(server: &Server, agent: &Agent) -> Agent {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let params = AgentX509svidParams { csr: csr(&key, None, &[]).await.into() };
    let answer = agent.agents().renew_agent(RenewAgentRequest { params: Some(params) }).await.unwrap();
    Agent::new(server, Identity::of(answer.into_inner().svid.unwrap(), key)).await
}

async fn tainted(server: &Server) -> Vec<bool> {
    let bundle = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    bundle.x509_authorities.iter().map(|a| a.tainted).collect()
}

async fn an_order_waits_for_agents_until_all_is_replaced(lab: Lab) {
    let server = lab.start().await;
    let (ours, spires, gone) = (server.agent().await, server.agent().await, server.agent().await);
    let order = begin(&server, Kind::X509, true).await;
    assert_eq!((order.goal(), order.done), (Goal::Prepare, false));
    assert!(order.asked_by.starts_with("the user with ID "), "{}", order.asked_by);
    let state = until(&server, Kind::X509, reached(Goal::Prepare)).await;
    assert_eq!(tainted(&server).await, [false, false], "prepared");
    let [one] = &state.servers[..] else { panic!("one server: {state:?}") };
    assert!(one.follows && one.active_authority_id == one.former_authority_id && !one.prepared_authority_id.is_empty());
    assert_eq!(state.next(), Goal::Activate);
    let agents = state.agents.clone().unwrap();
    assert_eq!((agents.count, agents.confirmed, agents.moved, agents.lacking.len()), (3, 0, 0, 3));

    // Those who are banned are not waited for. One of ours says that it has the bundle; one of SPIRE's has it when it asks again.
    let id = Some(gone.identity.id.clone())
        .map(|id| finial_proto::types::Spiffeid { trust_domain: "example.org".into(), path: id.path().into() });
    server.agents().ban_agent(BanAgentRequest { id }).await.unwrap();
    has_seen(&ours, state.sequence_number).await;
    spires.bundles().get_bundle(GetBundleRequest::default()).await.unwrap();
    let message = refused(advance(&server, order.id, Goal::Activate, false).await, Code::FailedPrecondition);
    let expected =
        format!("it is too early to activate: 1 of 2 agents have not confirmed the new bundle: {}", spires.identity.id);
    assert_eq!(message, expected);
    spires.bundles().get_bundle(GetBundleRequest::default()).await.unwrap();
    let state = advance(&server, order.id, Goal::Activate, false).await.unwrap();
    assert!(!state.forced);
    let state = until(&server, Kind::X509, reached(Goal::Activate)).await;
    assert_ne!(state.servers[0].active_authority_id, state.servers[0].former_authority_id);
    let message = refused(advance(&server, order.id, Goal::Revoke, false).await, Code::FailedPrecondition);
    assert_eq!(message, "the order's goal is to activate, after which comes: taint");
    advance(&server, order.id, Goal::Taint, false).await.unwrap();
    until(&server, Kind::X509, reached(Goal::Taint)).await;
    assert_eq!(tainted(&server).await, [true, false]);

    // Agents move off what is tainted by getting a new SVID, and by using it.
    let ours = renewed(&server, &ours).await;
    let state = until(&server, Kind::X509, |state| state.obstacles.len() == 1).await;
    has_seen(&ours, state.sequence_number).await;
    let message = refused(advance(&server, order.id, Goal::Revoke, false).await, Code::FailedPrecondition);
    let expected = format!(
        "it is too early to revoke: 1 of 2 agents have not moved off what is to be revoked: {}",
        spires.identity.id
    );
    assert_eq!(message, expected);
    let spires = renewed(&server, &spires).await;
    spires.bundles().get_bundle(GetBundleRequest::default()).await.unwrap();
    refused(advance(&server, order.id, Goal::Revoke, false).await, Code::FailedPrecondition);
    spires.bundles().get_bundle(GetBundleRequest::default()).await.unwrap();
    // It has the bundle, and asks for new SVIDs now.
    refused(advance(&server, order.id, Goal::Revoke, false).await, Code::FailedPrecondition);
    spires.bundles().get_bundle(GetBundleRequest::default()).await.unwrap();
    let state = advance(&server, order.id, Goal::Revoke, false).await.unwrap();
    assert!(!state.forced);
    let state = until(&server, Kind::X509, |state| state.done).await;
    assert_eq!((state.next(), state.obstacles.len()), (Goal::Unspecified, 0));
    assert_eq!(tainted(&server).await, [false], "one is left");
    let request = TakeBackRotationRequest { id: order.id };
    let message = refused(client(&server).take_back_rotation(request).await, Code::FailedPrecondition);
    assert_eq!(message, "revocation was ordered, which cannot be taken back: prepare and activate others");
    assert!(begin(&server, Kind::X509, false).await.id > order.id, "another may begin");
}

async fn of_two_operators_the_second_is_told_of_the_first(lab: Lab) {
    let server = lab.start().await;
    begin(&server, Kind::Jwt, false).await;
    let second = client(&server).begin_rotation(BeginRotationRequest { kind: Kind::Jwt.into(), revoke: true }).await;
    let message = refused(second, Code::FailedPrecondition);
    let expected = "an order to rotate JWT authorities is open: the user with ID ";
    assert!(message.starts_with(expected), "{message}");
    assert!(message.ends_with(", and its goal is to prepare; see it through, or take it back"), "{message}");
    begin(&server, Kind::X509, false).await;
    let all = client(&server).get_rotation(GetRotationRequest::default()).await.unwrap().into_inner().rotations;
    assert_eq!(all.iter().map(RotationState::kind).collect::<Vec<_>>(), [Kind::X509, Kind::Jwt]);
    let none = client(&server).begin_rotation(BeginRotationRequest::default()).await;
    assert_eq!(refused(none, Code::InvalidArgument), "no kind of authority provided");
    let off = client(&server).begin_rotation(BeginRotationRequest { kind: Kind::Wit.into(), revoke: false }).await;
    refused(off, Code::Unimplemented);
    refused(advance(&server, 77, Goal::Activate, true).await, Code::NotFound);
}

async fn what_was_activated_is_taken_back(lab: Lab) {
    let server = lab.start().await;
    let order = begin(&server, Kind::X509, false).await;
    let first = until(&server, Kind::X509, reached(Goal::Prepare)).await.servers[0].active_authority_id.clone();
    advance(&server, order.id, Goal::Activate, false).await.unwrap();
    let state = until(&server, Kind::X509, |state| state.done).await;
    assert_ne!(state.servers[0].active_authority_id, first, "without revocation, this is the end");
    client(&server).take_back_rotation(TakeBackRotationRequest { id: order.id }).await.unwrap();
    let state = until(&server, Kind::X509, |state| state.done && state.goal() == Goal::TakeBack).await;
    assert_eq!((&state.servers[0].active_authority_id, &*state.servers[0].error), (&first, ""));
}

async fn who_forces_need_not_wait_and_who_watches_sees_it(lab: Lab) {
    let server = lab.start().await;
    let _agent = server.agent().await;
    let order = begin(&server, Kind::Jwt, false).await;
    let mut watched = client(&server).watch_rotation(WatchRotationRequest { id: order.id }).await.unwrap().into_inner();
    until(&server, Kind::Jwt, reached(Goal::Prepare)).await;
    refused(advance(&server, order.id, Goal::Activate, false).await, Code::FailedPrecondition);
    assert!(advance(&server, order.id, Goal::Activate, true).await.unwrap().forced);
    let mut seen = Vec::new();
    while let Some(state) = tokio::time::timeout(DEADLINE, watched.message()).await.unwrap().unwrap() {
        seen.push(state);
    }
    let last = seen.last().unwrap();
    assert!(last.done && last.forced, "{last:?}");
    assert!(seen.windows(2).all(|two| two[0] != two[1]), "only changes are told");
}

/// Another server prepared and told so; here the bundle that it made is not read yet.
async fn nobody_is_judged_by_a_bundle_that_is_behind(lab: Lab) {
    let Some(store) = lab.beside().await else { return };
    let server = lab.start().await;
    let agent = server.agent().await;
    let order = begin(&server, Kind::Jwt, false).await;
    let state = until(&server, Kind::Jwt, reached(Goal::Prepare)).await;
    has_seen(&agent, state.sequence_number).await;
    until(&server, Kind::Jwt, |state| state.obstacles.is_empty()).await;
    let key = |bundle: &finial_core::Bundle| finial_core::JwtAuthority {
        key_id: "another's".into(),
        ..bundle.jwt_authorities[0].clone()
    };
    let own = store.fetch_bundle(&trust_domain()).await.unwrap().unwrap();
    let more = finial_core::Bundle { jwt_authorities: vec![key(&own)], ..finial_core::Bundle::empty(trust_domain()) };
    let sequence_number = store.append_bundle(&more).await.unwrap().sequence_number;
    assert!(sequence_number > state.sequence_number);
    let note = ServerNote { reached: Goal::Prepare.into(), sequence_number, ..Default::default() };
    let note = RotationNote { rotation_id: order.id, journal_id: 99, data: note.encode_to_vec(), seen_at: 0 };
    store.set_rotation_note(&note).await.unwrap();
    let message = refused(advance(&server, order.id, Goal::Activate, false).await, Code::FailedPrecondition);
    assert!(message.contains("1 of 1 agents have not confirmed the new bundle"), "{message}");
    store.close().await;
}
