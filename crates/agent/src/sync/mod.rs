//! The one loop that speaks with the server: entries, bundles, workloads' SVIDs and the agent's own.
//!
//! What to do is decided by [`plan`], a pure function, and when by [`run`]. A Finial server tells what changes through a stream ([`watch`]), and is
//! then hardly ever asked; SPIRE's is asked at every interval.

mod bundles;
pub(crate) mod client;
mod due;
mod entries;
pub(crate) mod jwt;
mod mint;
mod own;
mod pace;
pub(crate) mod plan;
mod refused;
mod run;
mod seen;
pub(crate) mod taints;
mod watch;
pub(crate) mod wit;

use crate::Context;
use crate::attest;
use crate::cache::{BundleForms, Cache, CacheWriter, Change, Record};
use crate::error::{AgentError, ServerError, Verdict};
use crate::status::AgentStatus;
use crate::svid::{AgentKey, AgentSvid};
use client::ServerLink;
use entries::{EntrySync, SyncStats};
use finial_config::RebootstrapMode;
use finial_core::{EntryId, ErrorKind, TrustDomain, UnixSeconds};
use finial_crypto::tls::TlsIdentity;
use finial_proto::sync::{BundleVersion, WatchRequest, WatchResponse};
use finial_runtime::log::Time;
use plan::{BatchSize, Input, plan};
use refused::Refused;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use taints::Taints;
use tokio::time::Instant;

/// As log lines say it.
const SUBSYSTEM: &str = "manager";

/// SVIDs in the cache, unless configured.
const SVIDS_KEPT: usize = 1000;
/// Keys made before other tasks get their turn.
const KEYS_AT_ONCE: usize = 8;
/// How many entries that moved are worth giving memory back.
const LARGE_CHANGE: usize = 1000;

/// The loop and all that it alone changes.
pub(crate) struct Syncer {
    pub(crate) context: Arc<Context>,
    pub(crate) writer: CacheWriter,
    pub(crate) link: Arc<ServerLink>,
    identity: Arc<TlsIdentity>,
    pub(crate) status: Arc<AgentStatus>,
    svid: AgentSvid,
    /// Bundles that the server told of by itself, with their versions.
    told: BTreeMap<TrustDomain, (Arc<BundleForms>, u64)>,
    batch: BatchSize,
    refused: Refused,
    /// Since when the server has been signed by someone unknown.
    unknown_since_ms: Option<i64>,
    /// Tainted keys that were dealt with.
    pub(crate) tainted_jwt_done: Vec<String>,
    /// X.509 authorities that are not to be used any more.
    pub(crate) tainted: Taints,
    /// Those of them that are no longer in the bundle.
    gone: Vec<Vec<u8>>,
    /// When it last looked for SVIDs to ask for.
    svids_updated: Option<Instant>,
    /// When it is to look again at the latest, for one that was there then.
    svids_due: Option<Instant>,
    /// Our own bundle has changed and is not on disk yet.
    unstored: bool,
    /// The server is told of what it told us and we use.
    seen: seen::Seen,
    /// Of our own bundle, until the SVIDs that follow from it are there.
    unconfirmed: Option<u64>,
    /// Since the own SVID has expired.
    ended: Option<own::Ended>,
    /// The server was told our version.
    pub(crate) posted: bool,
    /// Entries that came, changed or went since memory was last given back.
    pub(crate) moved: usize,
    /// When the first sync of the loop is due; none = at the usual pace.
    pub(crate) first_sync: Option<Instant>,
}

impl Syncer {
    pub(crate) fn new(
        context: Arc<Context>,
        writer: CacheWriter,
        link: Arc<ServerLink>,
        identity: Arc<TlsIdentity>,
        status: Arc<AgentStatus>,
        svid: AgentSvid,
    ) -> Self {
        status.svid_changed(&svid);
        Self {
            context,
            writer,
            link,
            identity,
            status,
            svid,
            told: BTreeMap::new(),
            batch: BatchSize::new(),
            refused: Refused::new(),
            unknown_since_ms: None,
            tainted_jwt_done: Vec::new(),
            tainted: Taints::default(),
            gone: Vec::new(),
            svids_updated: None,
            svids_due: None,
            unstored: false,
            seen: seen::Seen::new(None),
            unconfirmed: None,
            ended: None,
            posted: false,
            moved: 0,
            first_sync: None,
        }
    }

