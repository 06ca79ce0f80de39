//! A call as its handler sees it: who calls, its turn of the rate limit, its log lines and its audit lines.

use super::methods::MethodRow;
use super::peer::{Connection, Identity, Peer};
use super::{Fields, Gate, audit, metric_key};
use crate::nodes::Standing;
use finial_core::{ErrorKind, SelectorSet, SpiffeId};
use finial_proto::convert::{code_of, permission_denied};
use finial_proto::types;
use finial_proto::types::permission_denied_details::Reason;
use std::borrow::Cow;
use std::fmt::Display;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::time::Instant;
use tonic::{Code, Status};

/// [`Call::authorized_as`] of agents.
pub(super) const AS_AGENT: &str = "agent";

/// A call that passed the gate, or is about to.
pub struct Call {
    pub(super) row: &'static MethodRow,
    pub(super) gate: Arc<Gate>,
    pub(super) peer: Connection,
    pub(super) authorized_as: &'static str,
    pub(super) authorized_via: &'static str,
    pub(super) deadline: Option<Instant>,
    pub(super) request_id: OnceLock<String>,
    /// For the audit line.
    pub(super) fields: Mutex<Fields>,
    /// For log lines.
    pub(super) about: Mutex<Vec<(&'static str, String)>>,
}

impl Call {
    /// The caller's ID, for methods of agents.
    pub fn caller_id(&self) -> Result<&SpiffeId, Status> {
        match self.peer.id() {
            Some(id) => Ok(id),
            None => Err(self.fail(ErrorKind::Internal, "caller ID missing from request context")),
        }
    }

    /// The calling agent's ID and node selectors.
    pub fn agent(&self) -> Result<(&SpiffeId, Arc<SelectorSet>), Status> {
        let id = self.caller_id()?;
        Ok((id, self.gate.nodes.selectors(id)))
    }

    /// Whether the calling agent is still as good as when the call began: long streams ask again.
    pub fn still_agent(&self) -> Result<(), Status> {
        self.agent_is_good(false)
    }

    /// The same for a call that had to wait and that only agents may make. One whose SVID was renewed meanwhile gets its
    /// answer: the call was good, and an agent that is told to attest again may not be able to.
    pub(crate) fn after_waiting(&self) -> Result<(), Status> {
        if self.authorized_as == AS_AGENT { self.agent_is_good(true) } else { Ok(()) }
    }

    fn agent_is_good(&self, or_renewed: bool) -> Result<(), Status> {
        let Peer::Remote { identity: Identity::Svid { id, serial, not_after, follows, .. }, .. } = &*self.peer else {
            return Err(self.denied(None));
        };
        let reason = match self.gate.nodes.standing(id, serial, follows) {
            _ if self.gate.clock.now() > *not_after => Reason::AgentExpired,
            Standing::Current | Standing::Renewed | Standing::Ahead => return Ok(()),
            Standing::Superseded if or_renewed => return Ok(()),
            Standing::Unknown => Reason::AgentNotAttested,
            Standing::Banned => Reason::AgentBanned,
            Standing::Superseded => Reason::AgentNotActive,
        };
        Err(self.denied(Some((reason, "Agent is no longer authorized"))))
    }

