//! Authorization: the one gate that every call passes before its handler can run.
//!
//! [`Gate::check`] looks up the method's row, finds out what the caller is, cheapest question first (anyone, local, admin by
//! configuration, admin by entry, downstream by entry, agent), and returns a [`Permit`] of the method's type. Handlers take
//! that permit, and nothing else makes one. All answers come from memory; the only write is the first use of an agent's
//! renewed SVID.

mod audit;
mod limits;
mod methods;
mod peer;

pub use audit::Fields;
pub use methods::{Method, MethodRow, RateGroup, TABLE, Who, method};
pub use peer::{Connection, Identity, LocalProcess, Peer};

pub(crate) use audit::code_name;

use crate::entries::Entries;
use crate::nodes::{Nodes, Standing};
use finial_config::RateLimitSettings;
use finial_core::{Clock, ErrorKind, Fault, SelectorSet, SpiffeId};
use finial_proto::convert::{code_of, permission_denied, status_of};
use finial_proto::types;
use finial_proto::types::permission_denied_details::Reason;
use finial_runtime::Metrics;
use std::collections::HashMap;
use std::fmt::Display;
use std::marker::PhantomData;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};

/// By path.
static METRIC_KEYS: LazyLock<HashMap<&'static str, String>> =
    LazyLock::new(|| TABLE.iter().map(|row| (row.path, metric_key("rpc", row))).collect());

/// What the gate is told.
pub struct GateSettings {
    /// `admin_ids`.
    pub admin_ids: Vec<SpiffeId>,
    /// `ratelimit`.
    pub rate_limit: RateLimitSettings,
    /// `audit_log_enabled`.
    pub audit_log_enabled: bool,
}

/// The gate.
pub struct Gate {
    settings: GateSettings,
    limits: limits::Limits,
    entries: Arc<Entries>,
    nodes: Arc<Nodes>,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
}

/// A call that passed the gate, or is about to.
pub struct Call {
    row: &'static MethodRow,
    gate: Arc<Gate>,
    peer: Connection,
    authorized_as: &'static str,
    authorized_via: &'static str,
    deadline: Option<Instant>,
    request_id: OnceLock<String>,
    fields: Mutex<Fields>,
}

/// Proof that the caller may call `M`. Only [`Gate::check`] makes one.
pub struct Permit<M>(Arc<Call>, PhantomData<fn() -> M>);

impl<M> Permit<M> {
    /// The call without its type, for what outlives the handler.
    pub(crate) fn call(&self) -> Arc<Call> {
        self.0.clone()
    }
}

impl<M> std::ops::Deref for Permit<M> {
    type Target = Call;
    fn deref(&self) -> &Call {
        &self.0
    }
}

impl Gate {
    /// A gate before these entries and agents.
    pub fn new(
        settings: GateSettings,
        entries: Arc<Entries>,
        nodes: Arc<Nodes>,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
    ) -> Arc<Self> {
        let limits = limits::Limits::new(settings.rate_limit);
        Arc::new(Self { settings, limits, entries, nodes, metrics, clock })
    }

    /// Runs a unary handler if the caller may call `M`, and counts and audits what comes of it.
    pub async fn unary<M: Method, Req, Res, Fut>(
        self: &Arc<Self>,
        request: Request<Req>,
        handler: impl FnOnce(Permit<M>, Req) -> Fut,
    ) -> Result<Response<Res>, Status>
    where
        Fut: Future<Output = Result<Res, Status>>,
    {
        let timer = self.timer::<M>();
        let result = match self.check::<M, Req>(&request).await {
            Ok(permit) => {
                let call = permit.0.clone();
                let result = handler(permit, request.into_inner()).await;
                if let Err(status) = &result {
                    call.audit_error(status);
                }
                result
            }
            Err(status) => Err(status),
        };
        timer.finish(code_name(result.as_ref().err().map_or(Code::Ok, Status::code)));
        result.map(Response::new)
    }

    /// Starts measuring a call of `M`.
    pub(crate) fn timer<M: Method>(&self) -> finial_runtime::telemetry::CallTimer {
        self.metrics.call(METRIC_KEYS.get(M::ROW.path).map_or("rpc", String::as_str))
    }

    /// Finds out whether the caller may call `M`.
    ///
    /// # Errors
    /// `PermissionDenied`, with a detail that tells an agent what to do next; `Unauthenticated` for a certificate that names
    /// nobody; `Internal` when the first use of a renewed SVID cannot be stored.
    pub async fn check<M: Method, Req>(self: &Arc<Self>, request: &Request<Req>) -> Result<Permit<M>, Status> {
        let Some(peer) = request.extensions().get::<Connection>() else {
            return Err(Status::internal("no peer information available"));
        };
        let mut call = Call {
            row: M::ROW,
            gate: self.clone(),
            peer: peer.clone(),
            authorized_as: "nobody",
            authorized_via: "",
            deadline: deadline(request),
            request_id: OnceLock::new(),
            fields: Mutex::default(),
        };
        if let Peer::Remote { identity: Identity::Unusable(why), .. } = &*call.peer {
            return Err(Status::unauthenticated(why.clone()));
        }
        match self.classify(M::ROW.who, &call.peer).await {
            Ok((authorized_as, authorized_via)) => {
                call.authorized_as = authorized_as;
                call.authorized_via = authorized_via;
                Ok(Permit(Arc::new(call), PhantomData))
            }
            Err(Denial::Refused(reason)) => Err(call.denied(reason)),
            Err(Denial::Broken(fault)) => Err(status_of(&fault)),
        }
    }