    pub(crate) fn cache(&self) -> &Arc<Cache> {
        self.writer.cache()
    }

    /// The first sync, tried again for a while. `false` when the agent was asked to end first.
    pub(crate) async fn initialize(&mut self) -> Result<bool, AgentError> {
        let context = self.context.clone();
        let mut retry = attest::Retry::new(&context);
        loop {
            self.store().await;
            let error = tokio::select! {
                result = self.first_attempt() => match result {
                    Ok(_) => return Ok(true),
                    Err(error) => error,
                },
                () = context.shutdown.cancelled() => return Ok(false),
            };
            self.heed_at_start(&error).await?;
            if retry.wait(&context.shutdown, "Failed to initialize manager", error.into()).await?.is_none() {
                return Ok(false);
            }
        }
    }

    pub(crate) async fn first_attempt(&mut self) -> Result<bool, ServerError> {
        self.posted = true;
        let (link, context) = (self.link.clone(), self.context.clone());
        tokio::join!(post_status(&link, &context.version), self.synchronize()).1
    }

    /// What a refusal of the first sync means.
    pub(crate) async fn heed_at_start(&mut self, error: &ServerError) -> Result<(), AgentError> {
        let what = match error.verdict() {
            Verdict::Reattest => "Agent needs to re-attest",
            Verdict::Banned => "Agent is banned",
            Verdict::UnknownAuthority => return self.unknown_authority(error).await,
            Verdict::Retry => return Ok(()),
        };
        tracing::error!(subsystem_name = SUBSYSTEM, %error, "{what}: removing SVID and shutting down");
        self.delete_svid().await;
        Err(AgentError::new(finial_proto::convert::kind_of(error.status.code()), error.to_string()))
    }

    /// Does what a refusal of the server asks for.
    async fn heed(&mut self, error: &ServerError) -> Result<(), AgentError> {
        match error.verdict() {
            Verdict::Retry => Ok(()),
            // See `own`: the next tick attests anew.
            Verdict::Reattest if error.is_expired() && self.own_has_ended() => Ok(()),
            Verdict::UnknownAuthority => self.unknown_authority(error).await,
            Verdict::Banned => {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Agent is banned: removing SVID and shutting down");
                self.delete_svid().await;
                Err(AgentError::new(ErrorKind::Denied, error.to_string()))
            }
            Verdict::Reattest => {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Agent needs to re-attest; will attempt to re-attest");
                let reattested = if self.svid.reattestable {
                    // As for a renewal: not while another agent presents this SVID, too. The next refusal comes soon.
                    let context = self.context.clone();
                    let Ok(_renewal) = context.renewal.try_lock() else { return Ok(()) };
                    if !context.inherited.may_renew() {
                        return Ok(());
                    }
                    self.reattest().await
                } else {
                    Err(AgentError::internal("attestation method is not re-attestable"))
                };
                let Err(reason) = reattested else { return Ok(()) };
                tracing::error!(subsystem_name = SUBSYSTEM, error = %reason, "Agent failed re-attestation; removing SVID and shutting down");
                self.delete_svid().await;
                Err(AgentError::new(ErrorKind::Denied, error.to_string()))
            }
        }
    }

