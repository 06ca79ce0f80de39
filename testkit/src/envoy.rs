//! The real Envoy with a configuration of a test's own, and HTTP to talk to it.

use crate::docker::may_skip;
use crate::process::{self, Process, Workdir, eventually, free_port};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long one request may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// The programs by which two proxies are told apart, `caller/envoy` and `callee/envoy`; `None` where Envoy is not installed.
pub fn envoys() -> Option<[PathBuf; 2]> {
    let folder = process::cache().join("envoy-1.40.0");
    let programs = ["caller", "callee"].map(|name| folder.join(name).join("envoy"));
    if programs.iter().all(|program| program.exists()) {
        return Some(programs);
    }
    may_skip("Envoy", "run tests/real-envoy/build.sh");
    None
}

/// What an HTTP server answers: status, headers in lower case, body.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The lines of the head after the first.
    pub headers: Vec<(String, String)>,
    /// The rest.
    pub body: String,
}

impl Answer {
    /// A header's value.
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(n, _)| n == name).map_or("", |(_, value)| value)
    }
}

/// One request on a connection of its own.
pub fn http_get(port: u16, path: &str) -> Result<Answer, String> {
    let talk = || -> std::io::Result<String> {
        let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        connection.set_read_timeout(Some(ANSWER_WITHIN))?;
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        connection.write_all(head.as_bytes())?;
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = talk().map_err(|e| e.to_string())?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("no answer: {answer:?}"))?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|status| status.parse().ok());
    let headers = lines.filter_map(|line| line.split_once(": ")).map(|(n, v)| (n.to_lowercase(), v.to_owned()));
    let headers: Vec<_> = headers.collect();
    let chunked = headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
    let body = if chunked { joined(body) } else { body.to_owned() };
    Ok(Answer { status: status.ok_or_else(|| format!("no status: {head:?}"))?, headers, body })
}

/// A body that came in chunks.
fn joined(mut chunks: &str) -> String {
    let mut body = String::new();
    while let Some((length, rest)) = chunks.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).expect("a length");
        body.push_str(&rest[..length]);
        chunks = rest[length..].trim_start_matches("\r\n");
    }
    body
}

/// Where and how a proxy gets its secrets.
#[derive(Clone, Debug)]
pub struct Secrets<'a> {
    /// The agent's Workload API socket.
    pub socket: &'a Path,
    /// `GRPC`, or `DELTA_GRPC` for the incremental protocol.
    pub api_type: &'a str,
    /// The name of its own certificate.
    pub certificate: &'a str,
    /// The name of what it validates others with.
    pub roots: &'a str,
    /// Who the other side must be.
    pub peer: &'a str,
    /// What the node says of itself.
    pub metadata: Value,
}

impl Secrets<'_> {
    fn source(&self) -> Value {
        // A proxy whose secret does not come yet listens all the same, and refuses.
        json!({"resource_api_version": "V3", "initial_fetch_timeout": "1s", "api_config_source": {
            "api_type": self.api_type, "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": "agent"}}]
        }})
    }

    fn tls(&self) -> Value {
        json!({
            "tls_certificate_sds_secret_configs": [{"name": self.certificate, "sds_config": self.source()}],
            "combined_validation_context": {
                "default_validation_context": {"match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": self.peer}}]},
                "validation_context_sds_secret_config": {"name": self.roots, "sds_config": self.source()},
            },
        })
    }

    fn agent(&self) -> Value {
        let options = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }});
        let address = json!({"pipe": {"path": self.socket}});
        json!({"name": "agent", "typed_extension_protocol_options": options, "load_assignment": endpoint("agent", &address)})
    }
}

fn endpoint(cluster: &str, address: &Value) -> Value {
    json!({"cluster_name": cluster, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]})
}

fn local(port: u16) -> Value {
    json!({"socket_address": {"address": "127.0.0.1", "port_value": port}})
}

fn transport(kind: &str, config: &Value) -> Value {
    let mut config = config.clone();
    config["@type"] = format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}").into();
    json!({"name": "envoy.transport_sockets.tls", "typed_config": config})
}

