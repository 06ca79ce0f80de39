//! What a command is given: its flags, where to write, the environment, and a way to the server or agent.

use crate::goflag::{Flags, Output};
use crate::rpc;
use anyhow::Context as _;
pub(crate) use finial_runtime::errno_text;
use std::io::{IsTerminal as _, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tonic::transport::Channel;

/// Looks a variable of the environment up.
type Lookup = dyn Fn(&str) -> Option<String> + Send + Sync;

/// Where a program reads and writes. Cheap to clone.
#[derive(Clone)]
pub struct Io {
    stdin: Arc<Mutex<dyn Read + Send>>,
    stdout: Arc<Mutex<dyn Write + Send>>,
    stderr: Arc<Mutex<dyn Write + Send>>,
    env: Arc<Lookup>,
    /// Whether standard error is a person's terminal.
    terminal: bool,
}

impl Io {
    /// The process's own.
    pub fn process() -> Self {
        Self {
            stdin: Arc::new(Mutex::new(std::io::stdin())),
            stdout: Arc::new(Mutex::new(std::io::stdout())),
            stderr: Arc::new(Mutex::new(std::io::stderr())),
            env: Arc::new(|name| std::env::var(name).ok()),
            terminal: std::io::stderr().is_terminal(),
        }
    }

    /// For tests: reads `stdin`, keeps what is written.
    pub fn captured(
        stdin: Vec<u8>,
        env: impl Fn(&str) -> Option<String> + Send + Sync + 'static,
    ) -> (Self, Captured, Captured) {
        let (stdout, stderr) = (Captured::default(), Captured::default());
        let io = Self {
            stdin: Arc::new(Mutex::new(std::io::Cursor::new(stdin))),
            stdout: Arc::new(Mutex::new(stdout.clone())),
            stderr: Arc::new(Mutex::new(stderr.clone())),
            env: Arc::new(env),
            terminal: false,
        };
        (io, stdout, stderr)
    }

    /// Writes to standard output. A reader that went away ends nothing.
    pub fn out(&self, text: &str) {
        write(&self.stdout, text);
    }

    /// Writes to standard error.
    pub fn err(&self, text: &str) {
        write(&self.stderr, text);
    }

    /// Whether a person looks at standard error.
    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// A variable of the environment.
    pub fn var(&self, name: &str) -> Option<String> {
        (self.env)(name).filter(|v| !v.is_empty())
    }

    /// All of standard input.
    ///
    /// # Errors
    /// It cannot be read, or is larger than `bytes_max`.
    pub fn read_stdin(&self, bytes_max: u64) -> anyhow::Result<Vec<u8>> {
        let mut stdin = self.stdin.lock().unwrap_or_else(PoisonError::into_inner);
        read_limited(&mut *stdin, bytes_max).context("unable to read standard input")
    }
}

fn write(to: &Mutex<dyn Write + Send>, text: &str) {
    let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}

fn read_limited(from: &mut dyn Read, bytes_max: u64) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(bytes_max + 1).read_to_end(&mut bytes)?;
    anyhow::ensure!(bytes.len() as u64 <= bytes_max, "larger than {bytes_max} bytes");
    Ok(bytes)
}

/// What was written, for tests.
#[derive(Clone, Default)]
pub struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    /// All of it so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What a command is given.
#[derive(Clone)]
pub struct Context {
    /// Its flags.
    pub flags: Flags,
    /// Where it reads and writes.
    pub io: Io,
}

impl Context {
    /// Writes text to standard output as it is.
    pub fn print(&self, text: impl AsRef<str>) {
        self.io.out(text.as_ref());
    }

    /// Writes a line to standard output.
    pub fn println(&self, text: impl AsRef<str>) {
        self.io.out(&format!("{}\n", text.as_ref()));
    }

    /// Writes a line to standard error.
    pub fn eprintln(&self, text: impl AsRef<str>) {
        self.io.err(&format!("{}\n", text.as_ref()));
    }

    /// Whether `-output json` was given.
    pub fn json(&self) -> bool {
        self.flags.output() == Output::Json
    }

    /// A file, or standard input if `path` is `-`.
    ///
    /// # Errors
    /// It cannot be read, or is larger than `bytes_max`.
    pub fn read_file(&self, path: &str, bytes_max: u64) -> anyhow::Result<Vec<u8>> {
        if path == "-" {
            return self.io.read_stdin(bytes_max);
        }
        let mut file = std::fs::File::open(path).map_err(|e| anyhow::anyhow!("open {path}: {}", errno_text(&e)))?;
        read_limited(&mut file, bytes_max).with_context(|| format!("read {path}"))
    }

    /// A channel to the server's API socket, by `-socketPath`, `-instance` and the environment. It connects when used.
    ///
    /// # Errors
    /// `-instance` is given without a template.
    pub fn server(&self) -> anyhow::Result<Channel> {
        Ok(rpc::channel(&self.server_socket()?))
    }

    /// A channel to the agent's admin socket. It connects when used.
    pub(crate) fn agent_admin(&self) -> Channel {
        rpc::channel(std::path::Path::new(self.flags.string("socketPath")))
    }

    pub(crate) fn server_socket(&self) -> anyhow::Result<PathBuf> {
        const TEMPLATE: &str = "SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE";
        let default = finial_config::SERVER_SOCKET_DEFAULT;
        let missing = format!("you must define {TEMPLATE} to use the instance flag");
        self.socket(default, TEMPLATE, "SPIRE_SERVER_PRIVATE_SOCKET", &missing).map(PathBuf::from)
    }

    /// The agent's Workload API socket, absolute, by `-socketPath`, `-instance` and the environment.
    ///
    /// # Errors
    /// `-instance` is given without a template.
    pub fn workload_socket(&self) -> anyhow::Result<PathBuf> {
        const TEMPLATE: &str = "SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE";
        let default = finial_config::AGENT_SOCKET_DEFAULT;
        let missing = format!(" {TEMPLATE} environment variable must be defined when using the instance flag");
        let socket = self.socket(default, TEMPLATE, "SPIRE_AGENT_PUBLIC_SOCKET", &missing)?;
        std::path::absolute(&socket).context("failed to get absolute path for socket path")
    }

    fn socket(&self, default: &str, template: &str, variable: &str, missing: &str) -> anyhow::Result<String> {
        let instance = self.flags.string("instance");
        let mut expanded = None;
        if !instance.is_empty() {
            let Some(text) = self.io.var(template) else { anyhow::bail!("{missing}") };
            anyhow::ensure!(text.contains("%i"), "failed to find %i in {template}");
            expanded = Some(text.replace("%i", instance));
        }
        let given = self.flags.string("socketPath");
        if given != default {
            return Ok(given.into());
        }
        Ok(expanded.or_else(|| self.io.var(variable)).unwrap_or_else(|| default.into()))
    }
}

/// Writes a file and sets its permission bits, through a temporary file beside it.
///
/// # Errors
/// The folder or file cannot be written.
pub(crate) fn write_file(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let written = finial_runtime::files::replace(path, mode, |mut file| file.write_all(bytes));
    written.map_err(|e| anyhow::anyhow!("open {}: {}", path.display(), errno_text(&e)))
}
