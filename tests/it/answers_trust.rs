//! Trust domains, WIT-SVIDs and what downstream servers ask for: the same requests to the real SPIRE and to Finial, and the
//! bundles that both fetch from the real SPIRE's endpoints.

use crate::answers::{Answers, ask, ask_list, both, csrs, ids, show, workload};
use finial_core::KeyType;
use finial_crypto::{Certificate, DistinguishedName, PrivateKey, create_ca_csr};
use finial_net::client::uds_channel;
use finial_proto::health::HealthCheckRequest;
use finial_proto::health::health_client::HealthClient;
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::bundle::{self as bundles};
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::server::svid::{self as svids};
use finial_proto::server::trustdomain::trust_domain_client::TrustDomainClient;
use finial_proto::server::trustdomain::{self as domains};
use finial_proto::types::federation_relationship::BundleEndpointProfile as Profile;
use finial_proto::types::{self, FederationRelationship, FederationRelationshipMask as Mask};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::Flavor::{self, Finial, Spire};
use testkit::{Server, ServerOptions, Workdir, free_port};
use tonic::transport::Channel;

fn web() -> Option<Profile> {
    Some(Profile::HttpsWeb(types::HttpsWebProfile {}))
}

fn spiffe(id: &str) -> Option<Profile> {
    Some(Profile::HttpsSpiffe(types::HttpsspiffeProfile { endpoint_spiffe_id: id.into() }))
}

fn relationship(name: &str) -> FederationRelationship {
    FederationRelationship {
        trust_domain: name.into(),
        bundle_endpoint_url: "https://127.0.0.1:1/".into(),
        bundle_endpoint_profile: web(),
        trust_domain_bundle: None,
    }
}

/// A relationship with one thing changed each, every one with a trust domain of its own.
fn odd_relationships() -> Vec<FederationRelationship> {
    let mut odd = Vec::new();
    let names = ["", "no td", "example.org", "spiffe://example.org/x", "UP.org", "a:1", "spiffe://named.org/x"];
    odd.extend(names.map(relationship));
    let base = |odd: &Vec<FederationRelationship>| relationship(&format!("n{}.org", odd.len()));
    for url in [
        "",
        "x",
        ":x",
        "1:x",
        "http://x",
        "HTTPS://Host/Path",
        "https:",
        "https:x",
        "https:/x",
        "https://",
        "https:///x",
        "https://x",
        "https://x:8443/y?z=1#f",
        "https://u@x",
        "https://u:p@x/",
        "https://@x",
        "https://x:port",
        "https://x:",
        "https://[::1]:8443/",
        "https://[::1",
        "https://x y",
        "https://x/ y",
        "https://x/%zz",
        "https://x/%2",
        "https://x\n",
        "//x",
    ] {
        odd.push(FederationRelationship { bundle_endpoint_url: url.into(), ..base(&odd) });
    }
    for id in ["", "x", "spiffe://", "spiffe://a", "spiffe://a/b", "spiffe://A/b", "spiffe://example.org/spire/server"]
    {
        odd.push(FederationRelationship { bundle_endpoint_profile: spiffe(id), ..base(&odd) });
    }
    odd.push(FederationRelationship { bundle_endpoint_profile: None, ..base(&odd) });
    for name in ["", "no td", "other.org", "same", "spiffe://same"] {
        let base = base(&odd);
        let name = name.replace("same", &base.trust_domain);
        let bundle = types::Bundle { trust_domain: name, refresh_hint: 60, ..Default::default() };
        odd.push(FederationRelationship { trust_domain_bundle: Some(bundle), ..base });
    }
    let base = base(&odd);
    let key = types::JwtKey { public_key: "x".into(), ..Default::default() };
    let bundle =
        types::Bundle { trust_domain: base.trust_domain.clone(), jwt_authorities: vec![key], ..Default::default() };
    odd.push(FederationRelationship { trust_domain_bundle: Some(bundle), ..base });
    odd
}

#[test]
fn federation_relationships() {
    both(async |flavor| odd_answers(&Server::start(flavor, &ServerOptions::default())).await);
}

