//! Workloads in sandboxes: bubblewrap and gVisor, the real ones, and who tries to pass for them.

use finial_core::{SystemClock, TrustDomain};
use finial_plugin::{Peer, PluginContext, WorkloadAttestor};
use finial_plugins_base::workload_attestor::Gvisor;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use testkit::gvisor::Runsc;
use testkit::{Agent, AgentOptions, Flavor, Output, Server, ServerOptions, eventually, finial};

/// The attestor's configuration, with the records in `root`.
fn config(runsc: &Runsc, root: &Path) -> String {
    format!("roots = [{root:?}]\nrunsc_paths = [{:?}]", runsc.program())
}

fn with_gvisor(runsc: &Runsc) -> AgentOptions {
    let usual = AgentOptions::default();
    let gvisor = format!("WorkloadAttestor \"gvisor\" {{ plugin_data {{ {} }} }}", config(runsc, runsc.root()));
    AgentOptions { node_attestor: format!("{}\n    {gvisor}", usual.node_attestor), ..usual }
}

fn entry(server: &Server, path: &str, selectors: &[&str]) -> String {
    let selectors: Vec<&str> = selectors.iter().flat_map(|s| ["-selector", s]).collect();
    server.entry(path, &selectors)
}

fn ids(fetched: &Output) -> Vec<String> {
    let ids = fetched.stdout.lines().filter_map(|line| line.trim().strip_prefix("SPIFFE ID:"));
    let mut ids: Vec<_> = ids.map(|id| id.trim().to_owned()).collect();
    ids.sort();
    ids
}

/// What a command like `finial agent api fetch x509` gets, as soon as it gets anything.
fn served(what: &str, mut fetch: impl FnMut() -> Output) -> Vec<String> {
    eventually(what, || {
        let out = fetch();
        if out.code == 0 { Ok(ids(&out)) } else { Err(format!("{}{}", out.stdout, out.stderr)) }
    })
}

/// What fetches X.509-SVIDs from this agent.
fn fetch(agent: &Agent) -> Vec<String> {
    let program = finial().to_str().expect("is text").to_owned();
    let socket = agent.socket().to_str().expect("is text").to_owned();
    [program, "agent".into(), "api".into(), "fetch".into(), "x509".into(), "-socketPath".into(), socket].into()
}

#[test]
fn a_workload_in_gvisor_has_its_containers_identity_and_no_others() {
    let Some(runsc) = Runsc::find() else { return };
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let one = entry(&server, "/one", &["gvisor:container_id:one", "gvisor:sandbox_id:one"]);
    let two = entry(&server, "/two", &["gvisor:container_id:two"]);
    let pay = entry(&server, "/pay", &["gvisor:annotation:team:pay"]);
    let root = entry(&server, "/root", &["unix:uid:0"]);
    let agent = Agent::serving(Flavor::Finial, &server, &with_gvisor(&runsc));
    let (first, second) = (runsc.run("one", &[("team", "pay")]), runsc.run("two", &[]));
    let fetch = fetch(&agent);
    let fetch: Vec<&str> = fetch.iter().map(String::as_str).collect();
    assert_eq!(served("the first container", || first.exec(&fetch)), [one, pay]);
    assert_eq!(served("the second container", || second.exec(&fetch)), std::slice::from_ref(&two));
    // What it calls itself inside is nothing that the host would look at.
    let lying = "exec -a runsc-gofer \"$@\"";
    let lie = [&["/bin/bash", "-c", lying, "x"][..], &fetch].concat();
    let lied = second.exec(&lie).ok();
    assert_eq!(ids(&lied), [two], "{lied:?}");
    // The gofer is root on the host, the workload is not.
    assert_eq!(served("root on the host", || agent.command(&["api", "fetch", "x509"])), [root]);
    // Without the attestor that tells gofers, whoever is in a sandbox is root, as with SPIRE: the guide warns of it.
    let unaware = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
    let fetch = self::fetch(&unaware);
    let fetch: Vec<&str> = fetch.iter().map(String::as_str).collect();
    let third = runsc.run("three", &[]);
    assert!(served("a sandbox taken for root", || third.exec(&fetch)).iter().all(|id| id.ends_with("/root")));
}

