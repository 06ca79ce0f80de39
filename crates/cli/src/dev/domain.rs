//! The trust domain itself: a server and an agent in this process, and the calls to the server's API that set it up.

use super::Trouble;
use super::folder::Folder;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use finial_config::{AgentSettings, Bootstrap, PluginConfig, ServerSettings};
use finial_core::{Clock, Secret, SpiffeId, TrustDomain};
use finial_crypto::{Certificate, pem};
use finial_net::client::uds_channel;
use finial_plugin::PluginContext;
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::{CreateJoinTokenRequest, ListAgentsRequest};
use finial_proto::server::bundle::GetBundleRequest;
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::entry::BatchCreateEntryRequest;
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::{convert, types};
use finial_runtime::health::Health;
use finial_runtime::{Metrics, Spawner};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

/// The name of the trust domain. Reserved for examples, so nobody's.
pub(super) const TRUST_DOMAIN: &str = "example.org";
/// The name that any agent of this trust domain goes by, so that entries need not know one agent's own ID.
const NODE: &str = "/dev-node";
/// How often the agent asks for news. SPIRE's default is 5 s; the story is shorter.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);
/// Longest time for any one call or start.
const DEADLINE: Duration = Duration::from_secs(20);

/// An entry of the story.
pub(super) struct Registration {
    pub(super) path: String,
    pub(super) selectors: Vec<String>,
    pub(super) hint: String,
    /// Seconds; 0 = the server's default of an hour.
    pub(super) x509_svid_ttl: i32,
}

/// What the server knows of the agent.
pub(super) struct Attested {
    pub(super) id: String,
    pub(super) how: String,
    pub(super) expires_at: i64,
    /// Whether it joined now, or kept its identity from an earlier run.
    pub(super) anew: bool,
}

pub(super) struct Domain<'a> {
    pub(super) folder: &'a Folder,
    pub(super) spawner: &'a Spawner,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) name: TrustDomain,
}

impl<'a> Domain<'a> {
    pub(super) fn new(folder: &'a Folder, spawner: &'a Spawner, clock: Arc<dyn Clock>) -> Result<Self, Trouble> {
        let name = TrustDomain::parse(TRUST_DOMAIN).map_err(|e| Trouble::in_log(e.to_string(), folder))?;
        Ok(Self { folder, spawner, clock, name })
    }

    pub(super) fn id(&self, path: &str) -> Result<SpiffeId, Trouble> {
        SpiffeId::new(&self.name, path).map_err(|e| self.trouble("an ID", e))
    }

    fn trouble(&self, doing: &str, error: impl std::fmt::Display) -> Trouble {
        Trouble::in_log(format!("{doing}: {error}"), self.folder)
    }

    fn context(&self) -> PluginContext {
        PluginContext { trust_domain: self.name.clone(), clock: self.clock.clone() }
    }

    fn plugin(&self, kind: &str, name: &str, data: &str) -> Result<PluginConfig, Trouble> {
        let data = finial_hcl::parse(data).map_err(|e| self.trouble("configuration", e))?;
        Ok(PluginConfig::inline(kind, name, data))
    }

    /// Starts the server. When this returns it answers.
    pub(super) async fn start_server(&self) -> Result<SocketAddr, Trouble> {
        let data = self.folder.server();
        let mut settings = ServerSettings::minimal(self.name.clone(), data.clone());
        settings.socket_path = self.folder.server_socket();
        let quote = |name: &str| format!("{:?}", data.join(name).display().to_string());
        let sql = format!("database_type = \"sqlite3\"\nconnection_string = {}", quote("datastore.sqlite3"));
        settings.plugins = vec![
            self.plugin("DataStore", "sql", &sql)?,
            self.plugin("KeyManager", "disk", &format!("keys_path = {}", quote("keys.json")))?,
            self.plugin("NodeAttestor", "join_token", "")?,
        ];
        let plugins = finial_catalog::build_server_plugins(&settings.plugins, &self.context(), self.spawner).await;
        let plugins = plugins.map_err(|e| self.trouble("the server does not start", e))?;
        let environment = finial_server::Environment {
            clock: self.clock.clone(),
            spawner: self.spawner.clone(),
            metrics: Metrics::disabled(),
            health: Health::default(),
            log: None,
        };
        let started = timeout(DEADLINE, finial_server::start(&settings, plugins, environment)).await;
        let started = started.map_err(|e| self.trouble("the server does not start", e))?;
        Ok(started.map_err(|e| self.trouble("the server does not start", e))?.address)
    }

