//! `docs/guides/migrate-from-spire.md`, followed word by word: its commands are taken from the text and run in order, on
//! hosts that are folders (the paths of the text get the folder's before them), with a `systemctl` of five words.

use crate::takeover_live::all_was_well;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::{Client, Database, Output, Process, Proxy, Workdir, eventually, free_port};

const GUIDE: &str = include_str!("../../docs/guides/migrate-from-spire.md");

/// What the guide's text says of a database, where the real one's address goes.
const DATABASE_IN_TEXT: &str = "host=db.example.org dbname=spire user=spire";

/// The words of systemd that the guide uses, and `stop`. The last `ExecStart` of the unit and its drop-ins counts.
const SYSTEMCTL: &str = r#"#!/bin/bash
set -eu
unit=${2:-}; units=$ROOT/etc/systemd/system; pid=$ROOT/$unit.pid
alive() { local state; state=$(cut -d' ' -f3 "/proc/$1/stat" 2>/dev/null) && [ "$state" != Z ]; }
stop() {
    [ -s "$pid" ] || return 0
    kill "$(cat "$pid")" 2>/dev/null || true
    while alive "$(cat "$pid")"; do sleep 0.05; done
    rm "$pid"
}
start() {
    run=$(cat "$units/$unit.service" "$units/$unit.service.d/"*.conf 2>/dev/null | sed -n 's/^ExecStart=//p' | tail -n 1)
    setsid $run >>"$ROOT/$unit.log" 2>&1 </dev/null &
    echo $! >"$pid"
}
case $1 in
daemon-reload) ;;
start | stop) $1 ;;
restart) stop; start ;;
*) echo "no $1 here" >&2; exit 1 ;;
esac
"#;

/// One machine: a folder with SPIRE's program, configuration and unit at the guide's paths.
struct Host {
    name: String,
    unit: &'static str,
    dir: Workdir,
    database: String,
}

impl Host {
    /// `kind`: `server` or `agent`. `config` is given the host's folder.
    fn new(name: &str, unit: &'static str, database: &Database, config: impl Fn(&Path) -> String) -> Self {
        let dir = Workdir::new();
        let kind = unit.trim_start_matches("spire-");
        let at = |path: &str| dir.path().join(path);
        for folder in ["opt/spire/bin", "etc/systemd/system", "bin", "home"] {
            dir.sub(folder);
        }
        dir.sub(&format!("opt/spire/data/{kind}"));
        dir.sub(&format!("opt/spire/conf/{kind}"));
        symlink(testkit::require_spire().join(unit), at("opt/spire/bin").join(unit)).expect("SPIRE's program");
        symlink(testkit::finial(), at("home/finial")).expect("Finial's program");
        let conf = dir.write(&format!("opt/spire/conf/{kind}/{kind}.conf"), &config(dir.path()));
        let run = format!("{} run -config {}", at("opt/spire/bin").join(unit).display(), conf.display());
        dir.write(&format!("etc/systemd/system/{unit}.service"), &format!("[Service]\nExecStart={run}\n"));
        let systemctl = dir.write("bin/systemctl", SYSTEMCTL);
        std::fs::set_permissions(systemctl, std::fs::Permissions::from_mode(0o755)).expect("executable");
        let host = Self { name: name.into(), unit, dir, database: database.dsn() };
        host.run(&format!("systemctl start {unit}; until {unit} healthcheck; do sleep 0.2; done")).ok();
        host
    }

    /// Runs a piece of shell as an administrator of this host would.
    fn run(&self, text: &str) -> Output {
        let root = self.dir.path().display().to_string();
        let text = text
            .replace("/opt/", &format!("{root}/opt/"))
            .replace("/etc/systemd", &format!("{root}/etc/systemd"))
            .replace(DATABASE_IN_TEXT, &self.database);
        let path = std::env::var("PATH").unwrap_or_default();
        Output::of(
            Command::new("bash")
                .args(["-euo", "pipefail", "-c", &text])
                .current_dir(self.dir.path().join("home"))
                .env("ROOT", &root)
                .env("PATH", format!("{root}/opt/spire/bin:{root}/bin:{path}"))
                .env("SPIRE_SERVER_PRIVATE_SOCKET", self.socket())
                .env("SPIRE_AGENT_PUBLIC_SOCKET", self.socket()),
        )
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join(format!("{}.log", self.unit))).unwrap_or_default()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            eprintln!("--- {} (its last lines)", self.name);
            log.lines().skip(log.lines().count().saturating_sub(30)).for_each(|line| eprintln!("    {line}"));
        }
        let _ = self.run(&format!("systemctl stop {}", self.unit));
    }
}

