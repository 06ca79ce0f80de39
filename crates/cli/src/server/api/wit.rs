//! `wit mint`, where SPIRE_SERVER_FFLAGS names `wit-svid`. The private key is made here and never leaves this machine.

use super::{gotime, id, is_capped, wire_seconds};
use crate::app::Command;
use crate::context::{Context, Io, write_file};
use crate::goflag::FlagSet;
use crate::json;
use crate::rpc::RpcExt;
use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use finial_core::{KeyType, UnixSeconds};
use finial_crypto::{PrivateKey, private_key_to_jwk};
use finial_proto::server::svid::MintWitsvidRequest;
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::types::Witsvid;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::time::Duration;

pub(crate) const MINT: Command =
    Command::server("wit mint", "Mints a WIT-SVID", flags, |cx| Box::pin(mint(cx))).only_if(flag_is_set);

/// Commands have no file to read feature flags from.
pub(super) fn flag_is_set(io: &Io) -> bool {
    io.var("SPIRE_SERVER_FFLAGS").is_some_and(|flags| flags.split(' ').any(|flag| flag == "wit-svid"))
}

fn flags(f: &mut FlagSet) {
    f.string("spiffeID", "", "SPIFFE ID of the WIT-SVID");
    f.string("keyType", "ec-p256", "Key type of the WIT-SVID");
    f.string("signingAlgorithm", "ES256", "Signing algorithm for the workload signing key");
    f.duration("ttl", Duration::ZERO, "TTL of the WIT-SVID");
    f.string("write", "", "Directory to write output to instead of stdout");
    f.output();
}

async fn mint(cx: Context) -> anyhow::Result<()> {
    let flags = &cx.flags;
    ensure!(!flags.string("spiffeID").is_empty(), "spiffeID must be specified");
    let id = id(flags.string("spiffeID"))?;
    let ttl = wire_seconds(flags, "ttl")?;
    let algorithm = flags.string("signingAlgorithm");
    let key = PrivateKey::generate(key_type(flags.string("keyType"), algorithm)?)
        .context("could not generate public/private key pair")?;
    let request = MintWitsvidRequest {
        id: Some(id),
        public_key: key.public_key().spki_der().to_vec().into(),
        signing_algorithm: algorithm.into(),
        ttl,
    };
    let response = SvidClient::new(cx.server()?).mint_witsvid(request).await.rpc().context("unable to mint SVID")?;
    let svid = response.svid.unwrap_or_default();
    ensure!(!svid.token.is_empty(), "server response missing token");
    match ends_at(&svid.token) {
        Ok(ends_at) if is_capped(flags, ends_at) => cx.eprintln(format!(
            "WIT-SVID lifetime was capped shorter than specified ttl; expires {:?}",
            gotime::rfc3339(ends_at)
        )),
        Ok(_) => {}
        Err(error) => cx.eprintln(format!("Unable to determine WIT-SVID lifetime: {error}")),
    }
    let jwk = private_key_to_jwk(&key).context("could not marshal private key")?;
    let folder = flags.string("write");
    if folder.is_empty() && cx.json() {
        cx.println(json::line(&json!({"private_key": jwk.expose(), "svid": svid_json(&svid)})));
        return Ok(());
    }
    if folder.is_empty() {
        cx.println(&svid.token);
        cx.println(jwk.expose());
        return Ok(());
    }
    for (what, thing, file, text) in
        [("WIT-SVID", "token", "token", svid.token.as_str()), ("Private key", "key", "key", jwk.expose())]
    {
        let path = Path::new(folder).join(file);
        write_file(&path, text.as_bytes(), 0o600).with_context(|| format!("unable to write {thing}"))?;
        cx.println(format!("{what} written to {}", path.display()));
    }
    Ok(())
}

/// The `exp` claim of a token whose type is not that of JWT-SVIDs.
fn ends_at(token: &str) -> anyhow::Result<UnixSeconds> {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: Option<f64>,
    }
    let claims = token.split('.').nth(1).context("compact JWS format must have three parts")?;
    let claims: Claims = serde_json::from_slice(&BASE64URL.decode(claims)?)?;
    #[allow(clippy::cast_possible_truncation)] // saturates
    claims.exp.map(|seconds| seconds as UnixSeconds).context("no expiry claim")
}

/// Which key goes with the algorithm, in the words of SPIRE's check.
fn key_type(name: &str, algorithm: &str) -> anyhow::Result<KeyType> {
    match (algorithm, name) {
        ("RS256" | "RS384" | "RS512" | "PS256" | "PS384" | "PS512", "rsa-2048") => Ok(KeyType::Rsa2048),
        ("RS256" | "RS384" | "RS512" | "PS256" | "PS384" | "PS512", "rsa-4096") => Ok(KeyType::Rsa4096),
        ("RS256" | "RS384" | "RS512" | "PS256" | "PS384" | "PS512", _) => {
            bail!("unsupported key type '{name}' for signing algorithm '{algorithm}'")
        }
        ("ES256", "ec-p256") => Ok(KeyType::EcP256),
        ("ES384", "ec-p384") => Ok(KeyType::EcP384),
        ("ES256" | "ES384", _) => bail!("unsupported key type '{name}' for '{algorithm}' signing algorithm"),
        _ => bail!("unsupported signing algorithm: {algorithm}"),
    }
}

/// Not protobuf's JSON but Go's: numbers as numbers, and what is unset is left out.
fn svid_json(svid: &Witsvid) -> Value {
    let mut out = Map::new();
    let text = |text: &str| Some(Value::from(text)).filter(|_| !text.is_empty());
    let number = |n: i64| Some(Value::from(n)).filter(|_| n != 0);
    let id = svid.id.as_ref().map(|id| {
        let parts = [("trust_domain", text(&id.trust_domain)), ("path", text(&id.path))];
        parts.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect::<Value>()
    });
    for (name, value) in [
        ("token", text(&svid.token)),
        ("id", id),
        ("expires_at", number(svid.expires_at)),
        ("issued_at", number(svid.issued_at)),
        ("hint", text(&svid.hint)),
    ] {
        if let Some(value) = value {
            out.insert(name.into(), value);
        }
    }
    Value::Object(out)
}
