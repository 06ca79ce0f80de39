//! Two servers, two commands, and what differs between their answers.

use finial_cli::Io;
use finial_core::{AgentRecord, SelectorSet, SpiffeId, SystemClock};
use finial_store::{Store, StoreSettings};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use testkit::free_port;

const WAIT_MAX: Duration = Duration::from_secs(60);

/// `None` where nobody promised one; a promise (`FINIAL_REAL_SPIRE`, which `./test` sets) that is not kept fails.
pub(crate) fn spire() -> Option<PathBuf> {
    let promised = std::env::var_os("FINIAL_REAL_SPIRE").map(PathBuf::from);
    let folder = match &promised {
        Some(folder) => folder.clone(),
        None => Path::new(&std::env::var_os("HOME")?).join(".cache/finial/spire-1.15.3"),
    };
    let server = folder.join("spire-server");
    assert!(server.exists() || promised.is_none(), "no SPIRE at {}: run tests/real-spire/build.sh", folder.display());
    if !server.exists() {
        // not eprintln: what tests print is only shown when they fail
        let _ = writeln!(std::io::stderr(), "\nSKIPPED: no SPIRE at {}", folder.display());
        return None;
    }
    Some(server)
}

/// Without it there is no `wit mint`.
const FLAGS: (&str, &str) = ("SPIRE_SERVER_FFLAGS", "other wit-svid");
const CHILD_CONFIG: &str = "FINIAL_CLI_CHILD_CONFIG";

/// Not a test of its own: our server, as the process that other tests start.
#[test]
#[ignore = "the child of another test"]
#[allow(clippy::exit)] // the server's exit code is the process's
fn child_runs_our_server() {
    let Some(config) = std::env::var_os(CHILD_CONFIG) else { return };
    let args = ["run", "-config", config.to_str().unwrap()].map(str::to_owned);
    std::process::exit(i32::from(finial_cli::spire_server().main(&args, &Io::process())));
}

