use super::manager_tests::journal;
use crate::testing::{HOUR, Process, START, World};

/// An upstream authority in memory, which may sign wrongly.
pub(super) struct Upstream {
    pub(super) ca: finial_crypto::X509Ca,
    pub(super) roots: Vec<std::sync::Arc<[u8]>>,
    name_domain: finial_core::TrustDomain,
    /// What it signs has no right to sign.
    signs_leaves: bool,
    /// It takes this long, by this clock, and does not backdate what it signs.
    takes: Option<(std::sync::Arc<finial_core::ManualClock>, i64)>,
}

impl Upstream {
    pub(super) async fn new() -> Self {
        let key = finial_crypto::PrivateKey::generate(finial_core::KeyType::EcP384).unwrap();
        let template = finial_crypto::CaTemplate {
            subject: &finial_crypto::DistinguishedName::of(&["US"], &["UPSTREAM"], ""),
            trust_domain: &finial_core::TrustDomain::parse("local").unwrap(),
            not_before: START - 10,
            not_after: START + 1000 * HOUR,
            serial: finial_crypto::SerialNumber::new(7),
        };
        let ca = finial_crypto::X509Ca::self_sign(std::sync::Arc::new(key), &template).await.unwrap();
        let roots = vec![ca.certificate().clone()];
        Self { ca, roots, name_domain: crate::testing::trust_domain(), signs_leaves: false, takes: None }
    }
}

#[async_trait::async_trait]
impl finial_plugin::UpstreamAuthority for Upstream {
    fn name(&self) -> &str {
        "memory"
    }

    async fn mint_x509_ca(
        &self,
        csr: &[u8],
        ttl_seconds: i64,
    ) -> Result<finial_plugin::MintedX509Ca, finial_plugin::PluginError> {
        let csr = finial_crypto::Csr::parse(csr).unwrap();
        csr.verify_proof_of_possession().unwrap();
        assert_eq!(csr.uri_sans()[0].as_ref(), "spiffe://example.org");
        assert!(!csr.subject().unwrap().parts().serial_number.is_empty());
        let not_before = self.takes.as_ref().map_or(START - 10, |(clock, seconds)| {
            clock.advance(*seconds);
            finial_core::Clock::now(clock.as_ref())
        });
        let template = finial_crypto::CaTemplate {
            subject: &csr.subject().unwrap(),
            trust_domain: &self.name_domain,
            not_before,
            not_after: START + 10 * HOUR + ttl_seconds,
            serial: finial_crypto::SerialNumber::random(),
        };
        if self.signs_leaves {
            let template = finial_crypto::SvidTemplate {
                id: &self.name_domain.server_id(),
                public_key: csr.public_key(),
                subject: &csr.subject().unwrap(),
                dns_names: &[],
                not_before: START - 10,
                not_after: START + ttl_seconds,
                serial: finial_crypto::SerialNumber::random(),
            };
            let chain = vec![self.ca.issue_svid(&template).await.unwrap()];
            return Ok(finial_plugin::MintedX509Ca { chain, roots: self.roots.clone() });
        }
        let certificate = self.ca.issue_ca(csr.public_key(), &template).await.unwrap();
        Ok(finial_plugin::MintedX509Ca { chain: vec![certificate], roots: self.roots.clone() })
    }
}

#[tokio::test]
async fn with_an_upstream_authority_its_root_is_the_bundle_and_its_chain_goes_along() {
    let mut world = World::new();
    let upstream = Upstream::new().await;
    let root = upstream.ca.certificate().clone();
    let root_id = super::journal::hex(&upstream.ca.subject_key_id());
    world.upstream = Some(std::sync::Arc::new(upstream));
    let mut process = world.start().await;
    let roots: Vec<_> = world.bundle().unwrap().x509_authorities.iter().map(|a| a.der.clone()).collect();
    assert_eq!(roots, std::slice::from_ref(&root));
    let active = process.authorities.x509().unwrap();
    assert_eq!(active.upstream_authority_id, root_id);
    let entry = journal(&world).x509_c_as[0].clone();
    assert_eq!(entry.upstream_chain, std::slice::from_ref(&entry.certificate));
    assert_eq!(entry.upstream_authority_id, root_id);
    assert_eq!(entry.not_after, START + 34 * HOUR, "what the upstream authority says");
    let verify = |process: &Process, now| {
        let (issuer, roots) = (world.issuer(&process.authorities), process.feed.own().unwrap().roots.clone().unwrap());
        let key = process.authorities.x509().unwrap().ca.signer().public_key().clone();
        async move {
            let svid = issuer.server_x509_svid(&key).await.unwrap();
            assert_eq!(svid.chain.len(), 2, "leaf and intermediate, not the root");
            finial_crypto::verify_x509_svid(&svid.chain, &roots, now).unwrap();
        }
    };
    verify(&process, world.now()).await;
    let twin = world.load().await.unwrap();
    assert_eq!(twin.x509_id(), process.x509_id(), "a restart finds it though it is not in the bundle");
    verify(&twin, world.now()).await;
    // Half of 34 hours, then five sixths.
    let first = process.x509_id();
    for seconds in [29 * HOUR, 300] {
        world.clock.advance(seconds);
        process.manager.check().await.unwrap();
    }
    assert_ne!(process.x509_id(), first);
    assert_eq!(
        world.bundle().unwrap().x509_authorities.iter().filter(|a| a.der == root).count(),
        1,
        "offered again, it is not added again"
    );
    verify(&process, world.now()).await;
}

