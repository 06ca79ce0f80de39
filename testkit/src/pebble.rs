//! Pebble, the ACME authority for tests that Let's Encrypt makes, and the DNS by which it finds who answers for a name.

use crate::docker::may_skip;
use crate::oidc::curl;
use crate::process::{self, Output, Process, Workdir, eventually, free_port};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A running authority, and its DNS server.
pub struct Pebble {
    /// The authority; who ends it has an authority that is away.
    pub process: Process,
    /// Where it looks at certificates of challenges, on the address that its DNS says.
    pub tls_port: u16,
    dir: Workdir,
    ports: Ports,
    _dns: Process,
}

#[derive(Clone, Copy)]
struct Ports {
    directory: u16,
    management: u16,
    dns_management: u16,
    dns: u16,
}

impl Pebble {
    /// Starts one whose certificates are valid for so long. Names are on 127.0.0.1 until [`Pebble::name_is_at`]; it refuses
    /// `blocked.example`. `None` where pebble is not installed.
    pub fn start(valid_seconds: u32) -> Option<Self> {
        let pebble = Self::prepare(valid_seconds)?;
        pebble.ready();
        Some(pebble)
    }

    /// The same, but away: see [`Pebble::come_back`].
    pub fn away(valid_seconds: u32) -> Option<Self> {
        let mut pebble = Self::prepare(valid_seconds)?;
        pebble.process.kill();
        Some(pebble)
    }

    fn prepare(valid_seconds: u32) -> Option<Self> {
        if !program("pebble").exists() && may_skip("Pebble", "run tests/pebble/build.sh") {
            return None;
        }
        let (dir, tls_port) = (Workdir::new(), free_port());
        let ports =
            Ports { directory: free_port(), management: free_port(), dns_management: free_port(), dns: free_port() };
        certificate(dir.path());
        let path = |name: &str| dir.path().join(name).display().to_string();
        let config = serde_json::json!({ "pebble": {
            "listenAddress": format!("127.0.0.1:{}", ports.directory),
            "managementListenAddress": format!("127.0.0.1:{}", ports.management),
            "certificate": path("web.pem"), "privateKey": path("web.key"),
            "httpPort": 1, "tlsPort": tls_port, "keyAlgorithm": "ecdsa",
            "domainBlocklist": ["blocked.example"], "retryAfter": { "authz": 1, "order": 1 },
            "profiles": { "default": { "description": "for tests", "validityPeriod": valid_seconds } },
        }});
        dir.write("pebble.json", &config.to_string());
        let mut dns = Command::new(program("pebble-challtestsrv"));
        dns.args(["-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", "", "-defaultIPv6", ""]);
        dns.args(["-defaultIPv4", "127.0.0.1", "-dnsserver", &format!("127.0.0.1:{}", ports.dns)]);
        dns.args(["-management", &format!("127.0.0.1:{}", ports.dns_management)]);
        let dns = Process::start("challtestsrv", dir.path().join("dns.log"), &mut dns);
        let process = launch(&dir, ports);
        Some(Self { process, tls_port, dir, ports, _dns: dns })
    }

    /// Starts the authority again: the same directory, but a new root, and it knows no accounts.
    pub fn come_back(&mut self) {
        self.process = launch(&self.dir, self.ports);
        self.ready();
    }

    fn ready(&self) {
        eventually("pebble answers", || {
            let root = self.web_root().display().to_string();
            let answer = curl(&["--cacert", &root, &self.directory()]);
            if answer.status == 200 { Ok(()) } else { Err(self.process.log()) }
        });
    }

    /// The URL of its directory.
    pub fn directory(&self) -> String {
        format!("https://localhost:{}/dir", self.ports.directory)
    }

    /// The root by which its own door is verified: for `SSL_CERT_FILE` of who asks it.
    pub fn web_root(&self) -> PathBuf {
        self.dir.path().join("root.pem")
    }

    /// The root of the certificates that it gives, in a file.
    pub fn root(&self) -> PathBuf {
        let url = format!("https://localhost:{}/roots/0", self.ports.management);
        let answer = curl(&["--cacert", &self.web_root().display().to_string(), &url]);
        assert_eq!(answer.status, 200, "{answer:?}");
        self.dir.write("issued-root.pem", &answer.body)
    }

    /// Its DNS says so from now on.
    pub fn name_is_at(&self, name: &str, address: &str) {
        let url = format!("http://127.0.0.1:{}/add-a", self.ports.dns_management);
        let body = serde_json::json!({ "host": format!("{name}."), "addresses": [address] }).to_string();
        eventually("the DNS server takes a name", || {
            let answer = curl(&["-d", &body, &url]);
            if answer.status == 200 { Ok(()) } else { Err(format!("{answer:?}")) }
        });
    }
}

fn program(name: &str) -> PathBuf {
    process::cache().join("pebble-2.10.1").join(name)
}

fn launch(dir: &Workdir, ports: Ports) -> Process {
    let mut command = Command::new(program("pebble"));
    command.arg("-config").arg(dir.path().join("pebble.json"));
    command.args(["-dnsserver", &format!("127.0.0.1:{}", ports.dns)]);
    // Each order is looked at, and at once.
    command.env("PEBBLE_VA_NOSLEEP", "1").env("PEBBLE_AUTHZREUSE", "0");
    Process::start("pebble", dir.path().join("pebble.log"), &mut command)
}

/// A certificate of the web for `localhost` and the root that verifies it: `web.key`, `web.pem`, `root.pem`.
fn certificate(dir: &Path) {
    let openssl = |args: &[&str]| {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]);
        Output::of(command.args(args).current_dir(dir)).ok();
    };
    openssl(&["-subj", "/CN=root", "-keyout", "root.key", "-out", "root.pem"]);
    let names = ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"];
    let leaf =
        ["-CA", "root.pem", "-CAkey", "root.key", "-subj", "/CN=localhost", "-keyout", "web.key", "-out", "web.pem"];
    openssl(&[&leaf[..], &names].concat());
}
