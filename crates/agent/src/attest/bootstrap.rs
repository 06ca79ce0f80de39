//! How the server is known at the first contact.

use super::SUBSYSTEM;
use crate::Context;
use crate::error::{AgentError, ServerError};
use bytes::Bytes;
use finial_config::{Bootstrap, TrustBundleFormat};
use finial_core::TrustDomain;
use finial_crypto::web::web_client_config;
use finial_crypto::{Certificate, bundle, pem};
use finial_net::client::{tcp_channel, uds_channel};
use finial_net::https::{self, FetchLimits, Fetched};
use finial_proto::workload::X509BundlesRequest;
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// How long a source may take to answer; after that another attempt is due.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest document that is read, bytes.
const DOCUMENT_BYTES_MAX: usize = 4 << 20;
/// What is not written as it is in a query; a space is written in a way of its own.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b' ');

/// The attempts at a first contact so far, as `agent-data.json` keeps them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attempts {
    /// The agent had a server before, and starts over.
    pub(crate) again: bool,
    /// When the first one was made, by RFC 3339.
    pub(crate) since: String,
    /// How many there were.
    pub(crate) count: i64,
}

/// The roots for the first contact; `None` = whoever answers is believed (`insecure_bootstrap`).
pub(super) async fn roots(context: &Context) -> Result<Option<Vec<Arc<[u8]>>>, AgentError> {
    let settings = &context.settings;
    let attempts = context.storage.attempt(context.clock.now()).await?;
    let mode = if attempts.again { "rebootstrap" } else { "bootstrap" };
    context.metrics.gauge("bootstrapped", 0.0, &[]);
    if let Ok(since) = OffsetDateTime::parse(&attempts.since, &Rfc3339) {
        context.metrics.gauge("bootstrap_seconds", since.unix_timestamp() as f64, &[("mode", mode)]);
    }
    context.metrics.gauge("bootstrap_attempts", attempts.count as f64, &[("mode", mode)]);
    let (from, text) = match &settings.bootstrap {
        Bootstrap::Insecure => return Ok(None),
        Bootstrap::Path(path) => (path.display().to_string(), read(path)?),
        Bootstrap::Url { url, unix_socket: None } => {
            announce(&attempts);
            (url.clone(), download(context, url).await?)
        }
        Bootstrap::Url { url, unix_socket: Some(socket) } => {
            announce(&attempts);
            let asked = with_query(url, &facts(context, &attempts));
            let text = checked(&asked, https::get_unix(socket, &asked, limits()).await)?;
            (format!("{} ({url})", socket.display()), text)
        }
        Bootstrap::WorkloadApi(address) => {
            announce(&attempts);
            return from_workload_api(address, &settings.trust_domain).await.map(Some);
        }
    };
    parse(&from, &text, settings.trust_bundle_format, &settings.trust_domain).map(Some)
}

fn announce(attempts: &Attempts) {
    let what = if attempts.again { "reattestation" } else { "attestation" };
    tracing::info!(subsystem_name = SUBSYSTEM, "Server {what} attempt {}. Started {}.", attempts.count, attempts.since);
}

fn read(path: &Path) -> Result<Bytes, AgentError> {
    let failed = |e: String| AgentError::internal(format!("could not parse trust bundle: {}: {e}", path.display()));
    std::fs::read(path).map(Bytes::from).map_err(|e| failed(e.to_string()))
}

fn limits() -> FetchLimits {
    FetchLimits { time: SOURCE_TIMEOUT, body: DOCUMENT_BYTES_MAX }
}

async fn download(context: &Context, url: &str) -> Result<Bytes, AgentError> {
    let roots = context.spawner.blocking(https::system_roots).await;
    let roots = roots.map_err(|_| AgentError::internal("cannot read this machine's web roots"))?;
    let config = web_client_config(context.key_exchange(), roots, context.clock.clone());
    let config = config.map_err(|e| AgentError::internal(format!("unable to fetch trust bundle URL {url}: {e}")))?;
    checked(url, https::get(url, Arc::new(config), limits()).await)
}

fn checked(url: &str, fetched: Result<Fetched, https::FetchError>) -> Result<Bytes, AgentError> {
    let Fetched { status, body } = fetched.map_err(|error| {
        AgentError::internal(format!("unable to fetch trust bundle URL {url}: {error}")).because(error)
    })?;
    if status != 200 {
        return Err(AgentError::internal(format!("error downloading trust bundle: {status}")));
    }
    Ok(body)
}