/// A running server, and what it may be called with.
pub(crate) struct Server {
    child: Child,
    pub(crate) bin: PathBuf,
    pub(crate) folder: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Server {
    fn start(bin: &Path, folder: &Path, database: &Path, finial: bool, plugin: &str) -> Self {
        std::fs::create_dir(folder).unwrap();
        std::fs::copy(database, folder.join("db")).unwrap();
        let flags = r#"experimental { feature_flags = ["wit-svid"] }"#;
        Self::start_in(bin, folder, "example.org", finial, flags, plugin)
    }

    /// A server of SPIRE's own, of another trust domain, whose bundle can be fetched from the port.
    pub(crate) fn foreign(bin: &Path, folder: &Path) -> (Self, u16) {
        std::fs::create_dir(folder).unwrap();
        let port = free_port();
        let endpoint = format!(
            r#"federation {{ bundle_endpoint {{ address = "127.0.0.1" port = {port} profile "https_spiffe" {{}} }} }}"#
        );
        (Self::start_in(bin, folder, "foreign.test", false, &endpoint, ""), port)
    }

    fn start_in(bin: &Path, folder: &Path, trust_domain: &str, finial: bool, more: &str, plugin: &str) -> Self {
        let port = free_port();
        let at = folder.display();
        let conf = format!(
            r#"server {{ bind_address = "127.0.0.1" bind_port = "{port}" socket_path = "{at}/s" trust_domain = "{trust_domain}" data_dir = "{at}" {more} }}
plugins {{
  DataStore "sql" {{ plugin_data {{ database_type = "sqlite3" connection_string = "{at}/db" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "memory" {{ plugin_data {{}} }}
  {plugin}
}}"#
        );
        std::fs::write(folder.join("conf"), conf).unwrap();
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let mut command = if finial {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "harness::child_runs_our_server", "--ignored", "--nocapture"]);
            command.env(CHILD_CONFIG, folder.join("conf"));
            command
        } else {
            let mut command = Command::new(bin);
            command.args(["run", "-config"]).arg(folder.join("conf"));
            command
        };
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let server = Self { child, bin: bin.into(), folder: folder.into() };
        let start = Instant::now();
        while server.theirs(&["healthcheck"], "").code != 0 {
            assert!(start.elapsed() < WAIT_MAX, "{}", std::fs::read_to_string(folder.join("log")).unwrap());
            std::thread::park_timeout(Duration::from_millis(50));
        }
        server
    }

    /// The arguments with this server's socket behind the command's words.
    fn args(&self, args: &[&str]) -> Vec<String> {
        let most = if args.first() == Some(&"localauthority") { 3 } else { 2 };
        let words = args.iter().take_while(|a| !a.starts_with('-')).count().min(most);
        let mut all: Vec<String> = args[..words].iter().map(|a| (*a).to_owned()).collect();
        all.extend(["-socketPath".to_owned(), self.folder.join("s").display().to_string()]);
        all.extend(args[words..].iter().map(|a| a.replace("{folder}", &self.folder.display().to_string())));
        all
    }

    pub(crate) fn theirs(&self, args: &[&str], stdin: &str) -> Outcome {
        let mut child = Command::new(&self.bin)
            .args(self.args(args))
            .env(FLAGS.0, FLAGS.1)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // a command that does not read it may be gone already
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        let output = child.wait_with_output().unwrap();
        self.plain(output.status.code().unwrap(), &output.stdout, &output.stderr)
    }

    /// `finial entries`, with this server's socket behind the first word.
    pub(crate) fn entries(&self, args: &[&str], stdin: &str) -> Outcome {
        let (io, stdout, stderr) = Io::captured(stdin.as_bytes().to_vec(), |_| None);
        let socket = self.folder.join("s").display().to_string();
        let (first, rest) = args.split_first().unwrap();
        let words = [&[*first, "-socketPath", &socket], rest].concat();
        let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        let code = finial_cli::finial_entries().main(&words, &io);
        self.plain(i32::from(code), stdout.text().as_bytes(), stderr.text().as_bytes())
    }

    fn ours(&self, args: &[&str], stdin: &str) -> Outcome {
        let (io, stdout, stderr) =
            Io::captured(stdin.as_bytes().to_vec(), |name| (name == FLAGS.0).then(|| FLAGS.1.into()));
        let code = finial_cli::spire_server().main(&self.args(args), &io);
        self.plain(i32::from(code), stdout.text().as_bytes(), stderr.text().as_bytes())
    }

    fn plain(&self, code: i32, stdout: &[u8], stderr: &[u8]) -> Outcome {
        let folder = self.folder.display().to_string();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap().replace(&folder, "{folder}");
        // grpc-go names a socket that it cannot reach as `///path`; ours names the path
        let text = |bytes: &[u8]| text(bytes).replace("dial unix //", "dial unix ");
        // ours may end with advice that SPIRE does not give
        let stderr = text(stderr).lines().filter(|l| !l.starts_with("hint: ")).map(|l| format!("{l}\n")).collect();
        Outcome { code, stdout: text(stdout), stderr }
    }
}

/// Replaces what is made up by chance or by the clock, each by its kind and the order in which it first appears.
fn by_place(mut outcome: Outcome, seen: &mut Vec<String>) -> Outcome {
    for text in [&mut outcome.stdout, &mut outcome.stderr] {
        // when an authority ends; 1970 where nobody says
        let ends = |line: &str| line.starts_with("  Expires at: 2");
        let lines = text.split_inclusive('\n').map(|l| if ends(l) { "  Expires at: {moment}\n" } else { l });
        let plain: String = lines.collect();
        let words = plain.split_inclusive(|c: char| !c.is_ascii_alphanumeric() && !"-_=+/.".contains(c));
        let replaced = words.map(|word| {
            let bare = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric() && !"-_=+/.".contains(c));
            let tail = bare.rsplit('/').next().unwrap_or_default();
            let is_uuid = tail.len() == 36 && tail.split('-').map(str::len).eq([8, 4, 4, 4, 12]);
            let is_now = bare.len() == 10 && bare.starts_with("17") && bare.bytes().all(|b| b.is_ascii_digit());
            if is_now {
                return word.replace(bare, "{now}");
            }
            let of_x509 = tail.len() == 40 && tail.bytes().all(|b| b.is_ascii_hexdigit());
            let of_key = tail.len() == 32 && tail.bytes().all(|b| b.is_ascii_alphanumeric());
            if !(is_uuid || of_x509 || of_key) {
                return word.to_owned();
            }
            let place = seen.iter().position(|s| s == tail).unwrap_or_else(|| {
                seen.push(tail.to_owned());
                seen.len() - 1
            });
            let what = if is_uuid { "uuid" } else { "authority" };
            word.replace(tail, &format!("{{{what} {place}}}"))
        });
        *text = replaced.collect();
    }
    outcome
}

/// Agents that no command can make, in a database from which both servers start.
fn seed(path: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(StoreSettings::file(path), Arc::new(SystemClock)).await.unwrap();
        let agent = |name: &str| AgentRecord {
            id: SpiffeId::parse(&format!("spiffe://example.org/spire/agent/{name}")).unwrap(),
            attestation_type: "x509pop".into(),
            serial_number: "123456789012345678901234567890".into(),
            expires_at: 2_000_000_000,
            new_serial_number: String::new(),
            new_expires_at: 0,
            can_reattest: true,
            agent_version: "1.15.3".into(),
            selectors: SelectorSet::new(vec![
                finial_core::Selector::parse("x509pop:subject:cn:a").unwrap(),
                finial_core::Selector::parse("x509pop:ca:fingerprint:b").unwrap(),
            ]),
        };
        let mut all = [agent("x509pop/one"), agent("x509pop/expired"), agent("x509pop/gone"), agent("join_token/t")];
        all[1].expires_at = 1_500_000_000;
        all[2].expires_at = 1_600_000_000;
        all[3].can_reattest = false;
        all[3].attestation_type = "join_token".into();
        all[3].agent_version.clear();
        for agent in &all {
            store.create_or_update_node(agent).await.unwrap();
        }
        store.close().await;
    });
}

