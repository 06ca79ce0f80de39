//! Identity providers that nobody here wrote and that take JWT-SVIDs for logins: Keycloak, and npm's oidc-provider.

use crate::docker::may_skip;
use crate::envoy::Answer;
use crate::oidc::curl;
use crate::process::{self, Process, Workdir, eventually_within, free_port};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const INSTALL: &str = "run tests/relying-parties/build.sh";
/// Keycloak begins in 20 s with a processor of its own.
const START_WITHIN: Duration = Duration::from_secs(240);

fn installed(name: &str) -> Option<PathBuf> {
    let path = process::cache().join("relying-parties").join(name);
    if !path.exists() && may_skip(name, INSTALL) {
        return None;
    }
    Some(path)
}

/// An authorization server that takes tokens of workloads.
pub trait RelyingParty {
    /// Who they must be for.
    fn audience(&self) -> String;

    /// Asks for an access token with this one, as that kind of thing (`jwt-bearer`, `jwt-spiffe`).
    fn log_in(&self, kind: &str, token: &str) -> Answer;
}

/// Keycloak.
pub struct Keycloak {
    /// The process.
    pub process: Process,
    _dir: Workdir,
    base: String,
}

impl Keycloak {
    /// Starts one that trusts that root for the web, and does not wait. `None` where it is not installed.
    pub fn begin(root: &Path) -> Option<Self> {
        let program = installed("keycloak-26.7.4/bin/kc.sh")?;
        let (dir, port) = (Workdir::new(), free_port());
        let mut command = Command::new(program);
        command.args(["start", "--optimized", "--http-enabled=true", "--http-host=127.0.0.1", "--cache=local"]);
        command.args(["--hostname-strict=false", &format!("--http-port={port}")]);
        command.arg(format!("--truststore-paths={}", root.display()));
        // Keys that it does not know may be looked for every second, not every ten.
        command.arg("--spi-public-key-storage--infinispan--min-time-between-requests=1");
        command.env("KC_BOOTSTRAP_ADMIN_USERNAME", "admin").env("KC_BOOTSTRAP_ADMIN_PASSWORD", "admin");
        let process = Process::start("keycloak", dir.path().join("keycloak.log"), &mut command);
        Some(Self { process, _dir: dir, base: format!("http://127.0.0.1:{port}") })
    }

    /// Waits until it answers.
    pub fn ready(&mut self) {
        eventually_within(START_WITHIN, "Keycloak answers", || {
            if let Some(code) = self.process.ended() {
                panic!("Keycloak ended with {code}:\n{}", self.process.log());
            }
            let answer = curl(&[&format!("{}/realms/master", self.base)]);
            if answer.status == 200 { Ok(()) } else { Err(self.process.log()) }
        });
    }

    /// Makes a realm of that name.
    pub fn realm(&self, name: &str) -> Realm<'_> {
        self.admin("", &json!({ "realm": name, "enabled": true }));
        Realm { keycloak: self, name: name.to_owned() }
    }

    /// What its API for administrators answers to a POST; it must be a success.
    pub fn admin(&self, path: &str, body: &Value) -> Value {
        let url = format!("{}/realms/master/protocol/openid-connect/token", self.base);
        let form =
            ["-d", "grant_type=password", "-d", "client_id=admin-cli", "-d", "username=admin", "-d", "password=admin"];
        let answer = curl(&[&form[..], &[url.as_str()]].concat());
        let token: Value = serde_json::from_str(&answer.body).unwrap_or_else(|e| panic!("{e}: {answer:?}"));
        let bearer = format!("Authorization: Bearer {}", token["access_token"].as_str().expect("a token"));
        let (url, body) = (format!("{}/admin/realms{path}", self.base), body.to_string());
        let answer = curl(&["-H", &bearer, "-H", "Content-Type: application/json", "-d", &body, &url]);
        assert!((200..300).contains(&answer.status), "{path} {body}: {answer:?}\n{}", self.process.log());
        serde_json::from_str(&answer.body).unwrap_or_default()
    }
}

/// A realm of Keycloak's: clients and identity providers of its own.
pub struct Realm<'a> {
    keycloak: &'a Keycloak,
    name: String,
}

impl Realm<'_> {
    /// As [`Keycloak::admin`], below the realm.
    pub fn admin(&self, path: &str, body: &Value) -> Value {
        self.keycloak.admin(&format!("/{}{path}", self.name), body)
    }
}

impl RelyingParty for Realm<'_> {
    fn audience(&self) -> String {
        format!("{}/realms/{}", self.keycloak.base, self.name)
    }

    fn log_in(&self, kind: &str, token: &str) -> Answer {
        let kind = format!("client_assertion_type=urn:ietf:params:oauth:client-assertion-type:{kind}");
        let token = format!("client_assertion={token}");
        let url = format!("{}/protocol/openid-connect/token", self.audience());
        curl(&["-d", "grant_type=client_credentials", "-d", &kind, "-d", &token, &url])
    }
}

/// npm's oidc-provider, which gives tokens for those of a workload.
pub struct NpmProvider {
    /// The process.
    pub process: Process,
    _dir: Workdir,
    base: String,
}

impl NpmProvider {
    /// Starts one for a workload, with the discovery document below `issuer`, verified by that root. `None` where it is not installed.
    pub fn start(issuer: &str, subject: &str, root: &Path) -> Option<Self> {
        let script = installed("npm/oidc-provider.mjs")?;
        let (dir, port) = (Workdir::new(), free_port());
        let mut command = Command::new("node");
        command.arg(script).args([&port.to_string(), issuer, subject]).env("NODE_EXTRA_CA_CERTS", root);
        let process = Process::start("oidc-provider", dir.path().join("oidc-provider.log"), &mut command);
        let mut provider = Self { process, _dir: dir, base: format!("http://127.0.0.1:{port}") };
        eventually_within(START_WITHIN, "oidc-provider listens", || {
            let log = provider.process.log();
            assert!(provider.process.ended().is_none(), "it has ended: {log}");
            if log.contains("ready") { Ok(()) } else { Err(log) }
        });
        Some(provider)
    }
}

impl RelyingParty for NpmProvider {
    fn audience(&self) -> String {
        self.base.clone()
    }

    fn log_in(&self, kind: &str, token: &str) -> Answer {
        let grant = format!("grant_type=urn:ietf:params:oauth:grant-type:{kind}");
        let token = format!("assertion={token}");
        curl(&["-d", &grant, "-d", &token, "-d", "client_id=workloads", &format!("{}/token", self.base)])
    }
}
