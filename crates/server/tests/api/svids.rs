//! The SVID service.

use crate::harness::*;
use finial_crypto::{Certificate, verify_x509_svid};
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
