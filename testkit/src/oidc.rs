//! OIDC discovery providers of either kind, and what they answer to curl.

use crate::envoy::Answer;
use crate::process::{self, Output, Process, Workdir, eventually, free_port};
use crate::spire::Flavor;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A running `oidc-discovery-provider` that probes may ask.
pub struct Provider {
    /// The process.
    pub process: Process,
    /// Its configuration, sockets and log.
    pub dir: Workdir,
    health: u16,
}

impl Provider {
    /// Starts one with this configuration, in which `DIR` is its folder, and waits until it has keys.
    pub fn start(flavor: Flavor, config: &str) -> Self {
        let mut provider = Self::begin(flavor, config);
        eventually("the provider is ready", || {
            if let Some(code) = provider.process.ended() {
                panic!("the provider ended with {code}:\n{}", provider.process.log());
            }
            let ready = provider.probe("/ready");
            if ready.status == 200 { Ok(()) } else { Err(format!("{ready:?}\n{}", provider.process.log())) }
        });
        provider
    }

    /// The same without waiting.
    pub fn begin(flavor: Flavor, config: &str) -> Self {
        Self::begin_with(flavor, config, &[], &[])
    }

    /// The same with files in its folder and variables of its environment.
    pub fn begin_with(flavor: Flavor, config: &str, files: &[(&str, &str)], variables: &[(&str, &Path)]) -> Self {
        let (dir, health) = (Workdir::new(), free_port());
        let config = config.replace("DIR", &dir.path().display().to_string());
        let text = format!("log_level = \"DEBUG\"\nhealth_checks {{ bind_port = {health} }}\n{config}");
        let file = dir.write("oidc.conf", &text);
        let mut command = process::command(flavor.binary(&dir, "oidc-discovery-provider"));
        files.iter().for_each(|(name, text)| drop(dir.write(name, text)));
        command.arg("-config").arg(file).current_dir(dir.path()).envs(variables.iter().copied());
        let process = Process::start("provider", dir.path().join("provider.log"), &mut command);
        Self { process, dir, health }
    }

    /// Runs the program to its end with these arguments.
    pub fn command(flavor: Flavor, args: &[&str]) -> Output {
        let dir = Workdir::new();
        Output::of(process::command(flavor.binary(&dir, "oidc-discovery-provider")).args(args).current_dir(dir.path()))
    }

    /// What a probe of this path is told.
    pub fn probe(&self, path: &str) -> Answer {
        curl(&[&format!("http://127.0.0.1:{}{path}", self.health)])
    }

    /// A file in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Asks by curl, which gets these arguments: the URL, headers (`-H`), a socket (`--unix-socket`). Status 0: no answer.
pub fn curl(args: &[&str]) -> Answer {
    let mut command = Command::new("curl");
    command.args(["--silent", "--include", "--noproxy", "*", "--max-time", "20"]).args(args);
    parsed(&Output::of(&mut command).stdout)
}

fn parsed(text: &str) -> Answer {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_default();
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).unwrap_or(0);
    let headers = lines.filter_map(|line| line.split_once(": ")).map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned()));
    Answer { status, headers: headers.collect(), body: body.to_owned() }
}

/// A certificate for `localhost` and its key, PEM, in `dir`; gives both files. It is its own root.
pub fn web_certificate(dir: &Path, name: &str) -> [PathBuf; 2] {
    web_certificate_for(dir, name, "localhost")
}

/// The same for another host.
pub fn web_certificate_for(dir: &Path, name: &str, host: &str) -> [PathBuf; 2] {
    let [certificate, key] = ["crt", "key"].map(|ending| dir.join(format!("{name}.{ending}")));
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]);
    command.args(["-subj", "/CN=localhost", "-addext"]);
    command.arg(format!("subjectAltName=DNS:{host}")).arg("-keyout").arg(&key);
    Output::of(command.arg("-out").arg(&certificate)).ok();
    [certificate, key]
}
