//! The Bundle service.

use super::{Answers, ask, ask_list, of_servers, show};
use finial_net::client::uds_channel;
use finial_proto::server::bundle::{self as bundles, bundle_client::BundleClient};
use finial_proto::types;
use testkit::{Server, ServerOptions};

#[test]
fn bundles() {
    of_servers(&ServerOptions::default(), odd);
}

pub(super) async fn odd(server: &Server) -> Answers {
    let mut client = BundleClient::new(uds_channel(server.socket()));
    let mut answers = Answers::new();
    let names = ["", "no td", "example.org", "spiffe://example.org", "nobody.org", "spiffe://nobody.org/x", "UP.org"];
    let certificate = |der: &'static [u8]| types::X509Certificate { asn1: der.into(), tainted: false };
    let key = |id: &str, der: &'static [u8]| types::JwtKey {
        key_id: id.into(),
        public_key: der.into(),
        ..Default::default()
    };
    for name in names {
        let trust_domain = name.to_owned();
        let output_mask = None;
        ask!(answers, client.get_federated_bundle, bundles::GetFederatedBundleRequest { trust_domain, output_mask });
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
        ask_list!(answers, client.list_federated_bundles, bundles, request);
    }
    ask!(answers, client.publish_jwt_authority, bundles::PublishJwtAuthorityRequest::default());
    ask!(answers, client.count_bundles, bundles::CountBundlesRequest::default());
    answers
}