/// Asks for relationships in every state of disrepair.
pub(crate) async fn odd_answers(server: &Server) -> Answers {
    let mut client = TrustDomainClient::new(uds_channel(server.socket()));
    let mut answers = Answers::new();
    let create =
        |r| domains::BatchCreateFederationRelationshipRequest { federation_relationships: vec![r], output_mask: None };
    let update = |r, input_mask| domains::BatchUpdateFederationRelationshipRequest {
        federation_relationships: vec![r],
        input_mask,
        output_mask: None,
    };
    for odd in odd_relationships() {
        ask!(answers, client.batch_create_federation_relationship, create(odd));
    }
    ask!(answers, client.batch_create_federation_relationship, create(relationship("good.org")));
    ask!(answers, client.batch_create_federation_relationship, create(relationship("good.org")));
    for odd in odd_relationships() {
        let odd = FederationRelationship { trust_domain: "good.org".into(), ..odd };
        ask!(answers, client.batch_update_federation_relationship, update(odd, None));
    }
    let masks = [
        Mask::default(),
        Mask { bundle_endpoint_url: true, ..Mask::default() },
        Mask { bundle_endpoint_profile: true, ..Mask::default() },
        Mask { trust_domain_bundle: true, ..Mask::default() },
    ];
    for mask in masks {
        let bundle = types::Bundle { trust_domain: "good.org".into(), refresh_hint: 90, ..Default::default() };
        let changed = FederationRelationship {
            bundle_endpoint_url: "https://127.0.0.1:2/".into(),
            bundle_endpoint_profile: spiffe("spiffe://good.org/x"),
            trust_domain_bundle: Some(bundle),
            ..relationship("good.org")
        };
        ask!(answers, client.batch_update_federation_relationship, update(changed, Some(mask)));
        let request = |name: &str| domains::GetFederationRelationshipRequest {
            trust_domain: name.into(),
            output_mask: Some(mask),
        };
        ask!(answers, client.get_federation_relationship, request("good.org"), request("none.org"), request("no td"));
    }
    ask!(answers, client.batch_update_federation_relationship, update(relationship("none.org"), None));
    for (token, page_size) in [("", 0), ("", 2), ("2", 2), ("x", 1), ("-1", 1), ("700", 1), ("", -1)] {
        let page_token = token.to_owned();
        let request = domains::ListFederationRelationshipsRequest { page_token, page_size, output_mask: None };
        ask_list!(answers, client.list_federation_relationships, federation_relationships, request);
    }
    let names = ["", "no td", "good.org", "good.org", "spiffe://named.org/x"].map(str::to_owned).to_vec();
    ask!(
        answers,
        client.batch_delete_federation_relationship,
        domains::BatchDeleteFederationRelationshipRequest::default(),
        domains::BatchDeleteFederationRelationshipRequest { trust_domains: names },
    );
    for name in ["", "no td", "example.org", "none.org"] {
        ask!(answers, client.refresh_bundle, domains::RefreshBundleRequest { trust_domain: name.into() });
    }
    answers
}

/// Header and claims of a token without what differs from token to token.
pub(crate) fn shape(token: &str) -> String {
    let part = |n: usize| {
        let text = token.split('.').nth(n).expect("a part");
        let bytes = base64url(text);
        serde_json::from_slice::<Value>(&bytes).expect("JSON")
    };
    let (mut header, mut claims) = (part(0), part(1));
    header["kid"] = "K".into();
    let life = claims["exp"].as_i64().expect("exp") - claims["iat"].as_i64().expect("iat");
    claims["exp"] = whole(life).into();
    claims["iat"] = 0.into();
    format!("{header} {claims}")
}

/// A life, in seconds; what lives as long as its authority has that many seconds less as the authority is older.
pub(crate) fn whole(life: i64) -> i64 {
    const CA_TTL: i64 = 24 * 3600;
    if life > CA_TTL - 600 { CA_TTL } else { life }
}

fn base64url(text: &str) -> Vec<u8> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => u32::from(c - b'A'),
        b'a'..=b'z' => u32::from(c - b'a') + 26,
        b'0'..=b'9' => u32::from(c - b'0') + 52,
        b'-' => 62,
        _ => 63,
    };
    let mut out = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for c in text.bytes() {
        bits = bits << 6 | value(c);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push(u8::try_from(bits >> count & 0xff).expect("a byte"));
        }
    }
    out
}

/// What Go's parser says of keys comes after SPIRE's words.
fn without_cause(answer: String) -> String {
    ["invalid public key: ", "malformed public key: "]
        .iter()
        .find_map(|words| answer.split_once(words).map(|(before, _)| format!("{before}{words}")))
        .unwrap_or(answer)
}