    /// Whether the calling agent has a newer SVID by now: what it does with the old one ends, which is nobody's fault.
    pub(crate) fn is_superseded(&self) -> bool {
        let Peer::Remote { identity: Identity::Svid { id, serial, follows, .. }, .. } = &*self.peer else {
            return false;
        };
        self.gate.nodes.standing(id, serial, follows) == Standing::Superseded
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Takes `count` turns of the method's rate limit, waiting for them until the call's deadline. An agent that was banned
    /// or deleted meanwhile is refused.
    pub async fn limit(&self, count: usize, refusal: &str) -> Result<(), Status> {
        if self.peer.is_local() {
            return Ok(());
        }
        let remaining = self.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let metrics = &self.gate.metrics;
        let limited = metrics.is_enabled() && self.gate.limits.are_on_for(self.row.rate);
        let timer = limited.then(|| metrics.call(metric_key("rateLimit", self.row)));
        let taken = self.gate.limits.take(self.row.rate, &self.peer, count, remaining).await;
        if let Some(timer) = timer {
            timer.finish_with(&taken, |fault| fault.kind);
        }
        taken.map_err(|fault| self.fail_with(fault.kind, refusal, fault.message))?;
        self.after_waiting()
    }

    /// A random UUID by which the lines of one call are found together.
    pub(super) fn request_id(&self) -> &str {
        self.request_id.get_or_init(|| uuid::Uuid::new_v4().to_string())
    }

    pub(super) fn denied(&self, reason: Option<(Reason, &'static str)>) -> Status {
        let message = format!("authorization denied for method {}", self.row.path);
        if let Some((_, why)) = reason {
            self.log_error(why, None);
        }
        let error = format!("rpc error: code = PermissionDenied desc = {message}");
        self.log_refusal("Failed to authenticate caller", &error);
        match reason {
            Some((reason, _)) => permission_denied(&message, reason),
            None => Status::permission_denied(message),
        }
    }

    /// An error answer without a cause; logged.
    pub fn fail(&self, kind: ErrorKind, message: &str) -> Status {
        self.make_error(kind, message, None)
    }

    /// An error answer with its cause, which the caller may read too except for `NotFound`; logged.
    pub fn fail_with(&self, kind: ErrorKind, message: &str, cause: impl Display) -> Status {
        self.make_error(kind, message, Some(cause.to_string()))
    }

    /// The outcome of a failed batch item; logged.
    pub fn item(&self, kind: ErrorKind, message: &str) -> types::Status {
        item_of(&self.fail(kind, message))
    }

    /// The outcome of a failed batch item with its cause; logged.
    pub fn item_with(&self, kind: ErrorKind, message: &str, cause: impl Display) -> types::Status {
        item_of(&self.fail_with(kind, message, cause))
    }

    fn make_error(&self, kind: ErrorKind, message: &str, cause: Option<String>) -> Status {
        let cause = if kind == ErrorKind::NotFound { None } else { cause };
        let capital =
            |s: &str| s.get(..1).map(|c| c.to_uppercase() + s.get(1..).unwrap_or_default()).unwrap_or_default();
        if kind == ErrorKind::InvalidArgument {
            self.log_error(&format!("Invalid argument: {message}"), cause.as_deref());
        } else {
            self.log_error(&capital(message), cause.as_deref());
        }
        let text = match cause {
            Some(cause) => format!("{message}: {cause}"),
            None => message.to_owned(),
        };
        Status::new(code_of(kind), text)
    }

    /// What the next log lines of this call are about; replaces what was said of `name` before.
    pub fn about(&self, name: &'static str, value: impl Display) {
        let mut about = self.about.lock().unwrap_or_else(PoisonError::into_inner);
        about.retain(|(known, _)| *known != name);
        let text = audit::travelling(name, &value.to_string());
        about.push((name, text));
    }

    /// The next log lines are about the call alone again.
    pub fn about_nothing(&self) {
        self.about.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The caller's address as the log has it.
    pub fn peer_address(&self) -> Option<String> {
        match &*self.peer {
            Peer::Remote { address, .. } => Some(address.to_string()),
            Peer::Local(_) => None,
        }
    }

    fn log_error(&self, message: &str, error: Option<&str>) {
        self.log_line(tracing::Level::ERROR, message, error, true);
    }

    /// An error line of a call before it is said what its caller is let in as.
    pub(super) fn log_refusal(&self, message: &str, error: &str) {
        self.log_line(tracing::Level::ERROR, message, Some(error), false);
    }

    /// An info line about this call.
    pub fn log_info(&self, message: &str) {
        self.log_line(tracing::Level::INFO, message, None, true);
    }

    /// A debug line about this call.
    pub fn log_debug(&self, message: &str) {
        self.log_line(tracing::Level::DEBUG, message, None, true);
    }

    fn log_line(&self, level: tracing::Level, message: &str, error: Option<&str>, let_in: bool) {
        macro_rules! line {
            ($level:ident) => {
                if tracing::event_enabled!(tracing::Level::$level) {
                    let about = self.about.lock().unwrap_or_else(PoisonError::into_inner);
                    let about: Vec<String> =
                        about.iter().map(|(name, value)| format!("{name}{}{value}", audit::UNIT)).collect();
                    let about = about.join(audit::RECORD.encode_utf8(&mut [0; 4]));
                    tracing::event!(
                        tracing::Level::$level,
                        subsystem_name = "api",
                        service = self.row.service,
                        method = self.row.name,
                        request_id = self.request_id(),
                        authorized_as = let_in.then_some(self.authorized_as),
                        authorized_via = let_in.then_some(self.authorized_via),
                        caller_addr = self.peer_address(),
                        caller_id = self.peer.id().map(SpiffeId::as_str),
                        fields = (!about.is_empty()).then_some(about.as_str()),
                        error,
                        "{message}"
                    );
                }
            };
        }
        match level {
            tracing::Level::ERROR => line!(ERROR),
            tracing::Level::INFO => line!(INFO),
            _ => line!(DEBUG),
        }
    }

    /// Whether it is worth gathering fields for [`Call::audit`].
    pub fn audited(&self) -> bool {
        self.gate.settings.audit_log_enabled
    }

    /// Adds a field to the call's audit line.
    pub fn note(&self, name: impl Into<Cow<'static, str>>, value: impl Display) {
        if self.audited() {
            self.with_fields(|fields| fields.push((name.into(), value.to_string())));
        }
    }

    /// Writes the audit line of a call that went well.
    pub fn audit(&self) {
        if self.audited() {
            let fields = self.with_fields(std::mem::take);
            audit::emit(self, &fields, Code::Ok, "");
        }
    }

    /// Writes the audit line of one item of a batch.
    pub fn audit_item(&self, status: Option<&types::Status>, fields: impl FnOnce() -> Fields) {
        if let (true, Some(status)) = (self.audited(), status) {
            audit::emit_item(self, &fields(), status);
        }
    }

    /// Writes the audit line of a call that failed.
    pub(crate) fn audit_error(&self, status: &Status) {
        if self.audited() {
            let fields = self.with_fields(std::mem::take);
            audit::emit_error(self, &fields, status);
        }
    }

    fn with_fields<T>(&self, act: impl FnOnce(&mut Fields) -> T) -> T {
        act(&mut self.fields.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The caller as the audit log names it.
    pub(super) fn who(&self) -> Fields {
        match &*self.peer {
            Peer::Local(process) => {
                let ids = [("caller_uid", process.uid), ("caller_gid", process.gid)];
                let mut fields: Fields = ids.map(|(name, id)| (name.into(), id.to_string())).into();
                fields.extend(process.path.as_ref().map(|path| ("caller_path".into(), path.display().to_string())));
                fields
            }
            Peer::Remote { address, .. } => {
                let id = self.peer.id().map(|id| ("caller_id".into(), id.to_string()));
                std::iter::once(("caller_addr".into(), address.to_string())).chain(id).collect()
            }
        }
    }
}

/// The same outcome as a batch item has it.
fn item_of(status: &Status) -> types::Status {
    types::Status { code: status.code() as i32, message: status.message().to_owned() }
}
