//! `spire-agent api …`: the Workload API from the command line.

use crate::app::{AGENT_INSTANCE_USAGE, Advised, Command, Exit, Run};
use crate::context::{Context, write_file};
use crate::goflag::FlagSet;
use crate::json;
use crate::rpc::{RpcError, RpcExt, channel};
use anyhow::{Context as _, bail};
use finial_config::format_go_duration;
use finial_core::{Clock, SpiffeId, SystemClock};
use finial_crypto::{Certificate, PrivateKey, TrustRoots, pem, verify_x509_svid};
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, ValidateJwtsvidRequest, X509svid, X509svidRequest,
    X509svidResponse,
};
use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// Waits between attempts of `api watch`, at most.
const WATCH_WAIT_MAX: Duration = Duration::from_secs(30);

pub(crate) const COMMANDS: &[Command] = &[
    Command::workload("api fetch", FETCH_X509, x509_flags, |cx| Box::pin(fetch_x509(cx))).usage("fetch x509"),
    Command::workload("api fetch x509", FETCH_X509, x509_flags, |cx| Box::pin(fetch_x509(cx))).usage("fetch x509"),
    Command::workload("api fetch jwt", "Fetches a JWT SVID from the Workload API", jwt_flags, |cx| {
        Box::pin(fetch_jwt(cx))
    })
    .usage("fetch jwt"),
    Command::workload("api validate jwt", "Validates a JWT SVID", validate_flags, |cx| Box::pin(validate_jwt(cx)))
        .usage("validate jwt"),
    Command::own(
        "api watch",
        "Attaches to the Workload API and prints updates as they're received",
        watch_flags,
        Run::Async(|cx| Box::pin(watch(cx))),
        Some(""),
        true,
    )
    .usage("watch"),
];
const FETCH_X509: &str = "Fetches X509 SVIDs from the Workload API";

fn client(cx: &Context) -> anyhow::Result<SpiffeWorkloadApiClient<Channel>> {
    Ok(SpiffeWorkloadApiClient::new(channel(&cx.workload_socket()?)))
}

/// A request with the header that the SPIFFE Workload Endpoint standard (section 5) demands.
fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", tonic::metadata::MetadataValue::from_static("true"));
    request
}

/// Makes a call that only reads, and makes it again where the connection ended before it was sent, as grpc-go does by itself:
/// the agent was just being restarted, and the next one listens.
async fn sent<T, F>(mut call: impl FnMut() -> F) -> Result<T, Status>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let response = match call().await {
        Err(status) if status.code() == tonic::Code::Cancelled => call().await,
        response => response,
    };
    response.map(tonic::Response::into_inner)
}

/// Waits as long as `-timeout` allows; 0 or less: without end.
async fn within<T>(cx: &Context, call: impl Future<Output = Result<T, Status>>) -> Result<T, RpcError> {
    let timeout = cx.flags.duration("timeout");
    if timeout.is_zero() {
        return call.await.map_err(RpcError::from);
    }
    match tokio::time::timeout(timeout, call).await {
        Ok(result) => result.map_err(RpcError::from),
        Err(_) => Err(Status::deadline_exceeded("context deadline exceeded").into()),
    }
}

fn x509_flags(set: &mut FlagSet) {
    set.bool("silent", "Suppress stdout");
    set.string(
        "write",
        "",
        "Write SVID data to the specified path (optional; only available for pretty output format)",
    );
    set.output();
}

async fn fetch_x509(cx: Context) -> anyhow::Result<()> {
    let client = client(&cx)?;
    let start = Instant::now();
    let response = within(&cx, async {
        let call = || {
            let mut client = client.clone();
            async move { client.fetch_x509svid(request(X509svidRequest {})).await }
        };
        let mut stream = sent(call).await?;
        stream.message().await?.ok_or_else(|| Status::unknown("EOF"))
    })
    .await?;
    let took = start.elapsed();
    if cx.json() {
        cx.print(json::lines(vec![json::message("X509SVIDResponse", &response)?]));
        return Ok(());
    }
    let svids = read_x509(&response)?;
    for svid in &svids {
        svid.verify()?;
    }
    if !cx.flags.bool("silent") {
        print_x509(&cx, &svids, took);
    }
    match cx.flags.string("write") {
        "" => Ok(()),
        folder => write_x509(&cx, &svids, Path::new(folder)),
    }
}

