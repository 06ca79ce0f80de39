//! Bundles with everything that is derived from them, made once when they change.

use bytes::Bytes;
use finial_core::{Bundle, JwtAuthority, TrustDomain, X509Authority};
use finial_crypto::bundle::{jwt_bundle_json, readable, wit_bundle_json};
use finial_crypto::{Certificate, JwtKeys, KeyError, ParseError, TrustRoots, pem};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

/// A bundle in all the forms in which it is asked for.
pub(crate) struct BundleForms {
    pub(crate) bundle: Bundle,
    /// `spiffe://TD`, the key in the Workload API's maps.
    pub(crate) id: String,
    /// The X.509 roots, DER, one after the other.
    pub(crate) x509: Bytes,
    x509_pem: OnceLock<Bytes>,
    /// The JWT keys as a JWK set.
    pub(crate) jwks: Bytes,
    /// The WIT keys likewise.
    pub(crate) wit_jwks: String,
    pub(crate) roots: Arc<TrustRoots>,
    pub(crate) jwt_keys: Arc<JwtKeys>,
}

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadBundle {
    #[error("X.509 authority: {0}")]
    X509(#[from] ParseError),
    #[error("JWT authority: {0}")]
    Jwt(#[from] KeyError),
}

impl BundleForms {
    pub(crate) fn new(bundle: Bundle) -> Result<Self, BadBundle> {
        // One that we cannot read must not take the rest of its trust domain with it, here or at a workload.
        let (readable, unusable) = readable(&bundle);
        for error in unusable {
            tracing::warn!(trust_domain_id = %bundle.trust_domain, %error, "Unusable authority in bundle");
        }
        if readable.x509_authorities.is_empty() {
            // If none can be read something is wrong with the bundle: what is known of the domain stays.
            TrustRoots::from_bundle(&bundle)?;
        }
        Ok(Self {
            id: bundle.trust_domain.id_string(),
            x509: readable
                .x509_authorities
                .iter()
                .flat_map(|root| root.der.iter())
                .copied()
                .collect::<Vec<u8>>()
                .into(),
            x509_pem: OnceLock::new(),
            jwks: jwt_bundle_json(&readable).into(),
            wit_jwks: wit_bundle_json(&readable),
            roots: Arc::new(TrustRoots::from_bundle(&readable)?),
            jwt_keys: Arc::new(JwtKeys::from_bundle(&readable)?),
            bundle,
        })
    }

    /// The X.509 roots, PEM.
    pub(crate) fn x509_pem(&self) -> Bytes {
        let ders = || self.roots.certificates().iter().map(|root| &root.der()[..]);
        self.x509_pem.get_or_init(|| pem::encode_certificates(ders()).into()).clone()
    }

    /// Subject key IDs of tainted X.509 authorities.
    pub(crate) fn tainted_x509(&self) -> Vec<Vec<u8>> {
        self.x509_ids(|authority| authority.tainted)
    }

    fn x509_ids(&self, which: impl Fn(&X509Authority) -> bool) -> Vec<Vec<u8>> {
        let authorities = self.bundle.x509_authorities.iter().filter(|a| which(a));
        authorities.filter_map(|a| Some(Certificate::parse(a.der.clone()).ok()?.subject_key_id()?.to_vec())).collect()
    }

    /// Authorities that are no longer in the bundle that follows this one.
    pub(crate) fn gone_in(&self, next: &Self) -> Gone {
        let has = next.x509_ids(|_| true);
        let ids = |keys: &[JwtAuthority], next: &[JwtAuthority]| {
            let gone = keys.iter().filter(|key| next.iter().all(|other| other.key_id != key.key_id));
            gone.map(|key| key.key_id.clone()).collect()
        };
        Gone {
            x509: self.x509_ids(|_| true).into_iter().filter(|id| !has.contains(id)).collect(),
            jwt: ids(&self.bundle.jwt_authorities, &next.bundle.jwt_authorities),
            wit: ids(&self.bundle.wit_authorities, &next.bundle.wit_authorities),
        }
    }

    /// Key IDs of tainted JWT authorities.
    pub(crate) fn tainted_jwt(&self) -> Vec<String> {
        self.bundle.jwt_authorities.iter().filter(|a| a.tainted).map(|a| a.key_id.clone()).collect()
    }
}

impl BundleForms {
    /// Key IDs of tainted WIT authorities.
    pub(crate) fn tainted_wit(&self) -> Vec<String> {
        self.bundle.wit_authorities.iter().filter(|a| a.tainted).map(|a| a.key_id.clone()).collect()
    }
}

/// Key IDs of authorities that were revoked, or whose time is over.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Gone {
    pub(crate) x509: Vec<Vec<u8>>,
    pub(crate) jwt: Vec<String>,
    pub(crate) wit: Vec<String>,
}

impl std::fmt::Debug for BundleForms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BundleForms({})", self.id)
    }
}

