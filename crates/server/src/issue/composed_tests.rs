use super::*;
use crate::compose::Composers;
use crate::issue::{JwtRequest, X509Request};
use crate::testing::{START, World, trust_domain};
use async_trait::async_trait;
use finial_core::{ErrorKind, KeyType, SpiffeId};
use finial_crypto::{Extension, Oid, PrivateKey, jwt_svid_times, verify_x509_svid};
use finial_plugin::{CredentialComposer, PluginError, X509CaAttributes};
use serde_json::{Map, json};
use std::time::Duration;

fn oid(text: &str) -> Oid {
    Oid::parse(text).unwrap()
}

fn extension(id: &str, value: &[u8]) -> Extension {
    Extension { id: oid(id), critical: false, value: value.to_vec() }
}

/// Writes its name wherever it may, and spoils what it is told to.
#[derive(Default)]
struct Scribe {
    name: &'static str,
    spoils: &'static str,
}

impl Scribe {
    fn svid(&self, mut attributes: X509SvidAttributes) -> Result<X509SvidAttributes, PluginError> {
        attributes.subject.organizational_unit.push(self.name.into());
        attributes.subject.extra_names.push((oid("2.5.4.45"), self.name.into()));
        attributes.dns_names.push(format!("{}.example.org", self.name));
        let id = format!("1.3.6.1.4.1.99999.{}", self.name.len());
        attributes.extra_extensions.push(extension(&id, b"\x05\x00"));
        match self.spoils {
            "refuse" => return Err(PluginError::denied("not today")),
            "id" => {
                let other = b"\x30\x1c\x86\x1aspiffe://example.org/other";
                attributes.extra_extensions.push(extension("2.5.29.17", other));
            }
            "ca" => attributes.extra_extensions.push(extension("2.5.29.19", b"\x30\x03\x01\x01\xff")),
            "usage" => attributes.extra_extensions.push(extension("2.5.29.15", b"\x03\x02\x02\x04")),
            "purpose" => {
                let client = b"\x30\x0a\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x02";
                attributes.extra_extensions.push(extension("2.5.29.37", client));
            }
            "twice" => attributes.extra_extensions.push(extension(&id, b"\x05\x00")),
            "dns" => attributes.dns_names.push("no name".into()),
            _ => {}
        }
        Ok(attributes)
    }
}

#[async_trait]
impl CredentialComposer for Scribe {
    fn name(&self) -> &str {
        self.name
    }

    async fn server_x509_ca(&self, mut attributes: X509CaAttributes) -> Result<X509CaAttributes, PluginError> {
        attributes.subject.organizational_unit.push(self.name.into());
        attributes.policies.push(oid(&format!("1.2.{}", if self.spoils == "policy" { 4 } else { self.name.len() })));
        if self.spoils == "usage" {
            attributes.extra_extensions.push(extension("2.5.29.15", b"\x03\x02\x02\x24"));
        }
        Ok(attributes)
    }

    async fn server_x509_svid(&self, attributes: X509SvidAttributes) -> Result<X509SvidAttributes, PluginError> {
        self.svid(attributes)
    }

    async fn agent_x509_svid(
        &self,
        holder: Holder<'_>,
        mut attributes: X509SvidAttributes,
    ) -> Result<X509SvidAttributes, PluginError> {
        assert!(holder.id.is_agent());
        attributes.subject.organizational_unit = vec!["FOLLOWS-666".into()];
        for unit in ["FOLLOWS-667", self.name] {
            attributes.subject.extra_names.push((oid("2.5.4.11"), format!("{unit}+")));
        }
        self.svid(attributes)
    }

    async fn workload_x509_svid(
        &self,
        holder: Holder<'_>,
        attributes: X509SvidAttributes,
    ) -> Result<X509SvidAttributes, PluginError> {
        assert!(!holder.id.is_agent() && holder.public_key.key_type() == Some(KeyType::EcP256));
        self.svid(attributes)
    }

    async fn workload_jwt_svid(
        &self,
        id: &SpiffeId,
        mut claims: Map<String, Value>,
    ) -> Result<Map<String, Value>, PluginError> {
        assert_eq!(claims["sub"], id.as_str());
        let seen = claims.get("seen").cloned().unwrap_or_else(|| json!([]));
        let seen = [seen.as_array().unwrap().clone(), vec![json!(self.name)]].concat();
        claims.insert("seen".into(), json!(seen));
        claims.insert("exp".into(), json!(claims["exp"].as_f64().unwrap()));
        let (name, value) = match self.spoils {
            "hang" => {
                std::future::pending::<()>().await;
                unreachable!()
            }
            "sub" => ("sub", json!("spiffe://example.org/other")),
            "exp" => ("exp", json!(START)),
            "no exp" => ("exp", Value::Null),
            "nbf" => ("nbf", json!(START + 1)),
            "aud" => ("aud", json!([])),
            "empty aud" => ("aud", json!(["a", ""])),
            "iat" => ("iat", json!("yesterday")),
            _ => return Ok(claims),
        };
        claims.insert(name.into(), value);
        Ok(claims)
    }
}