/// One SVID with what it is verified by.
struct Svid {
    id: String,
    hint: String,
    chain: Vec<Certificate>,
    key: PrivateKey,
    bundle: Vec<Certificate>,
    federated: BTreeMap<String, Vec<Certificate>>,
}

impl Svid {
    /// As `api watch` shows it: without the hint, and other trust domains by their bare names.
    fn as_watched(&mut self) {
        self.hint.clear();
        let federated = std::mem::take(&mut self.federated).into_iter();
        let bare = |id: String| id.strip_prefix("spiffe://").map_or(id.clone(), str::to_owned);
        self.federated = federated.map(|(id, bundle)| (bare(id), bundle)).collect();
    }

    fn verify(&self) -> anyhow::Result<()> {
        SpiffeId::parse(&self.id)?;
        let failed = || format!("{:?} SVID failed verification against bundle", self.id);
        let roots: Vec<_> = self.bundle.iter().map(|c| c.der().clone()).collect();
        let roots = TrustRoots::new(&roots).with_context(failed)?;
        let chain: Vec<_> = self.chain.iter().map(|c| c.der().clone()).collect();
        let id = verify_x509_svid(&chain, &roots, SystemClock.now()).with_context(failed)?;
        if id.as_str() != self.id {
            bail!("{}: it is the SVID of {id}", failed());
        }
        Ok(())
    }
}

fn read_x509(response: &X509svidResponse) -> anyhow::Result<Vec<Svid>> {
    if response.svids.is_empty() {
        bail!("workload response contains no svids");
    }
    let mut federated = BTreeMap::new();
    for (id, der) in &response.federated_bundles {
        let bundle = Certificate::parse_chain(der)
            .with_context(|| format!("failed to parse bundle for federated domain {id:?}"))?;
        if bundle.is_empty() {
            bail!("no certificates in bundle for federated domain {id:?}");
        }
        federated.insert(id.clone(), bundle);
    }
    let read = |(index, svid): (usize, &X509svid)| {
        read_svid(svid, &federated)
            .with_context(|| format!("failed to parse svid entry {index} for spiffe id {:?}", svid.spiffe_id))
    };
    response.svids.iter().enumerate().map(read).collect()
}

fn read_svid(svid: &X509svid, federated: &BTreeMap<String, Vec<Certificate>>) -> anyhow::Result<Svid> {
    let chain = Certificate::parse_chain(&svid.x509_svid)?;
    if chain.is_empty() {
        bail!("no certificates found");
    }
    let key = PrivateKey::from_pkcs8(&svid.x509_svid_key).context("failed to parse private key")?;
    let bundle = Certificate::parse_chain(&svid.bundle).context("failed to parse trust bundle")?;
    if bundle.is_empty() {
        bail!("no certificates in trust bundle");
    }
    let (id, hint) = (svid.spiffe_id.clone(), svid.hint.clone());
    Ok(Svid { id, hint, chain, key, bundle, federated: federated.clone() })
}

fn print_x509(cx: &Context, svids: &[Svid], took: Duration) {
    let plural = if svids.len() == 1 { "" } else { "s" };
    cx.println(format!("Received {} svid{plural} after {}", svids.len(), format_go_duration(took)));
    for svid in svids {
        cx.print(format!("\nSPIFFE ID:\t\t{}\n", svid.id));
        if !svid.hint.is_empty() {
            cx.println(format!("Hint:\t\t\t{}", svid.hint));
        }
        let times = |label: &str, certificate: &Certificate| {
            let (after, until) = (go_time(certificate.not_before()), go_time(certificate.not_after()));
            cx.print(format!("{label} Valid After:\t{after}\n{label} Valid Until:\t{until}\n"));
        };
        if let Some((leaf, intermediates)) = svid.chain.split_first() {
            times("SVID", leaf);
            for (index, certificate) in intermediates.iter().enumerate() {
                times(&format!("Intermediate #{}", index + 1), certificate);
            }
        }
        for (index, certificate) in svid.bundle.iter().enumerate() {
            times(&format!("CA #{}", index + 1), certificate);
        }
        for (trust_domain, bundle) in &svid.federated {
            for (index, certificate) in bundle.iter().enumerate() {
                times(&format!("[{trust_domain}] CA #{}", index + 1), certificate);
            }
        }
    }
    cx.println("");
}

