//! The one task that makes, activates and retires authorities.

use super::domain::Following;
use super::journal::{Journal, hex};
use super::make::make;
use super::orders::{AuthorityControl, Waiting};
use super::plan::{self, Status, Step, Tenure};
use super::slots::{Held, Named, Pair, Slot, Sources, TokenKey};
use super::standing::Retry;
use super::tokens::TokenKind;
use super::upstream::{self, News};
use super::{
    ActiveX509, Authorities, AuthorityError, AuthorityKind, AuthorityState, AuthorityStore, SUBSYSTEM, SlotStates,
    States,
};
use crate::compose::Composers;
use crate::issue::Rfc3339;
use crate::publish::BundleFeed;
use crate::rotation::Domain;
use finial_core::{Bundle, Clock, KeyType, TrustDomain, X509Authority};
use finial_crypto::{DistinguishedName, NameParts, Signer};
use finial_plugin::{KeyManager, UpstreamAuthorities, UpstreamAuthority};
use finial_proto::journal as pb;
use finial_proto::types;
use finial_runtime::{Metrics, Shutdown};
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// How long a call of the key manager or the datastore may take.
const CALL_SECONDS: u64 = 30;
/// A round takes four steps at most; more is a bug.
pub(super) const STEPS_MAX: u32 = 8;
/// More failed rounds in a row than this make the rotator unhealthy.
const FAILURES_MAX: u32 = 10;

/// What the authorities are like.
#[derive(Clone, Debug)]
pub struct AuthoritySettings {
    /// Of which trust domain.
    pub trust_domain: TrustDomain,
    /// How long an authority lives, seconds.
    pub ca_ttl_seconds: i64,
    /// The subject of X.509 authorities, without its serial number.
    pub ca_subject: DistinguishedName,
    /// The key type of X.509 authorities.
    pub ca_key_type: KeyType,
    /// The key type of JWT authorities; `None` = there are none (`disable_jwt_svids`).
    pub jwt_key_type: Option<KeyType>,
    /// The key type of WIT authorities; `None` = there are none (no feature flag `wit-svid`).
    pub wit_key_type: Option<KeyType>,
    /// How long tokens live at most, seconds, as far as is known: JWT-SVIDs, WIT-SVIDs.
    pub token_ttl_seconds: (i64, i64),
}

impl AuthoritySettings {
    /// From the server's settings.
    pub fn of(settings: &finial_config::ServerSettings) -> Self {
        Self {
            trust_domain: settings.trust_domain.clone(),
            ca_ttl_seconds: i64::try_from(settings.ca_ttl.as_secs()).unwrap_or(i64::MAX),
            ca_subject: DistinguishedName::new(NameParts {
                country: settings.ca_subject.country.clone(),
                organization: settings.ca_subject.organization.clone(),
                common_name: settings.ca_subject.common_name.clone(),
                ..NameParts::default()
            }),
            ca_key_type: settings.ca_key_type,
            jwt_key_type: (!settings.disable_jwt_svids).then_some(settings.jwt_key_type),
            wit_key_type: settings.wit_svids_enabled.then_some(settings.wit_key_type),
            token_ttl_seconds: (
                i64::try_from(settings.jwt_svid_ttl.as_secs()).unwrap_or(i64::MAX),
                crate::issue::WIT_TTL_SECONDS,
            ),
        }
    }

    /// With what this entry says of its tokens.
    pub(crate) fn heed(&mut self, entry: &types::Entry) {
        let (jwt, wit) = &mut self.token_ttl_seconds;
        *jwt = (*jwt).max(entry.jwt_svid_ttl.into());
        *wit = (*wit).max(entry.x509_svid_ttl.into());
    }
}

/// What the manager works with.
#[derive(Clone)]
pub struct AuthorityParts {
    /// Journal and bundle.
    pub store: Arc<dyn AuthorityStore>,
    /// Private keys.
    pub keys: Arc<dyn KeyManager>,
    /// Signs X.509 authorities; without one they are self-signed.
    pub upstream: Option<Arc<dyn UpstreamAuthority>>,
    /// Hears of the new bundle before an authority signs.
    pub feed: Arc<BundleFeed>,
    /// Where the active authorities go.
    pub authorities: Authorities,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// Counts and times.
    pub metrics: Metrics,
    /// Have a say in what X.509 authorities say.
    pub composers: Composers,
    /// Tells of orders to the whole trust domain, and hears what agents have.
    pub domain: Arc<Domain>,
}

