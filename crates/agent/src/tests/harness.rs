//! An agent under a fake server, and workloads that call it.

use super::fake::{FakeServer, TOKEN};
use crate::{Agent, AgentError, run};
use async_trait::async_trait;
use finial_config::{AgentSettings, Bootstrap};
use finial_core::{Clock, KeyType, Secret, Selector, SystemClock};
use finial_crypto::{PrivateKey, Signer};
use finial_net::client::uds_channel;
use finial_plugin::{
    AgentNodeAttestor, AgentPlugins, AttestSession, KeyManager, Peer, PluginError, Reference, SvidStore,
    WorkloadAttestor,
};
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{X509svidRequest, X509svidResponse};
use finial_runtime::telemetry::Settings;
use finial_runtime::{Metrics, Shutdown, Supervisor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

/// Nothing in these tests takes longer unless it is broken.
pub(super) const DEADLINE: Duration = Duration::from_secs(20);

/// Keys that survive the agent, as on disk.
#[derive(Default)]
pub(super) struct Keys(Mutex<BTreeMap<String, Arc<PrivateKey>>>);

#[async_trait]
impl KeyManager for Keys {
    async fn generate_key(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, PluginError> {
        let key = Arc::new(PrivateKey::generate(key_type).unwrap());
        self.0.lock().unwrap().insert(id.to_owned(), key.clone());
        Ok(key)
    }

    async fn key(&self, id: &str) -> Result<Option<Arc<dyn Signer>>, PluginError> {
        Ok(self.0.lock().unwrap().get(id).map(|key| key.clone() as Arc<dyn Signer>))
    }

    async fn keys(&self) -> Result<Vec<(String, Arc<dyn Signer>)>, PluginError> {
        let signer = |(name, key): (&String, &Arc<PrivateKey>)| (name.clone(), key.clone() as Arc<dyn Signer>);
        Ok(self.0.lock().unwrap().iter().map(signer).collect())
    }
}

/// States who the process is by its folder, as the unix attestor does, and counts how often it is asked.
pub(super) struct TestAttestor {
    pub(super) asked: AtomicUsize,
    pub(super) fail: Mutex<bool>,
    /// Each time: until there is a permit.
    pub(super) slow: Mutex<Option<Arc<tokio::sync::Semaphore>>>,
    /// Once: makes this file, and answers when the process has become another program.
    pub(super) meanwhile: Mutex<Option<PathBuf>>,
}

#[async_trait]
impl WorkloadAttestor for TestAttestor {
    fn name(&self) -> &str {
        "test"
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if *self.fail.lock().unwrap() {
            return Err(PluginError::internal("broken"));
        }
        let slow = self.slow.lock().unwrap().clone();
        if let Some(slow) = slow {
            slow.acquire().await.unwrap().forget();
        }
        let look = || rustix::fs::readlinkat(peer.proc_dir, "exe", Vec::new());
        let exe = look().map_err(|e| PluginError::internal(e.to_string()))?;
        let signal = self.meanwhile.lock().unwrap().take();
        if let Some(signal) = signal {
            std::fs::write(signal, "").unwrap();
            while look().is_ok_and(|now| now == exe) {
                tokio::task::yield_now().await;
            }
        }
        let exe = exe.to_string_lossy().into_owned();
        let name = Path::new(&exe).file_name().unwrap().to_string_lossy().into_owned();
        let name = name.split('-').next().unwrap().to_owned(); // the test program is called finial_agent-HASH
        Ok(vec![Selector::new("test", "any").unwrap(), Selector::new("test", format!("exe:{name}")).unwrap()])
    }

    /// Knows what is called by name.
    async fn attest_reference(&self, reference: &Reference<'_>) -> Result<Option<Vec<Selector>>, PluginError> {
        let name = || String::from_utf8(reference.value.to_vec()).map_err(|_| PluginError::invalid("no name"));
        match reference.type_url {
            "test/named" => Ok(Some(vec![Selector::new("test", format!("name:{}", name()?)).unwrap()])),
            _ => Ok(None),
        }
    }
}

/// Solves what the fake server asks.
struct Puzzle;

#[async_trait]
impl AgentNodeAttestor for Puzzle {
    async fn begin(&self) -> Result<Box<dyn AttestSession>, PluginError> {
        Ok(Box::new(Puzzle))
    }
}

#[async_trait]
impl AttestSession for Puzzle {
    fn payload(&self) -> &[u8] {
        b"ask me"
    }

    async fn respond(&mut self, challenge: &[u8]) -> Result<Vec<u8>, PluginError> {
        assert_eq!(challenge, b"1+1");
        Ok(b"2".to_vec())
    }
}

/// A trust domain of one server and one agent.
pub(super) struct World {
    pub(super) server: FakeServer,
    pub(super) attestor: Arc<TestAttestor>,
    pub(super) keys: Arc<Keys>,
    pub(super) dir: tempfile::TempDir,
    pub(super) supervisor: Supervisor,
    pub(super) settings: AgentSettings,
    pub(super) stop_server: Shutdown,
    pub(super) puzzle: bool,
    pub(super) stores: Vec<Arc<dyn SvidStore>>,
    /// Beside the usual one.
    pub(super) more_attestors: Vec<Arc<dyn WorkloadAttestor>>,
    pub(super) clock: Arc<dyn Clock>,
}

/// A running agent.
pub(super) struct Running {
    supervisor: Supervisor,
    ended: JoinHandle<Result<(), AgentError>>,
    pub(super) socket: PathBuf,
}

impl World {
    pub(super) async fn new() -> Self {
        let supervisor = Supervisor::default();
        let stop_server = supervisor.shutdown().child();
        let server = FakeServer::start(&supervisor.spawner(), stop_server.clone()).await;
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("bootstrap.pem");
        std::fs::write(&bundle, finial_crypto::pem::encode("CERTIFICATE", &server.ca().root)).unwrap();
        let mut settings = AgentSettings::minimal(
            server.ca().trust_domain.clone(),
            server.address(),
            Bootstrap::Path(bundle),
            dir.path().join("data"),
        );
        settings.join_token = Some(Secret::new(TOKEN.to_owned()));
        settings.sync_interval = Duration::from_millis(50);
        settings.admin_socket_path = Some(dir.path().join("admin/api.sock"));
        let attestor = Arc::new(TestAttestor {
            asked: AtomicUsize::new(0),
            fail: Mutex::new(false),
            slow: Mutex::default(),
            meanwhile: Mutex::default(),
        });
        let (keys, puzzle, clock) = (Arc::default(), false, Arc::new(SystemClock));
        let (stores, more_attestors) = (Vec::new(), Vec::new());
        Self { server, attestor, keys, dir, supervisor, settings, stop_server, puzzle, stores, more_attestors, clock }
    }

    pub(super) fn start(&self) -> Running {
        let supervisor = Supervisor::default();
        let node_attestor: Arc<dyn AgentNodeAttestor> = Arc::new(Puzzle);
        let mut settings = self.settings.clone();
        if self.puzzle {
            settings.join_token = None;
        }
        let socket = settings.socket_path.clone().unwrap();
        let mut attestors: Vec<Arc<dyn WorkloadAttestor>> = vec![self.attestor.clone()];
        attestors.extend(self.more_attestors.iter().cloned());
        let agent = Agent {
            settings,
            plugins: AgentPlugins {
                key_manager: self.keys.clone(),
                keys_are_volatile: false,
                node_attestor: ("puzzle".to_owned(), node_attestor),
                workload_attestors: attestors,
                svid_stores: self.stores.clone(),
                host: Arc::default(),
            },
            spawner: supervisor.spawner(),
            clock: self.clock.clone(),
            metrics: Metrics::new(Settings { prefix: "spire_agent".into(), ..Settings::default() }),
            log: None,
            version: "test".to_owned(),
        };
        let ended = supervisor.spawner().spawn("agent", run(agent));
        Running { supervisor, ended, socket }
    }

    /// Starts an agent and waits until it answers.
    pub(super) async fn started(&self) -> Running {
        let running = self.start();
        until("the agent listens", || {
            assert!(!running.ended.is_finished(), "the agent ended early");
            running.socket.exists()
        })
        .await;
        running
    }

    pub(super) fn entry(&self, id: &str, path: &str, selectors: &[&str]) {
        self.server.state().entries.insert(id.into(), super::fake::wire_entry(id, path, selectors));
    }
}

impl Running {
    pub(super) fn client(&self) -> SpiffeWorkloadApiClient<Channel> {
        SpiffeWorkloadApiClient::new(uds_channel(&self.socket))
    }

    pub(super) async fn x509(&self) -> Result<Streaming<X509svidResponse>, Status> {
        Ok(self.client().fetch_x509svid(secure(X509svidRequest {})).await?.into_inner())
    }

    /// The first answer of a new call.
    pub(super) async fn x509_once(&self) -> Result<X509svidResponse, Status> {
        next(&mut self.x509().await?).await
    }

    /// Stops the agent; it must not call that a failure.
    pub(super) async fn stop(self) {
        self.supervisor.shutdown().trigger();
        within(self.ended).await.unwrap().unwrap();
    }

    /// Makes clients, each with a connection of its own.
    pub(super) fn caller(&self) -> impl Fn() -> SpiffeWorkloadApiClient<Channel> + Send + 'static {
        let socket = self.socket.clone();
        move || SpiffeWorkloadApiClient::new(uds_channel(&socket))
    }

    /// How it ended by itself.
    pub(super) async fn ended(self) -> Result<(), AgentError> {
        within(self.ended).await.unwrap()
    }

    /// Why it ended by itself.
    pub(super) async fn failure(self) -> AgentError {
        within(self.ended).await.unwrap().expect_err("the agent was to fail")
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.is_finished()
    }
}

pub(super) fn secure<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
    request
}

