//! `agent list`, `show`, `count`, `ban`, `evict`, `purge`.

use super::{ANSWER_BYTES_MAX, gotime, id, match_number, plural, print, selector};
use crate::app::Command;
use crate::context::Context;
use crate::goflag::{FlagSet, Flags};
use crate::json;
use crate::rpc::RpcExt;
use anyhow::{Context as _, ensure};
use finial_core::{Clock, SystemClock};
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::{self as pb, count_agents_request, list_agents_request};
use finial_proto::types;
use serde::Serialize;
use std::time::Duration;
use tonic::transport::Channel;

/// Agents per page.
const PAGE: i32 = 1000;

pub(crate) fn commands() -> Vec<Command> {
    vec![
        Command::server("agent list", "Lists attested agents and their SPIFFE IDs", filter_flags, |cx| {
            Box::pin(list(cx))
        }),
        Command::server("agent show", "Shows the details of an attested agent given its SPIFFE ID", show_flags, |cx| {
            Box::pin(show(cx))
        }),
        Command::server("agent count", "Count attested agents", filter_flags, |cx| Box::pin(count(cx))),
        Command::server("agent ban", "Ban an attested agent given its SPIFFE ID", ban_flags, |cx| Box::pin(ban(cx))),
        Command::server("agent evict", "Evicts an attested agent given its SPIFFE ID", evict_flags, |cx| {
            Box::pin(evict(cx))
        }),
        Command::server(
            "agent purge",
            "Purge expired agents that were attested using a non-TOFU security model based on a given time",
            purge_flags,
            |cx| Box::pin(purge(cx)),
        ),
    ]
}

fn client(cx: &Context) -> anyhow::Result<AgentClient<Channel>> {
    Ok(AgentClient::new(cx.server()?).max_decoding_message_size(ANSWER_BYTES_MAX))
}

fn filter_flags(f: &mut FlagSet) {
    f.strings("selector", "A colon-delimited type:value selector. Can be used more than once");
    f.string("attestationType", "", "Filter by attestation type, like join_token or x509pop.");
    f.tri_bool(
        "canReattest",
        "Filter based on string received, 'true': agents that can reattest, 'false': agents that can't reattest, other value will return all.",
    );
    f.tri_bool(
        "banned",
        "Filter based on string received, 'true': banned agents, 'false': not banned agents, other value will return all.",
    );
    f.string("expiresBefore", "", "Filter by expiration time (format: \"2006-01-02 15:04:05 -0700 -07\")");
    f.string(
        "matchSelectorsOn",
        "superset",
        "The match mode used when filtering by selectors. Options: exact, any, superset and subset",
    );
    f.output();
}

