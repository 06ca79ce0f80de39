//! The one loop that speaks with the server: entries, bundles, workloads' SVIDs and the agent's own.
//!
//! What to do is decided by [`plan`], a pure function. A Finial server tells what changes through a stream ([`watch`]), and is
//! then hardly ever asked; SPIRE's is asked at every interval.

mod bundles;
pub(crate) mod client;
mod entries;
pub(crate) mod jwt;
mod mint;
mod pace;
pub(crate) mod plan;
mod watch;
pub(crate) mod wit;

use crate::Context;
use crate::attest;
use crate::cache::{BundleForms, Cache, CacheWriter, Change, Record};
use crate::entry::WorkloadEntry;
use crate::error::{AgentError, ServerError, Verdict};
use crate::status::AgentStatus;
use crate::svid::{AgentKey, AgentSvid};
use client::ServerLink;
use entries::{EntrySync, SyncStats};
use finial_config::RebootstrapMode;
use finial_core::{EntryId, ErrorKind, TrustDomain, UnixSeconds};
use finial_crypto::tls::TlsIdentity;
use finial_proto::sync::{BundleVersion, WatchRequest, WatchResponse};
use finial_runtime::Backoff;
use finial_runtime::log::Time;
use pace::{Outcome, Pace};
use plan::{BatchSize, Input, plan};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use watch::{Event, Watch};

/// As log lines say it.
const SUBSYSTEM: &str = "manager";

/// After failing to get SVIDs, at first and at most.
const SVID_BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(4 * 60));
/// SVIDs in the cache, unless configured.
const SVIDS_KEPT: usize = 1000;
/// How often due renewals are looked for, also when syncs are rarer.
const TICK: Duration = Duration::from_secs(5);
/// Keys made before other tasks get their turn.
const KEYS_AT_ONCE: usize = 8;

/// The loop and all that it alone changes.
pub(crate) struct Syncer {
    pub(crate) context: Arc<Context>,
    pub(crate) writer: CacheWriter,
    pub(crate) link: Arc<ServerLink>,
    identity: Arc<TlsIdentity>,
    pub(crate) status: Arc<AgentStatus>,
    svid: AgentSvid,
    /// All entries, those for SVID stores included.
    pub(crate) entries: BTreeMap<EntryId, Arc<WorkloadEntry>>,
    /// Bundles that the server told of by itself, with their versions.
    told: BTreeMap<TrustDomain, (Arc<BundleForms>, u64)>,
    batch: BatchSize,
    /// Since when the server has been signed by someone unknown.
    unknown_since_ms: Option<i64>,
    /// Tainted keys that were dealt with.
    pub(crate) tainted_jwt_done: Vec<String>,
    pub(crate) tainted: Vec<Vec<u8>>,
    /// When it last looked for SVIDs to ask for.
    svids_updated: Option<Instant>,
    /// The server was told our version.
    pub(crate) posted: bool,
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
            entries: BTreeMap::new(),
            told: BTreeMap::new(),
            batch: BatchSize::new(),
            unknown_since_ms: None,
            tainted_jwt_done: Vec::new(),
            tainted: Vec::new(),
            svids_updated: None,
            posted: false,
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
            self.store();
            let error = tokio::select! {
                result = self.first_attempt() => match result {
                    Ok(_) => return Ok(true),
                    Err(error) => error,
                },
                () = context.shutdown.cancelled() => return Ok(false),
            };
            self.heed_at_start(&error)?;
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
    pub(crate) fn heed_at_start(&mut self, error: &ServerError) -> Result<(), AgentError> {
        let what = match error.verdict() {
            Verdict::Reattest => "Agent needs to re-attest",
            Verdict::Banned => "Agent is banned",
            Verdict::UnknownAuthority => return self.unknown_authority(error),
            Verdict::Retry => return Ok(()),
        };
        tracing::error!(subsystem_name = SUBSYSTEM, %error, "{what}: removing SVID and shutting down");
        self.delete_svid();
        Err(AgentError::new(finial_proto::convert::kind_of(error.status.code()), error.to_string()))
    }

