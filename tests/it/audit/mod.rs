//! The audit log: the same calls at the real SPIRE and at Finial leave the same lines, field for field and, in JSON, type
//! for type.

mod network;

use crate::answers::{KEY, stranger, workload};
use finial_core::SpiffeId;
use finial_crypto::{create_csr, pem};
use finial_net::client::uds_channel;
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::{self as agents};
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::bundle::{self as bundles};
use finial_proto::server::debug::GetInfoRequest;
use finial_proto::server::debug::debug_client::DebugClient;
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::server::entry::{self as entries};
use finial_proto::server::localauthority::local_authority_client::LocalAuthorityClient;
use finial_proto::server::localauthority::{self as local};
use finial_proto::server::logger::logger_client::LoggerClient;
use finial_proto::server::logger::{GetLoggerRequest, ResetLogLevelRequest, SetLogLevelRequest};
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::server::svid::{self as svids};
use finial_proto::server::trustdomain::trust_domain_client::TrustDomainClient;
use finial_proto::server::trustdomain::{self as domains};
use finial_proto::types::federation_relationship::BundleEndpointProfile as Profile;
use finial_proto::types::{self, BundleMask, FederationRelationship, FederationRelationshipMask};
use finial_proto::types::{Selector, SelectorMatch, Spiffeid};
use network::{agent, outsider};
use serde_json::Value;
use testkit::Flavor::{Finial, Spire};
use testkit::{Flavor, Server, ServerOptions, Workdir, eventually, free_port};
use tonic::transport::Channel;

fn id(path: &str) -> Option<Spiffeid> {
    Some(Spiffeid { trust_domain: "example.org".into(), path: path.into() })
}

