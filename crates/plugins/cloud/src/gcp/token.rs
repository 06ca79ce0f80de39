//! Tokens for Google's services, from where Google's own libraries take them: a service account's file, what
//! `GOOGLE_APPLICATION_CREDENTIALS` names, what `gcloud` left, or the metadata service.

use crate::oauth::{self, Token};
use crate::world::{Failure, World, read_aside, unquoted};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use finial_core::{Secret, UnixSeconds};
use finial_crypto::{SignatureAlgorithm, Signer, pem};
use finial_plugin::Renewed;
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;

/// All that the owner of a credential may do; what that is, its roles say.
const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";
const TOKEN_URI: &str = "https://oauth2.googleapis.com/token";
const METADATA_HOST: &str = "169.254.169.254";
/// How long an assertion is good for, the longest that Google takes.
const ASSERTION_SECONDS: i64 = 3600;

/// Tokens of one credential.
pub(super) struct Tokens {
    /// Of a service account; empty for what the environment has.
    file: String,
    kept: Renewed<Secret<String>>,
}

/// What a file of credentials holds; which fields, its type tells.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Credential {
    ServiceAccount {
        client_email: String,
        #[serde(default)]
        private_key_id: String,
        #[serde(deserialize_with = "finial_plugin::secret")]
        private_key: Secret<String>,
        #[serde(default)]
        token_uri: String,
    },
    AuthorizedUser {
        client_id: String,
        #[serde(deserialize_with = "finial_plugin::secret")]
        client_secret: Secret<String>,
        #[serde(deserialize_with = "finial_plugin::secret")]
        refresh_token: Secret<String>,
    },
    #[serde(other)]
    Other,
}

fn wrong(why: impl Into<String>) -> Failure {
    Failure::Credentials(why.into())
}

impl Tokens {
    pub(super) fn new(file: &str) -> Self {
        Self { file: file.to_owned(), kept: Renewed::default() }
    }

    /// One that is good now.
    pub(super) async fn get(&self, world: &World) -> Result<Arc<Secret<String>>, Failure> {
        self.kept.get(world.now(), self.fetch(world)).await.map_err(Failure::of_credentials)
    }

    /// The one that is kept was refused.
    pub(super) async fn forget(&self) {
        self.kept.forget().await;
    }

    async fn fetch(&self, world: &World) -> Result<(Secret<String>, UnixSeconds), Failure> {
        let variable = "GOOGLE_APPLICATION_CREDENTIALS";
        let token = match (self.file.as_str(), world.env(variable)) {
            ("", Some(path)) => of_file(world, &path, variable, true).await?,
            ("", None) => {
                let gcloud =
                    world.env("HOME").map(|home| format!("{home}/.config/gcloud/application_default_credentials.json"));
                match gcloud.filter(|path| std::path::Path::new(path).exists()) {
                    Some(path) => of_file(world, &path, "gcloud", true).await?,
                    None => of_machine(world).await?,
                }
            }
            (path, _) => of_file(world, path, "service_account_file", false).await?,
        };
        Ok(token.dated(world.now()))
    }
}

async fn of_file(world: &World, path: &str, named_by: &str, any: bool) -> Result<Token, Failure> {
    let bad = |why: &dyn std::fmt::Display| wrong(format!("Google credentials {path} (by {named_by}): {why}"));
    let bytes = read_aside(path).await.map_err(|e| bad(&e))?;
    match serde_json::from_slice(bytes.expose()).map_err(|e| bad(&unquoted(&e)))? {
        Credential::ServiceAccount { client_email, private_key_id, private_key, token_uri } => {
            let uri = if token_uri.is_empty() { TOKEN_URI.to_owned() } else { token_uri };
            let key = pem::private_key(private_key.expose().as_bytes()).map_err(|e| bad(&e))?;
            let now = world.now();
            let header = json!({ "alg": "RS256", "typ": "JWT", "kid": private_key_id });
            let claims = json!({
                "iss": client_email, "scope": SCOPE, "aud": uri, "iat": now, "exp": now.saturating_add(ASSERTION_SECONDS),
            });
            let part = |value: serde_json::Value| BASE64URL.encode(value.to_string());
            let signed = format!("{}.{}", part(header), part(claims));
            let signature = key.sign(SignatureAlgorithm::RsaPkcs1Sha256, signed.as_bytes()).await;
            let signature = BASE64URL.encode(signature.map_err(|e| bad(&format!("the key cannot sign: {e}")))?);
            let assertion = Secret::new(format!("{signed}.{signature}"));
            let grant = "urn:ietf:params:oauth:grant-type:jwt-bearer";
            granted(world, &uri, &[("grant_type", grant), ("assertion", assertion.expose())]).await
        }
        Credential::AuthorizedUser { client_id, client_secret, refresh_token } if any => {
            let fields = [
                ("grant_type", "refresh_token"),
                ("client_id", client_id.as_str()),
                ("client_secret", client_secret.expose().as_str()),
                ("refresh_token", refresh_token.expose().as_str()),
            ];
            granted(world, TOKEN_URI, &fields).await
        }
        Credential::AuthorizedUser { .. } => Err(bad(&"it is a user's; a service account's is wanted")),
        Credential::Other => Err(bad(&"its type is not supported: service_account and authorized_user are")),
    }
}

async fn granted(world: &World, uri: &str, fields: &[(&str, &str)]) -> Result<Token, Failure> {
    let remote = world.remote(uri).map_err(|e| wrong(format!("token_uri: {}", e.message)))?;
    oauth::granted(&remote, "", fields).await
}

/// Of the machine, container or function that this runs in.
async fn of_machine(world: &World) -> Result<Token, Failure> {
    let host = world.env("GCE_METADATA_HOST").unwrap_or_else(|| METADATA_HOST.to_owned());
    let remote = world.near(&format!("http://{host}")).map_err(|e| wrong(e.message))?;
    let path = "/computeMetadata/v1/instance/service-accounts/default/token";
    oauth::of_machine(&remote, path, ("metadata-flavor", "Google")).await.map_err(|e| {
        let looked = "GOOGLE_APPLICATION_CREDENTIALS is not set, gcloud has left none";
        wrong(format!(
            "no Google credentials: none configured, {looked}, and the machine's metadata service has none: {e}"
        ))
    })
}
