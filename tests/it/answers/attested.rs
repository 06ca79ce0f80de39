//! What an agent that has attested is answered: entries, SVIDs, tokens, bundles, its own renewal; and what it is refused.

use super::joined::{Joined, KEY, csr, tls, until};
use super::{Answers, ask, csrs, id, of_servers, refusal, selector, show};
use crate::answers_trust::{shape, whole};
use finial_core::{Clock, SystemClock};
use finial_crypto::Certificate;
use finial_net::client::uds_channel;
use finial_proto::server::agent::{self as agents, agent_client::AgentClient};
use finial_proto::server::bundle::{self as bundles, bundle_client::BundleClient};
use finial_proto::server::entry::{self as entries, entry_client::EntryClient};
use finial_proto::server::svid::{self as svids, svid_client::SvidClient};
use finial_proto::types::{self, BundleMask, Entry, EntryMask};
use std::io::Write;
use std::process::{Command, Stdio};
use testkit::{Server, ServerOptions};
use tonic::{Status, Streaming};

/// With WIT-SVIDs, and with SPIRE's memory following the datastore as closely as it can.
pub(super) fn options() -> ServerOptions {
    const SERVER: &str = "experimental { cache_reload_interval = \"1s\" feature_flags = [\"wit-svid\"] \
                          wit_issuer = \"urn:example\" }";
    ServerOptions { server: SERVER.into(), ..ServerOptions::default() }
}

#[test]
fn an_attested_agent() {
    of_servers(&options(), asked);
}

#[test]
fn an_agent_with_more_entries_than_a_page() {
    of_servers(&options(), many);
}

fn everything() -> entries::GetAuthorizedEntriesRequest {
    entries::GetAuthorizedEntriesRequest::default()
}

fn entry(id_: &str, parent: &types::Spiffeid) -> Entry {
    Entry {
        id: id_.into(),
        spiffe_id: id("example.org", &format!("/{id_}")),
        parent_id: Some(parent.clone()),
        selectors: vec![selector("unix", "uid:1")],
        ..Entry::default()
    }
}

/// What an agent may see in all its forms.
fn wanted(agent: &types::Spiffeid) -> Vec<Entry> {
    let base = |id: &str| entry(id, agent);
    let both = types::entry::AdditionalAttributes { disable_x509_svid_prefetch: true, jwt_svid_include_jti: true };
    vec![
        Entry {
            selectors: vec![selector("unix", "uid:1"), selector("k8s", "ns:a:b")],
            x509_svid_ttl: 120,
            jwt_svid_ttl: 60,
            federates_with: vec!["other.org".into()],
            expires_at: 4_000_000_000,
            dns_names: vec!["a.example.org".into(), "*.b.example.org".into()],
            hint: "a hint".into(),
            additional_attributes: Some(both),
            ..base("full")
        },
        base("plain"),
        Entry { admin: true, ..base("admin") },
        Entry { downstream: true, ..base("downstream") },
        Entry { store_svid: true, ..base("stored") },
        Entry { x509_svid_ttl: i32::MAX, jwt_svid_ttl: i32::MAX, ..base("long") },
        Entry { x509_svid_ttl: 1, jwt_svid_ttl: 1, ..base("short") },
        Entry { spiffe_id: id("example.org", "/plain"), selectors: vec![selector("a", "b")], ..base("twin") },
        entry("below", &id("example.org", "/plain").expect("an ID")),
        entry("deep", &id("example.org", "/below").expect("an ID")),
    ]
}

async fn create(server: &Server, all: Vec<Entry>) {
    let mut client = EntryClient::new(uds_channel(server.socket()));
    let request = entries::BatchCreateEntryRequest { entries: all, output_mask: None };
    let results = client.batch_create_entry(request).await.expect("results").into_inner().results;
    for result in results {
        assert_eq!(result.status.as_ref().map(|s| s.code), Some(0), "{result:?}");
    }
}

async fn federate(server: &Server) {
    let public_key = KEY.public_key().spki_der().to_vec().into();
    let jwt = types::JwtKey { public_key, key_id: "k".into(), expires_at: 4_000_000_000, tainted: false };
    let bundle = types::Bundle {
        trust_domain: "other.org".into(),
        jwt_authorities: vec![jwt],
        refresh_hint: 60,
        sequence_number: 7,
        ..Default::default()
    };
    let request = bundles::BatchCreateFederatedBundleRequest { bundle: vec![bundle], output_mask: None };
    BundleClient::new(uds_channel(server.socket())).batch_create_federated_bundle(request).await.expect("a bundle");
}

