//! The upstream authority `vault` against HashiCorp's own PKI engine, and against a whole Vault where `VAULT_BIN` names one.

use finial_core::{Clock, SystemClock, TrustDomain};
use finial_plugin::conformance::{self, UpstreamAuthorityFixture};
use finial_plugin::{MintedX509Ca, PluginContext, PluginError, UpstreamAuthority};
use finial_plugins_vault::Vault;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use testkit::fake::Pki;
use testkit::{Flavor, Output, Process, Server, ServerOptions, Workdir, eventually, free_port};

/// Asks for a minute less: Vault's clock goes on while the suite's stands still.
struct Shorter(Vault);

#[async_trait::async_trait]
impl UpstreamAuthority for Shorter {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        self.0.mint_x509_ca(csr, ttl_seconds - 60).await
    }
}

/// A server with the PKI engine at `pki`, ended when dropped.
struct Engine {
    pki: Pki,
    port: u16,
    dir: Workdir,
    _process: Process,
}

impl Engine {
    fn start(program: impl FnOnce(&Pki, u16) -> Command) -> Self {
        let (pki, port, dir) = (Pki::new(), free_port(), Workdir::new());
        pki.issue("server", "subjectAltName=IP:127.0.0.1");
        let process = Process::start("vault", dir.path().join("vault.log"), &mut program(&pki, port));
        let engine = Self { pki, port, dir, _process: process };
        eventually("Vault answers", || {
            let out = engine.curl("GET", "auth/token/lookup-self", &Value::Null);
            if out.stdout.contains("\"data\"") { Ok(()) } else { Err(format!("{}{}", out.stdout, out.stderr)) }
        });
        engine
    }

    fn curl(&self, method: &str, path: &str, body: &Value) -> Output {
        let mut curl = Command::new("curl");
        curl.args(["-s", "--max-time", "30", "-X", method, "-H", "X-Vault-Token: root", "--cacert"]);
        curl.arg(self.pki.path("ca.crt"));
        if !body.is_null() {
            curl.args(["-d", &body.to_string()]);
        }
        Output::of(curl.arg(format!("https://127.0.0.1:{}/v1/{path}", self.port)))
    }

    #[track_caller]
    fn api(&self, method: &str, path: &str, body: Value) -> Value {
        let out = self.curl(method, path, &body).ok();
        if out.stdout.is_empty() {
            return Value::Null;
        }
        let answer: Value = serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("{path}: {e}: {out:?}"));
        assert!(answer["errors"].is_null(), "{path}: {answer}");
        answer
    }

    /// Gives it a root.
    fn with_root(self) -> Self {
        let root = json!({"common_name": "Vault's root", "ttl": "8000h", "key_type": "ec", "key_bits": 256});
        self.api("POST", "pki/root/generate/internal", root);
        self
    }

    fn data(&self, auth: &str) -> String {
        format!(
            "vault_addr = \"https://127.0.0.1:{}\"\nca_cert_path = \"{}\"\n{auth}",
            self.port,
            self.pki.path("ca.crt")
        )
    }

    fn conforms(&self, auth: &str) {
        let fixture = || {
            let trust_domain = TrustDomain::parse("example.org").unwrap();
            let context = PluginContext { trust_domain: trust_domain.clone(), clock: Arc::new(SystemClock) };
            let vault = Vault::new(&finial_hcl::parse(&self.data(auth)).unwrap(), &context).unwrap();
            UpstreamAuthorityFixture { upstream: Arc::new(Shorter(vault)), trust_domain, now: SystemClock.now() }
        };
        conformance::run(async {
            conformance::mints_authorities(fixture()).await;
            conformance::bad_csrs_are_refused(fixture()).await;
        });
    }

    /// The root as PEM.
    fn root(&self) -> String {
        let issuer = self.api("GET", "pki/cert/ca", Value::Null);
        format!("{}\n", issuer["data"]["certificate"].as_str().unwrap().trim_end())
    }
}

