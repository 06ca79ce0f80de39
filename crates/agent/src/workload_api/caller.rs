//! Who calls: the process behind a connection, what was attested of it, and for how long that holds.
//! The decision is `docs/adr/0002-attestation-per-connection.md`.

use super::patience::Patient;
use crate::cache::{Cache, View};
use finial_core::{Selector, SelectorSet};
use finial_net::unix::{PeerError, PeerInfo, UnixConnection};
use finial_plugin::{Peer, WorkloadAttestor};
use finial_proto::convert::{ErrorInfo, with_error_info};
use finial_runtime::Metrics;
use rustix::fs::{AtFlags, fstat, statat};
use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::server::Connected;

/// As log lines say it.
const SUBSYSTEM: &str = "workload_attestor";
/// As details of an answer say it.
const ATTESTORS_FAILED: &str = "WORKLOAD_ATTESTORS_FAILED";

/// For how long selectors of a connection's process are believed, while nothing that we look at on each call changed.
const ATTESTED_FOR: Duration = Duration::from_secs(5);
/// How often a process is looked at that changes meanwhile.
pub(crate) const LOOKS_MAX: usize = 3;
/// How long one attestor may take.
pub(crate) const ATTESTOR_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a call waits for its turn: for an attestation that began before it came, and for one after that.
const TURN_TIMEOUT: Duration = Duration::from_secs(2 * LOOKS_MAX as u64 * ATTESTOR_TIMEOUT.as_secs());

/// What changes when a process runs another program or changes its user: looked at on each call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Print {
    exe_device: u64,
    exe_inode: u64,
    exe_changed: (i64, i64),
    uid: u32,
    gid: u32,
}

impl Print {
    /// `None` if we may not look (another user's process, and we are not root): then nothing is believed twice.
    #[allow(clippy::unnecessary_cast)] // the fields' types differ between architectures
    fn of(peer: &PeerInfo) -> Option<Self> {
        let folder = peer.handle.proc_dir();
        let owner = fstat(folder).ok()?;
        let exe = statat(folder, "exe", AtFlags::empty()).ok()?;
        Some(Self {
            exe_device: exe.st_dev as u64,
            exe_inode: exe.st_ino as u64,
            exe_changed: (exe.st_ctime as i64, exe.st_ctime_nsec as i64),
            uid: owner.st_uid,
            gid: owner.st_gid,
        })
    }
}

/// What a caller is told of attestors that failed: a sentence by name. Why they failed may be none of its business.
type Failed = BTreeMap<String, String>;

/// The failure, with the names of the attestors that are to blame.
fn explained(status: &Status, reason: &str, failed: &Failed) -> Status {
    let info = ErrorInfo { reason: reason.to_owned(), domain: "finial".to_owned(), metadata: failed.clone() };
    with_error_info(status, &info)
}

fn attestation_failed(reason: &str, failed: &Failed) -> Status {
    explained(&Status::unavailable("workload attestation failed"), reason, failed)
}

/// What came of attesting a process.
#[derive(Clone)]
struct Attested {
    /// When it began.
    at: Instant,
    print: Option<Print>,
    failed: Arc<Failed>,
    view: Result<Arc<View>, Status>,
}

/// The process behind a connection.
pub(crate) struct Caller {
    pub(crate) peer: PeerInfo,
    attested: Mutex<Option<Attested>>,
    /// Held while it is attested: many calls at once are no reason to attest it many times.
    attesting: tokio::sync::Mutex<()>,
    /// The process is gone: the connection is to be closed.
    gone: AtomicBool,
}

impl Caller {
    fn new(peer: PeerInfo) -> Self {
        Self {
            peer,
            attested: Mutex::new(None),
            attesting: tokio::sync::Mutex::default(),
            gone: AtomicBool::new(false),
        }
    }

    /// A process in whose name another one calls.
    pub(crate) fn of_pid(pid: i32) -> Result<Self, PeerError> {
        PeerInfo::of_pid(pid).map(Self::new)
    }

    /// Whether the agent calls itself, as its health check does.
    pub(crate) fn is_agent(&self) -> bool {
        u32::try_from(self.peer.pid).is_ok_and(|pid| pid == std::process::id())
    }

    /// What it is now.
    pub(crate) fn print(&self) -> Option<Print> {
        Print::of(&self.peer)
    }

    /// Why it is refused: attestors that failed may be the reason that it has no identity.
    pub(crate) fn refused(&self, status: Status) -> Status {
        match self.attested() {
            Some(Attested { failed, .. }) if !failed.is_empty() => explained(&status, ATTESTORS_FAILED, &failed),
            _ => status,
        }
    }

    fn check_alive(&self) -> Result<(), Status> {
        if self.peer.handle.is_alive() {
            return Ok(());
        }
        self.gone.store(true, Ordering::Release);
        Err(Status::unauthenticated("could not verify existence of the original caller: the process has ended"))
    }

