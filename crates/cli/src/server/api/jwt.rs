//! `jwt mint`.

use super::{gotime, id, is_capped, print, wire_seconds};
use crate::app::Command;
use crate::context::{Context, write_file};
use crate::goflag::FlagSet;
use crate::rpc::RpcExt;
use anyhow::{Context as _, ensure};
use finial_proto::server::svid::MintJwtsvidRequest;
use finial_proto::server::svid::svid_client::SvidClient;
use std::path::Path;
use std::time::Duration;

pub(crate) const MINT: Command = Command::server("jwt mint", "Mints a JWT-SVID", flags, |cx| Box::pin(mint(cx)));

fn flags(f: &mut FlagSet) {
    f.string("spiffeID", "", "SPIFFE ID of the JWT-SVID");
    f.duration("ttl", Duration::ZERO, "TTL of the JWT-SVID");
    f.strings("audience", "Audience claim that will be included in the SVID. Can be used more than once.");
    f.string("write", "", "File to write token to instead of stdout");
    f.output();
}

async fn mint(cx: Context) -> anyhow::Result<()> {
    let flags = &cx.flags;
    ensure!(!flags.string("spiffeID").is_empty(), "spiffeID must be specified");
    ensure!(!flags.strings("audience").is_empty(), "at least one audience must be specified");
    let request = MintJwtsvidRequest {
        id: Some(id(flags.string("spiffeID"))?),
        ttl: wire_seconds(flags, "ttl")?,
        audience: flags.strings("audience").to_vec(),
    };
    let response = SvidClient::new(cx.server()?).mint_jwtsvid(request).await.rpc().context("unable to mint SVID")?;
    let token = response.svid.as_ref().map(|svid| svid.token.as_str()).unwrap_or_default();
    ensure!(!token.is_empty(), "server response missing token");
    match finial_crypto::jwt_svid_times(token) {
        Ok((_, ends_at)) if is_capped(flags, ends_at) => cx.eprintln(format!(
            "JWT-SVID lifetime was capped shorter than specified ttl; expires {:?}",
            gotime::rfc3339(ends_at)
        )),
        Ok(_) => {}
        Err(error) => cx.eprintln(format!("Unable to determine JWT-SVID lifetime: {error}")),
    }
    let path = flags.string("write");
    if !path.is_empty() {
        write_file(Path::new(path), token.as_bytes(), 0o600).context("unable to write token")?;
        cx.println(format!("JWT-SVID written to {path}"));
        return Ok(());
    }
    if !print::json_message(&cx, "spire.api.server.svid.v1.MintJWTSVIDResponse", &response)? {
        cx.println(token);
    }
    Ok(())
}
