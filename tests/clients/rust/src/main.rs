//! The words of ../README.md, spoken by the crates `spiffe` and `spiffe-rustls`.

use anyhow::{Context, Result, bail};
use serde_json::json;
use spiffe::{JwtSvid, WorkloadApiClient, X509Source, X509Svid};
use spiffe_rustls::{authorizer, mtls_client, mtls_server};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const DEADLINE: Duration = Duration::from_secs(120);
const EXCHANGE: Duration = Duration::from_secs(10);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["check", audience] => timeout(DEADLINE, check(audience)).await?,
        ["serve", expected] => serve(expected).await,
        ["call", addr, expected] => timeout(DEADLINE, call(addr, expected)).await?,
        ["watch", count] => timeout(DEADLINE, watch(count.parse()?)).await?,
        _ => bail!("usage: check AUDIENCE | serve ID | call ADDR ID | watch N"),
    }
}

fn serial(svid: &X509Svid) -> Result<String> {
    let (_, leaf) = x509_parser::parse_x509_certificate(svid.leaf().as_bytes())?;
    Ok(leaf.tbs_certificate.serial.to_str_radix(16))
}

fn say_x509(svid: &X509Svid) -> Result<()> {
    println!("{}", json!({"event": "x509", "id": svid.spiffe_id().to_string(), "serial": serial(svid)?}));
    Ok(())
}

async fn check(audience: &str) -> Result<()> {
    let client = WorkloadApiClient::connect_env().await?;
    let context = client.fetch_x509_context().await?;
    let svid = context.default_svid().context("no default X.509-SVID")?;
    say_x509(svid)?;
    let token = client.fetch_jwt_svid([audience], None).await?;
    let bundles = client.fetch_jwt_bundles().await?;
    let parsed = JwtSvid::parse_and_validate(token.token(), &bundles, &[audience])?;
    client.validate_jwt_token(audience, token.token()).await?;
    println!("{}", json!({"event": "jwt", "id": parsed.spiffe_id().to_string()}));
    Ok(())
}

fn peer_id(chain: Option<&[rustls::pki_types::CertificateDer<'_>]>) -> Result<String> {
    let leaf = chain.and_then(<[_]>::first).context("the peer showed no certificate")?;
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf)?;
    let names = leaf.subject_alternative_name()?.context("the peer's certificate has no names")?;
    names
        .value
        .general_names
        .iter()
        .find_map(|name| match name {
            x509_parser::extensions::GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        })
        .context("the peer's certificate has no URI")
}

async fn serve(expected: &str) -> Result<()> {
    let source = X509Source::new().await?;
    let config = mtls_server(source.clone()).authorize(authorizer::exact([expected])?).build()?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", json!({"event": "listening", "addr": listener.local_addr()?.to_string()}));
    loop {
        let (raw, _) = listener.accept().await?;
        let exchange = async {
            let mut conn = BufReader::new(acceptor.accept(raw).await?);
            let mut line = String::new();
            conn.read_line(&mut line).await?;
            let peer = peer_id(conn.get_ref().get_ref().1.peer_certificates())?;
            conn.write_all(format!("{}\n", source.svid()?.spiffe_id()).as_bytes()).await?;
            conn.shutdown().await?;
            anyhow::Ok(peer)
        };
        match timeout(EXCHANGE, exchange).await {
            Ok(Ok(peer)) => println!("{}", json!({"event": "accepted", "peer": peer})),
            Ok(Err(err)) => println!("{}", json!({"event": "refused", "error": format!("{err:#}")})),
            Err(_) => println!("{}", json!({"event": "refused", "error": "timed out"})),
        }
    }
}

async fn call(addr: &str, expected: &str) -> Result<()> {
    let source = X509Source::new().await?;
    let config = mtls_client(source).authorize(authorizer::exact([expected])?).build()?;
    let raw = TcpStream::connect(addr).await?;
    let name = rustls::pki_types::ServerName::try_from("localhost")?;
    let mut conn = BufReader::new(TlsConnector::from(Arc::new(config)).connect(name, raw).await?);
    conn.write_all(b"hello\n").await?;
    let mut line = String::new();
    if conn.read_line(&mut line).await? == 0 {
        bail!("the server closed without an answer");
    }
    let peer = peer_id(conn.get_ref().get_ref().1.peer_certificates())?;
    println!("{}", json!({"event": "answered", "peer": peer, "line": line}));
    Ok(())
}

async fn watch(count: usize) -> Result<()> {
    let source = X509Source::new().await?;
    let mut updates = source.updated();
    let mut seen = BTreeSet::new();
    loop {
        let svid = source.svid()?;
        if seen.insert(serial(&svid)?) {
            say_x509(&svid)?;
        }
        if seen.len() >= count {
            return Ok(());
        }
        updates.changed().await?;
    }
}
