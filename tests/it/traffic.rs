//! Workloads (go-spiffe) that call each other all the time: twenty times a second, with a new handshake by whatever each then has,
//! and with five tokens a second, which the other one verifies by its bundles and has verified by its agent. Half of the tokens
//! are signed for just that call. Counted, and to be zero: handshakes that failed, and tokens that were denied.

use serde_json::Value;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use testkit::{Agent, Client, Process, Workdir, eventually_within, free_port};

/// So often is every workload called by every other one after a step, before the next one.
const CALLS: u64 = 20;

/// A workload that calls the others.
pub(crate) struct Workload {
    name: String,
    domain: &'static str,
    process: Process,
}

impl Workload {
    pub(crate) fn events(&self) -> Vec<Value> {
        self.process.events()
    }

    /// Waits until what it said is enough.
    pub(crate) fn says(&self, deadline: Duration, what: &str, enough: impl Fn(&[Value]) -> bool) {
        eventually_within(deadline, &format!("{}: {what}", self.name), || {
            if enough(&self.events()) { Ok(()) } else { Err(self.story()) }
        });
    }

    /// The newest of its counts.
    fn count(&self, which: &str) -> u64 {
        let log = self.process.log();
        let last = log.lines().rfind(|line| line.contains("\"event\":\"counts\""));
        let counts: Value = last.and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
        number(&counts, which)
    }

    /// What went wrong, without what goes on all the time.
    pub(crate) fn story(&self) -> String {
        let log = self.process.log();
        let told: Vec<&str> = log.lines().filter(|line| !line.contains("\"event\":\"counts\"")).collect();
        format!("{}:\n{}", self.name, told[told.len().saturating_sub(60)..].join("\n"))
    }
}

fn number(event: &Value, which: &str) -> u64 {
    event[which].as_str().and_then(|n| n.parse().ok()).unwrap_or_default()
}

/// The workloads of one or several domains.
pub(crate) struct Traffic {
    pub(crate) workloads: Vec<Workload>,
    /// For what is ordered to reach every workload; only ends broken runs.
    flow: Duration,
    began: Instant,
    stop: PathBuf,
    _dir: Workdir,
}

