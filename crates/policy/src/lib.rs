//! A custom authorization policy: SPIRE's `experimental.auth_opa_policy_engine`.
//!
//! The policy is a Rego v1 module, evaluated for every call. What it is asked is `data.spire.result`: five booleans that say
//! to whom the call is allowed; whether the caller is one of them is not the policy's to decide. Evaluation is pure and in
//! memory. regorus, which does it, is a large dependency; this crate is the only one that sees it.

mod message;

use message::Messages;
use regorus::utils::limits::{ExecutionTimerConfig, set_fallback_execution_timer_config};
use regorus::{CompiledPolicy, Engine, LimitError, Rc, Value};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Map, json};
use std::io::Read;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The rule whose value is the answer.
const ENTRYPOINT: &str = "data.spire.result";
/// Largest policy or data file, in bytes.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// How long one evaluation may take, on a thread that meanwhile serves nobody else. A call whose verdict takes longer is
/// refused.
const EVALUATION_MAX: Duration = Duration::from_millis(100);
/// How often an evaluation is begun again that hardly had a processor in its time: a machine under load must not turn a good
/// policy into one that refuses everybody.
const ATTEMPTS_MAX: u32 = 30;
/// Steps between looks at the clock.
const STEPS_PER_CHECK: NonZeroU32 = NonZeroU32::MIN.saturating_add(255);

/// Why a policy cannot be used, or gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A file cannot be read.
    #[error("open {}: {}", path.display(), finial_runtime::errno_text(source))]
    Unreadable {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is larger than 16 MiB.
    #[error("{} is larger than 16 MiB", .0.display())]
    TooLarge(PathBuf),
    /// The data file is not a JSON object.
    #[error("error decoding JSON databindings: {0}")]
    Data(String),
    /// The policy is not Rego, or does not compile.
    #[error("{0}")]
    Rego(String),
    /// It compiles, but fails for a call of the kind that every server gets.
    #[error("authpolicy engine failed to validate on sample test inputs: policy is misconfigured: {0}")]
    Misconfigured(Box<PolicyError>),
    /// The policy says nothing about the call.
    #[error("policy: no matching policies found")]
    NoResult,
    /// The answer is not an object.
    #[error("unexpected type in evaluating policy result expression")]
    NoObject,
    /// The answer lacks one of its five booleans.
    #[error("policy: result did not contain {0:?} bool value")]
    NoBoolean(&'static str),
    /// The request is none of the contracts' messages: a mistake of ours.
    #[error("request cannot be shown to the policy: {0}")]
    Request(String),
}

/// A call, as the policy sees it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Input<'a> {
    /// The caller's SPIFFE ID; empty without one.
    pub caller: &'a str,
    /// The program of a local caller, where it is known.
    pub caller_file_path: &'a str,
    /// Such as `/spire.api.server.entry.v1.Entry/ListEntries`.
    pub full_method: &'a str,
    /// The request's protobuf bytes; none for streams.
    pub request: Option<&'a [u8]>,
}

/// To whom the policy allows the call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// To everyone.
    pub allow: bool,
    /// To admins.
    pub allow_if_admin: bool,
    /// To callers on the local socket.
    pub allow_if_local: bool,
    /// To downstream servers.
    pub allow_if_downstream: bool,
    /// To agents.
    pub allow_if_agent: bool,
}

/// A policy that was compiled and answers for the usual calls.
pub struct Policy {
    compiled: CompiledPolicy,
    messages: Messages,
}

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Policy").finish_non_exhaustive()
    }
}

impl Policy {
    /// Reads a policy and its data from files of at most 16 MiB each.
    ///
    /// # Errors
    /// When a file cannot be read or is not what it should be, or the policy fails for a usual call.
    pub fn load(rego: &Path, data: Option<&Path>) -> Result<Self, PolicyError> {
        let rego = read(rego)?;
        let data = data.map(read).transpose()?;
        Self::parse(&rego, data.as_deref())
    }

    /// As [`Policy::load`], with the texts at hand.
    ///
    /// # Errors
    /// As [`Policy::load`].
    pub fn parse(rego: &str, data: Option<&str>) -> Result<Self, PolicyError> {
        let limit = ExecutionTimerConfig { limit: EVALUATION_MAX, check_interval: STEPS_PER_CHECK };
        set_fallback_execution_timer_config(Some(limit));
        let mut engine = Engine::new();
        // What a builtin refuses is undefined, as it is to OPA.
        engine.set_strict_builtin_errors(false);
        engine.clear_policy_length_config();
        engine.add_policy("spire.rego".into(), rego.into()).map_err(rego_error)?;
        let data: Map<String, serde_json::Value> = match data {
            Some(text) => serde_json::from_str(text).map_err(|error| PolicyError::Data(error.to_string()))?,
            None => Map::new(),
        };
        engine.add_data(serde_json::Value::Object(data).into()).map_err(rego_error)?;
        let compiled = engine.compile_with_entrypoint(&Rc::from(ENTRYPOINT)).map_err(rego_error)?;
        let policy = Self { compiled, messages: Messages::load()? };
        policy.try_usual_calls().map_err(|error| PolicyError::Misconfigured(Box::new(error)))?;
        Ok(policy)
    }

