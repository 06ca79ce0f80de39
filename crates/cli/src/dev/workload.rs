//! The workloads of the story: processes of their own that know nothing but the socket's path and what they are to do.
//! They hold no secret; what they are is for the agent to find out.
//!
//! They tell what happens as lines of JSON, and end when their standard input does, so that none outlives its parent.

use finial_core::{Bundle, Clock, SpiffeId, SystemClock, X509Authority};
use finial_crypto::tls::{BundleSource, ClientAuth, PeerPolicy, ServerAuth, TlsIdentity, client_config, server_config};
use finial_crypto::{Certificate, PrivateKey, TrustRoots, hex, verify_x509_svid};
use finial_net::client::uds_channel;
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{JwtsvidRequest, ValidateJwtsvidRequest, X509svidRequest, X509svidResponse};
use rustls_pki_types::ServerName;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::rustls::{CertificateError, Error};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::Channel;

/// Longest time for one step.
const DEADLINE: Duration = Duration::from_secs(15);
/// Largest request or answer, bytes.
const MESSAGE_BYTES_MAX: usize = 4096;

/// What a workload is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Task {
    /// The Workload API's socket.
    pub(super) socket: PathBuf,
    /// The hint of the SVID to use: a process may have several.
    pub(super) hint: String,
    pub(super) role: Role,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Role {
    /// Fetches an X.509-SVID and a JWT-SVID, and ends.
    Show { audience: String },
    /// Answers requests over mutual TLS from one client only.
    Serve { client: String },
    /// Sends a request over mutual TLS, and another one each time its SVID was renewed.
    Call { address: String, server: String },
}

/// What a workload tells.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Event {
    X509Svid {
        id: String,
        serial: String,
        not_after: i64,
        verified: bool,
    },
    JwtSvid {
        token: String,
        claims: serde_json::Value,
        validated_id: String,
    },
    Listening {
        address: String,
    },
    /// As server: a client was let in, or not.
    Accepted {
        client: String,
    },
    Refused {
        reason: String,
    },
    /// As client: what came back.
    Answer {
        text: String,
        serial: String,
    },
    NoAnswer {
        reason: String,
    },
    Renewed {
        old_serial: String,
        new_serial: String,
        not_after: i64,
    },
    Failed {
        reason: String,
    },
}

fn tell(event: &Event) {
    if let Ok(mut line) = serde_json::to_string(event) {
        line.push('\n');
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
    }
}

/// Runs a workload until it is done or its standard input ends.
pub(super) fn main(task: &str) -> ExitCode {
    let Ok(task) = serde_json::from_str::<Task>(task) else {
        tell(&Event::Failed { reason: "this is for `finial dev` itself to call".to_owned() });
        return ExitCode::from(2);
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return ExitCode::FAILURE;
    };
    let failed = runtime.block_on(async {
        tokio::select! {
            done = work(task) => match done {
                Ok(()) => false,
                Err(reason) => {
                    tell(&Event::Failed { reason });
                    true
                }
            },
            () = end_of_input() => false,
        }
    });
    // Without waiting for the thread that reads standard input.
    runtime.shutdown_background();
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

async fn end_of_input() {
    let mut byte = [0];
    while tokio::io::stdin().read(&mut byte).await.is_ok_and(|count| count > 0) {}
}

async fn work(task: Task) -> Result<(), String> {
    let mut workload = Workload::new(&task)?;
    match task.role {
        Role::Show { audience } => workload.show(audience).await,
        Role::Serve { client } => workload.serve(&client).await,
        Role::Call { address, server } => workload.call(&address, &server).await,
    }
}

/// The roots that came with the SVID.
#[derive(Default)]
struct Roots(Mutex<Option<(String, Arc<TrustRoots>)>>);

impl BundleSource for Roots {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        let current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().filter(|(name, _)| name == trust_domain).map(|(_, roots)| roots.clone())
    }
}

struct Workload {
    client: SpiffeWorkloadApiClient<Channel>,
    updates: Option<tonic::Streaming<X509svidResponse>>,
    hint: String,
    identity: Arc<TlsIdentity>,
    roots: Arc<Roots>,
}

/// What became of an update.
struct Current {
    id: String,
    serial: String,
    not_after: i64,
    verified: bool,
}

