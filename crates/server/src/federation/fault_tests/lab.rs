//! An endpoint that does what it is told, and a server of ours that fetches from it.

use crate::federation::fetch::Fetcher;
use crate::federation::*;
use crate::live::{Live, LiveSettings};
use crate::publish::BundleFeed;
use crate::testing::{Memory, trust_domain};
use async_trait::async_trait;
use finial_core::{EndpointProfile, JwtAuthority, KeyType, ManualClock, SpiffeId, X509Authority};
use finial_crypto::bundle::{BundleFormat, bundle_to_json};
use finial_crypto::tls::{KeyExchange, TlsIdentity, server_config};
use finial_crypto::{CaTemplate, DistinguishedName, PrivateKey, SerialNumber, SvidTemplate, X509Ca, pem};
use finial_net::https::FetchLimits;
use finial_runtime::{Spawner, Supervisor};
use finial_store::StoreError;
use serde_json::Value;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

pub(super) const NOW: i64 = 1_800_000_000;
pub(super) const HOUR: i64 = 3600;
pub(super) const BODY_MAX: usize = 64 << 10;
/// For those that say nothing; all others are quicker.
pub(super) const QUICK: FetchLimits = FetchLimits { time: Duration::from_millis(400), body: BODY_MAX };
pub(super) const PATIENT: FetchLimits = FetchLimits { time: Duration::from_secs(60), body: BODY_MAX };
pub(super) const OTHER: &str = "other.test";
pub(super) const ENDPOINT: &str = "spiffe://other.test/endpoint";

/// A trust domain with one authority of each kind.
pub(super) struct Domain {
    pub(super) name: TrustDomain,
    pub(super) ca: X509Ca,
    pub(super) key: PrivateKey,
}

impl Domain {
    pub(super) async fn new(name: &str) -> Self {
        let (name, key) = (TrustDomain::parse(name).unwrap(), PrivateKey::generate(KeyType::EcP256).unwrap());
        let template = CaTemplate {
            subject: &DistinguishedName::ca_default(),
            trust_domain: &name,
            not_before: NOW - HOUR,
            not_after: NOW + 240 * HOUR,
            serial: SerialNumber::random(),
        };
        let ca = X509Ca::self_sign(Arc::new(key.clone()), &template).await.unwrap();
        Self { name, ca, key }
    }

    pub(super) async fn svid(&self, id: &str, not_after: i64) -> Arc<TlsIdentity> {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let template = SvidTemplate {
            id: &SpiffeId::parse(id).unwrap(),
            public_key: key.public_key(),
            subject: &DistinguishedName::ca_default(),
            dns_names: &[],
            not_before: NOW - HOUR,
            not_after,
            serial: SerialNumber::random(),
        };
        let leaf = self.ca.issue_svid(&template).await.unwrap();
        Arc::new(TlsIdentity::new(&self.ca.chain_of(leaf), &key).unwrap())
    }

    pub(super) fn bundle(&self, sequence_number: u64) -> Bundle {
        let public_key = self.key.public_key().spki_der().clone();
        Bundle {
            x509_authorities: vec![X509Authority { der: self.ca.certificate().clone(), tainted: false }],
            jwt_authorities: vec![JwtAuthority { key_id: "k".into(), public_key, expires_at: 0, tainted: false }],
            sequence_number,
            refresh_hint: 300,
            ..Bundle::empty(self.name.clone())
        }
    }
}

/// What an endpoint does with a connection, or with a request.
#[derive(Clone)]
pub(super) enum Says {
    /// Nothing at all, not even TLS; and holds the connection.
    NothingToTcp,
    /// Nothing at all, and hangs up.
    Closes,
    /// Something else than TLS.
    Plain(Vec<u8>),
    /// Takes the request and is silent.
    Nothing,
    /// An answer, then the end.
    Answer(String),
    /// This, then bytes without end.
    Endless(String),
    /// This, then a byte now and then.
    Trickle(String),
}

/// A bundle endpoint.
#[derive(Clone)]
pub(super) struct Endpoint {
    pub(super) address: SocketAddr,
    pub(super) says: Arc<Mutex<BTreeMap<String, Says>>>,
    pub(super) identity: Arc<TlsIdentity>,
}