fn with(scribes: impl IntoIterator<Item = (&'static str, &'static str)>) -> World {
    let scribe = |(name, spoils)| Arc::new(Scribe { name, spoils }) as Arc<dyn CredentialComposer>;
    World { composers: Composers::new(scribes.into_iter().map(scribe).collect()), ..World::new() }
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::new(&trust_domain(), path).unwrap()
}

fn key() -> PrivateKey {
    PrivateKey::generate(KeyType::EcP256).unwrap()
}

#[tokio::test]
async fn composers_have_their_say_in_order() {
    let world = with([("one", ""), ("three", "")]);
    let process = world.start().await;
    let issuer = world.issuer(&process.authorities);
    let (workload, agent, key) = (id("/db"), id("/spire/agent/x"), key());
    let dns_names = ["db.example.org".to_owned()];
    let request = X509Request {
        id: &workload,
        public_key: key.public_key(),
        dns_names: &dns_names,
        ttl_seconds: 0,
        subject: None,
    };
    let svid = issuer.workload_x509_svid(&request).await.unwrap();
    let roots = process.feed.own().unwrap().roots.clone().unwrap();
    assert_eq!(verify_x509_svid(&svid.chain, &roots, START).unwrap(), workload);
    let leaf = Certificate::parse(svid.chain[0].clone()).unwrap();
    // A SET has its elements in the order of their bytes.
    assert_eq!(leaf.subject().unwrap().to_string(), "CN=db.example.org,OU=one+OU=three,O=SPIRE,C=US");
    let dns: Vec<_> = leaf.dns_names().iter().map(|n| &**n).collect();
    assert_eq!(dns, ["db.example.org", "one.example.org", "three.example.org"]);
    let holds = |part: &[u8]| svid.chain[0].windows(part.len()).any(|w| w == part);
    assert!(holds(b"\x06\x03\x55\x04\x2d\x13\x03one") && holds(b"\x06\x03\x55\x04\x2d\x13\x05three"));
    assert!(holds(b"\x2b\x06\x01\x04\x01\x86\x8d\x1f\x03\x04\x02\x05\x00"), "1.3.6.1.4.1.99999.3");

    let server = issuer.server_x509_svid(key.public_key()).await.unwrap();
    let server = Certificate::parse(server.chain[0].clone()).unwrap();
    assert_eq!(server.subject().unwrap().parts().organizational_unit, ["one", "three"]);
    let svid = issuer.agent_x509_svid_following(&agent, key.public_key(), &["7".into()]).await.unwrap();
    let leaf = Certificate::parse(svid.chain[0].clone()).unwrap();
    assert_eq!(*crate::issue::follows(&leaf), ["7".into()], "only the server writes what an agent follows");
    let units = leaf.subject().unwrap().parts().organizational_unit.clone();
    assert!(["one+", "three+"].iter().all(|unit| units.iter().any(|other| other == unit)), "{units:?}");

    let jwt = JwtRequest { id: &workload, audience: &["a".into()], ttl_seconds: 60, include_jti: false };
    let token = issuer.jwt_svid(&jwt).await.unwrap();
    assert_eq!((token.issued_at, token.expires_at), (START, START + 60));
    assert_eq!(jwt_svid_times(&token.token).unwrap(), (START, START + 60), "whole numbers, for verifiers");
    let claims = token.token.split('.').nth(1).unwrap();
    let claims = base64::Engine::decode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, claims).unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    assert_eq!(claims["seen"], json!(["one", "three"]));
    assert!(claims["exp"].is_i64(), "{claims}");
}

