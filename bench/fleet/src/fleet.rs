//! The agents.

use finial_core::{Clock, KeyType, SpiffeId, SystemClock, TrustDomain};
use finial_crypto::tls::{BundleSource, PeerPolicy, ServerAuth, TlsIdentity, client_config};
use finial_crypto::{PrivateKey, TrustRoots, create_csr};
use finial_net::client::{tls_channel, uds_channel};
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::attest_agent_request::{Params, Step};
use finial_proto::server::agent::attest_agent_response::Step as Told;
use finial_proto::server::agent::{AgentX509svidParams, AttestAgentRequest, CreateJoinTokenRequest};
use finial_proto::server::bundle::GetBundleRequest;
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::entry::BatchCreateEntryRequest;
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::server::svid::{BatchNewX509svidRequest, NewX509svidParams};
use finial_proto::sync::WatchRequest;
use finial_proto::sync::agent_sync_client::AgentSyncClient;
use finial_proto::types;
use finial_runtime::Supervisor;
use futures::StreamExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tonic::Request;
use tonic::transport::Channel;

/// Whatever went wrong ends the program.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;

/// Agents that join or connect at the same time.
const AT_ONCE: usize = 64;
/// The alias below which all agents' entries hang.
const ALIAS: &str = "/fleet";
/// Longer takes nothing, or it is broken.
const DEADLINE: Duration = Duration::from_secs(300);

struct Roots(TrustDomain, Arc<TrustRoots>);

impl BundleSource for Roots {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        (trust_domain == self.0.as_str()).then(|| self.1.clone())
    }
}

/// An agent hears of an entry.
type Heard = (String, Instant);

/// All agents of the fleet.
pub(crate) struct Fleet {
    address: String,
    trust_domain: TrustDomain,
    local: Channel,
    roots: Arc<Roots>,
    key: PrivateKey,
    csr: Vec<u8>,
    svids: Vec<Vec<Arc<[u8]>>>,
    channels: Vec<Channel>,
    supervisor: Supervisor,
    listening: Arc<AtomicUsize>,
    send: mpsc::Sender<Heard>,
    heard: mpsc::Receiver<Heard>,
}

/// What came of asking for everything at once.
pub(crate) struct Herd {
    pub(crate) issued: usize,
    pub(crate) failed: usize,
    pub(crate) first_quarter: Duration,
    pub(crate) last_quarter: Duration,
}

