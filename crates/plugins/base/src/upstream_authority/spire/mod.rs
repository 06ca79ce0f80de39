//! `spire`: a server of the same trust domain, SPIRE's or ours, stands above this one. It signs this server's X.509 authorities
//! as those of a downstream server, takes this server's JWT and WIT keys into the bundle, and says what the bundle is.

mod identity;
mod link;
#[cfg(test)]
mod tests;

use async_trait::async_trait;
use finial_core::{Bundle, ErrorKind, JwtAuthority};
use finial_crypto::tls::KeyExchange;
use finial_crypto::{Certificate, PublicKey, TrustRoots};
use finial_hcl::Value;
use finial_plugin::{
    MintedX509Ca, PluginContext, PluginError, UpstreamAuthorities, UpstreamAuthority, all_given, decode,
};
use finial_proto::convert::{bundle_from_proto, jwt_key_to_proto, kind_of, wit_key_to_proto};
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::bundle::{GetBundleRequest, PublishJwtAuthorityRequest, PublishWitAuthorityRequest};
use finial_proto::server::svid::NewDownstreamX509caRequest;
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::types;
use link::Link;
use serde::Deserialize;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Code, Status};

/// How often a server that does not push is asked for the bundle, as by SPIRE.
const POLL: Duration = Duration::from_secs(5);
/// A bundle older than the last is a late answer, of one of several servers. Persisting for so long, it is the new truth: the
/// upstream server's datastore was put back.
const OLDER: Duration = Duration::from_secs(60);
/// Largest message taken from the server above, bytes.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    server_address: String,
    server_port: String,
    workload_api_socket: String,
    experimental: Experimental,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Experimental {
    workload_api_named_pipe_name: String,
    require_pq_kem: bool,
}

impl Config {
    fn check(&self) -> Result<(), PluginError> {
        let pipe = &self.experimental.workload_api_named_pipe_name;
        let socket = if pipe.is_empty() { &self.workload_api_socket } else { pipe };
        let needed = [
            (&self.server_address, "server_address"),
            (&self.server_port, "server_port"),
            (socket, "workload_api_socket"),
        ];
        all_given(needed, |name| format!("{name} is required"))?;
        if self.server_port.parse::<u16>().is_err() {
            return Err(PluginError::invalid(format!(
                "server_port {:?} is not the number of a port",
                self.server_port
            )));
        }
        if !self.experimental.workload_api_named_pipe_name.is_empty() {
            return Err(PluginError::invalid(
                "configuration: workload_api_named_pipe_name is not supported on this platform; please use \
                 workload_api_socket instead",
            ));
        }
        Ok(())
    }
}

/// The `spire` upstream authority.
pub struct Spire {
    link: Link,
    heard: Mutex<Heard>,
}

/// What was heard of the bundle above.
struct Heard {
    /// When to ask next.
    due: Instant,
    /// What was told last, and the bundle's number.
    told: Option<(u64, UpstreamAuthorities)>,
    /// Since when older ones come.
    older: Option<Instant>,
}

impl Spire {
    /// The name in configuration.
    pub const NAME: &'static str = "spire";

    /// Connects to nothing yet.
    ///
    /// # Errors
    /// When the configuration is incomplete.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        config.check()?;
        let socket = config.workload_api_socket.trim_start_matches("unix://").trim_start_matches("unix:");
        let socket = std::path::absolute(Path::new(socket))
            .map_err(|e| PluginError::invalid(format!("unable to set Workload API address: {e}")))?;
        Ok(Self::to(format!("{}:{}", config.server_address, config.server_port), socket, &config.experimental, context))
    }

    fn to(address: String, socket: PathBuf, experimental: &Experimental, context: &PluginContext) -> Self {
        let link = Link {
            address,
            socket,
            trust_domain: context.trust_domain.clone(),
            exchange: KeyExchange::post_quantum(experimental.require_pq_kem),
            clock: context.clock.clone(),
            open: tokio::sync::Mutex::default(),
        };
        Self { link, heard: Mutex::new(Heard { due: Instant::now(), told: None, older: None }) }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the server above answered with makes no sense.
    fn wrong(&self, what: &str, why: &dyn std::fmt::Display) -> PluginError {
        PluginError::internal(format!("{what}: upstream server {}: {why}", self.link.address))
    }

    /// A bundle of the server above, looked into: what is not right in it would be passed on to every workload below.
    fn read(&self, what: &str, wire: &types::Bundle) -> Result<Bundle, PluginError> {
        let bundle = bundle_from_proto(wire).map_err(|e| self.wrong(what, &e))?;
        if bundle.trust_domain != self.link.trust_domain {
            let text = format!("it answered with the bundle of another trust domain, {}", bundle.trust_domain);
            return Err(self.wrong(what, &text));
        }
        TrustRoots::from_bundle(&bundle).map_err(|e| self.wrong(what, &format!("a root that is none: {e}")))?;
        for key in bundle.jwt_authorities.iter().chain(&bundle.wit_authorities) {
            PublicKey::from_spki(&key.public_key)
                .map_err(|e| self.wrong(what, &format!("a key that is none: {:?}: {e}", key.key_id)))?;
        }
        Ok(bundle)
    }

    /// The bundle above, with a root at least.
    async fn bundle(&self) -> Result<Bundle, PluginError> {
        let what = "failed to fetch bundle from upstream server";
        let call = |channel| async {
            let mut client = BundleClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            client.get_bundle(GetBundleRequest::default()).await
        };
        let bundle = self.read(what, &self.link.call(what, call).await?)?;
        if bundle.x509_authorities.is_empty() {
            return Err(self.wrong(what, &"its bundle has no X.509 authorities"));
        }
        Ok(bundle)
    }

    /// What is to be told of a bundle, if anything is.
    fn news(&self, bundle: Bundle) -> Option<UpstreamAuthorities> {
        let heard = &mut *self.heard();
        let sequence = bundle.sequence_number;
        let news = UpstreamAuthorities {
            x509: bundle.x509_authorities,
            jwt: bundle.jwt_authorities,
            wit: bundle.wit_authorities,
            put_back: false,
        };
        let mut put_back = false;
        match &mut heard.told {
            Some((last, _)) if sequence < *last => {
                if heard.older.get_or_insert_with(Instant::now).elapsed() < OLDER {
                    return None;
                }
                tracing::warn!(
                    "The upstream server's bundle is older than before, for a minute: its datastore was put back"
                );
                put_back = true;
            }
            Some((last, told)) if *told == news => {
                *last = sequence;
                heard.older = None;
                return None;
            }
            // The number grows with each change: another one was lost in between.
            Some((last, _)) if sequence == *last => put_back = true,
            _ => {}
        }
        heard.older = None;
        heard.told = Some((sequence, news.clone()));
        Some(UpstreamAuthorities { put_back, ..news })
    }

    /// The keys of an answer; of which kind is for the caller to know.
    fn keys(&self, what: &str, keys: Vec<types::JwtKey>) -> Result<Vec<JwtAuthority>, PluginError> {
        let trust_domain = self.link.trust_domain.as_str().to_owned();
        let wire = types::Bundle { trust_domain, jwt_authorities: keys, ..Default::default() };
        Ok(self.read(what, &wire)?.jwt_authorities)
    }
}