    /// Runs until it fails or is dropped.
    pub(crate) async fn run(mut self) -> Result<(), AgentError> {
        let context = self.context.clone();
        let mut pace = Pace::new(context.settings.sync_interval);
        let mut svid_backoff = Backoff::new(SVID_BACKOFF.0, SVID_BACKOFF.1).shape(1.5, 0.1);
        let mut next_sync = self.first_sync.unwrap_or_else(|| Instant::now() + pace.first());
        let mut next_tick = Instant::now();
        let mut svids_not_before = Instant::now();
        let mut watch = Watch::new(self.link.generation());
        loop {
            watch.follow(self.link.generation());
            let cache = self.cache().clone();
            let wanted = async {
                // A timer takes a millisecond even for what is over.
                if Instant::now() < svids_not_before {
                    tokio::time::sleep_until(svids_not_before).await;
                }
                cache.wanted().await;
            };
            let result = tokio::select! {
                () = tokio::time::sleep_until(next_sync) => {
                    let result = self.synchronize().await;
                    let wait = pace.after(self.outcome(&result));
                    next_sync = Instant::now() + if watch.is_open() && result.is_ok() { pace.told() } else { wait };
                    if self.svid.is_tainted(&self.tainted) {
                        next_tick = Instant::now();
                    }
                    result.inspect_err(|error| tracing::error!(subsystem_name = SUBSYSTEM, %error, "Synchronize failed"))
                }
                () = tokio::time::sleep_until(next_tick) => {
                    let own = self.rotate_own().await;
                    next_tick = Instant::now() + TICK;
                    own?;
                    if watch.is_open() {
                        self.status.synced(self.context.clock.now());
                    }
                    self.cache().forget_idle_views();
                    let recent = self.svids_updated.is_some_and(|at| at.elapsed() < TICK.mul_f64(0.9));
                    if recent || Instant::now() < svids_not_before { Ok(true) } else { self.update_svids().await }
                }
                () = wanted => self.update_svids().await,
                event = watch.next() => match event {
                    Event::Due => {
                        watch.open(self.link.watch(self.what_we_have()));
                        continue;
                    }
                    Event::Opened => {
                        tracing::debug!(subsystem_name = SUBSYSTEM, "The server tells of changes by itself");
                        next_sync = Instant::now() + pace.told();
                        continue;
                    }
                    Event::Answer(answer) => {
                        let result = self.take_answer(*answer).await;
                        if result.is_err() {
                            // Another stream tells it again, and would fail again at once.
                            watch.lost();
                            next_sync = next_sync.min(Instant::now() + pace.first());
                        }
                        if self.svid.is_tainted(&self.tainted) {
                            next_tick = Instant::now();
                        }
                        result.inspect_err(|error| tracing::error!(subsystem_name = SUBSYSTEM, %error, "Synchronize failed"))
                    }
                    Event::Ended => {
                        next_sync = next_sync.min(Instant::now() + pace.first());
                        continue;
                    }
                    Event::Failed(error) => {
                        next_sync = next_sync.min(Instant::now() + pace.first());
                        if matches!(error.verdict(), Verdict::Retry | Verdict::UnknownAuthority) {
                            tracing::info!(subsystem_name = SUBSYSTEM, %error, "The server does not tell of changes now; asking for them meanwhile");
                            continue;
                        }
                        Err(error)
                    }
                },
            };
            match &result {
                Ok(true) => {
                    svid_backoff.reset();
                    svids_not_before = Instant::now();
                }
                // The server would not give some: workloads that ask for them must not make us ask all the time.
                Ok(false) => {
                    svids_not_before = Instant::now() + svid_backoff.next_wait();
                    next_tick = next_tick.min(svids_not_before);
                }
                Err(error) => {
                    self.status.set_away_because(error.to_string());
                    // Whatever is wrong with the connection, the next call has a new one.
                    self.link.release();
                    svids_not_before = Instant::now() + svid_backoff.next_wait();
                    next_tick = next_tick.min(svids_not_before);
                    self.heed(error).await?;
                }
            }
        }
    }

