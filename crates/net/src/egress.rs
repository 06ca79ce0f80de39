//! Through which proxy TLS leaves, if through any: `HTTPS_PROXY` and `NO_PROXY` as Go's programs read them, so that what leads
//! SPIRE out of a network leads us too. The proxy is asked to CONNECT, and sees names and sizes, no more.

use crate::dial::{self, DialError};
use crate::http1;
use crate::proxy::Network;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use finial_core::Secret;
use finial_runtime::errno_text;
use http::uri::Authority;
use percent_encoding::percent_decode_str;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest answer of a proxy, in bytes, without what passes through it later.
const ANSWER_BYTES_MAX: usize = 16 << 10;

/// Which proxy there is for whom.
#[derive(Default)]
pub struct Proxies {
    /// Or what is wrong with what was configured.
    proxy: Option<Result<Proxy, String>>,
    except: Vec<Exception>,
    /// Also to this machine.
    always: bool,
}

/// An entry of `NO_PROXY`.
enum Exception {
    All,
    Network(Network),
    Address(IpAddr, Port),
    /// Names that end so; and the name itself, without the dot.
    Below {
        suffix: String,
        and_itself: bool,
        port: Port,
    },
}

/// Empty: any.
type Port = String;

/// An HTTP proxy.
pub(crate) struct Proxy {
    host: String,
    port: u16,
    /// `user:password` in base64.
    credentials: Option<Secret<String>>,
}

impl Proxies {
    /// What the environment says, once for all.
    pub fn of_environment() -> Arc<Self> {
        static FOUND: LazyLock<Arc<Proxies>> =
            LazyLock::new(|| Arc::new(Proxies::read(|name| std::env::var(name).ok())));
        FOUND.clone()
    }

    /// The same of other variables.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        let any = |names: [&str; 2]| names.into_iter().filter_map(&variable).find(|value| !value.is_empty());
        let of = |e| format!("HTTPS_PROXY: {e}");
        let proxy = any(["HTTPS_PROXY", "https_proxy"]).map(|url| Proxy::parse(&url).map_err(of));
        let except = any(["NO_PROXY", "no_proxy"]).unwrap_or_default();
        Self { proxy, except: except.split(',').filter_map(Exception::parse).collect(), always: false }
    }

    /// This one for everybody; the URL is named `what` in errors.
    pub fn always(url: &str, what: &str) -> Self {
        let proxy = Proxy::parse(url).map_err(|e| format!("{what}: {e}"));
        Self { proxy: Some(proxy), except: Vec::new(), always: true }
    }

    /// The proxy for that host: a name, or an address without brackets.
    pub(crate) fn of(&self, host: &str, port: u16) -> Result<Option<&Proxy>, DialError> {
        let Some(proxy) = &self.proxy else { return Ok(None) };
        if !self.always && self.is_direct(host, port) {
            return Ok(None);
        }
        proxy.as_ref().map(Some).map_err(|error| DialError::Proxy(error.clone()))
    }

    fn is_direct(&self, host: &str, port: u16) -> bool {
        let host = host.to_ascii_lowercase();
        let address = host.parse::<IpAddr>().ok().map(|address| address.to_canonical());
        if host == "localhost" || host.ends_with(".localhost") || address.is_some_and(|a| a.is_loopback()) {
            return true;
        }
        let port = port.to_string();
        self.except.iter().any(|exception| exception.holds(&host, address, &port))
    }
}

impl Exception {
    fn parse(entry: &str) -> Option<Self> {
        let entry = entry.trim().to_lowercase();
        if entry == "*" {
            return Some(Self::All);
        }
        if let Ok(network) = Network::parse(&entry) {
            return Some(Self::Network(network));
        }
        let (host, port) = host_and_port(&entry).unwrap_or((&entry, ""));
        let port = port.to_owned();
        if let Ok(address) = host.parse::<IpAddr>() {
            return Some(Self::Address(address.to_canonical(), port));
        }
        let host = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
        match host.strip_prefix('.') {
            _ if host.is_empty() => None,
            Some(_) => Some(Self::Below { suffix: host.to_owned(), and_itself: false, port }),
            None => Some(Self::Below { suffix: format!(".{host}"), and_itself: true, port }),
        }
    }

