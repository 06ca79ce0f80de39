//! A server for one test, and clients in every role.

use bytes::Bytes;
use finial_config::{PluginConfig, ServerSettings};
use finial_core::{KeyType, ManualClock, Selector, SpiffeId, TrustDomain};
use finial_crypto::tls::{BundleSource, PeerPolicy, ServerAuth, TlsIdentity, client_config};
use finial_crypto::{PrivateKey, Signer, TrustRoots, create_csr};
use finial_plugin::{AttestVerdict, Challenger, KeyManager, PluginError, ServerNodeAttestor, ServerPlugins};
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::attest_agent_request::{Params, Step};
use finial_proto::server::agent::attest_agent_response::Step as Told;
use finial_proto::server::agent::{AgentX509svidParams, AttestAgentRequest, CreateJoinTokenRequest};
use finial_proto::server::bundle::GetBundleRequest;
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::entry::BatchCreateEntryRequest;
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::types;
use finial_runtime::health::Health;
use finial_runtime::{Metrics, Supervisor, log};
use finial_server::{Environment, Running, StartError};
use finial_store::{SqlConfig, Store, StoreError, StoreSettings};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// The moment at which tests begin.
pub(crate) const NOW: i64 = 1_800_000_000;
/// No test waits longer for anything.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Keys in memory.
#[derive(Default)]
struct Keys(Mutex<BTreeMap<String, Arc<PrivateKey>>>);

#[async_trait::async_trait]
impl KeyManager for Keys {
    async fn generate_key(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, PluginError> {
        let key = Arc::new(PrivateKey::generate(key_type).map_err(|e| PluginError::internal(e.to_string()))?);
        self.0.lock().unwrap().insert(id.to_owned(), key.clone());
        Ok(key)
    }

    async fn key(&self, id: &str) -> Result<Option<Arc<dyn Signer>>, PluginError> {
        Ok(self.0.lock().unwrap().get(id).map(|key| key.clone() as Arc<dyn Signer>))
    }

    async fn keys(&self) -> Result<Vec<(String, Arc<dyn Signer>)>, PluginError> {
        Ok(self.0.lock().unwrap().iter().map(|(id, key)| (id.clone(), key.clone() as Arc<dyn Signer>)).collect())
    }
}

/// Believes what it is told: the payload is the agent's name, the answer to its one challenge must be the name again.
struct Gullible;

#[async_trait::async_trait]
impl ServerNodeAttestor for Gullible {
    async fn attest(&self, payload: &[u8], agent: &mut dyn Challenger) -> Result<AttestVerdict, PluginError> {
        let name = String::from_utf8(payload.to_vec()).map_err(|_| PluginError::invalid("payload is not text"))?;
        let answer = agent.challenge(b"who are you?".to_vec()).await?;
        if answer != payload {
            return Err(PluginError::denied("challenge response does not match"));
        }
        let id = SpiffeId::parse(&format!("spiffe://example.org/spire/agent/gullible/{name}"));
        let selector = |value: &str| Selector { kind: "gullible".into(), value: value.into() };
        Ok(AttestVerdict {
            agent_id: id.map_err(|e| PluginError::invalid(e.to_string()))?,
            selectors: vec![selector("name:any"), selector(&format!("name:{name}")), selector("name:any")],
            can_reattest: true,
        })
    }
}

/// Everything that the servers of all tests have logged, as JSON lines.
static LOG: LazyLock<Lines> = LazyLock::new(|| {
    let lines = Lines::default();
    let settings =
        log::Settings { level: log::Level::Info, format: log::Format::Json, file: None, source_location: false };
    let (subscriber, _) = log::with_writer(&settings, Box::new(lines.clone()), Arc::new(ManualClock::at(NOW)));
    // One for the process: tracing decides once per place whether anyone listens there, whatever the thread.
    tracing::subscriber::set_global_default(subscriber).unwrap();
    lines
});

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The lines with this message in which `field` is `value`; choose one that no other test has.
pub(crate) fn logged(message: &str, field: &str, value: &str) -> Vec<serde_json::Value> {
    let text = String::from_utf8(LOG.0.lock().unwrap().clone()).unwrap();
    let parsed = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    parsed.filter(|line| line["msg"] == message && line[field] == value).collect()
}

/// A running server, with what tests need of its insides.
pub(crate) struct Server {
    pub(crate) running: Running,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) folder: Arc<tempfile::TempDir>,
    pub(crate) supervisor: Supervisor,
    pub(crate) local: Channel,
    pub(crate) keys: Arc<dyn KeyManager>,
    plugins: Vec<PluginConfig>,
}

