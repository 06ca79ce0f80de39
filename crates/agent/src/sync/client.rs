//! Calls to the server. Nothing else in this crate speaks with it, besides attestation.

use crate::cache::Record;
use crate::entry::spiffe_id;
use crate::error::ServerError;
use crate::sync::entries::{EntrySync, NewEntries, SyncStats};
use arc_swap::ArcSwap;
use bytes::Bytes;
use finial_core::{EntryId, SpiffeId, TrustDomain, UnixSeconds};
use finial_proto::server::{agent, bundle, entry, svid};
use finial_proto::sync::agent_sync_client::AgentSyncClient;
use finial_proto::sync::{BundleSeenRequest, WatchRequest, WatchResponse};
use finial_proto::types;
use futures::StreamExt;
use futures::future::BoxFuture;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// As log lines say it.
const SUBSYSTEM: &str = "manager";

/// How long a call may take.
pub(crate) const RPC_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for one that nobody waits for.
const NOTE_TIMEOUT: Duration = Duration::from_secs(10);
/// How many federated bundles are fetched at the same time.
const BUNDLES_AT_ONCE: usize = 10;
/// Largest message taken from the server, bytes. All entries of an agent may come in one.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// A bundle of another trust domain, or `None` if the server has none.
pub(crate) type FederatedBundle = (TrustDomain, Option<types::Bundle>);

/// A JWT-SVID as the server issued it.
#[derive(Debug)]
pub(crate) struct IssuedJwt {
    pub(crate) id: SpiffeId,
    pub(crate) token: String,
    pub(crate) issued_at: UnixSeconds,
    pub(crate) expires_at: UnixSeconds,
}

/// The connection to the server. It is made anew with [`ServerLink::release`], as a connection stays bound to the SVID
/// with which it was opened.
pub(crate) struct ServerLink {
    channel: ArcSwap<Channel>,
    /// How often it was made anew.
    generation: AtomicU64,
    /// Tells of each new SVID of the agent's.
    own_svid: watch::Sender<()>,
    /// The server knows this agent's SVID no more.
    denied: Notify,
    /// It refuses another one, so that nothing comes of waiting.
    refused: AtomicBool,
    connect: Box<dyn Fn() -> Channel + Send + Sync>,
}

fn mask() -> types::EntryMask {
    types::EntryMask {
        spiffe_id: true,
        selectors: true,
        federates_with: true,
        admin: true,
        downstream: true,
        revision_number: true,
        store_svid: true,
        hint: true,
        additional_attributes: true,
        created_at: true,
        ..Default::default()
    }
}

impl ServerLink {
    /// `connect` gives a channel that connects when it is first used.
    pub(crate) fn new(connect: impl Fn() -> Channel + Send + Sync + 'static) -> Self {
        let channel = ArcSwap::from_pointee(connect());
        let (own_svid, denied) = (watch::Sender::new(()), Notify::new());
        Self {
            channel,
            generation: AtomicU64::new(0),
            own_svid,
            denied,
            refused: AtomicBool::new(false),
            connect: Box::new(connect),
        }
    }

