//! `finial.server.rotation.v1.Rotation`: orders that reach every server of the trust domain.
//!
//! What each server does of them is in `authority/domain.rs`, how far they are in `rotation.rs`; here is who may order what when.

use super::stream::{Driven, Outlet};
use super::{Api, Service, store_failed};
use crate::authority::AuthorityKind;
use crate::authority::goal_of;
use crate::authz::{Call, Peer, Permit, method};
use crate::issue::Rfc3339;
use crate::rotation::{Told, is_over, state};
use finial_core::{ErrorKind, SpiffeId};
use finial_proto::rotation::{self as pb, Goal, RotationState};
use finial_store::{Rotation, StoreError};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Request, Response, Status, async_trait};

/// How often it is looked for who watches.
const WATCH_EVERY: Duration = Duration::from_millis(500);
/// How long one may watch; who still wants to asks again.
const WATCH_MAX: Duration = Duration::from_secs(3600);

/// Who calls, for those who come after.
fn caller(call: &Call) -> String {
    match call.peer() {
        Peer::Local(process) => format!("the user with ID {}", process.uid),
        Peer::Remote { .. } => call.peer().id().map(SpiffeId::to_string).unwrap_or_default(),
    }
}

fn kind_of(call: &Call, kind: i32) -> Result<AuthorityKind, Status> {
    let kind = AuthorityKind::of_number(kind.into());
    kind.ok_or_else(|| call.fail(ErrorKind::InvalidArgument, "no kind of authority provided"))
}

fn failed(call: &Call, error: &StoreError) -> Status {
    store_failed(call, "failed to reach orders to rotate authorities", error)
}

impl Api {
    /// The newest order that `which` is about.
    async fn find(&self, call: &Call, which: impl Fn(&Rotation) -> bool) -> Result<Option<Rotation>, Status> {
        let orders = self.store.newest_rotations().await.map_err(|error| failed(call, &error))?;
        Ok(orders.into_iter().find(which))
    }

    async fn find_id(&self, call: &Call, id: i64) -> Result<Rotation, Status> {
        let found = self.find(call, |order| order.id == id).await?;
        found.ok_or_else(|| call.fail(ErrorKind::NotFound, "there is no such order, or a newer one of its kind"))
    }

    /// How far it is; one that has come to its end is closed.
    async fn state_of(&self, call: &Call, order: &Rotation) -> Result<RotationState, Status> {
        let told = Told::read(&self.store, order).await.map_err(|error| failed(call, &error))?;
        let now = self.clock.now();
        let own_number = || self.bundles.own().map_or(0, |own| own.bundle.sequence_number);
        if own_number() < told.sequence_number() {
            // By a bundle that is behind, agents that are behind would count as having confirmed.
            self.bundles.refresh(&self.trust_domain).await.map_err(|error| failed(call, &error))?;
        }
        let own = own_number();
        let mut state = state(order, told, &self.domain, (own, now));
        if is_over(order, &state) {
            self.store.close_rotation(order).await.map_err(|error| failed(call, &error))?;
            state.done = true;
        }
        Ok(state)
    }

    /// As it stood a moment ago at most: however many watch, it is looked once.
    async fn seen_by_all_who_watch(&self, call: &Call, id: i64) -> Result<Arc<RotationState>, Status> {
        let mut seen = self.domain.seen.lock().await;
        if let Some((_, state)) = seen.get(&id).filter(|(at, _)| at.elapsed() < WATCH_EVERY) {
            return Ok(state.clone());
        }
        let order = self.find_id(call, id).await?;
        let state = Arc::new(self.state_of(call, &order).await?);
        seen.retain(|_, (at, _)| at.elapsed() < WATCH_EVERY);
        seen.insert(id, (Instant::now(), state.clone()));
        Ok(state)
    }

    /// As it stands now, after it was changed.
    async fn now(&self, call: &Call, id: i64) -> Result<RotationState, Status> {
        self.domain.wake();
        // Who watches from now on sees nothing from before.
        self.domain.seen.lock().await.remove(&id);
        let order = self.find_id(call, id).await?;
        self.state_of(call, &order).await
    }