/// Says whether rotation works. Clones share one state.
#[derive(Clone, Debug, Default)]
pub struct RotationHealth(Arc<AtomicU32>);

impl RotationHealth {
    /// What is wrong, if something is: more than ten rounds in a row failed.
    pub fn error(&self) -> Option<&'static str> {
        (self.0.load(Ordering::Relaxed) > FAILURES_MAX).then_some("rotations exceed the threshold number of failures")
    }

    fn note(&self, ok: bool) {
        if ok {
            self.0.store(0, Ordering::Relaxed);
        } else {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Makes, activates and retires the authorities. There is one, and it alone changes slots, journal and [`Authorities`].
pub struct AuthorityManager {
    pub(super) settings: AuthoritySettings,
    pub(super) parts: AuthorityParts,
    pub(super) journal: Journal,
    pub(super) x509: Pair<ActiveX509>,
    pub(super) jwt: Pair<TokenKey>,
    pub(super) wit: Pair<TokenKey>,
    health: RotationHealth,
    control: AuthorityControl,
    orders: mpsc::Receiver<Waiting>,
    /// By kind: X.509, JWT, WIT.
    pub(super) retries: (Retry, Retry, Retry),
    /// By the number of the kind.
    pub(super) following: BTreeMap<i64, Following>,
    pub(super) news: News,
}

/// Gives a call its deadline.
pub(super) async fn within<T, E>(
    what: &'static str,
    call: impl Future<Output = Result<T, E>>,
    error: impl FnOnce(E) -> AuthorityError,
) -> Result<T, AuthorityError> {
    within_seconds(CALL_SECONDS, what, call, error).await
}

/// The same with a deadline of its own.
pub(super) async fn within_seconds<T, E>(
    seconds: u64,
    what: &'static str,
    call: impl Future<Output = Result<T, E>>,
    error: impl FnOnce(E) -> AuthorityError,
) -> Result<T, AuthorityError> {
    match tokio::time::timeout(Duration::from_secs(seconds), call).await {
        Ok(result) => result.map_err(error),
        Err(_) => Err(AuthorityError::Timeout(what, seconds)),
    }
}

impl AuthorityManager {
    /// Loads what the journal says and lets what is active sign again.
    pub async fn load(settings: AuthoritySettings, parts: AuthorityParts) -> Result<Self, AuthorityError> {
        let keys = within("the key manager", parts.keys.keys(), AuthorityError::ListKeys).await?;
        let loading = Journal::load(parts.store.as_ref(), &keys, parts.feed.history());
        let journal = within("the datastore", loading, |e| e).await?;
        let bundle =
            within("the datastore", parts.store.bundle(&settings.trust_domain), AuthorityError::Bundle).await?;
        let entries = journal.entries();
        tracing::info!(
            subsystem_name = SUBSYSTEM,
            x509_cas = entries.x509_c_as.len(),
            jwt_keys = entries.jwt_keys.len(),
            wit_keys = entries.wit_keys.len(),
            "Journal loaded"
        );
        let sources = Sources {
            keys: &keys,
            bundle: bundle.as_ref(),
            upstream: parts.upstream.is_some(),
            now: parts.clock.now(),
        };
        let x509 = sources.x509(&entries.x509_c_as);
        let [jwt, wit] = TokenKind::ALL.map(|kind| sources.keys(kind, journal.keys(kind).iter()));
        // With a key from before this process, a token may have been signed a moment ago.
        for (kind, keys, ttl) in
            [(TokenKind::Jwt, &jwt, settings.token_ttl_seconds.0), (TokenKind::Wit, &wit, settings.token_ttl_seconds.1)]
        {
            let held = [&keys.current, &keys.next].into_iter().filter_map(|slot| slot.held.as_ref());
            // No token outlives its key.
            if let Some(ends) = held.map(|held| held.tenure.not_after).max() {
                parts.authorities.may_have_signed(kind, parts.clock.now().saturating_add(ttl).min(ends));
            }
        }
        let (control, orders) = AuthorityControl::new();
        let health = RotationHealth::default();
        let manager = Self {
            settings,
            parts,
            journal,
            x509,
            jwt,
            wit,
            health,
            control,
            orders,
            retries: Default::default(),
            news: News::default(),
            following: BTreeMap::new(),
        };
        manager.publish_states();
        manager.publish_x509();
        TokenKind::ALL.into_iter().for_each(|kind| manager.publish_key(kind));
        Ok(manager)
    }

    /// Takes orders, which [`AuthorityManager::run`] carries out.
    pub fn control(&self) -> AuthorityControl {
        self.control.clone()
    }

    /// Whether rotation works, for a health check.
    pub fn health(&self) -> RotationHealth {
        self.health.clone()
    }

    /// The first round. Fails only when there is nothing to sign with; what else goes wrong is tried again by
    /// [`AuthorityManager::run`].
    pub async fn start(&mut self) -> Result<(), AuthorityError> {
        let result = self.check().await;
        let authorities = &self.parts.authorities;
        let complete = authorities.x509().is_some()
            && (self.settings.jwt_key_type.is_none() || authorities.jwt().is_some())
            && (self.settings.wit_key_type.is_none() || authorities.wit().is_some());
        if complete { Ok(()) } else { result }
    }

    /// Looks at the plan every 10 s, or sooner when something is due, and carries out orders, until shutdown.
    pub async fn run(self, shutdown: Shutdown) {
        let upstream = self.parts.upstream.clone();
        let (tell, told) = mpsc::channel(1);
        // Beside the work, which would begin the question anew with all else that it wakes for.
        let (store, domain) = (self.parts.store.clone(), self.parts.domain.clone());
        let listen = async { while tell.send(upstream::next_authorities(upstream.as_deref()).await).await.is_ok() {} };
        tokio::select! {
            () = self.work(told, shutdown) => {}
            () = listen => {}
            () = super::domain::beat(&*store, &domain) => {}
        }
    }

    async fn work(mut self, mut told: mpsc::Receiver<UpstreamAuthorities>, shutdown: Shutdown) {
        let mut next_check = Instant::now() + self.wait();
        let mut bundles = self.parts.feed.changes();
        let domain = self.parts.domain.clone();
        let mut look_at_orders = Instant::now();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(order) = self.orders.recv() => {
                    self.answer(order).await;
                    next_check = next_check.min(Instant::now() + self.wait());
                }
                Some(mut authorities) = told.recv() => {
                    // What was told before it may not be taken yet.
                    authorities.put_back |= self.news.told.as_ref().is_some_and(|told| told.put_back);
                    self.news.told = Some(authorities);
                    let _ = self.heed_upstream().await;
                }
                Ok(()) = bundles.changed() => {
                    // What fails is tried again with the next check.
                    let _ = self.heed_bundle().await;
                }
                () = domain.woken() => look_at_orders = Instant::now(),
                () = tokio::time::sleep_until(look_at_orders) => {
                    look_at_orders = Instant::now() + self.heed_orders().await;
                }
                () = tokio::time::sleep_until(next_check) => {
                    next_check = Instant::now() + match self.check().await {
                        Ok(()) => self.wait(),
                        Err(_) => Duration::from_millis(plan::CHECK_INTERVAL_MS.unsigned_abs()),
                    };
                }
            }
        }
    }

    fn wait(&self) -> Duration {
        Duration::from_millis(u64::try_from(self.wait_ms()).unwrap_or_default())
    }

    fn wait_ms(&self) -> i64 {
        let now_ms = self.parts.clock.now_ms();
        let kinds = TokenKind::ALL.into_iter().filter(|kind| self.key_type(*kind).is_some());
        let waits = kinds.map(|kind| plan::wait_ms(&self.keys(kind).tenures(), now_ms));
        waits.fold(plan::wait_ms(&self.x509.tenures(), now_ms), i64::min)
    }

    /// One round: does what is due. The first error is logged and returned.
    pub async fn check(&mut self) -> Result<(), AuthorityError> {
        self.save_journal().await;
        let heeded = self.heed_upstream().await;
        let heeded = heeded.and(self.heed_bundle().await);
        let x509 = self.check_x509().await;
        if let Err(error) = &x509 {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "Unable to rotate X509 CA");
        }
        let mut result = heeded.and(x509);
        for kind in TokenKind::ALL {
            // Without an X.509 authority another could not be kept either.
            let Some(key_type) = self.key_type(kind).filter(|_| self.parts.authorities.x509().is_some()) else {
                continue;
            };
            let keys = self.check_keys(kind, key_type).await;
            if let Err(error) = &keys {
                tracing::error!(subsystem_name = SUBSYSTEM, %error, "Unable to rotate {} key", kind.as_str());
            }
            result = result.and(keys);
        }
        self.health.note(result.is_ok());
        result
    }

    async fn check_x509(&mut self) -> Result<(), AuthorityError> {
        for _ in 0..STEPS_MAX {
            match plan::next_step(&self.x509.tenures(), self.parts.clock.now_ms()) {
                None => return Ok(()),
                Some(Step::PrepareCurrent) => self.prepare_x509(true).await?,
                Some(Step::PrepareNext) => self.prepare_x509(false).await?,
                Some(Step::Rotate) => self.rotate_x509().await,
                Some(Step::ActivateCurrent) => self.activate_x509().await,
            }
        }
        Err(AuthorityError::Restless)
    }

    /// Makes a successor.
    pub(super) async fn prepare(&mut self, kind: AuthorityKind) -> Result<(), AuthorityError> {
        match kind.tokens() {
            None => self.prepare_x509(false).await,
            Some(tokens) => match self.key_type(tokens) {
                Some(key_type) => self.prepare_key(tokens, false, key_type).await,
                None => Err(AuthorityError::Off(kind)),
            },
        }
    }

    /// Lets the successor sign.
    pub(super) async fn rotate(&mut self, kind: AuthorityKind) {
        match kind.tokens() {
            None => self.rotate_x509().await,
            Some(tokens) => self.rotate_key(tokens).await,
        }
    }

    /// Swaps the slots and lets the one that was next sign.
    pub(super) async fn rotate_x509(&mut self) {
        let old = retire(&mut self.x509);
        self.journal.set_x509_status(&old, Status::Old);
        self.activate_x509().await;
    }

    /// Makes an X.509 authority in a slot: key, certificate, journal, bundle.
    pub(super) async fn prepare_x509(&mut self, current: bool) -> Result<(), AuthorityError> {
        let call = self.parts.metrics.call("ca.manager.x509_ca.prepare");
        let result = self.try_prepare_x509(current).await;
        call.finish_with(&result, AuthorityError::kind);
        self.publish_states();
        result
    }

    async fn try_prepare_x509(&mut self, current: bool) -> Result<(), AuthorityError> {
        // The journal must not name an authority whose key is about to be overwritten.
        self.flush_journal().await?;
        let name = vacate(&mut self.x509, current).name;
        tracing::debug!(subsystem_name = SUBSYSTEM, slot = name.as_str(), "Preparing X509 CA");
        let signer = self.generate(&name.x509_key(), self.settings.ca_key_type).await?;
        let upstream = self.parts.upstream.as_deref();
        let made = make(&self.settings, &self.parts.composers, upstream, signer, self.parts.clock.as_ref()).await?;
        let tenure = Tenure { status: Status::Prepared, issued_at: made.issued_at, not_after: made.not_after };
        let authority = ActiveX509 {
            authority_id: hex(&made.ca.subject_key_id()),
            upstream_authority_id: made.upstream_authority_id,
            ca: made.ca,
        };
        self.journal.add_x509(pb::X509caEntry {
            slot_id: name.as_str().into(),
            issued_at: tenure.issued_at,
            certificate: authority.ca.certificate().to_vec().into(),
            upstream_chain: authority.ca.upstream_chain().iter().map(|c| c.to_vec().into()).collect(),
            status: pb::Status::Prepared.into(),
            authority_id: authority.authority_id.clone(),
            not_after: tenure.not_after,
            upstream_authority_id: authority.upstream_authority_id.clone(),
        });
        self.save_journal().await;
        let x509_authorities = made.roots.into_iter().map(|der| X509Authority { der, tainted: false }).collect();
        let addition = Bundle { x509_authorities, ..Bundle::empty(self.settings.trust_domain.clone()) };
        self.append(&addition, &authority.authority_id).await?;
        tracing::info!(
            subsystem_name = SUBSYSTEM,
            slot = name.as_str(),
            issued_at = %Rfc3339(tenure.issued_at),
            expiration = %Rfc3339(tenure.not_after),
            self_signed = self.parts.upstream.is_none(),
            local_authority_id = %authority.authority_id,
            upstream_authority_id = %authority.upstream_authority_id,
            "X509 CA prepared"
        );
        vacate(&mut self.x509, current).held = Some(Held { authority: Arc::new(authority), tenure });
        Ok(())
    }

    pub(super) async fn generate(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, AuthorityError> {
        within("the key manager", self.parts.keys.generate_key(id, key_type), AuthorityError::GenerateKey).await
    }

    /// Adds a new authority to the bundle, in the datastore and for all who read the feed. When that fails the authority
    /// does not exist.
    pub(super) async fn append(&mut self, addition: &Bundle, authority_id: &str) -> Result<(), AuthorityError> {
        let appended = self.append_to_bundle(addition).await;
        appended.inspect_err(|_| self.journal.remove(authority_id))
    }

    /// In the datastore and for all who read the feed.
    pub(super) async fn append_to_bundle(&self, addition: &Bundle) -> Result<(), AuthorityError> {
        let begun = self.parts.feed.history();
        let appending = self.parts.store.append_bundle(addition);
        let bundle = within("the datastore", appending, AuthorityError::Bundle).await?;
        self.parts.feed.publish_since(begun, bundle);
        Ok(())
    }

    async fn activate_x509(&mut self) {
        let Some(id) = activate(&mut self.x509) else { return };
        self.journal.set_x509_status(&id, Status::Active);
        self.save_journal().await;
        self.publish_x509();
    }

    /// Lets the current X.509 authority sign, if it is active.
    fn publish_x509(&self) {
        let slot = &self.x509.current;
        let Some(held) = slot.held.as_ref().filter(|h| h.tenure.status == Status::Active) else { return };
        let (tenure, metrics) = (held.tenure, &self.parts.metrics);
        tracing::info!(
            subsystem_name = SUBSYSTEM,
            slot = slot.name.as_str(),
            issued_at = %Rfc3339(tenure.issued_at),
            expiration = %Rfc3339(tenure.not_after),
            local_authority_id = %held.authority.authority_id,
            upstream_authority_id = %held.authority.upstream_authority_id,
            "X509 CA activated"
        );
        let labels = [("trust_domain_id", self.settings.trust_domain.as_str())];
        let left_seconds = tenure.not_after.saturating_sub(self.parts.clock.now());
        metrics.count("ca.manager.x509_ca.activate", 1.0, &[]);
        metrics.gauge("manager.x509_ca.rotate.expiration", tenure.not_after as f64, &labels);
        metrics.gauge("manager.x509_ca.rotate.ttl", left_seconds as f64, &labels);
        self.parts.authorities.set_x509(held.authority.clone());
        self.publish_states();
    }

    /// Tells operators what is in the slots.
    pub(super) fn publish_states(&self) {
        let (x509, jwt, wit) = (states(&self.x509), states(&self.jwt), states(&self.wit));
        self.parts.authorities.set_states(States { x509, jwt, wit });
        self.parts.feed.shield(self.shield());
        self.publish_heard();
    }

    pub(super) async fn flush_journal(&mut self) -> Result<(), AuthorityError> {
        let (journal, store) = (&mut self.journal, self.parts.store.as_ref());
        let history = self.parts.feed.history();
        let saving = async {
            journal.turn_to(history, store).await?;
            journal.save(store).await
        };
        within("the datastore", saving, |e| e).await
    }

    /// Saves the journal if it can be; else the next round does.
    pub(super) async fn save_journal(&mut self) {
        if let Err(error) = self.flush_journal().await {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "Unable to save the CA journal; trying again later");
        }
    }
}

