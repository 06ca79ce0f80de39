//! Servers and agents of either kind, by SPIRE's own configuration and commands.

use crate::database::Database;
use crate::process::{self, Output, Process, Workdir, eventually, free_port};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whose binaries to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    /// Ours, called by SPIRE's names.
    Finial,
    /// The real SPIRE 1.15.3.
    Spire,
}

/// Fails with what to do when the real SPIRE has not been built yet.
pub fn require_spire() -> PathBuf {
    let dir = process::cache().join("spire-1.15.3");
    assert!(dir.join("spire-agent").exists(), "{} has no SPIRE: run tests/real-spire/build.sh", dir.display());
    dir
}

impl Flavor {
    pub(crate) fn binary(self, dir: &Workdir, name: &str) -> PathBuf {
        match self {
            Self::Spire => require_spire().join(name),
            Self::Finial => {
                let link = dir.sub("bin").join(name);
                if !link.exists() {
                    symlink(process::finial(), &link).expect("a link");
                }
                link
            }
        }
    }
}

/// How a server differs from the usual one.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The trust domain's name.
    pub trust_domain: String,
    /// `disk` or `memory`, or a whole block.
    pub key_manager: &'static str,
    /// What the `sql` data store's `plugin_data` says; a SQLite file of the server's own by default.
    pub datastore: Option<String>,
    /// More lines for the `server { }` block.
    pub server: String,
    /// More lines for the `plugins { }` block.
    pub plugins: String,
    /// How far its clock is from everybody else's, seconds.
    pub clock_ahead_seconds: i64,
    /// A PEM file of the roots that it trusts for the web; those of the machine by default.
    pub web_roots: Option<PathBuf>,
    /// More variables of its environment.
    pub environment: Vec<(&'static str, PathBuf)>,
}

impl ServerOptions {
    /// The environment that its process gets beside the test's own.
    fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        let mut all = self.environment.clone();
        if let Some(file) = &self.web_roots {
            all.extend(web_roots(file));
        }
        if self.clock_ahead_seconds != 0 {
            all.extend(other_clock(self.clock_ahead_seconds));
        }
        all
    }
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            trust_domain: "example.org".into(),
            key_manager: "disk",
            datastore: None,
            server: String::new(),
            plugins: String::new(),
            clock_ahead_seconds: 0,
            web_roots: None,
            environment: Vec::new(),
        }
    }
}

/// The data store's `plugin_data` for a database of testkit's.
pub fn datastore(database: &Database, port: u16) -> String {
    format!("database_type = \"{}\" connection_string = \"{}\"", database.kind().spire_type(), database.dsn_at(port))
}

fn sqlite(file: &Path) -> String {
    format!("database_type = \"sqlite3\" connection_string = \"{}\"", file.display())
}

/// libfaketime, which gives a process a time of its own.
pub fn faketime() -> PathBuf {
    let named = |dir: &Path| dir.join("faketime/libfaketimeMT.so.1");
    let mut found = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|e| named(&e.path()));
    let found = found.find(|path| path.exists());
    found.expect("libfaketime is not installed (Debian: apt-get install libfaketime; ./test does it)")
}

/// A time of day of a process's own; how fast time passes stays the same.
fn other_clock(ahead_seconds: i64) -> [(&'static str, PathBuf); 3] {
    let ahead = format!("{ahead_seconds:+}s");
    [("LD_PRELOAD", faketime()), ("FAKETIME", ahead.into()), ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into())]
}

/// The block of a key manager: by name, or as it is.
fn key_manager(name_or_block: &str, data: &str) -> String {
    if name_or_block.contains('{') {
        return name_or_block.to_owned();
    }
    format!("KeyManager \"{name_or_block}\" {{ plugin_data {{ {data} }} }}")
}

/// A running server with its data in a folder of its own.
pub struct Server {
    /// The process.
    pub process: Process,
    /// Where its data lies: configuration, keys, database, socket, log.
    pub dir: Workdir,
    /// The port that agents connect to.
    pub port: u16,
    /// The trust domain's name.
    pub trust_domain: String,
    binary: PathBuf,
    config: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
}