pub(super) async fn next<T>(stream: &mut Streaming<T>) -> Result<T, Status> {
    within(stream.message()).await.map(|m| m.expect("the stream ended without a status"))
}

pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("it took too long")
}

/// Time stands still while this lives: what happens, happens without a timer.
pub(super) struct StandsStill {
    _held: std::sync::mpsc::Sender<()>,
    /// It lasted too long: time went on.
    over: Arc<AtomicBool>,
}

impl StandsStill {
    pub(super) fn begin() -> Self {
        let (held, dropped) = std::sync::mpsc::channel::<()>();
        let over = Arc::new(AtomicBool::new(false));
        let told = over.clone();
        // A paused clock jumps to the next timer whenever nothing else is left to do, except beside blocking work.
        drop(tokio::task::spawn_blocking(move || {
            told.store(dropped.recv_timeout(DEADLINE) == Err(RecvTimeoutError::Timeout), Ordering::SeqCst);
        }));
        tokio::time::pause();
        Self { _held: held, over }
    }
}

impl Drop for StandsStill {
    fn drop(&mut self) {
        tokio::time::resume();
        let over = self.over.load(Ordering::SeqCst);
        assert!(!over || std::thread::panicking(), "it took too long, or a timer");
    }
}

/// Waits for a condition.
pub(super) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "waited too long until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
