//! `finial explain`: why a process has the identities that it has, or none. Asks an agent on its admin socket.

use crate::agent::go_time;
use crate::app::{Advised, Command};
use crate::context::Context;
use crate::goflag::FlagSet;
use crate::json;
use crate::rpc::{RpcError, RpcExt};
use anyhow::{Context as _, bail};
use finial_config::format_go_duration;
use finial_proto::agent::explain::explain_client::ExplainClient;
use finial_proto::agent::explain::{
    Attestor, ExplainProcessRequest, ExplainProcessResponse, Identity, Missing, Near, State,
};
use finial_proto::types::{Selector, Spiffeid};
use std::fmt::Write as _;
use std::time::Duration;
use tonic::Code;

/// How long the agent's attestors may take.
const TIMEOUT: Duration = Duration::from_secs(45);
/// For whoever does not know this call: the other socket of the right agent does not, either.
const NOT_ADMIN_HINT: &str = "only the socket that `admin_socket_path` names answers this, not that of the Workload API; or the agent is SPIRE's or an \
     older one, which cannot tell";

pub(crate) const COMMANDS: &[Command] =
    &[Command::agent_admin("explain", "Tells why a process gets the identities that it gets, or none", flags, |cx| {
        Box::pin(explain(cx))
    })];

fn flags(set: &mut FlagSet) {
    set.int("pid", 0, "The process, by its number in the agent's PID namespace");
    set.output();
}

async fn explain(cx: Context) -> anyhow::Result<()> {
    let pid = i32::try_from(cx.flags.int("pid")).unwrap_or_default();
    if pid <= 0 {
        bail!("a process must be named: -pid N");
    }
    let mut client = ExplainClient::new(cx.agent_admin());
    let call = client.explain_process(ExplainProcessRequest { pid });
    let answer = match tokio::time::timeout(TIMEOUT, call).await {
        Ok(answer) => answer.rpc().map_err(advised)?,
        Err(_) => bail!("the agent did not answer within {}", format_go_duration(TIMEOUT)),
    };
    if cx.json() {
        cx.print(json::lines(vec![json::message("finial.agent.v1.ExplainProcessResponse", &answer)?]));
    } else {
        cx.print(text(&answer).context("cannot write the answer")?);
    }
    Ok(())
}

fn advised(error: RpcError) -> anyhow::Error {
    let hint = match error.code() {
        Code::Unimplemented => NOT_ADMIN_HINT.to_owned(),
        Code::NotFound => "in a container, a process has other numbers than on the host".to_owned(),
        _ if error.is_unreachable() => {
            let before = error.hint().unwrap_or_default();
            format!("{before}. The agent opens this socket only where `admin_socket_path` is configured")
        }
        _ => return error.into(),
    };
    Advised::new(error.into(), hint).into()
}

fn text(answer: &ExplainProcessResponse) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(out, "Process {} (uid {}, gid {})", answer.pid, answer.uid, answer.gid)?;
    writeln!(out, "{}", answer.verdict)?;
    writeln!(out, "\nAttested:")?;
    for one in &answer.attestors {
        attestor(&mut out, one)?;
    }
    let fitting = answer.identities.len();
    writeln!(out, "\nEntries that fit: {fitting} of {}", answer.entry_count)?;
    for one in &answer.identities {
        identity(&mut out, one)?;
    }
    if !answer.nearest.is_empty() {
        writeln!(out, "\nCame nearest:")?;
    }
    for one in &answer.nearest {
        near(&mut out, one)?;
    }
    writeln!(out, "\nAgent: {}, last in step with its server: {}", id(&answer.agent_id), time(answer.last_sync))?;
    for hint in &answer.hints {
        writeln!(out, "hint: {}", one_line(hint))?;
    }
    Ok(out)
}

fn attestor(out: &mut String, attestor: &Attestor) -> std::fmt::Result {
    let took = format_go_duration(Duration::from_micros(u64::try_from(attestor.took_us).unwrap_or_default()));
    if !attestor.error.is_empty() {
        return writeln!(out, "  {} failed after {took}: {}", attestor.name, one_line(&attestor.error));
    }
    writeln!(out, "  {} ({took})", attestor.name)?;
    attestor.selectors.iter().try_for_each(|one| writeln!(out, "    {}", selector(Some(one))))
}

fn identity(out: &mut String, identity: &Identity) -> std::fmt::Result {
    let state = match identity.state() {
        State::Issued => "issued",
        State::Renewing => "being renewed",
        State::Waiting => "not there yet",
        State::Expired => "ended",
        State::Hidden => "not shown",
        State::Unspecified => "unknown",
    };
    writeln!(out, "  {}", id(&identity.spiffe_id))?;
    writeln!(out, "    entry ID:  {}", identity.entry_id)?;
    for one in &identity.selectors {
        writeln!(out, "    selector:  {}", selector(Some(one)))?;
    }
    if !identity.hint.is_empty() {
        writeln!(out, "    hint:      {}", one_line(&identity.hint))?;
    }
    write!(out, "    X509-SVID: {state}")?;
    if identity.expires_at > 0 {
        write!(out, ", valid until {}", time(identity.expires_at))?;
    }
    if !identity.reason.is_empty() {
        write!(out, ": {}", one_line(&identity.reason))?;
    }
    writeln!(out)
}

