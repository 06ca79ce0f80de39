//! `docs/guides/why-no-identity.md`, followed: its commands are run as it says, and its outputs are what is printed.

use crate::sandbox::Guard;
use std::path::Path;
use std::process::{Command, Stdio};
use testkit::{Agent, AgentOptions, Flavor, Output, Server, ServerOptions, Workdir, eventually, finial};

const GUIDE: &str = include_str!("../../docs/guides/why-no-identity.md");

/// The fenced blocks of one kind, in order.
fn blocks(kind: &str) -> Vec<&'static str> {
    let parts: Vec<&str> = GUIDE.split("\n```").collect();
    parts.iter().filter_map(|part| part.strip_prefix(kind)?.strip_prefix('\n')).collect()
}

/// A line of the guide may say TOOK for what is another each time.
fn holds(line: &str, said: &str) -> bool {
    let want = line.trim();
    said.lines().map(str::trim).any(|got| match want.split_once("TOOK") {
        Some((before, after)) => got.starts_with(before) && got.ends_with(after),
        None => got == want,
    })
}

/// Asks an agent for a process.
fn explain(pid: &str, socket: &Path, more: &[&str]) -> Output {
    Output::of(Command::new(finial()).args(["explain", "-pid", pid, "-socketPath"]).arg(socket).args(more))
}

/// The entry of the guide.
const ENTRY: &str = "a-web-server";

struct Rig {
    server: Server,
    agent: Agent,
    sockets: Workdir,
    pid: String,
}

impl Rig {
    /// What the guide's words stand for here.
    fn filled(&self, line: &str) -> String {
        let id = |flag: &str| Output::of(Command::new("id").arg(flag)).ok().stdout.trim().to_owned();
        let mut line = line.to_owned();
        for (word, value) in [
            ("PID", self.pid.clone()),
            ("UID", id("-u")),
            ("GID", id("-g")),
            ("GROUP", id("-gn")),
            ("USER", id("-un")),
            ("ENTRY", ENTRY.into()),
            ("PARENT", "spiffe://example.org/node".into()),
        ] {
            line = line.replace(word, &value);
        }
        line
    }

    fn explain(&self, more: &[&str]) -> Output {
        explain(&self.pid, &self.sockets.path().join("admin/api.sock"), more)
    }

    /// Until it says what the guide says.
    fn says(&self, guide: &str) {
        eventually("finial explain says what the guide says", || {
            let said = self.explain(&[]).ok().stdout;
            for line in guide.lines().filter(|line| !line.is_empty()) {
                let line = self.filled(line);
                if !holds(&line, &said) {
                    return Err(format!("{line:?} is not in\n{said}"));
                }
            }
            Ok(())
        });
    }
}

#[test]
fn the_guide_to_a_missing_identity_holds() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let sockets = Workdir::new();
    let admin = format!("admin_socket_path = \"{}\"", sockets.path().join("admin/api.sock").display());
    let agent = Agent::start(Flavor::Finial, &server, &AgentOptions { agent: admin, ..Default::default() });
    let socket = sockets.path().join("admin/api.sock");
    eventually("the admin socket is there", || socket.exists().then_some(()).ok_or_else(|| "no socket".to_owned()));
    let workload = Guard(Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().expect("sleep"));
    let rig = Rig { server, agent, sockets, pid: workload.0.id().to_string() };
    let gid = rig.filled("unix:gid:GID");
    rig.server.entry("/web", &["-entryID", ENTRY, "-selector", "unix:uid:4242", "-selector", &gid]);
    let (commands, outputs) = (blocks("bash"), blocks("text"));
    let [ask, show, update, again] = commands[..] else { panic!("other commands: {commands:?}") };
    assert_eq!((ask.trim(), again.trim()), ("finial explain -pid PID", "finial explain -pid PID"));
    rig.says(outputs[0]);
    let hints = rig.explain(&[]).ok().stdout;
    assert!(hints.contains("hint: if it is to be spiffe://example.org/web"), "{hints}");

    let run = |command: &str| {
        let command = rig.filled(command.trim());
        let words: Vec<&str> = command.strip_prefix("spire-server ").expect("a server's command").split(' ').collect();
        rig.server.command(&words).ok().stdout
    };
    let shown = run(show);
    assert!(shown.contains("unix:uid:4242") && shown.contains(&rig.filled("PARENT")), "{shown}");
    run(update);
    rig.says(outputs[1]);

    let json = rig.explain(&["-output", "json"]).ok().stdout;
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let identity = &json["identities"][0];
    assert_eq!((identity["state"].as_str(), identity["entry_id"].as_str()), (Some("ISSUED"), Some(ENTRY)));
    // Of nobody, and from nobody who can tell.
    drop(workload);
    let gone = rig.explain(&[]);
    assert!(gone.code == 1 && gone.stderr.contains("there is no process"), "{gone:?}");
    let public = explain("1", &rig.agent.socket(), &[]);
    assert!(public.code == 1 && public.stderr.contains("not that of the Workload API"), "{public:?}");
    // Who asks for another identity than one of his is not told that he has none.
    let other = ["api", "fetch", "jwt", "-audience", "a", "-spiffeID", "spiffe://example.org/other"];
    let refused = rig.agent.command_by(Flavor::Finial, &other);
    assert!(
        refused.code == 1 && refused.stderr.contains("hint: no entry of spiffe://example.org/other"),
        "{refused:?}"
    );
    let nowhere = explain("1", Path::new("/nonexistent"), &[]);
    assert!(nowhere.code == 1 && nowhere.stderr.contains("`admin_socket_path`"), "{nowhere:?}");
}

#[test]
fn a_workload_that_is_quicker_than_its_entry_waits_for_it_where_the_agent_says_so() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let experimental = "wait_for_entry = \"1m\"".to_owned();
    let agent = Agent::start(Flavor::Finial, &server, &AgentOptions { experimental, ..Default::default() });
    eventually("the agent listens", || agent.socket().exists().then_some(()).ok_or_else(|| "no socket".to_owned()));
    let socket = agent.socket();
    let socket = socket.to_str().expect("a path in text");
    let mut waiting = agent.start_by(Flavor::Finial, &["api", "fetch", "-timeout", "1m", "-socketPath", socket]);
    eventually("it waits", || match agent.process.log().contains("The workload waits for an entry") {
        true => Ok(()),
        false => Err(agent.process.log()),
    });
    let id = server.entry("/late", &[]);
    assert_eq!(waiting.wait(), 0, "{}", waiting.log());
    assert!(waiting.log().contains(&id), "{}", waiting.log());
}
