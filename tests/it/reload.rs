//! SIGHUP: what can change while a server runs, and what a bad file changes: nothing.

use rustix::process::Signal;
use std::path::PathBuf;
use testkit::{Flavor, Server, ServerOptions, eventually};

struct Reloading {
    server: Server,
    file: PathBuf,
    text: String,
    reloads: usize,
}

impl Reloading {
    fn start() -> Self {
        let server = Server::start(Flavor::Finial, &ServerOptions::default());
        let file = server.dir.path().join("server.conf");
        let text = std::fs::read_to_string(&file).unwrap();
        Self { server, file, text, reloads: 0 }
    }

    /// Has the server read `text` and gives what the log says of it.
    fn with(&mut self, text: &str) -> String {
        std::fs::write(&self.file, text).unwrap();
        let before = self.server.process.log().len();
        self.server.process.signal(Signal::HUP);
        self.reloads += 1;
        eventually("the server has read its file", || {
            let log = self.server.process.log();
            let done =
                |line: &&str| line.contains("msg=\"Configuration reloaded\"") || line.contains("was not reloaded");
            match log.lines().filter(done).count() {
                count if count == self.reloads => Ok(log[before..].to_owned()),
                count => Err(format!("{count} reloads")),
            }
        })
    }
}

#[test]
fn a_server_takes_new_settings_without_a_restart() {
    let mut reloading = Reloading::start();
    let good = reloading.text.clone();
    let changed = good.replace("\"DEBUG\"", "\"WARN\"").replace(
        "ratelimit { attestation = false }",
        "ratelimit { attestation = true }\n admin_ids = [\"spiffe://example.org/admin\"]\n ca_ttl = \"48h\"\n\
         federation { federates_with \"other.test\" { bundle_endpoint_url = \"https://localhost:1\" \
         bundle_endpoint_profile \"https_web\" {} } }",
    );
    // A level below that of the line itself would leave the test without a line.
    let changed = changed.replace("\"WARN\"", "\"INFO\"");
    let said = reloading.with(&changed);
    assert!(said.contains("changed=\"[log_level admin_ids ratelimit federates_with]\""), "{said}");
    assert!(said.contains("ca_ttl has changed in the configuration file: it needs a restart to take effect"), "{said}");
    let level = reloading.server.command(&["logger", "get"]).ok().stdout;
    assert!(level.contains("Logger Level : info") && level.contains("Launch Level : info"), "{level}");
    let said = reloading.with(&changed);
    assert!(said.contains("changed=\"[]\"") && said.contains("ca_ttl has changed"), "{said}");
    let said = reloading.with(&good);
    assert!(said.contains("changed=\"[log_level admin_ids ratelimit federates_with]\""), "{said}");
    assert!(!said.contains("restart"), "{said}");
    reloading.server.command(&["healthcheck"]).ok();
}

#[test]
fn a_bad_file_changes_nothing_and_all_of_it_is_told() {
    let mut reloading = Reloading::start();
    let good = reloading.text.clone();
    let bad = good
        .replace("\"DEBUG\"", "\"INFO\"")
        .replace("ratelimit {", "ca_ttl = \"soon\"\n admin_ids = [\"nobody\"]\n ratelimit {");
    let said = reloading.with(&bad);
    assert!(said.contains("could not parse default CA ttl") && said.contains("could not parse admin ID"), "{said}");
    assert!(said.contains("server.conf:"), "{said}");
    assert!(said.contains("the settings before stay in force"), "{said}");
    let level = reloading.server.command(&["logger", "get"]).ok().stdout;
    assert!(level.contains("Logger Level : debug"), "{level}");
    std::fs::remove_file(&reloading.file).unwrap();
    let said = reloading.with(&good);
    assert!(said.contains("changed=\"[]\""), "{said}");
}
