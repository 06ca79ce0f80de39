//! Keycloak and npm's oidc-provider take JWT-SVIDs of a workload for logins, by the documents that the server's own provider and
//! `finial oidc` publish; across a rotation of the keys, and nobody else's.

use crate::answers_trust::web_certificate;
use serde_json::{Value, json};
use testkit::envoy::Answer;
use testkit::oidc::Provider;
use testkit::relying::{Keycloak, NpmProvider, Realm, RelyingParty};
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, Workdir, eventually, free_port};

/// How a login goes: who is asked, and what the token is to it.
type Login<'a> = (&'a dyn RelyingParty, &'static str);

fn log_in((party, kind): Login<'_>, token: &str) -> Answer {
    party.log_in(kind, token)
}

fn is_in(answer: &Answer) -> bool {
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    answer.status == 200 && body["access_token"].is_string()
}

/// A workload of a trust domain whose tokens each have an ID of their own.
struct Workload {
    agent: Agent,
    server: Server,
    id: String,
}

impl Workload {
    fn of(server: Server) -> Self {
        let id = server.entry("/web", &["-jwtSVIDIncludeJTI"]);
        let agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
        Self { agent, server, id }
    }

    /// A token that nobody has seen yet.
    fn token(&self, audience: &str) -> String {
        self.token_of(&self.id, audience)
    }

    fn token_of(&self, id: &str, audience: &str) -> String {
        let said = eventually("the agent has a token", || {
            let said = self.agent.command(&["api", "fetch", "jwt", "-audience", audience, "-spiffeID", id]);
            if said.code == 0 { Ok(said.stdout) } else { Err(said.stderr) }
        });
        said.split_whitespace().find(|word| word.starts_with("eyJ")).expect("a token").to_owned()
    }
}