impl Endpoint {
    pub(super) async fn start(spawner: &Spawner, identity: Arc<TlsIdentity>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Self { address: listener.local_addr().unwrap(), says: Arc::default(), identity };
        let (this, tasks) = (endpoint.clone(), spawner.clone());
        spawner.spawn("endpoint", async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let this = this.clone();
                tasks.spawn("connection", async move { this.meet(tcp).await });
            }
        });
        endpoint
    }

    pub(super) fn says(&self, says: Says) {
        self.says_at("/", says);
    }

    pub(super) fn says_at(&self, path: &str, says: Says) {
        self.says.lock().unwrap().insert(path.into(), says);
    }

    pub(super) fn serves(&self, body: &str) {
        self.says(Says::Answer(http("200 OK", "Content-Type: application/json\r\n", body)));
    }

    pub(super) fn url(&self) -> String {
        format!("https://{}/", self.address)
    }

    pub(super) async fn meet(&self, mut tcp: tokio::net::TcpStream) {
        let at_once = self.says.lock().unwrap().get("/").cloned();
        match at_once {
            Some(Says::NothingToTcp) => return std::future::pending().await,
            Some(Says::Closes) => {
                let _ = tcp.read(&mut [0; 16 << 10]).await;
                return;
            }
            Some(Says::Plain(bytes)) => {
                let _ = tcp.write_all(&bytes).await;
                let _ = tcp.read_to_end(&mut Vec::new()).await;
                return;
            }
            _ => {}
        }
        let clock = Arc::new(ManualClock::at(NOW));
        let mut config = server_config(self.identity.clone(), None, clock).unwrap();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        if let Ok(tls) = TlsAcceptor::from(Arc::new(config)).accept(tcp).await {
            self.answer(tls).await;
        }
    }

    pub(super) async fn answer(&self, mut tls: impl AsyncRead + AsyncWrite + Unpin) {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") && tls.read_buf(&mut request).await.is_ok_and(|n| n > 0) {}
        let request = String::from_utf8_lossy(&request).into_owned();
        let path = request.split(' ').nth(1).unwrap_or_default();
        let says = self.says.lock().unwrap().get(path).cloned().unwrap_or(Says::Closes);
        let (head, chunk, pause) = match says {
            Says::Answer(text) => {
                let _ = tls.write_all(text.as_bytes()).await;
                let _ = tls.shutdown().await;
                return;
            }
            Says::Endless(head) => (head, "x".repeat(1000), Duration::ZERO),
            Says::Trickle(head) => (head, " ".into(), Duration::from_millis(10)),
            _ => return std::future::pending().await,
        };
        let mut went = tls.write_all(head.as_bytes()).await;
        while went.is_ok() {
            tokio::time::sleep(pause).await;
            went = tls.write_all(chunk.as_bytes()).await;
            let _ = tls.flush().await;
        }
    }
}

pub(super) fn http(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
}

pub(super) fn redirect(to: &str) -> Says {
    Says::Answer(http("302 Found", &format!("Location: {to}\r\n"), ""))
}

/// The real fetching on a datastore in memory.
pub(super) struct Ours {
    pub(super) fetcher: Fetcher,
    pub(super) feed: Arc<BundleFeed>,
    pub(super) memory: Arc<Memory>,
    pub(super) relationships: Mutex<Relationships>,
    pub(super) settings: LiveSettings,
}

#[async_trait]
impl Ground for Ours {
    async fn relationships(&self) -> Result<Relationships, StoreError> {
        Ok(self.relationships.lock().unwrap().clone())
    }

    async fn relationship(&self, trust_domain: &TrustDomain) -> Result<Option<FederatesWith>, StoreError> {
        Ok(self.relationships.lock().unwrap().get(trust_domain).cloned())
    }

    fn changed(&self) -> watch::Receiver<Arc<Live>> {
        self.settings.subscribe()
    }

    async fn fetch(&self, trust_domain: &TrustDomain, endpoint: &FederatesWith) -> Result<Bundle, FederationError> {
        self.fetcher.fetch(trust_domain, endpoint).await
    }

    async fn save(&self, bundle: Bundle) -> Result<(), StoreError> {
        self.set(bundle).await;
        Ok(())
    }

    fn known(&self, trust_domain: &TrustDomain) -> Option<Bundle> {
        self.feed.bundle(trust_domain.as_str()).map(|published| published.bundle.clone())
    }
}

impl Ours {
    pub(super) async fn set(&self, bundle: Bundle) {
        let trust_domain = bundle.trust_domain.clone();
        self.memory.data.lock().unwrap().bundles.insert(trust_domain.as_str().into(), bundle);
        self.feed.refresh(&trust_domain).await.unwrap();
    }
}

/// One server of ours that federates with one other trust domain.
pub(super) struct Lab {
    pub(super) ours: Arc<Ours>,
    pub(super) federation: Arc<Federation>,
    pub(super) other: Domain,
    pub(super) endpoint: Endpoint,
    pub(super) clock: Arc<ManualClock>,
    pub(super) supervisor: Supervisor,
    folder: tempfile::TempDir,
}

impl Lab {
    /// By SPIFFE, with its bundle known.
    pub(super) async fn new() -> Self {
        Self::with(PATIENT).await
    }

