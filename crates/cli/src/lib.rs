//! The commands people type, flag for flag and word for word as SPIRE's.
//!
//! How to add a server command, say `entry show`, in `server/entry.rs`:
//! ```text
//! pub(crate) const COMMANDS: &[Command] = &[
//!     Command::server("entry show", "Displays configured registration entries", show_flags, |cx| Box::pin(show(cx))),
//!     // .usage("generate") if the name in "Usage of …:" is not the path
//! ];
//! fn show_flags(set: &mut FlagSet) {          // -socketPath and -instance are there already
//!     set.string("entryID", "", "The Entry ID of the records to show");
//!     set.strings("selector", "A colon-delimited type:value selector. Can be used more than once");
//!     set.output();                           // -output pretty|json
//! }
//! async fn show(cx: Context) -> anyhow::Result<()> {
//!     let mut client = EntryClient::new(cx.server()?);
//!     let response = client.list_entries(request).await.rpc()?;      // rpc::RpcExt: errors as grpc-go prints them
//!     if cx.json() {
//!         cx.print(json::lines(vec![json::message("spire.api.server.entry.v1.ListEntriesResponse", &response)?]));
//!         return Ok(());
//!     }
//!     cx.println(format!("Found {} entries", response.entries.len()));
//!     Ok(())
//! }
//! ```
//! and `entry::COMMANDS` in the list of `server/mod.rs`. What `cx.flags` gives is asked by name: `cx.flags.string("entryID")`.
//! An error (`anyhow`) is printed as `Error: <chain joined by ": ">` on stderr, exit code 1; `Err(Exit(1).into())` ends
//! without a word. `cx.eprintln` writes to stderr, `cx.read_file(path_or_dash, bytes_max)` reads `-data` files,
//! `write_file` writes with a mode. Tests: `finial_cli::spire_server().main(&args, &Io::captured(stdin, env).0)`.

mod agent;
mod app;
mod authority;
mod context;
mod debug;
pub mod dev;
mod entries;
mod explain;
mod goflag;
mod health;
mod json;
mod launch;
mod logger;
mod oidc;
mod rpc;
mod server;

pub use app::{Command, CommandFuture, Exit, Program, Run};
pub use context::{Captured, Context, Io};
pub use goflag::{FlagError, FlagSet, Flags, Output};

use std::future::Future;
use std::path::Path;
use std::process::ExitCode;

/// The version of SPIRE whose words, files and protocols these are.
const SPIRE_VERSION: &str = "1.15.3";

/// What `-version` prints and what an agent tells the server: SPIRE's version that this one stands for, and our own.
pub fn version() -> String {
    format!("{SPIRE_VERSION}+finial.{}", env!("CARGO_PKG_VERSION"))
}

/// The program `spire-server`.
pub fn spire_server() -> Program {
    Program { name: "spire-server", version: version(), commands: server::commands() }
}

/// The program `spire-agent`.
pub fn spire_agent() -> Program {
    Program { name: "spire-agent", version: version(), commands: agent::commands() }
}

/// The program `finial-agent`: `spire-agent` with what is ours.
pub fn finial_agent() -> Program {
    let commands = [agent::commands(), explain::COMMANDS.to_vec()].concat();
    Program { name: "finial-agent", commands, ..spire_agent() }
}

/// The program `finial explain`.
pub fn finial_explain() -> Program {
    Program { name: "finial", version: version(), commands: explain::COMMANDS.to_vec() }
}

/// The program `finial entries`.
pub fn finial_entries() -> Program {
    Program { name: "finial entries", version: version(), commands: entries::commands() }
}

/// The program `finial authority`.
pub fn finial_authority() -> Program {
    Program { name: "finial authority", version: version(), commands: authority::commands() }
}

const FINIAL_HELP: &str = "\
Usage: finial <command> [<args>]

Commands:
    server    All commands of spire-server: `finial server run -config server.conf`
    agent     All commands of spire-agent: `finial agent api fetch x509`
    entries   Registration entries as files under version control: export, diff, import, apply
    authority Replacing the authorities of all servers of a trust domain: rotate, status, take-back
    oidc      All of oidc-discovery-provider: `finial oidc -config oidc-discovery-provider.conf`
    explain   Why a process gets the identities that it gets, or none: `finial explain -pid N`
    dev       A trust domain on this machine, to look at and to try things with

Called as spire-server, spire-agent or oidc-discovery-provider (links to this program), it is that program, flag for flag.
";

/// The arguments of this process, its own name first. Bytes that are not text are replaced.
fn arguments() -> (String, Vec<String>) {
    let mut args = std::env::args_os().map(|a| a.to_string_lossy().into_owned());
    let name = args.next().unwrap_or_default();
    let name = Path::new(&name).file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    (name, args.collect())
}

/// The program `finial`: everything in one file.
pub fn finial_main() -> ExitCode {
    let io = Io::process();
    let (name, args) = arguments();
    match name.as_str() {
        "spire-server" => return spire_server().main(&args, &io).into(),
        "spire-agent" => return spire_agent().main(&args, &io).into(),
        "finial-agent" => return finial_agent().main(&args, &io).into(),
        "oidc-discovery-provider" => return oidc::main(&args, &io).into(),
        _ => {}
    }
    let rest = args.get(1..).unwrap_or_default();
    match args.first().map(String::as_str) {
        Some("server") => Program { name: "finial server", ..spire_server() }.main(rest, &io).into(),
        Some("agent") => Program { name: "finial agent", ..finial_agent() }.main(rest, &io).into(),
        Some("entries") => finial_entries().main(rest, &io).into(),
        Some("authority") => finial_authority().main(rest, &io).into(),
        Some("oidc") => oidc::main(rest, &io).into(),
        Some("explain") => finial_explain().main(&args, &io).into(),
        Some("dev") => dev::main(rest),
        Some("-v" | "-version" | "--version") => {
            io.err(&format!("{}\n", version()));
            ExitCode::SUCCESS
        }
        Some("-h" | "-help" | "--help") => {
            io.err(FINIAL_HELP);
            ExitCode::SUCCESS
        }
        _ => {
            io.err(FINIAL_HELP);
            ExitCode::from(127)
        }
    }
}

/// The program `finial-agent`: the agent alone.
pub fn finial_agent_main() -> ExitCode {
    let (_, args) = arguments();
    finial_agent().main(&args, &Io::process()).into()
}

/// Drives a short command on this thread.
fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(future)
}
