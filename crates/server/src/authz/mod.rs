//! Authorization: the one gate that every call passes before its handler can run.
//!
//! [`Gate::check`] looks up the method's row, finds out what the caller is, cheapest question first (anyone, local, admin by
//! configuration, admin by entry, downstream by entry, agent), and returns a [`Permit`] of the method's type. Handlers take
//! that permit, and nothing else makes one. All answers come from memory; the only write is the first use of an agent's
//! renewed SVID. A policy of the operator's own, if there is one, says who may in place of the row.

mod audit;
mod call;
mod limits;
mod methods;
mod peer;

pub use audit::Fields;
pub use call::Call;
pub use methods::{Method, MethodRow, RateGroup, TABLE, Who, method};
pub use peer::{Connection, Identity, LocalProcess, Peer};

pub(crate) use audit::code_name;

use crate::entries::Entries;
use crate::live::LiveSettings;
use crate::nodes::{Nodes, Standing};
use finial_core::{Clock, ErrorKind, Fault, SpiffeId};
use finial_policy::{Input, Policy};
use finial_proto::convert::status_of;
use finial_proto::types::permission_denied_details::Reason;
use finial_runtime::Metrics;
use std::borrow::Cow;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, LazyLock, Mutex, OnceLock};
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};

/// By path.
static METRIC_KEYS: LazyLock<HashMap<&'static str, String>> =
    LazyLock::new(|| TABLE.iter().map(|row| (row.path, metric_key("rpc", row))).collect());

