//! `finial dev`: a whole trust domain for one person on one machine, and a story that shows what it does.
//!
//! Server and agent run in this process. The workloads of the story are real processes of their own: links to this program
//! in the data folder, told apart by what the kernel says of them (`unix:path`), and nothing else.

mod child;
mod domain;
mod folder;
mod story;
mod workload;

use finial_core::{Clock, SystemClock};
use finial_runtime::{Shutdown, Supervisor, log, signals};
use folder::Folder;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

const HELP: &str = "\
Usage: finial dev [--data DIR] [--keep] [--verbose]

Starts a trust domain on this machine: a server, an agent and an identity for you. Then it shows, step by step, how
programs get identities from it and use them. Nothing is installed, and nothing outside the data folder is written.

  --data DIR   the data folder (default ~/.local/share/finial-dev); remove it to start anew
  --keep       stay up afterwards, until Ctrl-C, so that you can try commands yourself
  --verbose    write debug messages to the log, DIR/finial.log
";

/// How long tasks have to end.
const GRACE: Duration = Duration::from_secs(12);

/// What went wrong, in words for a newcomer, and what to do about it.
#[derive(Debug)]
struct Trouble {
    what: String,
    hint: String,
}

impl Trouble {
    fn new(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { what: what.into(), hint: hint.into() }
    }

    /// With the log as the place to look.
    fn in_log(what: impl Into<String>, folder: &Folder) -> Self {
        let hint = format!("look at the end of {}; to start anew, remove {}", folder.log().display(), folder);
        Self::new(what, hint)
    }
}

#[derive(Debug)]
struct Options {
    data: Option<PathBuf>,
    keep: bool,
    verbose: bool,
}

/// `Err` holds what to print and the exit code.
fn parse(args: &[String]) -> Result<Options, (String, u8)> {
    let mut options = Options { data: None, keep: false, verbose: false };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let name = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).unwrap_or(arg);
        match name.split_once('=').map_or((name, None), |(name, value)| (name, Some(value.to_owned()))) {
            ("keep", None) => options.keep = true,
            ("verbose", None) => options.verbose = true,
            ("help" | "h", None) => return Err((HELP.to_owned(), 0)),
            ("data", value) => match value.or_else(|| args.next().cloned()).filter(|v| !v.is_empty()) {
                Some(value) => options.data = Some(value.into()),
                None => return Err((format!("--data needs the name of a folder\n\n{HELP}"), 2)),
            },
            _ => return Err((format!("I do not know {arg:?}\n\n{HELP}"), 2)),
        }
    }
    Ok(options)
}

/// Writes to standard output. Whoever closes it early has seen enough.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
}

fn complain(trouble: &Trouble) {
    let mut out = std::io::stderr().lock();
    let _ = writeln!(out, "\nThis did not work: {}\nhint: {}", trouble.what, trouble.hint);
}

/// Runs `finial dev` with what follows the word `dev` on the command line.
pub fn main(args: &[String]) -> ExitCode {
    let started = Instant::now();
    if let [word, task] = args
        && word == "workload"
    {
        return workload::main(task);
    }
    let options = match parse(args) {
        Ok(options) => options,
        Err((text, 0)) => {
            say(text.trim_end());
            return ExitCode::SUCCESS;
        }
        Err((text, code)) => {
            let _ = std::io::stderr().write_all(text.as_bytes());
            return ExitCode::from(code);
        }
    };
    match run(&options, started) {
        Ok(()) => ExitCode::SUCCESS,
        Err(trouble) => {
            complain(&trouble);
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options, started: Instant) -> Result<(), Trouble> {
    let folder = Folder::open(options.data.clone())?;
    let level = if options.verbose { log::Level::Debug } else { log::Level::Info };
    let settings = log::Settings { level, format: log::Format::Text, file: Some(folder.log()), source_location: false };
    let handle = log::init(&settings).map_err(|e| {
        let what = format!("the log {} cannot be written: {e}", folder.log().display());
        Trouble::new(what, "choose another folder with --data DIR")
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| Trouble::new(format!("no threads: {e}"), "close some programs and try again"))?;
    runtime.block_on(async {
        let shutdown = Shutdown::new();
        let supervisor = Supervisor::new(shutdown.clone());
        let spawner = supervisor.spawner();
        signals(&spawner, shutdown.clone(), Some(handle))
            .map_err(|e| Trouble::new(format!("signals cannot be received: {e}"), "this should not happen"))?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let told = tokio::select! {
            biased;
            told = story::tell(&folder, &spawner, clock, started, options.keep) => told,
            () = shutdown.cancelled() => Ok(()), // by Ctrl-C, or because something failed: see below
        };
        shutdown.trigger();
        let ended = supervisor.run(GRACE).await;
        told?;
        ended.map_err(|failure| Trouble::in_log(format!("the {failure}"), &folder))?;
        say("\nEverything is stopped.");
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Options, (String, u8)> {
        parse(&args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_few_and_mistakes_are_told() {
        let options = parsed(&["-keep", "--data", "/x"]).expect("parses");
        assert!(options.keep && !options.verbose && options.data == Some("/x".into()));
        assert_eq!(parsed(&["--data=/y"]).expect("parses").data, Some("/y".into()));
        assert_eq!(parsed(&["--help"]).err().map(|(_, code)| code), Some(0));
        for bad in [&["--data"][..], &["--data="], &["keepp"], &["--keep=1"], &["x"]] {
            assert_eq!(parsed(bad).err().map(|(_, code)| code), Some(2), "{bad:?}");
        }
    }
}
