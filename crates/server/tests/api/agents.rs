//! The Agent service: joining, renewing, banning, listing.

use crate::harness::*;
use finial_config::PluginConfig;
use finial_core::KeyType;
use finial_crypto::{Certificate, PrivateKey};
use finial_proto::convert::permission_denied_reason;
use finial_proto::server::agent::*;
use finial_proto::server::entry::GetAuthorizedEntriesRequest;
use finial_proto::types;
use finial_proto::types::permission_denied_details::Reason;
use tonic::Code;

on_every_database!(
    an_agent_joins_once_by_token_and_is_listed,
    of_many_that_race_for_a_token_one_joins,
    a_bad_csr_does_not_use_up_the_token,
    an_expired_token_is_told_apart,
    a_plugin_challenges_and_its_selectors_are_stored,
    bans_and_evictions_hold_for_open_connections,
    a_renewed_svid_takes_over_when_it_is_first_used,
    renewal_has_its_rules,
    the_agent_version_is_kept,
    join_tokens_can_be_chosen_and_bring_an_alias,
    agents_are_listed_by_filter_and_page,
);

async fn an_agent_joins_once_by_token_and_is_listed(lab: Lab) {
    let server = lab.start().await;
    let token = server.token().await;
    let identity = server.attest_token(&token).await.unwrap();
    assert_eq!(identity.id.as_str(), format!("spiffe://example.org/spire/agent/join_token/{token}"));
    assert_eq!(identity.expires_at, NOW + 3600);
    let message = refused(server.attest_token(&token).await.map(drop), Code::InvalidArgument);
    assert_eq!(message, "failed to attest: join token does not exist or has already been used");

    let agent = server.agents().get_agent(GetAgentRequest { id: id(identity.id.path()), output_mask: None }).await;
    let agent = agent.unwrap().into_inner();
    let leaf = Certificate::parse(identity.chain[0].clone()).unwrap();
    assert_eq!(agent.x509svid_serial_number, leaf.serial_decimal());
    assert_eq!((agent.attestation_type.as_str(), agent.banned, agent.can_reattest), ("join_token", false, false));
    let only_id = Some(types::AgentMask::default());
    let listed = server.agents().list_agents(ListAgentsRequest { output_mask: only_id, ..Default::default() }).await;
    let listed = listed.unwrap().into_inner().agents;
    assert_eq!(listed, [types::Agent { id: id(identity.id.path()), ..Default::default() }]);
    let count = server.agents().count_agents(CountAgentsRequest::default()).await.unwrap().into_inner().count;
    assert_eq!(count, 1);
}

async fn of_many_that_race_for_a_token_one_joins(lab: Lab) {
    let server = lab.start().await;
    let token = server.token().await;
    let tries = futures::future::join_all((0..12).map(|_| server.attest_token(&token))).await;
    assert_eq!(tries.iter().filter(|t| t.is_ok()).count(), 1);
    for failed in tries.into_iter().filter(Result::is_err) {
        let message = refused(failed.map(drop), Code::InvalidArgument);
        assert_eq!(message, "failed to attest: join token does not exist or has already been used");
    }
}

async fn a_bad_csr_does_not_use_up_the_token(lab: Lab) {
    let server = lab.start().await;
    let token = server.token().await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let mut forged = csr(&key, None, &[]).await;
    *forged.last_mut().unwrap() ^= 1;
    for bad in [b"garbage".to_vec(), forged] {
        let steps = vec![first_step("join_token", token.as_bytes(), &bad)];
        let message = refused(server.attest(key.clone(), steps).await.map(drop), Code::InvalidArgument);
        assert!(message.starts_with("failed to parse CSR: "), "{message}");
    }
    server.attest_token(&token).await.unwrap();
}

async fn an_expired_token_is_told_apart(lab: Lab) {
    let server = lab.start().await;
    let token = server.token().await;
    server.clock.advance(601);
    assert_eq!(refused(server.attest_token(&token).await.map(drop), Code::InvalidArgument), "join token expired");
    let message = refused(server.attest_token(&token).await.map(drop), Code::InvalidArgument);
    assert_eq!(message, "failed to attest: join token does not exist or has already been used");
}