/// With what no two servers have in common out of it, by ID.
fn plain(mut all: Vec<Entry>) -> String {
    for entry in &mut all {
        entry.created_at = i64::from(entry.created_at > 0);
        // A set: SPIRE keeps an order, Finial has its own.
        entry.selectors.sort_by(|a, b| (&a.r#type, &a.value).cmp(&(&b.r#type, &b.value)));
    }
    all.sort_by(|a, b| (&a.id, &a.hint).cmp(&(&b.id, &b.hint)));
    all.iter().map(|entry| format!("{entry:?}\n")).collect()
}

pub(super) async fn asked(server: &Server) -> Answers {
    federate(server).await;
    let (one, two) = (Joined::new(server, "one").await, Joined::new(server, "two").await);
    let all = wanted(&one.id);
    let count = all.len();
    create(server, all).await;
    create(server, vec![entry("of-two", &two.id)]).await;
    until("the agent sees its entries", async || {
        let seen = EntryClient::new(one.channel.clone()).get_authorized_entries(everything()).await;
        let seen = seen.map_err(|status| refusal(&status))?.into_inner().entries.len();
        if seen == count { Ok(()) } else { Err(format!("{seen} of {count}")) }
    })
    .await;
    let mut answers = Answers::new();
    let attested = (one.result.reattestable, x509(Some(&one.svid)).await);
    answers.push(("attesting".into(), format!("{attested:?}")));
    seen(&one, &mut answers).await;
    synced(&one, &mut answers).await;
    certificates(&one, &mut answers).await;
    tokens(&one, &mut answers).await;
    wit_tokens(&one, &mut answers).await;
    federated(&one, &mut answers).await;
    status_posted(server, &one, &mut answers).await;
    renewed(server, one, &mut answers).await;
    ends(server, two, &mut answers).await;
    answers
}

/// Nothing, all, and each field alone.
fn entry_masks() -> Vec<Option<EntryMask>> {
    let mut masks = vec![None, Some(EntryMask::default())];
    let fields: [fn(&mut EntryMask) -> &mut bool; 15] = [
        |m| &mut m.spiffe_id,
        |m| &mut m.parent_id,
        |m| &mut m.selectors,
        |m| &mut m.x509_svid_ttl,
        |m| &mut m.federates_with,
        |m| &mut m.admin,
        |m| &mut m.downstream,
        |m| &mut m.expires_at,
        |m| &mut m.dns_names,
        |m| &mut m.revision_number,
        |m| &mut m.store_svid,
        |m| &mut m.jwt_svid_ttl,
        |m| &mut m.hint,
        |m| &mut m.created_at,
        |m| &mut m.additional_attributes,
    ];
    masks.extend(fields.map(|field| {
        let mut mask = EntryMask::default();
        *field(&mut mask) = true;
        Some(mask)
    }));
    masks
}

async fn seen(agent: &Joined, answers: &mut Answers) {
    let mut client = EntryClient::new(agent.channel.clone());
    for output_mask in entry_masks() {
        let seen = client.get_authorized_entries(entries::GetAuthorizedEntriesRequest { output_mask }).await;
        let seen = seen.map(|seen| plain(seen.into_inner().entries)).unwrap_or_else(|status| refusal(&status));
        answers.push((format!("what it sees by {output_mask:?}"), seen));
    }
}

/// All that is answered to these requests, one after the other on one stream.
async fn sync(agent: &Joined, requests: Vec<entries::SyncAuthorizedEntriesRequest>) -> Vec<String> {
    let mut client = EntryClient::new(agent.channel.clone());
    let answers = client.sync_authorized_entries(tokio_stream::iter(requests)).await;
    let mut answers: Streaming<_> = match answers {
        Ok(answers) => answers.into_inner(),
        Err(status) => return vec![refusal(&status)],
    };
    let mut all = Vec::new();
    loop {
        match answers.message().await {
            Ok(Some(entries::SyncAuthorizedEntriesResponse { entries, entry_revisions, more })) => {
                let mut revisions: Vec<_> = entry_revisions.iter().map(|r| (&r.id, r.revision_number)).collect();
                revisions.sort();
                assert!(entry_revisions.iter().all(|r| r.created_at > 0));
                all.push(format!("{}{} revisions, more {more}", plain(entries), revisions.len()));
            }
            Ok(None) => return all,
            Err(status) => return [all, vec![refusal(&status)]].concat(),
        }
    }
}

fn sync_request(ids: &[&str], output_mask: Option<EntryMask>) -> entries::SyncAuthorizedEntriesRequest {
    entries::SyncAuthorizedEntriesRequest { ids: ids.iter().map(|id| (*id).to_owned()).collect(), output_mask }
}

async fn synced(agent: &Joined, answers: &mut Answers) {
    let mut requests = vec![vec![], vec![sync_request(&["full"], None)]];
    requests.extend(entry_masks().into_iter().map(|mask| vec![sync_request(&[], mask)]));
    let revisions = EntryMask { revision_number: true, hint: true, ..EntryMask::default() };
    requests.push(vec![sync_request(&[], Some(revisions)), sync_request(&["full"], None)]);
    for requests in requests {
        answers.push((format!("sync {requests:?}"), sync(agent, requests).await.join("\n")));
    }
}

async fn many(server: &Server) -> Answers {
    let agent = Joined::new(server, "agent").await;
    let count = 1_003;
    let all: Vec<Entry> = (0..count).map(|n| entry(&format!("w{n:04}"), &agent.id)).collect();
    let ids: Vec<String> = all.iter().map(|entry| entry.id.clone()).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    for some in all.chunks(100) {
        create(server, some.to_vec()).await;
    }
    until("the agent sees its entries", async || {
        let seen = EntryClient::new(agent.channel.clone()).get_authorized_entries(everything()).await;
        let seen = seen.map_err(|status| refusal(&status))?.into_inner().entries.len();
        if seen == count { Ok(()) } else { Err(format!("{seen} of {count}")) }
    })
    .await;
    let mask = EntryMask { revision_number: true, spiffe_id: true, ..EntryMask::default() };
    let mut backwards: Vec<&str> = ids.iter().take(501).rev().copied().collect();
    backwards.extend(["none", ""]);
    let mut answers = Answers::new();
    for requests in [
        vec![sync_request(&[], None)],
        vec![sync_request(&[], Some(mask)), sync_request(&["w0007", "w0001"], Some(EntryMask::default()))],
        vec![sync_request(&[], Some(mask)), sync_request(&backwards, None), sync_request(&["none"], None)],
        vec![sync_request(&[], Some(mask)), sync_request(&[], None), sync_request(&ids[..500], None)],
        vec![sync_request(&[], Some(mask)), sync_request(&ids, None), sync_request(&["w0003"], None)],
    ] {
        let what = format!("sync of {:?}", requests.iter().map(|r| r.ids.len()).collect::<Vec<_>>());
        let pages = sync(&agent, requests).await;
        answers.push((format!("{what}: how many answers"), pages.len().to_string()));
        answers.extend(pages.into_iter().enumerate().map(|(n, page)| (format!("{what}: answer {n}"), page)));
    }
    answers
}

/// An SVID as openssl reads it, without what differs from one to the next.
pub(super) async fn x509(svid: Option<&types::X509svid>) -> String {
    let Some(svid) = svid else { return "no SVID".into() };
    let leaf = Certificate::parse(&*svid.cert_chain[0]).expect("a certificate");
    assert_eq!(svid.expires_at, leaf.not_after());
    let life = whole(leaf.not_after() - leaf.not_before());
    let length = leaf.serial().len();
    assert!((15..=20).contains(&length), "a serial number of {length} bytes");
    let mut openssl = Command::new("openssl")
        .args(["x509", "-inform", "DER", "-noout", "-text", "-certopt", "no_serial,no_validity,no_sigdump"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("openssl");
    openssl.stdin.take().expect("piped").write_all(&svid.cert_chain[0]).expect("openssl reads");
    let text = openssl.wait_with_output().expect("openssl").stdout;
    let text = String::from_utf8(text).expect("text");
    let mut lines: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
    for line in &mut lines {
        // Of the authority, whose key is each server's own.
        if let Some((before, _)) = line.split_once("serialNumber = ") {
            *line = format!("{before}serialNumber");
        }
    }
    if let Some(at) = lines.iter().position(|line| line.contains("Authority Key Identifier")) {
        lines[at + 1] = format!("{} characters", lines[at + 1].len());
    }
    format!("{:?}, {life} s, {} certificates: {}", svid.id, svid.cert_chain.len(), lines.join(" | "))
}

/// What Go's parsers say comes after SPIRE's own words.
fn words(status: Option<types::Status>) -> String {
    let Some(status) = status else { return "no status".into() };
    let known = ["malformed CSR: ", "invalid CSR signature: ", "malformed public key: ", "failed to parse CSR: "];
    let cut = known.iter().find_map(|known| status.message.split_once(known).map(|(b, _)| format!("{b}{known}")));
    format!("{} {}", status.code, cut.unwrap_or(status.message))
}

async fn certificates(agent: &Joined, answers: &mut Answers) {
    let mut client = SvidClient::new(agent.channel.clone());
    ask!(answers, client.batch_new_x509svid, svids::BatchNewX509svidRequest::default());
    let mut params = Vec::new();
    let new =
        |entry_id: &str, csr: &[u8]| svids::NewX509svidParams { entry_id: entry_id.into(), csr: csr.to_vec().into() };
    let good = csr(None).await;
    for name in ["full", "plain", "admin", "downstream", "stored", "long", "short", "twin", "below", "deep", "plain"] {
        params.push(new(name, &good));
    }
    for name in ["", "none", "of-two", "FULL", "full "] {
        params.push(new(name, &good));
    }
    // Whatever the CSR says of a name, the entry decides.
    params.push(new("plain", &csr(Some("spiffe://example.org/else")).await));
    params.push(new("plain", &csr(Some("spiffe://other.org/x")).await));
    params.extend(csrs().await.iter().map(|csr| new("full", csr)));
    params.push(new("", b""));
    params.push(new("none", b"garbage"));
    let answer = client.batch_new_x509svid(svids::BatchNewX509svidRequest { params: params.clone() }).await;
    let results = answer.expect("results").into_inner().results;
    assert_eq!(results.len(), params.len());
    for (n, (asked, result)) in params.iter().zip(results).enumerate() {
        // By other keys than ours: the key is not compared.
        let svid = result.svid.as_ref().filter(|_| asked.csr == good);
        let what = format!("SVID {n}, for {:?}", asked.entry_id);
        let granted = result.svid.is_some();
        answers.push((what, format!("{granted} {} {}", words(result.status), x509(svid).await)));
    }
}

async fn tokens(agent: &Joined, answers: &mut Answers) {
    let mut client = SvidClient::new(agent.channel.clone());
    let many: Vec<String> = (0..50).map(|n| format!("audience-{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for (entry_id, audience) in [
        ("full", &["a"][..]),
        ("full", &["a", "b"]),
        ("full", &["b", "a", "a"]),
        ("full", &["spiffe://example.org/x", "ü", " "]),
        ("full", &many),
        ("plain", &["a"]),
        ("admin", &["a"]),
        ("stored", &["a"]),
        ("long", &["a"]),
        ("short", &["a"]),
        ("deep", &["a"]),
        ("full", &[]),
        ("full", &[""]),
        ("full", &["a", ""]),
        ("", &["a"]),
        ("none", &["a"]),
        ("none", &[]),
        ("of-two", &["a"]),
    ] {
        let audience = audience.iter().map(|a| (*a).to_owned()).collect();
        let request = svids::NewJwtsvidRequest { entry_id: entry_id.into(), audience };
        let what = format!("{request:?}");
        let answer = client.new_jwtsvid(request).await;
        answers.push((what, jwt(answer.map(|answer| answer.into_inner().svid.expect("an SVID")))));
    }
}

/// What was issued, without its times and its signature, or why not.
pub(super) fn jwt(answer: Result<types::Jwtsvid, Status>) -> String {
    match answer {
        Ok(svid) => {
            let now = SystemClock.now();
            assert!((now - 60..=now).contains(&svid.issued_at), "{svid:?}");
            let life = whole(svid.expires_at - svid.issued_at);
            format!("{} {:?} {life} {:?}", token(&svid.token), svid.id, svid.hint)
        }
        Err(status) => refusal(&status),
    }
}

/// The inside of a token; the length of an ID by chance stands for it.
pub(super) fn token(text: &str) -> String {
    let text = shape(text);
    match text.split_once("\"jti\":\"") {
        Some((before, rest)) => {
            let (id, after) = rest.split_once('"').expect("the end of the ID");
            format!("{before}\"jti\":\"{} characters\"{after}", id.len())
        }
        None => text,
    }
}

async fn wit_tokens(agent: &Joined, answers: &mut Answers) {
    let mut client = SvidClient::new(agent.channel.clone());
    ask!(answers, client.batch_new_witsvid, svids::BatchNewWitsvidRequest::default());
    let key = KEY.public_key().spki_der().to_vec();
    let mut params = Vec::new();
    let new = |entry_id: &str, public_key: &[u8], algorithm: &str| svids::NewWitsvidParams {
        entry_id: entry_id.into(),
        public_key: public_key.to_vec().into(),
        signing_algorithm: algorithm.into(),
    };
    for name in ["full", "plain", "admin", "stored", "long", "deep", "", "none", "of-two"] {
        params.push(new(name, &key, "ES256"));
    }
    for algorithm in ["", "none", "ES384", "RS256", "HS256"] {
        params.push(new("full", &key, algorithm));
    }
    for garbage in [&b""[..], b"x", &key[..40]] {
        params.push(new("full", garbage, "ES256"));
    }
    let answer = client.batch_new_witsvid(svids::BatchNewWitsvidRequest { params: params.clone() }).await;
    let results = match answer {
        Ok(answer) => answer.into_inner().results,
        Err(status) => return answers.push(("WIT-SVIDs".into(), refusal(&status))),
    };
    assert_eq!(results.len(), params.len());
    for (asked, result) in params.iter().zip(results) {
        let svid = result.svid.as_ref();
        let said = svid.map(|s| format!("{} {:?} {}", token(&s.token), s.id, whole(s.expires_at - s.issued_at)));
        // SPIRE gives no status with an SVID.
        let status = if svid.is_some() { "granted".into() } else { words(result.status) };
        answers.push((format!("{asked:?}"), format!("{status} {said:?}")));
    }
}

fn bundle_masks() -> Vec<Option<BundleMask>> {
    let none = BundleMask::default();
    vec![
        None,
        Some(none),
        Some(BundleMask { x509_authorities: true, ..none }),
        Some(BundleMask { jwt_authorities: true, ..none }),
        Some(BundleMask { refresh_hint: true, ..none }),
        Some(BundleMask { sequence_number: true, ..none }),
    ]
}

async fn federated(agent: &Joined, answers: &mut Answers) {
    let mut client = BundleClient::new(agent.channel.clone());
    for output_mask in bundle_masks() {
        for name in ["other.org", "spiffe://other.org", "spiffe://other.org/x", "none.org", "example.org", "", "no td"]
        {
            let trust_domain = name.to_owned();
            ask!(
                answers,
                client.get_federated_bundle,
                bundles::GetFederatedBundleRequest { trust_domain, output_mask }
            );
        }
    }
    for request in [
        bundles::GetBundleRequest { output_mask: Some(BundleMask::default()) },
        bundles::GetBundleRequest { output_mask: Some(BundleMask { refresh_hint: true, ..BundleMask::default() }) },
    ] {
        ask!(answers, client.get_bundle, request);
    }
}

/// An agent as the server lists it, without what differs from one to the next.
async fn listed(server: &Server, id: &types::Spiffeid) -> (types::Agent, String) {
    let mut client = AgentClient::new(uds_channel(server.socket()));
    let request = agents::GetAgentRequest { id: Some(id.clone()), output_mask: None };
    let agent = client.get_agent(request).await.expect("the agent").into_inner();
    let serial = agent.x509svid_serial_number.clone();
    let life = agent.x509svid_expires_at - SystemClock.now();
    let plain = types::Agent {
        x509svid_serial_number: serial.bytes().all(|c| c.is_ascii_digit()).to_string(),
        x509svid_expires_at: (life + 120) / 300,
        ..agent
    };
    (plain, serial)
}

async fn status_posted(server: &Server, agent: &Joined, answers: &mut Answers) {
    let mut client = AgentClient::new(agent.channel.clone());
    for version in ["1.15.3", "", &"v".repeat(255), &"v".repeat(256), "ü\n"] {
        let request = agents::PostStatusRequest { agent_version: version.into(), ..Default::default() };
        ask!(answers, client.post_status, request);
        answers.push(("and then".into(), format!("{:?}", listed(server, &agent.id).await.0)));
    }
}

/// What is asked of a connection that may be refused.
async fn asks(agent: &Joined) -> String {
    let mut client = EntryClient::new(agent.channel.clone());
    let answer = client.get_authorized_entries(entries::GetAuthorizedEntriesRequest::default()).await;
    // The serial numbers differ.
    answer.map(|answer| format!("{} entries", answer.into_inner().entries.len())).unwrap_or_else(|s| refusal(&s))
}

/// The first answer that is no longer the one before.
async fn refused(agent: &Joined) -> String {
    until("the agent is refused", async || {
        let answer = asks(agent).await;
        if answer.ends_with("entries") { Err(answer) } else { Ok(answer) }
    })
    .await
}

async fn renewed(server: &Server, agent: Joined, answers: &mut Answers) {
    let mut client = AgentClient::new(agent.channel.clone());
    let renew =
        |csr: Vec<u8>| agents::RenewAgentRequest { params: Some(agents::AgentX509svidParams { csr: csr.into() }) };
    ask!(answers, client.renew_agent, agents::RenewAgentRequest { params: None }, renew(Vec::new()));
    let garbage = client.renew_agent(renew(b"garbage".to_vec())).await.expect_err("garbage");
    let garbage = types::Status { code: garbage.code() as i32, message: garbage.message().to_owned() };
    answers.push(("renewal by garbage".into(), words(Some(garbage))));
    let before = listed(server, &agent.id).await;
    // Whatever ID the CSR has.
    for name in [None, Some("spiffe://example.org/else")] {
        let answer = client.renew_agent(renew(csr(name).await)).await;
        let answer = match &answer {
            Ok(answer) => x509(answer.get_ref().svid.as_ref()).await,
            Err(status) => refusal(status),
        };
        answers.push((format!("renewal by {name:?}"), answer));
    }
    let svid = client.renew_agent(renew(csr(None).await)).await.expect("a renewal").into_inner().svid;
    let svid = svid.expect("an SVID");
    answers.push(("listed with its first".into(), (listed(server, &agent.id).await == before).to_string()));
    answers.push(("the first until the new one is used".into(), asks(&agent).await));
    let channel = tls(server, &svid);
    let next = Joined { channel, svid, id: agent.id.clone(), result: agent.result.clone() };
    answers.push(("the new one".into(), asks(&next).await));
    let (now, serial) = listed(server, &next.id).await;
    answers.push(("listed".into(), format!("{now:?}")));
    let leaf = Certificate::parse(&*next.svid.cert_chain[0]).expect("a certificate");
    assert_eq!(serial, leaf.serial_decimal());
    answers.push(("the first afterwards".into(), refused(&agent).await));
    for service in [
        show(client.renew_agent(renew(Vec::new())).await),
        show(client.post_status(agents::PostStatusRequest::default()).await),
    ] {
        answers.push(("the first afterwards".into(), service));
    }
    banned(server, next, answers).await;
}

async fn banned(server: &Server, agent: Joined, answers: &mut Answers) {
    let mut local = AgentClient::new(uds_channel(server.socket()));
    let id = Some(agent.id.clone());
    ask!(answers, local.ban_agent, agents::BanAgentRequest { id: id.clone() }, agents::BanAgentRequest { id });
    answers.push(("banned".into(), refused(&agent).await));
    answers.push(("banned".into(), listed(server, &agent.id).await.0.banned.to_string()));
    let mut client = AgentClient::new(agent.channel.clone());
    ask!(answers, client.post_status, agents::PostStatusRequest::default());
    // What anybody may have, it may, too.
    let bundle = BundleClient::new(agent.channel.clone()).get_bundle(bundles::GetBundleRequest::default()).await;
    answers.push(("the bundle".into(), bundle.map(drop).map_err(|status| refusal(&status)).err().unwrap_or_default()));
}

async fn ends(server: &Server, agent: Joined, answers: &mut Answers) {
    answers.push(("the other agent".into(), asks(&agent).await));
    let mut local = AgentClient::new(uds_channel(server.socket()));
    let id = Some(agent.id.clone());
    ask!(answers, local.delete_agent, agents::DeleteAgentRequest { id: id.clone() }, agents::DeleteAgentRequest { id });
    answers.push(("evicted".into(), refused(&agent).await));
}