    async fn begin_rotation(
        &self,
        permit: Permit<method::BeginRotation>,
        request: pb::BeginRotationRequest,
    ) -> Result<RotationState, Status> {
        let call = permit.call();
        let kind = kind_of(&call, request.kind)?;
        call.note("authority", kind);
        self.is_offered(&call, kind)?;
        if kind == AuthorityKind::X509 && request.revoke && self.plugins.upstream_authority.is_some() {
            let message = "local authorities can't be tainted and revoked if there is an upstream authority: rotate without, \
                           then taint and revoke the upstream authority";
            return Err(call.fail(ErrorKind::FailedPrecondition, message));
        }
        let order = Rotation {
            kind: kind.number(),
            goal: Goal::Prepare as i64,
            revoke: request.revoke,
            asked_by: caller(&call),
            ..Rotation::default()
        };
        // One that has come to its end may not have been closed yet.
        if let Some(known) = self.find(&call, |known| known.kind == order.kind && !known.done).await? {
            self.state_of(&call, &known).await?;
        }
        match self.store.begin_rotation(&order).await {
            Ok(order) => {
                call.log_info(&format!("Order to rotate {kind} authorities begun"));
                let state = self.now(&call, order.id).await?;
                call.audit();
                Ok(state)
            }
            Err(StoreError::AlreadyExists(_)) => Err(self.refuse_second(&call, kind).await?),
            Err(error) => Err(failed(&call, &error)),
        }
    }

    /// Tells who came first.
    async fn refuse_second(&self, call: &Call, kind: AuthorityKind) -> Result<Status, Status> {
        let open = self.find(call, |known| known.kind == kind.number()).await?.unwrap_or_default();
        let (who, when, goal) = (&open.asked_by, Rfc3339(open.created_at), goal_of(&open).verb());
        let message = format!(
            "an order to rotate {kind} authorities is open: {who} began it at {when}, and its goal is to {goal}; see it \
             through, or take it back"
        );
        Ok(call.fail(ErrorKind::FailedPrecondition, &message))
    }

    async fn advance_rotation(
        &self,
        permit: Permit<method::AdvanceRotation>,
        request: pb::AdvanceRotationRequest,
    ) -> Result<RotationState, Status> {
        let call = permit.call();
        call.note("rotation_id", request.id);
        call.note("goal", request.goal().as_str_name());
        call.note("forced", request.force);
        let order = self.find_id(&call, request.id).await?;
        let state = self.state_of(&call, &order).await?;
        let goal = request.goal();
        if goal != state.goal() || goal == Goal::Unspecified {
            if goal != state.next() || state.done || goal == Goal::Unspecified {
                let message = format!(
                    "the order's goal is to {}, after which comes: {}",
                    state.goal().verb(),
                    state.next().verb()
                );
                return Err(call.fail(ErrorKind::FailedPrecondition, &message));
            }
            if !state.obstacles.is_empty() && !request.force {
                let message = format!("it is too early to {}: {}", goal.verb(), state.obstacles.join("; "));
                return Err(call.fail(ErrorKind::FailedPrecondition, &message));
            }
            self.set_goal(&call, &order, goal, request.force && !state.obstacles.is_empty()).await?;
        } else if request.force && !state.done && !state.obstacles.is_empty() {
            // Servers that come late need not wait.
            self.set_goal(&call, &order, goal, true).await?;
        }
        let state = self.now(&call, order.id).await?;
        call.audit();
        Ok(state)
    }

    async fn set_goal(&self, call: &Call, order: &Rotation, goal: Goal, forced: bool) -> Result<(), Status> {
        let set = self.store.advance_rotation(order, goal as i64, forced).await;
        match set.map_err(|error| failed(call, &error))? {
            true => {
                let kind = AuthorityKind::of_number(order.kind).map(|kind| format!("{kind} ")).unwrap_or_default();
                let (id, goal) = (order.id, goal.verb());
                call.log_info(&format!("Order {id} to rotate {kind}authorities: goal is to {goal}"));
                Ok(())
            }
            false => Err(call.fail(ErrorKind::FailedPrecondition, "somebody else has set another goal at this moment")),
        }
    }

