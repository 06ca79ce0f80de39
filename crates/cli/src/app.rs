//! A program as a tree of commands, with help and exit codes as `mitchellh/cli` gives them: 127 and the list of commands
//! for an unknown one, 1 for failures, 0 for help.

use crate::context::{Context, Io};
use crate::goflag::{FlagError, FlagSet};
use crate::rpc::RpcError;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

/// What a command that waits returns.
pub type CommandFuture = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

/// What a command does.
#[derive(Clone, Copy)]
pub enum Run {
    /// Waits for others: driven by a runtime on this thread.
    Async(fn(Context) -> CommandFuture),
    /// Does all itself, and makes its own runtime if it needs one.
    Blocking(fn(Context) -> anyhow::Result<()>),
}

/// Which flags all commands of a kind have, and how they print errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// Talks to the server: `-socketPath`, `-instance`; `Error: …`.
    Server,
    /// Talks to the Workload API: `-socketPath`, `-instance`, `-timeout`; the bare error, also for bad flags.
    Workload,
    /// Talks to the agent's admin socket: `-socketPath`; `Error: …`.
    AgentAdmin,
    /// As it says: bad flags are answered with this before the error, or not at all; other errors bare.
    Own { flag_error: Option<&'static str>, help_line: bool },
}

/// One command.
#[derive(Clone, Copy)]
pub struct Command {
    path: &'static str,
    usage: &'static str,
    synopsis: &'static str,
    flags: fn(&mut FlagSet),
    run: Run,
    style: Style,
    /// Whether it is there at all.
    enabled: fn(&Io) -> bool,
}

impl Command {
    /// A command that talks to the server. `path` is how it is called, such as `entry create`.
    pub const fn server(
        path: &'static str,
        synopsis: &'static str,
        flags: fn(&mut FlagSet),
        run: fn(Context) -> CommandFuture,
    ) -> Self {
        Self { path, usage: path, synopsis, flags, run: Run::Async(run), style: Style::Server, enabled: always }
    }

    /// A command that talks to the Workload API.
    pub(crate) const fn workload(
        path: &'static str,
        synopsis: &'static str,
        flags: fn(&mut FlagSet),
        run: fn(Context) -> CommandFuture,
    ) -> Self {
        Self { path, usage: path, synopsis, flags, run: Run::Async(run), style: Style::Workload, enabled: always }
    }

    /// A command that talks to the agent's admin socket.
    pub(crate) const fn agent_admin(
        path: &'static str,
        synopsis: &'static str,
        flags: fn(&mut FlagSet),
        run: fn(Context) -> CommandFuture,
    ) -> Self {
        Self { path, usage: path, synopsis, flags, run: Run::Async(run), style: Style::AgentAdmin, enabled: always }
    }

    /// A command with flags of its own only. Bad flags end with `flag_error` and the error, if there is one;
    /// `help_line` tells whether help ends with Go's line.
    pub(crate) const fn own(
        path: &'static str,
        synopsis: &'static str,
        flags: fn(&mut FlagSet),
        run: Run,
        flag_error: Option<&'static str>,
        help_line: bool,
    ) -> Self {
        Self { path, usage: path, synopsis, flags, run, style: Style::Own { flag_error, help_line }, enabled: always }
    }

    /// The name in `Usage of …:` if it is not the path.
    #[must_use]
    pub const fn usage(mut self, name: &'static str) -> Self {
        self.usage = name;
        self
    }

    /// The command is there only if this says so.
    #[must_use]
    pub(crate) const fn only_if(mut self, enabled: fn(&Io) -> bool) -> Self {
        self.enabled = enabled;
        self
    }

    fn flag_set(&self) -> FlagSet {
        let mut set = FlagSet::new(self.usage);
        match self.style {
            Style::Server => {
                set.string("socketPath", finial_config::SERVER_SOCKET_DEFAULT, "Path to the SPIRE Server API socket");
                set.string(
                    "instance",
                    "",
                    "Instance name to substitute into socket templates (env SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE).",
                );
            }
            Style::Workload => {
                set.duration_value("timeout", Duration::from_secs(5), "Time to wait for a response");
                set.string(
                    "socketPath",
                    finial_config::AGENT_SOCKET_DEFAULT,
                    "Path to the SPIRE Agent API Unix domain socket",
                );
                set.string("instance", "", AGENT_INSTANCE_USAGE);
            }
            Style::AgentAdmin => {
                set.string("socketPath", AGENT_ADMIN_SOCKET, "Path to the SPIRE Agent admin API socket")
            }
            Style::Own { .. } => {}
        }
        (self.flags)(&mut set);
        set
    }

