//! Metrics for Prometheus over TLS, what filters leave of them, and what SIGUSR1 writes to the log (SPIRE 1.15.3 writes nothing then).

use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::{Agent, AgentOptions, Flavor, Process, Server, ServerOptions, eventually, free_port};

const FLAVORS: [Flavor; 2] = [Flavor::Finial, Flavor::Spire];

/// Ends the block in which it stands, and begins one that ends where that would have.
fn telemetry(program: &str, port: u16, tls: &str) -> String {
    format!(
        "}} telemetry {{ Prometheus {{ port = {port} tls {{ {tls} }} }} InMem {{}} \
         AllowedPrefixes = [\"{program}.rpc.bundle\"] BlockedPrefixes = [\"{program}.rpc\"] BlockedLabels = [\"host\"] }} \
         health_checks {{"
    )
}

/// The folder of an X.509-SVID of `path`.
fn mint(server: &Server, path: &str) -> PathBuf {
    let folder = server.dir.sub(path);
    let id = format!("spiffe://example.org/{path}");
    server.command(&["x509", "mint", "-spiffeID", &id, "-write", folder.to_str().unwrap()]).ok();
    folder
}

/// What whoever has the SVID in `folder` is answered.
fn scrape(port: u16, folder: Option<&Path>) -> Result<String, String> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--insecure", "--max-time", "20"]);
    if let Some(folder) = folder {
        curl.arg("--cert").arg(folder.join("svid.pem")).arg("--key").arg(folder.join("key.pem"));
    }
    let out = curl.arg(format!("https://localhost:{port}/metrics")).output().unwrap();
    if out.status.success() {
        return Ok(String::from_utf8(out.stdout).unwrap());
    }
    Err(String::from_utf8_lossy(&out.stderr).into_owned())
}

/// How Prometheus' client in Go describes a process, by name.
const PROCESS: [(&str, &str, &str); 9] = [
    ("cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds."),
    ("max_fds", "gauge", "Maximum number of open file descriptors."),
    ("network_receive_bytes_total", "counter", "Number of bytes received by the process over the network."),
    ("network_transmit_bytes_total", "counter", "Number of bytes sent by the process over the network."),
    ("open_fds", "gauge", "Number of open file descriptors."),
    ("resident_memory_bytes", "gauge", "Resident memory size in bytes."),
    ("start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds."),
    ("virtual_memory_bytes", "gauge", "Virtual memory size in bytes."),
    ("virtual_memory_max_bytes", "gauge", "Maximum amount of virtual memory available in bytes."),
];

/// The process itself is there beside what is filtered, the same for both programs but for the numbers.
fn describes_the_process(page: &str) {
    let told: Vec<&str> = page.lines().filter(|line| line.contains("process_")).collect();
    assert_eq!(told.len(), PROCESS.len() * 3, "{told:#?}");
    for ((name, kind, help), lines) in PROCESS.iter().zip(told.chunks(3)) {
        assert_eq!(lines[0], format!("# HELP process_{name} {help}"));
        assert_eq!(lines[1], format!("# TYPE process_{name} {kind}"));
        let value = lines[2].strip_prefix(&format!("process_{name} ")).and_then(|value| value.parse::<f64>().ok());
        assert!(value.is_some_and(|value| value >= 0.0), "{}", lines[2]);
    }
}

/// Only who may is served, and what is served is filtered; SIGUSR1 writes it to our log.
fn serves(flavor: Flavor, program: &str, process: &Process, port: u16, may: &Path, may_not: Option<&Path>) {
    let started = format!("{program}_started{{");
    let page = eventually("metrics", || {
        scrape(port, Some(may)).and_then(|p| p.contains(&started).then_some(p).ok_or("early".into()))
    });
    assert!(!page.contains("host=\"") && !page.contains("_rpc_entry") && !page.contains("_rpc_svid"), "{page}");
    describes_the_process(&page);
    for nobody in [None, may_not] {
        scrape(port, nobody).unwrap_err();
    }
    if flavor == Flavor::Spire {
        return;
    }
    let before = process.log().len();
    process.signal(Signal::USR1);
    eventually("the log has them", || {
        let log = process.log();
        let told = log[before..].lines().any(|line| line.contains(program) && line.contains("started"));
        told.then_some(()).ok_or_else(|| log[before..].to_owned())
    });
}

#[test]
fn a_server_serves_metrics_with_its_own_svid_to_whom_it_is_told_to() {
    for flavor in FLAVORS {
        let port = free_port();
        let tls = "use_spire_svid = true authorized_spiffe_ids = [\"spiffe://example.org/scraper\"]";
        let options = ServerOptions { server: telemetry("spire_server", port, tls), ..ServerOptions::default() };
        let server = Server::start(flavor, &options);
        let (scraper, other) = (mint(&server, "scraper"), mint(&server, "other"));
        serves(flavor, "spire_server", &server.process, port, &scraper, Some(&other));
        let page = scrape(port, Some(&scraper)).unwrap();
        server.command(&["bundle", "show"]).ok();
        let page = eventually("what is allowed within what is blocked", || {
            let page = scrape(port, Some(&scraper)).unwrap_or(page.clone());
            page.contains("spire_server_rpc_bundle").then_some(page.clone()).ok_or(page)
        });
        assert!(!page.contains("spire_server_rpc_svid"), "{page}");
    }
}

#[test]
fn an_agent_serves_metrics_with_a_certificate_of_its_own_to_clients_of_an_authority() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let stranger = Server::start(Flavor::Finial, &ServerOptions::default());
    let (own, scraper, other) = (mint(&server, "metrics"), mint(&server, "scraper"), mint(&stranger, "scraper"));
    for flavor in FLAVORS {
        let port = free_port();
        let tls = format!(
            "cert_file = \"{0}/svid.pem\" key_file = \"{0}/key.pem\" client_ca_file = \"{0}/bundle.pem\"",
            own.display()
        );
        let options = AgentOptions { agent: telemetry("spire_agent", port, &tls), ..AgentOptions::default() };
        let agent = Agent::start(flavor, &server, &options);
        serves(flavor, "spire_agent", &agent.process, port, &scraper, Some(&other));
    }
}