/// Ends the process with the value.
pub(crate) struct Guard(pub(crate) Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn gvisor(runsc: &Runsc, root: &Path) -> Gvisor {
    let trust_domain = TrustDomain::parse("example.org").expect("a name");
    let data = finial_hcl::parse(&config(runsc, root)).expect("is HCL");
    Gvisor::new(&data, &PluginContext { trust_domain, clock: Arc::new(SystemClock) }).expect("is configured well")
}

fn attest(gvisor: &Gvisor, pid: i32) -> Result<Vec<String>, String> {
    let folder = File::open(format!("/proc/{pid}")).map_err(|e| e.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let selectors = runtime.block_on(gvisor.attest(&Peer { pid, proc_dir: folder.as_fd() }));
    Ok(selectors.map_err(|e| e.to_string())?.into_iter().map(|s| s.value).collect())
}

/// A process of the host's that says it is the container's gofer; stopped, so that it only is there.
fn impostor(root: &Path, container: &str) -> Guard {
    let mut command = Command::new("/bin/sh");
    command.arg0("runsc-gofer").args(["-c", "kill -STOP $$"]).arg(format!("--root={}", root.display()));
    Guard(command.arg(container).stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("starts"))
}

/// Why it is refused, as soon as its command line is there to be read.
fn refusal(gvisor: &Gvisor, impostor: &Guard) -> String {
    let pid = i32::try_from(impostor.0.id()).expect("a pid");
    let said = eventually("its command line is set", || match attest(gvisor, pid) {
        Ok(nothing) if nothing.is_empty() => Err("not yet".to_owned()),
        other => Ok(other),
    });
    said.expect_err("is refused")
}

/// Starts processes until one has this number, which is free.
fn impostor_with_number(root: &Path, container: &str, pid: i32) -> Guard {
    eventually("a process with this number", || {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).map_err(|e| e.to_string())?;
        let started = impostor(root, container);
        if i32::try_from(started.0.id()) == Ok(pid) { Ok(started) } else { Err("another got it".to_owned()) }
    })
}

#[test]
fn the_number_of_a_gofer_that_is_gone_is_no_proof() {
    let Some(runsc) = Runsc::find() else { return };
    let attestor = gvisor(&runsc, runsc.root());
    let container = runsc.run("gone", &[("team", "pay")]);
    let (gofer, sandbox) = container.processes();
    let known = attest(&attestor, gofer).expect("attests");
    assert_eq!(known, ["sandbox_id:gone", "container_id:gone", "annotation:team:pay"]);
    assert_eq!(attest(&attestor, sandbox).expect("attests"), ["sandbox_id:gone"]);
    // Beside the living one.
    let said = refusal(&attestor, &impostor(runsc.root(), "gone"));
    assert!(said.ends_with(&format!("runsc has process {gofer} on record for it")), "{said}");
    // It ends, and its record stays behind: in another folder, as runsc would end whoever has the number now.
    let left = testkit::Workdir::new();
    let record = runsc.record("gone");
    let content = std::fs::read_to_string(&record).expect("reads");
    drop(container);
    eventually("its gofer is gone", || {
        if Path::new(&format!("/proc/{gofer}")).exists() { Err("still there".to_owned()) } else { Ok(()) }
    });
    let record = left.write(record.file_name().and_then(|name| name.to_str()).expect("a name"), &content);
    std::fs::set_permissions(&record, std::fs::Permissions::from_mode(0o640)).expect("is ours");
    let file = File::options().write(true).open(&record).expect("opens");
    let changed = record.metadata().expect("is there").modified().expect("a time");
    file.set_modified(changed - std::time::Duration::from_secs(60)).expect("is ours");
    let reused = impostor_with_number(left.path(), "gone", gofer);
    let said = refusal(&gvisor(&runsc, left.path()), &reused);
    assert!(said.ends_with("the process is younger than runsc's record, and is not runsc"), "{said}");
}

#[test]
fn a_workload_in_bubblewrap_is_told_from_one_that_is_not() {
    let there = Command::new("bwrap").arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success());
    let promised = ["CI", "FINIAL_REAL_SPIRE"].iter().any(|name| std::env::var_os(name).is_some());
    assert!(there || !promised, "bubblewrap is not installed");
    if !there {
        eprintln!("SKIPPED: bubblewrap is not installed");
        return;
    }
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let user = format!("unix:uid:{}", testkit::uid());
    let host = entry(&server, "/host", &[&user, "unix:userns:host", "unix:mntns:host"]);
    let sandbox = entry(&server, "/sandbox", &[&user, "unix:parent_path:/usr/bin/bwrap"]);
    let both = entry(&server, "/both", &[&user]);
    let unix = "discover_parents = true discover_namespaces = true".to_owned();
    let agent = Agent::serving(Flavor::Finial, &server, &AgentOptions { unix, ..Default::default() });
    assert_eq!(served("on the host", || agent.command(&["api", "fetch", "x509"])), [both.clone(), host]);
    let program = finial();
    let inside = || {
        let mut command = Command::new("bwrap");
        command.args(["--die-with-parent", "--unshare-user", "--unshare-pid", "--unshare-net", "--uid", "1234"]);
        command.args(["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]).arg(&program);
        Output::of(command.args(["agent", "api", "fetch", "x509", "-socketPath"]).arg(agent.socket()))
    };
    assert_eq!(served("in the sandbox", inside), [both, sandbox]);
}