    /// To whom the call is allowed.
    ///
    /// # Errors
    /// When the policy gives no answer; the call must then be refused.
    pub fn judge(&self, call: Input<'_>) -> Result<Verdict, PolicyError> {
        let request = call.request.map(|bytes| self.messages.json(call.full_method, bytes)).transpose()?;
        self.ask(json!({
            "caller": call.caller,
            "caller_file_path": call.caller_file_path,
            "full_method": call.full_method,
            "req": request,
        }))
    }

    fn ask(&self, input: serde_json::Value) -> Result<Verdict, PolicyError> {
        let result = match self.evaluate(&input.into())? {
            Value::Undefined => return Err(PolicyError::NoResult),
            result => result,
        };
        let fields = result.as_object().map_err(|_| PolicyError::NoObject)?;
        let boolean = |name: &'static str| match fields.get(&Value::from(name)) {
            Some(Value::Bool(value)) => Ok(*value),
            _ => Err(PolicyError::NoBoolean(name)),
        };
        Ok(Verdict {
            allow: boolean("allow")?,
            allow_if_admin: boolean("allow_if_admin")?,
            allow_if_local: boolean("allow_if_local")?,
            allow_if_downstream: boolean("allow_if_downstream")?,
            allow_if_agent: boolean("allow_if_agent")?,
        })
    }

    fn evaluate(&self, input: &Value) -> Result<Value, PolicyError> {
        let began = processor_time();
        let mut attempts = 1;
        loop {
            match self.compiled.eval_with_input(input.clone()) {
                Err(error)
                    if matches!(error.downcast_ref(), Some(LimitError::TimeLimitExceeded { .. }))
                        && may_try_again(attempts, processor_time().saturating_sub(began)) =>
                {
                    attempts += 1;
                }
                result => return result.map_err(rego_error),
            }
        }
    }

    /// A policy that fails for what every server is asked is refused at start, not at the first call.
    fn try_usual_calls(&self) -> Result<(), PolicyError> {
        let id = |path: &str| json!({"trust_domain": "example.org", "path": path});
        let entry = json!({"entries": [{"spiffe_id": id("/workload"), "parent_id": id("/host"),
                                        "selectors": [{"type": "unix", "value": "uid:1000"}]}]});
        let calls = [
            ("", "/spire.api.server.bundle.v1.Bundle/GetBundle", json!({})),
            ("", "/grpc.health.v1.Health/Check", json!({})),
            ("", "/spire.api.server.agent.v1.Agent/CreateJoinToken", json!({"ttl": 600, "agent_id": id("/host")})),
            ("", "/spire.api.server.agent.v1.Agent/AttestAgent", json!(null)),
            ("", "/spire.api.server.entry.v1.Entry/BatchCreateEntry", entry.clone()),
            ("", "/spire.api.server.entry.v1.Entry/ListEntries", json!({"filter": {}})),
            ("spiffe://example.org/someid", "/spire.api.server.entry.v1.Entry/BatchCreateEntry", entry),
            ("spiffe://example.org/someid", "/spire.api.server.entry.v1.Entry/ListEntries", json!({"filter": {}})),
        ];
        for (caller, method, request) in calls {
            self.ask(json!({"caller": caller, "caller_file_path": "", "full_method": method, "req": request}))?;
        }
        Ok(())
    }
}

/// After so many attempts that were stopped, in which the thread ran this long in all.
fn may_try_again(attempts: u32, ran: Duration) -> bool {
    attempts < ATTEMPTS_MAX && ran < EVALUATION_MAX / 2
}

/// How long this thread has run, not how long it has waited to.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// regorus says where in the policy, over several lines.
fn rego_error(error: impl std::fmt::Display) -> PolicyError {
    let lines: Vec<String> = error.to_string().lines().map(|line| line.trim().to_owned()).collect();
    PolicyError::Rego(lines.into_iter().filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" "))
}

fn read(path: &Path) -> Result<String, PolicyError> {
    let unreadable = |source| PolicyError::Unreadable { path: path.into(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(PolicyError::TooLarge(path.into()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_had_no_processor_is_tried_again() {
        let ms = Duration::from_millis;
        assert!(may_try_again(1, ms(3)) && may_try_again(29, ms(49)));
        assert!(!may_try_again(1, ms(100)), "a policy that is endless");
        assert!(!may_try_again(2, ms(60)), "also in pieces");
        assert!(!may_try_again(30, ms(3)));
        let began = processor_time();
        while processor_time() <= began {}
    }
}
