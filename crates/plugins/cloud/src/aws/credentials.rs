//! Where the keys come from, in the order in which AWS's own libraries look: configuration, a named profile, the environment, a
//! token of a web identity (Kubernetes), the shared files, a container's and at last the machine's metadata service.

use super::profile::Profile;
use super::service::{Name, endpoint_given, refusal, usual_host};
use super::sigv4::{self, Keys, Request, Scope};
use crate::world::{Failure, Remote, World, element, form, patiently, read_word};
use bytes::Bytes;
use finial_core::{Secret, UnixSeconds};
use finial_crypto::sha256_hex;
use finial_net::rest::Answer;
use finial_plugin::Renewed;
use http::{Method, StatusCode};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Profiles lead to others at most so often.
const PROFILES_MAX: usize = 5;
/// Keys that do not say when they end are looked up anew after this long: files and variables may change.
const LOOK_AGAIN_SECONDS: i64 = 600;
/// What AWS's audit log shows of who took a role.
const SESSION_NAME: &str = "finial";
const IMDS: &str = "http://169.254.169.254";
const CONTAINER: &str = "http://169.254.170.2";

type Dated = (Keys, UnixSeconds);

/// Keys that are good now.
pub(super) struct Credentials {
    given: Option<Keys>,
    /// The role to take with them.
    role: Option<String>,
    region: String,
    kept: Renewed<Keys>,
}

fn wrong(why: impl Into<String>) -> Failure {
    Failure::Credentials(why.into())
}

impl Credentials {
    /// Those of configuration if it names both halves; the role is taken in that region.
    pub(super) fn new(id: &str, secret: &Secret<String>, token: &Secret<String>, region: &str) -> Self {
        let given = (!id.is_empty() && !secret.expose().is_empty()).then(|| Keys {
            id: id.to_owned(),
            secret: secret.clone(),
            token: Some(token.clone()).filter(|token| !token.expose().is_empty()),
        });
        Self { given, role: None, region: region.to_owned(), kept: Renewed::default() }
    }

    /// To take this role with them, if it is one.
    pub(super) fn assuming(self, role: &str) -> Self {
        Self { role: Some(role.to_owned()).filter(|role| !role.is_empty()), ..self }
    }

    /// The keys.
    pub(super) async fn keys(&self, world: &World) -> Result<Arc<Keys>, Failure> {
        self.kept.get(world.now(), self.fetch(world)).await.map_err(Failure::of_credentials)
    }

    async fn fetch(&self, world: &World) -> Result<Dated, Failure> {
        let source = match &self.given {
            Some(keys) => (copied(keys), world.now() + LOOK_AGAIN_SECONDS),
            None => chain(world, &self.region).await?,
        };
        match &self.role {
            Some(role) => assume_role(world, &self.region, role, &source.0, None).await,
            None => Ok(source),
        }
    }

    /// Those that are kept were refused.
    pub(super) async fn forget(&self) {
        self.kept.forget().await;
    }
}

fn copied(keys: &Keys) -> Keys {
    Keys { id: keys.id.clone(), secret: keys.secret.clone(), token: keys.token.clone() }
}

/// The first place that has some. A place that is named and has none is an error, not a reason to look further.
async fn chain(world: &World, region: &str) -> Result<Dated, Failure> {
    if let Some(name) = Profile::name(world) {
        let found = by_profile(world, region, &name).await?;
        return found.ok_or_else(|| wrong(format!("AWS profile {name:?} has no credentials")));
    }
    if let Some(found) = in_environment(world) {
        return Ok(found);
    }
    if let Some(file) = world.env("AWS_WEB_IDENTITY_TOKEN_FILE") {
        let role = world.env("AWS_ROLE_ARN");
        let role = role.ok_or_else(|| wrong("AWS_WEB_IDENTITY_TOKEN_FILE is set, and AWS_ROLE_ARN is not"))?;
        return web_identity(world, region, &role, &file).await;
    }
    if let Some(found) = by_profile(world, region, "default").await? {
        return Ok(found);
    }
    let metadata = match container_url(world)? {
        Some(url) => container(world, &url).await,
        None => instance(world).await,
    };
    metadata.map_err(|e| {
        wrong(format!("no AWS credentials: none configured, none in the environment or the shared files, and {e}"))
    })
}

