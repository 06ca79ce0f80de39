//! Where the keys come from. A source that fails leaves the last keys in force.

use crate::keys::Keys;
use finial_config::OidcSource;
use finial_core::{Bundle, TrustDomain};
use finial_crypto::bundle::{BUNDLE_BYTES_MAX, bundle_from_json};
use finial_net::client::uds_channel;
use finial_proto::server::bundle::GetBundleRequest;
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::types;
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{JwtBundlesRequest, JwtBundlesResponse};
use finial_runtime::{Shutdown, Spawner};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// How long one look may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a stream may say nothing before another takes its place; less than what probes allow.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Keeps `keys` current until shutdown, looking every `interval`; a Workload API tells changes by itself.
pub(crate) async fn follow(source: OidcSource, interval: Duration, keys: Keys, spawner: Spawner) {
    let shutdown = spawner.shutdown();
    match source {
        OidcSource::Server(socket) => {
            let client = BundleClient::new(uds_channel(&socket));
            let poll = async || match ask_server(&client).await {
                Ok(bundle) => keys.set(&bundle),
                Err(why) => failed("Failed to fetch bundle", &of(&socket, &why)),
            };
            while again(interval, &shutdown, poll()).await {}
        }
        OidcSource::File(path) => while again(interval, &shutdown, poll_file(&path, &keys, &spawner)).await {},
        OidcSource::Workload(socket, trust_domain) => {
            let client = SpiffeWorkloadApiClient::new(uds_channel(&socket));
            let listen = async || {
                let why = stream_workload(&client, &trust_domain, &keys).await;
                failed("Failed to fetch JWKS from the Workload API", &of(&socket, &why));
            };
            while again(interval, &shutdown, listen()).await {}
        }
    }
}

/// Does it once, and waits. False after shutdown.
async fn again(interval: Duration, shutdown: &Shutdown, once: impl Future<Output = ()>) -> bool {
    let turn = async {
        once.await;
        tokio::time::sleep(interval).await;
    };
    tokio::select! {
        () = turn => true,
        () = shutdown.cancelled() => false,
    }
}

fn failed(what: &str, error: &dyn Display) {
    tracing::warn!(%error, "{what}");
}

/// What is said of a source, with its name.
fn of(path: &Path, error: &dyn Display) -> String {
    format!("{}: {error}", path.display())
}

/// Why a call did not do, always in some words; `whose` socket it should have been.
fn refused(status: &Status, whose: &str) -> String {
    let (code, message) = (status.code(), status.message());
    let colon = if message.is_empty() { "" } else { ": " };
    let question = if code == Code::Unimplemented { format!(" (is it the socket of {whose}?)") } else { String::new() };
    format!("{code:?}{colon}{message}{question}")
}

async fn ask_server(client: &BundleClient<Channel>) -> Result<Bundle, String> {
    let mut client = client.clone();
    let mask = types::BundleMask { jwt_authorities: true, ..types::BundleMask::default() };
    let answer = tokio::time::timeout(TIMEOUT, client.get_bundle(GetBundleRequest { output_mask: Some(mask) })).await;
    let answer = answer.map_err(|_| "the server did not answer".to_owned())?;
    let answer = answer.map_err(|status| refused(&status, "a server's API"))?;
    finial_proto::convert::bundle_from_proto(answer.get_ref()).map_err(|e| e.to_string())
}

async fn poll_file(path: &Path, keys: &Keys, spawner: &Spawner) {
    let path: PathBuf = path.into();
    match spawner.blocking(move || read_file(&path)).await {
        Ok(Ok(bundle)) => keys.set(&bundle),
        Ok(Err(error)) => failed("Failed to load SPIFFE trust bundle", &error),
        Err(error) => failed("Failed to load SPIFFE trust bundle", &error),
    }
}

fn read_file(path: &Path) -> Result<Bundle, String> {
    let shown = |error: &dyn Display| of(path, error);
    let json = finial_runtime::files::read_limited(path, BUNDLE_BYTES_MAX).map_err(|e| shown(&e))?;
    // Whose keys these are is not written in the file.
    let nobody = TrustDomain::parse("file").map_err(|e| e.to_string())?;
    bundle_from_json(&nobody, &json).map_err(|e| shown(&e))
}

