//! How an agent gets its first SVID: from its data directory, or by attesting to the server.

mod bootstrap;

pub(crate) use bootstrap::Attempts;

use crate::Context;
use crate::error::{AgentError, ServerError, Verdict};
use crate::restart;
use crate::sealed::Restored;
use crate::svid::{AgentKey, AgentSvid};
use finial_core::{Bundle, ErrorKind, X509Authority};
use finial_crypto::tls::{BundleSource, PeerPolicy, ServerAuth, client_config_with};
use finial_crypto::{Certificate, TrustRoots};
use finial_net::client::tls_channel;
use finial_plugin::{AgentNodeAttestor, AttestSession, PluginError, PluginKind};
use finial_proto::convert::bundle_from_proto;
use finial_proto::server::agent::{
    AgentX509svidParams, AttestAgentRequest, AttestAgentResponse, agent_client::AgentClient, attest_agent_request,
    attest_agent_response,
};
use finial_proto::server::bundle::{GetBundleRequest, bundle_client::BundleClient};
use finial_proto::types;
use finial_runtime::log::Time;
use finial_runtime::{Backoff, Shutdown};
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// As log lines say it.
const SUBSYSTEM: &str = "attestor";

/// Between two attempts, at first.
const RETRY_FIRST: Duration = Duration::from_secs(5);
/// For how long to try.
const RETRY_FOR: Duration = Duration::from_secs(60);
/// For how long to try when the agent may bootstrap again.
const RETRY_FOR_REBOOTSTRAP: Duration = Duration::from_secs(24 * 3600);
/// How long one attestation may take.
const ATTEST_TIMEOUT: Duration = Duration::from_secs(60);
/// More challenges than this are not an attestation.
const CHALLENGES_MAX: usize = 16;

/// An agent that may begin its work.
pub(crate) struct Attested {
    pub(crate) svid: AgentSvid,
    pub(crate) bundle: Bundle,
    /// It was kept from an earlier run: no server was asked.
    pub(crate) kept: bool,
    /// What is kept besides, if it was read already: the SVID has expired, and this has not.
    pub(crate) restored: Option<Restored>,
}

enum AttestError {
    Server(ServerError),
    Other(AgentError),
}

impl From<AgentError> for AttestError {
    fn from(error: AgentError) -> Self {
        Self::Other(error)
    }
}

impl From<AttestError> for AgentError {
    fn from(error: AttestError) -> Self {
        match error {
            AttestError::Server(error) => error.into(),
            AttestError::Other(error) => error,
        }
    }
}

/// Roots that do not change.
struct Fixed {
    trust_domain: String,
    roots: Arc<TrustRoots>,
}

impl BundleSource for Fixed {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        (trust_domain == self.trust_domain).then(|| self.roots.clone())
    }
}

/// How long to go on trying, and when to try next.
pub(crate) struct Retry {
    backoff: Backoff,
    until: tokio::time::Instant,
}

impl Retry {
    pub(crate) fn new(context: &Context) -> Self {
        let never = context.settings.rebootstrap_mode == finial_config::RebootstrapMode::Never;
        Self::within(if never { RETRY_FOR } else { RETRY_FOR_REBOOTSTRAP })
    }

    fn within(total: Duration) -> Self {
        Self {
            backoff: Backoff::new(RETRY_FIRST, RETRY_FIRST * 24).shape(1.5, 0.1),
            until: tokio::time::Instant::now() + total,
        }
    }

    /// Waits before the next attempt; gives `error` back when there is none, or `None` when the agent is to end.
    pub(crate) async fn wait(
        &mut self,
        shutdown: &Shutdown,
        what: &str,
        error: AgentError,
    ) -> Result<Option<()>, AgentError> {
        let wait = self.backoff.next_wait();
        if tokio::time::Instant::now() + wait > self.until {
            return Err(error);
        }
        tracing::warn!(subsystem_name = SUBSYSTEM, %error, retry_interval = ?wait, "{what}");
        tokio::select! {
            () = tokio::time::sleep(wait) => Ok(Some(())),
            () = shutdown.cancelled() => Ok(None),
        }
    }
}

