//! The Delegated Identity API of the real SPIRE agent and of ours: the same questions, the same answers.

use crate::answers::{Answers, both, show};
use finial_net::client::uds_channel;
use finial_proto::agent::delegatedidentity::delegated_identity_client::DelegatedIdentityClient;
use finial_proto::agent::delegatedidentity::*;
use finial_proto::types::Selector;
use std::time::Duration;
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, Workdir, eventually};
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

const DEADLINE: Duration = Duration::from_secs(30);

fn selectors(all: &[(&str, &str)]) -> Vec<Selector> {
    all.iter().map(|(kind, value)| Selector { r#type: (*kind).into(), value: (*value).into() }).collect()
}

async fn next<T>(stream: Result<Response<Streaming<T>>, Status>) -> Result<T, Status> {
    let message = tokio::time::timeout(DEADLINE, async { stream?.into_inner().message().await });
    message.await.expect("an answer in time").map(|m| m.expect("no end without a status"))
}

/// What can be compared of X.509-SVIDs.
fn svids(answer: Result<SubscribeToX509sviDsResponse, Status>) -> String {
    let text = answer.map(|answer| {
        let svid = |svid: &X509svidWithKey| {
            let x509 = svid.x509_svid.as_ref().expect("an SVID");
            let leaf = finial_crypto::Certificate::parse(x509.cert_chain[0].as_ref()).expect("a certificate");
            let key = finial_crypto::PrivateKey::from_pkcs8(&svid.x509_svid_key).expect("a key");
            let fits = finial_crypto::Signer::public_key(&key).spki_der().as_ref() == leaf.spki_der();
            let in_time = leaf.not_after() == x509.expires_at;
            format!("{:?} {:?} {} {fits} {in_time}", x509.id, x509.hint, x509.cert_chain.len())
        };
        let all: Vec<String> = answer.x509_svids.iter().map(svid).collect();
        Response::new((all, answer.federates_with))
    });
    show(text)
}

fn tokens(answer: Result<Response<FetchJwtsviDsResponse>, Status>) -> String {
    let token = |t: &finial_proto::types::Jwtsvid| {
        (t.id.clone(), t.hint.clone(), t.expires_at - t.issued_at, t.token.split('.').count())
    };
    show(answer.map(|a| Response::new(a.into_inner().svids.iter().map(token).collect::<Vec<_>>())))
}

struct Rig {
    server: Server,
    _agent: Agent,
    _sockets: Workdir,
    client: DelegatedIdentityClient<Channel>,
}

impl Rig {
    fn start(flavor: Flavor) -> Self {
        let server = match flavor {
            Flavor::Spire => "experimental { cache_reload_interval = \"1s\" }",
            Flavor::Finial => "",
        };
        let server = Server::start(flavor, &ServerOptions { server: server.into(), ..Default::default() });
        let sockets = Workdir::new();
        let admin = sockets.path().join("admin/api.sock");
        let more = format!(
            "admin_socket_path = \"{}\"\n authorized_delegates = [\"spiffe://example.org/delegate\"]",
            admin.display()
        );
        let mut agent = Agent::start(flavor, &server, &AgentOptions { agent: more, ..Default::default() });
        eventually("the admin socket is there", || match agent.process.ended() {
            Some(code) => panic!("the agent ended with {code}:\n{}", agent.process.log()),
            None if admin.exists() => Ok(()),
            None => Err("no socket".to_owned()),
        });
        let client = DelegatedIdentityClient::new(uds_channel(admin));
        Self { server, _agent: agent, _sockets: sockets, client }
    }
}

async fn by_selectors(client: &mut DelegatedIdentityClient<Channel>, all: &[(&str, &str)]) -> String {
    let request = SubscribeToX509sviDsRequest { selectors: selectors(all), pid: 0 };
    svids(next(client.subscribe_to_x509svi_ds(request).await).await)
}

/// Asks until it is not refused with `text` any more.
async fn until_not(client: &mut DelegatedIdentityClient<Channel>, text: &str) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        let answer = next(client.subscribe_to_x509_bundles(SubscribeToX509BundlesRequest {}).await).await;
        if answer.as_ref().err().is_none_or(|status| status.message() != text) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "still {text}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// All calls, with good questions.
async fn all(client: &mut DelegatedIdentityClient<Channel>, answers: &mut Answers, when: &str) {
    let own = i32::try_from(std::process::id()).expect("a pid");
    let mut note = |what: &str, answer: String| answers.push((format!("{what} {when}"), answer));
    note("by selectors", by_selectors(client, &[("a", "b"), ("c", "d"), ("e", "f")]).await);
    note("by fewer selectors", by_selectors(client, &[("a", "b")]).await);
    note("by selectors that nobody has", by_selectors(client, &[("x", "y")]).await);
    let by_pid = SubscribeToX509sviDsRequest { selectors: Vec::new(), pid: own };
    note("by own pid", svids(next(client.subscribe_to_x509svi_ds(by_pid).await).await));
    for (what, pid) in [("no process", i32::MAX), ("negative", -1)] {
        let request = SubscribeToX509sviDsRequest { selectors: Vec::new(), pid };
        note(what, svids(next(client.subscribe_to_x509svi_ds(request).await).await));
    }
    for (pid, given) in [(0, &[][..]), (1, &[("a", "b")]), (-1, &[("a", "b")]), (0, &[("", "b")]), (0, &[("a:b", "c")])]
    {
        let request = SubscribeToX509sviDsRequest { selectors: selectors(given), pid };
        note(&format!("{request:?}"), svids(next(client.subscribe_to_x509svi_ds(request).await).await));
        for audience in [&[][..], &["a"]] {
            let audience = audience.iter().map(|a| (*a).to_owned()).collect();
            let request = FetchJwtsviDsRequest { audience, selectors: selectors(given), pid };
            note(&format!("{request:?}"), tokens(client.fetch_jwtsvi_ds(request).await));
        }
    }
    for (selectors, pid) in [
        (selectors(&[("a", "b"), ("c", "d"), ("e", "f")]), 0),
        (selectors(&[("x", "y")]), 0),
        (Vec::new(), own),
        (Vec::new(), i32::MAX),
    ] {
        let request = FetchJwtsviDsRequest { audience: vec!["a".into(), "b".into()], selectors, pid };
        let what = format!("{:?} own: {}", request.selectors, pid == own);
        note(&what, tokens(client.fetch_jwtsvi_ds(request).await));
    }
    let x509 = next(client.subscribe_to_x509_bundles(SubscribeToX509BundlesRequest {}).await).await;
    let lengths = |bundles: std::collections::BTreeMap<String, _>| bundles.into_keys().collect::<Vec<_>>();
    note("X.509 bundles", show(x509.map(|b| Response::new(lengths(b.ca_certificates)))));
    let jwt = next(client.subscribe_to_jwt_bundles(SubscribeToJwtBundlesRequest {}).await).await;
    let keys = |jwks: &[u8]| {
        let jwks: serde_json::Value = serde_json::from_slice(jwks).expect("JSON");
        let key = |key: &serde_json::Value| key.as_object().expect("a key").keys().cloned().collect::<Vec<_>>();
        jwks["keys"].as_array().expect("keys").iter().map(key).collect::<Vec<_>>()
    };
    let jwt = jwt.map(|b| Response::new(b.bundles.iter().map(|(id, b)| (id.clone(), keys(b))).collect::<Vec<_>>()));
    note("JWT bundles", show(jwt));
}

#[test]
fn delegated_identity() {
    both(async |flavor| {
        let Rig { server, mut client, _agent, _sockets } = Rig::start(flavor);
        let mut answers = Answers::new();
        all(&mut client, &mut answers, "without an entry").await;
        server.entry("/other", &["-entryID", "other"]);
        until_not(&mut client, "no identity issued").await;
        all(&mut client, &mut answers, "as somebody else").await;
        let bundle = server.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
        let file = server.dir.write("other.json", &bundle);
        let path = file.to_str().expect("a path");
        server.command(&["bundle", "set", "-id", "spiffe://other.org", "-format", "spiffe", "-path", path]).ok();
        for (name, more) in [
            ("one", &["-selector", "a:b", "-hint", "same"][..]),
            ("two", &["-selector", "a:b", "-selector", "c:d", "-hint", "same", "-federatesWith", "spiffe://other.org"]),
            ("three", &["-selector", "a:b", "-admin"]),
            ("four", &["-selector", "c:d", "-downstream"]),
        ] {
            server.entry(&format!("/{name}"), &[&["-entryID", name], more].concat());
        }
        server.entry("/delegate", &["-entryID", "delegate"]);
        until_not(&mut client, "caller not configured as an authorized delegate").await;
        all(&mut client, &mut answers, "as a delegate").await;
        let given = |(what, answer): &(String, String)| what == "by selectors as a delegate" && answer.contains("two");
        assert!(answers.iter().any(given), "nothing was given to a delegate");
        // A stream goes on as long as its caller is a delegate.
        let request = SubscribeToX509sviDsRequest { selectors: selectors(&[("a", "b")]), pid: 0 };
        let mut stream = client.subscribe_to_x509svi_ds(request).await.expect("a stream").into_inner();
        let first = stream.message().await.map(|m| m.expect("a message"));
        answers.push(("first".into(), svids(first)));
        server.command(&["entry", "delete", "-entryID", "delegate"]).ok();
        // SPIRE tells it with the next change of what was asked for.
        server.command(&["entry", "delete", "-entryID", "one"]).ok();
        let ended = tokio::time::timeout(DEADLINE, async {
            loop {
                match stream.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return "ended".to_owned(),
                    Err(status) => return format!("{:?}: {}", status.code(), status.message()),
                }
            }
        });
        answers.push(("no delegate any more".into(), ended.await.expect("an end in time")));
        answers
    });
}