/// A realm that takes the workload's tokens, by an identity provider of that kind with that configuration. In one realm Keycloak
/// finds clients by the token's subject alone.
fn realm<'a>(keycloak: &'a Keycloak, kind: &str, config: impl FnOnce(&Realm<'_>) -> Value, id: &str) -> Realm<'a> {
    let realm = keycloak.realm(kind);
    let config = config(&realm);
    let provider = json!({ "alias": "workloads", "providerId": kind, "enabled": true, "config": config });
    realm.admin("/identity-provider/instances", &provider);
    let attributes = json!({ "jwt.credential.issuer": "workloads", "jwt.credential.sub": id });
    let client = json!({ "clientId": "web", "enabled": true, "serviceAccountsEnabled": true, "standardFlowEnabled": false,
        "clientAuthenticatorType": "federated-jwt", "attributes": attributes });
    realm.admin("/clients", &client);
    realm
}

/// What Keycloak makes of a discovery document.
fn discovered(realm: &Realm<'_>, issuer: &str) -> Value {
    let from = json!({ "providerId": "oidc", "fromUrl": format!("{issuer}/.well-known/openid-configuration") });
    let mut config = realm.admin("/identity-provider/import-config", &from);
    assert_eq!((&config["issuer"], &config["jwksUrl"]), (&json!(issuer), &json!(format!("{issuer}/keys"))));
    config["supportsClientAssertions"] = json!("true");
    config
}

#[test]
fn keycloak_and_npms_provider_take_tokens_of_the_trust_domain_and_nobody_elses() {
    let files = Workdir::new();
    let (key, certificate, root) = web_certificate(files.path());
    let Some(mut keycloak) = Keycloak::begin(&root) else { return };
    let [own_port, port] = [free_port(), free_port()];
    let issuer = format!("https://localhost:{own_port}");
    let serving = |port: u16| {
        let (key, certificate) = (key.display(), certificate.display());
        format!(
            "domains = [\"localhost\"]\n set_key_use = true\n serving_cert_file {{ cert_file_path = \"{certificate}\" key_file_path = \
             \"{key}\" addr = \"127.0.0.1:{port}\" }}"
        )
    };
    let own = format!("jwt_issuer = \"{issuer}\"\n experimental {{ oidc {{ {} }} }}", serving(own_port));
    let server = Server::start(Flavor::Finial, &ServerOptions { server: own, ..ServerOptions::default() });
    let workload = Workload::of(server);
    let id = workload.id.clone();
    let _provider = Provider::start(
        Flavor::Finial,
        &format!(
            "{}\n workload_api {{ socket_path = \"{}\" trust_domain = \"example.org\" }}",
            serving(port),
            workload.agent.socket().display()
        ),
    );
    let Some(npm) = NpmProvider::start(&issuer, &id, &root) else { return };
    keycloak.ready();
    let spiffe =
        json!({ "trustDomain": "spiffe://example.org", "bundleEndpoint": format!("https://localhost:{port}/keys") });
    let spiffe = realm(&keycloak, "spiffe", |_| spiffe, &id);
    let oidc = realm(&keycloak, "oidc", |realm| discovered(realm, &issuer), &id);
    let logins: [Login<'_>; 3] = [(&spiffe, "jwt-spiffe"), (&oidc, "jwt-bearer"), (&npm, "jwt-bearer")];
    for login in logins {
        let answer = log_in(login, &workload.token(&login.0.audience()));
        assert!(is_in(&answer), "{}: {answer:?}\n{}\n{}", login.1, keycloak.process.log(), npm.process.log());
    }
    refused(&workload, &logins);
    across_a_rotation(&workload, [&spiffe, &oidc], &logins);
}

/// For somebody else, by somebody else, and of somebody else.
fn refused(workload: &Workload, logins: &[Login<'_>]) {
    let issuer = "jwt_issuer = \"https://elsewhere.test\"";
    let other = ServerOptions { trust_domain: "other.test".into(), server: issuer.into(), ..ServerOptions::default() };
    let other = Workload::of(Server::start(Flavor::Finial, &other));
    let impostor = Workload::of(Server::start(Flavor::Finial, &ServerOptions::default()));
    let neighbour = workload.server.entry("/else", &["-jwtSVIDIncludeJTI"]);
    for login in logins {
        let audience = login.0.audience();
        for (what, token) in [
            ("another audience", workload.token("https://elsewhere.test")),
            ("another workload", workload.token_of(&neighbour, &audience)),
            ("another trust domain", other.token(&audience)),
            ("another trust domain of that name", impostor.token(&audience)),
        ] {
            let answer = log_in(*login, &token);
            assert!(!is_in(&answer) && (400..500).contains(&answer.status), "{what}, {}: {answer:?}", login.1);
        }
    }
}

fn across_a_rotation(workload: &Workload, realms: [&Realm<'_>; 2], logins: &[Login<'_>]) {
    let server = &workload.server;
    let taken = |login: &Login<'_>, what: &str| {
        eventually(what, || {
            let answer = log_in(*login, &workload.token(&login.0.audience()));
            if is_in(&answer) { Ok(()) } else { Err(format!("{}: {answer:?}", login.1)) }
        });
    };
    let before = logins.iter().map(|login| [0; 2].map(|_| workload.token(&login.0.audience()))).collect::<Vec<_>>();
    server.order("jwt", "prepare");
    server.order("jwt", "activate");
    for (login, [old, _]) in logins.iter().zip(&before) {
        taken(login, "a token of the new key is taken");
        let answer = log_in(*login, old);
        assert!(is_in(&answer), "one of the key before, {}: {answer:?}", login.1);
    }
    server.order("jwt", "taint");
    server.order("jwt", "revoke");
    // It remembers keys for a day, and is told to forget them.
    realms.iter().for_each(|realm| drop(realm.admin("/clear-keys-cache", &json!({}))));
    for (login, [_, old]) in logins.iter().zip(&before) {
        let answer = eventually("a token of the revoked key is refused", || {
            let answer = log_in(*login, old);
            if is_in(&answer) { Err(format!("{}: {answer:?}", login.1)) } else { Ok(answer) }
        });
        assert!((400..500).contains(&answer.status), "{}: {answer:?}", login.1);
        taken(login, "a token of the key in force is taken");
    }
}