    /// The server is signed by an authority that we do not know. Ends the agent, at once or after the configured delay.
    async fn unknown_authority(&mut self, error: &ServerError) -> Result<(), AgentError> {
        let settings = &self.context.settings;
        // An agent that may not attest again would only lose what it has.
        if settings.rebootstrap_mode == RebootstrapMode::Never || !self.svid.reattestable {
            tracing::info!(subsystem_name = SUBSYSTEM, %error, "Synchronize failed, non-recoverable error");
            return Err(AgentError::internal(format!("failed to sync with SPIRE Server: {error}")));
        }
        let now_ms = self.context.clock.now_ms();
        let since = *self.unknown_since_ms.get_or_insert(now_ms);
        let delay = i64::try_from(settings.rebootstrap_delay.as_millis()).unwrap_or(i64::MAX);
        let left = delay.saturating_sub(now_ms.saturating_sub(since));
        if left > 0 {
            tracing::info!(subsystem_name = SUBSYSTEM, time_left = %format!("{}s", left / 1000), "Trust Bundle and Server don't agree, ignoring for now");
            return Ok(());
        }
        tracing::warn!(subsystem_name = SUBSYSTEM, "Trust Bundle and Server don't agree, rebootstrapping");
        self.context.sealed.forget();
        self.context.storage.store(&[], false, &[]).await?;
        Err(AgentError::internal("shutting down for rebootstrapping"))
    }

    /// Entries and bundles, then whatever SVIDs follow from them. Always asks.
    async fn synchronize(&mut self) -> Result<bool, ServerError> {
        let call = self.context.metrics.call("manager.sync.fetch_entries_updates");
        let fetched = self.fetch().await;
        call.finish_with(&fetched, |e| finial_proto::convert::kind_of(e.status.code()));
        self.writer.publish(fetched.inspect_err(|_| self.status.not_synced(None))?);
        self.unknown_since_ms = None;
        if !std::mem::replace(&mut self.posted, true) {
            post_status(&self.link, &self.context.version).await;
        }
        self.follow_up().await
    }

    /// The SVIDs that follow from what was published. Our own bundle goes to disk meanwhile: one that hangs keeps nobody waiting.
    async fn follow_up(&mut self) -> Result<bool, ServerError> {
        let context = self.context.clone();
        let own = self.unstored.then(|| self.cache().snapshot().bundles.own.clone());
        let stored = async {
            if let Some(own) = &own {
                bundles::store(&context, own).await;
            }
        };
        let (updated, ()) = tokio::join!(self.update_svids(), stored);
        self.unstored = false;
        self.give_back();
        updated?;
        self.confirm();
        self.status.synced(self.context.clock.now());
        Ok(true)
    }

    /// Workloads have the bundle, so has the disk, and all SVIDs that follow from it are there: the server is told so.
    fn confirm(&mut self) {
        let (snapshot, now) = (self.cache().snapshot(), self.context.clock.now());
        // One that was refused is asked for again, and its workload has what would be revoked until then.
        let clings = |record: &crate::cache::Record| {
            self.refused.has(&record.entry.id)
                && record
                    .svid
                    .as_ref()
                    .is_some_and(|svid| svid.not_after > now && self.tainted.concern(&svid.signed_by, svid.issued_in))
        };
        if self.unconfirmed.is_none() || snapshot.records.iter().any(clings) {
            return;
        }
        self.seen.send_replace(self.unconfirmed.take());
    }

    /// What a large change leaves behind goes back to the system: an agent is idle most of its life.
    fn give_back(&mut self) {
        if self.moved >= LARGE_CHANGE {
            self.moved = 0;
            self.context.spawner.blocking(finial_net::memory::trim);
        }
    }

    async fn fetch(&mut self) -> Result<Change, ServerError> {
        self.own_is_valid()?;
        let known = self.cache().snapshot();
        let (entries, stats) = if self.context.settings.use_sync_authorized_entries {
            self.link.sync_entries(&known.records).await?
        } else {
            self.link.all_entries(&known.records).await?
        };
        let bundles = self.fetch_bundles(self.federated_domains(entries.as_deref())).await?;
        self.count(stats);
        Ok(Change { entries, bundles, ..Change::default() })
    }