fn listener(port: u16, route: &Value, transport_socket: Option<Value>) -> Value {
    let manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
        }}],
    });
    let mut chain =
        json!({"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]});
    if let Some(socket) = transport_socket {
        chain["transport_socket"] = socket;
    }
    json!({"name": "in", "address": local(port), "filter_chains": [chain]})
}

/// A running Envoy.
pub struct Envoy {
    /// The process.
    pub process: Process,
    /// Where it listens.
    pub port: u16,
    admin: u16,
    _dir: Workdir,
}

impl Envoy {
    /// One that takes mutual TLS and answers by itself; who called is in the headers `peer` and `serial`.
    pub fn callee(program: &Path, secrets: &Secrets<'_>) -> Self {
        let header = |name, value| json!({"header": {"key": name, "value": value}});
        let route = json!({
            "match": {"prefix": "/"},
            "direct_response": {"status": 200, "body": {"inline_string": "callee"}},
            "response_headers_to_add": [
                header("peer", "%DOWNSTREAM_PEER_URI_SAN%"), header("serial", "%DOWNSTREAM_PEER_SERIAL%"),
            ],
        });
        let context = json!({"common_tls_context": secrets.tls(), "require_client_certificate": true});
        let transport = transport("DownstreamTlsContext", &context);
        Self::start(program, secrets, |port| vec![listener(port, &route, Some(transport))], None)
    }

    /// One that takes plain HTTP and calls another on `port` with mutual TLS, each time on a new connection.
    pub fn caller(program: &Path, secrets: &Secrets<'_>, port: u16) -> Self {
        let route = json!({"match": {"prefix": "/"}, "route": {"cluster": "callee"}});
        let options = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "common_http_protocol_options": {"max_requests_per_connection": 1},
            "explicit_http_config": {"http_protocol_options": {}},
        }});
        let context = json!({"common_tls_context": secrets.tls(), "max_session_keys": 0});
        let cluster = json!({
            "name": "callee",
            "typed_extension_protocol_options": options,
            "load_assignment": endpoint("callee", &local(port)),
            "transport_socket": transport("UpstreamTlsContext", &context),
        });
        Self::start(program, secrets, |port| vec![listener(port, &route, None)], Some(cluster))
    }

    fn start(
        program: &Path,
        secrets: &Secrets<'_>,
        listeners: impl FnOnce(u16) -> Vec<Value>,
        cluster: Option<Value>,
    ) -> Self {
        let (dir, port, admin) = (Workdir::new(), free_port(), free_port());
        let clusters: Vec<Value> = std::iter::once(secrets.agent()).chain(cluster).collect();
        let config = json!({
            "node": {"id": "proxy", "cluster": "test", "metadata": secrets.metadata},
            "admin": {"address": local(admin)},
            "static_resources": {"listeners": listeners(port), "clusters": clusters},
        });
        let file = dir.write("envoy.json", &config.to_string());
        let mut command = process::command(program);
        command.args(["--disable-hot-restart", "--concurrency", "1", "-l", "info", "-c"]).arg(file);
        let process = Process::start("envoy", dir.path().join("envoy.log"), &mut command);
        let mut envoy = Self { process, port, admin, _dir: dir };
        eventually("Envoy answers", || {
            if let Some(code) = envoy.process.ended() {
                panic!("Envoy ended with {code}:\n{}", envoy.process.log());
            }
            http_get(admin, "/server_info").and_then(|a| if a.status == 200 { Ok(()) } else { Err(a.body) })
        });
        envoy
    }

    /// Sends it one request.
    pub fn get(&self) -> Result<Answer, String> {
        http_get(self.port, "/")
    }

    /// Serial numbers of the certificates of its own that it has now, and how many roots it trusts in all.
    pub fn certificates(&self) -> (Vec<String>, usize) {
        let answer = http_get(self.admin, "/certs").expect("the admin port answers");
        let certs: Value = serde_json::from_str(&answer.body).expect("JSON");
        let all = certs["certificates"].as_array().cloned().unwrap_or_default();
        let list = |entry: &Value, key: &str| entry[key].as_array().cloned().unwrap_or_default();
        let own = all.iter().flat_map(|entry| list(entry, "cert_chain"));
        let serials = own.filter_map(|cert| cert["serial_number"].as_str().map(str::to_owned)).collect();
        (serials, all.iter().map(|entry| list(entry, "ca_cert").len()).sum())
    }

    /// The sum of its counters whose names end so.
    pub fn counted(&self, ending: &str) -> u64 {
        let answer = http_get(self.admin, "/stats").expect("the admin port answers");
        let values = answer.body.lines().filter_map(|line| line.split_once(": "));
        values.filter(|(name, _)| name.ends_with(ending)).filter_map(|(_, value)| value.parse::<u64>().ok()).sum()
    }
}
