//! What operators order the manager to do with authorities: prepare, activate, taint, revoke. Conditions and words are SPIRE's.

use super::manager::{AuthorityManager, within};
use super::plan::Status;
use super::store::TaintStep;
use super::tokens::TokenKind;
use super::{AuthorityError, AuthorityKind, AuthorityState, SlotStates};
use finial_core::ErrorKind;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How many orders wait at most; who comes then waits for a place.
const WAITING_MAX: usize = 16;
/// How long an order may take, waiting included: a key manager, an upstream authority and a datastore may all be slow.
const ORDER_SECONDS: u64 = 120;

/// What is to be done. IDs are those of [`AuthorityState`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Make a successor, over whatever the next slot holds.
    Prepare(AuthorityKind),
    /// Let the successor sign.
    Activate(AuthorityKind, String),
    /// Mark the predecessor in the bundle: everyone moves off it.
    Taint(AuthorityKind, String),
    /// Take the predecessor out of the bundle: nothing that it signed is valid any more. It must be tainted.
    Revoke(AuthorityKind, String),
    /// Mark the upstream authority with this subject key ID (lowercase hex) that signed the predecessor.
    TaintUpstream(String),
    /// Take the upstream authority with this subject key ID (lowercase hex) out of the bundle.
    RevokeUpstream(String),
}

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
#[error("{message}{}", cause.as_deref().map(|c| format!(": {c}")).unwrap_or_default())]
pub struct OrderError {
    /// What can be done about it.
    pub kind: ErrorKind,
    /// In SPIRE's words.
    pub message: String,
    /// More of it, which the caller may know too.
    pub cause: Option<String>,
}

impl OrderError {
    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), cause: None }
    }

    fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    fn because(mut self, cause: impl ToString) -> Self {
        self.cause = Some(cause.to_string());
        self
    }

    fn failed(message: impl Into<String>) -> impl FnOnce(AuthorityError) -> Self {
        // What the datastore says against the request is about our own state: the caller could not have known.
        |error| {
            let kind = match error.kind() {
                kind @ (ErrorKind::Unavailable | ErrorKind::Timeout | ErrorKind::Unimplemented) => kind,
                _ => ErrorKind::Internal,
            };
            Self::new(kind, message).because(error.bare())
        }
    }
}

pub(super) struct Waiting {
    order: Order,
    answer: oneshot::Sender<Result<AuthorityState, OrderError>>,
}

/// Gives orders to the manager. Clones reach the same one.
#[derive(Clone)]
pub struct AuthorityControl(mpsc::Sender<Waiting>);

impl AuthorityControl {
    pub(super) fn new() -> (Self, mpsc::Receiver<Waiting>) {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        (Self(sender), receiver)
    }

    /// Has an order carried out, and says what became of the authority. Once begun it is carried out even when the caller
    /// goes away.
    pub async fn order(&self, order: Order) -> Result<AuthorityState, OrderError> {
        let stopping = || OrderError::new(ErrorKind::Unavailable, "server is shutting down");
        let done = async {
            let (answer, answered) = oneshot::channel();
            self.0.send(Waiting { order, answer }).await.map_err(|_| stopping())?;
            answered.await.map_err(|_| stopping())?
        };
        let late =
            |_| OrderError::new(ErrorKind::Timeout, format!("authority manager took longer than {ORDER_SECONDS} s"));
        tokio::time::timeout(Duration::from_secs(ORDER_SECONDS), done).await.map_err(late)?
    }
}

/// An authority as the conditions look at it.
fn id(state: Option<&AuthorityState>) -> &str {
    state.map_or("", |s| s.authority_id.as_str())
}

fn unsupported(status: Status) -> String {
    let name = match status {
        Status::Prepared => "PREPARED",
        Status::Active => "ACTIVE",
        Status::Old => "OLD",
    };
    format!("unsupported local authority status: {name}")
}

/// The successor that may be activated by this ID.
fn activatable(slots: &SlotStates, wanted: &str) -> Result<(), OrderError> {
    if wanted.is_empty() {
        return Err(OrderError::invalid("no authority ID provided"));
    }
    match slots.next.as_ref().filter(|next| next.authority_id == wanted) {
        None => Err(OrderError::invalid("unexpected authority ID")),
        Some(next) if next.status != Status::Prepared => {
            let message = "only Prepared authorities can be activated";
            Err(OrderError::new(ErrorKind::Internal, message).because(unsupported(next.status)))
        }
        Some(_) => Ok(()),
    }
}