    fn attested(&self) -> Option<Attested> {
        self.attested.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The view that still holds, if nothing changed.
    fn remembered(&self) -> Option<Arc<View>> {
        let Attested { at, print, view, .. } = self.attested()?;
        let view = view.ok()?;
        let fresh = at.elapsed() < ATTESTED_FOR && print.is_some() && self.print() == print;
        fresh.then_some(view)
    }

    /// What came of an attestation that began after a call came: the call's own would have been no other.
    fn since(&self, came: Instant) -> Option<Result<Arc<View>, Status>> {
        let Attested { at, print, view, .. } = self.attested()?;
        (at > came && (view.is_err() || self.print() == print)).then_some(view)
    }
}

/// What one attestor said of a process.
pub(crate) struct Report {
    pub(crate) name: String,
    pub(crate) took: Duration,
    /// Or why it failed.
    pub(crate) result: Result<Vec<Selector>, String>,
    /// It failed because it did not answer in time.
    late: bool,
}

/// What a caller is told of those that failed.
fn failed(reports: &[Report]) -> Failed {
    let failed = reports.iter().filter(|report| report.result.is_err());
    let says = |report: &Report| match report.late {
        true => "did not answer in time",
        false => "failed; the agent's log says why",
    };
    failed.map(|report| (report.name.clone(), says(report).to_owned())).collect()
}

/// What all attestors said of a process that did not change meanwhile.
struct Look {
    at: Instant,
    print: Option<Print>,
    /// In the order of the configuration.
    reports: Vec<Report>,
}

/// Attests callers, with all attestors at the same time.
pub(crate) struct Attestation {
    pub(crate) attestors: Vec<Arc<dyn WorkloadAttestor>>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) metrics: Metrics,
}

impl Attestation {
    /// What the caller may see.
    pub(crate) async fn view(&self, caller: &Caller) -> Result<Arc<View>, Status> {
        caller.check_alive()?;
        if let Some(view) = caller.remembered() {
            return Ok(view);
        }
        let came = Instant::now();
        let Ok(_attesting) = tokio::time::timeout(TURN_TIMEOUT, caller.attesting.lock()).await else {
            tracing::error!(
                subsystem_name = SUBSYSTEM,
                pid = caller.peer.pid,
                "Too many calls wait for the workload's attestation"
            );
            return Err(attestation_failed("TOO_MANY_CALLS", &Failed::new()));
        };
        caller.check_alive()?;
        if let Some(view) = caller.remembered() {
            return Ok(view);
        }
        if let Some(result) = caller.since(came) {
            return result;
        }
        let attested = self.attest(caller).await;
        let view = attested.view.clone();
        *caller.attested.lock().unwrap_or_else(PoisonError::into_inner) = Some(attested);
        view
    }

    async fn attest(&self, caller: &Caller) -> Attested {
        let began = Instant::now();
        match self.look(caller).await {
            Ok(Look { at, print, reports }) => {
                let failed = failed(&reports);
                let selectors = self.selectors(caller, reports, &failed);
                let view = selectors.map(|selectors| self.cache.view(&selectors));
                Attested { at, print, failed: Arc::new(failed), view }
            }
            Err(status) => Attested { at: began, print: None, failed: Arc::default(), view: Err(status) },
        }
    }

    /// What each attestor says of a process now; nothing of it is believed later.
    pub(crate) async fn examine(&self, caller: &Caller) -> Result<Vec<Report>, Status> {
        caller.check_alive()?;
        Ok(self.look(caller).await?.reports)
    }

    async fn look(&self, caller: &Caller) -> Result<Look, Status> {
        let mut blamed = Failed::new();
        for _ in 0..LOOKS_MAX {
            let print = caller.print();
            let at = Instant::now();
            let call = self.metrics.call("workload_api.workload_attestation");
            let reports = futures::future::join_all(self.attestors.iter().map(|a| self.ask(a, caller))).await;
            let none = !reports.is_empty() && reports.iter().all(|report| report.result.is_err());
            call.finish(if none { "Unknown" } else { "OK" });
            // Otherwise we might have attested another process with the same number.
            caller.check_alive()?;
            if caller.print() == print {
                return Ok(Look { at, print, reports });
            }
            // The selectors are in part those of the program or user before.
            blamed = failed(&reports);
        }
        tracing::error!(
            subsystem_name = SUBSYSTEM,
            pid = caller.peer.pid,
            "The workload changed while it was attested"
        );
        Err(attestation_failed("WORKLOAD_CHANGED", &blamed))
    }