fn selector() -> Selector {
    Selector { r#type: "unix".into(), value: "uid:1".into() }
}

async fn entries(server: &Server) {
    let mut client = EntryClient::new(uds_channel(server.socket()));
    let full = types::Entry {
        id: "full".into(),
        spiffe_id: id("/full"),
        parent_id: id("/parent"),
        selectors: vec![selector(), Selector { r#type: "unix".into(), value: "gid:1".into() }],
        x509_svid_ttl: 60,
        jwt_svid_ttl: 30,
        federates_with: vec!["other.test".into()],
        admin: true,
        downstream: true,
        expires_at: 4_000_000_000,
        dns_names: vec!["a.test".into(), "b.test".into()],
        hint: "5".into(),
        ..Default::default()
    };
    let plain = types::Entry {
        id: "plain".into(),
        spiffe_id: id("/plain"),
        parent_id: id("/parent"),
        selectors: vec![selector()],
        ..Default::default()
    };
    let create = vec![full.clone(), plain.clone(), plain.clone(), types::Entry::default()];
    let _ = client.batch_create_entry(entries::BatchCreateEntryRequest { entries: create, output_mask: None }).await;
    let mask = types::EntryMask { hint: true, x509_svid_ttl: true, admin: true, ..Default::default() };
    for (entry, input_mask) in [(full.clone(), Some(mask)), (plain, None), (types::Entry::default(), None)] {
        let request = entries::BatchUpdateEntryRequest { entries: vec![entry], input_mask, output_mask: None };
        let _ = client.batch_update_entry(request).await;
    }
    for id in ["full", "none", ""] {
        let _ = client.get_entry(entries::GetEntryRequest { id: id.into(), output_mask: None }).await;
    }
    let by_selectors = Some(SelectorMatch { selectors: vec![selector()], r#match: 1 });
    let by_federates_with = Some(types::FederatesWithMatch { trust_domains: vec!["other.test".into()], r#match: 2 });
    let filter = entries::list_entries_request::Filter {
        by_spiffe_id: id("/full"),
        by_parent_id: id("/parent"),
        by_selectors,
        by_federates_with,
        by_hint: Some("h".into()),
        ..Default::default()
    };
    for filter in [None, Some(filter)] {
        let _ = client.list_entries(entries::ListEntriesRequest { filter, ..Default::default() }).await;
    }
    let _ = client.count_entries(entries::CountEntriesRequest::default()).await;
    let ids = vec!["plain".into(), "none".into(), String::new()];
    let _ = client.batch_delete_entry(entries::BatchDeleteEntryRequest { ids }).await;
}

async fn agents(server: &Server) {
    let mut client = AgentClient::new(uds_channel(server.socket()));
    let token = |ttl, agent_id| agents::CreateJoinTokenRequest { ttl, token: "1234-token".into(), agent_id };
    for request in [token(60, id("/token")), token(0, None), token(60, id("bad"))] {
        let _ = client.create_join_token(request).await;
    }
    for agent in [id("/spire/agent/join_token/none"), id("/x"), None] {
        let _ = client.get_agent(agents::GetAgentRequest { id: agent.clone(), output_mask: None }).await;
        let _ = client.ban_agent(agents::BanAgentRequest { id: agent.clone() }).await;
        let _ = client.delete_agent(agents::DeleteAgentRequest { id: agent }).await;
    }
    let by_selector_match = Some(SelectorMatch { selectors: vec![selector()], r#match: 0 });
    let filter = agents::list_agents_request::Filter {
        by_banned: Some(false),
        by_can_reattest: Some(true),
        by_attestation_type: "join_token".into(),
        by_selector_match,
        ..Default::default()
    };
    for filter in [None, Some(filter)] {
        let _ = client.list_agents(agents::ListAgentsRequest { filter, ..Default::default() }).await;
    }
    let _ = client.count_agents(agents::CountAgentsRequest::default()).await;
}

async fn others(server: &Server, elsewhere: &Other) {
    let mut client = BundleClient::new(uds_channel(server.socket()));
    let _ = client.get_bundle(bundles::GetBundleRequest::default()).await;
    let _ = client.count_bundles(bundles::CountBundlesRequest::default()).await;
    let other = |refresh_hint| types::Bundle {
        trust_domain: "other.test".into(),
        refresh_hint,
        sequence_number: 3,
        ..Default::default()
    };
    for hint in [60, 61] {
        let bundle = vec![other(hint)];
        let _ = client
            .batch_set_federated_bundle(bundles::BatchSetFederatedBundleRequest { bundle, output_mask: None })
            .await;
    }
    for trust_domain in ["other.test", "none.test", ""] {
        let trust_domain = trust_domain.to_owned();
        let _ =
            client.get_federated_bundle(bundles::GetFederatedBundleRequest { trust_domain, output_mask: None }).await;
    }
    entries(server).await;
    foreign(&mut client, &elsewhere.root).await;
    let trust_domains = vec!["other.test".into(), "none.test".into()];
    for mode in [0, 2] {
        let trust_domains = trust_domains.clone();
        let _ = client
            .batch_delete_federated_bundle(bundles::BatchDeleteFederatedBundleRequest { trust_domains, mode })
            .await;
    }
    let mut client = SvidClient::new(uds_channel(server.socket()));
    for audience in [vec!["a".into(), "b".into()], vec![]] {
        let _ = client.mint_jwtsvid(svids::MintJwtsvidRequest { id: id("/minted"), audience, ttl: 60 }).await;
    }
    let _ = client.mint_x509svid(svids::MintX509svidRequest { csr: "x".into(), ttl: 5 }).await;
    minted(server).await;
    let mut client = LoggerClient::new(uds_channel(server.socket()));
    let _ = client.get_logger(GetLoggerRequest {}).await;
    // Of calls beside a level that is too high nothing is told.
    for new_level in [5, 0, 99, -1, 4] {
        let _ = client.set_log_level(SetLogLevelRequest { new_level }).await;
    }
    let _ = client.get_logger(GetLoggerRequest {}).await;
    let _ = client.reset_log_level(ResetLogLevelRequest {}).await;
    let _ = DebugClient::new(uds_channel(server.socket())).get_info(GetInfoRequest {}).await.expect("granted");
}

/// Additions to the own bundle, and bundles of others: granted, and refused in part.
async fn foreign(client: &mut BundleClient<Channel>, other_root: &[u8]) {
    let root = |asn1: &[u8]| types::X509Certificate { asn1: asn1.to_vec().into(), tainted: false };
    let key = |key_id: &str| types::JwtKey {
        public_key: KEY.public_key().spki_der().to_vec().into(),
        key_id: key_id.into(),
        expires_at: 4_000_000_000,
        tainted: false,
    };
    let both = (vec![root(other_root)], vec![key("k"), key("l")]);
    for (x509_authorities, jwt_authorities) in
        [both.clone(), (vec![], vec![]), (vec![root(b"x")], vec![]), (vec![], vec![key("")])]
    {
        let request = bundles::AppendBundleRequest { x509_authorities, jwt_authorities, ..Default::default() };
        let _ = client.append_bundle(request).await;
    }
    let bundle = |trust_domain: &str| types::Bundle {
        trust_domain: trust_domain.into(),
        x509_authorities: both.0.clone(),
        jwt_authorities: both.1.clone(),
        refresh_hint: 60,
        sequence_number: 3,
        ..Default::default()
    };
    let bad = types::Bundle { x509_authorities: vec![root(b"x")], ..bundle("bad.test") };
    let all: Vec<_> =
        ["new.test", "new.test", "example.org", "no td", ""].map(bundle).into_iter().chain([bad]).collect();
    let request = bundles::BatchCreateFederatedBundleRequest { bundle: all.clone(), output_mask: None };
    let _ = client.batch_create_federated_bundle(request).await;
    let hint = BundleMask { refresh_hint: true, ..Default::default() };
    let keys = BundleMask { jwt_authorities: true, x509_authorities: true, ..Default::default() };
    for input_mask in [None, Some(hint), Some(keys), Some(BundleMask::default())] {
        let bundle = [&all[..], &[bundle("none.test")]].concat();
        let request = bundles::BatchUpdateFederatedBundleRequest { bundle, input_mask, output_mask: None };
        let _ = client.batch_update_federated_bundle(request).await;
    }
    let request = bundles::BatchSetFederatedBundleRequest { bundle: all, output_mask: None };
    let _ = client.batch_set_federated_bundle(request).await;
    for (page_size, page_token) in [(0, ""), (1, ""), (-1, "")] {
        let page_token = page_token.to_owned();
        let request = bundles::ListFederatedBundlesRequest { output_mask: None, page_size, page_token };
        let _ = client.list_federated_bundles(request).await;
    }
    let trust_domains = ["new.test", "new.test", "example.org", "no td", ""].map(str::to_owned).to_vec();
    let request = bundles::BatchDeleteFederatedBundleRequest { trust_domains, mode: 1 };
    let _ = client.batch_delete_federated_bundle(request).await;
}

/// What is minted on the machine.
async fn minted(server: &Server) {
    let mut client = SvidClient::new(uds_channel(server.socket()));
    let id_ = SpiffeId::parse("spiffe://example.org/minted").expect("an ID");
    for names in [&[][..], &["a.test".to_owned(), "b.test".to_owned()]] {
        let csr = create_csr(&*KEY, None, Some(&id_), names).await.expect("a CSR").into();
        let granted = client.mint_x509svid(svids::MintX509svidRequest { csr, ttl: 60 }).await;
        granted.expect("it is granted");
    }
    let key = KEY.public_key().spki_der().to_vec();
    for (path, public_key, algorithm, ttl) in [
        ("/minted", &key[..], "ES256", 60),
        ("/minted", &key, "ES256", 0),
        ("/minted", &key, "none", 60),
        ("/minted", b"x", "ES256", 60),
        ("bad", &key, "ES256", 60),
    ] {
        let request = svids::MintWitsvidRequest {
            id: id(path),
            public_key: public_key.to_vec().into(),
            ttl,
            signing_algorithm: algorithm.into(),
        };
        let answer = client.mint_witsvid(request).await;
        assert_eq!(answer.is_ok(), path == "/minted" && public_key == key && algorithm == "ES256", "{answer:?}");
    }
}

/// Relationships and refreshes, asked by an administrator on the local socket.
async fn relationships(server: &Server, elsewhere: &Other) {
    let mut client = TrustDomainClient::new(uds_channel(server.socket()));
    let of = |name: &str, url: &str| FederationRelationship {
        trust_domain: name.into(),
        bundle_endpoint_url: url.into(),
        bundle_endpoint_profile: Some(Profile::HttpsSpiffe(types::HttpsspiffeProfile {
            endpoint_spiffe_id: format!("spiffe://{name}/endpoint"),
        })),
        trust_domain_bundle: None,
    };
    let bundle = types::Bundle { trust_domain: "r.test".into(), refresh_hint: 60, ..Default::default() };
    let with_bundle =
        FederationRelationship { trust_domain_bundle: Some(bundle), ..of("r.test", "https://127.0.0.1:1/") };
    let web = FederationRelationship {
        bundle_endpoint_profile: Some(Profile::HttpsWeb(types::HttpsWebProfile {})),
        ..of("w.test", "https://127.0.0.1:1/")
    };
    let all = vec![with_bundle, web, of("r.test", "https://x/"), of("s.test", "http://x/"), of("", "https://x/")];
    let request =
        domains::BatchCreateFederationRelationshipRequest { federation_relationships: all.clone(), output_mask: None };
    let _ = client.batch_create_federation_relationship(request).await;
    let urls = FederationRelationshipMask { bundle_endpoint_url: true, ..Default::default() };
    for input_mask in [None, Some(urls), Some(FederationRelationshipMask::default())] {
        let federation_relationships = [&all[..1], &[of("none.test", "https://x/")]].concat();
        let request = domains::BatchUpdateFederationRelationshipRequest {
            federation_relationships,
            input_mask,
            output_mask: None,
        };
        let _ = client.batch_update_federation_relationship(request).await;
    }
    for trust_domain in ["r.test", "none.test", "", "no td"] {
        let trust_domain = trust_domain.to_owned();
        let request = domains::GetFederationRelationshipRequest { trust_domain, output_mask: None };
        let _ = client.get_federation_relationship(request).await;
    }
    for (page_size, page_token) in [(0, ""), (1, ""), (-1, "")] {
        let page_token = page_token.to_owned();
        let request = domains::ListFederationRelationshipsRequest { output_mask: None, page_size, page_token };
        let _ = client.list_federation_relationships(request).await;
    }
    let socket = elsewhere.server.socket();
    let bundle = BundleClient::new(uds_channel(socket)).get_bundle(bundles::GetBundleRequest::default()).await;
    let fetched = FederationRelationship {
        trust_domain_bundle: Some(bundle.expect("its bundle").into_inner()),
        bundle_endpoint_profile: Some(Profile::HttpsSpiffe(types::HttpsspiffeProfile {
            endpoint_spiffe_id: "spiffe://fetched.test/spire/server".into(),
        })),
        ..of("fetched.test", &elsewhere.url)
    };
    let request = domains::BatchCreateFederationRelationshipRequest {
        federation_relationships: vec![fetched],
        output_mask: None,
    };
    let _ = client.batch_create_federation_relationship(request).await;
    let fetched = domains::RefreshBundleRequest { trust_domain: "fetched.test".into() };
    client.refresh_bundle(fetched).await.expect("it is refreshed");
    for trust_domain in ["none.test", "no td", "r.test"] {
        let _ = client.refresh_bundle(domains::RefreshBundleRequest { trust_domain: trust_domain.into() }).await;
    }
    let trust_domains = ["r.test", "w.test", "fetched.test", "none.test", ""].map(str::to_owned).to_vec();
    let _ = client
        .batch_delete_federation_relationship(domains::BatchDeleteFederationRelationshipRequest { trust_domains })
        .await;
}

/// A rotation by hand, with steps that are refused.
async fn authorities(server: &Server) {
    let mut client = LocalAuthorityClient::new(uds_channel(server.socket()));
    let _ = client.get_x509_authority_state(local::GetX509AuthorityStateRequest {}).await;
    let prepared = client.prepare_x509_authority(local::PrepareX509AuthorityRequest {}).await;
    let prepared = prepared.expect("it is prepared").into_inner().prepared_authority.expect("one").authority_id;
    let state = client.get_x509_authority_state(local::GetX509AuthorityStateRequest {}).await;
    let active = state.expect("a state").into_inner().active.expect("one").authority_id;
    for authority_id in [String::new(), "unknown".into(), active.clone(), prepared] {
        let taint = local::TaintX509AuthorityRequest { authority_id: authority_id.clone() };
        let _ = client.taint_x509_authority(taint).await;
        let revoke = local::RevokeX509AuthorityRequest { authority_id: authority_id.clone() };
        let _ = client.revoke_x509_authority(revoke).await;
        let _ = client.activate_x509_authority(local::ActivateX509AuthorityRequest { authority_id }).await;
    }
    let _ = client.taint_x509_authority(local::TaintX509AuthorityRequest { authority_id: active.clone() }).await;
    let _ = client.revoke_x509_authority(local::RevokeX509AuthorityRequest { authority_id: active }).await;
    for subject_key_id in ["", "00AA"] {
        let subject_key_id = subject_key_id.to_owned();
        let taint = local::TaintX509UpstreamAuthorityRequest { subject_key_id: subject_key_id.clone() };
        let _ = client.taint_x509_upstream_authority(taint).await;
        let revoke = local::RevokeX509UpstreamAuthorityRequest { subject_key_id };
        let _ = client.revoke_x509_upstream_authority(revoke).await;
    }

    let _ = client.get_jwt_authority_state(local::GetJwtAuthorityStateRequest {}).await;
    let prepared = client.prepare_jwt_authority(local::PrepareJwtAuthorityRequest {}).await;
    let prepared = prepared.expect("it is prepared").into_inner().prepared_authority.expect("one").authority_id;
    let state = client.get_jwt_authority_state(local::GetJwtAuthorityStateRequest {}).await;
    let active = state.expect("a state").into_inner().active.expect("one").authority_id;
    for authority_id in [String::new(), "unknown".into(), active.clone(), prepared, active] {
        let taint = local::TaintJwtAuthorityRequest { authority_id: authority_id.clone() };
        let _ = client.taint_jwt_authority(taint).await;
        let revoke = local::RevokeJwtAuthorityRequest { authority_id: authority_id.clone() };
        let _ = client.revoke_jwt_authority(revoke).await;
        let _ = client.activate_jwt_authority(local::ActivateJwtAuthorityRequest { authority_id }).await;
    }
}

async fn everybody(server: &Server, elsewhere: &Other) {
    others(server, elsewhere).await;
    agents(server).await;
    relationships(server, elsewhere).await;
    authorities(server).await;
    let mut client = EntryClient::new(uds_channel(server.socket()));
    let entry = |name: &str, admin, downstream| types::Entry {
        id: name.into(),
        spiffe_id: id(&format!("/{name}")),
        parent_id: id("/parent"),
        selectors: vec![selector()],
        admin,
        downstream,
        ..Default::default()
    };
    let entries = vec![entry("admin", true, false), entry("downstream", false, true)];
    let _ = client.batch_create_entry(entries::BatchCreateEntryRequest { entries, output_mask: None }).await;
    outsider(&stranger(server)).await;
    for path in ["/workload", "/admin", "/downstream"] {
        outsider(&workload(server, path).await).await;
    }
    agent(server).await;
}

/// The last call that is made; nothing else deletes this.
fn is_last(line: &Value) -> bool {
    line["entry_id"] == "last" || line["registration_id"] == "last"
}

/// The audit lines, and what is told of calls that are denied, in order, without what differs from run to run.
fn lines(flavor: Flavor, elsewhere: &Other) -> Vec<Value> {
    // The calls that publish and rotate WIT authorities are left out: SPIRE has them not (Unimplemented).
    let server = "audit_log_enabled = true\n log_format = \"JSON\"\n \
                  experimental { cache_reload_interval = \"1s\" feature_flags = [\"wit-svid\"] }";
    let server = Server::start(flavor, &ServerOptions { server: server.into(), ..Default::default() });
    let before = server.process.log().len();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(everybody(&server, elsewhere));
    runtime.block_on(async {
        let request = entries::GetEntryRequest { id: "last".into(), output_mask: None };
        let _ = EntryClient::new(uds_channel(server.socket())).get_entry(request).await;
    });
    let all = eventually("the last call is told", || {
        let log = server.process.log();
        // The last line may still be on its way.
        let whole = log[before..].rsplit_once('\n').map_or("", |(whole, _)| whole);
        let all: Vec<Value> = whole.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        if all.iter().any(|line| is_audit(line) && is_last(line)) {
            Ok(all)
        } else {
            Err(format!("{} lines", all.len()))
        }
    });
    let denied: Vec<&Value> = all
        .iter()
        .filter(|line| line["msg"] == "Failed to authenticate caller")
        .map(|line| &line["request_id"])
        .collect();
    // The health checks of commands come in any order.
    let told = |line: &&Value| line["method"] != "Check" && is_audit(line);
    let of_denial = |line: &&Value| line["level"] == "error" && denied.contains(&&line["request_id"]);
    let mut lines: Vec<Value> = all.iter().filter(|line| told(line) || of_denial(line)).map(plain).collect();
    // How often was asked until it was so is chance.
    let waited = |line: &Value| line["method"] == "GetAuthorizedEntries" && line["level"] == "info";
    lines.dedup_by(|line, before| waited(line) && line == before);
    lines
}

fn is_audit(line: &Value) -> bool {
    line["msg"] == "API accessed"
}

/// With the types of values that differ from run to run in their place.
fn plain(line: &Value) -> Value {
    let mut line = line.clone();
    // The words of Go's parser, after SPIRE's own.
    for words in [
        "malformed CSR: ",
        "failed to parse CSR: ",
        "X.509 authority: ",
        "invalid public key: ",
        "malformed public key: ",
        "failed to refresh bundle: ",
    ] {
        if let Some((known, _)) = line["status_message"].as_str().and_then(|said| said.split_once(words)) {
            line["status_message"] = format!("{known}{words}").into();
        }
    }
    // A structure of Go's in SPIRE's JSON.
    if line.get("subject").is_some() {
        line["subject"] = "a name".into();
    }
    for (name, value) in line.as_object_mut().unwrap() {
        let varies = matches!(
            name.as_str(),
            "time"
                | "request_id"
                | "caller_path"
                | "caller_addr"
                | "agent_id"
                | "created_at"
                | "csr"
                | "expires_at"
                | "local_authority_id"
                | "serial_number"
                | "x509_authorities_asn1_sha256"
        );
        if varies {
            *value = match &*value {
                Value::String(_) => "a text".into(),
                Value::Number(_) => "a number".into(),
                other => other.to_string().into(),
            };
        }
    }
    line
}

/// Another trust domain, whose bundle is fetched.
struct Other {
    server: Server,
    url: String,
    /// A root of somebody's.
    root: Vec<u8>,
}

impl Other {
    fn start() -> Self {
        let port = free_port();
        let endpoint = format!(
            "federation {{ bundle_endpoint {{ address = \"127.0.0.1\" port = {port} profile \"https_spiffe\" {{}} }} }}"
        );
        let options = ServerOptions { trust_domain: "fetched.test".into(), server: endpoint, ..Default::default() };
        let folder = Workdir::new();
        crate::forced_rotation::root(folder.path(), "other");
        let text = std::fs::read(folder.path().join("root.pem")).expect("written");
        let root = pem::certificates(&text).expect("a certificate")[0].to_vec();
        Self { server: Server::start(Finial, &options), url: format!("https://127.0.0.1:{port}/"), root }
    }
}

#[test]
fn the_same_calls_leave_the_same_audit_lines() {
    let elsewhere = Other::start();
    let (theirs, ours) = (lines(Spire, &elsewhere), lines(Finial, &elsewhere));
    let mut differences = Vec::new();
    for (number, theirs) in theirs.iter().enumerate() {
        match ours.get(number) {
            Some(ours) if ours == theirs => {}
            ours => differences.push(format!(" SPIRE: {theirs}\nFinial: {}", ours.unwrap_or(&Value::Null))),
        }
    }
    assert!(differences.is_empty(), "{} lines differ:\n{}", differences.len(), differences.join("\n"));
    assert_eq!(theirs.len(), ours.len());
    let denied = theirs.iter().filter(|line| line["msg"] == "Failed to authenticate caller").count();
    assert!(theirs.len() > 150 && denied > 20, "only {} lines, {denied} of denials", theirs.len());
}