/// Which database a test's server is on.
pub(crate) struct Lab(Option<testkit::Database>);

impl Lab {
    pub(crate) fn sqlite() -> Option<Self> {
        Some(Self(None))
    }
    /// `None` where it is not installed, which testkit says; so below.
    pub(crate) fn postgresql() -> Option<Self> {
        testkit::postgres().map(|database| Self(Some(database)))
    }
    pub(crate) fn mariadb() -> Option<Self> {
        testkit::mariadb().map(|database| Self(Some(database)))
    }

    /// What the database says of a second row with this value of a unique column.
    pub(crate) fn duplicate(&self, table: &str, column: &str, value: &str) -> String {
        match self.0.as_ref().map(testkit::Database::kind) {
            None => format!("UNIQUE constraint failed: {table}.{column}"),
            Some(testkit::DatabaseKind::Postgres) => {
                format!("pq: duplicate key value violates unique constraint \"uix_{table}_{column}\" (23505)")
            }
            Some(testkit::DatabaseKind::MariaDb) => {
                format!("Error 1062 (23000): Duplicate entry '{value}' for key 'uix_{table}_{column}'")
            }
        }
    }

    /// The datastore as another server has it open, where it can be shared.
    pub(crate) async fn beside(&self) -> Option<Store> {
        let database = self.0.as_ref()?;
        let config = SqlConfig {
            database_type: database.kind().spire_type().into(),
            connection_string: database.dsn(),
            ..SqlConfig::default()
        };
        Some(Store::open(config.resolve().unwrap(), Arc::new(ManualClock::at(NOW))).await.unwrap())
    }

    pub(crate) async fn start(&self) -> Server {
        self.with(|_| {}).await
    }

    pub(crate) async fn with(&self, change: impl FnOnce(&mut ServerSettings)) -> Server {
        let on_it = |settings: &mut ServerSettings| {
            if let Some(database) = &self.0 {
                settings.plugins = vec![datastore(&testkit::datastore(database, database.port()))];
            }
            change(settings);
        };
        Server::with(on_it).await
    }
}

/// Makes three tests of each function, which takes a [`Lab`].
macro_rules! on_every_database {
    ($($name:ident),* $(,)?) => {
        $(mod $name {
            use $crate::harness::Lab;
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn sqlite() {
                if let Some(lab) = Lab::sqlite() { super::$name(lab).await }
            }
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn postgresql() {
                if let Some(lab) = Lab::postgresql() { super::$name(lab).await }
            }
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn mariadb() {
                if let Some(lab) = Lab::mariadb() { super::$name(lab).await }
            }
        })*
    };
}
pub(crate) use on_every_database;

/// The data store with this `plugin_data`.
pub(crate) fn datastore(data: &str) -> PluginConfig {
    PluginConfig::inline("DataStore", "sql", finial_hcl::parse(data).unwrap())
}

pub(crate) fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

impl Server {
    /// With rate limits off and the settings as they are otherwise.
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// With changed settings.
    pub(crate) async fn with(change: impl FnOnce(&mut ServerSettings)) -> Self {
        Self::try_with(change).await.unwrap()
    }

    /// With settings that may not be good.
    pub(crate) async fn try_with(change: impl FnOnce(&mut ServerSettings)) -> Result<Self, StartError> {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        Self::on(folder, Arc::new(ManualClock::at(NOW)), Arc::<Keys>::default(), change).await
    }

    /// The same server again, after it was stopped.
    pub(crate) async fn restart(self, change: impl FnOnce(&mut ServerSettings)) -> Self {
        self.restart_after(async |_| (), change).await
    }

