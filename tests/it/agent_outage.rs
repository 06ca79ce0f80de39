//! A node that outlives its server: the agent is killed and upgraded while no server answers, and workloads see nothing of it.

use finial_core::{Clock, SystemClock};
use rustix::process::Signal;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, UNIX_EPOCH};
use testkit::{
    Agent, AgentOptions, Flavor, Output, Process, Proxy, Server, ServerOptions, Weather, Workdir, eventually,
};

/// A server behind a proxy, and an agent that keeps its cache under a host key of the test's own.
struct Rig {
    server: Server,
    proxy: Proxy,
    agent: Agent,
    /// Where the host key lies.
    _keys: Workdir,
}

fn host_key(dir: &Workdir, byte: u8) -> PathBuf {
    let path = dir.path().join(format!("host-{byte}.key"));
    std::fs::write(&path, [byte; 4096]).expect("a key");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).expect("its mode");
    path
}

impl Rig {
    fn start() -> Self {
        Self::with(&ServerOptions::default(), AgentOptions::default(), |_| {})
    }

    fn with(server: &ServerOptions, agent: AgentOptions, set_up: impl FnOnce(&Server)) -> Self {
        let server = Server::start(Flavor::Finial, server);
        set_up(&server);
        server.entry("/workload", &[]);
        let proxy = Proxy::to(server.port);
        let keys = Workdir::new();
        let key = host_key(&keys, 1);
        let experimental = format!("offline_cache = \"host_key\" offline_cache_host_key_path = \"{}\"", key.display());
        let options = AgentOptions { experimental, server_port: Some(proxy.port()), ..agent };
        let agent = Agent::serving(Flavor::Finial, &server, &options);
        Self { server, proxy, agent, _keys: keys }
    }

    fn cache(&self) -> PathBuf {
        self.agent.dir.path().join("data/agent-cache.sealed")
    }

    /// Waits until what the agent has now is on disk.
    fn wait_kept(&self) {
        // What was changed is written after it was gathered for a moment.
        let since_ms = SystemClock.now_ms() + 250;
        self.agent.command(&["api", "fetch", "jwt", "-audience", &since_ms.to_string()]).ok();
        eventually("the cache is written", || {
            let written =
                std::fs::metadata(self.cache()).and_then(|meta| meta.modified()).map_err(|e| e.to_string())?;
            let written_ms = written.duration_since(UNIX_EPOCH).map_err(|e| e.to_string())?.as_millis();
            if written_ms > since_ms as u128 { Ok(()) } else { Err(format!("written at {written_ms}")) }
        });
    }

    /// No server answers from now on.
    fn lose_server(&mut self) {
        self.proxy.weather(Weather::Refusing);
        self.server.process.kill();
    }

    /// Starts the agent again; when it served first, and what.
    fn restart(&mut self) -> (Duration, Vec<Vec<u8>>) {
        let began = Instant::now();
        self.agent.restart();
        let svid = eventually("the agent serves", || fetch(&self.agent));
        (began.elapsed(), svid)
    }
}

/// The SVID, its key and the bundle, as they are written to files.
fn fetch(agent: &Agent) -> Result<Vec<Vec<u8>>, String> {
    let dir = Workdir::new();
    let path = dir.path().display().to_string();
    let out = agent.command(&["api", "fetch", "x509", "-timeout", "30s", "-write", &path]);
    if out.code != 0 {
        return Err(out.stderr);
    }
    let read = |name: &str| std::fs::read(dir.path().join(name)).map_err(|e| format!("{name}: {e}"));
    ["svid.0.pem", "svid.0.key", "bundle.0.pem"].into_iter().map(read).collect()
}

fn token(agent: &Agent) -> Output {
    agent.command(&["api", "fetch", "jwt", "-audience", "somebody", "-timeout", "30s"])
}