#[test]
fn wit_svids() {
    let keys: Vec<_> = [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048]
        .map(|kind| PrivateKey::generate(kind).expect("a key"))
        .iter()
        .map(|key| finial_crypto::Signer::public_key(key).spki_der().to_vec())
        .collect();
    for flags in ["", "experimental { feature_flags = [\"wit-svid\"] wit_issuer = \"urn:example\" }"] {
        both(async |flavor| {
            let options = ServerOptions { server: flags.into(), ..ServerOptions::default() };
            let server = Server::start(flavor, &options);
            let mut client = SvidClient::new(uds_channel(server.socket()));
            let mut answers = Answers::new();
            let mut requests = Vec::new();
            let base = svids::MintWitsvidRequest {
                id: ids().pop().flatten(),
                public_key: keys[0].clone().into(),
                ttl: 60,
                signing_algorithm: "ES256".into(),
            };
            requests.extend(ids().into_iter().map(|id| svids::MintWitsvidRequest { id, ..base.clone() }));
            for key in &keys {
                for algorithm in ["", "none", "HS256", "ES256", "ES384", "ES512", "RS256", "RS512", "PS256", "PS384"] {
                    let (public_key, signing_algorithm) = (key.clone().into(), algorithm.into());
                    requests.push(svids::MintWitsvidRequest { public_key, signing_algorithm, ..base.clone() });
                }
            }
            for garbage in [&b""[..], b"x", &keys[0][..40]] {
                requests.push(svids::MintWitsvidRequest { public_key: garbage.to_vec().into(), ..base.clone() });
            }
            for ttl in [0, -1, i32::MIN, 7200, i32::MAX] {
                requests.push(svids::MintWitsvidRequest { ttl, ..base.clone() });
            }
            for request in requests {
                let what = format!("{request:?}");
                let answer = match client.mint_witsvid(request).await {
                    Ok(answer) => {
                        let svid = answer.into_inner().svid.expect("an SVID");
                        format!("{} {:?} {}", shape(&svid.token), svid.id, whole(svid.expires_at - svid.issued_at))
                    }
                    Err(status) => without_cause(show::<()>(Err(status))),
                };
                answers.push((what, answer));
            }
            ask!(answers, client.batch_new_witsvid, svids::BatchNewWitsvidRequest::default());
            let bundle = BundleClient::new(uds_channel(server.socket()));
            let bundle = { bundle }.get_bundle(bundles::GetBundleRequest::default()).await.expect("the bundle");
            answers.push(("WIT authorities".into(), bundle.into_inner().wit_authorities.len().to_string()));
            answers
        });
    }
}

/// A channel of a workload with a downstream entry.
async fn downstream(server: &Server) -> Channel {
    server.entry("/downstream", &["-downstream"]);
    workload(server, "/downstream").await
}

/// What a downstream authority is like, without serial numbers and keys.
fn described(answer: &svids::NewDownstreamX509caResponse) -> String {
    let certificate = |der: &[u8]| Certificate::parse(der).expect("a certificate");
    let ca = certificate(&answer.ca_cert_chain[0]);
    let root = certificate(&answer.x509_authorities[0]);
    let (subject, above) = (ca.subject().expect("a subject"), root.subject().expect("a subject"));
    let usage = ca.key_usage().map(|usage| usage.0);
    let serials = subject.parts().serial_number == above.parts().serial_number;
    let parts = finial_crypto::NameParts { serial_number: String::new(), ..subject.parts().clone() };
    let capped = ca.not_after() == root.not_after();
    let life = if capped { 0 } else { ca.not_after() - ca.not_before() };
    format!(
        "{} certificates below {} roots, {parts:?}, serial of the parent {serials}, {:?}, {usage:?}, CA {}, {life} s, capped {capped}",
        answer.ca_cert_chain.len(),
        answer.x509_authorities.len(),
        ca.uri_sans(),
        ca.is_ca(),
    )
}

