//! `spire-agent healthcheck`.

use crate::app::{AGENT_INSTANCE_USAGE, Command, Exit, Run};
use crate::context::Context;
use crate::goflag::FlagSet;
use crate::health;
use crate::rpc::channel;

pub(crate) const COMMANDS: &[Command] = &[Command::own(
    "healthcheck",
    "Determines agent health status",
    flags,
    Run::Async(|cx| Box::pin(run(cx))),
    None,
    false,
)
.usage("health")];

fn flags(set: &mut FlagSet) {
    set.bool("shallow", "Perform a less stringent health check");
    set.bool("verbose", "Print verbose information");
    set.string("socketPath", finial_config::AGENT_SOCKET_DEFAULT, "Path to the SPIRE Agent API socket");
    set.string("instance", "", AGENT_INSTANCE_USAGE);
}

async fn run(cx: Context) -> anyhow::Result<()> {
    if cx.flags.bool("verbose") {
        cx.println("Checking agent health...");
    }
    let checked = match cx.workload_socket() {
        Ok(socket) => health::check(&cx, channel(&socket), "agent").await,
        Err(error) => Err(error),
    };
    match checked {
        Ok(()) => {
            cx.println("Agent is healthy.");
            Ok(())
        }
        Err(error) => {
            cx.eprintln(format!("Agent is unhealthy: {error:#}"));
            Err(Exit(1).into())
        }
    }
}