#[test]
fn an_agent_that_is_killed_while_every_server_is_gone_serves_again_and_heals() {
    let mut rig = Rig::start();
    let before = fetch(&rig.agent).expect("an SVID");
    let token_before = token(&rig.agent).ok().stdout;
    rig.wait_kept();
    rig.lose_server();
    let mut slowest = Duration::ZERO;
    for _ in 0..5 {
        rig.agent.process.kill();
        let (took, svid) = rig.restart();
        slowest = slowest.max(took);
        assert_eq!(svid, before, "the same SVID with its key");
        assert_eq!(token(&rig.agent).ok().stdout, token_before);
    }
    println!("from the start of the agent to the first SVID, a command included: at most {slowest:?}");
    // The node's data has no key in it that somebody could read.
    let key = String::from_utf8(before[1].clone()).expect("PEM");
    assert!(key.contains("PRIVATE KEY"));
    let said = rig.agent.process.log();
    assert!(said.contains("serving what was kept"), "{said}");

    rig.proxy.weather(Weather::Fair);
    rig.server.restart();
    rig.server.entry("/later", &[]);
    eventually("the agent heals", || {
        let out = rig.agent.command(&["api", "fetch", "x509"]);
        if out.stdout.contains("/later") { Ok(()) } else { Err(format!("{out:?}")) }
    });
    assert!(rig.server.command(&["agent", "count"]).ok().stdout.contains("1 attested agent"));
}

/// By a certificate, which lets it in as often as it asks; its own SVID lives for seconds, those of workloads for an hour.
#[test]
fn an_agent_whose_own_svid_ended_meanwhile_attests_again_and_nobody_is_refused() {
    let pki = Workdir::new();
    crate::takeover_live::node_certificate(&pki);
    let (server, agent) = crate::agent_kills::by_certificate(&pki);
    let server = ServerOptions { server: "agent_ttl = \"8s\"".into(), ..server };
    let mut rig = Rig::with(&server, agent, crate::agent_kills::name_the_node);
    let rush = Rush::on(&rig.agent.socket());
    rush.goes_on();
    rig.lose_server();
    let told = |rig: &Rig, text: &str| {
        let log = rig.agent.process.log();
        if log.contains(text) { Ok(()) } else { Err(log) }
    };
    eventually("its own SVID has ended", || told(&rig, "own SVID has expired: serving from the cache"));
    rush.goes_on();
    rig.proxy.weather(Weather::Fair);
    rig.server.restart();
    rig.server.entry("/later", &[]);
    eventually("the agent has the news", || {
        let out = rig.agent.command(&["api", "fetch", "x509"]);
        if out.stdout.contains("/later") { Ok(()) } else { Err(format!("{out:?}")) }
    });
    println!("{} fetches, none refused", rush.end(0));
    assert!(rig.server.command(&["agent", "count"]).ok().stdout.contains("1 attested agent"));
}

#[test]
fn what_was_deleted_or_banned_meanwhile_ends_when_the_server_says_so() {
    let mut rig = Rig::start();
    rig.wait_kept();
    rig.proxy.weather(Weather::Refusing);
    rig.agent.process.kill();
    let shown = rig.server.command(&["entry", "show", "-spiffeID", "spiffe://example.org/workload"]).ok().stdout;
    let id = shown.lines().find_map(|line| line.strip_prefix("Entry ID")).expect("an entry");
    rig.server.command(&["entry", "delete", "-entryID", id.trim_start_matches([' ', ':']).trim()]).ok();
    rig.restart();
    rig.proxy.weather(Weather::Fair);
    eventually("the identity ends", || {
        let out = rig.agent.command(&["api", "fetch", "x509"]);
        if out.code != 0 && format!("{out:?}").contains("no identity issued") {
            Ok(())
        } else {
            Err(format!("{out:?}"))
        }
    });

    rig.server.entry("/again", &[]);
    rig.agent.wait_serving();
    rig.wait_kept();
    rig.proxy.weather(Weather::Refusing);
    rig.agent.process.kill();
    let list = rig.server.command(&["agent", "list"]).ok().stdout;
    let agent = list.lines().find_map(|line| line.split_once("spiffe://")).expect("an agent").1;
    rig.server.command(&["agent", "ban", "-spiffeID", &format!("spiffe://{}", agent.trim())]).ok();
    rig.restart();
    rig.proxy.weather(Weather::Fair);
    assert_ne!(rig.agent.process.wait(), 0);
    assert!(!rig.cache().exists() && !rig.agent.socket().exists(), "nothing is left to serve");
}

