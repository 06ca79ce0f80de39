//! Bad and borderline requests, sent to the real SPIRE and to Finial: code, message and answer must be the same, word for
//! word. SPIRE is the expectation, so none is written down here.

use finial_core::{KeyType, SpiffeId, SystemClock};
use finial_crypto::tls::{ServerAuth, client_config};
use finial_crypto::{PrivateKey, create_csr};
use finial_net::client::{tls_channel, uds_channel};
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::{self as agents, attest_agent_request as attest};
use finial_proto::server::bundle as bundles;
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::entry::{self as entries, entry_client::EntryClient};
use finial_proto::server::logger::{SetLogLevelRequest, logger_client::LoggerClient};
use finial_proto::server::svid::{self as svids, svid_client::SvidClient};
use finial_proto::types::{self, EntryMask, Selector, SelectorMatch, Spiffeid};
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{self};
use std::fmt::Debug;
use std::sync::Arc;
use testkit::Flavor::{Finial, Spire};
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// What was asked and what was answered.
pub(crate) type Answers = Vec<(String, String)>;

pub(crate) fn show<T: Debug>(answer: Result<Response<T>, Status>) -> String {
    match answer {
        Ok(response) => format!("{:?}", response.into_inner()),
        Err(status) => format!("{:?}: {}", status.code(), status.message()),
    }
}

macro_rules! ask {
    ($answers:ident, $client:ident . $method:ident, $($request:expr),+ $(,)?) => {
        $({
            let request = $request;
            let what = format!("{} {request:?}", stringify!($method));
            $answers.push((what, show($client.$method(request).await)));
        })+
    };
}

pub(crate) use ask;

/// Panics with every question that was answered differently.
fn compare(theirs: Answers, ours: Answers) {
    assert_eq!(theirs.len(), ours.len());
    let mut differences = Vec::new();
    for ((what, theirs), (_, ours)) in theirs.iter().zip(&ours) {
        if plain(theirs) != plain(ours) {
            let what: String = what.chars().take(400).collect();
            differences.push(format!("{what}\n   SPIRE: {theirs}\n  Finial: {ours}"));
        }
    }
    let all = theirs.len();
    assert!(differences.is_empty(), "{} of {all} answers differ:\n{}", differences.len(), differences.join("\n"));
    assert!(all > 10, "hardly anything was asked");
}

/// An answer without what is meant to differ.
fn plain(answer: &str) -> String {
    // The words of Go's parsers, after SPIRE's own.
    for cause in [
        "malformed CSR: ",
        "failed to verify CSR signature: ",
        "X.509 authority: ",
        "JWT authority: ",
        "idna error",
        "failed to parse CSR: ",
        "unable to parse JWT token: ",
    ] {
        if let Some((before, after)) = answer.split_once(cause) {
            let rest = after.find("\" })").and_then(|end| after.get(end..)).unwrap_or_default();
            return format!("{before}{cause}{rest}");
        }
    }
    // SPIRE calls these faults of its own; they are the caller's.
    for fault in ["could not parse token '", "invalid JWT-SVID audience: cannot be empty"] {
        if answer.contains(fault) {
            let answer = answer.replace("datastore-sql: rpc error: code = InvalidArgument desc = ", "");
            return answer.replace("Internal", "InvalidArgument");
        }
    }
    answer.to_owned()
}

pub(crate) fn both<F: Future<Output = Answers>>(ask: impl Fn(Flavor) -> F) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let theirs = runtime.block_on(ask(Spire));
    let ours = runtime.block_on(ask(Finial));
    compare(theirs, ours);
}

fn id(trust_domain: &str, path: &str) -> Option<Spiffeid> {
    Some(Spiffeid { trust_domain: trust_domain.into(), path: path.into() })
}

