//! Emulators of clouds, each a process that tests of one binary share and that ends with the last of them.

use crate::docker::may_skip;
use crate::envoy::http_get;
use crate::process::{self, Process, Workdir, eventually, free_port};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// An emulator that runs.
pub struct Emulator {
    _process: Process,
    port: u16,
    _dir: Workdir,
}

type Slot = Mutex<Weak<Emulator>>;

impl Emulator {
    /// Its port of loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// AWS: S3, Secrets Manager, ACM PCA, STS and others, by HTTP. `None` where it is not installed.
    pub fn moto() -> Option<Arc<Self>> {
        static SLOT: Slot = Mutex::new(Weak::new());
        shared(&SLOT, MOTO, moto)
    }

    /// The same for one test alone, which may have it look at signatures (`/moto-api/reset-auth`).
    pub fn moto_alone() -> Option<Self> {
        installed(MOTO).map(|program| run(&program, moto))
    }

    /// Google Cloud Storage, by HTTP. `None` where it is not installed.
    pub fn gcs() -> Option<Arc<Self>> {
        static SLOT: Slot = Mutex::new(Weak::new());
        shared(&SLOT, "fake-gcs-server", |program, _, port| {
            let mut command = Command::new(program);
            let port_text = port.to_string();
            command.args(["-scheme", "http", "-host", "127.0.0.1", "-port", &port_text, "-backend", "memory"]);
            (command, Box::new(move || answers(port, "/storage/v1/b?project=p")))
        })
    }

    /// Azure Storage, by TLS with that certificate and key (PEM files). `None` where it is not installed.
    pub fn azurite(certificate: &str, key: &str) -> Option<Arc<Self>> {
        let mut port_args =
            ["--silent", "--disableTelemetry", "--inMemoryPersistence", "--skipApiVersionCheck"].to_vec();
        port_args.extend(["--blobHost", "127.0.0.1", "--cert", certificate, "--key", key]);
        let start = |program: &Path, dir: &Path, port: u16| -> (Command, Ready) {
            let mut command = Command::new(program);
            command.args(&port_args).args(["--blobPort", &port.to_string()]).current_dir(dir);
            let connects = move || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map(drop).map_err(|e| e.to_string());
            (command, Box::new(connects))
        };
        installed("node_modules/.bin/azurite-blob").map(|program| Arc::new(run(&program, start)))
    }
}

const MOTO: &str = "moto/bin/moto_server";

fn moto(program: &Path, _: &Path, port: u16) -> (Command, Ready) {
    let mut command = Command::new(program);
    command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
    (command, Box::new(move || answers(port, "/moto-api/")))
}

type Ready = Box<dyn FnMut() -> Result<(), String>>;

fn answers(port: u16, path: &str) -> Result<(), String> {
    match http_get(port, path)? {
        answer if answer.status == 200 => Ok(()),
        answer => Err(format!("it answers {}", answer.status)),
    }
}

fn installed(program: &str) -> Option<PathBuf> {
    let program = process::cache().join("clouds-5.2.5-0.1.1-3.37.0").join(program);
    if program.exists() {
        return Some(program);
    }
    may_skip("an emulator of a cloud", "run tests/real-clouds/build.sh");
    None
}

fn run(program: &Path, start: impl FnOnce(&Path, &Path, u16) -> (Command, Ready)) -> Emulator {
    let (dir, port) = (Workdir::new(), free_port());
    let (mut command, ready) = start(program, dir.path(), port);
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let process = Process::start(&name, dir.path().join("log"), &mut command);
    eventually(&format!("{name} answers"), ready);
    Emulator { _process: process, port, _dir: dir }
}

fn shared(
    slot: &Slot,
    program: &str,
    start: impl FnOnce(&Path, &Path, u16) -> (Command, Ready),
) -> Option<Arc<Emulator>> {
    let program = installed(program)?;
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(running) = slot.upgrade() {
        return Some(running);
    }
    let started = Arc::new(run(&program, start));
    *slot = Arc::downgrade(&started);
    Some(started)
}