    /// Makes the entries that are not there yet.
    pub(super) async fn register(&self, registrations: &[Registration]) -> Result<(), Trouble> {
        let parent = self.id(NODE)?;
        let mut entries = Vec::new();
        for registration in registrations {
            let id = self.id(&registration.path)?;
            let selectors = registration.selectors.iter().filter_map(|s| s.split_once(':'));
            let selectors = selectors.map(|(kind, value)| types::Selector { r#type: kind.into(), value: value.into() });
            entries.push(types::Entry {
                spiffe_id: Some(convert::id_to_proto(&id)),
                parent_id: Some(convert::id_to_proto(&parent)),
                selectors: selectors.collect(),
                hint: registration.hint.clone(),
                x509_svid_ttl: registration.x509_svid_ttl,
                ..types::Entry::default()
            });
        }
        let mut client = EntryClient::new(uds_channel(self.folder.server_socket()));
        let request = BatchCreateEntryRequest { entries, output_mask: None };
        let results = timeout(DEADLINE, client.batch_create_entry(request)).await;
        let results =
            results.map_err(|e| self.trouble("entries", e))?.map_err(|e| self.trouble("entries", e.message()))?;
        for status in results.into_inner().results.into_iter().filter_map(|result| result.status) {
            const ALREADY_EXISTS: i32 = tonic::Code::AlreadyExists as i32;
            if !matches!(status.code, 0 | ALREADY_EXISTS) {
                return Err(self.trouble("an entry was not accepted", status.message));
            }
        }
        Ok(())
    }

    /// Starts the agent, with a one-time token unless it has an identity already, and waits until it answers workloads.
    pub(super) async fn start_agent(&self, server: SocketAddr) -> Result<Attested, Trouble> {
        self.write_bootstrap_bundle().await?;
        let token = if self.agent_has_identity() { None } else { Some(self.join_token().await?) };
        let anew = token.is_some();
        let bootstrap = Bootstrap::Path(self.folder.bootstrap_bundle());
        let mut settings = AgentSettings::minimal(self.name.clone(), server, bootstrap, self.folder.agent());
        settings.socket_path = Some(self.folder.agent_socket());
        settings.join_token = token.clone();
        settings.sync_interval = SYNC_INTERVAL;
        let directory = format!("directory = {:?}", self.folder.agent().display().to_string());
        settings.plugins = vec![
            self.plugin("KeyManager", "disk", &directory)?,
            self.plugin("NodeAttestor", "join_token", "")?,
            // The hash would be the same for all workloads here, as they are one program under several names.
            self.plugin("WorkloadAttestor", "unix", "discover_workload_path = true\nworkload_size_limit = -1")?,
        ];
        let plugins =
            finial_catalog::build_agent_plugins(&settings.plugins, token, &self.context(), self.spawner).await;
        let plugins = plugins.map_err(|e| self.trouble("the agent does not start", e))?;
        let agent = finial_agent::Agent {
            settings,
            plugins,
            spawner: self.spawner.clone(),
            clock: self.clock.clone(),
            metrics: Metrics::disabled(),
            log: None,
            version: crate::version(),
        };
        self.spawner.service("agent", finial_agent::run(agent));
        self.wait_for_agent().await?;
        self.attested(anew).await
    }

    async fn wait_for_agent(&self) -> Result<(), Trouble> {
        let deadline = Instant::now() + DEADLINE;
        while UnixStream::connect(self.folder.agent_socket()).await.is_err() {
            if Instant::now() > deadline {
                return Err(self.trouble("the agent does not start", "it does not answer"));
            }
            sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// Whether an earlier run left an SVID that is good for a while; if not, what it left is removed.
    fn agent_has_identity(&self) -> bool {
        let path = self.folder.agent().join("agent-data.json");
        let svid_end = || -> Option<i64> {
            let data: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
            let leaf = STANDARD.decode(data.get("svid")?.get(0)?.as_str()?).ok()?;
            let leaf = pem::certificates(&leaf).ok()?.into_iter().next()?;
            Some(Certificate::parse(leaf).ok()?.not_after())
        };
        let good = svid_end().is_some_and(|end| end > self.clock.now() + 60);
        if !good {
            let _ = std::fs::remove_file(path);
        }
        good
    }

    /// The bundle is fetched from the server's local socket, so the agent's first contact over the network is authenticated.
    async fn write_bootstrap_bundle(&self) -> Result<(), Trouble> {
        let failed = |e: &dyn std::fmt::Display| self.trouble("the trust bundle", e);
        let mut client = BundleClient::new(uds_channel(self.folder.server_socket()));
        let bundle = timeout(DEADLINE, client.get_bundle(GetBundleRequest { output_mask: None })).await;
        let bundle = bundle.map_err(|e| failed(&e))?.map_err(|e| failed(&e.message()))?.into_inner();
        let text = pem::encode_certificates(bundle.x509_authorities.iter().map(|a| a.asn1.as_ref()));
        std::fs::write(self.folder.bootstrap_bundle(), text).map_err(|e| failed(&e))
    }

    async fn join_token(&self) -> Result<Secret<String>, Trouble> {
        let failed = |e: &dyn std::fmt::Display| self.trouble("a join token", e);
        let mut client = AgentClient::new(uds_channel(self.folder.server_socket()));
        let agent_id = Some(convert::id_to_proto(&self.id(NODE)?));
        let request = CreateJoinTokenRequest { ttl: 600, token: String::new(), agent_id };
        let token = timeout(DEADLINE, client.create_join_token(request)).await;
        Ok(Secret::new(token.map_err(|e| failed(&e))?.map_err(|e| failed(&e.message()))?.into_inner().value))
    }

    /// The agent whose SVID ends last is the one that runs.
    async fn attested(&self, anew: bool) -> Result<Attested, Trouble> {
        let failed = |e: &dyn std::fmt::Display| self.trouble("the list of agents", e);
        let mut client = AgentClient::new(uds_channel(self.folder.server_socket()));
        let agents = timeout(DEADLINE, client.list_agents(ListAgentsRequest::default())).await;
        let agents = agents.map_err(|e| failed(&e))?.map_err(|e| failed(&e.message()))?.into_inner().agents;
        let agent = agents.into_iter().max_by_key(|agent| agent.x509svid_expires_at);
        let agent = agent.ok_or_else(|| failed(&"is empty"))?;
        let id = agent.id.unwrap_or_default();
        Ok(Attested {
            id: format!("spiffe://{}{}", id.trust_domain, id.path),
            how: agent.attestation_type,
            expires_at: agent.x509svid_expires_at,
            anew,
        })
    }
}

/// The number of the calling user, as the kernel will attest it.
pub(super) fn effective_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Entries are made for these workloads.
pub(super) fn registrations(folder: &Folder, uid: u32, ttl: i32) -> Vec<Registration> {
    let own = format!("unix:uid:{uid}");
    let mut all = vec![Registration {
        path: format!("/user/{uid}"),
        selectors: vec![own.clone()],
        hint: "you".to_owned(),
        x509_svid_ttl: 0,
    }];
    for name in BTreeSet::from(["backend", "frontend", "stranger"]) {
        let path = format!("unix:path:{}", folder.workload(name).display());
        let x509_svid_ttl = if name == "frontend" { ttl } else { 0 };
        let selectors = vec![own.clone(), path];
        all.push(Registration { path: format!("/{name}"), selectors, hint: name.to_owned(), x509_svid_ttl });
    }
    all
}
