//! Tokens for Azure, from where Azure's own libraries take them by default: an application's secret, a workload's token that the
//! tenant trusts, or the identity of the machine.

use crate::oauth::{self, Token};
use crate::world::{Failure, World, encode, read_word};
use finial_core::{Secret, UnixSeconds};
use finial_plugin::Renewed;
use std::sync::Arc;

/// What the tokens are for.
const RESOURCE: &str = "https://storage.azure.com";
const AUTHORITY: &str = "https://login.microsoftonline.com";
const IMDS: &str = "http://169.254.169.254";

/// An application of a tenant with a secret of its own.
pub(super) struct Application {
    pub(super) tenant: String,
    pub(super) id: String,
    pub(super) secret: Secret<String>,
}

/// Tokens of one identity.
pub(super) struct Tokens {
    /// None for what the environment has.
    application: Option<Application>,
    kept: Renewed<Secret<String>>,
}

fn wrong(why: impl Into<String>) -> Failure {
    Failure::Credentials(why.into())
}

impl Tokens {
    pub(super) fn new(application: Option<Application>) -> Self {
        Self { application, kept: Renewed::default() }
    }

    /// One that is good now.
    pub(super) async fn get(&self, world: &World) -> Result<Arc<Secret<String>>, Failure> {
        self.kept.get(world.now(), self.fetch(world)).await.map_err(Failure::of_credentials)
    }

    async fn fetch(&self, world: &World) -> Result<(Secret<String>, UnixSeconds), Failure> {
        let token = match &self.application {
            Some(application) => of_application(world, application).await?,
            None => by_default(world).await?,
        };
        Ok(token.dated(world.now()))
    }

    /// The one that is kept was refused.
    pub(super) async fn forget(&self) {
        self.kept.forget().await;
    }
}

async fn by_default(world: &World) -> Result<Token, Failure> {
    let (tenant, id) = (world.env("AZURE_TENANT_ID"), world.env("AZURE_CLIENT_ID"));
    if let (Some(tenant), Some(id)) = (tenant, id) {
        if let Some(secret) = world.env("AZURE_CLIENT_SECRET").map(Secret::new) {
            return of_application(world, &Application { tenant, id, secret }).await;
        }
        if let Some(file) = world.env("AZURE_FEDERATED_TOKEN_FILE") {
            // Read each time: the file's owner replaces it.
            let token = read_word(&file).await;
            let token = token.map_err(|e| wrong(format!("the token {file} cannot be read: {e}")))?;
            let kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
            let proof = [("client_assertion_type", kind), ("client_assertion", token.expose().as_str())];
            return granted(world, &tenant, &id, &proof).await;
        }
    }
    of_machine(world).await.map_err(|e| {
        let looked = "none in the environment (AZURE_CLIENT_SECRET or AZURE_FEDERATED_TOKEN_FILE with AZURE_CLIENT_ID and \
                      AZURE_TENANT_ID)";
        wrong(format!("no Azure credentials: none configured, {looked}, and the machine has no identity: {e}"))
    })
}

async fn of_application(world: &World, application: &Application) -> Result<Token, Failure> {
    let proof = [("client_secret", application.secret.expose().as_str())];
    granted(world, &application.tenant, &application.id, &proof).await
}

async fn granted(world: &World, tenant: &str, id: &str, proof: &[(&str, &str)]) -> Result<Token, Failure> {
    let authority = world.env("AZURE_AUTHORITY_HOST").unwrap_or_else(|| AUTHORITY.to_owned());
    let remote = world.remote(authority.trim_end_matches('/')).map_err(|e| wrong(e.message))?;
    let scope = format!("{RESOURCE}/.default");
    let fields = [&[("grant_type", "client_credentials"), ("client_id", id), ("scope", &scope)], proof].concat();
    oauth::granted(&remote, &format!("/{}/oauth2/v2.0/token", encode(tenant)), &fields).await
}

/// The managed identity of an app service or a virtual machine.
async fn of_machine(world: &World) -> Result<Token, Failure> {
    let client = world.env("AZURE_CLIENT_ID").map(|id| format!("&client_id={}", encode(&id))).unwrap_or_default();
    let resource = encode(RESOURCE);
    let (url, query, header) = match (world.env("IDENTITY_ENDPOINT"), world.env("IDENTITY_HEADER")) {
        (Some(url), Some(header)) => {
            (url, format!("?api-version=2019-08-01&resource={resource}{client}"), ("x-identity-header", header))
        }
        _ => {
            let host = world.env("AZURE_POD_IDENTITY_AUTHORITY_HOST").unwrap_or_else(|| IMDS.to_owned());
            let url = format!("{}/metadata/identity/oauth2/token", host.trim_end_matches('/'));
            (url, format!("?api-version=2018-02-01&resource={resource}{client}"), ("metadata", "true".to_owned()))
        }
    };
    let remote = world.near(&url).map_err(|e| wrong(e.message))?;
    oauth::of_machine(&remote, &query, (header.0, &header.1)).await
}