/// The predecessor that may be tainted by this ID.
fn taintable(slots: &SlotStates, wanted: &str) -> Result<AuthorityState, OrderError> {
    if wanted.is_empty() {
        return Err(OrderError::invalid("no authority ID provided"));
    }
    if wanted == id(slots.current.as_ref()) {
        return Err(OrderError::invalid("unable to taint current local authority"));
    }
    match slots.next.as_ref().filter(|next| next.authority_id == wanted) {
        None => Err(OrderError::invalid("unexpected authority ID")),
        Some(next) if next.status != Status::Old => {
            Err(OrderError::invalid("only Old local authorities can be tainted").because(unsupported(next.status)))
        }
        Some(next) => Ok(next.clone()),
    }
}

/// The predecessor that may be revoked by this ID.
fn revocable_x509(slots: &SlotStates, wanted: &str) -> Result<(), &'static str> {
    let old = slots.next.as_ref().filter(|next| next.status == Status::Old);
    match wanted {
        "" => Err("no authority ID provided"),
        _ if wanted == id(slots.current.as_ref()) => Err("unable to use current authority"),
        _ if wanted != id(old) => Err("only Old local authority can be revoked"),
        _ => Ok(()),
    }
}

/// Whether the upstream authority signed the predecessor, and not what signs now or is about to.
fn usable_upstream(slots: &SlotStates, wanted: &str) -> Result<(), &'static str> {
    let upstream = |state: &Option<AuthorityState>| state.as_ref().map(|s| s.upstream_authority_id.clone());
    match wanted {
        "" => Err("no subject key ID provided"),
        _ if upstream(&slots.current).as_deref() == Some(wanted) => {
            // Mistyped in SPIRE; scripts may look for it.
            Err("unable to use upstream authority singing current authority")
        }
        _ if upstream(&slots.next).as_deref() != Some(wanted) => {
            Err("upstream authority didn't sign the old local authority")
        }
        _ if slots.next.as_ref().is_some_and(|next| next.status == Status::Prepared) => {
            Err("only upstream authorities signing an old authority can be used")
        }
        _ => Ok(()),
    }
}

/// What answers carry of an authority of which only the ID matters.
fn only_id(authority_id: String) -> AuthorityState {
    AuthorityState { authority_id, status: Status::Old, expires_at: 0, upstream_authority_id: String::new() }
}

impl AuthorityManager {
    pub(super) async fn answer(&mut self, waiting: Waiting) {
        if waiting.answer.is_closed() {
            // The caller is gone: better not begun than begun unasked.
            return;
        }
        let result = self.obey(waiting.order).await;
        let _ = waiting.answer.send(result);
    }

    /// Carries out an order.
    pub(super) async fn obey(&mut self, order: Order) -> Result<AuthorityState, OrderError> {
        match order {
            Order::Prepare(kind) => self.obey_prepare(kind).await,
            Order::Activate(kind, id) => self.obey_activate(kind, &id).await,
            Order::Taint(kind, id) => self.obey_taint(kind, &id).await,
            Order::Revoke(kind, id) => self.obey_revoke(kind, id).await,
            Order::TaintUpstream(id) => {
                self.check_upstream(&id, "provided subject key id is not valid")?;
                self.mark(AuthorityKind::X509, TaintStep::Taint, &id, "failed to taint upstream authority").await?;
                Ok(only_id(id))
            }
            Order::RevokeUpstream(id) => {
                self.check_upstream(&id, "invalid subject key ID")?;
                let failed = "failed to revoke X.509 upstream authority";
                self.mark(AuthorityKind::X509, TaintStep::Revoke, &id, failed).await?;
                Ok(only_id(id))
            }
        }
    }

    pub(super) fn slots(&self, kind: AuthorityKind) -> SlotStates {
        let states = self.parts.authorities.states();
        match kind {
            AuthorityKind::X509 => states.x509.clone(),
            AuthorityKind::Jwt => states.jwt.clone(),
            AuthorityKind::Wit => states.wit.clone(),
        }
    }

    async fn obey_prepare(&mut self, kind: AuthorityKind) -> Result<AuthorityState, OrderError> {
        let active = self.slots(kind).current.is_some_and(|current| current.status == Status::Active);
        if !active {
            return Err(OrderError::new(ErrorKind::Unavailable, "server is initializing"));
        }
        self.prepare(kind).await.map_err(OrderError::failed(format!("failed to prepare {kind} authority")))?;
        let next = self.slots(kind).next;
        next.ok_or_else(|| OrderError::new(ErrorKind::Internal, format!("failed to prepare {kind} authority")))
    }

    async fn obey_activate(&mut self, kind: AuthorityKind, id: &str) -> Result<AuthorityState, OrderError> {
        activatable(&self.slots(kind), id)?;
        self.rotate(kind).await;
        let current = self.slots(kind).current;
        current.ok_or_else(|| OrderError::new(ErrorKind::Internal, "current slot does not contain authority ID"))
    }