    fn outcome(&self, result: &Result<bool, ServerError>) -> Outcome {
        match result {
            Ok(_) => Outcome::Synced { empty: self.cache().snapshot().svid_count() == 0 },
            Err(error) if error.verdict() == Verdict::UnknownAuthority => Outcome::UnknownAuthority,
            Err(_) => Outcome::Failed,
        }
    }

    /// Does what a refusal of the server asks for.
    async fn heed(&mut self, error: &ServerError) -> Result<(), AgentError> {
        match error.verdict() {
            Verdict::Retry => Ok(()),
            Verdict::UnknownAuthority => self.unknown_authority(error),
            Verdict::Banned => {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Agent is banned: removing SVID and shutting down");
                self.delete_svid();
                Err(AgentError::new(ErrorKind::Denied, error.to_string()))
            }
            Verdict::Reattest => {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Agent needs to re-attest; will attempt to re-attest");
                let reattested = if self.svid.reattestable {
                    self.reattest().await
                } else {
                    Err(AgentError::internal("attestation method is not re-attestable"))
                };
                reattested.map_err(|reason| {
                    tracing::error!(subsystem_name = SUBSYSTEM, error = %reason, "Agent failed re-attestation; removing SVID and shutting down");
                    self.delete_svid();
                    AgentError::new(ErrorKind::Denied, error.to_string())
                })
            }
        }
    }

    /// The server is signed by an authority that we do not know. Ends the agent, at once or after the configured delay.
    fn unknown_authority(&mut self, error: &ServerError) -> Result<(), AgentError> {
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
        self.context.storage.store(&[], false, &[])?;
        Err(AgentError::internal("shutting down for rebootstrapping"))
    }

    /// Entries and bundles, then whatever SVIDs follow from them; see [`Syncer::update_svids`].
    async fn synchronize(&mut self) -> Result<bool, ServerError> {
        let call = self.context.metrics.call("manager.sync.fetch_entries_updates");
        let fetched = self.fetch().await;
        call.finish_with(&fetched, |e| finial_proto::convert::kind_of(e.status.code()));
        self.writer.publish(fetched.inspect_err(|_| self.status.not_synced(None))?);
        self.unknown_since_ms = None;
        if !std::mem::replace(&mut self.posted, true) {
            post_status(&self.link, &self.context.version).await;
        }
        let complete = self.update_svids().await?;
        self.status.synced(self.context.clock.now());
        Ok(complete)
    }

    async fn fetch(&mut self) -> Result<Change, ServerError> {
        let settings = &self.context.settings;
        let (entries, stats) = if settings.use_sync_authorized_entries {
            self.link.sync_entries(&self.entries).await?
        } else {
            self.link.all_entries(&self.entries).await?
        };
        let bundles = self.fetch_bundles(self.federated_domains(entries.as_ref())).await?;
        Ok(Change { entries: self.take_entries(entries, stats), bundles, ..Change::default() })
    }

    /// What of new entries is for the cache, which must have it: they are known from now on, and nobody tells of them again.
    fn take_entries(
        &mut self,
        entries: Option<BTreeMap<EntryId, Arc<WorkloadEntry>>>,
        stats: SyncStats,
    ) -> Option<BTreeMap<EntryId, Arc<WorkloadEntry>>> {
        let metrics = &self.context.metrics;
        metrics.gauge("sync_entries_total", stats.total as f64, &[]);
        metrics.gauge("sync_entries_missing", stats.missing as f64, &[]);
        metrics.gauge("sync_entries_stale", stats.stale as f64, &[]);
        metrics.gauge("sync_entries_dropped", stats.dropped as f64, &[]);
        metrics.count("lru_cache_entry_add", stats.missing as f64, &[]);
        metrics.count("lru_cache_entry_update", stats.stale as f64, &[]);
        metrics.count("lru_cache_entry_remove", stats.dropped as f64, &[]);
        let entries = entries?;
        self.entries = entries.clone();
        Some(entries)
    }