    /// The same, after this was done to its file in the meantime.
    pub(crate) async fn restart_after(
        self,
        write: impl AsyncFnOnce(&Store),
        change: impl FnOnce(&mut ServerSettings),
    ) -> Self {
        self.supervisor.shutdown().trigger();
        self.supervisor.run(DEADLINE).await.unwrap();
        let again = |settings: &mut ServerSettings| {
            settings.plugins = self.plugins;
            change(settings);
        };
        let file = self.folder.path().join("datastore.sqlite3");
        if file.exists() {
            let store = unlocked(&file).await;
            write(&store).await;
            store.close().await;
        }
        Self::on(self.folder, self.clock, self.keys, again).await.unwrap()
    }

    pub(crate) async fn on(
        folder: Arc<tempfile::TempDir>,
        clock: Arc<ManualClock>,
        keys: Arc<dyn KeyManager>,
        change: impl FnOnce(&mut ServerSettings),
    ) -> Result<Self, StartError> {
        LazyLock::force(&LOG);
        let mut settings = ServerSettings::minimal(trust_domain(), folder.path().to_owned());
        settings.rate_limit.attestation = false;
        settings.rate_limit.signing = false;
        let file = folder.path().join("datastore.sqlite3");
        let data = format!("database_type = \"sqlite3\"\nconnection_string = \"{}\"", file.display());
        settings.plugins = vec![datastore(&data)];
        change(&mut settings);
        let supervisor = Supervisor::default();
        let plugins = ServerPlugins {
            key_manager: keys.clone(),
            node_attestors: BTreeMap::from([(
                "gullible".to_owned(),
                Arc::new(Gullible) as Arc<dyn ServerNodeAttestor>,
            )]),
            join_token: true,
            upstream_authority: None,
            credential_composers: Vec::new(),
            notifiers: Vec::new(),
            bundle_publishers: Vec::new(),
            host: Arc::default(),
        };
        let env = Environment {
            clock: clock.clone(),
            spawner: supervisor.spawner(),
            metrics: Metrics::disabled(),
            health: Health::default(),
            log: None,
        };
        let running = finial_server::start(&settings, plugins, env).await?;
        let local = finial_net::client::uds_channel(&running.socket_path);
        Ok(Self { running, clock, folder, supervisor, local, keys, plugins: settings.plugins })
    }

    pub(crate) fn agents(&self) -> AgentClient<Channel> {
        AgentClient::new(self.local.clone())
    }
    pub(crate) fn entries(&self) -> EntryClient<Channel> {
        EntryClient::new(self.local.clone()).max_decoding_message_size(64 << 20).max_encoding_message_size(64 << 20)
    }
    pub(crate) fn svids(&self) -> SvidClient<Channel> {
        SvidClient::new(self.local.clone())
    }
    pub(crate) fn bundles(&self) -> BundleClient<Channel> {
        BundleClient::new(self.local.clone())
    }

    /// The roots as a client would know them.
    pub(crate) async fn roots(&self) -> Arc<dyn BundleSource> {
        let bundle = self.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
        let ders: Vec<Arc<[u8]>> = bundle.x509_authorities.iter().map(|a| Arc::from(&*a.asn1)).collect();
        Arc::new(Roots(Arc::new(TrustRoots::new(&ders).unwrap())))
    }

    /// A TLS channel to the server with that identity; a new connection each.
    pub(crate) async fn remote(&self, identity: Option<&Identity>) -> Channel {
        let config = self.tls(identity).await;
        finial_net::client::tls_channel(&self.running.address.to_string(), Arc::new(config))
    }

    /// How a client with that identity speaks TLS with the server.
    pub(crate) async fn tls(&self, identity: Option<&Identity>) -> rustls::ClientConfig {
        let identity = identity.map(|identity| {
            Arc::new(TlsIdentity::new(&identity.chain, &identity.key).unwrap())
                as Arc<dyn rustls::client::ResolvesClientCert>
        });
        let policy = PeerPolicy::Exact(trust_domain().server_id());
        let auth = ServerAuth::Spiffe { bundles: self.roots().await, policy };
        client_config(identity, auth, self.clock.clone()).unwrap()
    }