    pub(super) async fn with(limits: FetchLimits) -> Self {
        let (supervisor, clock, other) =
            (Supervisor::default(), Arc::new(ManualClock::at(NOW)), Domain::new(OTHER).await);
        let endpoint = Endpoint::start(&supervisor.spawner(), other.svid(ENDPOINT, NOW + HOUR).await).await;
        let memory = Arc::<Memory>::default();
        let feed = BundleFeed::open(memory.clone(), trust_domain()).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root.pem");
        let web_roots = move || {
            let mut roots = rustls::RootCertStore::empty();
            let read = std::fs::read(&root).ok().and_then(|text| pem::certificates(&text).ok()).unwrap_or_default();
            roots.add_parsable_certificates(read.iter().map(|der| der.to_vec().into()));
            roots
        };
        let fetcher = Fetcher {
            bundles: feed.clone(),
            clock: clock.clone(),
            spawner: supervisor.spawner(),
            exchange: KeyExchange::Any,
            limits,
            web_roots: Arc::new(web_roots),
        };
        let settings = LiveSettings::new(Live::default());
        let ours = Arc::new(Ours { fetcher, feed, memory, relationships: Mutex::default(), settings });
        ours.set(other.bundle(10)).await;
        let federation = Federation::new(ours.clone(), Metrics::disabled());
        let lab = Self { ours, federation, other, endpoint, clock, supervisor, folder };
        lab.by_spiffe(ENDPOINT, &lab.endpoint.url());
        lab
    }

    pub(super) fn by(&self, url: &str, profile: EndpointProfile) {
        let with = FederatesWith { bundle_endpoint_url: url.into(), profile };
        self.ours.relationships.lock().unwrap().insert(self.other.name.clone(), with);
    }

    pub(super) fn by_spiffe(&self, id: &str, url: &str) {
        self.by(url, EndpointProfile::HttpsSpiffe { endpoint_id: SpiffeId::parse(id).unwrap() });
    }

    /// One poll, as the task makes them.
    pub(super) async fn poll(&self) -> Result<Outcome, FederationError> {
        self.federation.read_or_log().await;
        let found = self.federation.with(|m| m.get(&self.other.name).map(|m| (m.endpoint.clone(), m.fetching.clone())));
        let (endpoint, fetching) = found.unwrap();
        self.federation.update(&self.other.name, &endpoint, &fetching, false).await
    }

    /// A poll that fails with this, and leaves the bundle as it is; so does a refresh by order. `URL` stands for the endpoint's.
    #[track_caller]
    pub(super) fn fails(&self, want: &str) -> impl Future<Output = ()> {
        let want = want
            .replace("URL:", "{}:")
            .replace("URL ", "{} ")
            .replace("URL)", "{})")
            .replace("{}", &format!("{:?}", self.endpoint.url()));
        let at = std::panic::Location::caller();
        async move {
            let before = self.known();
            let polled = self.poll().await.unwrap_err().to_string();
            assert!(polled.starts_with(&want), "{at}:\n     {polled}\nnot: {want}");
            let refreshed = self.federation.refresh(&self.other.name).await.unwrap_err().to_string();
            assert_eq!(refreshed, polled, "{at}");
            assert_eq!(self.known(), before, "{at}");
        }
    }

    /// Makes it that time.
    pub(super) fn at(&self, now: i64) {
        self.clock.advance(now - finial_core::Clock::now(&*self.clock));
    }

    pub(super) fn known(&self) -> Bundle {
        self.ours.known(&self.other.name).unwrap()
    }

    pub(super) fn document(&self, bundle: &Bundle) -> Value {
        serde_json::from_str(&bundle_to_json(bundle, BundleFormat::SPIFFE)).unwrap()
    }

    /// Serves it, and takes it.
    pub(super) async fn takes(&self, document: &Value) -> Bundle {
        self.endpoint.serves(&document.to_string());
        self.poll().await.unwrap();
        self.known()
    }

    /// A certificate of the web with these names, by a root that we trust.
    pub(super) fn web(&self, names: &str) -> Arc<TlsIdentity> {
        let root = names.replace([',', ':'], " ").replace(' ', "-");
        let openssl = |args: &str| {
            let mut command = std::process::Command::new("openssl");
            let out = command.args(args.split(' ')).current_dir(self.folder.path()).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        };
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650";
        openssl(&format!("req -x509 {key} -subj /CN=root-{root} -keyout root.key -out root.pem"));
        openssl(&format!(
            "req -x509 {key} -CA root.pem -CAkey root.key -subj /CN=leaf -addext subjectAltName={names} \
             -addext basicConstraints=critical,CA:FALSE -keyout leaf.key -out leaf.pem"
        ));
        let read = |name: &str| std::fs::read(self.folder.path().join(name)).unwrap();
        let (chain, key) =
            (pem::certificates(&read("leaf.pem")).unwrap(), pem::private_key(&read("leaf.key")).unwrap());
        Arc::new(TlsIdentity::new(&chain, &key).unwrap())
    }
}