/// A copy of the whole data directory, keys of the agent included, on a node with another host key.
#[test]
fn a_copied_data_directory_serves_nothing() {
    let mut rig = Rig::start();
    rig.wait_kept();
    rig.lose_server();
    let elsewhere = Workdir::new();
    let (from, to) = (rig.agent.dir.path().display().to_string(), elsewhere.path().display().to_string());
    Output::of(Command::new("cp").args(["-a", &format!("{from}/data"), &to])).ok();
    let other_key = host_key(&elsewhere, 2);
    let text = std::fs::read_to_string(rig.agent.dir.path().join("agent.conf")).expect("the configuration");
    let key = text.split("offline_cache_host_key_path = \"").nth(1).and_then(|t| t.split('"').next()).expect("a path");
    let text = text.replace(key, &other_key.display().to_string()).replace(&from, &to);
    let config = elsewhere.write("agent.conf", &text);
    let mut command = Command::new(testkit::finial());
    command.args(["agent", "run", "-config"]).arg(config);
    let thief = Process::start("thief", elsewhere.path().join("agent.log"), &mut command);
    eventually("the copy is refused", || {
        let said = thief.log();
        let refused = said.contains("Ignoring the sealed cache") && said.contains("another node");
        // It then waits for a server, as without a cache.
        if refused && said.contains("Failed to initialize manager") { Ok(()) } else { Err(said) }
    });
    assert!(!elsewhere.path().join("public/api.sock").exists());
    rig.agent.process.kill();
    rig.restart();
}

#[test]
fn killed_at_each_step_of_writing_it_serves_what_it_had() {
    let mut rig = Rig::start();
    let before = fetch(&rig.agent).expect("an SVID");
    rig.wait_kept();
    rig.lose_server();
    let dir = Workdir::new();
    let (source, library) = (dir.write("killed.c", include_str!("killed.c")), dir.path().join("killed.so"));
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(&library).arg(source).arg("-ldl");
    Output::of(&mut compile).ok();
    rig.agent.process.kill();
    let mut killed = 0;
    for step in 1.. {
        let mut command = rig.agent.program();
        command
            .env("LD_PRELOAD", &library)
            .env("KILLED_IN", "agent-cache.sealed.tmp")
            .env("KILLED_AT", step.to_string());
        let log = rig.agent.dir.path().join(format!("step-{step}.log"));
        rig.agent.process = Process::start("agent", log, &mut command);
        let process = &mut rig.agent.process;
        let survived = eventually("it is killed, or has written", || match process.ended() {
            Some(_) => Ok(false),
            None if process.log().contains("Sealed cache written") => Ok(true),
            None => Err(process.log()),
        });
        rig.agent.process.kill();
        let (_, svid) = rig.restart();
        assert_eq!(svid, before, "killed at step {step}");
        rig.agent.process.kill();
        if survived {
            break;
        }
        killed += 1;
    }
    assert!(killed >= 5, "it opens, writes, flushes, moves and flushes: killed {killed} times only");
}

/// What workloads of a rush fetch, each in a loop of its own.
const KINDS: [&str; 3] = ["x509", "jwt", "x509"];

/// Workloads that fetch without a pause, each time over a new connection.
struct Rush {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    /// Calls of which the connection ended under them, as it does when the process that holds it is killed.
    broken_off: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

/// Whether the call was neither answered nor refused: nobody was there any more to do either.
fn is_broken_off(out: &Output) -> bool {
    ["transport error", "h2 protocol error", "broken pipe", "connection reset", "stream closed"]
        .iter()
        .any(|text| out.stderr.to_lowercase().contains(text))
}

impl Rush {
    fn on(socket: &Path) -> Self {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let broken_off = Arc::new(AtomicUsize::new(0));
        let thread = |kind: &'static str| {
            let (stop, served, socket) = (stop.clone(), served.clone(), socket.to_owned());
            let broken_off = broken_off.clone();
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let mut command = Command::new(testkit::finial());
                    command.args(["agent", "api", "fetch", kind, "-timeout", "30s", "-socketPath"]).arg(&socket);
                    if kind == "jwt" {
                        command.args(["-audience", "somebody"]);
                    }
                    let mut out = Output::of(&mut command);
                    if out.code != 0 && is_broken_off(&out) {
                        // As libraries do: once more.
                        broken_off.fetch_add(1, Ordering::SeqCst);
                        println!("broken off: {}", out.stderr);
                        out = Output::of(&mut command);
                    }
                    assert_eq!(out.code, 0, "a workload was refused: {out:?}");
                    served.fetch_add(1, Ordering::SeqCst);
                }
            })
        };
        let threads = KINDS.map(thread).into_iter().collect();
        Self { stop, served, broken_off, threads }
    }

    fn goes_on(&self) {
        let before = self.served.load(Ordering::SeqCst);
        eventually("workloads are served", || match self.served.load(Ordering::SeqCst) {
            now if now > before + 6 => Ok(()),
            now => Err(format!("{} since", now - before)),
        });
    }

    /// Nobody was refused, and no call was broken off besides the one that each had open when an agent was killed; how many were
    /// served.
    fn end(self, kills: usize) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads {
            thread.join().expect("every workload was served");
        }
        let broken_off = self.broken_off.load(Ordering::SeqCst);
        println!("{broken_off} calls were broken off by {kills} kills");
        assert!(broken_off <= kills * KINDS.len(), "{broken_off} calls were broken off by {kills} kills");
        self.served.load(Ordering::SeqCst)
    }
}

