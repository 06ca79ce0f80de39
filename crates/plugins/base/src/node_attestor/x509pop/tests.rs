use super::*;
use finial_core::{ErrorKind, ManualClock, TrustDomain};
use finial_plugin::conformance::NodeAttestorFixture;
use finial_plugin::{
    AgentNodeAttestor, AttestSession, AttestVerdict, Challenger, PluginContext, PluginError, ServerNodeAttestor,
    prefixed_selectors,
};
use std::sync::Arc;

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/x509pop");
/// 2028-01-01: after the certificate that is valid for a day.
const NOW: i64 = 1_830_297_600;

fn server(extra: &str) -> Result<X509PopServer, PluginError> {
    let text = format!("ca_bundle_path = \"{DATA}/root.pem\"\n{extra}");
    let trust_domain = TrustDomain::parse("example.org").expect("a name");
    let context = PluginContext { trust_domain, clock: Arc::new(ManualClock::at(NOW)) };
    X509PopServer::new(&finial_hcl::parse(&text).expect("is HCL"), context)
}

fn agent_with(certificate: &str, key: &str, intermediates: &str) -> Result<X509PopAgent, PluginError> {
    let text = format!(
        "certificate_path = \"{DATA}/{certificate}.pem\"\nprivate_key_path = \"{DATA}/{key}.key\"\nintermediates_path = \"{intermediates}\""
    );
    X509PopAgent::new(&finial_hcl::parse(&text).expect("is HCL"))
}

fn agent(name: &str) -> Arc<dyn AgentNodeAttestor> {
    Arc::new(agent_with(name, name, &format!("{DATA}/intermediate.pem")).expect("is configured well"))
}

/// Shows one chain and signs with another key; the chain may be repeated.
struct Impostor {
    chain: &'static [&'static str],
    key: &'static str,
}

#[async_trait::async_trait]
impl AgentNodeAttestor for Impostor {
    async fn begin(&self) -> Result<Box<dyn AttestSession>, PluginError> {
        let der = |name: &&str| {
            let text = std::fs::read(format!("{DATA}/{name}.pem")).expect("reads");
            Bytes(finial_crypto::pem::certificates(&text).expect("parses")[0].to_vec())
        };
        let payload = Payload { certificates: Some(self.chain.iter().map(der).collect()) };
        let payload = serde_json::to_vec(&payload).expect("encodes");
        let key = std::fs::read(format!("{DATA}/{}.key", self.key)).expect("reads");
        let key = finial_crypto::pem::private_key(&key).expect("parses");
        Ok(Box::new(Signs { payload, key }))
    }
}

struct Signs {
    payload: Vec<u8>,
    key: finial_crypto::PrivateKey,
}

#[async_trait::async_trait]
impl AttestSession for Signs {
    fn payload(&self) -> &[u8] {
        &self.payload
    }
    async fn respond(&mut self, challenge: &[u8]) -> Result<Vec<u8>, PluginError> {
        let challenge: Challenge = serde_json::from_slice(challenge).expect("a challenge");
        Ok(serde_json::to_vec(&proof::answer(&self.key, &challenge).map_err(PluginError::internal)?).expect("encodes"))
    }
}

fn impostor(chain: &'static [&'static str], key: &'static str) -> Arc<dyn AgentNodeAttestor> {
    Arc::new(Impostor { chain, key })
}

