//! Bad and borderline requests, sent to the real SPIRE and to Finial: code, message and answer must be the same, word for
//! word. SPIRE is the expectation, so none is written down here.

mod agents;
mod attested;
mod bundles;
mod callers;
mod databases;
mod entries;
mod joined;
mod stored;
mod strangers;
mod svids;
mod workloads;

pub(crate) use joined::{Joined, KEY, csr, stranger, until, workload};
pub(crate) use svids::csrs;

use finial_proto::convert::permission_denied_reason;
use finial_proto::types::{Selector, Spiffeid};
use std::fmt::Debug;
use testkit::Flavor::{Finial, Spire};
use testkit::{Flavor, Server, ServerOptions};
use tonic::{Request, Response, Status};

/// What was asked and what was answered.
pub(crate) type Answers = Vec<(String, String)>;

pub(crate) fn show<T: Debug>(answer: Result<Response<T>, Status>) -> String {
    match answer {
        Ok(response) => format!("{:?}", response.into_inner()),
        Err(status) => refusal(&status),
    }
}

/// A request with the header that one of the SPIFFE standards asks for: `workload` or `broker`.
pub(crate) fn with_header<T>(api: &'static str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let name = format!("{api}.spiffe.io").parse::<tonic::metadata::MetadataKey<_>>().expect("a name");
    request.metadata_mut().insert(name, "true".parse().expect("a value"));
    request
}

/// Code, words, and the reason where one is given.
pub(crate) fn refusal(status: &Status) -> String {
    let reason = permission_denied_reason(status).map(|reason| format!(" ({reason:?})")).unwrap_or_default();
    format!("{:?}: {}{reason}", status.code(), status.message())
}

macro_rules! ask {
    ($answers:ident, $client:ident . $method:ident, $($request:expr),+ $(,)?) => {
        $({
            let request = $request;
            let what = format!("{} {request:?}", stringify!($method));
            $answers.push((what, show($client.$method(request).await)));
        })+
    };
}

/// The same of a list, which has an order in pages only: PostgreSQL puts what was changed wherever there is room just then.
macro_rules! ask_list {
    ($answers:ident, $client:ident . $method:ident, $list:ident, $request:expr) => {{
        let request = $request;
        let (what, paged) = (format!("{} {request:?}", stringify!($method)), request.page_size > 0);
        let mut answer = $client.$method(request).await;
        if let (Ok(answer), false) = (&mut answer, paged) {
            $crate::answers::in_order(&mut answer.get_mut().$list);
        }
        $answers.push((what, show(answer)));
    }};
}

/// Sorts what came in no order, whatever IDs a server made for it.
pub(crate) fn in_order<T: Debug>(all: &mut [T]) {
    all.sort_by_cached_key(|one| without_uuids(&format!("{one:?}")));
}

pub(crate) use {ask, ask_list};

/// Panics with every question that was answered differently.
fn compare(theirs: Answers, ours: Answers) {
    let mut differences = Vec::new();
    for ((what, theirs), (also, ours)) in theirs.iter().zip(&ours) {
        let what: String = what.chars().take(400).collect();
        if *also != what && !also.starts_with(&what) {
            differences.push(format!("{what}\n  Finial was asked something else from here on: {also}"));
            break;
        }
        if plain(theirs) != plain(ours) {
            differences.push(format!("{what}\n   SPIRE: {}\n  Finial: {}", only(theirs, ours), only(ours, theirs)));
        }
    }
    let all = theirs.len();
    assert!(differences.is_empty(), "{} of {all} answers differ:\n{}", differences.len(), differences.join("\n"));
    assert_eq!(all, ours.len());
    assert!(all > 10, "hardly anything was asked");
}

/// The lines of a long answer that the other has not.
fn only(answer: &str, other: &str) -> String {
    let others: Vec<&str> = other.lines().collect();
    answer.lines().filter(|line| !others.contains(line)).collect::<Vec<_>>().join("\n          ")
}

/// An answer without what is meant to differ.
fn plain(answer: &str) -> String {
    let answer = &without_uuids(answer);
    // The words of Go's parsers, after SPIRE's own.
    for cause in [
        "malformed CSR: ",
        "failed to verify CSR signature: ",
        "X.509 authority: ",
        "JWT authority: ",
        "idna error",
        "failed to parse CSR: ",
        "unable to parse JWT token: ",
    ] {
        if let Some((before, after)) = answer.split_once(cause) {
            let rest = after.find("\" })").and_then(|end| after.get(end..)).unwrap_or_default();
            return format!("{before}{cause}{rest}");
        }
    }
    // SPIRE calls these faults of its own; they are the caller's.
    for fault in ["could not parse token '", "invalid JWT-SVID audience: cannot be empty"] {
        if answer.contains(fault) {
            let answer = answer.replace("datastore-sql: rpc error: code = InvalidArgument desc = ", "");
            return answer.replace("Internal", "InvalidArgument");
        }
    }
    answer.to_owned()
}

/// IDs that each server makes by chance.
fn without_uuids(answer: &str) -> String {
    let is_part = |c: char| c.is_ascii_hexdigit() || c == '-';
    let words = answer.split_inclusive(|c| !is_part(c)).map(|word| {
        let id = word.trim_end_matches(|c| !is_part(c));
        let is_uuid = id.len() == 36 && id.split('-').map(str::len).eq([8, 4, 4, 4, 12]);
        if is_uuid { word.replace(id, "{uuid}") } else { word.to_owned() }
    });
    words.collect()
}

pub(crate) fn both<F: Future<Output = Answers>>(ask: impl Fn(Flavor) -> F) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let theirs = runtime.block_on(ask(Spire));
    let ours = runtime.block_on(ask(Finial));
    compare(theirs, ours);
}

/// Asks a server of each.
fn of_servers(options: &ServerOptions, ask: impl AsyncFn(&Server) -> Answers) {
    let ask = &ask;
    both(async move |flavor| ask(&Server::start(flavor, options)).await);
}

fn id(trust_domain: &str, path: &str) -> Option<Spiffeid> {
    Some(Spiffeid { trust_domain: trust_domain.into(), path: path.into() })
}

fn selector(kind: &str, value: &str) -> Selector {
    Selector { r#type: kind.into(), value: value.into() }
}

/// IDs in every state of disrepair.
pub(crate) fn ids() -> Vec<Option<Spiffeid>> {
    vec![
        None,
        id("", ""),
        id("", "/x"),
        id("example.org", ""),
        id("example.org", "x"),
        id("example.org", "/"),
        id("example.org", "/x/"),
        id("example.org", "//x"),
        id("example.org", "/./x"),
        id("example.org", "/../x"),
        id("example.org", "/x y"),
        id("example.org", "/ü"),
        id("Example.org", "/x"),
        id("example.org:80", "/x"),
        id("spiffe://example.org", "/x"),
        id("other.org", "/x"),
        id("other.org", "/spire/agent/x"),
        id("example.org", "/spire"),
        id("example.org", "/spire/server"),
        id("example.org", "/spire/agent"),
        id("example.org", "/spire/agent/none"),
        id("example.org", "/nobody"),
    ]
}