    fn count(&mut self, stats: SyncStats) {
        self.moved += stats.missing + stats.stale + stats.dropped;
        let metrics = &self.context.metrics;
        metrics.gauge("sync_entries_total", stats.total as f64, &[]);
        metrics.gauge("sync_entries_missing", stats.missing as f64, &[]);
        metrics.gauge("sync_entries_stale", stats.stale as f64, &[]);
        metrics.gauge("sync_entries_dropped", stats.dropped as f64, &[]);
        metrics.count("lru_cache_entry_add", stats.missing as f64, &[]);
        metrics.count("lru_cache_entry_update", stats.stale as f64, &[]);
        metrics.count("lru_cache_entry_remove", stats.dropped as f64, &[]);
    }

    /// For the server to compare with what we may have.
    fn what_we_have(&self) -> WatchRequest {
        let version = |(domain, (_, version)): (&TrustDomain, &(Arc<BundleForms>, u64))| BundleVersion {
            trust_domain: domain.as_str().to_owned(),
            version: *version,
        };
        let known = self.cache().snapshot();
        // To have it would mean that its SVIDs are there, too.
        let unconfirmed =
            |domain: &TrustDomain| self.unconfirmed.is_some() && *domain == known.bundles.own.bundle.trust_domain;
        WatchRequest {
            entry_digests: entries::digests(&known.records),
            bundles: self.told.iter().filter(|(domain, _)| !unconfirmed(domain)).map(version).collect(),
        }
    }

    /// What the server told by itself, and whatever SVIDs follow from it: it has answered.
    async fn take_answer(&mut self, mut answer: WatchResponse) -> Result<bool, ServerError> {
        let known = self.cache().snapshot();
        let mut sync = EntrySync::new(&known.records);
        sync.pushed(&mut answer);
        let (entries, stats) = sync.finish();
        let domains = self.federated_domains(entries.as_deref());
        let own = known.bundles.own.bundle.trust_domain.as_str();
        let told =
            answer.bundles.iter().filter_map(|told| told.bundle.as_ref()).find(|bundle| bundle.trust_domain == own);
        let told = told.map(|bundle| bundle.sequence_number);
        let bundles = self.take_bundles(answer.bundles, &answer.removed_bundles, domains)?;
        self.count(stats);
        self.writer.publish(Change { entries, bundles, ..Change::default() });
        self.unconfirmed = told.or(self.unconfirmed);
        self.follow_up().await
    }

    /// Asks for the SVIDs that the plan names, but for those that were refused a moment ago, batch by batch, and publishes each
    /// batch. Whether there was anything to ask for.
    async fn update_svids(&mut self) -> Result<bool, ServerError> {
        self.svids_updated = Some(Instant::now());
        self.svids_due = None; // what fails has a pace of its own
        let snapshot = self.cache().snapshot();
        let in_use = self.cache().in_use();
        let plan = plan(&Input {
            records: &snapshot.records,
            in_use: &in_use,
            tainted: &self.tainted,
            limit: match self.context.settings.x509_svid_cache_max_size {
                0 => SVIDS_KEPT,
                limit => limit,
            },
            now_ms: self.context.clock.now_ms(),
        });
        if !plan.evict.is_empty() {
            self.writer.publish(Change { evict: plan.evict, ..Change::default() });
        }
        for (key, number) in [
            ("cache_manager.expiring_svids", plan.due),
            ("cache_manager.outdated_svids", plan.outdated),
            ("cache_manager.tainted_x509_svids.workload", plan.tainted),
        ] {
            if number > 0 {
                self.context.metrics.sample(key, number as f64, &[]);
            }
        }
        self.refused.retain(|id| snapshot.record(id).map(|record| &*record.entry));
        let mut request = plan.request;
        request.retain(|id| !self.refused.waits(id));
        let mut left = request.as_slice();
        while !left.is_empty() {
            self.own_is_valid()?;
            let (now, later) = left.split_at(self.batch.get().min(left.len()));
            tracing::debug!(
                subsystem_name = SUBSYSTEM,
                count = left.len(),
                limit = now.len(),
                "Renewing stale entries"
            );
            let call = self.context.metrics.call("manager.sync.fetch_svids_updates");
            let issued = self.issue(now, &in_use).await;
            call.finish_with(&issued, |e| finial_proto::convert::kind_of(e.status.code()));
            match issued {
                Ok(svids) => {
                    self.batch.succeeded();
                    let asked = now.iter().filter_map(|id| snapshot.record(id)).map(|record| &*record.entry);
                    self.refused.answered(asked, &svids.iter().map(|(id, _)| id).collect());
                    self.writer.publish(Change { svids, ..Change::default() });
                }
                Err(error) => {
                    self.batch.failed(now.len());
                    // Too many at once: fewer may go through now. Whatever else it is, it wants a pause.
                    if error.status.code() != tonic::Code::ResourceExhausted || now.len() == 1 {
                        return Err(error);
                    }
                    continue;
                }
            }
            left = later;
        }
        let snapshot = self.cache().snapshot();
        let (held, entries) = (snapshot.svid_count(), snapshot.records.len());
        self.svids_due = self.next_due(&snapshot.records);
        let metrics = &self.context.metrics;
        metrics.gauge("lru_cache_svid_map_size", held as f64, &[]);
        metrics.gauge("lru_cache_record_map_size", entries as f64, &[]);
        metrics.gauge("jwt_svid_cache_size", self.cache().jwt.len() as f64, &[]);
        Ok(!request.is_empty())
    }