    pub(crate) async fn token(&self) -> String {
        let request = CreateJoinTokenRequest { ttl: 600, ..Default::default() };
        self.agents().create_join_token(request).await.unwrap().into_inner().value
    }

    /// An agent that joined by token.
    pub(crate) async fn agent(&self) -> Agent {
        let token = self.token().await;
        Agent::new(self, self.attest_token(&token).await.unwrap()).await
    }

    /// Attests with a join token over TLS without a client certificate.
    pub(crate) async fn attest_token(&self, token: &str) -> Result<Identity, Status> {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let csr = csr(&key, None, &[]).await;
        let steps = vec![first_step("join_token", token.as_bytes(), &csr)];
        self.attest(key, steps).await.map(|(identity, _)| identity)
    }

    /// Attests by the test's plugin, answering its challenge with `answer`.
    pub(crate) async fn attest_name(&self, name: &str, answer: &str) -> Result<(Identity, bool), Status> {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let csr = csr(&key, None, &[]).await;
        let answer = Step::ChallengeResponse(Bytes::copy_from_slice(answer.as_bytes()));
        let steps = vec![first_step("gullible", name.as_bytes(), &csr), AttestAgentRequest { step: Some(answer) }];
        self.attest(key, steps).await
    }

    pub(crate) async fn attest(
        &self,
        key: PrivateKey,
        steps: Vec<AttestAgentRequest>,
    ) -> Result<(Identity, bool), Status> {
        let mut client = AgentClient::new(self.remote(None).await).max_encoding_message_size(64 << 20);
        let mut answers = client.attest_agent(tokio_stream::iter(steps)).await?.into_inner();
        loop {
            match answers.message().await?.expect("an answer").step.expect("a step") {
                Told::Challenge(challenge) => assert_eq!(&*challenge, b"who are you?"),
                Told::Result(result) => {
                    assert!(answers.message().await?.is_none(), "nothing follows the result");
                    return Ok((Identity::of(result.svid.unwrap(), key), result.reattestable));
                }
            }
        }
    }

    /// Creates entries and expects all of them to be new.
    pub(crate) async fn create(&self, entries: Vec<types::Entry>) -> Vec<types::Entry> {
        let request = BatchCreateEntryRequest { entries, output_mask: None };
        let results = self.entries().batch_create_entry(request).await.unwrap().into_inner().results;
        let unwrap = |result: finial_proto::server::entry::batch_create_entry_response::Result| {
            assert_eq!(result.status.as_ref().unwrap().code, 0, "{:?}", result.status);
            result.entry.unwrap()
        };
        results.into_iter().map(unwrap).collect()
    }

    /// An X.509-SVID for a workload, minted.
    pub(crate) async fn mint(&self, path: &str) -> Identity {
        self.mint_in("example.org", path).await
    }

    /// The same for a server of another trust domain.
    pub(crate) async fn mint_in(&self, trust_domain: &str, path: &str) -> Identity {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let id = SpiffeId::new(&TrustDomain::parse(trust_domain).unwrap(), path).unwrap();
        let csr = csr(&key, Some(&id), &[]).await;
        let request = finial_proto::server::svid::MintX509svidRequest { csr: csr.into(), ttl: 0 };
        let svid = self.svids().mint_x509svid(request).await.unwrap().into_inner().svid.unwrap();
        Identity::of(svid, key)
    }
}

pub(crate) struct Roots(pub(crate) Arc<TrustRoots>);

impl BundleSource for Roots {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        (trust_domain == "example.org").then(|| self.0.clone())
    }
}

/// A key with its SVID.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) id: SpiffeId,
    pub(crate) chain: Vec<Arc<[u8]>>,
    pub(crate) key: PrivateKey,
    pub(crate) expires_at: i64,
}

impl Identity {
    pub(crate) fn of(svid: types::X509svid, key: PrivateKey) -> Self {
        let id = svid.id.unwrap();
        Self {
            id: SpiffeId::parse(&format!("spiffe://{}{}", id.trust_domain, id.path)).unwrap(),
            chain: svid.cert_chain.iter().map(|der| Arc::from(&**der)).collect(),
            key,
            expires_at: svid.expires_at,
        }
    }
}