    async fn obey_taint(&mut self, kind: AuthorityKind, id: &str) -> Result<AuthorityState, OrderError> {
        if kind == AuthorityKind::X509 && self.parts.upstream.is_some() {
            let message = "local authority can't be tainted if there is an upstream authority";
            return Err(OrderError::new(ErrorKind::FailedPrecondition, message));
        }
        let slots = self.slots(kind);
        let own = [&slots.current, &slots.next].into_iter().flatten().any(|state| state.authority_id == id);
        let state = match kind.tokens().filter(|_| !own) {
            // Another server's, perhaps below this one, or one of a server that is no more.
            Some(tokens) if self.is_in_bundle(tokens, id).await? => only_id(id.to_owned()),
            _ => taintable(&slots, id)?,
        };
        self.mark(kind, TaintStep::Taint, id, &format!("failed to taint {kind} authority")).await?;
        Ok(if kind == AuthorityKind::X509 { state } else { only_id(state.authority_id) })
    }

    async fn obey_revoke(&mut self, kind: AuthorityKind, id: String) -> Result<AuthorityState, OrderError> {
        match kind.tokens() {
            None if self.parts.upstream.is_some() => {
                let message = "local authority can't be revoked if there is an upstream authority";
                return Err(OrderError::new(ErrorKind::FailedPrecondition, message));
            }
            None => revocable_x509(&self.slots(kind), &id)
                .map_err(|why| OrderError::invalid("invalid authority ID").because(why))?,
            Some(tokens) => self.check_revocable(kind, tokens, &id).await?,
        }
        self.mark(kind, TaintStep::Revoke, &id, &format!("failed to revoke {kind} authority")).await?;
        Ok(only_id(id))
    }

    /// Of keys any that the bundle has may be revoked, another server's for example, but not what signs or is to sign here.
    async fn check_revocable(&self, kind: AuthorityKind, tokens: TokenKind, wanted: &str) -> Result<(), OrderError> {
        let invalid = |why: &str| OrderError::invalid("invalid authority ID").because(why);
        let slots = self.slots(kind);
        if wanted.is_empty() {
            return Err(invalid("no authority ID provided"));
        }
        if let Some(next) = slots.next.filter(|next| next.authority_id == wanted) {
            return match next.status {
                Status::Prepared => Err(invalid("unable to use a prepared key")),
                _ => Ok(()),
            };
        }
        if wanted == id(slots.current.as_ref()) {
            return Err(invalid("unable to use current authority"));
        }
        match self.is_in_bundle(tokens, wanted).await? {
            true => Ok(()),
            false => Err(invalid(&format!("no {kind} authority found with provided authority ID"))),
        }
    }

    async fn is_in_bundle(&self, tokens: TokenKind, wanted: &str) -> Result<bool, OrderError> {
        let reading = self.parts.store.bundle(&self.settings.trust_domain);
        let bundle = within("the datastore", reading, AuthorityError::Bundle).await;
        let bundle = bundle.map_err(OrderError::failed("invalid authority ID"))?;
        Ok(bundle.is_some_and(|b| tokens.of(&b).iter().any(|key| key.key_id == wanted)))
    }

    fn check_upstream(&self, id: &str, message: &str) -> Result<(), OrderError> {
        if self.parts.upstream.is_none() {
            return Err(OrderError::new(ErrorKind::FailedPrecondition, "upstream authority is not configured"));
        }
        usable_upstream(&self.slots(AuthorityKind::X509), id).map_err(|why| OrderError::invalid(message).because(why))
    }

    /// Marks or removes an authority in the bundle, in the datastore and for all who read the feed.
    pub(super) async fn mark(
        &mut self,
        kind: AuthorityKind,
        step: TaintStep,
        id: &str,
        failed: &str,
    ) -> Result<(), OrderError> {
        // A journal that still calls it active would bring it back after a crash.
        self.flush_journal().await.map_err(OrderError::failed(failed))?;
        let trust_domain = &self.settings.trust_domain;
        let marking = self.parts.store.mark_authority(trust_domain, kind, step, id);
        within("the datastore", marking, AuthorityError::Bundle).await.map_err(OrderError::failed(failed))?;
        // It is done. A feed that cannot read now reads again by itself.
        if let Err(error) = within("the datastore", self.parts.feed.refresh(trust_domain), AuthorityError::Bundle).await
        {
            tracing::warn!(subsystem_name = super::SUBSYSTEM, %error, "The bundle changed and could not be read yet");
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "orders_tests.rs"]
mod tests;
