//! The SVID service.

use super::attested::{jwt, x509};
use super::joined::KEY;
use super::{Answers, ask, id, ids, of_servers, refusal, show};
use finial_core::{KeyType, SpiffeId};
use finial_crypto::{DistinguishedName, PrivateKey, create_csr};
use finial_net::client::uds_channel;
use finial_proto::server::svid::{self as svids, svid_client::SvidClient};
use testkit::{Server, ServerOptions};
use tokio::sync::OnceCell;
use tonic::transport::Channel;

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

/// Good ones, with what is taken over from them.
async fn good_csrs() -> Vec<(&'static str, Vec<u8>)> {
    let id = SpiffeId::parse("spiffe://example.org/minted").expect("an ID");
    let subject = DistinguishedName::of(&["DE", "FR"], &["Org", "Other"], "common.example");
    let csr = async |subject: Option<&DistinguishedName>, names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        create_csr(&*KEY, subject, Some(&id), &names).await.expect("a CSR")
    };
    vec![
        ("plain", csr(None, &[]).await),
        ("a subject", csr(Some(&subject), &[]).await),
        ("a name", csr(None, &["a.example"]).await),
        ("several names", csr(None, &["b.example", "a.example", "*.c.example"]).await),
        ("a name twice", csr(None, &["a.example", "a.example"]).await),
        ("names and a subject", csr(Some(&subject), &["A.Example", "xn--mnchen-3ya.example"]).await),
        ("a name below a wildcard", csr(None, &["*.example", "a.example"]).await),
        ("a bad name", csr(None, &["a..example"]).await),
        ("a name in Unicode", csr(None, &["ü.example"]).await),
    ]
}

/// In seconds. The first is left to the server; the longest is cut.
const TTLS: [i32; 6] = [0, 1, 60, 7200, i32::MAX, -1];

async fn x509_minted(client: &mut SvidClient<Channel>, request: svids::MintX509svidRequest) -> String {
    match client.mint_x509svid(request).await {
        Ok(answer) => x509(answer.into_inner().svid.as_ref()).await,
        Err(status) => refusal(&status),
    }
}

async fn jwt_minted(client: &mut SvidClient<Channel>, request: svids::MintJwtsvidRequest) -> String {
    let answer = client.mint_jwtsvid(request).await;
    jwt(answer.map(|answer| answer.into_inner().svid.expect("an SVID")))
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
        answers.push((format!("{asked:?}"), x509_minted(&mut client, asked).await));
    }
    for (what, csr) in good_csrs().await {
        let ttls = if what == "plain" { &TTLS[..] } else { &TTLS[..1] };
        for ttl in ttls.iter().copied() {
            let asked = svids::MintX509svidRequest { csr: csr.clone().into(), ttl };
            answers.push((format!("minted for {ttl} s by a CSR: {what}"), x509_minted(&mut client, asked).await));
        }
    }
    for id in ids().into_iter().filter(|i| i.as_ref().is_none_or(|i| !i.path.ends_with("nobody"))) {
        let request = svids::MintJwtsvidRequest { id, audience: vec!["a".into()], ttl: 0 };
        answers.push((format!("{request:?}"), jwt_minted(&mut client, request).await));
    }
    for audience in [&["a", "b"][..], &["b", "a", "a"], &["spiffe://example.org/x", "ü", " "], &["a", ""]] {
        let audience = audience.iter().map(|a| (*a).to_owned()).collect();
        let request = svids::MintJwtsvidRequest { id: id("example.org", "/x"), audience, ttl: 0 };
        answers.push((format!("{request:?}"), jwt_minted(&mut client, request).await));
    }
    for ttl in TTLS {
        let request = svids::MintJwtsvidRequest { id: id("example.org", "/x"), audience: vec!["a".into()], ttl };
        answers.push((format!("{request:?}"), jwt_minted(&mut client, request).await));
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
