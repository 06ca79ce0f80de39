//! The only place that spawns. Tasks have names; a failed service or a panic ends the program in order, with its reason.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Any error of a service.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Asks tasks to end, and tells them that they were asked. Clones share one state; children also follow their parent.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(CancellationToken);

impl Shutdown {
    /// Not triggered yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks everyone to end. Idempotent.
    pub fn trigger(&self) {
        self.0.cancel();
    }

    /// Whether it was triggered.
    pub fn is_triggered(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Returns once it was triggered; safe to drop and call again.
    pub async fn cancelled(&self) {
        self.0.cancelled().await;
    }

    /// One that triggers with this one, or alone.
    pub fn child(&self) -> Self {
        Self(self.0.child_token())
    }
}

/// Why the program ends other than by request: the first service that failed, or a panic.
#[derive(Debug)]
pub struct TaskFailure {
    /// The task's name.
    pub task: &'static str,
    /// What it said.
    pub error: BoxError,
}

impl fmt::Display for TaskFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.task, self.error)
    }
}
impl std::error::Error for TaskFailure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

#[derive(Default)]
struct State {
    failure: Option<TaskFailure>,
    /// How many services of each name run, so that a drain that takes too long can say who is late.
    running: BTreeMap<&'static str, usize>,
}

struct Inner {
    shutdown: Shutdown,
    tracker: TaskTracker,
    state: Mutex<State>,
}

impl Inner {
    fn with_state<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn fail(&self, task: &'static str, error: BoxError) {
        self.with_state(|s| s.failure.get_or_insert(TaskFailure { task, error }).task);
        self.shutdown.trigger();
    }
}

/// Counts a service as running and notices when it ends by a panic.
struct ServiceGuard {
    inner: Arc<Inner>,
    name: &'static str,
}

impl Drop for ServiceGuard {
    fn drop(&mut self) {
        self.inner.with_state(|s| {
            if let Some(count) = s.running.get_mut(self.name) {
                *count -= 1;
                if *count == 0 {
                    s.running.remove(self.name);
                }
            }
        });
        if std::thread::panicking() {
            self.inner.fail(self.name, "panicked; the log has the place".into());
        }
    }
}

/// Says which small task panicked; what and where, the panic itself has said.
struct PanicGuard(&'static str);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(task = self.0, "A task panicked; the others go on");
        }
    }
}

/// Spawns tasks on behalf of the supervisor. Cheap to clone.
#[derive(Clone)]
pub struct Spawner(Arc<Inner>);

impl Spawner {
    /// Spawns a task that may end at any time, such as one for a connection. A panic in it ends this task only and is
    /// reported by the handle; the drain waits for it.
    pub fn spawn<F>(&self, name: &'static str, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let guard = PanicGuard(name);
        self.0.tracker.spawn(async move {
            let _guard = guard;
            task.await
        })
    }

    /// Spawns a task that the program cannot do without. When it fails or panics, everything is asked to end and
    /// [`Supervisor::run`] returns its reason. It must end soon after [`Spawner::shutdown`] triggers; `Ok` is no failure.
    pub fn service<F, E>(&self, name: &'static str, task: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<BoxError>,
    {
        let inner = self.0.clone();
        inner.with_state(|s| *s.running.entry(name).or_default() += 1);
        let guard = ServiceGuard { inner, name };
        self.0.tracker.spawn(async move {
            if let Err(error) = task.await {
                guard.inner.fail(guard.name, error.into());
            }
        });
    }

    /// Runs blocking work (a large file, a password hash) on tokio's blocking threads; waited for by the drain.
    pub fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        self.0.tracker.spawn_blocking(work)
    }

    /// Triggers when everything is to end.
    pub fn shutdown(&self) -> Shutdown {
        self.0.shutdown.clone()
    }
}

/// Owns all tasks of a program, or of one of several programs in a process.
pub struct Supervisor(Arc<Inner>);

impl Default for Supervisor {
    fn default() -> Self {
        Self::new(Shutdown::new())
    }
}

impl Supervisor {
    /// With `shutdown` as the token that ends everything.
    pub fn new(shutdown: Shutdown) -> Self {
        Self(Arc::new(Inner { shutdown, tracker: TaskTracker::new(), state: Mutex::default() }))
    }

    /// For those who need tasks.
    pub fn spawner(&self) -> Spawner {
        Spawner(self.0.clone())
    }

    /// The token that ends everything.
    pub fn shutdown(&self) -> Shutdown {
        self.0.shutdown.clone()
    }

    /// Waits for the shutdown (by signal, by request or by a failed service), then up to `grace` for the tasks to end.
    /// Returns the first failure, if there was one. What is still running after `grace` is named in the log and left.
    pub async fn run(self, grace: Duration) -> Result<(), TaskFailure> {
        self.0.shutdown.cancelled().await;
        self.0.tracker.close();
        if tokio::time::timeout(grace, self.0.tracker.wait()).await.is_err() {
            let late = self.0.with_state(|s| s.running.keys().copied().collect::<Vec<_>>().join(", "));
            let count = self.0.tracker.len();
            tracing::warn!(count, services = %late, "Some tasks did not end within the grace period");
        }
        match self.0.with_state(|s| s.failure.take()) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[tokio::test]
    async fn the_first_failure_ends_all_and_is_the_reason() {
        let supervisor = Supervisor::default();
        let spawner = supervisor.spawner();
        let drained = Arc::new(AtomicBool::new(false));
        let (seen, shutdown) = (drained.clone(), supervisor.shutdown());
        spawner.service("patient", async move {
            shutdown.cancelled().await;
            seen.store(true, Ordering::SeqCst);
            Err::<(), _>("late failure")
        });
        spawner.service("hasty", async { Err::<(), _>("no such file") });
        let failure = supervisor.run(Duration::from_secs(5)).await.expect_err("a service failed");
        assert_eq!(failure.to_string(), "hasty: no such file");
        assert!(drained.load(Ordering::SeqCst), "the other service was waited for");
    }

    #[tokio::test]
    async fn a_panic_of_a_service_ends_all_but_one_of_a_small_task_does_not() {
        let supervisor = Supervisor::default();
        let spawner = supervisor.spawner();
        assert!(spawner.spawn("connection", async { panic!("bad client") }).await.is_err());
        assert!(!supervisor.shutdown().is_triggered());
        spawner.service("loop", async {
            panic!("bug");
            #[allow(unreachable_code)]
            Ok::<(), BoxError>(())
        });
        let failure = supervisor.run(Duration::from_secs(5)).await.expect_err("a service panicked");
        assert_eq!(failure.task, "loop");
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_does_not_wait_longer_than_the_grace_period() {
        let supervisor = Supervisor::default();
        supervisor.spawner().service("stuck", std::future::pending::<Result<(), BoxError>>());
        supervisor.shutdown().trigger();
        supervisor.run(Duration::from_secs(10)).await.expect("being late is no failure");
    }

    #[test]
    fn children_follow_their_parent_and_not_the_other_way() {
        let parent = Shutdown::new();
        let child = parent.child();
        child.trigger();
        assert!(!parent.is_triggered());
        let second = parent.child();
        parent.trigger();
        assert!(second.is_triggered());
    }
}