/// The keys of a profile, taking its role with those of others. None if it names no source at all.
async fn by_profile(world: &World, region: &str, name: &str) -> Result<Option<Dated>, Failure> {
    let mut roles = Vec::new();
    let mut name = name.to_owned();
    let source = loop {
        if roles.len() >= PROFILES_MAX {
            return Err(wrong(format!("AWS profile {name:?}: source_profile leads too far")));
        }
        let Some(profile) = Profile::find(world, &name).await.map_err(wrong)? else {
            return if roles.is_empty() { Ok(None) } else { Err(wrong(format!("there is no AWS profile {name:?}"))) };
        };
        let get = |key| profile.get(key).map(str::to_owned);
        let external_id = get("external_id");
        match (get("role_arn"), get("source_profile"), get("web_identity_token_file")) {
            (Some(role), _, Some(file)) => break Some(web_identity(world, region, &role, &file).await?),
            (Some(role), Some(next), None) if next != name => {
                roles.push((role, external_id));
                name = next;
                continue;
            }
            (Some(role), Some(_), None) => {
                roles.push((role, external_id));
                break in_file(world, &profile);
            }
            (Some(role), None, None) => {
                roles.push((role, external_id));
                break Some(credential_source(world, &name, profile.get("credential_source")).await?);
            }
            (None, ..) => {}
        }
        match in_file(world, &profile) {
            None if ["sso_session", "sso_start_url", "credential_process"].iter().any(|k| profile.get(k).is_some()) => {
                let what = "single sign-on and credential_process are not supported for servers";
                return Err(wrong(format!("AWS profile {name:?}: {what}; use keys, a role or a web identity")));
            }
            found => break found,
        }
    };
    let Some(mut source) = source else {
        return if roles.is_empty() { Ok(None) } else { Err(wrong(format!("AWS profile {name:?} has no keys"))) };
    };
    for (role, external_id) in roles.iter().rev() {
        source = assume_role(world, region, role, &source.0, external_id.as_deref()).await?;
    }
    Ok(Some(source))
}

fn in_file(world: &World, profile: &Profile) -> Option<Dated> {
    let id = profile.get("aws_access_key_id")?.to_owned();
    let secret = Secret::new(profile.get("aws_secret_access_key")?.to_owned());
    let token = profile.get("aws_session_token").map(|token| Secret::new(token.to_owned()));
    Some((Keys { id, secret, token }, world.now() + LOOK_AGAIN_SECONDS))
}

fn in_environment(world: &World) -> Option<Dated> {
    let (id, secret) = (world.env("AWS_ACCESS_KEY_ID")?, Secret::new(world.env("AWS_SECRET_ACCESS_KEY")?));
    let token = world.env("AWS_SESSION_TOKEN").map(Secret::new);
    Some((Keys { id, secret, token }, world.now() + LOOK_AGAIN_SECONDS))
}

async fn credential_source(world: &World, profile: &str, source: Option<&str>) -> Result<Dated, Failure> {
    match source {
        Some("Ec2InstanceMetadata") => instance(world).await,
        Some("EcsContainer") => match container_url(world)? {
            Some(url) => container(world, &url).await,
            None => Err(wrong(format!("AWS profile {profile:?} wants a container's credentials, and there are none"))),
        },
        Some("Environment") => in_environment(world).ok_or_else(|| {
            wrong(format!("AWS profile {profile:?} wants credentials of the environment, and there are none"))
        }),
        Some(other) => Err(wrong(format!("AWS profile {profile:?}: unknown credential_source {other:?}"))),
        None => Err(wrong(format!("AWS profile {profile:?} has a role and no source_profile or credential_source"))),
    }
}