/// What the gate is told.
pub struct GateSettings {
    /// `admin_ids` and `ratelimit`, as they are now.
    pub live: LiveSettings,
    /// `audit_log_enabled`.
    pub audit_log_enabled: bool,
    /// Says who may call what, in place of the method table.
    pub policy: Option<Policy>,
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
        let limits = limits::Limits::new(settings.live.clone());
        Arc::new(Self { settings, limits, entries, nodes, metrics, clock })
    }

    /// Runs a unary handler if the caller may call `M`, and counts and audits what comes of it.
    pub async fn unary<M: Method, Req, Res, Fut>(
        self: &Arc<Self>,
        request: Request<Req>,
        handler: impl FnOnce(Permit<M>, Req) -> Fut,
    ) -> Result<Response<Res>, Status>
    where
        Req: prost::Message,
        Fut: Future<Output = Result<Res, Status>>,
    {
        let timer = self.timer(M::ROW);
        // A policy may look into the request.
        let message = self.settings.policy.is_some().then(|| request.get_ref().encode_to_vec());
        let result = match self.permit::<M, Req>(&request, message.as_deref()).await {
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

    /// Starts measuring a call.
    pub(crate) fn timer(&self, row: &MethodRow) -> finial_runtime::telemetry::CallTimer {
        self.metrics.call(METRIC_KEYS.get(row.path).map_or("rpc", String::as_str))
    }

    /// What a caller who showed no SVID is told before its message is read, if that settles it; counted like any other answer.
    pub(crate) fn refuse_unread(self: &Arc<Self>, row: &'static MethodRow, peer: &Connection) -> Option<Status> {
        let call = || self.call(row, peer, None);
        let status = match &**peer {
            Peer::Remote { identity: Identity::Unusable(why), .. } => Status::unauthenticated(why.clone()),
            // What a policy says may depend on the message.
            Peer::Remote { .. } if self.settings.policy.is_some() => return None,
            Peer::Remote { identity: Identity::None, .. } if !row.who.includes(Who::ANYONE) => call().denied(None),
            _ => return None,
        };
        self.timer(row).finish(code_name(status.code()));
        Some(status)
    }

    fn call(self: &Arc<Self>, row: &'static MethodRow, peer: &Connection, deadline: Option<Instant>) -> Call {
        Call {
            row,
            gate: self.clone(),
            peer: peer.clone(),
            authorized_as: "nobody",
            authorized_via: "",
            deadline,
            request_id: OnceLock::new(),
            fields: Mutex::default(),
            about: Mutex::default(),
        }
    }

    /// Finds out whether the caller may call `M`, a method whose messages come as a stream.
    ///
    /// # Errors
    /// `PermissionDenied`, with a detail that tells an agent what to do next; `Unauthenticated` for a certificate that names
    /// nobody; `Internal` when the first use of a renewed SVID cannot be stored.
    pub async fn check<M: Method, Req>(self: &Arc<Self>, request: &Request<Req>) -> Result<Permit<M>, Status> {
        self.permit(request, None).await
    }

    async fn permit<M: Method, Req>(
        self: &Arc<Self>,
        request: &Request<Req>,
        message: Option<&[u8]>,
    ) -> Result<Permit<M>, Status> {
        let Some(peer) = request.extensions().get::<Connection>() else {
            return Err(Status::internal("no peer information available"));
        };
        let mut call = self.call(M::ROW, peer, deadline(request));
        if let Peer::Remote { identity: Identity::Unusable(why), .. } = &*call.peer {
            return Err(Status::unauthenticated(why.clone()));
        }
        let who = match &self.settings.policy {
            None => M::ROW.who,
            Some(policy) => judge(policy, &call, message)?,
        };
        match self.classify(who, &call.peer).await {
            Ok((authorized_as, authorized_via)) => {
                (call.authorized_as, call.authorized_via) = (authorized_as, authorized_via);
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
        let Peer::Remote { identity: Identity::Svid { id, serial, not_after, follows, .. }, .. } = peer else {
            return Err(Denial::Refused(None));
        };
        if who.includes(Who::ADMIN) {
            if self.settings.live.now().admin_ids.contains(id) {
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
            self.check_agent(id, serial, *not_after, follows).await?;
            return Ok((call::AS_AGENT, "datastore"));
        }
        Err(Denial::Refused(None))
    }

    async fn check_agent(
        &self,
        id: &SpiffeId,
        serial: &str,
        not_after: i64,
        follows: &[Box<str>],
    ) -> Result<(), Denial> {
        if self.clock.now() > not_after {
            return Err(Denial::Refused(Some((Reason::AgentExpired, "Agent SVID is expired"))));
        }
        let standing = self.nodes.judge(id, serial, follows).await.map_err(|error| {
            let message = format!("unable to look up the agent: {error}");
            Denial::Broken(Fault::new(error.kind(), message).because(error))
        })?;
        match standing {
            Standing::Renewed => self.nodes.promote(id, serial).await.map_err(|error| {
                let message = format!("unable to activate the new agent SVID: {error}");
                Denial::Broken(Fault::new(ErrorKind::Internal, message).because(error))
            })?,
            Standing::Ahead => self.nodes.adopt(id, serial, not_after, follows).await,
            _ => return verdict(standing),
        }
        // Both may have found out that the agent is another by now.
        verdict(self.nodes.standing(id, serial, follows))
    }
}

/// Whether an agent of this standing is let in.
fn verdict(standing: Standing) -> Result<(), Denial> {
    let (reason, log) = match standing {
        Standing::Current | Standing::Renewed | Standing::Ahead => return Ok(()),
        Standing::Unknown => (Reason::AgentNotAttested, "Agent is not attested"),
        Standing::Banned => (Reason::AgentBanned, "Agent is banned"),
        Standing::Superseded => (Reason::AgentNotActive, "Agent SVID is not active"),
    };
    Err(Denial::Refused(Some((reason, log))))
}

/// To whom the policy allows the call. When it gives no answer, nobody may.
fn judge(policy: &Policy, call: &Call, message: Option<&[u8]>) -> Result<Who, Status> {
    let program = match &*call.peer {
        Peer::Local(process) => process.path.as_ref().map(|path| path.to_string_lossy()).unwrap_or_default(),
        Peer::Remote { .. } => Cow::default(),
    };
    let caller = call.peer.id().map_or("", SpiffeId::as_str);
    // Policies written for SPIRE do not know our own methods, and cannot read their messages.
    let like = methods::LIKE_SPIRES.iter().find(|(ours, _)| *ours == call.row);
    let full_method = like.map_or(call.row, |(_, spires)| spires).path;
    let request = message.filter(|_| like.is_none());
    let input = Input { caller, caller_file_path: &program, full_method, request };
    policy.judge(input).map(Who::of).map_err(|error| {
        call.log_refusal("Authorization failure from OPA auth", &error.to_string());
        Status::unknown(error.to_string())
    })
}

enum Denial {
    /// With what to tell an agent, and the log.
    Refused(Option<(Reason, &'static str)>),
    /// Our own fault.
    Broken(Fault),
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