#[test]
fn upgrades_with_and_without_a_server_are_not_seen() {
    let mut rig = Rig::start();
    token(&rig.agent).ok();
    let rush = Rush::on(&rig.agent.socket());
    for round in 0..4 {
        rush.goes_on();
        if round == 2 {
            rig.wait_kept();
            rig.lose_server();
        }
        assert_eq!(rig.agent.upgrade(), 0, "the old one ends well");
    }
    rush.goes_on();
    println!("{} fetches during four upgrades, none refused", rush.end(0));
    assert_eq!(rig.agent.process.terminate(), 0);
    assert!(!rig.agent.socket().exists());
}

/// Does for the agent what a `.socket` unit and `Restart=always` do.
const SERVICE_MANAGER: &str = r#"
import os, socket, sys
path, program = sys.argv[1], sys.argv[2:]
os.makedirs(os.path.dirname(path), exist_ok=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
os.chmod(path, 0o777)
listener.listen(1024)
while True:
    child = os.fork()
    if child == 0:
        held = os.dup(listener.fileno())
        os.dup2(held, 3)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
        os.execv(program[0], program)
    print(child, flush=True)
    os.waitpid(child, 0)
"#;

/// The last agent that a manager named in its log, which outlives the manager; it is ended with this, whatever comes.
struct LastChild(PathBuf);

impl Drop for LastChild {
    fn drop(&mut self) {
        let log = std::fs::read_to_string(&self.0).unwrap_or_default();
        let last = log.lines().filter_map(|line| line.parse().ok()).next_back();
        if let Some(last) = last.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(last, Signal::KILL);
        }
    }
}

/// Ends agents behind a socket of the service manager with a signal; how many workloads were served meanwhile, of whom none was
/// refused.
fn behind_a_service_manager(rig: &Rig, signal: Signal) -> usize {
    const TIMES: usize = 3;
    let dir = Workdir::new();
    let script = dir.write("manager.py", SERVICE_MANAGER);
    let program = rig.agent.program();
    let mut command = Command::new("python3");
    command.arg(script).arg(rig.agent.socket()).arg(program.get_program()).args(program.get_args());
    let _last = LastChild(dir.path().join("manager.log")); // dropped after the manager
    let manager = Process::start("manager", dir.path().join("manager.log"), &mut command);
    let children = |manager: &Process| -> Vec<i32> { manager.log().lines().filter_map(|l| l.parse().ok()).collect() };
    eventually("the agent serves", || fetch(&rig.agent));
    let rush = Rush::on(&rig.agent.socket());
    for _ in 0..TIMES {
        rush.goes_on();
        let before = children(&manager);
        let running = before.last().copied().and_then(rustix::process::Pid::from_raw).expect("an agent");
        rustix::process::kill_process(running, signal).expect("it runs");
        eventually("it is started again", || {
            let now = children(&manager);
            if now.len() > before.len() { Ok(()) } else { Err(format!("{now:?}")) }
        });
    }
    rush.goes_on();
    rush.end(if signal == Signal::KILL { TIMES } else { 0 })
}

#[test]
fn a_restart_behind_a_socket_of_the_service_manager_is_not_seen() {
    let mut rig = Rig::start();
    token(&rig.agent).ok();
    rig.wait_kept();
    assert_eq!(rig.agent.process.terminate(), 0);
    let served = behind_a_service_manager(&rig, Signal::TERM);
    println!("{served} fetches during three restarts, none refused");
}

#[test]
fn a_kill_without_a_server_behind_a_socket_of_the_service_manager_has_nobody_refused() {
    let mut rig = Rig::start();
    token(&rig.agent).ok();
    rig.wait_kept();
    rig.lose_server();
    assert_eq!(rig.agent.process.terminate(), 0);
    let served = behind_a_service_manager(&rig, Signal::KILL);
    println!("{served} fetches during three kills without a server, none refused");
}
