//! The SVID service.

use super::{Answers, ask, id, ids, of_servers, show};
use finial_core::{KeyType, SpiffeId};
use finial_crypto::{PrivateKey, create_csr};
use finial_net::client::uds_channel;
use finial_proto::server::svid::{self as svids, svid_client::SvidClient};
use testkit::{Server, ServerOptions};
use tokio::sync::OnceCell;

/// CSRs in every state of disrepair; the same for all who ask.
pub(crate) async fn csrs() -> Vec<Vec<u8>> {
    static MADE: OnceCell<Vec<Vec<u8>>> = OnceCell::const_new();
    MADE.get_or_init(make_csrs).await.clone()
}

async fn make_csrs() -> Vec<Vec<u8>> {
    let key = PrivateKey::generate(KeyType::EcP256).expect("a key");
    let csr = async |id: Option<&str>| {
        let id = id.map(|i| SpiffeId::parse(i).expect("an ID"));
        create_csr(&key, None, id.as_ref(), &[]).await.expect("a CSR")
    };
    let good = csr(Some("spiffe://example.org/x")).await;
    let mut forged = good.clone();
    if let Some(last) = forged.last_mut() {
        *last ^= 1;
    }
    let mut trailing = good.clone();
    trailing.push(0);
    vec![
        Vec::new(),
        b"garbage".to_vec(),
        vec![0x30; 70_000],
        good.get(..good.len() / 2).unwrap_or_default().to_vec(),
        forged,
        trailing,
        csr(None).await,
        csr(Some("spiffe://other.org/x")).await,
        csr(Some("spiffe://example.org")).await,
        csr(Some("spiffe://example.org/spire/server")).await,
        csr(Some("spiffe://example.org/spire/agent/x")).await,
    ]
}

#[test]
fn minting() {
    of_servers(&ServerOptions::default(), minted);
}

async fn minted(server: &Server) -> Answers {
    let mut client = SvidClient::new(uds_channel(server.socket()));
    let mut answers = Answers::new();
    for csr in csrs().await {
        let asked = svids::MintX509svidRequest { csr: csr.into(), ttl: 0 };
        let answer = show(client.mint_x509svid(asked.clone()).await);
        let answer = if answer.starts_with("MintX509svidResponse") { "granted".to_owned() } else { answer };
        answers.push((format!("{asked:?}"), answer));
    }
    for id in ids().into_iter().filter(|i| i.as_ref().is_none_or(|i| !i.path.ends_with("nobody"))) {
        let request = svids::MintJwtsvidRequest { id, audience: vec!["a".into()], ttl: 0 };
        let answer = show(client.mint_jwtsvid(request.clone()).await);
        let answer = if answer.starts_with("MintJwtsvidResponse") { "granted".to_owned() } else { answer };
        answers.push((format!("{request:?}"), answer));
    }
    for audience in [&[][..], &[""], &["", ""]] {
        let audience = audience.iter().map(|a| (*a).to_owned()).collect();
        let request = svids::MintJwtsvidRequest { id: id("example.org", "/x"), audience, ttl: 0 };
        ask!(answers, client.mint_jwtsvid, request);
    }
    ask!(answers, client.batch_new_x509svid, svids::BatchNewX509svidRequest::default());
    ask!(answers, client.new_jwtsvid, svids::NewJwtsvidRequest::default());
    ask!(answers, client.new_downstream_x509ca, svids::NewDownstreamX509caRequest::default());
    answers
}