/// Listens to streams, one after the other, until one fails. Tells why.
async fn stream_workload(client: &SpiffeWorkloadApiClient<Channel>, trust_domain: &TrustDomain, keys: &Keys) -> String {
    const SILENT: &str = "the agent did not answer";
    let refused = |status: &Status| refused(status, "an agent's Workload API");
    let mut client = client.clone();
    loop {
        let mut request = Request::new(JwtBundlesRequest {});
        request.metadata_mut().insert("workload.spiffe.io", tonic::metadata::MetadataValue::from_static("true"));
        let mut stream = match tokio::time::timeout(TIMEOUT, client.fetch_jwt_bundles(request)).await {
            Ok(Ok(stream)) => stream.into_inner(),
            Ok(Err(status)) => return refused(&status),
            Err(_) => return SILENT.into(),
        };
        let mut patience = TIMEOUT;
        loop {
            match tokio::time::timeout(patience, stream.message()).await {
                Ok(Ok(Some(message))) => take(&message, trust_domain, keys),
                Ok(Ok(None)) => return "the stream ended".into(),
                Ok(Err(status)) => return refused(&status),
                Err(_) if patience == TIMEOUT => return SILENT.into(),
                // No word is no change, or an agent that hangs: a new stream begins with a word.
                Err(_) => break,
            }
            patience = SILENCE_MAX;
        }
    }
}

fn take(message: &JwtBundlesResponse, trust_domain: &TrustDomain, keys: &Keys) {
    let Some(document) = message.bundles.get(trust_domain.id_string().as_str()) else {
        let trust_domain_id = trust_domain.id_string();
        return tracing::error!(trust_domain_id, "No bundle for trust domain in Workload API response");
    };
    match workload_bundle(trust_domain, document) {
        Ok(bundle) => keys.set(&bundle),
        Err(error) => failed("Failed to parse trust domain bundle received from the Workload API", &error),
    }
}

/// The Workload API's key sets say no `use` (JWT-SVID section 6.2.1), or that of JWT-SVIDs.
fn workload_bundle(trust_domain: &TrustDomain, document: &[u8]) -> Result<Bundle, String> {
    let mut set: serde_json::Value = serde_json::from_slice(document).map_err(|e| e.to_string())?;
    for key in set.get_mut("keys").and_then(serde_json::Value::as_array_mut).into_iter().flatten() {
        if let Some(key) = key.as_object_mut() {
            key.insert("use".into(), "jwt-svid".into());
        }
    }
    bundle_from_json(trust_domain, set.to_string().as_bytes()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::ManualClock;
    use finial_runtime::{Supervisor, log};
    use std::sync::{Arc, Mutex};

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

    #[test]
    fn a_refusal_says_something_whatever_the_other_side_said() {
        let agents = refused(&Status::unimplemented(""), "a server's API");
        assert_eq!(agents, "Unimplemented (is it the socket of a server's API?)");
        assert_eq!(refused(&Status::unavailable("gone"), "x"), "Unavailable: gone");
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_is_not_there_is_named() {
        let lines = Lines::default();
        let settings =
            log::Settings { level: log::Level::Info, format: log::Format::Text, file: None, source_location: false };
        let clock = Arc::new(ManualClock::at(0));
        let (subscriber, _) = log::with_writer(&settings, Box::new(lines.clone()), clock.clone());
        let _log = tracing::subscriber::set_default(subscriber);
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let trust_domain = TrustDomain::parse("td").unwrap();
        for (source, name) in [
            (OidcSource::Server(at("api.sock")), "api.sock"),
            (OidcSource::Workload(at("agent.sock"), trust_domain), "agent.sock"),
            (OidcSource::File(at("bundle.json")), "bundle.json"),
        ] {
            let supervisor = Supervisor::new(Shutdown::new());
            let keys = Keys::new(clock.clone(), false);
            let following = follow(source, Duration::from_secs(1), keys, supervisor.spawner());
            assert!(tokio::time::timeout(Duration::from_millis(1500), following).await.is_err());
            let text = String::from_utf8(std::mem::take(&mut lines.0.lock().unwrap())).unwrap();
            assert!(text.contains(&format!("{}: ", at(name).display())), "{text}");
        }
    }
}