    async fn take_back_rotation(
        &self,
        permit: Permit<method::TakeBackRotation>,
        request: pb::TakeBackRotationRequest,
    ) -> Result<RotationState, Status> {
        let call = permit.call();
        call.note("rotation_id", request.id);
        let order = self.find_id(&call, request.id).await?;
        match goal_of(&order) {
            Goal::Revoke => {
                let message = "revocation was ordered, which cannot be taken back: prepare and activate others";
                return Err(call.fail(ErrorKind::FailedPrecondition, message));
            }
            Goal::TakeBack => {}
            _ => self.set_goal(&call, &order, Goal::TakeBack, false).await?,
        }
        let state = self.now(&call, order.id).await?;
        call.audit();
        Ok(state)
    }

    async fn get_rotation(
        &self,
        permit: Permit<method::GetRotation>,
        request: pb::GetRotationRequest,
    ) -> Result<pb::GetRotationResponse, Status> {
        let call = permit.call();
        let orders = self.store.newest_rotations().await.map_err(|error| failed(&call, &error))?;
        let mut rotations = Vec::new();
        for order in orders.iter().filter(|order| request.kind == 0 || i64::from(request.kind) == order.kind) {
            rotations.push(self.state_of(&call, order).await?);
        }
        call.audit();
        Ok(pb::GetRotationResponse { rotations })
    }

    /// Sends each change until the order is done.
    async fn watch_rotation(
        self: Arc<Self>,
        permit: Permit<method::WatchRotation>,
        request: pb::WatchRotationRequest,
        outlet: Outlet<RotationState>,
    ) -> Result<(), Status> {
        let call = permit.call();
        let mut sent: Option<Arc<RotationState>> = None;
        let until = Instant::now() + WATCH_MAX;
        while Instant::now() < until {
            // A caller who stops reading must not keep a connection to the datastore.
            let (this, asking) = (self.clone(), call.clone());
            let looking = self
                .spawner
                .spawn("watched order", async move { this.seen_by_all_who_watch(&asking, request.id).await });
            let state =
                looking.await.map_err(|_| Status::internal("looking at the order failed; the log says why"))??;
            if sent.as_ref() != Some(&state) {
                outlet.send(RotationState::clone(&state)).await?;
            }
            if state.done {
                call.audit();
                return Ok(());
            }
            sent = Some(state);
            tokio::select! {
                () = tokio::time::sleep(WATCH_EVERY) => {}
                () = self.shutdown.cancelled() => return Err(Status::unavailable("server is shutting down")),
            }
        }
        Err(Status::deadline_exceeded("watched for an hour"))
    }
}

#[async_trait]
impl pb::rotation_server::Rotation for Service {
    type WatchRotationStream = Driven<RotationState>;

    async fn begin_rotation(
        &self,
        request: Request<pb::BeginRotationRequest>,
    ) -> Result<Response<RotationState>, Status> {
        self.gate.unary(request, |permit, request| self.0.begin_rotation(permit, request)).await
    }

    async fn get_rotation(
        &self,
        request: Request<pb::GetRotationRequest>,
    ) -> Result<Response<pb::GetRotationResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.get_rotation(permit, request)).await
    }

    async fn advance_rotation(
        &self,
        request: Request<pb::AdvanceRotationRequest>,
    ) -> Result<Response<RotationState>, Status> {
        self.gate.unary(request, |permit, request| self.0.advance_rotation(permit, request)).await
    }

    async fn take_back_rotation(
        &self,
        request: Request<pb::TakeBackRotationRequest>,
    ) -> Result<Response<RotationState>, Status> {
        self.gate.unary(request, |permit, request| self.0.take_back_rotation(permit, request)).await
    }

    async fn watch_rotation(
        &self,
        request: Request<pb::WatchRotationRequest>,
    ) -> Result<Response<Self::WatchRotationStream>, Status> {
        let api = self.0.clone();
        self.gate.answer_stream(request, |permit, request, outlet| api.watch_rotation(permit, request, outlet)).await
    }
}