impl Traffic {
    /// A workload at each of these agents, with the name of its trust domain. All of them may call each other.
    pub(crate) fn between(agents: &[(&'static str, &Agent)], flow: Duration) -> Self {
        let dir = Workdir::new();
        let stop = dir.path().join("stop");
        let addresses: Vec<String> = agents.iter().map(|_| format!("127.0.0.1:{}", free_port())).collect();
        let names: BTreeSet<&str> = agents.iter().map(|(domain, _)| *domain).collect();
        let workload = |(at, (domain, agent)): (usize, &(&'static str, &Agent))| {
            let others = names.iter().filter(|other| *other != domain).map(|other| format!("spiffe://{other}"));
            let peers = addresses.iter().filter(|address| **address != addresses[at]).cloned().chain(others);
            let peers: Vec<String> = peers.collect();
            let peers: Vec<&str> = peers.iter().map(String::as_str).collect();
            let name = format!("{domain}-{at}");
            let log = dir.path().join(&name);
            let process = Client("go").mesh(&agent.socket(), &addresses[at], &stop, &peers, log);
            Workload { name, domain, process }
        };
        let workloads = agents.iter().enumerate().map(workload).collect();
        let traffic = Self { workloads, flow, began: Instant::now(), stop, _dir: dir };
        traffic.goes_on();
        traffic
    }

    pub(crate) fn everywhere(&self, what: &str, probe: impl Fn(&Workload) -> Result<(), String>) {
        for workload in &self.workloads {
            eventually_within(self.flow, &format!("{}: {what}", workload.name), || probe(workload));
        }
    }

    /// Every workload has called every other one some times more, and nothing went wrong yet.
    pub(crate) fn goes_on(&self) {
        let before: Vec<u64> = self.workloads.iter().map(|workload| workload.count("least")).collect();
        for (workload, before) in self.workloads.iter().zip(before) {
            eventually_within(self.flow, &format!("{} calls all others", workload.name), || {
                let least = workload.count("least");
                if least >= before + CALLS {
                    Ok(())
                } else {
                    Err(format!("{least} after {before}\n{}", workload.story()))
                }
            });
            let bad = workload.count("failed") + workload.count("denied");
            assert_eq!(bad, 0, "{}", workload.story());
        }
    }

    /// Every workload, of any domain, has said so of all these authorities, last.
    pub(crate) fn all_say(&self, event: &str, authorities: &[String]) {
        self.everywhere(&format!("{event} {authorities:?}"), |workload| {
            let events = workload.events();
            let last =
                |id: &String| events.iter().rfind(|e| e["authority"] == id.as_str()).map(|e| e["event"] == event);
            if authorities.iter().all(|id| last(id) == Some(true)) { Ok(()) } else { Err(workload.story()) }
        });
    }

    /// The newest of what every workload of the domain has of its own hangs from one of these, and from none of those.
    pub(crate) fn all_hang(&self, domain: &str, kind: &str, from: &[String], not_from: &[String]) {
        self.everywhere(&format!("its {kind} hangs from {from:?}"), |workload| {
            if workload.domain != domain {
                return Ok(());
            }
            let events = workload.events();
            // Tokens that are signed anew, and those that the agent had.
            for event in [kind, if kind == "jwt" { "kept" } else { kind }] {
                let newest = events.iter().rfind(|e| e["event"] == event);
                let issuers = newest.and_then(|e| e["issuers"].as_str().or(e["issuer"].as_str())).unwrap_or_default();
                let hangs = |ids: &[String]| issuers.split(' ').any(|issuer| ids.iter().any(|id| id == issuer));
                if !hangs(from) || hangs(not_from) {
                    return Err(format!("{event}: {issuers}\n{}", workload.story()));
                }
            }
            Ok(())
        });
    }

    /// Ends the calls and counts. `away`: there was no server at times, so that what only a server has may have been asked for
    /// again.
    pub(crate) fn end(mut self, what: &str, away: bool) {
        self.goes_on();
        std::fs::write(&self.stop, "").expect("a file");
        let lasted = self.began.elapsed();
        let summary = |workload: &Workload| workload.events().into_iter().rfind(|e| e["event"] == "summary");
        self.everywhere("it stops calling", |workload| summary(workload).map(drop).ok_or_else(|| workload.story()));
        let mut counts = String::new();
        let summaries: Vec<Value> = self.workloads.iter().filter_map(summary).collect();
        for which in ["calls", "tokens", "failed", "denied", "interrupted", "svids"] {
            let sum: u64 = summaries.iter().map(|summary| number(summary, which)).sum();
            counts.push_str(&format!(" {which} {sum},"));
        }
        let seen: BTreeSet<String> = self
            .workloads
            .iter()
            .flat_map(|workload| workload.events())
            .filter(|event| event["event"] == "trusted")
            .filter_map(|event| event["authority"].as_str().map(str::to_owned))
            .collect();
        // Not eprintln: what tests print is only shown when they fail.
        let _ = writeln!(std::io::stderr(), "\n{what}:{counts} authorities {}, in {} s", seen.len(), lasted.as_secs());
        for (workload, summary) in self.workloads.iter_mut().zip(&summaries) {
            assert!(number(summary, "tokens") > 0, "{}", workload.story());
            assert_eq!(workload.process.terminate(), 0, "{}", workload.story());
            let events = workload.events();
            let bad = ["failed", "denied", if away { "" } else { "interrupted" }];
            let bad: Vec<&Value> = events.iter().filter(|e| bad.iter().any(|b| e["event"] == *b)).collect();
            assert!(bad.is_empty(), "{what}: {bad:#?}\n{}", workload.story());
        }
    }
}