    async fn classify(&self, who: Who, peer: &Peer) -> Result<(&'static str, &'static str), Denial> {
        if who.includes(Who::ANYONE) {
            return Ok(("nobody", ""));
        }
        if peer.is_local() {
            return if who.includes(Who::LOCAL) { Ok(("local", "transport")) } else { Err(Denial::Refused(None)) };
        }
        let Peer::Remote { identity: Identity::Svid { id, serial, not_after }, .. } = peer else {
            return Err(Denial::Refused(None));
        };
        if who.includes(Who::ADMIN) {
            if self.settings.admin_ids.contains(id) {
                return Ok(("admin", "config"));
            }
            if self.entries.is_admin(id) {
                return Ok(("admin", "entries"));
            }
        }
        if who.includes(Who::DOWNSTREAM) && self.entries.is_downstream(id) {
            return Ok(("downstream", "entries"));
        }
        if who.includes(Who::AGENT) {
            self.check_agent(id, serial, *not_after).await?;
            return Ok(("agent", "datastore"));
        }
        Err(Denial::Refused(None))
    }

    async fn check_agent(&self, id: &SpiffeId, serial: &str, not_after: i64) -> Result<(), Denial> {
        if self.clock.now() > not_after {
            return Err(Denial::Refused(Some((Reason::AgentExpired, "Agent SVID is expired"))));
        }
        let (reason, log) = match self.nodes.standing(id, serial) {
            Standing::Current => return Ok(()),
            Standing::Renewed => match self.nodes.promote(id, serial).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    let message = format!("unable to activate the new agent SVID: {error}");
                    return Err(Denial::Broken(Fault::new(ErrorKind::Internal, message).because(error)));
                }
            },
            Standing::Unknown => (Reason::AgentNotAttested, "Agent is not attested"),
            Standing::Banned => (Reason::AgentBanned, "Agent is banned"),
            Standing::Superseded => (Reason::AgentNotActive, "Agent SVID is not active"),
        };
        Err(Denial::Refused(Some((reason, log))))
    }
}

