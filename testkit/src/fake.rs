//! A service that speaks HTTP and answers what it is told to, or does not; and a CA for its TLS.

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

/// What the daemon does with a request.
pub enum Act {
    /// Answers with that status and body.
    Say(u16, String),
    /// Answers, with one more header line.
    With(&'static str, String),
    /// Answers with that status, that header line and no body.
    Send(u16, String),
    /// Closes the connection without an answer.
    Close,
    /// Sends these bytes and closes.
    Raw(Vec<u8>),
    /// Never answers.
    Hang,
}

/// The request as it came.
pub struct Asked {
    /// Its method.
    pub method: String,
    /// Its path and query.
    pub path: String,
    /// Its first line and its header lines.
    pub head: String,
    /// Its body.
    pub body: Vec<u8>,
    /// The client's certificate (DER), if it showed one.
    pub client: Option<Vec<u8>>,
}

impl Asked {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let named = |line: &&str| line.split_once(':').is_some_and(|(n, _)| n.eq_ignore_ascii_case(name));
        self.head.lines().find(named)?.split_once(':').map(|(_, value)| value.trim())
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("the body is JSON")
    }
}

type Script = Arc<dyn Fn(&Asked) -> Act + Send + Sync>;

/// Keeps what hangs hanging until the test is over.
#[derive(Default, Clone)]
struct Held(Arc<Mutex<Vec<Box<dyn Send>>>>);

/// A stream that may know who its client is.
trait Stream: Read + Write + Send + 'static {
    fn client(&self) -> Option<Vec<u8>> {
        None
    }
}

impl Stream for std::os::unix::net::UnixStream {}
impl Stream for TcpStream {}
impl Stream for StreamOwned<ServerConnection, TcpStream> {
    fn client(&self) -> Option<Vec<u8>> {
        self.conn.peer_certificates()?.first().map(|certificate| certificate.to_vec())
    }
}

fn converse(mut stream: impl Stream, script: &Script, held: &Held) {
    loop {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                _ => return,
            }
        }
        let head = String::from_utf8(head).unwrap();
        let mut words = head.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let mut asked = Asked { method, path, head, body: Vec::new(), client: stream.client() };
        asked.body = vec![0; asked.header("content-length").map_or(0, |length| length.parse().unwrap())];
        if stream.read_exact(&mut asked.body).is_err() {
            return;
        }
        let (status, more, body) = match script(&asked) {
            Act::Say(status, body) => (status, "X: y".to_owned(), body),
            Act::With(line, body) => (200, line.to_owned(), body),
            Act::Send(status, line) => (status, line, String::new()),
            Act::Close => return,
            Act::Raw(bytes) => return drop(stream.write_all(&bytes)),
            Act::Hang => return held.0.lock().unwrap().push(Box::new(stream)),
        };
        let answer = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{more}\r\n\r\n{body}", body.len());
        if stream.write_all(answer.as_bytes()).and_then(|()| stream.flush()).is_err() {
            return;
        }
    }
}

/// Serves on a unix socket.
pub fn unix(path: &Path, script: impl Fn(&Asked) -> Act + Send + Sync + 'static) {
    let listener = UnixListener::bind(path).unwrap();
    let (script, held): (Script, _) = (Arc::new(script), Held::default());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (script, held) = (script.clone(), held.clone());
            std::thread::spawn(move || converse(stream, &script, &held));
        }
    });
}

/// Serves on a port of loopback, by TLS if there is a configuration.
pub fn tcp(tls: Option<Arc<ServerConfig>>, script: impl Fn(&Asked) -> Act + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (script, held): (Script, _) = (Arc::new(script), Held::default());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (script, held, tls) = (script.clone(), held.clone(), tls.clone());
            std::thread::spawn(move || match tls {
                None => converse(stream, &script, &held),
                Some(config) => {
                    let connection = ServerConnection::new(config).unwrap();
                    converse(StreamOwned::new(connection, stream), &script, &held);
                }
            });
        }
    });
    port
}

/// A proxy that is asked to CONNECT: every host is this machine.
pub struct ConnectProxy {
    /// Where it listens, of loopback.
    pub port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

impl ConnectProxy {
    /// What it was asked so far.
    pub fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

/// Starts one. `instead` may say something of a request in place of letting it through, and hang up.
pub fn connect_proxy(instead: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> ConnectProxy {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let proxy = ConnectProxy { port: listener.local_addr().unwrap().port(), heads: Arc::default() };
    let (heads, instead) = (proxy.heads.clone(), Arc::new(instead));
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (heads, instead) = (heads.clone(), instead.clone());
            std::thread::spawn(move || let_through(stream, &heads, &*instead));
        }
    });
    proxy
}

fn let_through(
    mut client: TcpStream,
    heads: &Mutex<Vec<String>>,
    instead: &dyn Fn(&str) -> Option<String>,
) -> Option<()> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).ok()?;
    heads.lock().unwrap().push(head.clone());
    if let Some(said) = instead(&head) {
        return client.write_all(said.as_bytes()).ok();
    }
    let target = head.strip_prefix("CONNECT ")?.split(' ').next()?;
    let port = target.rsplit_once(':')?.1.parse::<u16>().ok()?;
    let mut server = TcpStream::connect(("127.0.0.1", port)).ok()?;
    client.write_all(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n").ok()?;
    let (mut back, mut to) = (server.try_clone().ok()?, client.try_clone().ok()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut back, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
    let _ = std::io::copy(&mut client, &mut server);
    server.shutdown(std::net::Shutdown::Write).ok()
}

/// A CA in a folder, made by openssl: `ca.crt`, and certificates signed by it.
pub struct Pki(
    /// Where it lies.
    pub tempfile::TempDir,
);

impl Pki {
    /// A new one.
    #[allow(clippy::new_without_default, reason = "it makes files")]
    pub fn new() -> Self {
        let pki = Self(tempfile::tempdir().unwrap());
        let name = pki.0.path().file_name().unwrap().to_string_lossy();
        pki.openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN={name}"
        ));
        pki
    }

    /// Makes `NAME.crt` and `NAME.key` with those extensions, such as `subjectAltName=IP:127.0.0.1`.
    pub fn issue(&self, name: &str, extensions: &str) {
        std::fs::write(self.0.path().join("ext"), extensions).unwrap();
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ));
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out {name}.crt"
        ));
    }

    fn openssl(&self, args: &str) {
        let out = Command::new("openssl").args(args.split(' ')).current_dir(self.0.path()).output().unwrap();
        assert!(out.status.success(), "openssl {args}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// Of that file in the folder.
    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// For a server with the certificate of that name, which may want to see one of the client.
    pub fn server(&self, name: &str, asks_client: bool) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
        let builder = if asks_client {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(self.path("ca.crt")).unwrap()).unwrap();
            let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let chain = CertificateDer::pem_file_iter(self.path(&format!("{name}.crt"))).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key"))).unwrap();
        Arc::new(builder.with_single_cert(chain.map(Result::unwrap).collect(), key).unwrap())
    }
}
