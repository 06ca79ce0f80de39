//! `token generate`.

use super::{id, print, wire_int};
use crate::app::Command;
use crate::context::Context;
use crate::goflag::FlagSet;
use crate::rpc::RpcExt;
use finial_proto::server::agent::CreateJoinTokenRequest;
use finial_proto::server::agent::agent_client::AgentClient;

pub(crate) const GENERATE: Command =
    Command::server("token generate", "Generates a join token", flags, |cx| Box::pin(generate(cx))).usage("generate");

fn flags(f: &mut FlagSet) {
    f.int("ttl", 600, "Token TTL in seconds");
    f.string("spiffeID", "", "Additional SPIFFE ID to assign the token owner (optional)");
    f.output();
}

async fn generate(cx: Context) -> anyhow::Result<()> {
    let spiffe_id = cx.flags.string("spiffeID");
    let agent_id = if spiffe_id.is_empty() { None } else { Some(id(spiffe_id)?) };
    let ttl = wire_int(cx.flags.int("ttl"), "TTL")?;
    let request = CreateJoinTokenRequest { ttl, token: String::new(), agent_id };
    let token = AgentClient::new(cx.server()?).create_join_token(request).await.rpc()?;
    if print::json_message(&cx, "spire.api.types.JoinToken", &token)? {
        return Ok(());
    }
    cx.println(format!("Token: {}", token.value));
    if spiffe_id.is_empty() {
        cx.println("Warning: Missing SPIFFE ID.");
    }
    Ok(())
}