/// Gets an SVID and a bundle; tries again for a while. `None` when the agent was asked to end first.
pub(crate) async fn attest(context: &Arc<Context>) -> Result<Option<Attested>, AgentError> {
    let mut retry = Retry::new(context);
    loop {
        let attempt = async { tokio::time::timeout(ATTEST_TIMEOUT, attempt(context)).await };
        let result = tokio::select! {
            result = attempt => result,
            () = context.shutdown.cancelled() => return Ok(None),
        };
        let error = match result {
            Ok(Ok(attested)) => return Ok(Some(attested)),
            Ok(Err(error)) => AgentError::from(error),
            Err(_) => AgentError::new(ErrorKind::Timeout, "node attestation took too long"),
        };
        if error.kind() == ErrorKind::Denied {
            return Err(error);
        }
        if retry.wait(&context.shutdown, "Failed to retrieve attestation result", error).await?.is_none() {
            return Ok(None);
        }
    }
}

async fn attempt(context: &Arc<Context>) -> Result<Attested, AttestError> {
    let settings = &context.settings;
    let kept = context.storage.load();
    let roots = if kept.bundle.is_empty() { bootstrap::roots(context).await? } else { Some(kept.bundle.clone()) };
    match &roots {
        None => tracing::info!(subsystem_name = SUBSYSTEM, "Bundle is not found"),
        Some(_) => {
            tracing::info!(subsystem_name = SUBSYSTEM, trust_domain_id = %settings.trust_domain.id_string(), "Bundle loaded")
        }
    }
    let key = match load_svid(context).await? {
        Loaded::Key(key) => key,
        Loaded::Kept(loaded) => {
            let (svid, restored) = *loaded;
            let roots = roots.ok_or_else(|| AgentError::internal("SVID loaded but no bundle in cache"))?;
            tracing::info!(subsystem_name = SUBSYSTEM, spiffe_id = %svid.id, "SVID loaded");
            let mut bundle = Bundle::empty(settings.trust_domain.clone());
            bundle.x509_authorities = roots.into_iter().map(|der| X509Authority { der, tainted: false }).collect();
            return Ok(Attested { svid, bundle, kept: true, restored });
        }
    };
    tracing::info!(subsystem_name = SUBSYSTEM, "SVID is not found. Starting node attestation");
    let channel = bootstrap_channel(context, roots.as_deref())?;
    let svid = prove(context, &channel, key).await?;
    let bundle = fetch_bundle(&channel).await?;
    context.storage.bootstrapped().await.map_err(AgentError::from)?;
    tracing::info!(subsystem_name = SUBSYSTEM, spiffe_id = %svid.id, reattestable = svid.reattestable, "Node attestation was successful");
    Ok(Attested { svid, bundle, kept: false, restored: None })
}

/// What an agent begins with.
enum Loaded {
    /// With what is kept besides, if that was read.
    Kept(Box<(AgentSvid, Option<Restored>)>),
    /// For a new SVID.
    Key(AgentKey),
}

/// The SVID that is kept, if it is of use; otherwise a key for a new one.
async fn load_svid(context: &Arc<Context>) -> Result<Loaded, AgentError> {
    let kept = context.storage.load();
    let keys = context.plugins.key_manager.as_ref();
    let leaf = kept.svid.first().and_then(|der| Certificate::parse(der.clone()).ok());
    let (key, any_keys) = AgentKey::find(keys, leaf.as_ref()).await?;
    match (&leaf, &key) {
        (Some(_), Some(key)) => {
            let svid = AgentSvid::new(kept.svid, key.clone(), kept.reattestable, context.rotation, &context.jitter)?;
            if !svid.is_expired(context.clock.now()) {
                return Ok(Loaded::Kept(Box::new((svid, None))));
            }
            // Workloads come first: what is kept for them may last longer, and the server may be away. See `sync::own`.
            if let Some(restored) = restart::load_valid(context, &svid.id).await {
                tracing::warn!(
                    subsystem_name = SUBSYSTEM,
                    expiry = %Time(svid.not_after),
                    svids = restored.svids.len(),
                    "SVID is expired, but what is kept for workloads is not: serving that, and attesting anew meanwhile"
                );
                return Ok(Loaded::Kept(Box::new((svid, Some(restored)))));
            }
            tracing::warn!(
                subsystem_name = SUBSYSTEM,
                expiry = %Time(svid.not_after),
                "SVID key recovered, but SVID is expired. Generating new keypair"
            );
        }
        (Some(_), None) if any_keys => {
            tracing::warn!(subsystem_name = SUBSYSTEM, "SVID recovered, but no SVID key found. Generating new keypair")
        }
        (Some(_), None) => {
            tracing::warn!(subsystem_name = SUBSYSTEM, "SVID recovered, but no keys found. Generating new keypair")
        }
        (None, _) if any_keys => {
            tracing::warn!(subsystem_name = SUBSYSTEM, "Keys recovered, but no SVID found. Generating new keypair")
        }
        (None, _) => tracing::debug!(
            subsystem_name = SUBSYSTEM,
            "No pre-existing agent SVID found. Will perform node attestation"
        ),
    }
    Ok(Loaded::Key(AgentKey::generate(keys, key.as_ref()).await?))
}