    /// Prints usage; the line that follows it in help.
    fn help(&self, io: &Io) -> &'static str {
        io.err(&self.flag_set().usage());
        match self.style {
            Style::Server | Style::AgentAdmin | Style::Own { help_line: true, .. } => "flag: help requested",
            _ => "",
        }
    }

    fn execute(&self, args: &[String], io: &Io) -> u8 {
        let flags = match self.flag_set().parse(args) {
            Ok(flags) => flags,
            Err(error) => {
                if error != FlagError::Help {
                    io.err(&format!("{error}\n"));
                }
                io.err(&self.flag_set().usage());
                match self.style {
                    Style::Workload => io.err(&format!("{error}\n")),
                    Style::Own { flag_error: Some(before), .. } => io.err(&format!("{before}{error}\n")),
                    _ => {}
                }
                return 1;
            }
        };
        let context = Context { flags, io: io.clone() };
        // SPIRE looks for the socket before anything else
        let socket = if self.style == Style::Server { context.server_socket().map(drop) } else { Ok(()) };
        let result = socket.and_then(|()| match self.run {
            Run::Blocking(run) => run(context),
            Run::Async(run) => crate::block_on(run(context)),
        });
        match result {
            Ok(()) => 0,
            Err(error) => self.fail(&error, io),
        }
    }

    fn fail(&self, error: &anyhow::Error, io: &Io) -> u8 {
        if let Some(Exit(code)) = error.downcast_ref() {
            return *code;
        }
        if matches!(self.style, Style::Server | Style::AgentAdmin) {
            io.err("Error: ");
        }
        print_error(error, io);
        1
    }
}

/// Prints an error as commands that talk to the server do, for one that ends with an exit code of its own.
pub(crate) fn report(error: &anyhow::Error, io: &Io) {
    io.err("Error: ");
    print_error(error, io);
}

/// The error, and what to do about it.
fn print_error(error: &anyhow::Error, io: &Io) {
    io.err(&format!("{error:#}\n"));
    let of_call = || error.chain().find_map(|e| e.downcast_ref::<RpcError>()).and_then(RpcError::hint);
    let advised = error.chain().find_map(|e| e.downcast_ref::<Advised>()).map(|advised| advised.hint.clone());
    if let Some(hint) = advised.or_else(of_call) {
        io.err(&format!("hint: {hint}\n"));
    }
}

/// An error with advice, which is printed on a line of its own: the words of the error may be SPIRE's.
#[derive(Debug, thiserror::Error)]
#[error("{error:#}")]
pub(crate) struct Advised {
    error: anyhow::Error,
    hint: String,
}

impl Advised {
    pub(crate) fn new(error: anyhow::Error, hint: String) -> Self {
        Self { error, hint }
    }
}

fn always(_: &Io) -> bool {
    true
}

/// Where the agent's admin socket is by default.
const AGENT_ADMIN_SOCKET: &str = "/tmp/spire-agent/private/admin.sock";
/// The usage of `-instance` in the agent's commands.
pub(crate) const AGENT_INSTANCE_USAGE: &str =
    "Instance name to substitute into socket templates (env SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE).";

/// Ends a command with this exit code; all that is to be said was said.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("exit {0}")]
pub struct Exit(pub u8);

/// A program: its name in help texts, its version, its commands.
pub struct Program {
    /// The name.
    pub name: &'static str,
    /// What `-version` prints.
    pub version: String,
    /// All commands, in any order.
    pub commands: Vec<Command>,
}

enum Node {
    Command(Command),
    /// A word that only leads to others.
    Parent,
}

const PARENT_HELP: &str = "This command is accessed by using one of the subcommands below.";

