//! A daemon for tests that answers what it is told to, or does not.

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};

/// What the daemon does with a request.
pub(crate) enum Act {
    /// Answers with that status and body.
    Say(u16, String),
    /// Answers, with one more header line.
    With(&'static str, String),
    /// Closes the connection without an answer.
    Close,
    /// Sends these bytes and closes.
    Raw(Vec<u8>),
    /// Never answers.
    Hang,
}

/// The request as it came: its path and its header lines.
pub(crate) struct Asked {
    pub(crate) path: String,
    pub(crate) head: String,
}

type Script = Arc<dyn Fn(&Asked) -> Act + Send + Sync>;

/// Keeps what hangs hanging until the test is over.
#[derive(Default, Clone)]
struct Held(Arc<Mutex<Vec<Box<dyn Send>>>>);

fn converse(mut stream: impl Read + Write + Send + 'static, script: &Script, held: &Held) {
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
        let path = head.split(' ').nth(1).unwrap().to_owned();
        let (status, more, body) = match script(&Asked { path, head }) {
            Act::Say(status, body) => (status, "X: y", body),
            Act::With(line, body) => (200, line, body),
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
pub(crate) fn unix(path: &Path, script: impl Fn(&Asked) -> Act + Send + Sync + 'static) {
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
pub(crate) fn tcp(tls: Option<Arc<ServerConfig>>, script: impl Fn(&Asked) -> Act + Send + Sync + 'static) -> u16 {
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

/// A CA in a folder, made by openssl: `ca.crt`, and certificates signed by it.
pub(crate) struct Pki(pub(crate) tempfile::TempDir);

impl Pki {
    pub(crate) fn new() -> Self {
        let pki = Self(tempfile::tempdir().unwrap());
        let name = pki.0.path().file_name().unwrap().to_string_lossy();
        pki.openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN={name}"
        ));
        pki
    }

    /// Makes `NAME.crt` and `NAME.key` with those extensions, such as `subjectAltName=IP:127.0.0.1`.
    pub(crate) fn issue(&self, name: &str, extensions: &str) {
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

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// For a server with the certificate of that name; `ask_for` a client's, if it is to have one.
    pub(crate) fn server(&self, name: &str, asks_client: bool) -> Arc<ServerConfig> {
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

/// A process of which the attestor believes what the test says: a folder in place of `/proc/PID`.
pub(crate) struct FakeProcess {
    folder: OwnedFd,
    _kept: tempfile::TempDir,
}

impl FakeProcess {
    pub(crate) fn in_cgroups(cgroups: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cgroup"), cgroups).unwrap();
        Self { folder: std::fs::File::open(folder.path()).unwrap().into(), _kept: folder }
    }

    pub(crate) fn peer(&self) -> finial_plugin::Peer<'_> {
        finial_plugin::Peer { pid: 1, proc_dir: self.folder.as_fd() }
    }
}

/// A child that does nothing, ended when dropped.
pub(crate) struct Sleeper(Child, OwnedFd);

impl Sleeper {
    pub(crate) fn start() -> Self {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let folder = std::fs::File::open(format!("/proc/{}", child.id())).unwrap();
        Self(child, folder.into())
    }

    pub(crate) fn peer(&self) -> finial_plugin::Peer<'_> {
        finial_plugin::Peer { pid: self.pid(), proc_dir: self.1.as_fd() }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    pub(crate) fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.end();
    }
}