/// Each call must say that it comes from a SPIFFE client, not from a tricked web client.
fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", tonic::metadata::MetadataValue::from_static("true"));
    request
}

impl Workload {
    fn new(task: &Task) -> Result<Self, String> {
        Ok(Self {
            client: SpiffeWorkloadApiClient::new(uds_channel(&task.socket)),
            updates: None,
            hint: task.hint.clone(),
            identity: Arc::new(TlsIdentity::empty()),
            roots: Arc::default(),
        })
    }

    /// Waits for the next set of SVIDs and takes ours in.
    async fn next(&mut self) -> Result<Current, String> {
        if self.updates.is_none() {
            let stream = timeout(DEADLINE, self.client.fetch_x509svid(request(X509svidRequest {}))).await;
            let stream = stream.map_err(|_| "the agent does not answer")?.map_err(|e| e.message().to_owned())?;
            self.updates = Some(stream.into_inner());
        }
        let updates = self.updates.as_mut().ok_or("no stream")?;
        let update = updates.message().await.map_err(|e| e.message().to_owned())?;
        self.take(update.ok_or("the agent ended the stream")?)
    }

    fn take(&mut self, update: X509svidResponse) -> Result<Current, String> {
        let svid = update.svids.into_iter().find(|svid| svid.hint == self.hint);
        let svid =
            svid.ok_or_else(|| format!("the agent has no identity with the hint {:?} for this process", self.hint))?;
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let chain = Certificate::parse_chain(&svid.x509_svid).map_err(|e| text(&e))?;
        let ders: Vec<Arc<[u8]>> = chain.iter().map(|c| c.der().clone()).collect();
        let key = PrivateKey::from_pkcs8(&svid.x509_svid_key).map_err(|e| text(&e))?;
        let leaf = chain.first().ok_or("an empty chain")?;
        let id = SpiffeId::parse(&svid.spiffe_id).map_err(|e| text(&e))?;
        let roots = Certificate::parse_chain(&svid.bundle).map_err(|e| text(&e))?;
        let authority = |c: &Certificate| X509Authority { der: c.der().clone(), tainted: false };
        let bundle =
            Bundle { x509_authorities: roots.iter().map(authority).collect(), ..Bundle::empty(id.trust_domain()) };
        let roots = Arc::new(TrustRoots::from_bundle(&bundle).map_err(|e| text(&e))?);
        let verified = verify_x509_svid(&ders, &roots, SystemClock.now()).is_ok_and(|found| found == id);
        self.identity.set(&ders, &key).map_err(|e| text(&e))?;
        let name = id.trust_domain_name().to_owned();
        *self.roots.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((name, roots));
        Ok(Current { id: id.to_string(), serial: hex(leaf.serial()), not_after: leaf.not_after(), verified })
    }

    async fn show(&mut self, audience: String) -> Result<(), String> {
        let current = timeout(DEADLINE, self.next()).await.map_err(|_| "the agent does not answer")??;
        let Current { id, serial, not_after, verified } = current;
        tell(&Event::X509Svid { id: id.clone(), serial, not_after, verified });
        let message = |e: tonic::Status| e.message().to_owned();
        let ask = JwtsvidRequest { audience: vec![audience.clone()], spiffe_id: id };
        let answer = timeout(DEADLINE, self.client.fetch_jwtsvid(request(ask))).await;
        let answer = answer.map_err(|_| "the agent does not answer")?.map_err(message)?.into_inner();
        let token = answer.svids.into_iter().next().ok_or("no JWT-SVID came")?.svid;
        let ask = ValidateJwtsvidRequest { audience, svid: token.clone() };
        let answer = timeout(DEADLINE, self.client.validate_jwtsvid(request(ask))).await;
        let answer = answer.map_err(|_| "the agent does not answer")?.map_err(message)?.into_inner();
        let claims = claims_of(&token).unwrap_or_default();
        tell(&Event::JwtSvid { token, claims, validated_id: answer.spiffe_id });
        Ok(())
    }

