//! `debug getinfo`, of the server and of the agent.

use crate::app::Command;
use crate::context::Context;
use crate::goflag::FlagSet;
use crate::json;
use crate::rpc::RpcExt;
use finial_config::format_go_duration;
use finial_proto::types::Spiffeid;
use finial_proto::{agent::debug as agent_api, server::debug as server_api};
use std::time::Duration;
use time::format_description::well_known::Rfc3339;

pub(crate) const SERVER: &[Command] =
    &[Command::server("debug getinfo", "Prints debug information about the server", flags, |cx| Box::pin(server(cx)))];
pub(crate) const AGENT: &[Command] =
    &[Command::agent_admin("debug getinfo", "Prints debug information about the agent", flags, |cx| {
        Box::pin(agent(cx))
    })];

fn flags(set: &mut FlagSet) {
    set.output();
}

fn uptime(seconds: i32) -> String {
    format_go_duration(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

fn rfc3339(unix_seconds: i64) -> String {
    let time = time::OffsetDateTime::from_unix_timestamp(unix_seconds).ok();
    time.and_then(|t| t.format(&Rfc3339).ok()).unwrap_or_else(|| unix_seconds.to_string())
}

fn chain<'a>(certificates: impl Iterator<Item = (Option<&'a Spiffeid>, &'a str, i64)>) -> String {
    let mut out = String::new();
    for (index, (id, subject, expires_at)) in certificates.enumerate() {
        if index == 0 {
            out.push_str("  SVID Chain:\n");
        }
        let id = id.map_or_else(|| "(none)".into(), |id| format!("spiffe://{}{}", id.trust_domain, id.path));
        let expires_at = rfc3339(expires_at);
        out.push_str(&format!(
            "    [{index}] SPIFFE ID:  {id}\n        Subject:    {subject}\n        Expires At: {expires_at}\n"
        ));
    }
    out
}

async fn server(cx: Context) -> anyhow::Result<()> {
    let mut client = server_api::debug_client::DebugClient::new(cx.server()?);
    let info = client.get_info(server_api::GetInfoRequest {}).await.rpc()?;
    if cx.json() {
        cx.print(json::lines(vec![json::message("spire.api.server.debug.v1.GetInfoResponse", &info)?]));
        return Ok(());
    }
    cx.print(format!(
        "Server Debug Info:\n  Uptime:                  {}\n  Registered Agents:       {}\n  Registration Entries:    {}\n  Federated Bundles:       {}\n",
        uptime(info.uptime),
        info.agents_count,
        info.entries_count,
        info.federated_bundles_count
    ));
    cx.print(chain(info.svid_chain.iter().map(|c| (c.id.as_ref(), c.subject.as_str(), c.expires_at))));
    Ok(())
}

async fn agent(cx: Context) -> anyhow::Result<()> {
    let mut client = agent_api::debug_client::DebugClient::new(cx.agent_admin());
    let info = client.get_info(agent_api::GetInfoRequest {}).await.rpc()?;
    if cx.json() {
        cx.print(json::lines(vec![json::message("spire.agent.debug.v1.GetInfoResponse", &info)?]));
        return Ok(());
    }
    let last_sync = if info.last_sync_success == 0 { "(never)".into() } else { rfc3339(info.last_sync_success) };
    cx.print(format!(
        "Agent Debug Info:\n  Uptime:                          {}\n  Last Sync Success:               {last_sync}\n  Cached X.509 SVIDs:              {}\n  Cached JWT SVIDs:                {}\n  Cached SVID Store X.509 SVIDs:   {}\n",
        uptime(info.uptime),
        info.cached_x509_svids_count,
        info.cached_jwt_svids_count,
        info.cached_svidstore_x509_svids_count
    ));
    cx.print(chain(info.svid_chain.iter().map(|c| (c.id.as_ref(), c.subject.as_str(), c.expires_at))));
    Ok(())
}