    /// For the server to compare with what we may have.
    fn what_we_have(&self) -> WatchRequest {
        let version = |(domain, (_, version)): (&TrustDomain, &(Arc<BundleForms>, u64))| BundleVersion {
            trust_domain: domain.as_str().to_owned(),
            version: *version,
        };
        WatchRequest {
            entry_digests: entries::digests(&self.entries),
            bundles: self.told.iter().map(version).collect(),
        }
    }

    /// What the server told by itself, and whatever SVIDs follow from it; see [`Syncer::update_svids`].
    async fn take_answer(&mut self, mut answer: WatchResponse) -> Result<bool, ServerError> {
        let (entries, stats) = {
            let mut sync = EntrySync::new(&self.entries);
            sync.pushed(&mut answer);
            sync.finish()
        };
        let domains = self.federated_domains(entries.as_ref());
        let bundles = self.take_bundles(answer.bundles, &answer.removed_bundles, domains)?;
        let entries = self.take_entries(entries, stats);
        self.writer.publish(Change { entries, bundles, ..Change::default() });
        let complete = self.update_svids().await?;
        self.status.synced(self.context.clock.now());
        Ok(complete)
    }

    /// Asks for the SVIDs that the plan names, batch by batch, and publishes each batch. Whether all were issued.
    async fn update_svids(&mut self) -> Result<bool, ServerError> {
        self.svids_updated = Some(Instant::now());
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
        let mut left = plan.request.as_slice();
        let mut complete = true;
        while !left.is_empty() {
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
                    complete &= svids.len() == now.len();
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
        let (held, entries) = {
            let snapshot = self.cache().snapshot();
            (snapshot.svid_count(), snapshot.records.len())
        };
        let metrics = &self.context.metrics;
        metrics.gauge("lru_cache_svid_map_size", held as f64, &[]);
        metrics.gauge("lru_cache_record_map_size", entries as f64, &[]);
        metrics.gauge("jwt_svid_cache_size", self.cache().jwt.len() as f64, &[]);
        Ok(complete)
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
        if now_ms > self.svid.not_after.saturating_mul(1000) {
            return Err(AgentError::internal(format!("current SVID has already expired and {what} failed: {error}"))
                .because(error));
        }
        match attest::verdict_of(&error) {
            Verdict::Banned => {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Agent is banned: removing SVID and shutting down");
                self.delete_svid();
                Err(error)
            }
            Verdict::Reattest if !self.svid.reattestable => {
                tracing::error!(subsystem_name = SUBSYSTEM, %error, "Agent failed re-attestation; removing SVID and shutting down");
                self.delete_svid();
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
        self.use_svid(svid)
    }

    async fn reattest(&mut self) -> Result<(), AgentError> {
        let svid = attest::reattest(&self.context, self.cache().clone(), &self.svid).await?;
        self.use_svid(svid)
    }

    fn use_svid(&mut self, mut svid: AgentSvid) -> Result<(), AgentError> {
        svid.accept_tainted(&self.tainted);
        svid.install(&self.identity)?;
        self.status.svid_changed(&svid);
        self.svid = svid;
        self.store_svid();
        self.link.release();
        Ok(())
    }

    fn store_svid(&self) {
        if let Err(error) = self.context.storage.store_svid(&self.svid.chain, self.svid.reattestable) {
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Could not store SVID");
        }
    }

    /// SVID and bundle, in one write.
    pub(crate) fn store(&self) {
        let roots = bundles::roots(&self.cache().snapshot().bundles.own);
        if let Err(error) = self.context.storage.store(&self.svid.chain, self.svid.reattestable, &roots) {
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Could not store SVID");
        }
    }

    fn delete_svid(&self) {
        self.context.sealed.forget();
        if let Err(error) = self.context.storage.delete_svid() {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "Failed to remove SVID");
        }
    }
}

async fn post_status(link: &ServerLink, version: &str) {
    if let Err(error) = link.post_status(version).await {
        tracing::error!(subsystem_name = SUBSYSTEM, %error, agent_version = %version, "Failed to post agent status");
    }
}
