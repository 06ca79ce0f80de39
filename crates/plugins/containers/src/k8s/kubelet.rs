//! The kubelet: how it is reached, and one question, its list of pods.

use super::pods::PodList;
use finial_core::{ErrorKind, Secret};
use finial_net::rest::{Client, Identity, Limits, Target, Trust, client_config, parse};
use finial_plugin::PluginError;
use finial_runtime::errno_text;
use http::header::{ACCEPT, AUTHORIZATION, HeaderValue, USER_AGENT};
use http::{HeaderMap, StatusCode};
use rustls_pki_types::ServerName;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// How long one list may take, and how large it may be: a few hundred pods with all that they may carry.
const LIMITS: Limits = Limits { time: Duration::from_secs(4), body: 64 << 20 };
/// The largest file that is read: a CA bundle.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// How we show who we are.
#[derive(Clone)]
pub(super) enum Auth {
    Anonymous,
    Token(PathBuf),
    Certificate { certificate: PathBuf, key: PathBuf },
}

/// How it is reached.
#[derive(Clone)]
pub(super) enum Access {
    /// The read-only port, on loopback.
    Plain { port: u16 },
    /// The secure port, of what messages call `server`.
    Secure {
        server: &'static str,
        node_name: String,
        port: u16,
        ca: Option<PathBuf>,
        auth: Auth,
        reload_after: Duration,
    },
}

/// The files' content, which must change for a new connection to be made.
#[derive(PartialEq)]
struct Material {
    trust: Trust,
    identity: Option<Identity>,
}

struct Loaded {
    at: Instant,
    /// A request failed since: a token or a certificate may have been replaced.
    is_doubtful: bool,
    material: Option<Material>,
    token: Option<Secret<String>>,
    client: Arc<Client>,
}

pub(super) struct Kubelet {
    access: Access,
    loaded: Mutex<Option<Loaded>>,
}

impl Kubelet {
    pub(super) fn new(access: Access) -> Self {
        Self { access, loaded: Mutex::default() }
    }

    /// Its pods, as they are now.
    pub(super) async fn pods(&self) -> Result<PodList, PluginError> {
        let result = self.pods_now().await;
        if result.is_err() {
            self.doubt();
        }
        result
    }

    async fn pods_now(&self) -> Result<PodList, PluginError> {
        let (client, headers) = self.client().map_err(unavailable)?;
        let answer = client.get("/pods", &headers, LIMITS).await;
        let answer = answer
            .map_err(|e| unavailable(format!("unable to perform request: Get \"{}/pods\": {e}", client.target())))?;
        if answer.status != StatusCode::OK {
            let said: String = String::from_utf8_lossy(&answer.body).chars().take(300).collect();
            let status = answer.status.as_u16();
            return Err(unavailable(format!("unexpected status code on pods response: {status} {said}")));
        }
        let parsed = parse(&answer, PodList::parse).await;
        parsed.map_err(|e| unavailable("unable to decode pod info from kubelet response".into()).because(e))
    }

    /// The files are to be read again before the next request.
    pub(super) fn doubt(&self) {
        if let Some(loaded) = self.loaded.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            loaded.is_doubtful = true;
        }
    }

    /// Reads the files if that is due, and says with which headers to ask.
    pub(super) fn client(&self) -> Result<(Arc<Client>, HeaderMap), String> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("finial/", env!("CARGO_PKG_VERSION"))));
        let mut slot = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if !slot.as_ref().is_some_and(|loaded| self.is_fresh(loaded)) {
            *slot = Some(self.load(slot.take())?);
        }
        let Some(loaded) = slot.as_ref() else { return Err("not configured".into()) };
        if let Some(token) = &loaded.token {
            let value = HeaderValue::try_from(format!("Bearer {}", token.expose()));
            let mut value = value.map_err(|_| "unable to load token: it is not one line of text".to_owned())?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        Ok((loaded.client.clone(), headers))
    }

    fn is_fresh(&self, loaded: &Loaded) -> bool {
        match &self.access {
            Access::Plain { .. } => true,
            Access::Secure { reload_after, .. } => !loaded.is_doubtful && loaded.at.elapsed() < *reload_after,
        }
    }

    fn load(&self, before: Option<Loaded>) -> Result<Loaded, String> {
        let at = Instant::now();
        let Access::Secure { server, node_name, port, ca, auth, .. } = &self.access else {
            let Access::Plain { port } = &self.access else { return Err("not configured".into()) };
            let client = Arc::new(Client::new(Target::Tcp(format!("127.0.0.1:{port}"))));
            return Ok(Loaded { at, is_doubtful: false, material: None, token: None, client });
        };
        let trust = match ca.as_ref().map(|path| read(path, &format!("{server} CA"))).transpose()? {
            None => Trust::Anyone,
            Some(pem) if node_name.is_empty() => Trust::Issued(pem),
            Some(pem) => Trust::Named(pem),
        };
        let (mut token, mut identity) = (None, None);
        match auth {
            Auth::Anonymous => {}
            Auth::Token(path) => {
                let text = String::from_utf8(read(path, "token")?);
                let text = text.map_err(|_| "unable to load token: it is not text".to_owned())?;
                token = Some(Secret::new(text.trim().to_owned()));
            }
            Auth::Certificate { certificate, key } => {
                let certificate = read(certificate, "certificate")?;
                identity = Some(Identity { certificate, key: Secret::new(read(key, "private key")?) });
            }
        }
        let material = Some(Material { trust, identity });
        if let Some(same) = before.filter(|before| before.material == material) {
            return Ok(Loaded { at, is_doubtful: false, material, token, client: same.client });
        }
        let client = material.as_ref().map(|material| secure_client(server, node_name, *port, material));
        let client = Arc::new(client.unwrap_or_else(|| Err("not configured".into()))?);
        Ok(Loaded { at, is_doubtful: false, material, token, client })
    }
}

fn secure_client(server: &str, node_name: &str, port: u16, material: &Material) -> Result<Client, String> {
    let host = if node_name.is_empty() { "127.0.0.1" } else { node_name };
    let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let address = if bare.contains(':') { format!("[{bare}]:{port}") } else { format!("{bare}:{port}") };
    let name = ServerName::try_from(bare)
        .map_err(|_| format!("node name {host:?} is neither a DNS name nor an IP address"))?;
    let config = client_config(&material.trust, material.identity.as_ref(), server)?;
    Ok(Client::new(Target::Tls(address, name, Arc::new(config))))
}

fn read(path: &Path, what: &str) -> Result<Vec<u8>, String> {
    use std::io::Read;
    let mut content = Vec::new();
    let file = std::fs::File::open(path);
    let result = file.and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut content));
    result.map_err(|e| format!("unable to load {what}: open {}: {}", path.display(), errno_text(&e)))?;
    Ok(content)
}

fn unavailable(message: String) -> PluginError {
    PluginError::new(ErrorKind::Unavailable, message)
}
