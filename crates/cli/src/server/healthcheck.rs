//! `spire-server healthcheck`.

use crate::app::Command;
use crate::context::Context;
use crate::goflag::FlagSet;
use crate::health;
use anyhow::Context as _;

pub(crate) const COMMANDS: &[Command] =
    &[Command::server("healthcheck", "Determines server health status", flags, |cx| Box::pin(run(cx)))];

fn flags(set: &mut FlagSet) {
    set.bool("shallow", "Perform a less stringent health check");
    set.bool("verbose", "Print verbose information");
}

async fn run(cx: Context) -> anyhow::Result<()> {
    if cx.flags.bool("verbose") {
        cx.println("Checking server health...");
    }
    health::check(&cx, cx.server()?, "server").await.context("server is unhealthy")?;
    cx.println("Server is healthy.");
    Ok(())
}