pub(crate) struct Pair {
    pub(crate) first: Server,
    pub(crate) second: Server,
    seen: (Vec<String>, Vec<String>),
    differences: Vec<String>,
    /// Whether the servers are compared (both asked by SPIRE's commands), and not the commands.
    servers: bool,
}

impl Pair {
    pub(crate) fn start(bin: &Path, folder: &Path, servers: bool) -> Self {
        Self::start_with(bin, folder, servers, "")
    }

    /// With one more plugin.
    pub(crate) fn start_with(bin: &Path, folder: &Path, servers: bool, plugin: &str) -> Self {
        let database = folder.join("seed");
        seed(&database);
        let first = Server::start(bin, &folder.join("a"), &database, false, plugin);
        let second = Server::start(bin, &folder.join("b"), &database, servers, plugin);
        Self { first, second, seen: Default::default(), differences: Vec::new(), servers }
    }

    pub(crate) fn finish(self) {
        let count = self.differences.len();
        assert!(count == 0, "{count} differences:\n{}", self.differences.join("\n\n"));
    }

    fn note(&mut self, args: &[&str], theirs: &Outcome, ours: &Outcome) {
        if theirs != ours {
            self.differences.push(format!("{args:?}\nSPIRE: {theirs:#?}\nours: {ours:#?}"));
        }
    }

    /// A command that changes something.
    pub(crate) fn changes(&mut self, args: &[&str], stdin: &str) {
        self.changes_each(args, args, stdin);
    }

    /// The same, of each server about what is its own.
    pub(crate) fn changes_each(&mut self, first: &[&str], second: &[&str], stdin: &str) {
        let theirs = by_place(self.first.theirs(first, stdin), &mut self.seen.0);
        let ours = if self.servers { self.second.theirs(second, stdin) } else { self.second.ours(second, stdin) };
        let ours = by_place(ours, &mut self.seen.1);
        self.note(first, &theirs, &ours);
    }

    /// A command that only reads (or is refused before it changes anything).
    pub(crate) fn reads(&mut self, args: &[&str]) {
        if self.servers {
            let theirs = by_place(shape(self.first.theirs(args, "")), &mut self.seen.0);
            let ours = by_place(shape(self.second.theirs(args, "")), &mut self.seen.1);
            return self.note(args, &theirs, &ours);
        }
        let (theirs, ours) = (self.first.theirs(args, ""), self.first.ours(args, ""));
        self.note(args, &theirs, &ours);
    }

    /// The arguments as they are, of commands that end before they need a server.
    pub(crate) fn raw(&mut self, args: &[&str]) {
        // `localauthority wit` is ours: SPIRE has the calls and no commands for them
        let flags = if args.first() == Some(&"localauthority") { "" } else { FLAGS.1 };
        let output = Command::new(&self.first.bin).args(args).env(FLAGS.0, flags).output().unwrap();
        let theirs = self.first.plain(output.status.code().unwrap(), &output.stdout, &output.stderr);
        let words: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        let (io, stdout, stderr) = Io::captured(Vec::new(), move |name| (name == FLAGS.0).then(|| flags.into()));
        let code = finial_cli::spire_server().main(&words, &io);
        let ours = self.first.plain(i32::from(code), stdout.text().as_bytes(), stderr.text().as_bytes());
        self.note(args, &theirs, &ours);
    }

    /// A command whose result differs each time.
    pub(crate) fn mints(&mut self, args: &[&str]) {
        let ours = if self.servers { self.second.theirs(args, "") } else { self.first.ours(args, "") };
        let theirs = shape(self.first.theirs(args, ""));
        self.note(args, &theirs, &shape(ours));
    }
}

/// What differs by nature becomes a word: the inside of PEM blocks, base64, moments.
fn shape(mut outcome: Outcome) -> Outcome {
    for text in [&mut outcome.stdout, &mut outcome.stderr] {
        let mut out = String::new();
        let mut in_pem = false;
        for line in text.split_inclusive('\n') {
            in_pem &= !line.starts_with("-----END");
            if !in_pem {
                out.push_str(&shape_line(line));
            }
            in_pem |= line.starts_with("-----BEGIN");
        }
        *text = out;
    }
    outcome
}

fn shape_line(line: &str) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "+/=._-:".contains(c);
    let words = line.split_inclusive(|c: char| !is_part(c)).map(|word| {
        let bare = word.trim_end_matches(|c: char| !is_part(c)).trim_matches(':');
        let is_moment = (bare.len() == 10 && bare.starts_with("17")) || (bare.len() == 20 && bare.starts_with("202"));
        let is_code = !bare.contains(':') && !bare.starts_with('/');
        match bare.len() {
            _ if is_moment => word.replace(bare, "{moment}"),
            32 if bare.bytes().all(|b| b.is_ascii_alphanumeric()) => word.replace(bare, "{key id}"),
            // a JWT has three parts, and its first begins with `{"`
            41.. if is_code && bare.starts_with("eyJ") => word.replace(bare, "{token}"),
            41.. if is_code => word.replace(bare, "{base64}"),
            _ => word.to_owned(),
        }
    });
    words.collect()
}