    fn holds(&self, host: &str, address: Option<IpAddr>, at: &str) -> bool {
        let is_port = |port: &Port| port.is_empty() || port == at;
        match (self, address) {
            (Self::All, _) => true,
            (Self::Network(network), Some(address)) => network.includes(address),
            (Self::Address(wanted, port), Some(address)) => *wanted == address && is_port(port),
            (Self::Below { suffix, and_itself, port }, None) => {
                let is_itself = *and_itself && suffix.strip_prefix('.') == Some(host);
                (is_itself || host.ends_with(suffix)) && is_port(port)
            }
            _ => false,
        }
    }
}

/// The parts of `host:port` and `[address]:port`.
fn host_and_port(text: &str) -> Option<(&str, &str)> {
    if let Some(rest) = text.strip_prefix('[') {
        return rest.split_once("]:");
    }
    text.split_once(':').filter(|(_, port)| !port.contains(':'))
}

impl Proxy {
    /// `http://[user[:password]@]host[:port]`, without a scheme as well. What is wrong is told without a word of it.
    fn parse(url: &str) -> Result<Self, String> {
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        match scheme.to_ascii_lowercase().as_str() {
            "http" => {}
            known @ ("https" | "socks5" | "socks5h") => {
                return Err(format!("proxies that are reached by {known} are not supported: name one by http://"));
            }
            _ => return Err("it is not the URL of a proxy".into()),
        }
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user, address) = authority.rsplit_once('@').map_or((None, authority), |(user, at)| (Some(user), at));
        let address = address.parse::<Authority>().ok().filter(|address| !address.host().is_empty());
        let address = address.ok_or("it is not the URL of a proxy")?;
        let port = match address.as_str().strip_prefix(address.host()) {
            None | Some("" | ":") => 80,
            Some(_) => address.port_u16().ok_or("it is not the URL of a proxy")?,
        };
        let credentials = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let plain: Vec<u8> = percent_decode_str(name).chain([b':']).chain(percent_decode_str(password)).collect();
            Secret::new(STANDARD.encode(Secret::new(plain).expose()))
        });
        let host = address.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self { host, port, credentials })
    }

    /// A connection to that host through this proxy, which looks the name up.
    pub(crate) async fn open(&self, host: &str, port: u16) -> Result<TcpStream, DialError> {
        let stream = dial::tcp(&self.host, self.port).await;
        let mut stream = stream.map_err(|e| DialError::Proxy(format!("proxyconnect tcp: {e}")))?;
        let target = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let name = format!("the proxy {}:{}", self.host, self.port);
        let broken = |e: io::Error| DialError::Proxy(format!("{name}: CONNECT {target}: {}", errno_text(&e)));
        let credentials = self.credentials.as_ref().map_or("", |credentials| credentials.expose());
        let lines =
            if credentials.is_empty() { ["", "", ""] } else { ["Proxy-Authorization: Basic ", credentials, "\r\n"] };
        let head = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: {}\r\n", http1::AGENT);
        let asked = Secret::new([&[head.as_str()], &lines[..], &["\r\n"]].concat().concat());
        stream.write_all(asked.expose().as_bytes()).await.map_err(broken)?;
        let answer = read_head(&mut stream).await.map_err(broken)?;
        let mut words = answer.splitn(2, ' ');
        let (version, status) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if version.starts_with("HTTP/1.") && status.starts_with('2') {
            return Ok(stream);
        }
        let status: String = status.chars().filter(|c| !c.is_control()).take(100).collect();
        Err(DialError::Proxy(format!("{name} refuses CONNECT {target}: {status}")))
    }
}

/// The first line of an answer without a body. Reads all of the answer and not a byte more: what follows is another's.
async fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= ANSWER_BYTES_MAX {
            return Err(io::Error::other("the answer is too long"));
        }
        head.push(stream.read_u8().await?);
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    Ok(String::from_utf8_lossy(line).into_owned())
}

#[cfg(test)]
#[path = "egress_tests.rs"]
mod tests;