fn fixture(name: &str, extra: &str) -> NodeAttestorFixture {
    let sha1 = |name: &str| {
        let text = std::fs::read(format!("{DATA}/{name}.pem")).expect("reads");
        finial_crypto::sha1_hex(&finial_crypto::pem::certificates(&text).expect("parses")[0])
    };
    let id = format!("spiffe://example.org/spire/agent/x509pop/{}", sha1(name));
    let values = [
        format!("subject:cn:node {name}"),
        format!("ca:fingerprint:{}", sha1("intermediate")),
        format!("ca:fingerprint:{}", sha1("root")),
        "serialnumber:0a11".to_owned(),
        "san:rack:r1/top".to_owned(),
    ];
    NodeAttestorFixture {
        server: Arc::new(server(extra).expect("is configured well")),
        agent: agent(name),
        expected: AttestVerdict {
            agent_id: finial_core::SpiffeId::parse(&id).expect("an ID"),
            selectors: prefixed_selectors("x509pop", values),
            can_reattest: true,
        },
        impostors: vec![
            ("wrong key", impostor(&["p256", "intermediate"], "stranger"), ErrorKind::Denied),
            ("wrong chain", impostor(&["stranger", "other-root"], "stranger"), ErrorKind::Denied),
            ("no intermediate", impostor(&["p256"], "p256"), ErrorKind::Denied),
            ("expired", impostor(&["expired", "intermediate"], "expired"), ErrorKind::Denied),
            ("not for signatures", impostor(&["nosign", "intermediate"], "nosign"), ErrorKind::Internal),
            (
                "too many intermediates",
                impostor(&["p256", "root", "root", "root", "root", "root"], "p256"),
                ErrorKind::InvalidArgument,
            ),
            ("the root itself", impostor(&["root"], "p256"), ErrorKind::Denied),
        ],
        challenges: true,
    }
}

mod p256 {
    use super::*;
    finial_plugin::node_attestor_conformance!(fixture("p256", ""));
}
mod p384 {
    use super::*;
    finial_plugin::node_attestor_conformance!(fixture("p384", ""));
}
mod p521 {
    use super::*;
    finial_plugin::node_attestor_conformance!(fixture("p521", ""));
}
mod rsa2048 {
    use super::*;
    finial_plugin::node_attestor_conformance!(fixture("rsa2048", "max_rsa_key_size = 2048"));
}

/// Whoever asks for a challenge has verified something; these must be refused before.
struct NoChallenge;
#[async_trait::async_trait]
impl Challenger for NoChallenge {
    async fn challenge(&mut self, _: Vec<u8>) -> Result<Vec<u8>, PluginError> {
        panic!("a challenge was asked for");
    }
}

async fn refusal(server: &X509PopServer, agent: Arc<dyn AgentNodeAttestor>) -> String {
    let session = agent.begin().await.expect("begins");
    let refusal = server.attest(session.payload(), &mut NoChallenge).await;
    refusal.expect_err("is refused").to_string()
}

#[tokio::test]
async fn limits_hold_before_anything_is_verified() {
    let small = server("max_rsa_key_size = 2048").expect("is configured well");
    // The chain leads nowhere: a refusal for the key's size shows that the chain was not verified first.
    let alone = impostor(&["rsa4096"], "rsa4096");
    assert_eq!(refusal(&small, alone.clone()).await, "leaf certificate key size too large");
    assert!(refusal(&server("").expect("default"), alone).await.starts_with("certificate verification failed: "));
    let above = impostor(&["p256", "rsa4096"], "p256");
    assert_eq!(refusal(&small, above).await, "intermediate certificate 0 key size too large");
    let one = server("max_intermediates = 1").expect("is configured well");
    let long = impostor(&["p256", "intermediate", "root"], "p256");
    assert_eq!(refusal(&one, long).await, "too many intermediate certificates");
}

/// SPIRE's agents sign with the longest salt; made with `openssl pkeyutl -pkeyopt rsa_pss_saltlen:max`-equivalent code here.
#[test]
fn rsa_signatures_with_short_and_long_salts_are_accepted() {
    use aws_lc_rs::signature::{RSA_PSS_SHA256, RsaKeyPair, RsaPssSaltLength, RsaSignatureEncoding};
    static LONG: RsaSignatureEncoding = RSA_PSS_SHA256.with_pss_salt_length(RsaPssSaltLength::Max);
    static SHORT: RsaSignatureEncoding = RSA_PSS_SHA256;
    let text = std::fs::read(format!("{DATA}/rsa2048.key")).expect("reads");
    let key = finial_crypto::pem::private_key(&text).expect("parses");
    let public = finial_crypto::Signer::public_key(&key).clone();
    let challenge = proof::challenge(&public);
    let nonce = vec![7; NONCE_BYTES];
    let sent = challenge.rsa_signature.as_ref().expect("an RSA challenge").nonce.0.clone();
    let message = [sent, nonce.clone()].concat();
    let pair = RsaKeyPair::from_pkcs8(key.pkcs8_der().expose()).expect("a key");
    for encoding in [&LONG, &SHORT] {
        let mut signature = vec![0; pair.public_modulus_len()];
        pair.sign(encoding, &aws_lc_rs::rand::SystemRandom::new(), &message, &mut signature).expect("signs");
        let rsa = RsaAnswer { nonce: Bytes(nonce.clone()), signature: Bytes(signature) };
        let answer = Answer { rsa_signature: Some(rsa), ecdsa_signature: None };
        proof::verify(&public, &challenge, &answer).expect("verifies");
    }
    let answer = Answer::default();
    assert_eq!(proof::verify(&public, &challenge, &answer), Err("expecting RSA response"));
}