    async fn issue(
        &mut self,
        ids: &[EntryId],
        in_use: &HashSet<EntryId>,
    ) -> Result<Vec<(EntryId, Arc<crate::cache::WorkloadSvid>)>, ServerError> {
        let snapshot = self.cache().snapshot();
        let failed =
            |e: finial_crypto::SignError| ServerError::bare(tonic::Status::internal(format!("cannot make a key: {e}")));
        let mut requests = Vec::with_capacity(ids.len());
        for (number, record) in ids.iter().filter_map(|id| snapshot.record(id)).enumerate() {
            let entry = &record.entry;
            match &record.svid {
                None => {
                    tracing::info!(subsystem_name = SUBSYSTEM, spiffe_id = %entry.spiffe_id, entry_id = %entry.id, "Creating X509-SVID")
                }
                Some(svid) => {
                    tracing::info!(subsystem_name = SUBSYSTEM, spiffe_id = %entry.spiffe_id, entry_id = %entry.id, expires_at = %Time(svid.not_after), "Renewing X509-SVID"
                    )
                }
            }
            let (key_type, spawner) = (self.context.settings.workload_key_type, &self.context.spawner);
            requests.push(mint::request(entry.clone(), key_type, spawner).await.map_err(failed)?);
            if number % KEYS_AT_ONCE == KEYS_AT_ONCE - 1 {
                tokio::task::yield_now().await;
            }
        }
        let csrs: Vec<_> = requests.iter().map(|r| (r.entry.id.clone(), r.csr.clone())).collect();
        // Who waits for a first one is the most urgent; what is only fetched early can wait.
        let ends = |record: &Record| match &record.svid {
            Some(svid) => svid.not_after,
            None if in_use.contains(&record.entry.id) => 0,
            None => UnixSeconds::MAX,
        };
        let expiry = ids.iter().filter_map(|id| snapshot.record(id)).map(ends).min();
        let answers = self.link.new_x509_svids(&csrs, expiry.unwrap_or_default()).await?;
        let mut svids = Vec::with_capacity(answers.len());
        for (request, answer) in requests.iter().zip(answers) {
            let entry_id = &request.entry.id;
            let answer =
                answer.inspect_err(|_| tracing::debug!(subsystem_name = SUBSYSTEM, %entry_id, "Entry not found"));
            let svid = answer.and_then(|answer| {
                let svid = mint::svid(request, &answer, self.context.rotation, &self.context.jitter, &self.tainted);
                svid.map_err(|error| {
                    tracing::error!(subsystem_name = SUBSYSTEM, %error, %entry_id, "Received malformed X509-SVID from SPIRE server");
                    format!("its answer cannot be used: {error}")
                })
            });
            self.status.answered(entry_id, svid.as_ref().err().cloned());
            svids.extend(svid.ok().map(|svid| (entry_id.clone(), Arc::new(svid))));
        }
        Ok(svids)
    }