    async fn serve(&mut self, client: &str) -> Result<(), String> {
        let current = timeout(DEADLINE, self.next()).await.map_err(|_| "the agent does not answer")??;
        let client = SpiffeId::parse(client).map_err(|e| e.to_string())?;
        let auth = ClientAuth { bundles: self.roots.clone(), policy: PeerPolicy::Exact(client), required: true };
        let config = server_config(self.identity.clone(), Some(auth), Arc::new(SystemClock));
        let mut config = config.map_err(|e| e.to_string())?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|e| e.to_string())?;
        let address = listener.local_addr().map_err(|e| e.to_string())?.to_string();
        tell(&Event::Listening { address });
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (stream, _) = accepted.map_err(|e| e.to_string())?;
                    tell(&match timeout(DEADLINE, answer(&acceptor, stream, &current.id)).await {
                        Ok(Ok(client)) => Event::Accepted { client },
                        Ok(Err(reason)) => Event::Refused { reason },
                        Err(_) => Event::Refused { reason: "it said nothing".to_owned() },
                    });
                }
                renewed = self.next() => drop(renewed?),
            }
        }
    }

    async fn call(&mut self, address: &str, server: &str) -> Result<(), String> {
        let server = SpiffeId::parse(server).map_err(|e| e.to_string())?;
        let mut current = timeout(DEADLINE, self.next()).await.map_err(|_| "the agent does not answer")??;
        loop {
            tell(&match timeout(DEADLINE, self.ask(address, &server)).await {
                Ok(Ok(text)) => Event::Answer { text, serial: current.serial.clone() },
                Ok(Err(reason)) => Event::NoAnswer { reason },
                Err(_) => Event::NoAnswer { reason: "no answer in time".to_owned() },
            });
            loop {
                let next = self.next().await?;
                let old = std::mem::replace(&mut current, next);
                if old.serial != current.serial {
                    let (new_serial, not_after) = (current.serial.clone(), current.not_after);
                    tell(&Event::Renewed { old_serial: old.serial, new_serial, not_after });
                    break;
                }
            }
        }
    }

    /// One request on a connection of its own.
    async fn ask(&self, address: &str, server: &SpiffeId) -> Result<String, String> {
        let policy = PeerPolicy::Exact(server.clone());
        let auth = ServerAuth::Spiffe { bundles: self.roots.clone(), policy };
        let config = client_config(Some(self.identity.clone()), auth, Arc::new(SystemClock));
        let mut config = config.map_err(|e| e.to_string())?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let stream = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
        let name = ServerName::try_from("localhost").map_err(|e| e.to_string())?;
        let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|e| e.to_string())?;
        let request = b"GET /hello HTTP/1.1\r\nHost: backend\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.map_err(|e| e.to_string())?;
        let mut answer = Vec::new();
        // A server that refuses us says so in an alert, which only arrives here.
        let mut limited = (&mut stream).take(MESSAGE_BYTES_MAX as u64);
        limited.read_to_end(&mut answer).await.map_err(|e| e.to_string())?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        answer.split_once("\r\n\r\n").map(|(_, body)| body.trim().to_owned()).ok_or("an empty answer".to_owned())
    }
}

/// Answers one request; returns who asked.
async fn answer(acceptor: &TlsAcceptor, stream: TcpStream, own_id: &str) -> Result<String, String> {
    let mut stream = acceptor.accept(stream).await.map_err(|e| reason_of(&e))?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first().map(|c| c.to_vec()));
    let leaf = Certificate::parse(leaf.ok_or("no certificate")?).map_err(|e| e.to_string())?;
    let client = leaf.spiffe_id().map_err(|e| e.to_string())?;
    let mut request = vec![0; MESSAGE_BYTES_MAX];
    stream.read(&mut request).await.map_err(|e| e.to_string())?;
    let body = format!("Hello {client}, this is {own_id}.\n");
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).await.map_err(|e| e.to_string())?;
    stream.shutdown().await.map_err(|e| e.to_string())?;
    Ok(client.to_string())
}

/// Why a handshake failed: the verifier's own words where it is the verifier who refused.
fn reason_of(error: &std::io::Error) -> String {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match tls {
        Some(Error::InvalidCertificate(CertificateError::Other(reason))) => reason.0.to_string(),
        Some(tls) => tls.to_string(),
        None => error.to_string(),
    }
}

/// What a token says, not verified: for showing it.
fn claims_of(token: &str) -> Option<serde_json::Value> {
    use base64::Engine as _;
    let payload = token.split('.').nth(1)?;
    serde_json::from_slice(&base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
}
