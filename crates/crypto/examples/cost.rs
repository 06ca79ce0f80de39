//! What the hot paths cost: `cargo run --release -p finial-crypto --example cost`. AWS-LC is optimised in every profile.

use finial_core::{Bundle, JwtAuthority, KeyType, SpiffeId, TrustDomain};
use finial_crypto::*;
use std::sync::Arc;
use std::time::Instant;

const NOW: i64 = 1_800_000_000;
const ROUNDS: u32 = 200;
const BATCHES: u32 = 50;

#[allow(clippy::print_stdout)]
fn time(name: &str, mut work: impl FnMut() -> bool) {
    // The best of several batches: other programs on the machine only ever make it slower.
    let (mut best, mut good) = (f64::INFINITY, true);
    for _ in 0..BATCHES {
        let start = Instant::now();
        good &= (0..ROUNDS).all(|_| work());
        best = best.min(start.elapsed().as_secs_f64() * 1e6 / f64::from(ROUNDS));
    }
    println!("{name:40} {best:8.2} us {}", if good { "" } else { "FAILED" });
}

struct Keys(Arc<JwtKeys>);
impl JwtKeySource for Keys {
    fn jwt_keys(&self, _: &str) -> Option<Arc<JwtKeys>> {
        Some(self.0.clone())
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ca_key = PrivateKey::generate(KeyType::EcP256)?;
    let td = TrustDomain::parse("example.org")?;
    let template = CaTemplate {
        subject: &DistinguishedName::ca_default(),
        trust_domain: &td,
        not_before: NOW,
        not_after: NOW + 86_400,
        serial: SerialNumber::random(),
    };
    let ca = X509Ca::self_sign(Arc::new(ca_key.clone()), &template).await?;
    let key = PrivateKey::generate(KeyType::EcP256)?;
    let id = SpiffeId::parse("spiffe://example.org/ns/default/sa/web")?;
    let csr = create_csr(&key, None, Some(&id), &[]).await?;
    let subject = DistinguishedName::svid_default();
    let svid = |public_key: &PublicKey| {
        ca.issue_svid_now(&SvidTemplate {
            id: &id,
            public_key,
            subject: &subject,
            dns_names: &[],
            not_before: NOW,
            not_after: NOW + 3600,
            serial: SerialNumber::random(),
        })
    };
    let leaf = svid(key.public_key()).ok_or("remote")??;
    let roots = TrustRoots::new([ca.certificate()])?;
    let aud = ["db".to_owned()];
    let authority = JwtAuthoritySigner::new(Arc::new(ca_key.clone()), &random_key_id());
    let claims = JwtSvidClaims { aud: &aud, exp: NOW + 300, iat: NOW, iss: None, jti: None, sub: &id };
    let token = authority.sign_now(&claims).ok_or("remote")??;
    let mut bundle = Bundle::empty(td);
    bundle.jwt_authorities.push(JwtAuthority {
        key_id: authority.key_id().into(),
        public_key: ca_key.public_key().spki_der().clone(),
        expires_at: 0,
        tainted: false,
    });
    let keys = Keys(Arc::new(JwtKeys::from_bundle(&bundle)?));

    time("raw ECDSA P-256 signature", || key.sign_now(SignatureAlgorithm::EcdsaP256Sha256, &leaf).is_ok());
    time("generate a P-256 key", || PrivateKey::generate(KeyType::EcP256).is_ok());
    time("parse a CSR", || Csr::parse(&csr).is_ok());
    time("parse a CSR, proof of possession", || Csr::parse(&csr).is_ok_and(|c| c.verify_proof_of_possession().is_ok()));
    time("issue an X.509-SVID", || svid(key.public_key()).is_some_and(|r| r.is_ok()));
    time("CSR, proof, X.509-SVID", || {
        Csr::parse(&csr)
            .is_ok_and(|c| c.verify_proof_of_possession().is_ok() && svid(c.public_key()).is_some_and(|r| r.is_ok()))
    });
    time("parse a certificate", || Certificate::parse(leaf.clone()).is_ok());
    time("verify an X.509-SVID", || verify_x509_svid(&[&leaf], &roots, NOW).is_ok());
    time("sign a JWT-SVID", || authority.sign_now(&claims).is_some_and(|r| r.is_ok()));
    time("verify a JWT-SVID", || verify_jwt_svid(&token, &keys, &aud, NOW).is_ok());
    Ok(())
}