fn near(out: &mut String, near: &Near) -> std::fmt::Result {
    let all = usize::try_from(near.present).unwrap_or_default() + near.missing.len();
    let missing = near.missing.len();
    writeln!(out, "  {} (entry ID {}), {missing} of {all} selectors missing", id(&near.spiffe_id), near.entry_id)?;
    near.missing.iter().try_for_each(|one| writeln!(out, "    {}", difference(one)))
}

fn difference(missing: &Missing) -> String {
    let wanted = selector(missing.wanted.as_ref());
    if missing.found.is_empty() {
        return format!("wants {wanted}: {}", one_line(&missing.reason));
    }
    let found: Vec<String> = missing.found.iter().map(|one| selector(Some(one))).collect();
    format!("wants {wanted}, has {}", found.join(", "))
}

fn id(id: &Option<Spiffeid>) -> String {
    id.as_ref().map_or_else(|| "(none)".into(), |id| format!("spiffe://{}{}", id.trust_domain, id.path))
}

fn selector(selector: Option<&Selector>) -> String {
    selector.map_or_else(String::new, |one| one_line(&format!("{}:{}", one.r#type, one.value)))
}

fn time(unix_seconds: i64) -> String {
    if unix_seconds == 0 { "never".into() } else { go_time(unix_seconds) }
}

/// What a workload may have chosen cannot draw on a terminal, nor pretend to be another line.
fn one_line(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(kind: &str, value: &str) -> Selector {
        Selector { r#type: kind.into(), value: value.into() }
    }

    #[test]
    fn an_answer_reads_as_it_is_meant() {
        let web = Spiffeid { trust_domain: "td".into(), path: "/web".into() };
        let answer = ExplainProcessResponse {
            pid: 7,
            uid: 1,
            gid: 2,
            agent_id: Some(Spiffeid { trust_domain: "td".into(), path: "/spire/agent/x".into() }),
            attestors: vec![
                Attestor {
                    name: "unix".into(),
                    selectors: vec![make("unix", "path:/x\n\u{1b}[2Jy")],
                    took_us: 300,
                    error: String::new(),
                },
                Attestor { name: "docker".into(), took_us: 1_000, error: "away".into(), ..Attestor::default() },
            ],
            entry_count: 12,
            identities: vec![Identity {
                entry_id: "e1".into(),
                spiffe_id: Some(web.clone()),
                selectors: vec![make("unix", "uid:1")],
                hint: "h".into(),
                state: State::Renewing.into(),
                expires_at: 1_800_000_000,
                reason: "soon".into(),
            }],
            nearest: vec![Near {
                entry_id: "e2".into(),
                spiffe_id: Some(web),
                present: 1,
                missing: vec![
                    Missing {
                        wanted: Some(make("unix", "uid:3")),
                        found: vec![make("unix", "uid:1")],
                        reason: String::new(),
                    },
                    Missing { wanted: Some(make("k8s", "ns:x")), found: vec![], reason: "no such attestor".into() },
                ],
            }],
            verdict: "Served: 1 identity".into(),
            hints: vec!["do this".into()],
            last_sync: 0,
            server_error: String::new(),
        };
        let want = "\
Process 7 (uid 1, gid 2)
Served: 1 identity

Attested:
  unix (300µs)
    unix:path:/x\\n\\u{1b}[2Jy
  docker failed after 1ms: away

Entries that fit: 1 of 12
  spiffe://td/web
    entry ID:  e1
    selector:  unix:uid:1
    hint:      h
    X509-SVID: being renewed, valid until 2027-01-15 08:00:00 +0000 UTC: soon

Came nearest:
  spiffe://td/web (entry ID e2), 2 of 3 selectors missing
    wants unix:uid:3, has unix:uid:1
    wants k8s:ns:x: no such attestor

Agent: spiffe://td/spire/agent/x, last in step with its server: never
hint: do this
";
        assert_eq!(text(&answer).unwrap(), want);
    }

    #[test]
    fn whoever_asks_on_the_wrong_socket_is_told_of_the_right_one() {
        let error = advised(tonic::Status::unimplemented("unknown service").into());
        let advice = format!("{:?}", error.downcast_ref::<Advised>());
        assert!(advice.contains("`admin_socket_path`") && advice.contains("not that of the Workload API"), "{advice}");
    }
}