#[async_trait]
impl UpstreamAuthority for Spire {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        let what = "unable to request a new Downstream X509CA";
        let preferred_ttl = i32::try_from(ttl_seconds).unwrap_or(i32::MAX);
        let request = NewDownstreamX509caRequest { csr: csr.to_vec().into(), preferred_ttl };
        let call = |channel| {
            let request = request.clone();
            async {
                let mut client = SvidClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
                client.new_downstream_x509ca(request).await
            }
        };
        let minted = self.link.call(what, call).await?;
        let chain: Vec<Arc<[u8]>> = minted.ca_cert_chain.iter().map(|der| Arc::from(&der[..])).collect();
        if chain.is_empty() {
            return Err(self.wrong(what, &"it answered without a certificate"));
        }
        for der in &chain {
            Certificate::parse(der.clone())
                .map_err(|e| self.wrong(what, &format!("unable to parse CA cert chain: {e}")))?;
        }
        // The answer has roots too, and does not say which are tainted.
        let roots = self.bundle().await?.x509_authorities;
        let good: Vec<_> = roots.iter().filter(|root| !root.tainted).map(|root| root.der.clone()).collect();
        Ok(MintedX509Ca { chain, roots: good })
    }

    async fn publish_jwt_key(&self, key: &JwtAuthority) -> Result<Vec<JwtAuthority>, PluginError> {
        let what = "failed to push JWT authority";
        let request = PublishJwtAuthorityRequest { jwt_authority: Some(jwt_key_to_proto(key)) };
        let call = |channel| {
            let request = request.clone();
            async { BundleClient::new(channel).publish_jwt_authority(request).await }
        };
        self.keys(what, self.link.call(what, call).await?.jwt_authorities)
    }

    async fn publish_wit_key(&self, key: &JwtAuthority) -> Result<Vec<JwtAuthority>, PluginError> {
        let what = "failed to push WIT authority";
        let request = PublishWitAuthorityRequest { wit_authority: Some(wit_key_to_proto(key)) };
        let call = |channel| {
            let request = request.clone();
            async { BundleClient::new(channel).publish_wit_authority(request).await }
        };
        let keys = self.link.call(what, call).await?.wit_authorities;
        let keys = keys.into_iter().map(|key| types::JwtKey {
            public_key: key.public_key,
            key_id: key.key_id,
            expires_at: key.expires_at,
            tainted: key.tainted,
        });
        self.keys(what, keys.collect())
    }

    async fn next_authorities(&self) -> Result<UpstreamAuthorities, PluginError> {
        loop {
            let due = self.heard().due;
            tokio::time::sleep_until(due).await;
            let bundle = self.bundle().await;
            self.heard().due = Instant::now() + POLL;
            if let Some(news) = self.news(bundle?) {
                return Ok(news);
            }
        }
    }
}

/// A call that failed, as grpc-go words it, with the reason for which there was no connection.
fn rpc_failure(what: &str, status: &Status) -> PluginError {
    let text = connection_failure(status).unwrap_or_else(|| status.message().to_owned());
    let kind = match status.code() {
        // What we sent was refused: our own fault, not the caller's.
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::Internal,
        code => kind_of(code),
    };
    PluginError::new(kind, format!("{what}: rpc error: code = {:?} desc = {text}", status.code()))
}

/// Why there was no connection, if there was none: the handshake that failed, or the innermost cause.
fn connection_failure(status: &Status) -> Option<String> {
    let mut next = status.source();
    let mut last = None;
    while let Some(error) = next {
        let inside = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls: Option<&rustls::Error> = error.downcast_ref().or_else(|| inside.and_then(|e| e.downcast_ref()));
        if let Some(tls) = tls {
            let reason = finial_crypto::tls::explain(tls);
            return Some(format!("connection error: authentication handshake failed: {reason}"));
        }
        last = Some(error);
        next = error.source();
    }
    last.map(|error| format!("connection error: {error}"))
}
