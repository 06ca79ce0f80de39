//! The one task that makes, activates and retires authorities.

use super::journal::{Journal, hex};
use super::make::make;
use super::plan::{self, Status, Step, Tenure};
use super::slots::{Held, Named, Pair, Slot, SlotName, Sources};
use super::{ActiveJwt, ActiveX509, Authorities, AuthorityError, AuthorityStore, SUBSYSTEM};
use crate::issue::Rfc3339;
use crate::publish::BundleFeed;
use finial_core::{Bundle, Clock, JwtAuthority, KeyType, TrustDomain, X509Authority};
use finial_crypto::{DistinguishedName, JwtAuthoritySigner, NameParts, Signer, random_key_id};
use finial_plugin::{KeyManager, UpstreamAuthority};
use finial_proto::journal as pb;
use finial_runtime::{Metrics, Shutdown};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// How long a call of the key manager or the datastore may take.
const CALL_SECONDS: u64 = 30;
/// A round takes four steps at most; more is a bug.
const STEPS_MAX: u32 = 8;
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
        }
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
    settings: AuthoritySettings,
    parts: AuthorityParts,
    journal: Journal,
    x509: Pair<ActiveX509>,
    jwt: Pair<ActiveJwt>,
    health: RotationHealth,
}

/// Gives a call its deadline.
pub(super) async fn within<T, E>(
    what: &'static str,
    call: impl Future<Output = Result<T, E>>,
    error: impl FnOnce(E) -> AuthorityError,
) -> Result<T, AuthorityError> {
    match tokio::time::timeout(Duration::from_secs(CALL_SECONDS), call).await {
        Ok(result) => result.map_err(error),
        Err(_) => Err(AuthorityError::Timeout(what, CALL_SECONDS)),
    }
}

impl AuthorityManager {
    /// Loads what the journal says and lets what is active sign again.
    pub async fn load(settings: AuthoritySettings, parts: AuthorityParts) -> Result<Self, AuthorityError> {
        let keys = within("the key manager", parts.keys.keys(), AuthorityError::ListKeys).await?;
        let journal = within("the datastore", Journal::load(parts.store.as_ref(), &keys), |e| e).await?;
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
        let (x509, jwt) = (sources.x509(&entries.x509_c_as), sources.jwt(&entries.jwt_keys));
        let manager = Self { settings, parts, journal, x509, jwt, health: RotationHealth::default() };
        manager.publish_x509();
        if manager.settings.jwt_key_type.is_some() {
            manager.publish_jwt();
        }
        Ok(manager)
    }

    /// Whether rotation works, for a health check.
    pub fn health(&self) -> RotationHealth {
        self.health.clone()
    }

    /// The first round. Fails only when there is nothing to sign with; what else goes wrong is tried again by
    /// [`AuthorityManager::run`].
    pub async fn start(&mut self) -> Result<(), AuthorityError> {
        let result = self.check().await;
        let complete = self.parts.authorities.x509().is_some()
            && (self.settings.jwt_key_type.is_none() || self.parts.authorities.jwt().is_some());
        if complete { Ok(()) } else { result }
    }

    /// Looks at the plan every 10 s, or sooner when something is due, until shutdown.
    pub async fn run(mut self, shutdown: Shutdown) {
        let mut wait_ms = self.wait_ms();
        loop {
            let wait = Duration::from_millis(u64::try_from(wait_ms).unwrap_or_default());
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            wait_ms = match self.check().await {
                Ok(()) => self.wait_ms(),
                Err(_) => plan::CHECK_INTERVAL_MS,
            };
        }
    }

    fn wait_ms(&self) -> i64 {
        let now_ms = self.parts.clock.now_ms();
        let x509 = plan::wait_ms(&self.x509.tenures(), now_ms);
        match self.settings.jwt_key_type {
            Some(_) => x509.min(plan::wait_ms(&self.jwt.tenures(), now_ms)),
            None => x509,
        }
    }

