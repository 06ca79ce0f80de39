//! One agent's stream: it sleeps in a waker, and when woken looks up what it was told to look at.

use super::{Watcher, Watchers, lock};
use crate::authz::Call;
use crate::endpoints::Held;
use crate::entries::{Entries, Indexed};
use finial_core::{ErrorKind, SelectorSet, SpiffeId, UnixSeconds};
use finial_proto::convert::federates_with;
use finial_proto::digest::{Digests, bucket_of};
use finial_proto::encoded::{self, Encoded};
use finial_proto::sync::{BundleVersion, VersionedBundle, WatchRequest, WatchResponse};
use finial_runtime::telemetry::CallTimer;
use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio_stream::Stream;
use tonic::Status;

/// Entries in one message, and their bytes.
const PAGE: usize = 500;
const PAGE_BYTES: usize = 1 << 20;

/// Who opens a stream, and what it asks.
pub struct Opening {
    /// The call, for as long as the stream lasts.
    pub call: Arc<Call>,
    /// Measures it.
    pub timer: CallTimer,
    /// The agent.
    pub agent: SpiffeId,
    /// Its node selectors.
    pub selectors: Arc<SelectorSet>,
    /// When its SVID ends.
    pub not_after: UnixSeconds,
    /// What it has.
    pub request: WatchRequest,
    /// Keeps the connection.
    pub held: Held,
}

/// The answers of one stream.
pub struct WatchStream {
    call: Arc<Call>,
    timer: Option<CallTimer>,
    watchers: Arc<Watchers>,
    entries: Arc<Entries>,
    watcher: Arc<Watcher>,
    /// The versions of the bundles that the agent has; with 0, those it has not and wants.
    bundles: BTreeMap<Box<str>, u64>,
    /// What could not be sent yet.
    backlog: Option<Box<Backlog>>,
    ended: bool,
    _held: Held,
}

/// An answer in pages.
struct Backlog {
    /// Goes with the first page.
    head: WatchResponse,
    /// Last first.
    entries: Vec<Indexed>,
}

impl Backlog {
    fn next_page(&mut self) -> encoded::WatchResponse {
        let mut bytes = 0;
        let fits = |entry: &&Indexed| {
            bytes += entry.encoded().len();
            bytes <= PAGE_BYTES
        };
        let count = self.entries.iter().rev().take(PAGE).take_while(fits).count().max(1).min(self.entries.len());
        let page = self.entries.split_off(self.entries.len() - count);
        self.head.more = !self.entries.is_empty();
        let message = Encoded::with_entries(&self.head, None, page.iter().rev().map(Indexed::encoded));
        self.head = WatchResponse { revision: self.head.revision, ..WatchResponse::default() };
        message
    }
}

impl WatchStream {
    /// Registers the agent and compares what it has with what it may have, in this order, so that nothing is missed.
    ///
    /// # Errors
    /// `InvalidArgument` for a number of digests that is no power of two.
    pub fn open(watchers: &Arc<Watchers>, entries: &Arc<Entries>, opening: Opening) -> Result<Self, Status> {
        let Opening { call, timer, agent, selectors, not_after, request, held } = opening;
        let theirs = match request.entry_digests {
            sums if sums.is_empty() => None,
            sums => Some(Digests::received(sums).ok_or_else(|| {
                call.fail(ErrorKind::InvalidArgument, "the number of entry digests is not a power of two up to 65536")
            })?),
        };
        let watcher = watchers.register(agent, selectors, not_after);
        let mut this = Self {
            call,
            timer: Some(timer),
            watchers: watchers.clone(),
            entries: entries.clone(),
            watcher,
            bundles: BTreeMap::new(),
            backlog: None,
            ended: false,
            _held: held,
        };
        this.compare(theirs, request.bundles);
        Ok(this)
    }

    fn compare(&mut self, theirs: Option<Digests>, bundles: Vec<BundleVersion>) {
        let revision = self.watchers.revision();
        let mut all = self.entries.authorized(&self.watcher.agent, &self.watcher.selectors);
        self.want(&all);
        for known in bundles {
            if let Some(version) = self.bundles.get_mut(known.trust_domain.as_str()) {
                *version = known.version;
            }
        }
        let mut head = WatchResponse { revision, ..WatchResponse::default() };
        match theirs {
            None if all.is_empty() => {}
            None => (head.buckets, head.bucket_count) = (vec![0], 1),
            Some(theirs) => {
                let mut ours = Digests::new(theirs.buckets());
                for entry in &all {
                    ours.add(entry.id(), entry.revision_number(), entry.created_at());
                }
                let differing: BTreeSet<u32> = ours.differing(&theirs).into_iter().collect();
                let count = ours.buckets();
                all.retain(|e| u32::try_from(bucket_of(e.id(), count)).is_ok_and(|at| differing.contains(&at)));
                if !differing.is_empty() {
                    head.buckets = differing.into_iter().collect();
                    head.bucket_count = u32::try_from(count).unwrap_or_default();
                }
            }
        }
        if head.buckets.is_empty() {
            all.clear();
        }
        self.answer(head, all);
    }