    /// Renews the agent's own SVID when its time has come.
    async fn rotate_own(&mut self) -> Result<(), AgentError> {
        if !self.context.inherited.may_renew() {
            return Ok(());
        }
        if self.own_has_ended() {
            return self.outlive().await;
        }
        if self.ended.take().is_some() {
            tracing::info!(subsystem_name = SUBSYSTEM, "The clock was set back: the agent's own SVID is good again");
            self.begin_anew(false).await;
        }
        let now_ms = self.context.clock.now_ms();
        if now_ms < self.svid.rotate_at_ms && !self.svid.is_tainted(&self.tainted) {
            return Ok(());
        }
        // Not while the next agent starts with this one's SVID.
        let context = self.context.clone();
        let Ok(_renewal) = context.renewal.try_lock() else { return Ok(()) };
        let reattest = self.svid.reattestable;
        let what = if reattest { "reattest agent" } else { "rotate agent SVID" };
        let call = self.context.metrics.call(if reattest { "agent_svid.reattest" } else { "agent_svid.rotate" });
        let result = if reattest { self.reattest().await } else { self.renew().await };
        call.finish_with(&result, AgentError::kind);
        let Err(error) = result else { return Ok(()) };
        tracing::error!(subsystem_name = SUBSYSTEM, %error, "Could not {what}");
        match attest::verdict_of(&error) {
            Verdict::Banned => {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Agent is banned: removing SVID and shutting down");
                self.delete_svid().await;
                Err(error)
            }
            Verdict::Reattest if !self.svid.reattestable => {
                tracing::error!(subsystem_name = SUBSYSTEM, %error, "Agent failed re-attestation; removing SVID and shutting down");
                self.delete_svid().await;
                Err(error)
            }
            _ => Ok(()), // at the next tick
        }
    }

    async fn renew(&mut self) -> Result<(), AgentError> {
        tracing::debug!(subsystem_name = SUBSYSTEM, "Rotating agent SVID");
        let key = AgentKey::generate(self.context.plugins.key_manager.as_ref(), Some(&self.svid.key)).await?;
        let answer = self.link.renew_agent(key.csr().await?).await?;
        let chain = answer.cert_chain.iter().map(|der| Arc::from(der.as_ref())).collect();
        let svid = AgentSvid::new(chain, key, self.svid.reattestable, self.context.rotation, &self.context.jitter)?;
        tracing::info!(subsystem_name = SUBSYSTEM, spiffe_id = %svid.id, "Successfully rotated agent SVID");
        self.use_svid(svid).await
    }

    async fn reattest(&mut self) -> Result<(), AgentError> {
        let svid = attest::reattest(&self.context, self.cache().clone(), &self.svid).await?;
        self.use_svid(svid).await
    }

    async fn use_svid(&mut self, mut svid: AgentSvid) -> Result<(), AgentError> {
        svid.accept_tainted(&self.tainted);
        svid.install(&self.identity)?;
        self.status.svid_changed(&svid);
        self.svid = svid;
        self.ended = None;
        self.store_svid().await;
        self.link.renewed();
        Ok(())
    }

    async fn store_svid(&self) {
        if let Err(error) = self.context.storage.store_svid(&self.svid.chain, self.svid.reattestable).await {
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Could not store SVID");
        }
    }

    /// SVID and bundle, in one write.
    pub(crate) async fn store(&self) {
        let roots = bundles::roots(&self.cache().snapshot().bundles.own);
        if let Err(error) = self.context.storage.store(&self.svid.chain, self.svid.reattestable, &roots).await {
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Could not store SVID");
        }
    }

    async fn delete_svid(&self) {
        self.context.sealed.forget();
        if let Err(error) = self.context.storage.delete_svid().await {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "Failed to remove SVID");
        }
    }
}

async fn post_status(link: &ServerLink, version: &str) {
    if let Err(error) = link.post_status(version).await {
        tracing::error!(subsystem_name = SUBSYSTEM, %error, agent_version = %version, "Failed to post agent status");
    }
}
