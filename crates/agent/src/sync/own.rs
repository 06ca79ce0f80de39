//! An agent whose own SVID ended while no server answered: it serves what the cache holds, and attests anew meanwhile.

use super::refused::Refused;
use super::{SUBSYSTEM, Syncer};
use crate::attest;
use crate::cache::Change;
use crate::error::{AgentError, ServerError, Verdict};
use finial_core::ErrorKind;
use finial_runtime::Backoff;
use finial_runtime::log::Time;
use std::time::Duration;
use tokio::time::Instant;

/// Between two attempts to attest anew, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(120));

/// The time after the own SVID's end.
pub(super) struct Ended {
    backoff: Backoff,
    /// When to attest next.
    next: Instant,
    /// The server answered, and does not take what this node shows.
    refused: Option<String>,
    /// It answered, well or not: it is there, and need not be asked sooner than it can take.
    answered: bool,
}

impl Ended {
    fn new() -> Self {
        Self {
            backoff: Backoff::new(BACKOFF.0, BACKOFF.1).shape(1.5, 0.1),
            next: Instant::now(),
            refused: None,
            answered: false,
        }
    }
}

impl Syncer {
    /// Whether the own SVID has ended, by this machine's clock.
    pub(super) fn own_has_ended(&self) -> bool {
        self.svid.is_expired(self.context.clock.now())
    }

    /// Begins with an own SVID that may have ended before.
    pub(crate) fn begin_with_own(&mut self) {
        if self.own_has_ended() {
            self.ended = Some(Ended::new());
        }
    }

    /// Whether the server can be asked as ourselves: not after an attempt to attest anew has failed. (Before, the clock may just be
    /// ahead of the server's; one that was, and is set back, makes the SVID good again.)
    pub(super) fn own_is_valid(&self) -> Result<(), ServerError> {
        let Some(ended) = self.ended.as_ref().filter(|_| self.own_has_ended()) else { return Ok(()) };
        let mut text = format!("the agent's own SVID expired at {}, re-attesting", Time(self.svid.not_after));
        if let Some(refused) = &ended.refused {
            text = format!("{text}; the server refuses it, so an operator must act: {refused}");
        }
        Err(ServerError::bare(tonic::Status::unavailable(text)))
    }

    /// Whether another attempt to attest anew is due, or the first.
    pub(super) fn own_is_due(&self) -> bool {
        self.own_has_ended() && self.ended.as_ref().is_none_or(|ended| Instant::now() >= ended.next)
    }

    /// A server is there: when to attest anew, which is soon if none was when it was tried last; `None` if the own SVID has not
    /// ended.
    pub(super) fn hasten_own(&mut self) -> Option<Instant> {
        let now = Instant::now();
        if !self.own_has_ended() {
            return None;
        }
        let Some(ended) = &mut self.ended else { return Some(now) };
        if !ended.answered {
            ended.next = ended.next.min(now + BACKOFF.0);
        }
        Some(ended.next)
    }