fn selector(kind: &str, value: &str) -> Selector {
    Selector { r#type: kind.into(), value: value.into() }
}

/// IDs in every state of disrepair.
pub(crate) fn ids() -> Vec<Option<Spiffeid>> {
    vec![
        None,
        id("", ""),
        id("", "/x"),
        id("example.org", ""),
        id("example.org", "x"),
        id("example.org", "/"),
        id("example.org", "/x/"),
        id("example.org", "//x"),
        id("example.org", "/./x"),
        id("example.org", "/../x"),
        id("example.org", "/x y"),
        id("example.org", "/ü"),
        id("Example.org", "/x"),
        id("example.org:80", "/x"),
        id("spiffe://example.org", "/x"),
        id("other.org", "/x"),
        id("other.org", "/spire/agent/x"),
        id("example.org", "/spire"),
        id("example.org", "/spire/server"),
        id("example.org", "/spire/agent"),
        id("example.org", "/spire/agent/none"),
        id("example.org", "/nobody"),
    ]
}

fn good_entry(id_: &str) -> types::Entry {
    types::Entry {
        id: id_.into(),
        spiffe_id: id("example.org", &format!("/{id_}")),
        parent_id: id("example.org", "/parent"),
        selectors: vec![selector("a", "b")],
        ..Default::default()
    }
}

/// Good entries with one thing changed each. Not among them, as Finial means to answer otherwise: IDs of more than 2,048
/// bytes, DNS names with characters that no DNS name has (both refused), the same selector or DNS name twice (taken as one),
/// and DNS names out of order (kept as they were given).
fn odd_entries(prefix: &str) -> Vec<types::Entry> {
    let mut odd: Vec<types::Entry> = Vec::new();
    let base = |odd: &Vec<types::Entry>| good_entry(&format!("{prefix}{}", odd.len()));
    for spiffe_id in ids() {
        odd.push(types::Entry { spiffe_id, ..base(&odd) });
    }
    for parent_id in ids().into_iter().filter(|i| i.as_ref().is_none_or(|i| !i.path.ends_with("nobody"))) {
        odd.push(types::Entry { parent_id, ..base(&odd) });
    }
    for selectors in [
        vec![],
        vec![selector("", "x")],
        vec![selector("x", "")],
        vec![selector("x:y", "z")],
        vec![selector("x", "y:z")],
    ] {
        odd.push(types::Entry { selectors, ..base(&odd) });
    }
    for name in [
        "",
        " ",
        "a",
        "A.b",
        "a.b.",
        ".a",
        "a..b",
        "-a.b",
        "a-.b",
        "a_b.c",
        "*",
        "*.a",
        "a.*",
        "*.*.a",
        "*a.b",
        "1.2.3.4",
        "ü.b",
        "ab--c.d",
        &"a".repeat(63),
        &"a".repeat(64),
        &"a.".repeat(127),
        &("a.".repeat(126) + "a"),
    ] {
        odd.push(types::Entry { dns_names: vec![name.into()], ..base(&odd) });
    }
    for names in [&["*.b", "a.b"][..], &["*.b", "b"]] {
        odd.push(types::Entry { dns_names: names.iter().map(|n| (*n).into()).collect(), ..base(&odd) });
    }
    for ttl in [-1, i32::MIN, i32::MAX] {
        odd.push(types::Entry { x509_svid_ttl: ttl, ..base(&odd) });
        odd.push(types::Entry { jwt_svid_ttl: ttl, ..base(&odd) });
    }
    for name in ["", "no body", "nobody", "spiffe://nobody", "example.org", "spiffe://nobody/x"] {
        odd.push(types::Entry { federates_with: vec![name.into()], ..base(&odd) });
    }
    for hint in ["h".repeat(1024), "h".repeat(1025), "ü".repeat(513)] {
        odd.push(types::Entry { hint, ..base(&odd) });
    }
    for id_ in ["a b", "ü", "a/b", &"i".repeat(255), &"i".repeat(256)] {
        odd.push(types::Entry { id: id_.into(), ..base(&odd) });
    }
    for expires_at in [-1, 1, 253_402_300_800] {
        odd.push(types::Entry { expires_at, ..base(&odd) });
    }
    odd.push(types::Entry { revision_number: 7, created_at: 7, ..base(&odd) });
    odd
}

#[test]
fn entries() {
    both(async |flavor| {
        let server = Server::start(flavor, &ServerOptions::default());
        let mut client = EntryClient::new(uds_channel(server.socket()));
        let mut answers = Answers::new();
        let mask = EntryMask { created_at: false, ..all_of_entry() };
        let create = |entry| entries::BatchCreateEntryRequest { entries: vec![entry], output_mask: Some(mask) };
        for entry in odd_entries("c") {
            ask!(answers, client.batch_create_entry, create(entry));
        }
        let good = good_entry("good");
        ask!(
            answers,
            client.batch_create_entry,
            create(good.clone()),
            create(good.clone()),
            create(types::Entry { id: "other-id".into(), ..good.clone() }),
            create(types::Entry { spiffe_id: id("example.org", "/else"), ..good.clone() }),
            entries::BatchCreateEntryRequest::default(),
        );
        let update = |entry, input_mask| entries::BatchUpdateEntryRequest {
            entries: vec![entry],
            input_mask,
            output_mask: Some(mask),
        };
        for entry in odd_entries("u") {
            let entry = types::Entry { id: "good".into(), ..entry };
            ask!(answers, client.batch_update_entry, update(entry, None));
        }
        let only = |set: fn(&mut EntryMask)| {
            let mut mask = EntryMask::default();
            set(&mut mask);
            Some(mask)
        };
        for mask in [
            only(|_| ()),
            only(|m| m.spiffe_id = true),
            only(|m| m.parent_id = true),
            only(|m| m.selectors = true),
            only(|m| m.dns_names = true),
            only(|m| m.federates_with = true),
            only(|m| m.hint = true),
            only(|m| m.revision_number = true),
            only(|m| m.x509_svid_ttl = true),
            only(|m| m.store_svid = true),
            only(|m| m.additional_attributes = true),
        ] {
            ask!(
                answers,
                client.batch_update_entry,
                update(types::Entry { id: "good".into(), ..Default::default() }, mask)
            );
        }
        ask!(
            answers,
            client.batch_update_entry,
            update(types::Entry::default(), None),
            update(types::Entry { id: String::new(), ..good.clone() }, None),
            update(types::Entry { id: "none".into(), ..good.clone() }, None),
            update(types::Entry { store_svid: true, dns_names: vec!["x".into()], ..good.clone() }, None),
        );
        let ids = |ids: &[&str]| ids.iter().map(|i| (*i).to_owned()).collect();
        ask!(
            answers,
            client.get_entry,
            entries::GetEntryRequest::default(),
            get("none", None),
            get("good", Some(mask))
        );
        for filter in filters() {
            let list = |page_token: &str, page_size| entries::ListEntriesRequest {
                filter: Some(filter.clone()),
                output_mask: Some(EntryMask::default()),
                page_size,
                page_token: page_token.into(),
            };
            ask!(answers, client.list_entries, list("", 0));
            let f = filter.clone();
            let filter = entries::count_entries_request::Filter {
                by_spiffe_id: f.by_spiffe_id,
                by_parent_id: f.by_parent_id,
                by_selectors: f.by_selectors,
                by_federates_with: f.by_federates_with,
                by_hint: f.by_hint,
                by_downstream: f.by_downstream,
            };
            ask!(answers, client.count_entries, entries::CountEntriesRequest { filter: Some(filter) });
        }
        for (page_token, page_size) in
            [("x", 2), ("-1", 2), ("99999999", 2), ("99999999999999999999999", 2), ("", -1), ("x", 0)]
        {
            let page_token = page_token.to_owned();
            let request = entries::ListEntriesRequest {
                page_token,
                page_size,
                output_mask: Some(EntryMask::default()),
                filter: None,
            };
            ask!(answers, client.list_entries, request);
        }
        ask!(
            answers,
            client.batch_delete_entry,
            entries::BatchDeleteEntryRequest::default(),
            entries::BatchDeleteEntryRequest { ids: ids(&["", "none", "good", "good"]) },
        );
        ask!(answers, client.get_authorized_entries, entries::GetAuthorizedEntriesRequest::default());
        let none = tokio_stream::empty::<entries::SyncAuthorizedEntriesRequest>();
        answers.push(("sync".into(), show(client.sync_authorized_entries(none).await.map(|_| Response::new(())))));
        answers
    });
}

fn get(id: &str, output_mask: Option<EntryMask>) -> entries::GetEntryRequest {
    entries::GetEntryRequest { id: id.into(), output_mask }
}

fn all_of_entry() -> EntryMask {
    EntryMask {
        spiffe_id: true,
        parent_id: true,
        selectors: true,
        x509_svid_ttl: true,
        federates_with: true,
        admin: true,
        downstream: true,
        expires_at: true,
        dns_names: true,
        revision_number: true,
        store_svid: true,
        jwt_svid_ttl: true,
        hint: true,
        created_at: true,
        additional_attributes: true,
    }
}

fn filters() -> Vec<entries::list_entries_request::Filter> {
    use entries::list_entries_request::Filter;
    let mut filters = vec![Filter::default()];
    filters.extend(ids().into_iter().flatten().map(|i| Filter { by_spiffe_id: Some(i), ..Default::default() }));
    filters.extend(ids().into_iter().flatten().map(|i| Filter { by_parent_id: Some(i), ..Default::default() }));
    for r#match in [0, 1, 2, 3] {
        for selectors in [vec![], vec![selector("", "x")], vec![selector("a", "b")], vec![selector("a:b", "c")]] {
            let by_selectors = Some(SelectorMatch { selectors, r#match });
            filters.push(Filter { by_selectors, ..Default::default() });
        }
        for names in [&[][..], &["no td"], &["nobody"]] {
            let trust_domains = names.iter().map(|n| (*n).to_owned()).collect();
            let by_federates_with = Some(types::FederatesWithMatch { trust_domains, r#match });
            filters.push(Filter { by_federates_with, ..Default::default() });
        }
    }
    filters.push(Filter { by_hint: Some(String::new()), ..Default::default() });
    filters.push(Filter { by_hint: Some("h".into()), by_downstream: Some(true), ..Default::default() });
    filters
}

#[test]
fn agents_and_tokens() {
    both(async |flavor| {
        let server = Server::start(flavor, &ServerOptions::default());
        let mut client = AgentClient::new(uds_channel(server.socket()));
        let mut answers = Answers::new();
        for id in ids() {
            ask!(answers, client.get_agent, agents::GetAgentRequest { id: id.clone(), output_mask: None });
            ask!(answers, client.delete_agent, agents::DeleteAgentRequest { id: id.clone() });
            ask!(answers, client.ban_agent, agents::BanAgentRequest { id: id.clone() });
            if id.as_ref().is_some_and(|i| i.trust_domain == "other.org" || i.path.ends_with('/')) {
                let request = agents::CreateJoinTokenRequest { ttl: 60, token: "t".into(), agent_id: id };
                ask!(answers, client.create_join_token, request);
            }
        }
        let token = |ttl, token: &str| agents::CreateJoinTokenRequest { ttl, token: token.into(), agent_id: None };
        ask!(answers, client.create_join_token, token(0, "t"), token(-1, "t"), token(i32::MIN, ""),);
        for r#match in [0, 1, 2, 3] {
            for selectors in [vec![selector("", "x")], vec![selector("a", "b")], vec![selector("a:b", "c")]] {
                let by_selector_match = Some(SelectorMatch { selectors, r#match });
                let filter = agents::list_agents_request::Filter { by_selector_match, ..Default::default() };
                let request = agents::ListAgentsRequest { filter: Some(filter), ..Default::default() };
                ask!(answers, client.list_agents, request);
            }
        }
        let by_expires_before = "2000-01-01 15:04:05 -0700 -07".to_owned();
        let filter = agents::list_agents_request::Filter { by_expires_before, ..Default::default() };
        ask!(answers, client.list_agents, agents::ListAgentsRequest { filter: Some(filter), ..Default::default() });
        for (token, page_size) in [("x", 1), ("-1", 1), ("7", 1), ("", -1)] {
            let page_token = token.to_owned();
            ask!(
                answers,
                client.list_agents,
                agents::ListAgentsRequest { page_token, page_size, ..Default::default() }
            );
        }
        let params = Some(agents::AgentX509svidParams { csr: "x".into() });
        ask!(answers, client.renew_agent, agents::RenewAgentRequest { params });
        ask!(answers, client.post_status, agents::PostStatusRequest::default());
        ask!(answers, client.count_agents, agents::CountAgentsRequest::default());
        let mut logger = LoggerClient::new(uds_channel(server.socket()));
        for new_level in [0, 99, -1] {
            ask!(answers, logger.set_log_level, SetLogLevelRequest { new_level });
        }
        answers
    });
}

/// CSRs in every state of disrepair.
pub(crate) async fn csrs() -> Vec<Vec<u8>> {
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
    both(async |flavor| {
        let server = Server::start(flavor, &ServerOptions::default());
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
    });
}

#[test]
fn bundles() {
    both(async |flavor| {
        let server = Server::start(flavor, &ServerOptions::default());
        let mut client = BundleClient::new(uds_channel(server.socket()));
        let mut answers = Answers::new();
        let names =
            ["", "no td", "example.org", "spiffe://example.org", "nobody.org", "spiffe://nobody.org/x", "UP.org"];
        let certificate = |der: &'static [u8]| types::X509Certificate { asn1: der.into(), tainted: false };
        let key = |id: &str, der: &'static [u8]| types::JwtKey {
            key_id: id.into(),
            public_key: der.into(),
            ..Default::default()
        };
        for name in names {
            let trust_domain = name.to_owned();
            let output_mask = None;
            ask!(
                answers,
                client.get_federated_bundle,
                bundles::GetFederatedBundleRequest { trust_domain, output_mask }
            );
            let trust_domain = name.to_owned();
            for bundle in [
                types::Bundle { trust_domain: trust_domain.clone(), ..Default::default() },
                types::Bundle {
                    x509_authorities: vec![certificate(b"x")],
                    trust_domain: trust_domain.clone(),
                    ..Default::default()
                },
                types::Bundle {
                    jwt_authorities: vec![key("", b"x")],
                    trust_domain: trust_domain.clone(),
                    ..Default::default()
                },
            ] {
                let (b, m) = (vec![bundle], None::<types::BundleMask>);
                let create = bundles::BatchCreateFederatedBundleRequest { bundle: b.clone(), output_mask: m };
                ask!(answers, client.batch_create_federated_bundle, create);
                let set = bundles::BatchSetFederatedBundleRequest { bundle: b.clone(), output_mask: m };
                ask!(answers, client.batch_set_federated_bundle, set);
                let update = bundles::BatchUpdateFederatedBundleRequest { bundle: b, input_mask: None, output_mask: m };
                ask!(answers, client.batch_update_federated_bundle, update);
            }
            for mode in [0, 1, 2, 3] {
                let trust_domains = vec![name.to_owned(), name.to_owned()];
                let delete = bundles::BatchDeleteFederatedBundleRequest { trust_domains, mode };
                ask!(answers, client.batch_delete_federated_bundle, delete);
            }
        }
        let append = |x: Vec<types::X509Certificate>, j: Vec<types::JwtKey>| bundles::AppendBundleRequest {
            x509_authorities: x,
            jwt_authorities: j,
            ..Default::default()
        };
        ask!(
            answers,
            client.append_bundle,
            append(vec![], vec![]),
            append(vec![certificate(b"x")], vec![]),
            append(vec![], vec![key("k", b"x")]),
            append(vec![], vec![key("", b"x")]),
        );
        for (token, page_size) in [("x", 1), ("-1", 1), ("7", 1), ("", -1)] {
            let page_token = token.to_owned();
            let request = bundles::ListFederatedBundlesRequest { page_token, page_size, output_mask: None };
            ask!(answers, client.list_federated_bundles, request);
        }
        ask!(answers, client.publish_jwt_authority, bundles::PublishJwtAuthorityRequest::default());
        ask!(answers, client.count_bundles, bundles::CountBundlesRequest::default());
        answers
    });
}

/// Somebody without a certificate, on the TCP port.
fn stranger(server: &Server) -> Channel {
    let expected = SpiffeId::parse("spiffe://example.org/spire/server").expect("an ID");
    let config = client_config(None, ServerAuth::InsecureBootstrap { expected }, Arc::new(SystemClock)).expect("TLS");
    tls_channel(&format!("127.0.0.1:{}", server.port), Arc::new(config))
}

#[test]
fn strangers() {
    both(async |flavor| {
        let server = Server::start(flavor, &ServerOptions::default());
        let channel = stranger(&server);
        let mut client = AgentClient::new(channel.clone());
        let mut answers = Answers::new();
        let step = |step| agents::AttestAgentRequest { step };
        let params = |kind: Option<&str>, payload: &'static [u8], csr: Option<Vec<u8>>| {
            step(Some(attest::Step::Params(attest::Params {
                data: kind.map(|k| types::AttestationData { r#type: k.into(), payload: payload.into() }),
                params: csr.map(|c| agents::AgentX509svidParams { csr: c.into() }),
            })))
        };
        let csr = csrs().await;
        // SPIRE looks at the CSR after it has used the token up, Finial before: so all of these have a good one.
        let attempts = vec![
            step(None),
            step(Some(attest::Step::ChallengeResponse("x".into()))),
            params(None, b"", None),
            params(Some("join_token"), b"t", None),
            params(Some(""), b"t", csr.get(6).cloned()),
            params(Some("nonsense"), b"t", csr.get(6).cloned()),
            params(Some("join_token"), b"", csr.get(6).cloned()),
            params(Some("join_token"), b"no such token", csr.get(6).cloned()),
        ];
        for attempt in attempts {
            let what = format!("{attempt:?}");
            let answer = match client.attest_agent(tokio_stream::once(attempt)).await {
                Ok(stream) => show(stream.into_inner().message().await.map(Response::new)),
                Err(status) => show::<()>(Err(status)),
            };
            answers.push((what, answer));
        }
        let empty = client.attest_agent(tokio_stream::empty::<agents::AttestAgentRequest>()).await;
        let empty = match empty {
            Ok(stream) => show(stream.into_inner().message().await.map(Response::new)),
            Err(status) => show::<()>(Err(status)),
        };
        answers.push(("nothing at all".into(), empty));

        // What strangers may not do.
        ask!(answers, client.list_agents, agents::ListAgentsRequest::default());
        ask!(answers, client.create_join_token, agents::CreateJoinTokenRequest::default());
        ask!(answers, client.renew_agent, agents::RenewAgentRequest::default());
        ask!(answers, client.post_status, agents::PostStatusRequest::default());
        let mut entry = EntryClient::new(channel.clone());
        ask!(answers, entry.list_entries, entries::ListEntriesRequest::default());
        ask!(answers, entry.get_authorized_entries, entries::GetAuthorizedEntriesRequest::default());
        let mut svid = SvidClient::new(channel.clone());
        ask!(answers, svid.mint_x509svid, svids::MintX509svidRequest::default());
        ask!(answers, svid.batch_new_x509svid, svids::BatchNewX509svidRequest::default());
        ask!(answers, svid.new_jwtsvid, svids::NewJwtsvidRequest::default());
        let mut bundle = BundleClient::new(channel.clone());
        ask!(answers, bundle.append_bundle, bundles::AppendBundleRequest::default());
        ask!(answers, bundle.get_federated_bundle, bundles::GetFederatedBundleRequest::default());
        let got = bundle.get_bundle(bundles::GetBundleRequest::default()).await;
        answers.push(("anyone may have the bundle".into(), got.is_ok().to_string()));
        // On the local socket only; the words are gRPC's own.
        let mut logger = LoggerClient::new(channel);
        let refused = logger.set_log_level(SetLogLevelRequest { new_level: 6 }).await.map_err(|s| s.code());
        answers.push(("the log level".into(), format!("{:?}", refused.err())));
        answers
    });
}

fn with_header<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", "true".parse().expect("a value"));
    request
}

#[test]
fn workload_api() {
    both(async |flavor| {
        let server = Server::start(flavor, &ServerOptions::default());
        server.entry("/workload", &[]);
        let agent = Agent::serving(flavor, &server, &AgentOptions::default());
        let mut client = SpiffeWorkloadApiClient::new(uds_channel(agent.socket()));
        let mut answers = Answers::new();
        // Without the header, or with a wrong one, nobody gets anything.
        for header in [None, Some("false"), Some("TRUE"), Some("")] {
            let mut request =
                Request::new(workload::JwtsvidRequest { audience: vec!["a".into()], ..Default::default() });
            if let Some(value) = header {
                request.metadata_mut().insert("workload.spiffe.io", value.parse().expect("a value"));
            }
            answers.push((
                format!("header {header:?}"),
                show(client.fetch_jwtsvid(request).await.map(|_| Response::new(()))),
            ));
        }
        let bare = client.fetch_x509svid(workload::X509svidRequest {}).await;
        answers.push(("x509 without header".into(), show(first(bare).await)));
        for (spiffe_id, audience) in [
            ("", &[][..]),
            ("", &[""]),
            ("x", &["a"]),
            ("spiffe://example.org/other", &["a"]),
            ("spiffe://other.org/x", &["a"]),
            ("spiffe://example.org", &["a"]),
        ] {
            let audience = audience.iter().map(|a| (*a).to_owned()).collect();
            let request = workload::JwtsvidRequest { audience, spiffe_id: spiffe_id.into() };
            let what = format!("{request:?}");
            let answer = client.fetch_jwtsvid(with_header(request)).await;
            answers.push((what, show(answer.map(|_| Response::new(())))));
        }
        let granted = workload::JwtsvidRequest { audience: vec!["a".into()], spiffe_id: String::new() };
        let granted = client.fetch_jwtsvid(with_header(granted)).await.expect("a JWT-SVID").into_inner();
        let good = granted.svids.first().expect("one").svid.clone();
        let cut = format!("{}.AAAA", good.rsplit_once('.').expect("a signature").0);
        // Claims made up, signature gone, no algorithm.
        let none = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy94In0.";
        let hs256 =
            "eyJhbGciOiJIUzI1NiIsImtpZCI6IngifQ.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy94IiwiYXVkIjpbImEiXX0.AAAA";
        let unknown_kid = "eyJhbGciOiJFUzI1NiIsImtpZCI6IngiLCJ0eXAiOiJKV1QifQ.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy94IiwiYXVkIjpbImEiXSwiZXhwIjo0MDAwMDAwMDAwfQ.AAAA";
        for (audience, svid) in [
            ("", good.as_str()),
            ("a", ""),
            ("wrong", &good),
            ("a", &cut),
            ("a", "garbage"),
            ("a", "a.b"),
            ("a", "a.b.c"),
            ("a", none),
            ("a", hs256),
            ("a", unknown_kid),
        ] {
            let request = workload::ValidateJwtsvidRequest { audience: audience.into(), svid: svid.into() };
            let answer = show(client.validate_jwtsvid(with_header(request)).await.map(|_| Response::new(())));
            answers.push((format!("validate for {audience:?}: {}", svid.get(..20).unwrap_or(svid)), answer));
        }
        answers
    });
}

/// The first message of a stream, without what is in it.
async fn first<T>(answer: Result<Response<tonic::Streaming<T>>, Status>) -> Result<Response<()>, Status> {
    answer?.into_inner().message().await.map(|_| Response::new(()))
}