/// A connection on which we are nobody yet.
fn bootstrap_channel(context: &Context, roots: Option<&[Arc<[u8]>]>) -> Result<Channel, AgentError> {
    let trust_domain = &context.settings.trust_domain;
    let expected = trust_domain.server_id();
    let server = match roots {
        None => {
            tracing::warn!(
                subsystem_name = SUBSYSTEM,
                "Insecure bootstrap enabled; skipping server certificate verification"
            );
            ServerAuth::InsecureBootstrap { expected }
        }
        Some(roots) => {
            let roots = TrustRoots::new(roots);
            let roots = roots.map_err(|e| AgentError::internal(format!("load bundle: {e}")).because(e))?;
            let bundles = Arc::new(Fixed { trust_domain: trust_domain.as_str().to_owned(), roots: Arc::new(roots) });
            ServerAuth::Spiffe { bundles, policy: PeerPolicy::Exact(expected) }
        }
    };
    let config = client_config_with(context.key_exchange(), None, server, context.clock.clone());
    let config = config.map_err(|e| AgentError::internal(format!("create attestation client: {e}")).because(e))?;
    Ok(tls_channel(&context.server_address(), Arc::new(config)))
}

/// Attests again, trusting what the agent trusts now.
pub(crate) async fn reattest(
    context: &Context,
    bundles: Arc<dyn BundleSource>,
    current: &AgentSvid,
) -> Result<AgentSvid, AgentError> {
    tracing::debug!(subsystem_name = SUBSYSTEM, "Reattesting node");
    let policy = PeerPolicy::Exact(context.settings.trust_domain.server_id());
    let config =
        client_config_with(context.key_exchange(), None, ServerAuth::Spiffe { bundles, policy }, context.clock.clone());
    let config = config.map_err(|e| AgentError::internal(format!("create attestation client: {e}")).because(e))?;
    let channel = tls_channel(&context.server_address(), Arc::new(config));
    let key = AgentKey::generate(context.plugins.key_manager.as_ref(), Some(&current.key)).await?;
    let svid = tokio::time::timeout(ATTEST_TIMEOUT, prove(context, &channel, key)).await;
    let svid = svid.map_err(|_| AgentError::new(ErrorKind::Timeout, "node attestation took too long"))??;
    tracing::info!(subsystem_name = SUBSYSTEM, spiffe_id = %svid.id, "Successfully reattested node");
    Ok(svid)
}

/// Proves to the server what this node is, and takes the SVID.
async fn prove(context: &Context, channel: &Channel, key: AgentKey) -> Result<AgentSvid, AttestError> {
    let (name, plugin) = &context.node_attestor;
    let call = context.metrics.call("node.attestor.new_svid");
    let csr = key.csr().await?;
    let result = converse(name, plugin.as_ref(), channel, csr).await;
    call.finish(if result.is_ok() { "OK" } else { "Unknown" });
    let result = result?;
    let svid = result.svid.filter(|s| !s.cert_chain.is_empty());
    let svid = svid
        .ok_or_else(|| AgentError::internal("failed to parse attestation response: attest response is missing SVID"))?;
    let chain = svid.cert_chain.iter().map(|der| Arc::from(der.as_ref())).collect();
    Ok(AgentSvid::new(chain, key, result.reattestable, context.rotation, &context.jitter)?)
}

