use super::*;
use finial_core::{KeyType, ManualClock, TrustDomain};
use finial_crypto::{CaTemplate, Certificate, DistinguishedName, PrivateKey, SerialNumber, X509Ca, create_ca_csr};
use std::path::PathBuf;

const NOW: i64 = 1_700_000_000;

struct Pki {
    folder: tempfile::TempDir,
    clock: Arc<ManualClock>,
    trust_domain: TrustDomain,
}

impl Pki {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            clock: Arc::new(ManualClock::at(NOW)),
            trust_domain: TrustDomain::parse("example.org").unwrap(),
        }
    }

    fn context(&self) -> PluginContext {
        PluginContext { trust_domain: self.trust_domain.clone(), clock: self.clock.clone() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, certificates: &[&[u8]], key: Option<&PrivateKey>) {
        std::fs::write(self.path(&format!("{name}.crt")), pem::encode_certificates(certificates.iter().copied()))
            .unwrap();
        if let Some(key) = key {
            let text = pem::encode_private_key(key.pkcs8_der().expose());
            std::fs::write(self.path(&format!("{name}.key")), text.expose()).unwrap();
        }
    }

    fn open(&self, cert: &str, key: &str, bundle: &str) -> Result<Disk, PluginError> {
        let path = |name: &str| if name.is_empty() { String::new() } else { self.path(name).display().to_string() };
        let text = format!(
            "cert_file_path = \"{}\"\nkey_file_path = \"{}\"\nbundle_file_path = \"{}\"",
            path(cert),
            path(key),
            path(bundle)
        );
        Disk::new(&finial_hcl::parse(&text).unwrap(), &self.context())
    }

    async fn root(&self, ttl: i64) -> (X509Ca, PrivateKey) {
        let key = PrivateKey::generate(KeyType::EcP384).unwrap();
        let template = CaTemplate {
            subject: &DistinguishedName::of(&["US"], &["UPSTREAM"], ""),
            // Another trust domain, as in SPIRE's example: it does not matter.
            trust_domain: &TrustDomain::parse("local").unwrap(),
            not_before: NOW - 10,
            not_after: NOW + ttl,
            serial: SerialNumber::new(7),
        };
        (X509Ca::self_sign(Arc::new(key.clone()), &template).await.unwrap(), key)
    }

    async fn csr(&self, key: &PrivateKey) -> Vec<u8> {
        create_ca_csr(key, &DistinguishedName::ca_default().with_serial_number("42"), &self.trust_domain).await.unwrap()
    }
}

finial_plugin::upstream_authority_conformance!({
    let pki = Pki::new();
    let (root, key) = pki.root(100_000).await;
    pki.write("root", &[root.certificate()], Some(&key));
    let upstream = Arc::new(pki.open("root.crt", "root.key", "").unwrap());
    // The files may go: what was read last serves on.
    finial_plugin::conformance::UpstreamAuthorityFixture { upstream, trust_domain: pki.trust_domain.clone(), now: NOW }
});

fn error(result: Result<Disk, PluginError>) -> String {
    result.err().expect("refused").message
}

#[tokio::test]
async fn a_root_on_disk_signs_what_the_server_asks_for() {
    let pki = Pki::new();
    let (root, key) = pki.root(1000).await;
    pki.write("root", &[root.certificate()], Some(&key));
    let disk = pki.open("root.crt", "root.key", "").unwrap();
    let own = PrivateKey::generate(KeyType::EcP256).unwrap();
    let minted = disk.mint_x509_ca(&pki.csr(&own).await, 600).await.unwrap();
    assert_eq!((minted.chain.len(), minted.roots.as_slice()), (1, &[root.certificate().clone()][..]));
    let ca = Certificate::parse(minted.chain[0].clone()).unwrap();
    assert_eq!((ca.not_before(), ca.not_after()), (NOW - 10, NOW + 600));
    assert_eq!(ca.uri_sans()[0].as_ref(), "spiffe://example.org");
    assert_eq!(ca.subject().unwrap().parts().serial_number, "42");
    assert_eq!(ca.authority_key_id(), Some(&root.subject_key_id()[..]));
    assert!(ca.is_ca() && ca.public_key().unwrap() == *own.public_key());
    let late = disk.mint_x509_ca(&pki.csr(&own).await, 5000).await.unwrap();
    assert_eq!(
        Certificate::parse(late.chain[0].clone()).unwrap().not_after(),
        NOW + 1000,
        "never longer than its issuer"
    );
}