async fn a_plugin_challenges_and_its_selectors_are_stored(lab: Lab) {
    let server = lab.start().await;
    let (identity, reattestable) = server.attest_name("one", "one").await.unwrap();
    assert!(reattestable);
    let message = refused(server.attest_name("one", "two").await.map(drop), Code::PermissionDenied);
    assert_eq!(message, "nodeattestor(gullible): challenge response does not match");
    let agent = server.agents().get_agent(GetAgentRequest { id: id(identity.id.path()), output_mask: None }).await;
    assert_eq!(agent.unwrap().into_inner().selectors, selectors(&["gullible:name:any", "gullible:name:one"]));
    // Attesting again supersedes the SVID of before, also on its open connection.
    let mut before = Agent::new(&server, identity).await.entries();
    before.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
    let (again, _) = server.attest_name("one", "one").await.unwrap();
    let status = before.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap_err();
    assert_eq!(permission_denied_reason(&status), Some(Reason::AgentNotActive));
    let mut after = Agent::new(&server, again).await.entries();
    after.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
}

async fn bans_and_evictions_hold_for_open_connections(lab: Lab) {
    let server = lab.start().await;
    let (identity, _) = server.attest_name("x", "x").await.unwrap();
    let path = identity.id.path().to_owned();
    let agent = Agent::new(&server, identity).await;
    agent.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
    server.agents().ban_agent(BanAgentRequest { id: id(&path) }).await.unwrap();
    let status = agent.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let method = "/spire.api.server.entry.v1.Entry/GetAuthorizedEntries";
    assert_eq!(status.message(), format!("authorization denied for method {method}"));
    assert_eq!(permission_denied_reason(&status), Some(Reason::AgentBanned));
    let message = refused(server.attest_name("x", "x").await.map(drop), Code::PermissionDenied);
    assert_eq!(message, "failed to attest: agent is banned");
    let banned = count_agents_request::Filter { by_banned: Some(true), ..Default::default() };
    let count = server.agents().count_agents(CountAgentsRequest { filter: Some(banned) }).await.unwrap();
    assert_eq!(count.into_inner().count, 1);

    server.agents().delete_agent(DeleteAgentRequest { id: id(&path) }).await.unwrap();
    let status = agent.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap_err();
    assert_eq!(permission_denied_reason(&status), Some(Reason::AgentNotAttested));
    server.attest_name("x", "x").await.unwrap();
    for result in [
        server.agents().delete_agent(DeleteAgentRequest { id: id("/spire/agent/no/such") }).await,
        server.agents().ban_agent(BanAgentRequest { id: id("/spire/agent/no/such") }).await,
    ] {
        assert_eq!(refused(result, Code::NotFound), "agent not found");
    }
}

async fn a_renewed_svid_takes_over_when_it_is_first_used(lab: Lab) {
    let server = lab.start().await;
    let agent = server.agent().await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let params = AgentX509svidParams { csr: csr(&key, None, &[]).await.into() };
    let renewed = agent.agents().renew_agent(RenewAgentRequest { params: Some(params) }).await.unwrap();
    let renewed = Identity::of(renewed.into_inner().svid.unwrap(), key);
    assert_eq!(renewed.id, agent.identity.id);
    // The old one works until then.
    agent.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
    let new = Agent::new(&server, renewed).await;
    new.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
    let status = agent.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap_err();
    assert_eq!(permission_denied_reason(&status), Some(Reason::AgentNotActive));
    // Also after a restart: the promotion was stored.
    let server = server.restart(|settings| settings.rate_limit.signing = false).await;
    let new = Agent::new(&server, new.identity).await;
    new.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
}

/// The datastore knows of the ban when the first use is noted, and memory does not yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_svid_of_an_agent_that_was_banned_elsewhere_is_refused_at_once() {
    let Some(database) = testkit::postgres() else { return };
    let data = finial_hcl::parse(&testkit::datastore(&database, database.port())).unwrap();
    let server = Server::with(|s| s.plugins = vec![PluginConfig::inline("DataStore", "sql", data)]).await;
    let agent = server.agent().await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let params = AgentX509svidParams { csr: csr(&key, None, &[]).await.into() };
    let renewed = agent.agents().renew_agent(RenewAgentRequest { params: Some(params) }).await.unwrap();
    let new = Agent::new(&server, Identity::of(renewed.into_inner().svid.unwrap(), key)).await;
    database.sql("UPDATE attested_node_entries SET serial_number = '', new_serial_number = ''");
    let status = new.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap_err();
    assert_eq!(permission_denied_reason(&status), Some(Reason::AgentBanned));
}