/// An attested agent with a connection that stays open.
pub(crate) struct Agent {
    pub(crate) identity: Identity,
    pub(crate) channel: Channel,
}

impl Agent {
    pub(crate) async fn new(server: &Server, identity: Identity) -> Self {
        let channel = server.remote(Some(&identity)).await;
        Self { identity, channel }
    }

    pub(crate) fn agents(&self) -> AgentClient<Channel> {
        AgentClient::new(self.channel.clone())
    }
    pub(crate) fn entries(&self) -> EntryClient<Channel> {
        EntryClient::new(self.channel.clone())
    }
    pub(crate) fn svids(&self) -> SvidClient<Channel> {
        SvidClient::new(self.channel.clone()).max_encoding_message_size(64 << 20)
    }
    pub(crate) fn bundles(&self) -> BundleClient<Channel> {
        BundleClient::new(self.channel.clone())
    }

    /// An entry for `path` below this agent.
    pub(crate) fn entry(&self, path: &str) -> types::Entry {
        entry(path, self.identity.id.path(), &["unix:uid:1000"])
    }
}

/// Does this while tokio's clock stands still: no bucket fills up and no deadline comes nearer, however slow the machine.
pub(crate) async fn while_time_stands<T>(work: impl Future<Output = T>) -> T {
    // As long as a blocking task runs, tokio does not put its stopped clock forward.
    let (finish, finished) = std::sync::mpsc::channel::<()>();
    let held = tokio::task::spawn_blocking(move || finished.recv_timeout(DEADLINE));
    tokio::time::pause();
    let done = work.await;
    tokio::time::resume();
    drop(finish);
    assert_eq!(held.await.unwrap(), Err(std::sync::mpsc::RecvTimeoutError::Disconnected), "it took too long");
    done
}

pub(crate) async fn csr(key: &PrivateKey, id: Option<&SpiffeId>, dns: &[&str]) -> Vec<u8> {
    let dns: Vec<String> = dns.iter().map(|name| (*name).to_owned()).collect();
    create_csr(key, None, id, &dns).await.unwrap()
}

/// A CSR of a key of its own.
pub(crate) async fn any_csr() -> Bytes {
    csr(&PrivateKey::generate(KeyType::EcP256).unwrap(), None, &[]).await.into()
}

pub(crate) fn first_step(kind: &str, payload: &[u8], csr: &[u8]) -> AttestAgentRequest {
    let data = types::AttestationData { r#type: kind.into(), payload: Bytes::copy_from_slice(payload) };
    let params = Params { data: Some(data), params: Some(AgentX509svidParams { csr: Bytes::copy_from_slice(csr) }) };
    AttestAgentRequest { step: Some(Step::Params(params)) }
}

pub(crate) fn id(path: &str) -> Option<types::Spiffeid> {
    Some(types::Spiffeid { trust_domain: "example.org".into(), path: path.into() })
}

pub(crate) fn selectors(texts: &[&str]) -> Vec<types::Selector> {
    let split = |text: &&str| {
        let (kind, value) = text.split_once(':').unwrap();
        types::Selector { r#type: kind.into(), value: value.into() }
    };
    texts.iter().map(split).collect()
}

pub(crate) fn entry(path: &str, parent: &str, wanted: &[&str]) -> types::Entry {
    types::Entry { spiffe_id: id(path), parent_id: id(parent), selectors: selectors(wanted), ..Default::default() }
}

/// Expects an error with that code, and gives its message.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code) -> String {
    let status = result.expect_err("an error");
    assert_eq!(status.code(), code, "{}", status.message());
    status.message().to_owned()
}

/// Waits until nobody has the database. A process that another test is just starting shares our locks until it runs its own
/// program.
async fn unlocked(path: &Path) -> Store {
    for _ in 0..1000 {
        match Store::open(StoreSettings::file(path), Arc::new(ManualClock::at(NOW))).await {
            Err(StoreError::Locked { .. }) => tokio::time::sleep(Duration::from_millis(10)).await,
            opened => return opened.unwrap(),
        }
    }
    panic!("{} is still locked", path.display());
}
