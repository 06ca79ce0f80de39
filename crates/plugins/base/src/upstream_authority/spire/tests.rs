use super::*;
use fake::{Above, TRUST_DOMAIN};
use finial_core::{KeyType, SystemClock, TrustDomain, X509Authority};
use finial_crypto::{DistinguishedName, PrivateKey, create_ca_csr};
use finial_plugin::conformance::UpstreamAuthorityFixture;
use finial_proto::convert::bundle_to_proto;

#[path = "fake.rs"]
mod fake;

fn context(trust_domain: &str) -> PluginContext {
    PluginContext { trust_domain: TrustDomain::parse(trust_domain).unwrap(), clock: Arc::new(SystemClock) }
}

fn data(above: &Above, more: &str) -> Value {
    let (port, socket) = (above.port(), above.socket());
    let text = format!(
        "server_address = \"127.0.0.1\" server_port = {port} workload_api_socket = \"{}\" {more}",
        socket.display()
    );
    finial_hcl::parse(&text).unwrap()
}

fn below(above: &Above) -> Spire {
    Spire::new(&data(above, ""), &context(TRUST_DOMAIN)).unwrap()
}

async fn mint(spire: &Spire) -> Result<MintedX509Ca, PluginError> {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let csr = create_ca_csr(&key, &DistinguishedName::ca_default(), &spire.link.trust_domain).await.unwrap();
    spire.mint_x509_ca(&csr, 600).await
}

async fn refusal(spire: &Spire) -> String {
    mint(spire).await.unwrap_err().to_string()
}

finial_plugin::upstream_authority_conformance!({
    let above: &'static Above = Box::leak(Box::new(Above::start().await));
    UpstreamAuthorityFixture {
        upstream: Arc::new(below(above)),
        trust_domain: TrustDomain::parse(TRUST_DOMAIN).unwrap(),
        now: above.now(),
    }
});