enum Denial {
    /// With what to tell an agent, and the log.
    Refused(Option<(Reason, &'static str)>),
    /// Our own fault.
    Broken(Fault),
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
        let Peer::Remote { identity: Identity::Svid { id, serial, not_after }, .. } = &*self.peer else {
            return Err(self.denied(None));
        };
        let reason = match self.gate.nodes.standing(id, serial) {
            _ if self.gate.clock.now() > *not_after => Reason::AgentExpired,
            Standing::Current | Standing::Renewed => return Ok(()),
            Standing::Unknown => Reason::AgentNotAttested,
            Standing::Banned => Reason::AgentBanned,
            Standing::Superseded => Reason::AgentNotActive,
        };
        Err(self.denied(Some((reason, "Agent is no longer authorized"))))
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Takes `count` turns of the method's rate limit, waiting for them until the call's deadline.
    pub async fn limit(&self, count: usize, refusal: &str) -> Result<(), Status> {
        let Some(address) = self.peer.ip() else { return Ok(()) };
        let remaining = self.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let metrics = &self.gate.metrics;
        let limited = metrics.is_enabled() && self.gate.limits.are_on_for(self.row.rate);
        let timer = limited.then(|| metrics.call(metric_key("rateLimit", self.row)));
        let taken = self.gate.limits.take(self.row.rate, address, count, remaining).await;
        if let Some(timer) = timer {
            timer.finish_with(&taken, |fault| fault.kind);
        }
        taken.map_err(|fault| self.fail_with(fault.kind, refusal, fault.message))
    }

    /// A random UUID by which the lines of one call are found together.
    fn request_id(&self) -> &str {
        self.request_id.get_or_init(|| uuid::Uuid::new_v4().to_string())
    }

    fn denied(&self, reason: Option<(Reason, &'static str)>) -> Status {
        let message = format!("authorization denied for method {}", self.row.path);
        if let Some((_, why)) = reason {
            self.log_error(why, None);
        }
        self.log_error(
            "Failed to authenticate caller",
            Some(&format!("rpc error: code = PermissionDenied desc = {message}")),
        );
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

    fn log_error(&self, message: &str, error: Option<&str>) {
        if tracing::event_enabled!(tracing::Level::ERROR) {
            tracing::error!(
                subsystem_name = "api",
                service = self.row.service,
                method = self.row.name,
                request_id = self.request_id(),
                authorized_as = self.authorized_as,
                authorized_via = self.authorized_via,
                caller_addr = self.peer_address(),
                caller_id = self.peer.id().map(SpiffeId::as_str),
                error,
                "{message}"
            );
        }
    }

    /// The caller's address as the log has it.
    pub fn peer_address(&self) -> Option<String> {
        match &*self.peer {
            Peer::Remote { address, .. } => Some(address.to_string()),
            Peer::Local(_) => None,
        }
    }

    /// An info line about this call.
    pub fn log_info(&self, message: &str, fields: &[(&'static str, &str)]) {
        self.log_line(tracing::Level::INFO, message, fields);
    }

    /// A debug line about this call.
    pub fn log_debug(&self, message: &str, fields: &[(&'static str, &str)]) {
        self.log_line(tracing::Level::DEBUG, message, fields);
    }

    fn log_line(&self, level: tracing::Level, message: &str, fields: &[(&'static str, &str)]) {
        macro_rules! line {
            ($level:ident) => {
                if tracing::event_enabled!(tracing::Level::$level) {
                    let pair = |(name, value): &(&str, &str)| format!("{name}\u{1f}{value}");
                    let fields: Vec<String> = fields.iter().map(pair).collect();
                    tracing::event!(
                        tracing::Level::$level,
                        subsystem_name = "api",
                        service = self.row.service,
                        method = self.row.name,
                        request_id = self.request_id(),
                        authorized_as = self.authorized_as,
                        authorized_via = self.authorized_via,
                        caller_addr = self.peer_address(),
                        caller_id = self.peer.id().map(SpiffeId::as_str),
                        fields = fields.join("\u{1e}").as_str(),
                        "{message}"
                    );
                }
            };
        }
        if level == tracing::Level::INFO {
            line!(INFO);
        } else {
            line!(DEBUG);
        }
    }

    /// Whether it is worth gathering fields for [`Call::audit`].
    pub fn audited(&self) -> bool {
        self.gate.settings.audit_log_enabled
    }

    /// Adds a field to the call's audit line.
    pub fn note(&self, name: &'static str, value: impl Display) {
        if self.audited() {
            self.with_fields(|fields| fields.push((name, value.to_string())));
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
    fn who(&self) -> Fields {
        match &*self.peer {
            Peer::Local(process) => {
                let mut fields = vec![("caller_uid", process.uid.to_string()), ("caller_gid", process.gid.to_string())];
                fields.extend(process.path.as_ref().map(|path| ("caller_path", path.display().to_string())));
                fields
            }
            Peer::Remote { address, .. } => {
                let mut fields = vec![("caller_addr", address.to_string())];
                fields.extend(self.peer.id().map(|id| ("caller_id", id.to_string())));
                fields
            }
        }
    }
}

/// The same outcome as a batch item has it.
fn item_of(status: &Status) -> types::Status {
    types::Status { code: status.code() as i32, message: status.message().to_owned() }
}

/// When the caller stops waiting, from the `grpc-timeout` header (`TimeoutValue TimeoutUnit` in the gRPC specification).
fn deadline<T>(request: &Request<T>) -> Option<Instant> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    let timeout = match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    };
    Instant::now().checked_add(timeout)
}

/// `rpc.agent.v1.agent.attest_agent`, as SPIRE makes it from service and method.
fn metric_key(prefix: &str, row: &MethodRow) -> String {
    let parts = row.service.split('.').chain([row.name]).map(snake_case);
    std::iter::once(prefix.to_owned()).chain(parts).collect::<Vec<_>>().join(".")
}

/// SPIRE's rule: an underscore before an upper-case letter that is neither first nor last and has a lower-case neighbour.
fn snake_case(name: &str) -> String {
    let letters: Vec<char> = name.chars().collect();
    let lower = |at: Option<usize>| at.and_then(|at| letters.get(at)).is_some_and(|c| c.is_ascii_lowercase());
    let mut out = String::new();
    for (at, letter) in letters.iter().enumerate() {
        let beside_lower = lower(Some(at + 1)) || lower(at.checked_sub(1));
        if letter.is_ascii_uppercase() && at > 0 && at + 1 < letters.len() && beside_lower && !out.ends_with('_') {
            out.push('_');
        }
        out.push(letter.to_ascii_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metric_keys_are_those_of_spire() {
        let key = |path: &str| metric_key("rpc", TABLE.iter().find(|row| row.path.ends_with(path)).unwrap());
        assert_eq!(key("Agent/AttestAgent"), "rpc.agent.v1.agent.attest_agent");
        assert_eq!(key("SVID/MintX509SVID"), "rpc.svid.v1.svid.mint_x509svid");
        assert_eq!(key("SVID/MintJWTSVID"), "rpc.svid.v1.svid.mint_jwtsvid");
        assert_eq!(key("SVID/NewDownstreamX509CA"), "rpc.svid.v1.svid.new_downstream_x509ca");
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_is_read_from_the_header() {
        let of = |text: &'static str| {
            let mut request = Request::new(());
            request.metadata_mut().insert("grpc-timeout", text.parse().unwrap());
            deadline(&request).map(|at| at - Instant::now())
        };
        assert_eq!(of("250m"), Some(Duration::from_millis(250)));
        assert_eq!(of("2M"), Some(Duration::from_secs(120)));
        for bad in ["", "S", "1", "-1S", "123456789S", "1x"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