impl Server {
    /// Starts one and waits until it is healthy.
    pub fn start(flavor: Flavor, options: &ServerOptions) -> Self {
        let dir = Workdir::new();
        let port = free_port();
        let data = dir.sub("data");
        let keys = match options.key_manager {
            "disk" => format!("keys_path = \"{}\"", data.join("keys.json").display()),
            _ => String::new(),
        };
        let config = dir.write(
            "server.conf",
            &format!(
                r#"server {{
    bind_address = "127.0.0.1"
    bind_port = "{port}"
    socket_path = "{socket}"
    trust_domain = "{td}"
    data_dir = "{data}"
    log_level = "DEBUG"
    ratelimit {{ attestation = false }}
    {more}
}}
plugins {{
    DataStore "sql" {{ plugin_data {{ {datastore} }} }}
    {km}
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    {plugins}
}}
"#,
                socket = dir.path().join("server.sock").display(),
                td = options.trust_domain,
                data = data.display(),
                more = options.server,
                datastore = options.datastore.clone().unwrap_or_else(|| sqlite(&data.join("datastore.sqlite3"))),
                km = key_manager(options.key_manager, &keys),
                plugins = options.plugins,
            ),
        );
        let binary = flavor.binary(&dir, "spire-server");
        let environment = options.environment();
        let process = Self::launch(&binary, &config, &dir, &environment);
        let trust_domain = options.trust_domain.clone();
        let mut server = Self { process, dir, port, trust_domain, binary, config, environment };
        server.wait_healthy();
        server
    }

    fn launch(binary: &Path, config: &Path, dir: &Workdir, environment: &[(&'static str, PathBuf)]) -> Process {
        let mut command = process::command(binary);
        command.arg("run").arg("-config").arg(config).envs(environment.iter().cloned());
        Process::start("server", dir.path().join("server.log"), &mut command)
    }

    /// Starts it again on the same data after it has ended.
    pub fn restart(&mut self) {
        self.begin();
        self.wait_healthy();
    }

    /// The same without waiting for it.
    pub fn begin(&mut self) {
        self.process = Self::launch(&self.binary, &self.config, &self.dir, &self.environment);
    }

    /// Starts it again as the other's, on the same data, after it has ended.
    pub fn restart_as(&mut self, flavor: Flavor) {
        let _ = std::fs::remove_file(self.dir.sub("bin").join("spire-server"));
        self.binary = flavor.binary(&self.dir, "spire-server");
        self.restart();
    }

    /// Runs another server process on the same configuration and gives what it said when it ended.
    pub fn second_on_same_data(&self) -> Output {
        self.on_same_data(&self.binary)
    }

    /// The same of either flavor.
    pub fn run_on_same_data(&self, flavor: Flavor) -> Output {
        self.on_same_data(&flavor.binary(&self.dir, "spire-server"))
    }

    fn on_same_data(&self, binary: &Path) -> Output {
        let mut command = process::command(binary);
        Output::of(command.arg("run").arg("-config").arg(&self.config).envs(self.environment.iter().cloned()))
    }

    fn wait_healthy(&mut self) {
        eventually("the server is healthy", || {
            if let Some(code) = self.process.ended() {
                panic!("the server ended with {code}:\n{}", self.process.log());
            }
            let out = self.command(&["healthcheck"]);
            if out.code == 0 { Ok(()) } else { Err(out.stderr) }
        });
    }

    /// The admin socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("server.sock")
    }

    /// Runs one of its commands (`["entry", "show"]`) against it.
    pub fn command(&self, args: &[&str]) -> Output {
        self.command_of(&self.binary, args)
    }

    /// Runs a command of the other flavor's binary against this server.
    pub fn command_by(&self, flavor: Flavor, args: &[&str]) -> Output {
        self.command_of(&flavor.binary(&self.dir, "spire-server"), args)
    }

    fn command_of(&self, binary: &Path, args: &[&str]) -> Output {
        Output::of(process::command(binary).args(args).arg("-socketPath").arg(self.socket()))
    }

    /// The ID of its authority of that kind (`x509`, `jwt`) and standing (`active`, `prepared`, `old`); empty where there is none.
    pub fn authority(&self, kind: &str, standing: &str) -> String {
        self.of_authority(kind, standing, "authority_id")
    }

    /// Another field of what its command shows of that authority.
    pub fn of_authority(&self, kind: &str, standing: &str, field: &str) -> String {
        let shown = self.command(&["localauthority", kind, "show", "-output", "json"]).ok().stdout;
        let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
        shown[standing][field].as_str().unwrap_or_default().to_owned()
    }

    /// A step of replacing its authority of that kind: `prepare`, `activate`, `taint`, `revoke`.
    pub fn order(&self, kind: &str, step: &str) {
        let id = match step {
            "prepare" => None,
            "activate" => Some(self.authority(kind, "prepared")),
            _ => Some(self.authority(kind, "old")),
        };
        let about = id.iter().flat_map(|id| ["-authorityID", id]);
        self.command(&["localauthority", kind, step].into_iter().chain(about).collect::<Vec<_>>()).ok();
    }

    /// A join token for an agent that is also known as `spiffe://TD/node`.
    pub fn join_token(&self) -> String {
        let id = format!("spiffe://{}/node", self.trust_domain);
        let out = self.command(&["token", "generate", "-spiffeID", &id]).ok();
        let token = out.stdout.lines().find_map(|l| l.strip_prefix("Token: ")).expect("a token");
        token.to_owned()
    }

    /// An entry below `spiffe://TD/node` for everything that runs as this user; gives its SPIFFE ID.
    pub fn entry(&self, path: &str, more: &[&str]) -> String {
        let id = format!("spiffe://{}{path}", self.trust_domain);
        let parent = format!("spiffe://{}/node", self.trust_domain);
        let selector = format!("unix:uid:{}", rustix::process::getuid().as_raw());
        let mut args = vec!["entry", "create", "-parentID", &parent, "-spiffeID", &id];
        if !more.contains(&"-selector") {
            args.extend(["-selector", &selector]);
        }
        args.extend(more);
        self.command(&args).ok();
        id
    }

    /// The bundle as PEM, in a file.
    pub fn bundle_file(&self) -> PathBuf {
        let pem = self.command(&["bundle", "show"]).ok().stdout;
        self.dir.write("bundle.pem", &pem)
    }
}