fn pki_engine() -> Option<PathBuf> {
    let built = testkit::cache().join("vault-pki-1.21.4/vault-pki");
    let skip = !built.exists() && testkit::docker::may_skip("Vault's PKI engine", "tests/real-vault-pki/build.sh");
    (!skip).then_some(built)
}

#[test]
fn vaults_own_engine_signs_a_servers_authority() {
    let Some(program) = pki_engine() else { return };
    let engine = Engine::start(|pki, port| {
        let mut command = Command::new(program);
        command.arg(format!("127.0.0.1:{port}")).arg(pki.path("server.crt")).arg(pki.path("server.key"));
        command
    });
    let engine = engine.with_root();
    engine.conforms("token_auth { token = \"root\" }");
    let data = engine.data("token_auth { token = \"root\" }");
    let plugins = format!("UpstreamAuthority \"vault\" {{ plugin_data {{\n{data}\n}} }}");
    let server = Server::start(Flavor::Finial, &ServerOptions { plugins, ..ServerOptions::default() });
    assert_eq!(server.command(&["bundle", "show"]).ok().stdout, engine.root());
    // SPIRE's plugin gets the same of it.
    let plugins = format!("UpstreamAuthority \"vault\" {{ plugin_data {{\n{data}\n}} }}");
    let spire = Server::start(Flavor::Spire, &ServerOptions { plugins, ..ServerOptions::default() });
    assert_eq!(spire.command(&["bundle", "show"]).ok().stdout, engine.root());
}

#[test]
fn a_whole_vault_lets_us_in_each_way() {
    let Some(program) = std::env::var_os("VAULT_BIN") else {
        eprintln!("SKIPPED: a whole Vault: VAULT_BIN names none");
        return;
    };
    let engine = Engine::start(|pki, port| {
        let config = format!(
            "listener \"tcp\" {{ address = \"127.0.0.1:{port}\" tls_cert_file = \"{}\" tls_key_file = \"{}\" }}",
            pki.path("server.crt"),
            pki.path("server.key")
        );
        std::fs::write(pki.path("vault.hcl"), config).unwrap();
        let mut command = Command::new(program);
        let dev = format!("-dev-listen-address=127.0.0.1:{}", free_port());
        command.args(["server", "-dev", "-dev-root-token-id=root", "-dev-no-store-token", &dev]);
        command.arg(format!("-config={}", pki.path("vault.hcl")));
        command
    });
    engine.api("POST", "sys/mounts/pki", json!({"type": "pki", "config": {"max_lease_ttl": "8760h"}}));
    let engine = engine.with_root();
    let policy = "path \"pki/root/sign-intermediate\" { capabilities = [\"update\"] }";
    engine.api("PUT", "sys/policies/acl/spire", json!({"policy": policy}));
    engine.conforms("token_auth { token = \"root\" }");
    engine.api("POST", "sys/auth/approle", json!({"type": "approle"}));
    engine.api("POST", "auth/approle/role/spire", json!({"token_policies": ["spire"], "token_ttl": "20m"}));
    let id = engine.api("GET", "auth/approle/role/spire/role-id", Value::Null)["data"]["role_id"].clone();
    let secret = engine.api("POST", "auth/approle/role/spire/secret-id", json!({}))["data"]["secret_id"].clone();
    engine.conforms(&format!("approle_auth {{ approle_id = {id} approle_secret_id = {secret} }}"));
    engine.pki.issue("client", "extendedKeyUsage=clientAuth");
    engine.api("POST", "sys/auth/cert", json!({"type": "cert"}));
    let ca = std::fs::read_to_string(engine.pki.path("ca.crt")).unwrap();
    engine.api("POST", "auth/cert/certs/spire", json!({"certificate": ca, "token_policies": ["spire"]}));
    let (certificate, key) = (engine.pki.path("client.crt"), engine.pki.path("client.key"));
    engine.conforms(&format!("cert_auth {{ client_cert_path = \"{certificate}\" client_key_path = \"{key}\" }}"));
    drop(engine.dir);
}