async fn converse(
    name: &str,
    plugin: &dyn AgentNodeAttestor,
    channel: &Channel,
    csr: Vec<u8>,
) -> Result<attest_agent_response::Result, AttestError> {
    let of_plugin = |e: PluginError| AttestError::Other(e.of(PluginKind::NodeAttestor, name).into());
    let mut session: Box<dyn AttestSession> = plugin.begin().await.map_err(of_plugin)?;
    let data = types::AttestationData { r#type: name.to_owned(), payload: session.payload().to_vec().into() };
    let params =
        attest_agent_request::Params { data: Some(data), params: Some(AgentX509svidParams { csr: csr.into() }) };
    let (send, requests) = tokio::sync::mpsc::channel(1);
    let gone = |_| {
        AttestError::Server(ServerError::new(
            "failed to send attestation request to SPIRE server",
            Status::unavailable("the stream ended"),
        ))
    };
    let request = |step| AttestAgentRequest { step: Some(step) };
    send.send(request(attest_agent_request::Step::Params(params))).await.map_err(gone)?;
    let answers = AgentClient::new(channel.clone()).attest_agent(ReceiverStream::new(requests)).await;
    let mut answers = answers.map_err(receiving)?.into_inner();
    for _ in 0..CHALLENGES_MAX {
        match next_step(&mut answers).await? {
            attest_agent_response::Step::Result(result) => return Ok(result),
            attest_agent_response::Step::Challenge(challenge) => {
                let response = session.respond(&challenge).await.map_err(of_plugin)?;
                let step = attest_agent_request::Step::ChallengeResponse(response.into());
                send.send(request(step)).await.map_err(gone)?;
            }
        }
    }
    Err(AgentError::internal("the server sent too many challenges").into())
}

fn receiving(status: Status) -> AttestError {
    AttestError::Server(ServerError::new("failed to receive attestation response", status))
}

async fn next_step(answers: &mut Streaming<AttestAgentResponse>) -> Result<attest_agent_response::Step, AttestError> {
    let answer = answers.message().await.map_err(receiving)?;
    let step = answer.and_then(|a| a.step);
    step.ok_or_else(|| receiving(Status::internal("the server answered without a result")))
}

async fn fetch_bundle(channel: &Channel) -> Result<Bundle, AttestError> {
    let answer = BundleClient::new(channel.clone()).get_bundle(GetBundleRequest::default()).await;
    let answer = answer.map_err(|s| AttestError::Server(ServerError::new("failed to get updated bundle", s)))?;
    let bundle = bundle_from_proto(answer.get_ref());
    Ok(bundle.map_err(|e| AgentError::internal(format!("invalid trust domain bundle: {e}")).because(e))?)
}

/// What a server's refusal means, wherever it stands in a chain of errors.
pub(crate) fn verdict_of(error: &AgentError) -> Verdict {
    server_error(error).map_or(Verdict::Retry, ServerError::verdict)
}

/// The failed call to the server, wherever it stands in a chain of errors.
pub(crate) fn server_error(error: &AgentError) -> Option<&ServerError> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        let server = error.downcast_ref::<ServerError>();
        if server.is_some() {
            return server;
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn attempts_go_on_for_a_minute_and_then_the_last_error_is_the_reason() {
        let (mut retry, shutdown, start) = (Retry::within(RETRY_FOR), Shutdown::new(), Instant::now());
        let mut attempts = 1;
        let error = loop {
            match retry.wait(&shutdown, "no", AgentError::internal(format!("attempt {attempts}"))).await {
                Ok(waited) => assert!(waited.is_some()),
                Err(error) => break error,
            }
            attempts += 1;
        };
        assert!((5..=7).contains(&attempts), "{attempts} attempts");
        assert_eq!(error.to_string(), format!("attempt {attempts}"));
        assert!(start.elapsed() > Duration::from_secs(30) && start.elapsed() <= RETRY_FOR);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_ends_the_wait() {
        let (mut retry, shutdown) = (Retry::within(RETRY_FOR), Shutdown::new());
        shutdown.trigger();
        let start = Instant::now();
        assert!(retry.wait(&shutdown, "no", AgentError::internal("x")).await.unwrap().is_none());
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}