/// The agent's own bundle and the federated ones.
#[derive(Clone, Debug)]
pub(crate) struct Bundles {
    pub(crate) own: Arc<BundleForms>,
    pub(crate) federated: BTreeMap<TrustDomain, Arc<BundleForms>>,
}

impl Bundles {
    /// All of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<BundleForms>> {
        std::iter::once(&self.own).chain(self.federated.values())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::KeyType;
    use finial_crypto::PrivateKey;

    #[tokio::test]
    async fn one_root_that_cannot_be_read_costs_only_itself() {
        let template = finial_crypto::CaTemplate {
            subject: &finial_crypto::DistinguishedName::ca_default(),
            trust_domain: &TrustDomain::parse("td").unwrap(),
            not_before: 0,
            not_after: 2_000_000_000,
            serial: finial_crypto::SerialNumber::new(1),
        };
        let key = Arc::new(PrivateKey::generate(KeyType::EcP256).unwrap());
        let ca = finial_crypto::X509Ca::self_sign(key, &template).await.unwrap();
        let good = X509Authority { der: ca.certificate().clone(), tainted: false };
        let bad = X509Authority { der: b"not a certificate"[..].into(), tainted: false };
        let mut bundle = Bundle::empty(TrustDomain::parse("td").unwrap());
        bundle.x509_authorities = vec![bad.clone(), good.clone()];
        let forms = BundleForms::new(bundle.clone()).unwrap();
        assert_eq!(forms.roots.certificates().len(), 1);
        assert_eq!(&forms.x509[..], &good.der[..], "workloads' libraries refuse a list with garbage in it");
        assert_eq!(forms.bundle, bundle, "compared with what the server sends next");
        bundle.x509_authorities = vec![bad];
        assert!(BundleForms::new(bundle.clone()).is_err(), "better what is known than nothing");
        bundle.x509_authorities.clear();
        assert!(BundleForms::new(bundle).is_ok(), "a domain may have no X.509 authorities");
    }

    #[test]
    fn what_a_bundle_has_no_longer_is_gone() {
        use crate::testing::TestCa;
        let (one, two) = (TestCa::new("td"), TestCa::new("td"));
        let forms = |roots: &[&TestCa], keys: &[&str]| {
            let mut bundle = crate::cache::testing::bundle("td", keys).bundle.clone();
            let root = |ca: &&TestCa| X509Authority { der: ca.root.clone(), tainted: false };
            bundle.x509_authorities = roots.iter().map(root).collect();
            bundle.wit_authorities = bundle.jwt_authorities.clone();
            BundleForms::new(bundle).unwrap()
        };
        let before = forms(&[&one, &two], &["k1", "k2"]);
        let id = Certificate::parse(one.root.clone()).unwrap().subject_key_id().unwrap().to_vec();
        let keys = || vec!["k1".to_owned()];
        let gone = before.gone_in(&forms(&[&two], &["k2", "k3"]));
        assert_eq!(gone, Gone { x509: vec![id], jwt: keys(), wit: keys() });
        assert_eq!(before.gone_in(&forms(&[&two, &one], &["k2", "k1"])), Gone::default());
    }

    #[test]
    fn one_key_of_another_kind_costs_only_itself() {
        // Ed25519, which SPIRE's bundles may hold (RFC 8410, section 10.1).
        let other = "302a300506032b657003210019bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1";
        let other: Vec<u8> =
            (0..other.len()).step_by(2).map(|i| u8::from_str_radix(&other[i..i + 2], 16).unwrap()).collect();
        let good = PrivateKey::generate(KeyType::EcP256).unwrap().public_key().spki_der().clone();
        let key = |key_id: &str, public_key: Arc<[u8]>| JwtAuthority {
            key_id: key_id.into(),
            public_key,
            expires_at: 0,
            tainted: false,
        };
        let mut bundle = Bundle::empty(TrustDomain::parse("td").unwrap());
        bundle.jwt_authorities = vec![key("other", other.into()), key("good", good)];
        let forms = BundleForms::new(bundle.clone()).unwrap();
        assert!(forms.jwt_keys.key("good").is_some() && forms.jwt_keys.key("other").is_none());
        let jwks = String::from_utf8(forms.jwks.to_vec()).unwrap();
        assert!(jwks.contains("\"good\"") && !jwks.contains("\"other\""), "{jwks}");
        assert_eq!(forms.bundle, bundle, "compared with what the server sends next");
    }
}