    /// Attests anew when it is time to. Ends the agent when there is nothing left to serve, or the server says that it must.
    pub(super) async fn outlive(&mut self) -> Result<(), AgentError> {
        let serves = self.cache().holds_valid(self.context.clock.now());
        if serves && !self.own_is_due() {
            return Ok(());
        }
        let context = self.context.clone();
        let Ok(_renewal) = context.renewal.try_lock() else { return Ok(()) };
        let call = context.metrics.call("agent_svid.reattest");
        let id = self.svid.id.clone();
        let result = self.attest_anew().await;
        call.finish_with(&result, AgentError::kind);
        let Err(error) = result else {
            self.begin_anew(id != self.svid.id).await;
            return Ok(());
        };
        self.heed_refusal(&error).await?;
        if !serves {
            let what = if self.svid.reattestable { "reattest agent" } else { "rotate agent SVID" };
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "Could not {what}");
            let text = format!("current SVID has already expired and {what} failed: {error}");
            return Err(AgentError::internal(text).because(error));
        }
        self.go_on_without(&error);
        Ok(())
    }

    /// A clock that is ahead of the server's may renew; any other agent is one that nobody knows yet.
    async fn attest_anew(&mut self) -> Result<(), AgentError> {
        if !self.svid.reattestable {
            match self.renew().await {
                Err(error) if must_end(&error) => return Err(error),
                Err(error) => {
                    tracing::debug!(subsystem_name = SUBSYSTEM, %error, "Could not rotate an SVID that has expired")
                }
                Ok(()) => return Ok(()),
            }
        }
        self.reattest().await
    }

    /// What ends an agent whose own SVID is good ends this one, too.
    async fn heed_refusal(&mut self, error: &AgentError) -> Result<(), AgentError> {
        if let Some(server) = attest::server_error(error)
            && server.verdict() == Verdict::UnknownAuthority
        {
            return self.unknown_authority(server).await;
        }
        if !must_end(error) {
            return Ok(());
        }
        tracing::error!(subsystem_name = SUBSYSTEM, %error, "Agent may not attest again; removing SVID and shutting down");
        self.delete_svid().await;
        Err(AgentError::new(ErrorKind::Denied, error.to_string()))
    }

    fn go_on_without(&mut self, error: &AgentError) {
        let refused = is_refusal(error).then(|| error.to_string());
        let expired_at = Time(self.svid.not_after);
        match (&self.ended, &refused) {
            (_, Some(_)) if self.ended.as_ref().is_none_or(|ended| ended.refused != refused) => {
                tracing::error!(subsystem_name = SUBSYSTEM, %error, %expired_at,
                    "The agent's own SVID has expired and the server refuses another: an operator must act (a new join token, or `agent evict`). Serving from the cache until its SVIDs end")
            }
            (None, _) => {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, %expired_at,
                    "The agent's own SVID has expired: serving from the cache, each SVID until its own end, and attesting anew meanwhile")
            }
            _ => tracing::debug!(subsystem_name = SUBSYSTEM, %error, %expired_at, "Could not attest anew"),
        }
        let ended = self.ended.get_or_insert_with(Ended::new);
        let answered = attest::server_error(error).is_some_and(|error| !error.was_lost());
        if answered && !ended.answered {
            ended.backoff.reset(); // what it has grown to, it has without a server
        }
        (ended.refused, ended.answered) = (refused, answered);
        self.link.refuse(ended.refused.is_some());
        ended.next = Instant::now() + ended.backoff.next_wait();
        self.status.not_synced(None);
        if let Err(error) = self.own_is_valid() {
            self.status.set_away_because(error.to_string());
        }
    }

    /// What was deleted meanwhile goes at once. What was for another agent, and is not for this one, goes in any case.
    pub(super) async fn begin_anew(&mut self, is_another: bool) {
        self.refused = Refused::new();
        let Err(error) = self.synchronize().await else { return };
        tracing::error!(subsystem_name = SUBSYSTEM, %error, "Synchronize failed");
        if is_another {
            self.writer.publish(Change { entries: Some(Vec::new()), ..Change::default() });
        }
    }
}

/// The server forbids it, which waiting does not change: it is banned, evicted, or not to be attested.
fn must_end(error: &AgentError) -> bool {
    let Some(server) = attest::server_error(error) else { return false };
    match server.verdict() {
        Verdict::Banned => true,
        Verdict::Reattest => !server.is_expired(),
        Verdict::UnknownAuthority => false,
        // An attestation is refused without a reason, also to the banned; but what serves once only is no verdict on the node.
        Verdict::Retry => server.status.code() == tonic::Code::PermissionDenied && !is_used(server),
    }
}

/// The server heard what the node shows, and does not take it.
fn is_refusal(error: &AgentError) -> bool {
    use tonic::Code::{FailedPrecondition, InvalidArgument, PermissionDenied, Unauthenticated};
    let codes = [FailedPrecondition, InvalidArgument, PermissionDenied, Unauthenticated];
    attest::server_error(error).is_some_and(|server| codes.contains(&server.status.code()))
}

/// As servers say it of join tokens and of evidence that is taken once.
fn is_used(error: &ServerError) -> bool {
    error.status.message().contains("already been used")
}
