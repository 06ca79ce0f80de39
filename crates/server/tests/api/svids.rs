//! The SVID service.

use crate::harness::*;
use finial_core::{KeyType, SpiffeId};
use finial_crypto::{Certificate, PrivateKey, verify_x509_svid};
use finial_proto::server::svid::*;
use tonic::Code;

#[tokio::test]
async fn an_agent_gets_the_svids_of_its_entries() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let mut wanted = agent.entry("/workload");
    wanted.dns_names = vec!["a.example.org".into(), "b".into()];
    wanted.x509_svid_ttl = 120;
    let entry = server.create(vec![wanted]).await.remove(0);
    let csr = any_csr().await;
    let params = |entry_id: &str, csr: &bytes::Bytes| NewX509svidParams { entry_id: entry_id.into(), csr: csr.clone() };
    let request = BatchNewX509svidRequest {
        params: vec![
            params(&entry.id, &csr),
            params("no-such", &csr),
            params("", &csr),
            params(&entry.id, &bytes::Bytes::new()),
            params(&entry.id, &bytes::Bytes::from_static(b"garbage")),
        ],
    };
    let results = agent.svids().batch_new_x509svid(request).await.unwrap().into_inner().results;
    let outcome: Vec<_> =
        results.iter().map(|r| r.status.as_ref().unwrap()).map(|s| (s.code, s.message.as_str())).collect();
    assert_eq!(outcome[0], (0, "OK"));
    assert_eq!(outcome[1], (Code::NotFound as i32, "entry not found or not authorized"));
    assert_eq!(outcome[2], (Code::InvalidArgument as i32, "missing entry ID"));
    assert_eq!(outcome[3], (Code::InvalidArgument as i32, "missing CSR"));
    assert_eq!(outcome[4].0, Code::InvalidArgument as i32);
    assert!(outcome[4].1.starts_with("malformed CSR: "), "{}", outcome[4].1);
    let svid = results[0].svid.clone().unwrap();
    assert_eq!((svid.id, svid.expires_at), (id("/workload"), NOW + 120));
    let chain: Vec<_> = svid.cert_chain.iter().map(|der| der.to_vec()).collect();
    let roots = server.roots().await.x509_roots("example.org").unwrap();
    assert_eq!(verify_x509_svid(&chain, &roots, NOW).unwrap().as_str(), "spiffe://example.org/workload");
    let leaf = Certificate::parse(&*chain[0]).unwrap();
    assert_eq!(leaf.dns_names().iter().map(|n| &**n).collect::<Vec<_>>(), ["a.example.org", "b"]);
}

#[tokio::test]
async fn stored_dns_names_that_no_certificate_can_carry_are_left_out() {
    let server = Server::start().await;
    let (identity, _) = server.attest_name("has-odd-names", "has-odd-names").await.unwrap();
    let wanted = entry("/odd", identity.id.path(), &["unix:uid:1000"]);
    let stored = server.create(vec![wanted]).await.remove(0);
    // as SPIRE takes them, and as only a database can have them
    let odd = ["a b", "svc:8080", "http://x@y", "b\u{fc}cher.example", "", "fine.example.org", "a+b~c,'$[]"];
    let dns_names = Some(odd.map(str::to_owned).to_vec());
    let write = async |store: &finial_store::Store| {
        let update = finial_store::EntryUpdate { dns_names, ..Default::default() };
        store.update_entry(&finial_core::EntryId::parse(&stored.id).unwrap(), update).await.unwrap();
    };
    let server = server.restart_after(write, |_| ()).await;
    let agent = Agent::new(&server, identity).await;
    for _ in 0..2 {
        let params = vec![NewX509svidParams { entry_id: stored.id.clone(), csr: any_csr().await }];
        let results = agent.svids().batch_new_x509svid(BatchNewX509svidRequest { params }).await.unwrap();
        let result = results.into_inner().results.remove(0);
        assert_eq!(result.status.unwrap().message, "OK");
        let leaf = Certificate::parse(&*result.svid.unwrap().cert_chain[0].to_vec()).unwrap();
        let names: Vec<_> = leaf.dns_names().iter().map(|n| &**n).collect();
        assert_eq!(names, ["svc:8080", "http://x@y", "fine.example.org", "a+b~c,'$[]"]);
    }
    let message = "The entry's X509-SVIDs lack DNS names that no certificate can carry; update the entry without them";
    let lines = logged(message, "entry_id", &stored.id);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(lines[0]["spiffe_id"], "spiffe://example.org/odd");
    assert_eq!(lines[0]["dns_names"], format!("{:?}", ["a b", "b\u{fc}cher.example", ""]));
}

async fn mint(server: &Server, csr: Vec<u8>, ttl: i32) -> Result<finial_proto::types::X509svid, tonic::Status> {
    let answer = server.svids().mint_x509svid(MintX509svidRequest { csr: csr.into(), ttl }).await;
    answer.map(|a| a.into_inner().svid.unwrap())
}

#[tokio::test]
async fn minting_takes_name_and_dns_names_from_the_csr() {
    let server = Server::start().await;
    let key = PrivateKey::generate(KeyType::EcP384).unwrap();
    let wanted = SpiffeId::parse("spiffe://example.org/minted").unwrap();
    let csr = csr(&key, Some(&wanted), &["a.test", "*.b.test"]).await;
    let svid = mint(&server, csr, 60).await.unwrap();
    assert_eq!((svid.id, svid.expires_at), (id("/minted"), NOW + 60));
    let leaf = Certificate::parse(&*svid.cert_chain[0].to_vec()).unwrap();
    assert_eq!(leaf.dns_names().len(), 2);
}