/// Memory does not know yet that another server evicted it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_renewal_of_an_agent_that_was_evicted_elsewhere_finds_none() {
    let Some(database) = testkit::postgres() else { return };
    let server = Server::with(|s| s.plugins = vec![datastore(&testkit::datastore(&database, database.port()))]).await;
    for _ in 0..20 {
        let agent = server.agent().await;
        database.sql("DELETE FROM attested_node_entries");
        let params = AgentX509svidParams { csr: any_csr().await };
        let renewed = agent.agents().renew_agent(RenewAgentRequest { params: Some(params) }).await;
        // The server may look at its datastore just then, and know already.
        if renewed.as_ref().is_err_and(|status| status.code() != Code::PermissionDenied) {
            assert_eq!(refused(renewed, Code::NotFound), "agent not found");
            return;
        }
    }
    panic!("the server always knew already");
}

async fn renewal_has_its_rules(lab: Lab) {
    let server = lab.start().await;
    let (identity, _) = server.attest_name("x", "x").await.unwrap();
    let again = Agent::new(&server, identity).await;
    let params = Some(AgentX509svidParams { csr: any_csr().await });
    let status = again.agents().renew_agent(RenewAgentRequest { params }).await.unwrap_err();
    assert_eq!(status.message(), "agent must reattest instead of renew");
    assert_eq!(permission_denied_reason(&status), Some(Reason::AgentMustReattest));
    let agent = server.agent().await;
    let renew = |params| async { agent.agents().renew_agent(RenewAgentRequest { params }).await };
    assert_eq!(refused(renew(None).await, Code::InvalidArgument), "params cannot be nil");
    let empty = Some(AgentX509svidParams::default());
    assert_eq!(refused(renew(empty).await, Code::InvalidArgument), "missing CSR");
    let garbage = Some(AgentX509svidParams { csr: "garbage".into() });
    assert!(refused(renew(garbage).await, Code::InvalidArgument).starts_with("failed to parse CSR: "));
    server.clock.advance(3601);
    // The handshake itself refuses an expired SVID; on a connection that is open already the call does.
    let status = renew(None).await.unwrap_err();
    assert_eq!(permission_denied_reason(&status), Some(Reason::AgentExpired));
}

async fn the_agent_version_is_kept(lab: Lab) {
    let server = lab.start().await;
    let agent = server.agent().await;
    let post = |version: String| async {
        let request = PostStatusRequest { agent_version: version, ..Default::default() };
        agent.agents().post_status(request).await
    };
    post("1.15.3".into()).await.unwrap();
    post(String::new()).await.unwrap();
    let message = refused(post("x".repeat(256)).await, Code::InvalidArgument);
    assert_eq!(message, "agent version is too long (max 255 characters)");
    let get = GetAgentRequest { id: id(agent.identity.id.path()), output_mask: None };
    assert_eq!(server.agents().get_agent(get).await.unwrap().into_inner().agent_version, "1.15.3");
}