impl Fleet {
    pub(crate) async fn new(address: &str, socket: &str, trust_domain: &str) -> Result<Self, Error> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, raised)?;
        let local = uds_channel(socket);
        let trust_domain = TrustDomain::parse(trust_domain)?;
        let bundle = BundleClient::new(local.clone()).get_bundle(GetBundleRequest::default()).await?.into_inner();
        let ders: Vec<Arc<[u8]>> = bundle.x509_authorities.iter().map(|a| Arc::from(&*a.asn1)).collect();
        let roots = TrustRoots::new(&ders)?;
        let key = PrivateKey::generate(KeyType::EcP256)?;
        let csr = create_csr(&key, None, None, &[]).await?;
        let (send, heard) = mpsc::channel(1 << 16);
        Ok(Self {
            address: address.to_owned(),
            roots: Arc::new(Roots(trust_domain.clone(), Arc::new(roots))),
            trust_domain,
            local,
            key,
            csr,
            svids: Vec::new(),
            channels: Vec::new(),
            supervisor: Supervisor::default(),
            listening: Arc::default(),
            send,
            heard,
        })
    }

    fn channel(&self, svid: Option<&[Arc<[u8]>]>) -> Result<Channel, Error> {
        let identity = match svid {
            Some(chain) => {
                Some(Arc::new(TlsIdentity::new(chain, &self.key)?) as Arc<dyn rustls::client::ResolvesClientCert>)
            }
            None => None,
        };
        let policy = PeerPolicy::Exact(self.trust_domain.server_id());
        let auth = ServerAuth::Spiffe { bundles: self.roots.clone(), policy };
        let config = client_config(identity, auth, Arc::new(SystemClock))?;
        Ok(tls_channel(&self.address, Arc::new(config)))
    }

    async fn join(&self, strangers: Channel) -> Result<Vec<Arc<[u8]>>, Error> {
        let id = types::Spiffeid { trust_domain: self.trust_domain.as_str().to_owned(), path: ALIAS.to_owned() };
        let request = CreateJoinTokenRequest { ttl: 3600, agent_id: Some(id), ..Default::default() };
        let token = AgentClient::new(self.local.clone()).create_join_token(request).await?.into_inner().value.clone();
        let data = types::AttestationData { r#type: "join_token".into(), payload: token.into_bytes().into() };
        let params = Some(AgentX509svidParams { csr: self.csr.clone().into() });
        let step = Step::Params(Params { data: Some(data), params });
        let requests = tokio_stream::once(AttestAgentRequest { step: Some(step) });
        let mut answers = AgentClient::new(strangers).attest_agent(requests).await?.into_inner();
        let answer = answers.message().await?.and_then(|answer| answer.step);
        let Some(Told::Result(result)) = answer else { return Err("no result".into()) };
        Ok(result.svid.ok_or("no SVID")?.cert_chain.iter().map(|der| Arc::from(&**der)).collect())
    }

    /// Lets so many agents join.
    pub(crate) async fn attest(&mut self, count: usize) -> Result<(), Error> {
        // A connection takes about a thousand of these calls, which the server ends before we do.
        let strangers: Result<Vec<_>, _> = (0..=count / AT_ONCE).map(|_| self.channel(None)).collect();
        let strangers = strangers?;
        let joins = futures::stream::iter(0..count)
            .filter_map(|n| std::future::ready(strangers.get(n / AT_ONCE).cloned()))
            .map(|channel| self.join(channel))
            .buffer_unordered(AT_ONCE);
        let all: Vec<Result<Vec<Arc<[u8]>>, Error>> = joins.collect().await;
        self.svids = all.into_iter().collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Opens each agent's connection and its stream.
    pub(crate) async fn connect(&mut self) -> Result<(), Error> {
        let channels: Result<Vec<Channel>, Error> = self.svids.iter().map(|svid| self.channel(Some(svid))).collect();
        let channels = channels?;
        let opens = channels.iter().cloned().map(|channel| async move {
            let mut client = AgentSyncClient::new(channel);
            let open = client.watch_authorized(WatchRequest::default());
            Ok::<_, Error>(tokio::time::timeout(DEADLINE, open).await??.into_inner())
        });
        let mut opened = futures::stream::iter(opens).buffer_unordered(AT_ONCE);
        while let Some(stream) = opened.next().await {
            let mut stream = stream?;
            let (send, listening) = (self.send.clone(), self.listening.clone());
            listening.fetch_add(1, Ordering::Relaxed);
            drop(self.supervisor.spawner().spawn("agent", async move {
                while let Ok(Some(answer)) = stream.message().await {
                    for entry in answer.entries {
                        // Only what this program writes while it waits for it.
                        let _ = send.try_send((entry.id, Instant::now()));
                    }
                }
                listening.fetch_sub(1, Ordering::Relaxed);
            }));
        }
        drop(opened);
        self.channels = channels;
        Ok(())
    }

    /// How many agents' streams are open.
    pub(crate) fn listening(&self) -> usize {
        self.listening.load(Ordering::Relaxed)
    }

    fn entry(&self, path: String) -> types::Entry {
        let id = |path: String| Some(types::Spiffeid { trust_domain: self.trust_domain.as_str().to_owned(), path });
        types::Entry {
            spiffe_id: id(path),
            parent_id: id(ALIAS.to_owned()),
            selectors: vec![types::Selector { r#type: "unix".into(), value: "uid:1000".into() }],
            ..Default::default()
        }
    }

    async fn create(&self, path: String) -> Result<String, Error> {
        let request = BatchCreateEntryRequest { entries: vec![self.entry(path)], output_mask: None };
        let results = EntryClient::new(self.local.clone()).batch_create_entry(request).await?.into_inner().results;
        Ok(results.into_iter().next().and_then(|result| result.entry).ok_or("no entry")?.id)
    }

    /// Creates an entry that every agent may have; how long after the call began each heard of it.
    pub(crate) async fn write(&mut self, number: usize) -> Result<Vec<Duration>, Error> {
        while self.heard.try_recv().is_ok() {}
        let begun = Instant::now();
        let id = self.create(format!("/told/{number}")).await?;
        let mut after = Vec::with_capacity(self.svids.len());
        while after.len() < self.svids.len() {
            let (entry, at) = tokio::time::timeout(DEADLINE, self.heard.recv()).await?.ok_or("nobody listens")?;
            if entry == id {
                after.push(at.duration_since(begun));
            }
        }
        Ok(after)
    }

    /// Agents ask at once for so many SVIDs, each in one batch; each says another time at which its SVIDs end.
    pub(crate) async fn herd(&self, csrs: usize, batch: usize) -> Result<Herd, Error> {
        let id = self.create("/herd".to_owned()).await?;
        SpiffeId::new(&self.trust_domain, "/herd")?;
        let params = NewX509svidParams { entry_id: id, csr: self.csr.clone().into() };
        let (begun, now) = (Instant::now(), SystemClock.now());
        let calls = self.channels.iter().take(csrs.div_ceil(batch)).enumerate().map(|(n, channel)| {
            let size = batch.min(csrs - n * batch);
            // Spread over the agents, so that who asks first is not who ends first.
            let rest = i64::try_from((n * 7919) % 1000).unwrap_or_default();
            let mut request = Request::new(BatchNewX509svidRequest { params: vec![params.clone(); size] });
            request.metadata_mut().insert(finial_proto::SVID_EXPIRY, (now + rest).into());
            let mut client = SvidClient::new(channel.clone()).max_decoding_message_size(64 << 20);
            async move {
                let answer = tokio::time::timeout(DEADLINE, client.batch_new_x509svid(request)).await;
                let issued = match answer {
                    Ok(Ok(answer)) => answer.into_inner().results.iter().filter(|r| r.svid.is_some()).count(),
                    _ => 0,
                };
                (rest, issued, size - issued, begun.elapsed())
            }
        });
        let all: Vec<_> = futures::future::join_all(calls).await;
        let mean = |which: &dyn Fn(i64) -> bool| {
            let times: Vec<Duration> = all.iter().filter(|(rest, ..)| which(*rest)).map(|(.., at)| *at).collect();
            times.iter().sum::<Duration>() / u32::try_from(times.len().max(1)).unwrap_or(u32::MAX)
        };
        Ok(Herd {
            issued: all.iter().map(|(_, issued, ..)| issued).sum(),
            failed: all.iter().map(|(_, _, failed, _)| failed).sum(),
            first_quarter: mean(&|rest| rest < 250),
            last_quarter: mean(&|rest| rest >= 750),
        })
    }
}