/// The slot that a new authority is made in. What it holds never signs again, as its key is about to be overwritten; it can
/// still be tainted and revoked until the new one is there.
pub(super) fn vacate<A>(pair: &mut Pair<A>, current: bool) -> &mut Slot<A> {
    let slot = if current { &mut pair.current } else { &mut pair.next };
    if let Some(held) = &mut slot.held {
        held.tenure.status = Status::Old;
    }
    slot
}

/// Makes the current authority the active one and returns its ID.
pub(super) fn activate<A: Named>(pair: &mut Pair<A>) -> Option<String> {
    let held = pair.current.held.as_mut()?;
    held.tenure.status = Status::Active;
    Some(held.authority.authority_id().to_owned())
}

/// Swaps the slots and returns the ID of the authority that is now old.
pub(super) fn retire<A: Named>(pair: &mut Pair<A>) -> String {
    std::mem::swap(&mut pair.current, &mut pair.next);
    let Some(held) = pair.next.held.as_mut() else { return String::new() };
    held.tenure.status = Status::Old;
    held.authority.authority_id().to_owned()
}

fn states<A: Named>(pair: &Pair<A>) -> SlotStates {
    let state = |slot: &Slot<A>| {
        slot.held.as_ref().map(|held| AuthorityState {
            authority_id: held.authority.authority_id().to_owned(),
            status: held.tenure.status,
            expires_at: held.tenure.not_after,
            upstream_authority_id: held.authority.upstream_authority_id().to_owned(),
        })
    };
    SlotStates { current: state(&pair.current), next: state(&pair.next) }
}