#[tokio::test]
async fn bad_csrs_are_told_apart() {
    let server = Server::start().await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let wanted = SpiffeId::parse("spiffe://example.org/x").unwrap();
    let of = |text: &str| SpiffeId::parse(text).unwrap();
    let mut forged = csr(&key, Some(&wanted), &[]).await;
    *forged.last_mut().unwrap() ^= 1;
    for (bad, want) in [
        (Vec::new(), "missing CSR"),
        (b"garbage".to_vec(), "malformed CSR: "),
        (forged, "failed to verify CSR signature: "),
        (csr(&key, None, &[]).await, "CSR URI SAN is required"),
        (
            csr(&key, Some(&of("spiffe://other.test/x")), &[]).await,
            "CSR URI SAN is invalid: \"spiffe://other.test/x\" is not a member of trust domain \"example.org\"",
        ),
        (
            csr(&key, Some(&of("spiffe://example.org/spire/agent/x")), &[]).await,
            "CSR URI SAN is invalid: \"spiffe://example.org/spire/agent/x\" is not a workload in trust domain",
        ),
        (csr(&key, Some(&wanted), &["a b"]).await, "CSR DNS name is invalid: idna error: \"a b\" is no DNS name: "),
        (
            csr(&key, Some(&wanted), &["*.a.test", "x.a.test"]).await,
            "CSR DNS name contains a wildcard that covers another non-wildcard name: name \"x.a.test\" overlaps",
        ),
    ] {
        let message = refused(mint(&server, bad, 0).await, Code::InvalidArgument);
        assert!(message.starts_with(want), "{message}");
    }
}

#[tokio::test]
async fn weak_and_foreign_keys_are_refused() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let entry = server.create(vec![agent.entry("/w")]).await.remove(0);
    for args in [&["rsa:1024"][..], &["ec", "-pkeyopt", "ec_paramgen_curve:secp224r1"], &["ed25519"]] {
        let file = server.folder.path().join("csr.der");
        let made = std::process::Command::new("openssl")
            .args(["req", "-new", "-nodes", "-subj", "/CN=x", "-keyout", "/dev/null", "-outform", "DER"])
            .args(["-addext", "subjectAltName=URI:spiffe://example.org/w", "-out"])
            .arg(&file)
            .arg("-newkey")
            .args(args)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let csr = std::fs::read(&file).unwrap();
        refused(mint(&server, csr.clone(), 0).await, Code::InvalidArgument);
        let params = vec![NewX509svidParams { entry_id: entry.id.clone(), csr: csr.clone().into() }];
        let results = agent.svids().batch_new_x509svid(BatchNewX509svidRequest { params }).await.unwrap();
        let status = results.into_inner().results.remove(0).status.unwrap();
        assert_eq!(status.code, Code::InvalidArgument as i32, "{args:?}: {}", status.message);
        let token = server.token().await;
        let steps = vec![first_step("join_token", token.as_bytes(), &csr)];
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        refused(server.attest(key, steps).await.map(drop), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn jwt_svids_are_minted_and_issued() {
    let server = Server::start().await;
    let agent = server.agent().await;
    let mut wanted = agent.entry("/w");
    wanted.jwt_svid_ttl = 42;
    let entry = server.create(vec![wanted]).await.remove(0);
    let new = |entry_id: &str, audience: Vec<String>| {
        let mut client = agent.svids();
        let request = NewJwtsvidRequest { entry_id: entry_id.into(), audience };
        async move { client.new_jwtsvid(request).await.map(|a| a.into_inner().svid.unwrap()) }
    };
    let svid = new(&entry.id, vec!["a".into(), "b".into()]).await.unwrap();
    assert_eq!((svid.id, svid.issued_at, svid.expires_at), (id("/w"), NOW, NOW + 42));
    let bundle = server.bundles().get_bundle(finial_proto::server::bundle::GetBundleRequest::default()).await.unwrap();
    assert_eq!(svid.token.split('.').count(), 3);
    assert_eq!(bundle.into_inner().jwt_authorities.len(), 1);
    let message = refused(new("no-such", vec!["a".into()]).await, Code::NotFound);
    assert_eq!(message, "entry not found or not authorized");
    assert_eq!(refused(new(&entry.id, vec![]).await, Code::InvalidArgument), "at least one audience is required");
    refused(new(&entry.id, vec![String::new()]).await, Code::InvalidArgument);
    let message = refused(new(&entry.id, vec!["x".repeat(20_000)]).await, Code::InvalidArgument);
    assert_eq!(message, "audience is too long (max 16384 bytes)");

    let mint = |id, audience: &[&str], ttl| {
        let mut client = server.svids();
        let audience = audience.iter().map(|a| (*a).to_owned()).collect();
        async move {
            let answer = client.mint_jwtsvid(MintJwtsvidRequest { id, audience, ttl }).await;
            answer.map(|a| a.into_inner().svid.unwrap())
        }
    };
    let svid = mint(id("/m"), &["a"], 0).await.unwrap();
    assert_eq!((svid.id, svid.expires_at), (id("/m"), NOW + 300));
    assert_eq!(
        refused(mint(None, &["a"], 0).await, Code::InvalidArgument),
        "invalid SPIFFE ID: request must specify SPIFFE ID"
    );
    refused(mint(id("/spire/server"), &["a"], 0).await, Code::InvalidArgument);
    refused(mint(id("/m"), &[], 0).await, Code::InvalidArgument);
}

#[tokio::test]
async fn jwt_svids_can_be_switched_off() {
    let server = Server::with(|settings| settings.disable_jwt_svids = true).await;
    let request = MintJwtsvidRequest { id: id("/m"), audience: vec!["a".into()], ttl: 0 };
    let message = refused(server.svids().mint_jwtsvid(request).await, Code::Unimplemented);
    assert_eq!(message, "JWT functionality is disabled");
}