#[tokio::test]
async fn authorities_of_all_kinds_are_composed() {
    let world = with([("one", "")]);
    let process = world.start().await;
    let ca = process.authorities.x509().unwrap().ca.parsed().clone();
    let subject = ca.subject().unwrap();
    assert_eq!(subject.parts().organizational_unit, ["one"]);
    assert_eq!(subject.parts().serial_number, ca.serial_decimal());
    let policies = b"\x06\x03\x55\x1d\x20\x04\x08\x30\x06\x30\x04\x06\x02\x2a\x03";
    let holds = |der: &[u8]| der.windows(policies.len()).any(|w| w == policies);
    assert!(holds(ca.der()), "the policies stand in the certificate");
    let below = world.issuer(&process.authorities).downstream_ca(&id("/below"), key().public_key(), 0).await.unwrap();
    let below = Certificate::parse(below.chain[0].clone()).unwrap();
    assert_eq!(below.subject().unwrap().parts().organizational_unit, ["one", "DOWNSTREAM-1"]);
    assert!(holds(below.der()));
    let error = with([("one", "policy"), ("two", "policy")]).load().await.unwrap().manager.start().await.unwrap_err();
    assert_eq!(error.to_string(), "credentialcomposer(two): a certificate policy is there twice");
    let error = with([("one", "usage")]).load().await.unwrap().manager.start().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid X509 CA: only keyCertSign, cRLSign, or digitalSignature key usage can be set"
    );
}

#[tokio::test]
async fn what_composers_spoil_is_not_issued() {
    let (workload, key) = (id("/db"), key());
    for (spoils, expected) in [
        ("refuse", "credentialcomposer(three): not today"),
        (
            "id",
            "invalid workload X509-SVID: invalid X509-SVID: expected URI SAN \"spiffe://example.org/db\" but got \"spiffe://example.org/other\"",
        ),
        ("ca", "invalid workload X509-SVID: invalid X509-SVID: cA constraint must not be set"),
        ("usage", "invalid workload X509-SVID: invalid X509-SVID: digitalSignature key usage must be set"),
        ("purpose", "invalid workload X509-SVID: invalid X509-SVID: missing serverAuth extended key usage"),
        ("twice", "invalid workload X509-SVID: invalid X509-SVID: extension 1.3.6.1.4.1.99999.5 is there twice"),
        ("dns", "failed to sign X509 SVID: DNS name \"no name\" is not valid"),
    ] {
        let process = with([("one", "")]).start().await;
        let issuer = with([("one", ""), ("three", spoils)]).issuer(&process.authorities);
        let request =
            X509Request { id: &workload, public_key: key.public_key(), dns_names: &[], ttl_seconds: 0, subject: None };
        let error = issuer.workload_x509_svid(&request).await.unwrap_err();
        match spoils {
            "twice" => {
                assert!(error.to_string().starts_with("invalid workload X509-SVID: invalid X509-SVID: "), "{error}")
            }
            _ => assert_eq!(error.to_string(), expected),
        }
        assert_eq!(error.kind() == ErrorKind::Denied, spoils == "refuse");
        assert!(issuer.server_x509_svid(key.public_key()).await.is_err());
        issuer.self_test().await.expect("the authority is not to blame");
    }
}

#[tokio::test]
async fn claims_that_composers_spoil_are_not_issued() {
    let workload = id("/db");
    let process = World::new().start().await;
    for (spoils, expected) in [
        ("sub", "\"sub\" claim: expected \"spiffe://example.org/db\" but got \"spiffe://example.org/other\""),
        ("exp", "\"exp\" claim: already expired as of 2023-11-14T22:13:20Z"),
        ("no exp", "\"exp\" claim: required but missing"),
        ("nbf", "\"nbf\" claim: not yet valid until 2023-11-14T22:13:21Z"),
        ("aud", "\"aud\" claim: required but missing"),
        ("empty aud", "\"aud\" claim: contains empty value"),
        ("iat", "\"iat\" claim: not a number"),
    ] {
        let issuer = with([("one", spoils)]).issuer(&process.authorities);
        let jwt = JwtRequest { id: &workload, audience: &["a".into()], ttl_seconds: 60, include_jti: true };
        let error = issuer.jwt_svid(&jwt).await.unwrap_err();
        assert_eq!(error.to_string(), format!("invalid JWT-SVID {expected}"));
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_hangs_costs_its_deadline() {
    let process = World::new().start().await;
    let issuer = with([("one", "hang")]).issuer(&process.authorities);
    let workload = id("/db");
    let jwt = JwtRequest { id: &workload, audience: &["a".into()], ttl_seconds: 60, include_jti: false };
    let asked = tokio::time::timeout(Duration::from_secs(31), issuer.jwt_svid(&jwt)).await.expect("in time");
    let error = asked.unwrap_err();
    assert_eq!(error.to_string(), "credentialcomposer(one): no answer within 30 s");
    assert_eq!(error.kind(), ErrorKind::Timeout);
}