#[test]
fn downstream_servers() {
    both(async |flavor| {
        let server = Server::start(flavor, &ServerOptions::default());
        let channel = downstream(&server).await;
        let mut client = SvidClient::new(channel.clone());
        let mut answers = Answers::new();
        let key = PrivateKey::generate(KeyType::EcP256).expect("a key");
        let trust_domain = finial_core::TrustDomain::parse("example.org").expect("a trust domain");
        let subject = DistinguishedName::of(&["DE"], &["Whoever"], "whatever");
        let good = create_ca_csr(&key, &subject, &trust_domain).await.expect("a CSR");
        for (csr, ttl) in [(good.clone(), 3600), (good.clone(), 0), (good.clone(), -5), (good, i32::MAX)] {
            let request = svids::NewDownstreamX509caRequest { csr: csr.into(), preferred_ttl: ttl };
            let answer = client.new_downstream_x509ca(request).await.expect("an authority").into_inner();
            answers.push((format!("a CA for {ttl} s"), described(&answer)));
        }
        for csr in csrs().await {
            let request = svids::NewDownstreamX509caRequest { csr: csr.clone().into(), preferred_ttl: 60 };
            let answer = match client.new_downstream_x509ca(request).await {
                Ok(answer) => described(&answer.into_inner()),
                Err(status) => {
                    let text = show::<()>(Err(status));
                    let words = ["malformed CSR: ", "invalid CSR signature: "];
                    let known = words.iter().find_map(|w| text.split_once(w).map(|(before, _)| format!("{before}{w}")));
                    known.unwrap_or(text)
                }
            };
            answers.push((format!("a CA by {csr:?}"), answer));
        }
        let mut bundle = BundleClient::new(channel);
        let public_key = finial_crypto::Signer::public_key(&key).spki_der().to_vec();
        let jwt = |key_id: &str, public_key: Vec<u8>| bundles::PublishJwtAuthorityRequest {
            jwt_authority: Some(types::JwtKey {
                public_key: public_key.into(),
                key_id: key_id.into(),
                expires_at: 4_000_000_000,
                tainted: true,
            }),
        };
        ask!(answers, bundle.publish_wit_authority, bundles::PublishWitAuthorityRequest::default(),);
        ask!(answers, bundle.publish_jwt_authority, bundles::PublishJwtAuthorityRequest::default());
        for request in
            [jwt("", public_key.clone()), jwt("k", vec![]), jwt("k", public_key.clone()), jwt("k", public_key)]
        {
            let answer = bundle.publish_jwt_authority(request).await;
            let answer = match answer {
                Ok(answer) => {
                    let all = answer.into_inner().jwt_authorities;
                    let last = all.last().expect("a key");
                    format!("{} keys, the last is {} {} {}", all.len(), last.key_id, last.expires_at, last.tainted)
                }
                Err(status) => {
                    let text = show::<()>(Err(status));
                    text.split_once("invalid JWT authority: ").map_or(text.clone(), |(b, cause)| match cause {
                        "missing key ID" => text.clone(),
                        _ => format!("{b}invalid JWT authority"),
                    })
                }
            };
            answers.push(("publishing".into(), answer));
        }
        answers
    });
}