fn server_config(root: &Path, port: u16, datastore: &str) -> String {
    let root = root.display();
    format!(
        r#"server {{
    bind_address = "127.0.0.1"
    bind_port = "{port}"
    socket_path = "{root}/api.sock"
    trust_domain = "example.org"
    data_dir = "{root}/opt/spire/data/server"
    ca_ttl = "75s"
    default_x509_svid_ttl = "16s"
    default_jwt_svid_ttl = "20s"
    experimental {{ cache_reload_interval = "1s" }}
}}
plugins {{
    DataStore "sql" {{ plugin_data {{ {datastore} }} }}
    KeyManager "disk" {{ plugin_data {{ keys_path = "{root}/opt/spire/data/server/keys.json" }} }}
    NodeAttestor "join_token" {{ plugin_data {{}} }}
}}
"#
    )
}

fn agent_config(root: &Path, port: u16, server: &Host) -> String {
    let root = root.display();
    let token = server.run("spire-server token generate -spiffeID spiffe://example.org/node").ok().stdout;
    let token = token.lines().find_map(|l| l.strip_prefix("Token: ")).expect("a token").to_owned();
    // SPIRE answers from a bundle that may be a second old; an agent that begins with such a one may not get to know the newest
    // of the three servers.
    let bundle = eventually("the bundle has every server's authority", || {
        let pem = server.run("spire-server bundle show").ok().stdout;
        if pem.matches("BEGIN CERTIFICATE").count() >= 3 { Ok(pem) } else { Err(pem) }
    });
    let bundle_path = server.dir.write("bundle.pem", &bundle);
    format!(
        r#"agent {{
    data_dir = "{root}/opt/spire/data/agent"
    server_address = "127.0.0.1"
    server_port = "{port}"
    socket_path = "{root}/api.sock"
    trust_bundle_path = "{bundle}"
    trust_domain = "example.org"
    join_token = "{token}"
    experimental {{ sync_interval = "1s" }}
}}
plugins {{
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "disk" {{ plugin_data {{ directory = "{root}/opt/spire/data/agent" }} }}
    WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"#,
        bundle = bundle_path.display()
    )
}

#[test]
fn the_guide_from_spire_and_back_holds_word_by_word() {
    let Some(database) = testkit::postgres() else { return };
    let datastore = testkit::datastore(&database, database.port());
    let ports = [free_port(), free_port(), free_port()];
    let balancer = Proxy::balancing(&ports);
    let mut hosts: Vec<Host> = Vec::new();
    for (i, port) in ports.into_iter().enumerate() {
        let config = |root: &Path| server_config(root, port, &datastore);
        hosts.push(Host::new(&format!("server{}", i + 1), "spire-server", &database, config));
    }
    let uid = own_uid();
    let entry = format!(
        "spire-server bundle show -format spiffe > other.json
         spire-server bundle set -id spiffe://other.test -format spiffe -path other.json
         spire-server entry create -parentID spiffe://example.org/node -spiffeID spiffe://example.org/web -selector unix:uid:{uid} \
             -federatesWith spiffe://other.test"
    );
    hosts[0].run(&entry).ok();
    for name in ["agent1", "agent2"] {
        let config = |root: &Path| agent_config(root, balancer.port(), &hosts[0]);
        hosts.push(Host::new(name, "spire-agent", &database, config));
    }
    let expected = ["spiffe://example.org/web", "spiffe://example.org", "spiffe://other.test"].map(str::to_owned);
    let mut workloads: Vec<Process> = Vec::new();
    for host in hosts.iter().filter(|h| h.unit == "spire-agent") {
        eventually("the agent serves", || match host.run("spire-agent api fetch x509") {
            out if out.code == 0 => Ok(()),
            out => Err(out.stderr),
        });
        workloads.push(Client("go").live(&host.socket(), "audience", &expected, host.dir.path().join("workload.log")));
    }

    for step in testkit::guide::steps(GUIDE) {
        assert!(step.is("bash"), "every block is run on a host, or is the output of the one before");
        let named: Vec<&str> = step.value("on=").split(',').collect();
        let on =
            |host: &&Host| named.iter().any(|w| *w == host.name || *w == format!("{}s", &host.unit["spire-".len()..]));
        let on: Vec<&Host> = hosts.iter().filter(on).collect();
        assert!(!on.is_empty(), "no host is called {named:?}");
        for host in on {
            let out = host.run(step.text);
            assert_eq!(
                out.code, 0,
                "on {}:\n{}\nstdout:\n{}\nstderr:\n{}",
                host.name, step.text, out.stdout, out.stderr
            );
            for line in step.says.lines() {
                let said = line.split('…').next().unwrap_or_default();
                assert!(out.stdout.contains(said), "on {}:\n{}\nsaid:\n{}", host.name, step.text, out.stdout);
            }
        }
    }
    workloads.iter_mut().for_each(all_was_well);
    for host in hosts.iter().filter(|h| h.unit == "spire-agent") {
        assert_eq!(host.log().matches("Node attestation was successful").count(), 1, "{}", host.log());
    }
}

fn own_uid() -> u32 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").expect("/proc").uid()
}
