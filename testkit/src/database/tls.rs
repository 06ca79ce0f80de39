//! Certificates of a database server and of one client, made with the openssl command.

use crate::process::{Output, Workdir};
use std::path::PathBuf;
use std::process::Command;

/// A certificate authority with a server certificate for 127.0.0.1 and localhost, and a client's.
pub struct Pki {
    dir: PathBuf,
}

impl Pki {
    pub(super) fn new(dir: &Workdir) -> Self {
        let dir = dir.sub("pki");
        let openssl = |args: &str| {
            Output::of(Command::new("openssl").args(args.split(' ')).current_dir(&dir)).ok();
        };
        let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).expect("a file");
        const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
        openssl(&format!("req -x509 {KEY} -keyout ca.key -out ca.pem -days 2 -subj /CN=databases"));
        write("server.ext", "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth\n");
        write("client.ext", "extendedKeyUsage=clientAuth\n");
        for (name, cn) in [("server", "localhost"), ("client", super::CERTIFIED_USER)] {
            openssl(&format!("req {KEY} -keyout {name}.key -out {name}.csr -subj /CN={cn}"));
            openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile {name}.ext -out {name}.pem"
            ));
        }
        Self { dir }
    }

    /// The authority's certificate, PEM.
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// A client's certificate and key, PEM (PKCS #8), for [`super::CERTIFIED_USER`].
    pub fn client(&self) -> (PathBuf, PathBuf) {
        (self.dir.join("client.pem"), self.dir.join("client.key"))
    }

    /// The server's certificate and key, PEM (PKCS #8).
    pub fn server(&self) -> (PathBuf, PathBuf) {
        (self.dir.join("server.pem"), self.dir.join("server.key"))
    }
}