/// What a local helper that hands out the bundle is told.
fn facts(context: &Context, attempts: &Attempts) -> [(&'static str, String); 6] {
    let settings = &context.settings;
    [
        ("spiffe-trust-domain", settings.trust_domain.as_str().to_owned()),
        ("spire-attest-mode", if attempts.again { "rebootstrap" } else { "bootstrap" }.to_owned()),
        ("spire-attest-start-time", attempts.since.clone()),
        ("spire-connection-attempts", attempts.count.to_string()),
        ("spire-server-address", settings.server_address.clone()),
        ("spire-server-port", settings.server_port.to_string()),
    ]
}

/// The URL with these parameters among its own, in order of their names, as Go writes them.
fn with_query(url: &str, facts: &[(&str, String)]) -> String {
    let url = url.split_once('#').map_or(url, |(url, _)| url);
    let (base, query) = url.split_once('?').unwrap_or((url, ""));
    let mut all: Vec<(String, String)> = query
        .split('&')
        .filter(|part| !part.is_empty())
        .map(|part| part.split_once('=').unwrap_or((part, "")))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    all.extend(facts.iter().map(|(name, value)| ((*name).to_owned(), escape(value))));
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    let query: Vec<String> = all.iter().map(|(name, value)| format!("{name}={value}")).collect();
    format!("{base}?{}", query.join("&"))
}

fn escape(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string().replace(' ', "+")
}

/// The bundle of our trust domain, as another agent on this node knows it.
async fn from_workload_api(address: &str, trust_domain: &TrustDomain) -> Result<Vec<Arc<[u8]>>, AgentError> {
    let failed = |status: Status| {
        AgentError::internal(format!(
            "unable to fetch trust bundle from SPIFFE Workload API {address}: {}",
            ServerError::bare(status)
        ))
    };
    let mut request = Request::new(X509BundlesRequest {});
    request.metadata_mut().insert("workload.spiffe.io", tonic::metadata::MetadataValue::from_static("true"));
    let mut client = SpiffeWorkloadApiClient::new(channel(address));
    let first = async {
        let mut stream = client.fetch_x509_bundles(request).await?.into_inner();
        stream.message().await?.ok_or_else(|| Status::unavailable("the stream ended"))
    };
    let first = tokio::time::timeout(SOURCE_TIMEOUT, first).await;
    let answer =
        first.unwrap_or_else(|_| Err(Status::deadline_exceeded("context deadline exceeded"))).map_err(failed)?;
    let none = |e: &str| {
        let domain = trust_domain.as_str();
        AgentError::internal(format!(
            "SPIFFE Workload API {address} did not provide a trust bundle for trust domain {domain:?}: {e}"
        ))
    };
    let der = answer.bundles.get(&trust_domain.id_string()).ok_or_else(|| none("there is none"))?;
    let roots = Certificate::parse_chain(der).map_err(|e| none(&e.to_string()))?;
    not_empty(address, roots.iter().map(|root| root.der().clone()).collect())
}

/// `unix:` with a path or `tcp:` with an address: checked when the configuration was read.
fn channel(address: &str) -> Channel {
    match address.strip_prefix("tcp://") {
        Some(address) => tcp_channel(address),
        None => {
            let path = address.strip_prefix("unix:").unwrap_or(address);
            uds_channel(path.strip_prefix("//").unwrap_or(path))
        }
    }
}

/// `from` is named in what is wrong with it.
fn parse(
    from: &str,
    text: &[u8],
    format: TrustBundleFormat,
    trust_domain: &TrustDomain,
) -> Result<Vec<Arc<[u8]>>, AgentError> {
    let failed = |e: &dyn std::fmt::Display| AgentError::internal(format!("could not parse trust bundle: {from}: {e}"));
    let roots = match format {
        TrustBundleFormat::Pem => pem::certificates(text).map_err(|e| failed(&e))?,
        TrustBundleFormat::Spiffe => {
            let bundle = bundle::bundle_from_json(trust_domain, text).map_err(|e| failed(&e))?;
            bundle.x509_authorities.into_iter().map(|a| a.der).collect()
        }
    };
    not_empty(from, roots)
}

fn not_empty(from: &str, roots: Vec<Arc<[u8]>>) -> Result<Vec<Arc<[u8]>>, AgentError> {
    if roots.is_empty() {
        return Err(AgentError::internal(format!("no certificates found in trust bundle: {from}")));
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_helper_is_told_stands_among_the_urls_own_parameters() {
        let facts = [("spire-server-port", "80".to_owned()), ("spiffe-trust-domain", "a b/c+~".to_owned())];
        assert_eq!(
            with_query("http://x/y?z=1&a=%20#part", &facts),
            "http://x/y?a=%20&spiffe-trust-domain=a+b%2Fc%2B~&spire-server-port=80&z=1"
        );
        assert_eq!(with_query("http://x", &facts[..1]), "http://x?spire-server-port=80");
    }

    #[test]
    fn what_is_no_bundle_is_named_with_where_it_came_from() {
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        for (format, text) in [
            (TrustBundleFormat::Pem, "none"),
            (TrustBundleFormat::Spiffe, "none"),
            (TrustBundleFormat::Spiffe, r#"{"keys":[]}"#),
        ] {
            let said = parse("/etc/spire/bundle", text.as_bytes(), format, &trust_domain).unwrap_err().to_string();
            assert!(said.contains("trust bundle: /etc/spire/bundle"), "{said}");
        }
    }
}