/// Only these roots are trusted for the web; Go reads the directory as well.
fn web_roots(file: &Path) -> Vec<(&'static str, PathBuf)> {
    vec![("SSL_CERT_FILE", file.to_owned()), ("SSL_CERT_DIR", "/nonexistent".into())]
}

/// How an agent differs from the usual one.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// `disk` or `memory`, or a whole block.
    pub key_manager: &'static str,
    /// More lines for the `agent { }` block.
    pub agent: String,
    /// The node attestor block; join_token by default.
    pub node_attestor: String,
    /// More lines for the `experimental { }` block.
    pub experimental: String,
    /// How it knows the server at first, where not by its bundle in a file.
    pub bootstrap: Option<String>,
    /// A PEM file of the roots that it trusts for the web; those of the machine by default.
    pub web_roots: Option<PathBuf>,
    /// How often it asks the server.
    pub sync_interval: &'static str,
    /// What the unix attestor's `plugin_data` says.
    pub unix: String,
    /// Whether to pass a join token.
    pub join: bool,
    /// The port that it connects to, where it is not the server's own: a balancer's.
    pub server_port: Option<u16>,
    /// The host that it connects to.
    pub server_address: &'static str,
    /// More variables of its environment.
    pub environment: Vec<(&'static str, PathBuf)>,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            key_manager: "disk",
            agent: String::new(),
            experimental: String::new(),
            bootstrap: None,
            web_roots: None,
            sync_interval: "1s",
            node_attestor: "NodeAttestor \"join_token\" { plugin_data {} }".into(),
            unix: String::new(),
            join: true,
            server_port: None,
            server_address: "127.0.0.1",
            environment: Vec::new(),
        }
    }
}

/// A running agent.
pub struct Agent {
    /// The process.
    pub process: Process,
    /// Where its data lies.
    pub dir: Workdir,
    binary: PathBuf,
    config: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
}