fn filter(flags: &Flags) -> anyhow::Result<list_agents_request::Filter> {
    let mut by_selector_match = None;
    if !flags.strings("selector").is_empty() {
        let behavior = match_number(flags.string("matchSelectorsOn")).context("unsupported match behavior")?;
        let mut selectors = Vec::new();
        for text in flags.strings("selector") {
            selectors.push(selector(text).with_context(|| format!("error parsing selector {text:?}"))?);
        }
        by_selector_match = Some(types::SelectorMatch { selectors, r#match: behavior });
    }
    let by_expires_before = flags.string("expiresBefore").to_owned();
    if !by_expires_before.is_empty() {
        gotime::check_filter(&by_expires_before).map_err(|e| anyhow::anyhow!("date is not valid: {e}"))?;
    }
    Ok(list_agents_request::Filter {
        by_attestation_type: flags.string("attestationType").into(),
        by_selector_match,
        by_banned: flags.tri_bool("banned"),
        by_can_reattest: flags.tri_bool("canReattest"),
        by_expires_before,
    })
}

async fn list(cx: Context) -> anyhow::Result<()> {
    let response = all(&mut client(&cx)?, filter(&cx.flags)?, None).await?;
    if print::json_message(&cx, "spire.api.server.agent.v1.ListAgentsResponse", &response)? {
        return Ok(());
    }
    let count = response.agents.len();
    if count == 0 {
        cx.println("No attested agents found");
        return Ok(());
    }
    cx.print(format!("Found {count} attested {}:\n\n", plural(count, "agent", "agents")));
    for agent in &response.agents {
        cx.print(print::agent(agent));
    }
    Ok(())
}

/// All pages.
async fn all(
    client: &mut AgentClient<Channel>,
    filter: list_agents_request::Filter,
    output_mask: Option<types::AgentMask>,
) -> anyhow::Result<pb::ListAgentsResponse> {
    let mut all = pb::ListAgentsResponse::default();
    let mut page_token = String::new();
    loop {
        let filter = Some(filter.clone());
        let request = pb::ListAgentsRequest { filter, output_mask, page_size: PAGE, page_token };
        let page = client.list_agents(request).await.rpc()?;
        all.agents.extend(page.agents);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

async fn count(cx: Context) -> anyhow::Result<()> {
    let filter = filter(&cx.flags)?;
    let filter = count_agents_request::Filter {
        by_attestation_type: filter.by_attestation_type,
        by_selector_match: filter.by_selector_match,
        by_banned: filter.by_banned,
        by_can_reattest: filter.by_can_reattest,
        by_expires_before: filter.by_expires_before,
    };
    let response = client(&cx)?.count_agents(pb::CountAgentsRequest { filter: Some(filter) }).await.rpc()?;
    if !print::json_message(&cx, "spire.api.server.agent.v1.CountAgentsResponse", &response)? {
        let count = usize::try_from(response.count).unwrap_or_default();
        cx.println(format!("{count} attested {}", plural(count, "agent", "agents")));
    }
    Ok(())
}

fn show_flags(f: &mut FlagSet) {
    f.string("spiffeID", "", "The SPIFFE ID of the agent to show (agent identity)");
    f.output();
}

fn ban_flags(f: &mut FlagSet) {
    f.string("spiffeID", "", "The SPIFFE ID of the agent to ban (agent identity)");
    f.output();
}

fn evict_flags(f: &mut FlagSet) {
    f.string("spiffeID", "", "The SPIFFE ID of the agent to evict (agent identity)");
    f.output();
}

fn agent_id(flags: &Flags) -> anyhow::Result<Option<types::Spiffeid>> {
    ensure!(!flags.string("spiffeID").is_empty(), "a SPIFFE ID is required");
    id(flags.string("spiffeID")).map(Some)
}

async fn show(cx: Context) -> anyhow::Result<()> {
    let request = pb::GetAgentRequest { id: agent_id(&cx.flags)?, output_mask: None };
    let agent = client(&cx)?.get_agent(request).await.rpc()?;
    if print::json_message(&cx, "spire.api.types.Agent", &agent)? {
        return Ok(());
    }
    cx.print("Found an attested agent given its SPIFFE ID\n\n");
    cx.print(print::agent(&agent));
    for s in &agent.selectors {
        cx.println(format!("Selectors         : {}:{}", s.r#type, s.value));
    }
    Ok(())
}

async fn ban(cx: Context) -> anyhow::Result<()> {
    client(&cx)?.ban_agent(pb::BanAgentRequest { id: agent_id(&cx.flags)? }).await.rpc()?;
    done(&cx, "Agent banned successfully");
    Ok(())
}

async fn evict(cx: Context) -> anyhow::Result<()> {
    client(&cx)?.delete_agent(pb::DeleteAgentRequest { id: agent_id(&cx.flags)? }).await.rpc()?;
    done(&cx, "Agent evicted successfully");
    Ok(())
}

/// The answer has no content: `{}` in JSON.
fn done(cx: &Context, sentence: &str) {
    cx.println(if cx.json() { "{}" } else { sentence });
}

fn purge_flags(f: &mut FlagSet) {
    f.duration(
        "expiredFor",
        Duration::from_secs(30 * 24 * 3600),
        "Amount of time that has passed since the agent's SVID has expired. It is used to determine which agents to purge.",
    );
    f.bool(
        "dryRun",
        "Indicates that the command will not perform any action, but will print the agents that would be purged.",
    );
    f.output();
}

#[derive(Serialize)]
struct Purge {
    expired_agents: Vec<Purged>,
}

#[derive(Serialize)]
struct Purged {
    agent_id: String,
    deleted: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    error: String,
}

async fn purge(cx: Context) -> anyhow::Result<()> {
    let dry_run = cx.flags.bool("dryRun");
    let expired_for_ms = cx.flags.duration_nanos("expiredFor") / 1_000_000;
    let mut client = client(&cx)?;
    // the others could not come back once their row is gone
    let filter = list_agents_request::Filter { by_can_reattest: Some(true), ..Default::default() };
    let mask = types::AgentMask { x509svid_expires_at: true, ..Default::default() };
    let agents = all(&mut client, filter, Some(mask)).await.context("failed to list agents")?.agents;
    let mut expired_agents = Vec::new();
    for agent in agents {
        let since_ms = SystemClock.now_ms().saturating_sub(agent.x509svid_expires_at.saturating_mul(1000));
        if since_ms <= expired_for_ms {
            continue;
        }
        let mut result = Purged { agent_id: print::id(agent.id.as_ref()), deleted: false, error: String::new() };
        if !dry_run {
            match client.delete_agent(pb::DeleteAgentRequest { id: agent.id }).await.rpc() {
                Ok(()) => result.deleted = true,
                Err(error) => result.error = error.to_string(),
            }
        }
        expired_agents.push(result);
    }
    print_purge(&cx, Purge { expired_agents }, dry_run)
}

fn print_purge(cx: &Context, purge: Purge, dry_run: bool) -> anyhow::Result<()> {
    if cx.json() {
        cx.println(json::line(&serde_json::to_value(purge)?));
        return Ok(());
    }
    let all = purge.expired_agents;
    if all.is_empty() {
        cx.println("No agents to purge.");
        return Ok(());
    }
    cx.print(format!("Found {} expired {}\n\n", all.len(), plural(all.len(), "agent", "agents")));
    let line = |purged: &Purged| cx.println(format!("SPIFFE ID         : {}", purged.agent_id));
    if dry_run {
        cx.println("\nAgents that can be purged:");
        all.iter().for_each(line);
        return Ok(());
    }
    let (purged, failed): (Vec<_>, Vec<_>) = all.into_iter().partition(|p| p.deleted);
    if !purged.is_empty() {
        cx.println("Agents purged:");
        purged.iter().for_each(line);
    }
    if !failed.is_empty() {
        cx.println("Agents not purged:");
        for purged in &failed {
            line(purged);
            cx.println(format!("Error             : {}", purged.error));
        }
    }
    Ok(())
}
