//! The Agent and Logger services.

use super::{Answers, ask, ask_list, ids, of_servers, selector, show};
use finial_net::client::uds_channel;
use finial_proto::server::agent::{self as agents, agent_client::AgentClient};
use finial_proto::server::logger::{SetLogLevelRequest, logger_client::LoggerClient};
use finial_proto::types::SelectorMatch;
use testkit::{Server, ServerOptions};

#[test]
fn agents_and_tokens() {
    of_servers(&ServerOptions::default(), odd);
}

pub(super) async fn odd(server: &Server) -> Answers {
    let mut client = AgentClient::new(uds_channel(server.socket()));
    let mut answers = Answers::new();
    for id in ids() {
        ask!(answers, client.get_agent, agents::GetAgentRequest { id: id.clone(), output_mask: None });
        ask!(answers, client.delete_agent, agents::DeleteAgentRequest { id: id.clone() });
        ask!(answers, client.ban_agent, agents::BanAgentRequest { id: id.clone() });
        if id.as_ref().is_some_and(|i| i.trust_domain == "other.org" || i.path.ends_with('/')) {
            let request = agents::CreateJoinTokenRequest { ttl: 60, token: "t".into(), agent_id: id };
            ask!(answers, client.create_join_token, request);
        }
    }
    let token = |ttl, token: &str| agents::CreateJoinTokenRequest { ttl, token: token.into(), agent_id: None };
    ask!(answers, client.create_join_token, token(0, "t"), token(-1, "t"), token(i32::MIN, ""),);
    for r#match in [0, 1, 2, 3] {
        for selectors in [vec![selector("", "x")], vec![selector("a", "b")], vec![selector("a:b", "c")]] {
            let by_selector_match = Some(SelectorMatch { selectors, r#match });
            let filter = agents::list_agents_request::Filter { by_selector_match, ..Default::default() };
            let request = agents::ListAgentsRequest { filter: Some(filter), ..Default::default() };
            ask_list!(answers, client.list_agents, agents, request);
        }
    }
    let by_expires_before = "2000-01-01 15:04:05 -0700 -07".to_owned();
    let filter = agents::list_agents_request::Filter { by_expires_before, ..Default::default() };
    let request = agents::ListAgentsRequest { filter: Some(filter), ..Default::default() };
    ask_list!(answers, client.list_agents, agents, request);
    for (token, page_size) in [("x", 1), ("-1", 1), ("7", 1), ("", -1)] {
        let page_token = token.to_owned();
        let request = agents::ListAgentsRequest { page_token, page_size, ..Default::default() };
        ask_list!(answers, client.list_agents, agents, request);
    }
    let params = Some(agents::AgentX509svidParams { csr: "x".into() });
    ask!(answers, client.renew_agent, agents::RenewAgentRequest { params });
    ask!(answers, client.post_status, agents::PostStatusRequest::default());
    ask!(answers, client.count_agents, agents::CountAgentsRequest::default());
    let mut logger = LoggerClient::new(uds_channel(server.socket()));
    for new_level in [0, 99, -1] {
        ask!(answers, logger.set_log_level, SetLogLevelRequest { new_level });
    }
    answers
}