    async fn ask(&self, attestor: &Arc<dyn WorkloadAttestor>, caller: &Caller) -> Report {
        let peer = Peer { pid: caller.peer.pid, proc_dir: caller.peer.handle.proc_dir() };
        let name = attestor.name();
        let mut call = self.metrics.call("workload_api.workload_attestor");
        call.label("attestor", name);
        let started = Instant::now();
        let answer = tokio::time::timeout(ATTESTOR_TIMEOUT, attestor.attest(&peer)).await;
        let late = answer.is_err();
        let result = match answer {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(_) => Err("it took too long".to_owned()),
        };
        call.finish(if result.is_ok() { "OK" } else { "Unknown" });
        if let Err(error) = &result {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, pid = caller.peer.pid, "workload attestor {name:?} failed");
        }
        Report { name: name.to_owned(), took: started.elapsed(), result, late }
    }

    /// All selectors, if any attestor had an answer.
    fn selectors(&self, caller: &Caller, reports: Vec<Report>, failed: &Failed) -> Result<SelectorSet, Status> {
        let (all, mut successes) = (reports.len(), 0);
        let mut selectors = Vec::<Selector>::new();
        for found in reports.into_iter().filter_map(|report| report.result.ok()) {
            successes += 1;
            selectors.extend(found);
        }
        if successes == 0 && all > 0 {
            tracing::error!(subsystem_name = SUBSYSTEM, pid = caller.peer.pid, "Workload attestation failed");
            return Err(attestation_failed(ATTESTORS_FAILED, failed));
        }
        if successes < all {
            tracing::error!(subsystem_name = SUBSYSTEM, pid = caller.peer.pid, "Failed to collect all selectors");
        }
        self.metrics.sample("workload_api.discovered_selectors", selectors.len() as f64, &[]);
        Ok(SelectorSet::new(selectors))
    }
}

/// A connection of a workload. Requests on it carry an `Arc<Caller>` extension. It ends when the process has gone.
pub(crate) struct CallerConnection {
    inner: Patient<UnixConnection>,
    caller: Arc<Caller>,
}

impl CallerConnection {
    pub(crate) fn new(inner: UnixConnection) -> Self {
        let caller = Arc::new(Caller::new(inner.peer().clone()));
        Self { inner: Patient::new(inner), caller }
    }
}

impl Connected for CallerConnection {
    type ConnectInfo = Arc<Caller>;

    fn connect_info(&self) -> Arc<Caller> {
        self.caller.clone()
    }
}

impl AsyncRead for CallerConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.caller.gone.load(Ordering::Acquire) {
            return Poll::Ready(Ok(())); // the end
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for CallerConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::testing::bundle;
    use finial_core::SystemClock;
    use finial_plugin::PluginError;
    use std::sync::atomic::AtomicUsize;

    /// Does not answer.
    #[derive(Default)]
    struct Stuck(AtomicUsize);

    #[async_trait::async_trait]
    impl WorkloadAttestor for Stuck {
        fn name(&self) -> &str {
            "stuck"
        }

        async fn attest(&self, _: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
            self.0.fetch_add(1, Ordering::SeqCst);
            std::future::pending().await
        }
    }

    fn stuck() -> (Arc<Stuck>, Attestation, Caller) {
        let stuck = Arc::new(Stuck::default());
        let (cache, _) = Cache::new(bundle("td", &[]), 10, Arc::new(SystemClock));
        let attestation = Attestation { attestors: vec![stuck.clone()], cache, metrics: Metrics::disabled() };
        (stuck, attestation, Caller::of_pid(std::process::id() as i32).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_shared_by_those_who_waited_for_it() {
        let (stuck, attestation, caller) = stuck();
        let results = futures::future::join_all((0..20).map(|_| attestation.view(&caller))).await;
        assert!(results.iter().all(|result| result.as_ref().is_err_and(|e| e.code() == tonic::Code::Unavailable)));
        assert_eq!(stuck.0.load(Ordering::SeqCst), 2, "one that began before the others came, and one for all of them");
        assert!(attestation.view(&caller).await.is_err());
        assert_eq!(stuck.0.load(Ordering::SeqCst), 3, "it is not remembered for those who come later");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_does_not_answer_in_time_is_named() {
        let (_, attestation, caller) = stuck();
        let status = attestation.view(&caller).await.err().unwrap();
        let ErrorInfo { reason, domain, metadata } = finial_proto::convert::error_info(&status).unwrap();
        assert_eq!((reason.as_str(), domain.as_str()), (ATTESTORS_FAILED, "finial"));
        assert_eq!(metadata, Failed::from([("stuck".to_owned(), "did not answer in time".to_owned())]));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever_for_a_turn() {
        let (stuck, attestation, caller) = stuck();
        let _attesting = caller.attesting.lock().await;
        let ended = tokio::time::timeout(Duration::from_secs(3600), attestation.view(&caller)).await;
        assert_eq!(ended.expect("within an hour").err().unwrap().code(), tonic::Code::Unavailable);
        assert_eq!(stuck.0.load(Ordering::SeqCst), 0);
    }
}