    /// One round: does what is due. The first error is logged and returned.
    pub async fn check(&mut self) -> Result<(), AuthorityError> {
        self.save_journal().await;
        let x509 = self.check_x509().await;
        if let Err(error) = &x509 {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "Unable to rotate X509 CA");
        }
        // Without an X.509 authority a JWT authority could not be kept either.
        let jwt = match self.settings.jwt_key_type {
            Some(key_type) if self.parts.authorities.x509().is_some() => self.check_jwt(key_type).await,
            _ => Ok(()),
        };
        if let Err(error) = &jwt {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "Unable to rotate JWT key");
        }
        self.health.note(x509.is_ok() && jwt.is_ok());
        x509.and(jwt)
    }

    async fn check_x509(&mut self) -> Result<(), AuthorityError> {
        for _ in 0..STEPS_MAX {
            match plan::next_step(&self.x509.tenures(), self.parts.clock.now_ms()) {
                None => return Ok(()),
                Some(Step::PrepareCurrent) => self.prepare_x509(true).await?,
                Some(Step::PrepareNext) => self.prepare_x509(false).await?,
                Some(Step::Rotate) => {
                    let old = retire(&mut self.x509);
                    self.journal.set_x509_status(&old, Status::Old);
                    self.activate_x509().await;
                }
                Some(Step::ActivateCurrent) => self.activate_x509().await,
            }
        }
        Err(AuthorityError::Restless)
    }

    async fn check_jwt(&mut self, key_type: KeyType) -> Result<(), AuthorityError> {
        for _ in 0..STEPS_MAX {
            match plan::next_step(&self.jwt.tenures(), self.parts.clock.now_ms()) {
                None => return Ok(()),
                Some(Step::PrepareCurrent) => self.prepare_jwt(true, key_type).await?,
                Some(Step::PrepareNext) => self.prepare_jwt(false, key_type).await?,
                Some(Step::Rotate) => {
                    let old = retire(&mut self.jwt);
                    self.journal.set_jwt_status(&old, Status::Old);
                    self.activate_jwt().await;
                }
                Some(Step::ActivateCurrent) => self.activate_jwt().await,
            }
        }
        Err(AuthorityError::Restless)
    }

    /// Makes an X.509 authority in a slot: key, certificate, journal, bundle.
    async fn prepare_x509(&mut self, current: bool) -> Result<(), AuthorityError> {
        let call = self.parts.metrics.call("ca.manager.x509_ca.prepare");
        let result = self.try_prepare_x509(current).await;
        call.finish_with(&result, AuthorityError::kind);
        result
    }

    async fn try_prepare_x509(&mut self, current: bool) -> Result<(), AuthorityError> {
        // The journal must not name an authority whose key is about to be overwritten.
        self.flush_journal().await?;
        let name = vacate(&mut self.x509, current).name;
        tracing::debug!(subsystem_name = SUBSYSTEM, slot = name.as_str(), "Preparing X509 CA");
        let signer = self.generate(&name.x509_key(), self.settings.ca_key_type).await?;
        let upstream = self.parts.upstream.as_deref();
        let made = make(&self.settings, upstream, signer, self.parts.clock.now()).await?;
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

    /// Makes a JWT authority in a slot: key, journal, bundle.
    async fn prepare_jwt(&mut self, current: bool, key_type: KeyType) -> Result<(), AuthorityError> {
        let call = self.parts.metrics.call("ca.manager.jwt_key.prepare");
        let result = self.try_prepare_jwt(current, key_type).await;
        call.finish_with(&result, AuthorityError::kind);
        result
    }

    async fn try_prepare_jwt(&mut self, current: bool, key_type: KeyType) -> Result<(), AuthorityError> {
        self.flush_journal().await?;
        let name: SlotName = vacate(&mut self.jwt, current).name;
        tracing::debug!(subsystem_name = SUBSYSTEM, slot = name.as_str(), "Preparing JWT key");
        let signer = self.generate(&name.jwt_key(), key_type).await?;
        let now = self.parts.clock.now();
        let not_after = now.saturating_add(self.settings.ca_ttl_seconds);
        let key_id = random_key_id();
        let public_key = signer.public_key().spki_der().clone();
        self.journal.add_jwt(pb::JwtKeyEntry {
            slot_id: name.as_str().into(),
            issued_at: now,
            not_after,
            kid: key_id.clone(),
            public_key: public_key.to_vec().into(),
            status: pb::Status::Prepared.into(),
            authority_id: key_id.clone(),
        });
        if !current {
            // One for the current slot is active, and saved, right after it is in the bundle.
            self.save_journal().await;
        }
        let key = JwtAuthority { key_id: key_id.clone(), public_key, expires_at: not_after, tainted: false };
        let addition = Bundle { jwt_authorities: vec![key], ..Bundle::empty(self.settings.trust_domain.clone()) };
        self.append(&addition, &key_id).await?;
        tracing::info!(
            subsystem_name = SUBSYSTEM,
            slot = name.as_str(),
            issued_at = %Rfc3339(now),
            expiration = %Rfc3339(not_after),
            local_authority_id = %key_id,
            "JWT key prepared"
        );
        let authority = ActiveJwt { signer: JwtAuthoritySigner::new(signer, &key_id), not_after };
        let tenure = Tenure { status: Status::Prepared, issued_at: now, not_after };
        vacate(&mut self.jwt, current).held = Some(Held { authority: Arc::new(authority), tenure });
        Ok(())
    }

    async fn generate(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, AuthorityError> {
        within("the key manager", self.parts.keys.generate_key(id, key_type), AuthorityError::GenerateKey).await
    }

    /// Adds a new authority to the bundle, in the datastore and for all who read the feed. When that fails the authority
    /// does not exist.
    async fn append(&mut self, addition: &Bundle, authority_id: &str) -> Result<(), AuthorityError> {
        let appended = within("the datastore", self.parts.store.append_bundle(addition), AuthorityError::Bundle).await;
        match appended {
            Ok(bundle) => {
                self.parts.feed.publish(bundle);
                Ok(())
            }
            Err(error) => {
                self.journal.remove(authority_id);
                Err(error)
            }
        }
    }

    async fn activate_x509(&mut self) {
        let Some(id) = activate(&mut self.x509) else { return };
        self.journal.set_x509_status(&id, Status::Active);
        self.save_journal().await;
        self.publish_x509();
    }

    async fn activate_jwt(&mut self) {
        let Some(id) = activate(&mut self.jwt) else { return };
        self.journal.set_jwt_status(&id, Status::Active);
        self.save_journal().await;
        self.publish_jwt();
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
    }

    /// Lets the current JWT authority sign, if it is active.
    fn publish_jwt(&self) {
        let slot = &self.jwt.current;
        let Some(held) = slot.held.as_ref().filter(|h| h.tenure.status == Status::Active) else { return };
        tracing::info!(
            subsystem_name = SUBSYSTEM,
            slot = slot.name.as_str(),
            issued_at = %Rfc3339(held.tenure.issued_at),
            expiration = %Rfc3339(held.tenure.not_after),
            local_authority_id = held.authority.authority_id(),
            "JWT key activated"
        );
        self.parts.metrics.count("manager.jwt_key.activate", 1.0, &[]);
        self.parts.authorities.set_jwt(held.authority.clone());
    }

    async fn flush_journal(&mut self) -> Result<(), AuthorityError> {
        within("the datastore", self.journal.save(self.parts.store.as_ref()), |e| e).await
    }

    /// Saves the journal if it can be; else the next round does.
    async fn save_journal(&mut self) {
        if let Err(error) = self.flush_journal().await {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "Unable to save the CA journal; trying again later");
        }
    }
}

/// Empties the slot that a new authority is made in.
fn vacate<A>(pair: &mut Pair<A>, current: bool) -> &mut Slot<A> {
    let slot = if current { &mut pair.current } else { &mut pair.next };
    slot.held = None;
    slot
}

/// Makes the current authority the active one and returns its ID.
fn activate<A: Named>(pair: &mut Pair<A>) -> Option<String> {
    let held = pair.current.held.as_mut()?;
    held.tenure.status = Status::Active;
    Some(held.authority.authority_id().to_owned())
}

/// Swaps the slots and returns the ID of the authority that is now old.
fn retire<A: Named>(pair: &mut Pair<A>) -> String {
    std::mem::swap(&mut pair.current, &mut pair.next);
    let Some(held) = pair.next.held.as_mut() else { return String::new() };
    held.tenure.status = Status::Old;
    held.authority.authority_id().to_owned()
}
