//! `x509pop`: the agent shows an X.509 certificate of an existing PKI and proves that it holds the private key.
//!
//! Payload: `{"certificates": [base64 DER, leaf first]}`. Challenge and answer are JSON with 32-byte nonces from both sides; the
//! answer signs SHA-256(server's nonce, agent's nonce), with RSA-PSS or ECDSA (`r` and `s` apart). Agents and servers of SPIRE
//! speak the same.
//!
//! Not offered yet, and refused when configured: `mode = "spiffe"`, `spiffe_endpoint_socket`, `verify_client_ip`, and
//! template functions in `agent_path_template`.

mod agent;
mod proof;
mod server;
mod template;

pub use agent::X509PopAgent;
pub use server::X509PopServer;

use serde::{Deserialize, Serialize};

/// The name of the attestor.
pub const NAME: &str = "x509pop";

/// The size of each side's nonce, bytes.
const NONCE_BYTES: usize = 32;

/// Bytes that are base64 in JSON, as Go writes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Bytes(Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use base64::Engine as _;
        serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(&self.0))
    }
}
impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use base64::Engine as _;
        let text = Option::<String>::deserialize(deserializer)?.unwrap_or_default();
        base64::engine::general_purpose::STANDARD.decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

#[derive(Serialize, Deserialize)]
struct Payload {
    #[serde(default)]
    certificates: Option<Vec<Bytes>>,
}

#[derive(Serialize, Deserialize, Default)]
struct Challenge {
    #[serde(default)]
    rsa_signature: Option<Nonce>,
    #[serde(default)]
    ecdsa_signature: Option<Nonce>,
}

#[derive(Serialize, Deserialize)]
struct Nonce {
    #[serde(default)]
    nonce: Bytes,
}

#[derive(Serialize, Deserialize, Default)]
struct Answer {
    #[serde(default)]
    rsa_signature: Option<RsaAnswer>,
    #[serde(default)]
    ecdsa_signature: Option<EcdsaAnswer>,
}

#[derive(Serialize, Deserialize)]
struct RsaAnswer {
    #[serde(default)]
    nonce: Bytes,
    #[serde(default)]
    signature: Bytes,
}

#[derive(Serialize, Deserialize)]
struct EcdsaAnswer {
    #[serde(default)]
    nonce: Bytes,
    #[serde(default)]
    r: Bytes,
    #[serde(default)]
    s: Bytes,
}

#[cfg(test)]
mod tests;