/// A time as Go prints it in UTC: `2026-01-02 03:04:05 +0000 UTC`.
pub(crate) fn go_time(unix_seconds: i64) -> String {
    match time::OffsetDateTime::from_unix_timestamp(unix_seconds) {
        Ok(t) => format!(
            "{:04}-{:02}-{:02} {:02}:{:02}:{:02} +0000 UTC",
            t.year(),
            u8::from(t.month()),
            t.day(),
            t.hour(),
            t.minute(),
            t.second()
        ),
        Err(_) => unix_seconds.to_string(),
    }
}

fn write_x509(cx: &Context, svids: &[Svid], folder: &Path) -> anyhow::Result<()> {
    let pem_of = |chain: &[Certificate]| pem::encode_certificates(chain.iter().map(|c| c.der().as_ref()));
    let public = |path: &PathBuf, chain: &[Certificate]| write_file(path, pem_of(chain).as_bytes(), 0o644);
    for (index, svid) in svids.iter().enumerate() {
        let path = folder.join(format!("svid.{index}.pem"));
        cx.println(format!("Writing SVID #{index} to file {}.", path.display()));
        public(&path, &svid.chain)?;

        let path = folder.join(format!("svid.{index}.key"));
        cx.println(format!("Writing key #{index} to file {}.", path.display()));
        let key = pem::encode_private_key(svid.key.pkcs8_der().expose());
        write_file(&path, key.expose().as_bytes(), 0o600)?;

        let path = folder.join(format!("bundle.{index}.pem"));
        cx.println(format!("Writing bundle #{index} to file {}.", path.display()));
        public(&path, &svid.bundle)?;

        for (other, (trust_domain, bundle)) in svid.federated.iter().enumerate() {
            let path = folder.join(format!("federated_bundle.{index}.{other}.pem"));
            let shown = path.display();
            cx.println(format!("Writing federated bundle #{other} for trust domain {trust_domain} to file {shown}."));
            public(&path, bundle)?;
        }
    }
    Ok(())
}

fn jwt_flags(set: &mut FlagSet) {
    set.comma_strings("audience", "comma separated list of audience values");
    set.string("spiffeID", "", "SPIFFE ID subject (optional)");
    set.output();
    set.output_alias("format", "deprecated; use -output");
}

async fn fetch_jwt(cx: Context) -> anyhow::Result<()> {
    let audience = cx.flags.strings("audience").to_vec();
    if audience.is_empty() {
        bail!("audience must be specified");
    }
    let mut client = client(&cx)?;
    let bundles = within(&cx, first_jwt_bundles(&mut client)).await;
    // SPIRE's client dials on the first call, and puts these words before what goes wrong there.
    let bundles = bundles.map_err(|error| match error.is_unreachable() {
        true => anyhow::Error::new(error).context("failed to receive JWT bundles"),
        false => error.into(),
    })?;
    let spiffe_id = cx.flags.string("spiffeID").to_owned();
    let svids = within(&cx, async {
        let call = || {
            let (mut client, message) =
                (client.clone(), JwtsvidRequest { audience: audience.clone(), spiffe_id: spiffe_id.clone() });
            async move { client.fetch_jwtsvid(request(message)).await }
        };
        sent(call).await
    })
    .await
    .map_err(|error| not_that_one(error, &spiffe_id))?;
    if cx.json() {
        let values = vec![json::message("JWTSVIDResponse", &svids)?, json::message("JWTBundlesResponse", &bundles)?];
        cx.print(json::lines(values));
        return Ok(());
    }
    for svid in &svids.svids {
        cx.print(format!("token({}):\n\t{}\n", svid.spiffe_id, svid.svid));
        if !svid.hint.is_empty() {
            cx.print(format!("hint({}):\n\t{}\n", svid.spiffe_id, svid.hint));
        }
    }
    for (trust_domain, jwks) in &bundles.bundles {
        cx.print(format!("bundle({trust_domain}):\n\t{}\n", String::from_utf8_lossy(jwks)));
    }
    Ok(())
}