impl Program {
    /// Runs the command that the arguments name (without the program's own name); the exit code.
    pub fn main(&self, args: &[String], io: &Io) -> u8 {
        let tree = self.tree(io);
        let flags_end = args.iter().position(|a| a == "--").unwrap_or(args.len());
        let before_end = args.get(..flags_end).unwrap_or_default();
        let is_help = before_end.iter().any(|a| matches!(a.as_str(), "-h" | "-help" | "--help"));
        let first_word = before_end.iter().position(|a| !a.is_empty() && !a.starts_with('-'));
        let top_flags = before_end.get(..first_word.unwrap_or(flags_end)).unwrap_or_default();
        if top_flags.iter().any(|a| matches!(a.as_str(), "-v" | "-version" | "--version")) {
            io.err(&format!("{}\n", self.version));
            return 0;
        }
        let Some(first_word) = first_word else {
            io.err(&self.list(&tree));
            return if is_help { 0 } else { 127 };
        };
        let words: Vec<&str> = before_end.iter().skip(first_word).map(String::as_str).collect();
        let words_end = words.iter().position(|w| w.is_empty() || w.starts_with('-') || w.contains(' '));
        let words = words.get(..words_end.unwrap_or(words.len())).unwrap_or_default();
        let found = (1..=words.len()).rev().find_map(|n| {
            let path = words.get(..n)?.join(" ");
            tree.get(path.as_str()).map(|node| (path, n, node))
        });
        let Some((path, used, node)) = found else {
            io.err(&self.list(&tree));
            return 127;
        };
        if is_help {
            help(&tree, &path, node, io);
            return 0;
        }
        if top_flags.iter().any(|a| a.starts_with('-')) {
            io.err("Invalid flags before the subcommand. If these flags are for\nthe subcommand, please put them after the subcommand.\n\n");
            help(&tree, &path, node, io);
            return 1;
        }
        match node {
            Node::Command(command) => command.execute(args.get(first_word + used..).unwrap_or_default(), io),
            Node::Parent => {
                help(&tree, &path, node, io);
                1
            }
        }
    }

    fn tree(&self, io: &Io) -> BTreeMap<String, Node> {
        let mut tree = BTreeMap::new();
        for command in self.commands.iter().filter(|command| (command.enabled)(io)) {
            let mut path = command.path;
            while let Some((parent, _)) = path.rsplit_once(' ') {
                tree.entry(parent.to_owned()).or_insert(Node::Parent);
                path = parent;
            }
            tree.insert(command.path.to_owned(), Node::Command(*command));
        }
        tree
    }

    fn list(&self, tree: &BTreeMap<String, Node>) -> String {
        let top: Vec<(&str, &Node)> = children(tree, "");
        let width = top.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let mut out =
            format!("Usage: {} [--version] [--help] <command> [<args>]\n\nAvailable commands are:\n", self.name);
        for (name, node) in top {
            out.push_str(&format!("    {name:width$}    {}\n", node.synopsis()));
        }
        out + "\n"
    }
}

impl Node {
    fn synopsis(&self) -> &'static str {
        match self {
            Self::Command(command) => command.synopsis,
            Self::Parent => "",
        }
    }

    fn help(&self, io: &Io) -> &'static str {
        match self {
            Self::Command(command) => command.help(io),
            Self::Parent => PARENT_HELP,
        }
    }
}

/// The commands right below `path`, by their last word.
fn children<'a>(tree: &'a BTreeMap<String, Node>, path: &str) -> Vec<(&'a str, &'a Node)> {
    let below = |name: &'a str| {
        let rest = if path.is_empty() { name } else { name.strip_prefix(path)?.strip_prefix(' ')? };
        (!rest.contains(' ')).then_some(rest)
    };
    tree.iter().filter_map(|(name, node)| Some((below(name)?, node))).collect()
}

/// Usage of the command and of all right below it, then the list of these.
fn help(tree: &BTreeMap<String, Node>, path: &str, node: &Node, io: &Io) {
    let mut text = node.help(io).to_owned();
    let below = children(tree, path);
    for (_, child) in &below {
        child.help(io);
    }
    if !below.is_empty() {
        let width = below.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        text.push_str("\n\nSubcommands:");
        for (name, child) in below {
            text.push_str(&format!("\n    {name:width$}    {}", child.synopsis()));
        }
    }
    io.err(&(text + "\n"));
}