#[test]
fn the_wire_form_is_that_of_spire() {
    let challenge = Challenge { rsa_signature: None, ecdsa_signature: Some(Nonce { nonce: Bytes(vec![1, 2, 3]) }) };
    let text = serde_json::to_string(&challenge).expect("encodes");
    assert_eq!(text, r#"{"rsa_signature":null,"ecdsa_signature":{"nonce":"AQID"}}"#);
    let ecdsa = EcdsaAnswer { nonce: Bytes(vec![1]), r: Bytes(vec![2]), s: Bytes(vec![3]) };
    let answer = Answer { rsa_signature: None, ecdsa_signature: Some(ecdsa) };
    let text = serde_json::to_string(&answer).expect("encodes");
    assert_eq!(text, r#"{"rsa_signature":null,"ecdsa_signature":{"nonce":"AQ==","r":"Ag==","s":"Aw=="}}"#);
    let payload = Payload { certificates: Some(vec![Bytes(vec![0xff])]) };
    assert_eq!(serde_json::to_string(&payload).expect("encodes"), r#"{"certificates":["/w=="]}"#);
}

#[tokio::test]
async fn the_path_follows_the_template() {
    let template = "agent_path_template = \"/rack/{{ .URISanSelectors.rack }}/{{ .SerialNumberHex }}\"";
    let server = server(template).expect("is configured well");
    struct Relay(Box<dyn AttestSession>);
    #[async_trait::async_trait]
    impl Challenger for Relay {
        async fn challenge(&mut self, challenge: Vec<u8>) -> Result<Vec<u8>, PluginError> {
            self.0.respond(&challenge).await
        }
    }
    let session = agent("p256").begin().await.expect("begins");
    let payload = session.payload().to_vec();
    let verdict = server.attest(&payload, &mut Relay(session)).await.expect("is accepted");
    assert_eq!(verdict.agent_id.as_str(), "spiffe://example.org/spire/agent/rack/r1/top/0a11");
}

#[test]
fn configuration_is_checked() {
    let refused = |extra: &str, what: &str| {
        let error = server(extra).err().unwrap_or_else(|| panic!("{extra} was accepted")).to_string();
        assert!(error.contains(what), "{error}");
    };
    refused("mode = \"other\"", "mode can only be either spiffe or external_pki");
    refused("mode = \"spiffe\"", "not supported yet");
    refused("verify_client_ip = true", "not supported yet");
    refused("ca_bundle_paths = [\"x\"]", "only one of ca_bundle_path or ca_bundle_paths can be configured, not both");
    refused("max_intermediates = 0", "max_intermediates must be greater than 0");
    refused("max_rsa_key_size = -1", "max_rsa_key_size must be greater than 0");
    refused("agent_path_template = \"/{{ upper .PluginName }}\"", "failed to parse agent svid template");
    let error = agent_with("p256", "p384", "").err().expect("is refused").to_string();
    assert_eq!(error, "unable to load keypair: private key does not match public key");
    let error = agent_with("missing", "p384", "").err().expect("is refused").to_string();
    assert!(error.starts_with("unable to load keypair: ") && error.contains("missing.pem"), "{error}");
    let error = agent_with("p256", "p256", "/nonexistent").err().expect("is refused").to_string();
    assert!(error.starts_with("unable to load intermediate certificates: "), "{error}");
}