/// Who asks for one identity by name may well have others.
fn not_that_one(error: RpcError, spiffe_id: &str) -> anyhow::Error {
    if spiffe_id.is_empty() || !error.is_no_identity() {
        return error.into();
    }
    let hint = format!(
        "no entry of {spiffe_id} fits this process, or the agent does not have it yet; without -spiffeID you get those that do \
         fit. `spire-server entry show -spiffeID {spiffe_id}` lists the entries: all selectors must fit"
    );
    Advised::new(error.into(), hint).into()
}

async fn first_jwt_bundles(client: &mut SpiffeWorkloadApiClient<Channel>) -> Result<JwtBundlesResponse, Status> {
    let call = || {
        let mut client = client.clone();
        async move { client.fetch_jwt_bundles(request(JwtBundlesRequest {})).await }
    };
    let mut stream = sent(call).await?;
    stream.message().await?.ok_or_else(|| Status::unknown("EOF"))
}

fn validate_flags(set: &mut FlagSet) {
    set.string("audience", "", "expected audience value");
    set.string("svid", "", "JWT SVID");
    set.output();
}

async fn validate_jwt(cx: Context) -> anyhow::Result<()> {
    let (audience, svid) = (cx.flags.string("audience").to_owned(), cx.flags.string("svid").to_owned());
    if audience.is_empty() {
        bail!("audience must be specified");
    }
    if svid.is_empty() {
        bail!("svid must be specified");
    }
    let mut client = client(&cx)?;
    let call = client.validate_jwtsvid(request(ValidateJwtsvidRequest { audience, svid }));
    let response = match within(&cx, async { call.await.map(tonic::Response::into_inner) }).await {
        Ok(response) => response,
        Err(error) if error.code() == Code::InvalidArgument => bail!("SVID is not valid: {}", error.message()),
        Err(error) => return Err(anyhow::Error::new(error).context("unable to validate JWT SVID")),
    };
    let value = json::message("ValidateJWTSVIDResponse", &response)?;
    if cx.json() {
        cx.print(json::lines(vec![value]));
        return Ok(());
    }
    let claims = value.get("claims").cloned().unwrap_or(serde_json::Value::Null);
    cx.print(format!("SVID is valid.\nSPIFFE ID : {}\nClaims    : {claims}\n", response.spiffe_id));
    Ok(())
}

fn watch_flags(set: &mut FlagSet) {
    set.string("socketPath", finial_config::AGENT_SOCKET_DEFAULT, "Path to the SPIRE Agent API Unix domain socket");
    set.string("instance", "", AGENT_INSTANCE_USAGE);
}

/// Prints every update until the process is ended. Waits a little longer after each failure in a row.
async fn watch(cx: Context) -> anyhow::Result<()> {
    let mut client = client(&cx)?;
    let mut since = Instant::now();
    let mut failures = 0_u32;
    loop {
        let status = match client.fetch_x509svid(request(X509svidRequest {})).await.rpc() {
            Err(error) => error,
            Ok(mut stream) => loop {
                match stream.message().await {
                    Ok(Some(response)) => {
                        failures = 0;
                        match read_x509(&response) {
                            Ok(mut svids) => {
                                svids.iter_mut().for_each(Svid::as_watched);
                                print_x509(&cx, &svids, since.elapsed());
                            }
                            Err(error) => cx.eprintln(format!("{error:#}")),
                        }
                        since = Instant::now();
                    }
                    Ok(None) => break Status::unavailable("the agent ended the stream").into(),
                    Err(status) => break RpcError::from(status),
                }
            },
        };
        cx.eprintln(status.to_string());
        if status.code() == Code::InvalidArgument {
            return Err(Exit(1).into());
        }
        failures = failures.saturating_add(1);
        tokio::time::sleep((Duration::from_secs(1) * failures).min(WATCH_WAIT_MAX)).await;
    }
}