#[test]
fn what_is_missing_in_the_configuration_is_named() {
    let refused = |text: &str| {
        let data = finial_hcl::parse(text).unwrap();
        Spire::new(&data, &context(TRUST_DOMAIN)).err().unwrap().to_string()
    };
    assert_eq!(refused(""), "server_address is required; server_port is required; workload_api_socket is required");
    let port = r#"server_address = "a" server_port = "x" workload_api_socket = "/s""#;
    assert_eq!(refused(port), "server_port \"x\" is not the number of a port");
    assert_eq!(refused(r#"server_address = "a" server_port = 8081"#), "workload_api_socket is required");
    let pipe = r#"server_address = "a" server_port = 1 experimental { workload_api_named_pipe_name = "x" }"#;
    assert!(refused(pipe).contains("please use workload_api_socket instead"));
}

#[tokio::test]
async fn what_it_says_is_told_once_and_older_answers_are_not() {
    let above = Above::start().await;
    let spire = below(&above);
    let first = spire.next_authorities().await.unwrap();
    assert_eq!((first.x509.len(), first.jwt.len()), (1, 0));
    let bundle = |sequence_number, tainted| Bundle {
        x509_authorities: vec![X509Authority { tainted, ..first.x509[0].clone() }],
        sequence_number,
        ..Bundle::empty(TrustDomain::parse(TRUST_DOMAIN).unwrap())
    };
    assert_eq!(spire.news(bundle(7, true)).unwrap().x509, bundle(7, true).x509_authorities);
    assert_eq!(spire.news(bundle(7, true)), None);
    assert_eq!(spire.news(bundle(9, true)), None);
    tokio::time::pause();
    assert_eq!(spire.news(bundle(8, false)), None, "a late answer, or a server that lags");
    tokio::time::advance(OLDER).await;
    assert!(spire.news(bundle(8, false)).unwrap().put_back, "its datastore was put back");
    assert!(!spire.news(bundle(9, true)).unwrap().put_back);
    assert!(spire.news(bundle(9, false)).unwrap().put_back, "what had this number before was lost");
    // What changes is heard of with the next question.
    tokio::time::resume();
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let key = JwtAuthority {
        key_id: "k".into(),
        public_key: key.public_key().spki_der().clone(),
        expires_at: 0,
        tainted: false,
    };
    assert_eq!(spire.publish_jwt_key(&key).await.unwrap(), std::slice::from_ref(&key));
    spire.heard().due = Instant::now();
    assert_eq!(spire.next_authorities().await.unwrap().jwt, std::slice::from_ref(&key));
    assert_eq!(spire.publish_wit_key(&key).await.unwrap_err().kind, ErrorKind::Unimplemented, "as SPIRE answers");
}

#[tokio::test]
async fn answers_that_make_no_sense_are_the_servers_fault_and_go_no_further() {
    let above = Above::start().await;
    let spire = below(&above);
    let good = above.bundle();
    let address = format!("upstream server 127.0.0.1:{}: ", above.port());
    type Spoil = fn(&mut types::Bundle);
    let cases: [(&str, Spoil); 4] = [
        ("it answered with the bundle of another trust domain, other.test", |b| b.trust_domain = "other.test".into()),
        ("its bundle has no X.509 authorities", |b| b.x509_authorities.clear()),
        ("a root that is none: ", |b| b.x509_authorities[0].asn1 = b"garbage".as_slice().into()),
        ("a key that is none: \"k\"", |b| {
            b.jwt_authorities.push(types::JwtKey { key_id: "k".into(), ..Default::default() });
        }),
    ];
    for (want, spoil) in cases {
        let mut bundle = bundle_to_proto(&good);
        spoil(&mut bundle);
        above.answer_with(bundle);
        spire.heard().due = Instant::now();
        let error = spire.next_authorities().await.unwrap_err().to_string();
        assert!(error.contains(&format!("{address}{want}")), "{error}");
        let error = refusal(&spire).await;
        assert!(error.contains(&format!("{address}{want}")), "{error}");
    }
    above.answer_with(bundle_to_proto(&good));
    for (chain, want) in
        [(vec![], "it answered without a certificate"), (vec![b"x".to_vec()], "unable to parse CA cert chain")]
    {
        above.sign_with(Some(chain));
        let error = refusal(&spire).await;
        assert!(error.starts_with(&format!("unable to request a new Downstream X509CA: {address}{want}")), "{error}");
    }
    above.sign_with(None);
    mint(&spire).await.unwrap();
}

#[tokio::test]
async fn what_the_server_refuses_says_what_its_operator_has_to_do() {
    let above = Above::start().await;
    let spire = below(&above);
    above.refuse(Some(Status::permission_denied("authorization denied for method X")));
    let error = refusal(&spire).await;
    let want = "rpc error: code = PermissionDenied desc = authorization denied for method X; this server is \
                spiffe://above.test/below there, whose entry needs the downstream flag";
    assert!(error.ends_with(want), "{error}");
    above.give_others(2);
    let other = below(&above);
    let want = "; this server has 3 SVIDs there and is spiffe://above.test/below: its process must fit the selectors of one \
                entry alone, the one with the downstream flag";
    let error = refusal(&other).await;
    assert!(error.ends_with(want), "{error}");
    above.refuse(None);
    mint(&spire).await.unwrap();
}

#[tokio::test]
async fn another_server_than_that_of_the_trust_domain_is_not_believed() {
    let above = Above::start().await;
    above.be("spiffe://above.test/impostor");
    let error = refusal(&below(&above)).await;
    assert!(error.contains("authentication handshake failed: ") && error.contains("impostor"), "{error}");
    let other = Spire::new(&data(&above, ""), &context("other.test")).unwrap();
    let error = refusal(&other).await;
    let want = "its agent belongs to another trust domain: it says spiffe://above.test/below, and this server's trust \
                domain is other.test";
    assert!(error.ends_with(want), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_away_or_has_nothing_is_asked_for_a_while() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("none.sock").display().to_string();
    let text = format!("server_address = \"127.0.0.1\" server_port = 1 workload_api_socket = \"{socket}\"");
    let spire = Spire::new(&finial_hcl::parse(&text).unwrap(), &context(TRUST_DOMAIN)).unwrap();
    let start = Instant::now();
    let error = refusal(&spire).await;
    let want =
        format!("unable to request a new Downstream X509CA: unable to create X509Source: Workload API at {socket}: ");
    assert!(
        error.starts_with(&want) && error.ends_with("is the upstream server's agent on this node running?"),
        "{error}"
    );
    assert!(start.elapsed() >= Duration::from_secs(7));
}

#[tokio::test]
async fn a_silent_server_is_not_waited_for() {
    let above = Above::start().await;
    let spire = below(&above);
    mint(&spire).await.unwrap();
    above.hang();
    tokio::time::pause();
    let error = refusal(&spire).await;
    assert!(error.ends_with("rpc error: code = DeadlineExceeded desc = no answer within 8 s"), "{error}");
}

#[tokio::test]
async fn a_server_that_was_replaced_with_all_its_roots_is_reached_by_what_the_agent_knows_now() {
    let mut above = Above::start().await;
    let spire = below(&above);
    mint(&spire).await.unwrap();
    above.replace().await;
    mint(&spire).await.unwrap();
    // The agent is away: what it gave last holds, until it ends.
    above.agent_ends().await;
    if let Some(connection) = spire.link.open.lock().await.as_mut() {
        connection.is_half_over();
    }
    tokio::time::pause();
    mint(&spire).await.unwrap();
}

/// As the server asks: it begins anew at every look at its authorities, which is every ten seconds.
async fn next(spire: &Spire) -> UpstreamAuthorities {
    spire.heard().due = Instant::now();
    let asked = tokio::time::timeout(Duration::from_secs(5), spire.next_authorities()).await;
    asked.expect("before the server looks again").unwrap()
}

#[tokio::test]
async fn news_come_while_the_agent_has_nothing_and_it_is_not_asked_for_each() {
    let above = Above::start().await;
    let spire = below(&above);
    next(&spire).await;
    above.agent_refuses(Some(Status::permission_denied("no identity issued")));
    let over = async || spire.link.open.lock().await.as_mut().unwrap().is_half_over();
    over().await;
    let asked = above.asked();
    for sequence_number in [10, 11] {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let key = JwtAuthority {
            key_id: sequence_number.to_string(),
            public_key: key.public_key().spki_der().clone(),
            expires_at: 0,
            tainted: false,
        };
        let bundle = Bundle { jwt_authorities: vec![key.clone()], sequence_number, ..above.bundle() };
        above.answer_with(bundle_to_proto(&bundle));
        assert_eq!(next(&spire).await.jwt, [key]);
    }
    assert_eq!(above.asked(), asked + 1, "once");
    above.agent_refuses(None);
    over().await;
    mint(&spire).await.unwrap();
    assert_eq!(above.asked(), asked + 2);
}

#[tokio::test]
async fn a_call_that_is_refused_once_does_not_cost_the_connection() {
    let mut above = Above::start().await;
    let spire = below(&above);
    mint(&spire).await.unwrap();
    above.agent_ends().await;
    above.refuse(Some(Status::permission_denied("not now")));
    let refused = async {
        let error = refusal(&spire).await;
        assert!(error.contains("desc = not now"), "{error}");
        above.refuse(None);
        mint(&spire).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(5), refused).await.expect("the agent is not waited for");
}
