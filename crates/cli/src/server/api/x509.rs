//! `x509 mint`. The private key is made here and never leaves this machine.

use super::{gotime, is_capped, wire_seconds};
use crate::app::Command;
use crate::context::{Context, write_file};
use crate::goflag::FlagSet;
use crate::json;
use crate::rpc::RpcExt;
use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use finial_core::{KeyType, SpiffeId};
use finial_crypto::{PrivateKey, create_csr, pem};
use finial_proto::server::bundle::GetBundleRequest;
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::svid::MintX509svidRequest;
use finial_proto::server::svid::svid_client::SvidClient;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

pub(crate) const MINT: Command = Command::server("x509 mint", "Mints an X509-SVID", flags, |cx| Box::pin(mint(cx)));

fn flags(f: &mut FlagSet) {
    f.string("spiffeID", "", "SPIFFE ID of the X509-SVID");
    f.duration("ttl", Duration::ZERO, "TTL of the X509-SVID");
    f.strings("dns", "DNS name that will be included in SVID. Can be used more than once.");
    f.string("write", "", "Directory to write output to instead of stdout");
    f.output();
}

async fn mint(cx: Context) -> anyhow::Result<()> {
    let flags = &cx.flags;
    ensure!(!flags.string("spiffeID").is_empty(), "spiffeID must be specified");
    let id = SpiffeId::parse(flags.string("spiffeID"))?;
    let ttl = wire_seconds(flags, "ttl")?;
    let key = PrivateKey::generate(KeyType::EcP256).context("unable to generate key")?;
    let csr = create_csr(&key, None, Some(&id), flags.strings("dns")).await.context("unable to generate CSR")?;
    let channel = cx.server()?;
    let request = MintX509svidRequest { csr: csr.into(), ttl };
    let minted = SvidClient::new(channel.clone()).mint_x509svid(request).await.rpc().context("unable to mint SVID")?;
    let svid = minted.svid.unwrap_or_default();
    ensure!(!svid.cert_chain.is_empty(), "server response missing SVID chain");
    let bundle = BundleClient::new(channel).get_bundle(GetBundleRequest::default()).await.rpc();
    let roots = bundle.context("unable to get bundle")?.x509_authorities;
    ensure!(!roots.is_empty(), "server response missing X509 Authorities");
    if is_capped(flags, svid.expires_at) {
        cx.eprintln(format!(
            "X509-SVID lifetime was capped shorter than specified ttl; expires {:?}",
            gotime::rfc3339(svid.expires_at)
        ));
    }
    let key_der = key.pkcs8_der();
    let roots: Vec<&[u8]> = roots.iter().map(|root| root.asn1.as_ref()).collect();
    let chain: Vec<&[u8]> = svid.cert_chain.iter().map(AsRef::as_ref).collect();
    let folder = flags.string("write");
    if cx.json() && folder.is_empty() {
        let list = |ders: &[&[u8]]| ders.iter().map(|der| Value::from(BASE64.encode(der))).collect::<Value>();
        let key = BASE64.encode(key_der.expose());
        cx.println(json::line(&json!({"x509_svid": list(&chain), "private_key": key, "root_cas": list(&roots)})));
        return Ok(());
    }
    let (svid_pem, bundle_pem) = (pem::encode_certificates(chain), pem::encode_certificates(roots));
    let key_pem = pem::encode_private_key(key_der.expose());
    if folder.is_empty() {
        cx.println(format!("X509-SVID:\n{svid_pem}"));
        cx.println(format!("Private key:\n{}", key_pem.expose()));
        cx.println(format!("Root CAs:\n{bundle_pem}"));
        return Ok(());
    }
    for (what, thing, file, text, mode) in [
        ("X509-SVID", "SVID", "svid.pem", &svid_pem, 0o644),
        ("Private key", "key", "key.pem", key_pem.expose(), 0o600),
        ("Root CAs", "bundle", "bundle.pem", &bundle_pem, 0o644),
    ] {
        let path = Path::new(folder).join(file);
        write_file(&path, text.as_bytes(), mode).with_context(|| format!("unable to write {thing}"))?;
        cx.println(format!("{what} written to {}", path.display()));
    }
    Ok(())
}