impl Agent {
    /// Starts one below `server`; does not wait for anything.
    pub fn start(flavor: Flavor, server: &Server, options: &AgentOptions) -> Self {
        let dir = Workdir::new();
        let data = dir.sub("data");
        let directory = match options.key_manager {
            "disk" => format!("directory = \"{}\"", data.display()),
            _ => String::new(),
        };
        let config = dir.write(
            "agent.conf",
            &format!(
                r#"agent {{
    data_dir = "{data}"
    log_level = "DEBUG"
    server_address = "{address}"
    server_port = "{port}"
    socket_path = "{socket}"
    {bootstrap}
    trust_domain = "{td}"
    experimental {{
        sync_interval = "{interval}"
        {experimental}
    }}
    {more}
}}
plugins {{
    {attestor}
    {km}
    WorkloadAttestor "unix" {{ plugin_data {{ {unix} }} }}
}}
"#,
                data = data.display(),
                address = options.server_address,
                port = options.server_port.unwrap_or(server.port),
                socket = dir.path().join("public/api.sock").display(),
                bootstrap = options
                    .bootstrap
                    .clone()
                    .unwrap_or_else(|| { format!("trust_bundle_path = \"{}\"", server.bundle_file().display()) }),
                td = server.trust_domain,
                interval = options.sync_interval,
                experimental = options.experimental,
                more = options.agent,
                attestor = options.node_attestor,
                km = key_manager(options.key_manager, &directory),
                unix = options.unix,
            ),
        );
        let binary = flavor.binary(&dir, "spire-agent");
        let token = options.join.then(|| server.join_token());
        let mut environment = options.environment.clone();
        environment.extend(options.web_roots.as_deref().map(web_roots).unwrap_or_default());
        let process = Self::launch(&binary, &config, &dir, &environment, token.as_deref());
        Self { process, dir, binary, config, environment }
    }

    /// Starts one and waits until it gives this user an X.509-SVID (there must be an entry).
    pub fn serving(flavor: Flavor, server: &Server, options: &AgentOptions) -> Self {
        let mut agent = Self::start(flavor, server, options);
        agent.wait_serving();
        agent
    }

    fn launch(
        binary: &Path,
        config: &Path,
        dir: &Workdir,
        environment: &[(&'static str, PathBuf)],
        token: Option<&str>,
    ) -> Process {
        let mut command = process::command(binary);
        command.arg("run").arg("-config").arg(config).envs(environment.iter().cloned());
        if let Some(token) = token {
            command.arg("-joinToken").arg(token);
        }
        Process::start("agent", dir.path().join("agent.log"), &mut command)
    }

    /// Starts it again on the same data after it has ended.
    pub fn restart(&mut self) {
        self.process = Self::launch(&self.binary, &self.config, &self.dir, &self.environment, None);
    }

    /// The command that starts it again on the same data.
    pub fn program(&self) -> Command {
        let mut command = process::command(&self.binary);
        command.arg("run").arg("-config").arg(&self.config);
        command
    }

    /// Starts the next one on the same data while this one runs, and waits until this one has ended; its exit code.
    pub fn upgrade(&mut self) -> i32 {
        let next = Self::launch(&self.binary, &self.config, &self.dir, &self.environment, None);
        std::mem::replace(&mut self.process, next).wait()
    }

    /// Starts it again as the other's, on the same data, after it has ended.
    pub fn restart_as(&mut self, flavor: Flavor) {
        let _ = std::fs::remove_file(self.dir.sub("bin").join("spire-agent"));
        self.binary = flavor.binary(&self.dir, "spire-agent");
        self.restart();
    }

    /// It proved its node no more than once, or what its log says.
    pub fn assert_attested_once(&self) {
        let log = self.process.log();
        assert_eq!(log.matches("Node attestation was successful").count(), 1, "it attested again:\n{log}");
    }

    /// Waits until this user gets an X.509-SVID from it.
    pub fn wait_serving(&mut self) {
        eventually("the agent serves an X.509-SVID", || {
            if let Some(code) = self.process.ended() {
                panic!("the agent ended with {code}:\n{}", self.process.log());
            }
            let out = self.command(&["api", "fetch", "x509"]);
            if out.code == 0 { Ok(()) } else { Err(out.stderr) }
        });
    }

    /// The Workload API's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("public/api.sock")
    }

    /// Runs one of its commands against it.
    pub fn command(&self, args: &[&str]) -> Output {
        Output::of(process::command(&self.binary).args(args).arg("-socketPath").arg(self.socket()))
    }

    /// Runs a command of either flavor's binary as it is, with these variables.
    pub fn run_by(&self, flavor: Flavor, args: &[&str], variables: &[(&str, &str)]) -> Output {
        let binary = flavor.binary(&self.dir, "spire-agent");
        Output::of(process::command(&binary).args(args).envs(variables.iter().copied()))
    }

    /// Starts a command of either flavor's binary that does not end by itself.
    pub fn start_by(&self, flavor: Flavor, args: &[&str]) -> Process {
        let binary = flavor.binary(&self.dir, "spire-agent");
        let log = self.dir.path().join(format!("{flavor:?}-command.log"));
        Process::start("command", log, process::command(&binary).args(args))
    }

    /// Runs a command of the other flavor's binary against this agent.
    pub fn command_by(&self, flavor: Flavor, args: &[&str]) -> Output {
        let binary = flavor.binary(&self.dir, "spire-agent");
        Output::of(process::command(&binary).args(args).arg("-socketPath").arg(self.socket()))
    }
}
