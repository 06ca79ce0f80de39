//! The verdict and the advice, in words.

use super::{Explanation, Near};
use crate::cache::Record;
use crate::workload_api::Report;
use finial_config::format_go_duration;
use finial_core::{Selector, SelectorSet, SpiffeId};
use finial_proto::agent::explain::{Identity, State};
use std::time::Duration;

/// Selectors that an advised command names.
const NAMED_MAX: usize = 3;

/// What the words are about.
pub(super) struct Findings<'a> {
    pub(super) agent_id: &'a SpiffeId,
    pub(super) selectors: &'a SelectorSet,
    pub(super) reports: &'a [Report],
    pub(super) explanation: &'a Explanation<'a>,
    pub(super) identities: &'a [Identity],
    /// How long a workload waits for its entry.
    pub(super) waits: Option<Duration>,
    pub(super) away: Option<&'a str>,
}

impl Findings<'_> {
    fn all_failed(&self) -> bool {
        !self.reports.is_empty() && self.reports.iter().all(|report| report.result.is_err())
    }

    /// What the Workload API answers.
    pub(super) fn verdict(&self) -> String {
        if self.all_failed() {
            return "Refused: every attestor failed (Unavailable: workload attestation failed)".into();
        }
        let number = |states: &[State]| self.identities.iter().filter(|one| states.contains(&one.state())).count();
        let (ready, waiting) = (number(&[State::Issued, State::Renewing]), number(&[State::Waiting]));
        let ended = number(&[State::Expired]);
        let all = count(ready + waiting + ended, "identity", "identities");
        match (ready + waiting + ended, self.waits) {
            (0, None) => "Refused: no entry fits (PermissionDenied: no identity issued)".into(),
            (0, Some(longest)) => format!("Kept waiting for {} at most: no entry fits", format_go_duration(longest)),
            _ if waiting > 0 => format!("Kept waiting: {all}, of which {waiting} are not there yet"),
            _ if ended > 0 => format!("Served: {all}, of which {ended} have ended"),
            _ => format!("Served: {all}"),
        }
    }

    /// What can be done.
    pub(super) fn hints(&self) -> Vec<String> {
        let mut hints = Vec::new();
        for report in self.reports.iter().filter(|report| report.result.is_err()) {
            hints.push(format!("the attestor {} failed, so that no entry with its selectors fits: mend that first; the agent's log has more", report.name));
        }
        if let Some(away) = self.away {
            hints.push(format!("the agent goes on with what it knows, as its server cannot be asked ({away}): entries made meanwhile are not known"));
        }
        let hidden =
            |(identity, record): &(&Identity, &&Record)| identity.state() == State::Hidden && !record.entry.store_svid;
        for (identity, _) in self.identities.iter().zip(&self.explanation.fitting).filter(hidden) {
            let id = &identity.entry_id;
            hints.push(format!(
                "to have both, give one of the entries another hint: spire-server entry show -entryID {id}"
            ));
        }
        if self.identities.iter().any(|one| one.state() != State::Hidden) {
            return hints;
        }
        if let Some(near) = self.explanation.nearest.first() {
            hints.push(self.nearest(near));
        }
        hints.push(self.create());
        hints
    }

    fn nearest(&self, near: &Near<'_>) -> String {
        let entry = &near.record.entry;
        let missing: Vec<String> = near.missing.iter().take(NAMED_MAX).map(|m| m.wanted.to_string()).collect();
        let more = if near.missing.len() > NAMED_MAX { " and more" } else { "" };
        format!(
            "if it is to be {}, who may change entries does so at the server (spire-server entry show -entryID {}, then spire-server \
             entry update), or start the process so that it has {}{more}",
            entry.spiffe_id,
            entry.id,
            missing.join(", ")
        )
    }

    fn create(&self) -> String {
        let named = self.selectors.iter().filter(|s| is_worth_naming(s)).take(NAMED_MAX);
        let selectors: Vec<String> = named.map(|s| format!(" -selector '{s}'")).collect();
        let trust_domain = self.agent_id.trust_domain_name();
        let known = match self.explanation.all {
            0 => "this agent has no entries at all; an entry's parent must be this agent or an alias of it".to_owned(),
            n => format!(
                "this agent has {}; an entry whose parent is another agent is not among them",
                count(n, "entry", "entries")
            ),
        };
        format!(
            "{known}. A new one: spire-server entry create -parentID {} -spiffeID spiffe://{trust_domain}/NAME{}",
            self.agent_id,
            if selectors.is_empty() { " -selector TYPE:VALUE".to_owned() } else { selectors.concat() }
        )
    }
}

/// Facts that name one program rather than many, and that may be written into a command.
fn is_worth_naming(selector: &Selector) -> bool {
    const WORTH: &[(&str, &[&str])] = &[
        ("unix", &["uid:", "path:"]),
        ("k8s", &["ns:", "sa:", "container-name:"]),
        ("docker", &["image_id:"]),
        ("systemd", &["id:"]),
    ];
    let plain = !selector.value.contains(['\'', '\n']);
    plain
        && WORTH
            .iter()
            .any(|(kind, parts)| selector.kind == *kind && parts.iter().any(|p| selector.value.starts_with(p)))
}

/// `1 entry`, `2 entries`.
pub(super) fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}