    /// The bundles of these entries are wanted, and the own one.
    fn want(&mut self, entries: &[Indexed]) {
        let own = self.watchers.bundles.own().into();
        self.bundles.entry(own).or_default();
        for entry in entries {
            for domain in federates_with(entry.encoded()) {
                self.bundles.entry(domain.into()).or_default();
            }
        }
    }

    /// Makes an answer of this and of bundles that the agent has not in this version, if that is anything.
    fn answer(&mut self, mut head: WatchResponse, mut entries: Vec<Indexed>) {
        let now = self.watchers.bundles.now();
        for (name, version) in &mut self.bundles {
            match now.get(name) {
                Some(bundle) if bundle.version != *version => {
                    *version = bundle.version;
                    head.bundles.push(VersionedBundle { bundle: Some(bundle.proto.clone()), version: bundle.version });
                }
                None if *version != 0 => {
                    *version = 0;
                    head.removed_bundles.push(name.to_string());
                }
                _ => {}
            }
        }
        let empty = head == WatchResponse { revision: head.revision, ..WatchResponse::default() };
        if !empty || !entries.is_empty() {
            entries.reverse();
            self.backlog = Some(Box::new(Backlog { head, entries }));
        }
    }

    /// Whether the stream may go on; `Ok(false)` when it is to be opened again.
    fn may_go_on(&self) -> Result<bool, Status> {
        let (agent, displaced, closing) = {
            let mut pending = lock(&self.watcher.pending);
            (std::mem::take(&mut pending.agent), pending.displaced, pending.closing)
        };
        if closing {
            return Err(Status::unavailable("the server is shutting down"));
        }
        if displaced {
            return Err(Status::unavailable("a newer stream of the same agent took the place of this one"));
        }
        if agent {
            if self.call.is_superseded() {
                return Ok(false);
            }
            self.call.still_agent()?;
            let (_, selectors) = self.call.agent()?;
            return Ok(*selectors == *self.watcher.selectors);
        }
        Ok(true)
    }

    /// Looks at what was put aside; `false` when that is more than can be told.
    fn look(&mut self) -> bool {
        let pending = self.watcher.take();
        if pending.everything {
            return false;
        }
        if pending.ids.is_empty() && !pending.bundles {
            return true;
        }
        let mut head = WatchResponse { revision: self.watchers.revision(), ..WatchResponse::default() };
        let ids: BTreeSet<&str> = pending.ids.iter().flat_map(|ids| ids.iter().map(|id| &**id)).collect();
        let mut changed = Vec::new();
        if !ids.is_empty() {
            let (agent, selectors) = (&self.watcher.agent, &self.watcher.selectors);
            let found = self.entries.authorized_among(agent, selectors, ids.iter().copied());
            for (id, entry) in ids.iter().zip(found) {
                match entry {
                    Some(entry) => changed.push(entry),
                    None => head.removed_entry_ids.push((*id).to_owned()),
                }
            }
            self.want(&changed);
        }
        self.answer(head, changed);
        true
    }

    fn end(&mut self, result: Result<(), &Status>) {
        self.ended = true;
        if let Err(status) = result {
            self.call.audit_error(status);
        }
        if let Some(timer) = self.timer.take() {
            timer.finish(crate::authz::code_name(result.err().map_or(tonic::Code::Ok, Status::code)));
        }
    }
}

impl Stream for WatchStream {
    type Item = Result<encoded::WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.watcher.waker.register(cx.waker());
        // Each time: a ban holds at once, also in the middle of an answer.
        let goes_on = self.may_go_on().map(|may| may && (self.backlog.is_some() || self.look()));
        match goes_on {
            Ok(true) => {}
            Ok(false) => {
                self.end(Ok(()));
                return Poll::Ready(None);
            }
            Err(status) => {
                self.end(Err(&status));
                return Poll::Ready(Some(Err(status)));
            }
        }
        let Some(backlog) = &mut self.backlog else { return Poll::Pending };
        let page = backlog.next_page();
        if backlog.entries.is_empty() {
            self.backlog = None;
        }
        Poll::Ready(Some(Ok(page)))
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        self.watchers.forget(&self.watcher);
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