/// What metadata services answer.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    #[serde(default)]
    code: Option<String>,
    access_key_id: String,
    #[serde(deserialize_with = "finial_plugin::secret")]
    secret_access_key: Secret<String>,
    #[serde(deserialize_with = "finial_plugin::secret")]
    token: Secret<String>,
    expiration: String,
}

fn read(remote: &Remote, answer: &Answer) -> Result<Dated, Failure> {
    let document: Document = remote.json(answer)?;
    if let Some(code) = document.code.filter(|code| code != "Success") {
        return Err(remote.refused(answer.status, code, ""));
    }
    let ends = ends(remote, &document.expiration)?;
    let keys = Keys { id: document.access_key_id, secret: document.secret_access_key, token: Some(document.token) };
    Ok((keys, ends))
}

fn ends(remote: &Remote, text: &str) -> Result<UnixSeconds, Failure> {
    let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|e| remote.odd(format!("expiration {text:?}: {e}")))?;
    Ok(time.unix_timestamp())
}

fn good(remote: &Remote, answer: Answer) -> Result<Answer, Failure> {
    if answer.status == StatusCode::OK { Ok(answer) } else { Err(remote.refused(answer.status, "", "")) }
}

/// Where a container's metadata service is, if there is one.
fn container_url(world: &World) -> Result<Option<String>, Failure> {
    if let Some(path) = world.env("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") {
        return Ok(Some(format!("{CONTAINER}{path}")));
    }
    let Some(url) = world.env("AWS_CONTAINER_CREDENTIALS_FULL_URI") else { return Ok(None) };
    let uri: http::Uri = url.parse().map_err(|e| wrong(format!("AWS_CONTAINER_CREDENTIALS_FULL_URI {url:?}: {e}")))?;
    let host = uri.host().unwrap_or_default();
    let near = ["127.0.0.1", "localhost", "[::1]", "169.254.170.2", "169.254.170.23", "[fd00:ec2::23]"];
    if uri.scheme_str() == Some("https") || near.contains(&host) {
        return Ok(Some(url));
    }
    Err(wrong(format!("AWS_CONTAINER_CREDENTIALS_FULL_URI {url:?} is neither https nor next door")))
}

async fn container(world: &World, url: &str) -> Result<Dated, Failure> {
    let token = match world.env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE") {
        Some(path) => Some(read_word(&path).await.map_err(|e| wrong(format!("the token {path} cannot be read: {e}")))?),
        None => world.env("AWS_CONTAINER_AUTHORIZATION_TOKEN").map(Secret::new),
    };
    // The query, if there is one, belongs to the request.
    let (base, query) = url.split_once('?').map_or((url, String::new()), |(base, query)| (base, format!("?{query}")));
    let remote = world.near(base).map_err(|e| wrong(e.message))?;
    let headers: Vec<_> = token.iter().map(|token| ("authorization", token.expose().as_str())).collect();
    patiently(|| async {
        let answer = good(&remote, remote.ask(Method::GET, &query, &headers, Bytes::new()).await?)?;
        read(&remote, &answer)
    })
    .await
}

/// The role of the virtual machine, by its metadata service (version 2).
async fn instance(world: &World) -> Result<Dated, Failure> {
    if world.env("AWS_EC2_METADATA_DISABLED").is_some_and(|off| off.eq_ignore_ascii_case("true")) {
        return Err(wrong("AWS_EC2_METADATA_DISABLED is true"));
    }
    let url = world.env("AWS_EC2_METADATA_SERVICE_ENDPOINT").unwrap_or_else(|| IMDS.to_owned());
    let remote = world.near(url.trim_end_matches('/')).map_err(|e| wrong(e.message))?;
    let ttl = [("x-aws-ec2-metadata-token-ttl-seconds", "21600")];
    patiently(|| async {
        let token = good(&remote, remote.ask(Method::PUT, "/latest/api/token", &ttl, Bytes::new()).await?)?;
        let token = Secret::new(String::from_utf8_lossy(&token.body).trim().to_owned());
        let headers = [("x-aws-ec2-metadata-token", token.expose().as_str())];
        let path = "/latest/meta-data/iam/security-credentials/";
        let roles = good(&remote, remote.ask(Method::GET, path, &headers, Bytes::new()).await?)?;
        let roles = String::from_utf8_lossy(&roles.body).into_owned();
        let role = roles.lines().map(str::trim).find(|role| !role.is_empty());
        let role = role.ok_or_else(|| remote.odd("the instance has no role"))?;
        let path = format!("{path}{}", crate::world::encode(role));
        let answer = good(&remote, remote.ask(Method::GET, &path, &headers, Bytes::new()).await?)?;
        read(&remote, &answer)
    })
    .await
}