/// A certificate of the web for this machine, and the root that verifies it: key, certificate and root files.
pub(crate) fn web_certificate(dir: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let file = |name: &str| dir.join(name);
    let openssl = |args: &[&str]| {
        let out = Command::new("openssl").args(args).current_dir(dir).output().expect("openssl");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    openssl(&[&["req", "-x509", "-subj", "/CN=root", "-keyout", "root.key", "-out", "root.pem"], &key[..]].concat());
    let leaf = ["req", "-x509", "-CA", "root.pem", "-CAkey", "root.key", "-subj", "/CN=localhost"];
    let names =
        ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"];
    openssl(&[&leaf[..], &names, &["-keyout", "web.key", "-out", "web.pem"], &key].concat());
    (file("web.key"), file("web.pem"), file("root.pem"))
}

/// A server of another trust domain that serves its bundle.
pub(crate) fn endpoint(flavor: Flavor, trust_domain: &str, profile: &str) -> (Server, u16) {
    let port = free_port();
    let server = format!(
        "federation {{ bundle_endpoint {{ address = \"127.0.0.1\" port = {port} refresh_hint = \"7m\" {profile} }} }}"
    );
    let options = ServerOptions { trust_domain: trust_domain.into(), server, ..ServerOptions::default() };
    (Server::start(flavor, &options), port)
}

async fn stored(server: &Server, name: &str) -> types::Bundle {
    let mut client = BundleClient::new(uds_channel(server.socket()));
    let request = bundles::GetFederatedBundleRequest { trust_domain: name.into(), output_mask: None };
    let mut bundle = client.get_federated_bundle(request).await.expect("the bundle").into_inner();
    // SPIRE forgets the sequence number of what it fetches.
    bundle.sequence_number = 0;
    bundle.jwt_authorities.sort_by(|a, b| a.key_id.cmp(&b.key_id));
    bundle
}

/// What a failed handshake or connection is called differs from TLS library to TLS library.
fn cut(answer: String) -> String {
    answer.split_once("/\": ").map_or(answer.clone(), |(before, _)| before.to_owned())
}

#[test]
fn bundles_are_fetched_from_the_real_spires_endpoints() {
    fetch_from(Spire);
}

#[test]
fn the_real_spire_fetches_bundles_from_our_endpoints() {
    fetch_from(Finial);
}

/// What both fetch from the endpoints of servers of that flavor must be the same.
fn fetch_from(serving: Flavor) {
    let files = Workdir::new();
    let (key, certificate, root) = web_certificate(files.path());
    let profile = format!(
        "profile \"https_web\" {{ serving_cert_file {{ cert_file_path = \"{}\" key_file_path = \"{}\" file_sync_interval = \"1m\" }} }}",
        certificate.display(),
        key.display()
    );
    let (web_server, web_port) = endpoint(serving, "web.org", &profile);
    let (spiffe_server, spiffe_port) = endpoint(serving, "spiffe.org", "profile \"https_spiffe\" {}");
    let (web_url, spiffe_url) = (format!("https://localhost:{web_port}/"), format!("https://127.0.0.1:{spiffe_port}/"));
    let id = "spiffe://spiffe.org/spire/server";
    let of = |name: &str, url: &str, profile| FederationRelationship {
        bundle_endpoint_url: url.into(),
        bundle_endpoint_profile: profile,
        ..relationship(name)
    };
    both(async |flavor: Flavor| {
        let mut answers = Answers::new();
        let own = async |server: &Server| {
            let mut client = BundleClient::new(uds_channel(server.socket()));
            client.get_bundle(bundles::GetBundleRequest::default()).await.expect("the bundle").into_inner()
        };
        let first = own(&spiffe_server).await;
        let options = ServerOptions { web_roots: Some(root.clone()), ..ServerOptions::default() };
        let server = Server::start(flavor, &options);
        let mut client = TrustDomainClient::new(uds_channel(server.socket()));
        let create = domains::BatchCreateFederationRelationshipRequest {
            federation_relationships: vec![
                of("web.org", &web_url, web()),
                FederationRelationship {
                    trust_domain_bundle: Some(types::Bundle { refresh_hint: 0, ..first.clone() }),
                    ..of("spiffe.org", &spiffe_url, spiffe(id))
                },
                of("nobundle.org", &spiffe_url, spiffe("spiffe://unknown.org/x")),
                of("away.org", "https://127.0.0.1:1/", web()),
                of("wrongid.org", &spiffe_url, spiffe("spiffe://spiffe.org/else")),
                of("notweb.org", &spiffe_url, web()),
                of("notspiffe.org", &web_url, spiffe(id)),
                of("lost.org", &format!("{web_url}lost"), web()),
            ],
            output_mask: Some(Mask::default()),
        };
        ask!(answers, client.batch_create_federation_relationship, create);
        for name in [
            "web.org",
            "spiffe.org",
            "nobundle.org",
            "away.org",
            "wrongid.org",
            "notweb.org",
            "notspiffe.org",
            "lost.org",
        ] {
            let answer = client.refresh_bundle(domains::RefreshBundleRequest { trust_domain: name.into() }).await;
            answers.push((format!("refresh {name}"), cut(show(answer))));
        }
        answers.push(("web.org's bundle".into(), format!("{:?}", stored(&server, "web.org").await)));
        answers.push(("spiffe.org's bundle".into(), format!("{:?}", stored(&server, "spiffe.org").await)));
        answers.push(("its refresh hint".into(), stored(&server, "web.org").await.refresh_hint.to_string()));
        assert_eq!(stored(&server, "web.org").await.x509_authorities, own(&web_server).await.x509_authorities);
        answers
    });
}

#[test]
fn health_can_be_watched() {
    // SPIRE has no Watch; the health protocol says what it does.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let server = Server::start(Finial, &ServerOptions::default());
        let mut client = HealthClient::new(uds_channel(server.socket()));
        let mut watched = client.watch(HealthCheckRequest::default()).await.expect("a stream").into_inner();
        let first = watched.message().await.expect("an answer").expect("an answer");
        assert_eq!(first.status, 1, "SERVING");
    });
}