#[tokio::test]
async fn what_an_upstream_authority_signs_wrongly_is_not_used() {
    let mut wrong_root = Upstream::new().await;
    wrong_root.roots = Upstream::new().await.roots;
    let mut wrong_name = Upstream::new().await;
    wrong_name.name_domain = finial_core::TrustDomain::parse("other.org").unwrap();
    let mut no_right = Upstream::new().await;
    no_right.signs_leaves = true;
    for (upstream, want) in [
        (wrong_root, "X509 CA produced an invalid X509-SVID chain: "),
        (wrong_name, "invalid upstream-signed X509 CA: invalid X509 CA: its URI SAN"),
        (no_right, "invalid upstream-signed X509 CA: invalid X509 CA: authority certificate is not a CA"),
    ] {
        let mut world = World::new();
        world.upstream = Some(std::sync::Arc::new(upstream));
        let mut process = world.load().await.unwrap();
        let error = process.manager.start().await.unwrap_err().to_string();
        let at_fault = "upstreamauthority(memory): X509 CA minted by upstream authority is invalid: ";
        assert!(error.starts_with(&format!("{at_fault}{want}")), "{error}");
        assert!(world.bundle().is_none(), "nobody heard of it");
        // Later the last good one stays.
        world.upstream = Some(std::sync::Arc::new(Upstream::new().await));
        let good = world.start().await;
        let roots = world.bundle().unwrap().x509_authorities;
        let mut upstream = Upstream::new().await;
        upstream.signs_leaves = true;
        world.upstream = Some(std::sync::Arc::new(upstream));
        let mut process = world.load().await.unwrap();
        world.clock.advance(20 * HOUR);
        process.manager.check().await.unwrap_err();
        process.manager.start().await.unwrap();
        assert_eq!((process.x509_id(), world.bundle().unwrap().x509_authorities), (good.x509_id(), roots));
    }
}

#[tokio::test]
async fn an_upstream_authority_may_take_its_time_and_backdate_nothing() {
    let mut world = World::new();
    let mut upstream = Upstream::new().await;
    upstream.takes = Some((world.clock.clone(), 20));
    world.upstream = Some(std::sync::Arc::new(upstream));
    let process = world.start().await;
    assert!(process.x509_id().is_some());
}

#[tokio::test]
async fn what_outlives_its_root_is_used_until_that_ends() {
    let mut world = World::new();
    let mut upstream = Upstream::new().await;
    let template = finial_crypto::CaTemplate {
        subject: &upstream.ca.subject().unwrap(),
        trust_domain: &finial_core::TrustDomain::parse("local").unwrap(),
        not_before: START - 10,
        not_after: START + 30 * HOUR,
        serial: finial_crypto::SerialNumber::new(8),
    };
    let short = finial_crypto::X509Ca::self_sign(upstream.ca.signer().clone(), &template).await.unwrap();
    upstream.roots = vec![short.certificate().clone()];
    world.upstream = Some(std::sync::Arc::new(upstream));
    let process = world.start().await;
    let ends = |process: &Process| process.authorities.x509().unwrap().ca.not_after();
    assert_eq!((ends(&process), journal(&world).x509_c_as[0].not_after), (START + 30 * HOUR, START + 30 * HOUR));
    assert_eq!(ends(&world.load().await.unwrap()), START + 30 * HOUR, "also after a restart");
}
