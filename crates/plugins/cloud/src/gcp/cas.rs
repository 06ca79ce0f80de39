//! `gcp_cas`: a CA of Google's Certificate Authority Service signs. Of those with the configured label the one that ends first
//! does; the roots of all of them are the trust domain's, so that a CA can be replaced.

use super::good;
use super::token::Tokens;
use crate::world::{Failure, Remote, World, encode, encode_path, patiently, unquoted};
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD as BASE64URL};
use bytes::Bytes;
use finial_core::UnixSeconds;
use finial_crypto::{Csr, pem};
use finial_hcl::Value;
use finial_plugin::{MintedX509Ca, PluginContext, PluginError, UpstreamAuthority, all_given, check_ca_csr, decode};
use http::Method;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, json};
use std::sync::Arc;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

const URL: &str = "https://privateca.googleapis.com";
/// The lifetime of what is signed when the server has no preference.
const DEFAULT_TTL_SECONDS: i64 = 3600;
/// Most pages of a list that are read.
const PAGES_MAX: usize = 50;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    root_cert_spec: Spec,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Spec {
    project_name: String,
    region_name: String,
    ca_pool: String,
    label_key: String,
    label_value: String,
}

/// The `gcp_cas` upstream authority.
pub struct Cas {
    spec: Spec,
    remote: Remote,
    tokens: Tokens,
    world: World,
    context: PluginContext,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pool {
    name: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Authority {
    name: String,
    state: String,
    create_time: String,
    /// Such as `315360000s`.
    lifetime: String,
    pem_ca_certificates: Vec<String>,
}

impl Authority {
    fn ends(&self) -> UnixSeconds {
        let created = OffsetDateTime::parse(&self.create_time, &Rfc3339).map_or(0, OffsetDateTime::unix_timestamp);
        let lifetime = self.lifetime.trim_end_matches('s').split('.').next().and_then(|s| s.parse().ok());
        created.saturating_add(lifetime.unwrap_or(0))
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Issued {
    pem_certificate: String,
    pem_certificate_chain: Vec<String>,
}

impl Cas {
    /// The name in configuration.
    pub const NAME: &'static str = "gcp_cas";

    /// With SPIRE's keys. Nobody is asked yet.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        Self::within(data, URL, context, &World::new(context)?)
    }

    pub(super) fn within(data: &Value, url: &str, context: &PluginContext, world: &World) -> Result<Self, PluginError> {
        let Config { root_cert_spec: spec } = decode(data)?;
        all_given(
            [
                (&spec.project_name, "Project"),
                (&spec.region_name, "Location"),
                (&spec.label_key, "LabelKey"),
                (&spec.label_value, "LabelValue"),
            ],
            |key| format!("plugin configuration root_cert_spec.{key} is missing"),
        )?;
        if spec.ca_pool.is_empty() {
            tracing::warn!(
                "The ca_pool value is not configured. Falling back to searching the region for matching CAs. The ca_pool \
                 configurable will be required in a future release."
            );
        }
        let (remote, tokens) = (world.remote(url)?, Tokens::new(""));
        Ok(Self { spec, remote, tokens, world: world.clone(), context: context.clone() })
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<&str>) -> Result<T, Failure> {
        let once = || async {
            let token = self.tokens.get(&self.world).await?;
            let bearer = format!("Bearer {}", token.expose());
            let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
            let body = Bytes::from(body.unwrap_or_default().to_owned());
            let answer = good(&self.remote, self.remote.ask(method.clone(), path, &headers, body).await?)?;
            self.remote.json(&answer)
        };
        match patiently(&once).await {
            Err(e) if e.status() == Some(401) => {
                self.tokens.forget().await;
                once().await
            }
            done => done,
        }
    }

    /// All pages of a list; `query` begins with `&` if there is one.
    async fn list<T: DeserializeOwned>(&self, path: &str, field: &str, query: &str) -> Result<Vec<T>, Failure> {
        let mut found = Vec::new();
        let mut page = String::new();
        for _ in 0..PAGES_MAX {
            let path = format!("/v1/{}?pageSize=20{query}&pageToken={}", encode_path(path), encode(&page));
            let mut answer: Map<String, serde_json::Value> = self.ask(Method::GET, &path, None).await?;
            let items = answer.remove(field).unwrap_or_else(|| json!([]));
            let items: Vec<T> =
                serde_json::from_value(items).map_err(|e| self.remote.odd(format!("{field}: {}", unquoted(&e))))?;
            found.extend(items);
            match answer.get("nextPageToken").and_then(|token| token.as_str()) {
                Some(next) if !next.is_empty() => next.clone_into(&mut page),
                _ => return Ok(found),
            }
        }
        Err(self.remote.odd(format!("{field}: more than {PAGES_MAX} pages")))
    }

    /// All CAs with the label; they are of one pool.
    async fn authorities(&self) -> Result<Vec<Authority>, Failure> {
        let spec = &self.spec;
        let region = format!("projects/{}/locations/{}", spec.project_name, spec.region_name);
        let pools = match spec.ca_pool.as_str() {
            "" => self.list::<Pool>(&format!("{region}/caPools"), "caPools", "").await?,
            pool => vec![Pool { name: format!("{region}/caPools/{pool}") }],
        };
        let filter = format!("&filter={}", encode(&format!("labels.{}:{}", spec.label_key, spec.label_value)));
        let mut found = Vec::new();
        for pool in pools {
            let path = format!("{}/certificateAuthorities", pool.name);
            let more: Vec<Authority> = self.list(&path, "certificateAuthorities", &filter).await?;
            if !found.is_empty() && !more.is_empty() {
                return Err(self
                    .remote
                    .odd("found authorities with matching labels across multiple pools; set ca_pool"));
            }
            found.extend(more);
        }
        Ok(found)
    }

    /// Those that may sign, the one that does first.
    async fn enabled(&self) -> Result<(Authority, Vec<Authority>), PluginError> {
        let label = format!("label pair {:?}:{:?}", self.spec.label_key, self.spec.label_value);
        let none = |what| PluginError::invalid(format!("no certificate authorities found {what} {label}"));
        let mut all = self.authorities().await.map_err(|e| e.of("failed to load root CAs"))?;
        if all.is_empty() {
            return Err(none("with"));
        }
        all.retain(|authority| authority.state == "ENABLED");
        all.sort_by_key(Authority::ends);
        let mut all = all.into_iter();
        let first = all.next().ok_or_else(|| none("in ENABLED state with"))?;
        Ok((first, all.collect()))
    }

    async fn create(&self, authority: &Authority, csr: &Csr, ttl_seconds: i64) -> Result<Issued, PluginError> {
        let odd = |why: &str| self.remote.odd(why).of("failed to create certificate");
        let (pool, id) = authority.name.rsplit_once('/').ok_or_else(|| odd("a CA has no name"))?;
        let pool = pool.strip_suffix("/certificateAuthorities").ok_or_else(|| odd("a CA is in no pool"))?;
        // The enterprise tier wants a name for the certificate: one that is of its key.
        let certificate_id = BASE64URL.encode(sha256(csr.public_key().spki_der()));
        let request = uuid::Uuid::new_v4();
        let path = format!(
            "/v1/{}/certificates?certificateId={certificate_id}&issuingCertificateAuthorityId={}&requestId={request}",
            encode_path(pool),
            encode(id)
        );
        let subject = csr.subject().map_err(|e| PluginError::invalid(format!("unable to parse CSR: {e}")))?;
        let parts = subject.parts();
        let first = |values: &[String]| values.first().cloned().unwrap_or_default();
        let key = pem::encode_public_key(csr.public_key());
        let config = json!({
            "publicKey": { "format": "PEM", "key": BASE64.encode(key) },
            "subjectConfig": {
                "subject": {
                    "commonName": parts.common_name,
                    "organization": first(&parts.organization),
                    "organizationalUnit": first(&parts.organizational_unit),
                    "locality": first(&parts.locality),
                    "province": first(&parts.province),
                },
                "subjectAltName": { "uris": csr.uri_sans() },
            },
            "x509Config": {
                "caOptions": { "isCa": true, "maxIssuerPathLength": 0 },
                "keyUsage": { "baseKeyUsage": { "certSign": true, "crlSign": true } },
            },
        });
        let body = json!({ "lifetime": format!("{ttl_seconds}s"), "config": config }).to_string();
        let issued = self.ask(Method::POST, &path, Some(&body)).await;
        issued.map_err(|e| e.of("failed to create certificate"))
    }

    fn certificate(&self, text: &str, what: &str) -> Result<Arc<[u8]>, PluginError> {
        let odd = |why: &dyn std::fmt::Display| self.remote.odd(why).of(what);
        let mut found = pem::certificates(text.as_bytes()).map_err(|e| odd(&e))?.into_iter();
        found.next().ok_or_else(|| odd(&"there is none"))
    }
}

fn sha256(data: &[u8]) -> aws_lc_rs::digest::Digest {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, data)
}

#[async_trait]
impl UpstreamAuthority for Cas {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        let csr = check_ca_csr(csr, &self.context.trust_domain)?;
        let ttl_seconds = if ttl_seconds > 0 { ttl_seconds } else { DEFAULT_TTL_SECONDS };
        let (signing, others) = self.enabled().await?;
        let issued = self.create(&signing, &csr, ttl_seconds).await?;
        let mut chain = vec![self.certificate(&issued.pem_certificate, "failed to parse certificate from response")?];
        let Some((root, between)) = issued.pem_certificate_chain.split_last() else {
            return Err(PluginError::internal("got no certificates in the chain"));
        };
        let what = "failed to parse certificate chain from response";
        for text in between {
            chain.push(self.certificate(text, what)?);
        }
        let mut roots = vec![self.certificate(root, what)?];
        // A CA with the label may be an intermediate one: its root is the last of its own chain.
        for other in others {
            let last = other.pem_ca_certificates.last().map(String::as_str).unwrap_or_default();
            let root = self.certificate(last, &format!("failed to parse certificate of CA {}", other.name))?;
            if !roots.contains(&root) {
                roots.push(root);
            }
        }
        Ok(MintedX509Ca { chain, roots })
    }
}
