//! A service that answers as Vault does, over TLS: four ways to log in, tokens with an end, and an engine that signs.

use finial_core::{Clock, SystemClock, TrustDomain};
use finial_crypto::{CaTemplate, Csr, DistinguishedName, NameParts, SerialNumber, X509Ca, pem};
use finial_plugin::PluginContext;
use finial_plugin::conformance::ca;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use testkit::fake::{Act, Asked, Pki, tcp};

/// What is wrong with it, and what it has seen.
#[derive(Default)]
pub(crate) struct State {
    /// Of the tokens it gives; the second is whether it lets them be renewed.
    pub(crate) lease: (u64, bool),
    /// Tokens that are good.
    pub(crate) tokens: Vec<String>,
    /// `METHOD path`, each.
    pub(crate) calls: Vec<String>,
    /// Said in place of every answer, if it is something.
    pub(crate) instead: Option<fn(&Asked) -> Act>,
    /// The time by its clock, if that stands still.
    pub(crate) stopped: Option<i64>,
    given: u32,
}

pub(crate) struct FakeVault {
    pub(crate) pki: Pki,
    pub(crate) port: u16,
    /// Where it wants to see a certificate of the client.
    mutual_port: u16,
    pub(crate) state: Arc<Mutex<State>>,
    /// What the engine's CA hangs from.
    pub(crate) root: Arc<[u8]>,
}

pub(crate) fn context() -> PluginContext {
    PluginContext { trust_domain: TrustDomain::parse("example.org").unwrap(), clock: Arc::new(SystemClock) }
}

fn refuse(status: u16, why: &str) -> Act {
    Act::Say(status, json!({"errors": [why]}).to_string())
}

impl FakeVault {
    pub(crate) fn start(lease: (u64, bool)) -> Self {
        let pki = Pki::new();
        pki.issue("server", "subjectAltName=IP:127.0.0.1");
        pki.issue("client", "extendedKeyUsage=clientAuth");
        std::fs::write(pki.path("jwt"), "a.service.account\n").unwrap();
        let (root, state) =
            (ca::authority(None, "root", SystemClock.now()), Arc::new(Mutex::new(State { lease, ..State::default() })));
        let engine = ca::authority(Some(&root), "engine", SystemClock.now());
        let (seen, of_root) = (state.clone(), root.certificate().clone());
        let script = move |asked: &Asked| respond(asked, &seen, &engine, &root);
        let port = tcp(Some(pki.server("server", false)), script.clone());
        let mutual_port = tcp(Some(pki.server("server", true)), script);
        Self { pki, port, mutual_port, state, root: of_root }
    }

    /// The keys by which it is reached, with these for how to log in.
    pub(crate) fn data(&self, auth: &str) -> String {
        let port = if auth.starts_with("cert_auth") { self.mutual_port } else { self.port };
        let ca = self.pki.path("ca.crt");
        format!("vault_addr = \"https://127.0.0.1:{port}/\"\nca_cert_path = \"{ca}\"\nnamespace = \"team\"\n{auth}")
    }

    /// The ways to log in.
    pub(crate) fn ways(&self) -> [String; 4] {
        let path = |name| self.pki.path(name);
        self.state.lock().unwrap().tokens.push("given".into());
        [
            "token_auth { token = \"given\" }".into(),
            format!("cert_auth {{ client_cert_path = \"{}\" client_key_path = \"{}\" }}", path("client.crt"), path("client.key")),
            "approle_auth { approle_auth_mount_point = \"team/roles\" approle_id = \"id\" approle_secret_id = \"hush\" }".into(),
            format!("k8s_auth {{ k8s_auth_role_name = \"server\" token_path = \"{}\" }}", path("jwt")),
        ]
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().calls)
    }
}