/// Takes a role, which anybody may who has a token that the role trusts.
async fn web_identity(world: &World, region: &str, role: &str, file: &str) -> Result<Dated, Failure> {
    // Read each time: the file's owner replaces it.
    let token =
        read_word(file).await.map_err(|e| wrong(format!("the web identity token {file} cannot be read: {e}")))?;
    let session = world.env("AWS_ROLE_SESSION_NAME").unwrap_or_else(|| SESSION_NAME.to_owned());
    let body = form(&[
        ("Action", "AssumeRoleWithWebIdentity"),
        ("Version", "2011-06-15"),
        ("RoleArn", role),
        ("RoleSessionName", &session),
        ("WebIdentityToken", token.expose()),
    ]);
    sts(world, region, role, &body, None).await
}

/// Takes a role with keys that may.
async fn assume_role(
    world: &World,
    region: &str,
    role: &str,
    keys: &Keys,
    external_id: Option<&str>,
) -> Result<Dated, Failure> {
    let mut fields =
        vec![("Action", "AssumeRole"), ("Version", "2011-06-15"), ("RoleArn", role), ("RoleSessionName", SESSION_NAME)];
    fields.extend(external_id.map(|id| ("ExternalId", id)));
    sts(world, region, role, &form(&fields), Some(keys)).await
}

async fn sts(world: &World, region: &str, role: &str, body: &str, keys: Option<&Keys>) -> Result<Dated, Failure> {
    let url = endpoint_given(world, Name::Sts, "");
    let url = url.map_or_else(|| usual_host(world, Name::Sts, region).map(|host| format!("https://{host}")), Ok);
    let url = url.map_err(|e| wrong(e.message))?;
    let remote = world.remote(&url).map_err(|e| wrong(e.message))?;
    let taken = patiently(|| async {
        let stamp = sigv4::stamp(world.now());
        let mut headers = BTreeMap::from([
            ("content-type".to_owned(), "application/x-www-form-urlencoded".to_owned()),
            ("host".to_owned(), remote.host().to_str().unwrap_or_default().to_owned()),
            ("x-amz-date".to_owned(), stamp.clone()),
        ]);
        if let Some(token) = keys.and_then(|keys| keys.token.as_ref()) {
            headers.insert("x-amz-security-token".to_owned(), token.expose().clone());
        }
        if let Some(keys) = keys {
            let (path, body_hash) = (format!("{}/", remote.base()), sha256_hex(body.as_bytes()));
            let request = Request { method: "POST", path: &path, query: "", headers: &headers, body_hash: &body_hash };
            let authorization = sigv4::authorization(&request, &Scope { region, service: "sts", stamp: &stamp }, keys);
            headers.insert("authorization".to_owned(), authorization);
        }
        headers.remove("host");
        let sent: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let answer = remote.ask(Method::POST, "/", &sent, body.to_owned()).await?;
        if !answer.status.is_success() {
            return Err(refusal(&remote, &answer));
        }
        let xml = Secret::new(String::from_utf8_lossy(&answer.body).into_owned());
        let part = |name| element(xml.expose(), name).ok_or_else(|| remote.odd(format!("there is no {name}")));
        let keys = Keys {
            id: part("AccessKeyId")?,
            secret: Secret::new(part("SecretAccessKey")?),
            token: Some(Secret::new(part("SessionToken")?)),
        };
        Ok((keys, ends(&remote, &part("Expiration")?)?))
    });
    taken.await.map_err(|e| wrong(format!("the role {role} cannot be taken: {e}")))
}