async fn join_tokens_can_be_chosen_and_bring_an_alias(lab: Lab) {
    let server = lab.start().await;
    let create = |ttl, token: &str, agent_id| {
        let request = CreateJoinTokenRequest { ttl, token: token.into(), agent_id };
        let mut client = server.agents();
        async move { client.create_join_token(request).await.map(tonic::Response::into_inner) }
    };
    let token = create(60, "chosen", id("/group")).await.unwrap();
    assert_eq!(token, types::JoinToken { value: "chosen".into(), expires_at: NOW + 60 });
    assert!(refused(create(60, "chosen", None).await, Code::AlreadyExists).starts_with("failed to create token: "));
    for ttl in [0, -1] {
        let message = refused(create(ttl, "", None).await, Code::InvalidArgument);
        assert_eq!(message, "ttl is required, you must provide one");
    }
    let message = refused(create(60, "", id("/spire/agent/x")).await, Code::InvalidArgument);
    assert_eq!(
        message,
        "invalid agent ID: \"spiffe://example.org/spire/agent/x\" is not a workload in trust domain \"example.org\"; \
         path is in the reserved namespace"
    );
    for bad in ["a/b", "a b", "..", &"x".repeat(256)] {
        let message = refused(create(60, bad, None).await, Code::InvalidArgument);
        assert!(message.starts_with("invalid join token: "), "{message}");
    }
    // Workloads registered below the alias reach the agent, and the alias goes with the agent.
    server.create(vec![entry("/workload", "/group", &["unix:uid:1"])]).await;
    let agent = Agent::new(&server, server.attest_token("chosen").await.unwrap()).await;
    let seen = agent.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
    let mut paths: Vec<_> = seen.into_inner().entries.into_iter().map(|e| e.spiffe_id.unwrap().path).collect();
    paths.sort();
    assert_eq!(paths, ["/group", "/workload"]);
    let path = agent.identity.id.path();
    server.agents().delete_agent(DeleteAgentRequest { id: id(path) }).await.unwrap();
    let left = server
        .entries()
        .list_entries(finial_proto::server::entry::ListEntriesRequest::default())
        .await
        .unwrap()
        .into_inner()
        .entries;
    assert_eq!(left.len(), 1);
}

async fn agents_are_listed_by_filter_and_page(lab: Lab) {
    let server = lab.start().await;
    for name in ["a", "b", "c"] {
        server.attest_name(name, name).await.unwrap();
    }
    server.agent().await;
    let list = |filter: list_agents_request::Filter| {
        let mut client = server.agents();
        async move {
            let request = ListAgentsRequest { filter: Some(filter), ..Default::default() };
            client.list_agents(request).await.map(|r| r.into_inner().agents.len())
        }
    };
    use list_agents_request::Filter;
    let by_type = |name: &str| Filter { by_attestation_type: name.into(), ..Default::default() };
    assert_eq!(list(by_type("gullible")).await.unwrap(), 3);
    assert_eq!(list(by_type("nobody")).await.unwrap(), 0);
    assert_eq!(list(Filter { by_can_reattest: Some(false), ..Default::default() }).await.unwrap(), 1);
    let by_selectors = |texts: &[&str], r#match| Filter {
        by_selector_match: Some(types::SelectorMatch { selectors: selectors(texts), r#match }),
        ..Default::default()
    };
    assert_eq!(list(by_selectors(&["gullible:name:any"], 2)).await.unwrap(), 3);
    assert_eq!(list(by_selectors(&["gullible:name:any"], 0)).await.unwrap(), 0);
    assert_eq!(list(by_selectors(&["gullible:name:any", "gullible:name:a"], 0)).await.unwrap(), 1);
    let message = refused(list(by_selectors(&["a:b"], 9)).await, Code::InvalidArgument);
    assert_eq!(message, "failed to parse selectors: unhandled match 9");
    let until = |text: &str| Filter { by_expires_before: text.into(), ..Default::default() };
    assert_eq!(list(until("2027-01-15 08:00:01 +0000 +00")).await.unwrap(), 0);
    assert_eq!(list(until("2030-01-15 08:00:01 +0100 +01")).await.unwrap(), 4);
    assert!(refused(list(until("tomorrow")).await, Code::InvalidArgument).starts_with("failed to parse expires"));

    let page = |token: String| {
        let mut client = server.agents();
        async move {
            let request = ListAgentsRequest { page_size: 2, page_token: token, ..Default::default() };
            client.list_agents(request).await.map(tonic::Response::into_inner)
        }
    };
    let first = page(String::new()).await.unwrap();
    let second = page(first.next_page_token.clone()).await.unwrap();
    let third = page(second.next_page_token.clone()).await.unwrap();
    assert_eq!((first.agents.len(), second.agents.len(), third.agents.len()), (2, 2, 0));
    assert_eq!(third.next_page_token, "");
    let message = refused(page("x".into()).await, Code::InvalidArgument);
    assert_eq!(message, "failed to list agents: could not parse token 'x'");
}