#[tokio::test]
async fn an_intermediate_on_disk_goes_into_the_chain_and_needs_its_root() {
    let pki = Pki::new();
    let (root, root_key) = pki.root(10_000).await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let template = CaTemplate {
        subject: &DistinguishedName::of(&["US"], &["MIDDLE"], ""),
        trust_domain: &pki.trust_domain,
        not_before: NOW - 10,
        not_after: NOW + 5000,
        serial: SerialNumber::new(8),
    };
    let middle = root.issue_ca(key.public_key(), &template).await.unwrap();
    pki.write("middle", &[&middle], Some(&key));
    pki.write("root", &[root.certificate()], Some(&root_key));
    let disk = pki.open("middle.crt", "middle.key", "root.crt").unwrap();
    let own = PrivateKey::generate(KeyType::EcP256).unwrap();
    let minted = disk.mint_x509_ca(&pki.csr(&own).await, 0).await.unwrap();
    assert_eq!(minted.chain[1..], [middle]);
    assert_eq!(Certificate::parse(minted.chain[0].clone()).unwrap().not_after(), NOW + 3600);
    let alone = pki.open("middle.crt", "middle.key", "").unwrap().mint_x509_ca(&pki.csr(&own).await, 0).await.unwrap();
    assert_eq!((alone.chain.len(), alone.roots), (1, vec![minted.chain[1].clone()]), "without a bundle it is the root");
    pki.clock.advance(6000);
    let files = ["middle.crt", "middle.key", "root.crt"].map(|name| pki.path(name).display().to_string()).join(", ");
    let refused = format!(
        "unable to load upstream CA: certificate cannot be validated with the provided bundle or is not self-signed: \
         certificate has expired (X509-SVID section 5.1) ({files})"
    );
    assert_eq!(error(pki.open("middle.crt", "middle.key", "root.crt")), refused);
}

#[tokio::test]
async fn wrong_files_are_named() {
    let pki = Pki::new();
    let (root, key) = pki.root(1000).await;
    let (other, _) = pki.root(1000).await;
    pki.write("root", &[root.certificate()], Some(&key));
    pki.write("other", &[other.certificate()], None);
    pki.write("two", &[root.certificate(), other.certificate()], None);
    std::fs::write(pki.path("garbage"), "nothing").unwrap();
    assert_eq!(error(pki.open("", "root.key", "")), "'cert_file_path' and 'key_file_path' must be set and not empty");
    for (cert, key, bundle, want) in [
        ("none", "root.key", "", "unable to load upstream CA cert: "),
        ("garbage", "root.key", "", "unable to load upstream CA cert: "),
        ("root.crt", "garbage", "", "unable to load upstream CA key: "),
        ("root.crt", "root.key", "none", "unable to load upstream CA bundle: "),
        ("two.crt", "root.key", "", "with no bundle_file_path configured only self-signed CAs are supported"),
        ("other.crt", "root.key", "", "unable to load upstream CA: certificate and private key do not match"),
        ("root.crt", "root.key", "other.crt", "unable to load upstream CA: certificate cannot be validated"),
    ] {
        let error = error(pki.open(cert, key, bundle));
        let at_fault = [cert, key].iter().any(|name| error.contains(&pki.path(name).display().to_string()));
        let at_fault = at_fault || error.contains("bundle");
        assert!(error.starts_with(want) && at_fault, "{error}");
    }
}

#[tokio::test]
async fn replaced_files_are_used_and_damaged_ones_are_not() {
    let pki = Pki::new();
    let (first, first_key) = pki.root(1000).await;
    pki.write("root", &[first.certificate()], Some(&first_key));
    let disk = pki.open("root.crt", "root.key", "").unwrap();
    let csr = pki.csr(&PrivateKey::generate(KeyType::EcP256).unwrap()).await;
    let (second, second_key) = pki.root(1000).await;
    pki.write("root", &[second.certificate()], Some(&second_key));
    assert_eq!(disk.mint_x509_ca(&csr, 60).await.unwrap().roots, [second.certificate().clone()]);
    std::fs::write(pki.path("root.key"), "").unwrap();
    assert_eq!(disk.mint_x509_ca(&csr, 60).await.unwrap().roots, [second.certificate().clone()]);
}

#[tokio::test]
async fn requests_that_are_not_the_servers_are_refused() {
    let pki = Pki::new();
    let (root, key) = pki.root(1000).await;
    pki.write("root", &[root.certificate()], Some(&key));
    let disk = pki.open("root.crt", "root.key", "").unwrap();
    let own = PrivateKey::generate(KeyType::EcP256).unwrap();
    let foreign = TrustDomain::parse("other.org").unwrap();
    let foreign = create_ca_csr(&own, &DistinguishedName::ca_default(), &foreign).await.unwrap();
    let mut forged = pki.csr(&own).await;
    if let Some(last) = forged.last_mut() {
        *last ^= 1;
    }
    for (csr, want) in [
        (foreign, "unable to sign CSR: CSR with SPIFFE ID \"spiffe://other.org\" is invalid"),
        (forged, "unable to sign CSR: CSR signature check failed"),
        (b"garbage".to_vec(), "unable to sign CSR: unable to parse CSR"),
    ] {
        let message = disk.mint_x509_ca(&csr, 60).await.unwrap_err().message;
        assert!(message.starts_with(want), "{message}");
    }
}

#[tokio::test]
async fn a_root_without_key_usage_signs_as_under_spire() {
    // openssl makes such roots unless it is told otherwise.
    let made = testkit::fake::Pki::new();
    let context = PluginContext {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        clock: Arc::new(finial_core::SystemClock),
    };
    let text = format!("cert_file_path = \"{}\"\nkey_file_path = \"{}\"", made.path("ca.crt"), made.path("ca.key"));
    let disk = Disk::new(&finial_hcl::parse(&text).unwrap(), &context).unwrap();
    let csr = Pki::new().csr(&PrivateKey::generate(KeyType::EcP256).unwrap()).await;
    let minted = disk.mint_x509_ca(&csr, 600).await.unwrap();
    assert!(Certificate::parse(minted.roots[0].clone()).unwrap().key_usage().is_none());
}