    /// Calls from now on use a new connection.
    pub(crate) fn release(&self) {
        self.channel.store(Arc::new((self.connect)()));
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// The agent has another SVID: calls from now on are made by it.
    pub(crate) fn renewed(&self) {
        self.release();
        self.refuse(false);
        self.own_svid.send_replace(());
    }

    /// Changes with each [`ServerLink::renewed`] from now on.
    pub(crate) fn own_svid(&self) -> watch::Receiver<()> {
        self.own_svid.subscribe()
    }

    /// Whether the server refuses the agent another SVID until an operator acts.
    pub(crate) fn refuse(&self, refused: bool) {
        self.refused.store(refused, Ordering::Relaxed);
    }

    /// As told by [`ServerLink::refuse`].
    pub(crate) fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// Has the agent attest anew soon, as the server refused a workload's call because of the agent's own SVID.
    pub(crate) fn denied(&self) {
        self.denied.notify_one();
    }

    /// Returns after [`ServerLink::denied`]. For one waiter.
    pub(crate) async fn was_denied(&self) {
        self.denied.notified().await;
    }

    /// Grows with each [`ServerLink::release`].
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    fn channel(&self) -> Channel {
        Channel::clone(&self.channel.load())
    }

    fn entries(&self) -> entry::entry_client::EntryClient<Channel> {
        entry::entry_client::EntryClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn svids(&self) -> svid::svid_client::SvidClient<Channel> {
        svid::svid_client::SvidClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn bundles(&self) -> bundle::bundle_client::BundleClient<Channel> {
        bundle::bundle_client::BundleClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn agents(&self) -> agent::agent_client::AgentClient<Channel> {
        agent::agent_client::AgentClient::new(self.channel())
    }

    /// Tells the server our version.
    pub(crate) async fn post_status(&self, version: &str) -> Result<(), ServerError> {
        let request = agent::PostStatusRequest { agent_version: version.to_owned(), ..Default::default() };
        within("failed to post agent status", RPC_TIMEOUT, async { self.agents().post_status(request).await }).await?;
        Ok(())
    }

    /// Opens the stream by which the server tells what changes; `Unimplemented` if it has none.
    pub(crate) fn watch(
        &self,
        request: WatchRequest,
    ) -> BoxFuture<'static, Result<Streaming<WatchResponse>, ServerError>> {
        let mut client = AgentSyncClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Box::pin(async move {
            let call = async { client.watch_authorized(request).await };
            Ok(within("failed to watch authorized entries", RPC_TIMEOUT, call).await?.into_inner())
        })
    }

    /// Tells the server that its bundle of this number is in use; `Unimplemented` if it does not want to know.
    pub(crate) async fn bundle_seen(&self, sequence_number: u64) -> Result<(), ServerError> {
        let request = BundleSeenRequest { sequence_number };
        let call = async { AgentSyncClient::new(self.channel()).bundle_seen(request).await };
        within("failed to confirm the bundle", NOTE_TIMEOUT, call).await?;
        Ok(())
    }

    /// Brings `known` up to date; `None` if nothing changed.
    pub(crate) async fn sync_entries(&self, known: &[Record]) -> Result<(NewEntries, SyncStats), ServerError> {
        within("failed to fetch authorized entries", RPC_TIMEOUT, self.sync_entries_stream(known)).await
    }

    async fn sync_entries_stream(&self, known: &[Record]) -> Result<(NewEntries, SyncStats), Status> {
        let (send, requests) = tokio::sync::mpsc::channel(1);
        let first = entry::SyncAuthorizedEntriesRequest { output_mask: Some(mask()), ids: Vec::new() };
        let gone = |_| Status::unavailable("the stream to the server ended");
        send.send(first).await.map_err(gone)?;
        let mut stream = self.entries().sync_authorized_entries(ReceiverStream::new(requests)).await?.into_inner();
        let ended = || Status::unavailable("the server ended the stream early");
        let mut sync = EntrySync::new(known);

        let mut page = stream.message().await?.ok_or_else(ended)?;
        // Without revisions the first page holds all entries.
        let page_size = page.entry_revisions.len();
        if page_size == 0 {
            sync.entries(page.entries);
            return Ok(sync.finish());
        }
        loop {
            sync.revisions(&page.entry_revisions);
            if !page.more {
                break;
            }
            page = stream.message().await?.ok_or_else(ended)?;
            if !page.entries.is_empty() {
                return Err(Status::internal("unexpected entry in response receiving entry revisions"));
            }
        }
        let missing = sync.missing();
        for ids in missing.chunks(page_size) {
            send.send(entry::SyncAuthorizedEntriesRequest { output_mask: None, ids: ids.to_vec() })
                .await
                .map_err(gone)?;
            loop {
                let page = stream.message().await?.ok_or_else(ended)?;
                if !page.entry_revisions.is_empty() {
                    return Err(Status::internal("unexpected entry revisions in response while requesting entries"));
                }
                sync.entries(page.entries);
                if !page.more {
                    break;
                }
            }
        }
        Ok(sync.finish())
    }

    /// All entries in one answer, for servers that are asked the old way.
    pub(crate) async fn all_entries(&self, known: &[Record]) -> Result<(NewEntries, SyncStats), ServerError> {
        let request = entry::GetAuthorizedEntriesRequest { output_mask: Some(mask()) };
        let call = async { self.entries().get_authorized_entries(request).await };
        let answer = within("failed to fetch authorized entries", RPC_TIMEOUT, call).await?.into_inner();
        let mut sync = EntrySync::new(known);
        sync.entries(answer.entries);
        Ok(sync.finish())
    }

    /// The bundle of our own trust domain.
    pub(crate) async fn bundle(&self) -> Result<types::Bundle, ServerError> {
        let call = async { self.bundles().get_bundle(bundle::GetBundleRequest::default()).await };
        Ok(within("failed to fetch bundle", RPC_TIMEOUT, call).await?.into_inner())
    }

    /// Bundles of other trust domains, some at the same time. One that the server does not have is no failure.
    pub(crate) async fn federated_bundles(
        &self,
        domains: Vec<TrustDomain>,
    ) -> Result<Vec<FederatedBundle>, ServerError> {
        let fetch = |domain: TrustDomain| async move {
            let request =
                bundle::GetFederatedBundleRequest { trust_domain: domain.as_str().to_owned(), output_mask: None };
            match self.bundles().get_federated_bundle(request).await {
                Ok(answer) => Ok((domain, Some(answer.into_inner()))),
                Err(status) if status.code() == Code::NotFound => {
                    tracing::warn!(subsystem_name = SUBSYSTEM, error = %status.message(), bundle_endpoint = %domain, "Federated bundle not found");
                    Ok((domain, None))
                }
                Err(status) => Err(status),
            }
        };
        let calls = async {
            let mut answers = futures::stream::iter(domains).map(fetch).buffer_unordered(BUNDLES_AT_ONCE);
            let mut bundles = Vec::new();
            while let Some(answer) = answers.next().await {
                bundles.push(answer?);
            }
            Ok(bundles)
        };
        within("failed to fetch federated bundle", RPC_TIMEOUT, calls).await
    }

    /// X.509-SVIDs for entries, in order; where the server would not, why. `expiry` is when the first that they replace ends,
    /// 0 when a workload has none.
    pub(crate) async fn new_x509_svids(
        &self,
        csrs: &[(EntryId, Bytes)],
        expiry: UnixSeconds,
    ) -> Result<Vec<Result<types::X509svid, String>>, ServerError> {
        let param = |(id, csr): &(EntryId, Bytes)| svid::NewX509svidParams {
            entry_id: id.as_str().to_owned(),
            csr: csr.clone(),
        };
        let request = svid::BatchNewX509svidRequest { params: csrs.iter().map(param).collect() };
        let mut request = tonic::Request::new(request);
        request.metadata_mut().insert(finial_proto::SVID_EXPIRY, expiry.into());
        let call = async { self.svids().batch_new_x509svid(request).await };
        let answer = within("failed to batch new X509 SVID(s)", RPC_TIMEOUT, call).await?.into_inner();
        let mut results = answer.results.into_iter();
        let taken = csrs.iter().map(|(id, _)| {
            let result = results.next().ok_or_else(|| "the server did not answer for it".to_owned())?;
            let status = result.status.unwrap_or_default();
            if status.code != Code::Ok as i32 {
                tracing::warn!(subsystem_name = SUBSYSTEM, entry_id = %id, status = status.code, error = %status.message, "Failed to mint X509 SVID");
            }
            result.svid.ok_or(status.message)
        });
        Ok(taken.collect())
    }

    /// A JWT-SVID for an entry.
    pub(crate) async fn new_jwt_svid(
        &self,
        id: &EntryId,
        audience: Vec<String>,
        timeout: Duration,
    ) -> Result<IssuedJwt, ServerError> {
        const WHAT: &str = "failed to fetch JWT SVID";
        let request = svid::NewJwtsvidRequest { entry_id: id.as_str().to_owned(), audience };
        let answer = within(WHAT, timeout, async { self.svids().new_jwtsvid(request).await }).await?.into_inner();
        let bad = |text: &str| ServerError::bare(Status::internal(text));
        let svid = answer.svid.ok_or_else(|| bad("JWTSVID response missing SVID"))?;
        if svid.issued_at == 0 {
            return Err(bad("JWTSVID missing issued at"));
        }
        if svid.expires_at == 0 {
            return Err(bad("JWTSVID missing expires at"));
        }
        if svid.issued_at > svid.expires_at {
            return Err(bad("JWTSVID issued after it has expired"));
        }
        let id = svid.id.as_ref().ok_or_else(|| bad("could not parse JWT-SVID SPIFFE ID: missing"))?;
        let id = spiffe_id(id).map_err(|e| bad(&format!("could not parse JWT-SVID SPIFFE ID: {e}")))?;
        Ok(IssuedJwt { id, token: svid.token, issued_at: svid.issued_at, expires_at: svid.expires_at })
    }

    /// WIT-SVIDs, in order; where the server would not, why.
    pub(crate) async fn new_wit_svids(
        &self,
        params: Vec<svid::NewWitsvidParams>,
    ) -> Result<Vec<Result<types::Witsvid, String>>, ServerError> {
        let count = params.len();
        let request = svid::BatchNewWitsvidRequest { params };
        let call = async { self.svids().batch_new_witsvid(request).await };
        let answer = within("failed to batch new WIT-SVID(s)", RPC_TIMEOUT, call).await?.into_inner();
        let mut results = answer.results.into_iter();
        let taken = (0..count).map(|_| {
            let result = results.next().ok_or_else(|| "the server did not answer for it".to_owned())?;
            let status = result.status.unwrap_or_default();
            result.svid.ok_or_else(|| format!("{}: {}", status.code, status.message))
        });
        Ok(taken.collect())
    }

    /// A new SVID for the agent itself.
    pub(crate) async fn renew_agent(&self, csr: Vec<u8>) -> Result<types::X509svid, ServerError> {
        let request = agent::RenewAgentRequest { params: Some(agent::AgentX509svidParams { csr: csr.into() }) };
        let call = async { self.agents().renew_agent(request).await };
        let answer = within("failed to renew agent", RPC_TIMEOUT, call).await?.into_inner();
        answer.svid.ok_or_else(|| ServerError::bare(Status::internal("renew agent response missing SVID")))
    }
}

/// Gives a call its deadline and its words.
async fn within<T>(
    what: &'static str,
    timeout: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, ServerError> {
    match tokio::time::timeout(timeout, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(ServerError::new(what, status)),
        Err(_) => Err(ServerError::new(what, Status::deadline_exceeded("context deadline exceeded"))),
    }
}