fn respond(asked: &Asked, state: &Mutex<State>, engine: &X509Ca, root: &X509Ca) -> Act {
    let mut state = state.lock().unwrap();
    state.calls.push(format!("{} {}", asked.method, asked.path));
    if let Some(instead) = state.instead {
        return instead(asked);
    }
    if asked.header("x-vault-namespace") != Some("team") || asked.header("x-vault-request") != Some("true") {
        return refuse(404, "no handler for route");
    }
    let body = || asked.json();
    let good = match (asked.method.as_str(), asked.path.as_str()) {
        ("PUT", "/v1/auth/cert/login") => asked.client.is_some(),
        ("PUT", "/v1/auth/team/roles/login") => body() == json!({"role_id": "id", "secret_id": "hush"}),
        ("PUT", "/v1/auth/kubernetes/login") => body() == json!({"role": "server", "jwt": "a.service.account"}),
        _ => return with_token(asked, &mut state, engine, root),
    };
    if !good {
        return refuse(400, "invalid role or secret ID");
    }
    state.given += 1;
    let (token, lease) = (format!("s.{}", state.given), state.lease);
    state.tokens.push(token.clone());
    grant(&token, lease)
}

fn grant(token: &str, (seconds, renewable): (u64, bool)) -> Act {
    let auth = json!({"client_token": token, "lease_duration": seconds, "renewable": renewable, "policies": ["x"]});
    Act::Say(200, json!({"request_id": "1", "auth": auth}).to_string())
}

fn with_token(asked: &Asked, state: &mut State, engine: &X509Ca, root: &X509Ca) -> Act {
    let Some(token) = asked.header("x-vault-token").filter(|token| state.tokens.iter().any(|good| good == token))
    else {
        return refuse(403, "permission denied");
    };
    match (asked.method.as_str(), asked.path.as_str()) {
        ("GET", "/v1/auth/token/lookup-self") => {
            let data = json!({"id": token, "ttl": state.lease.0, "renewable": state.lease.1, "policies": ["x"]});
            Act::Say(200, json!({"data": data, "auth": null}).to_string())
        }
        ("PUT", "/v1/auth/token/renew-self") if state.lease.1 => grant(token, state.lease),
        ("PUT", "/v1/pki/root/sign-intermediate") => match sign(&asked.json(), engine, root, state.stopped) {
            Ok(data) => Act::Say(200, json!({"data": data}).to_string()),
            Err(why) => refuse(400, &why),
        },
        _ => refuse(403, "1 error occurred:\n\t* permission denied\n\n"),
    }
}

fn sign(body: &Value, engine: &X509Ca, root: &X509Ca, stopped: Option<i64>) -> Result<Value, String> {
    let text = |key: &str| body[key].as_str().unwrap_or_else(|| panic!("{key} is text: {body}")).to_owned();
    let csr = pem::blocks(text("csr").as_bytes()).map_err(|e| e.to_string())?;
    let csr = Csr::parse(csr[0].der.expose()).map_err(|e| e.to_string())?;
    assert_eq!(text("uri_sans"), csr.uri_sans()[0].to_string());
    let list = |key: &str| text(key).split(',').filter(|part| !part.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    let subject = NameParts {
        country: list("country"),
        organization: list("organization"),
        common_name: text("common_name"),
        serial_number: text("serial_number"),
        ..NameParts::default()
    };
    let now = stopped.unwrap_or_else(|| SystemClock.now());
    let template = CaTemplate {
        subject: &DistinguishedName::new(subject),
        trust_domain: &TrustDomain::parse("example.org").unwrap(),
        not_before: now - 30,
        not_after: now + text("ttl").parse::<i64>().map_err(|e| e.to_string())?,
        serial: SerialNumber::random(),
    };
    let own = ca::aside(engine.issue_ca(csr.public_key(), &template)).map_err(|e| e.to_string())?;
    let pem = |der: &[u8]| pem::encode("CERTIFICATE", der).trim_end().to_owned();
    let (own, above, root) = (pem(&own), pem(engine.certificate()), pem(root.certificate()));
    Ok(json!({"certificate": own, "issuing_ca": above, "ca_chain": [own, above, root], "serial_number": "1"}))
}
