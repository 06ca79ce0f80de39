//! Authorities that are bare keys: those that sign JWT-SVIDs, and those that sign WIT-SVIDs. One code for both.

use super::manager::{AuthorityManager, STEPS_MAX, activate, retire, vacate};
use super::plan::{self, Status, Step, Tenure};
use super::slots::{Held, Named, Pair, TokenKey};
use super::upstream::{published_upstream, with_new};
use super::{ActiveJwt, ActiveWit, AuthorityError, AuthorityKind, SUBSYSTEM};
use crate::issue::Rfc3339;
use crate::publish::Name;
use finial_core::{Bundle, JwtAuthority, KeyType};
use finial_crypto::{JwtAuthoritySigner, WitAuthoritySigner, random_key_id};
use finial_proto::journal as pb;
use std::sync::Arc;

/// What a key signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenKind {
    Jwt,
    Wit,
}

impl TokenKind {
    pub(super) const ALL: [Self; 2] = [Self::Jwt, Self::Wit];

    /// As it stands in log messages and names of keys.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Jwt => "JWT",
            Self::Wit => "WIT",
        }
    }

    fn authority(self) -> AuthorityKind {
        match self {
            Self::Jwt => AuthorityKind::Jwt,
            Self::Wit => AuthorityKind::Wit,
        }
    }

    fn metrics(self) -> (&'static str, &'static str) {
        match self {
            Self::Jwt => ("ca.manager.jwt_key.prepare", "manager.jwt_key.activate"),
            Self::Wit => ("ca.manager.wit_key.prepare", "manager.wit_key.activate"),
        }
    }

    pub(super) fn name(self, key_id: &str) -> Name {
        match self {
            Self::Jwt => Name::of_jwt(key_id),
            Self::Wit => Name::of_wit(key_id),
        }
    }

    /// Where a bundle has these keys.
    pub(super) fn of(self, bundle: &Bundle) -> &[JwtAuthority] {
        match self {
            Self::Jwt => &bundle.jwt_authorities,
            Self::Wit => &bundle.wit_authorities,
        }
    }
}

impl AuthorityManager {
    pub(super) fn keys(&self, kind: TokenKind) -> &Pair<TokenKey> {
        match kind {
            TokenKind::Jwt => &self.jwt,
            TokenKind::Wit => &self.wit,
        }
    }

    pub(super) fn keys_mut(&mut self, kind: TokenKind) -> &mut Pair<TokenKey> {
        match kind {
            TokenKind::Jwt => &mut self.jwt,
            TokenKind::Wit => &mut self.wit,
        }
    }

    /// The type of new keys; `None` when such tokens are off.
    pub(super) fn key_type(&self, kind: TokenKind) -> Option<KeyType> {
        match kind {
            TokenKind::Jwt => self.settings.jwt_key_type,
            TokenKind::Wit => self.settings.wit_key_type,
        }
    }

    pub(super) async fn check_keys(&mut self, kind: TokenKind, key_type: KeyType) -> Result<(), AuthorityError> {
        for _ in 0..STEPS_MAX {
            match plan::next_step(&self.keys(kind).tenures(), self.parts.clock.now_ms()) {
                None => return Ok(()),
                Some(Step::PrepareCurrent) => self.prepare_key(kind, true, key_type).await?,
                Some(Step::PrepareNext) => self.prepare_key(kind, false, key_type).await?,
                Some(Step::Rotate) => self.rotate_key(kind).await,
                Some(Step::ActivateCurrent) => self.activate_key(kind).await,
            }
        }
        Err(AuthorityError::Restless)
    }

    /// Swaps the slots and lets the one that was next sign.
    pub(super) async fn rotate_key(&mut self, kind: TokenKind) {
        let old = retire(self.keys_mut(kind));
        self.journal.set_key_status(kind, &old, Status::Old);
        self.activate_key(kind).await;
    }

    /// Makes an authority in a slot: key, journal, bundle.
    pub(super) async fn prepare_key(
        &mut self,
        kind: TokenKind,
        current: bool,
        key_type: KeyType,
    ) -> Result<(), AuthorityError> {
        let call = self.parts.metrics.call(kind.metrics().0);
        let result = self.try_prepare_key(kind, current, key_type).await;
        call.finish_with(&result, AuthorityError::kind);
        self.publish_states();
        result
    }

    async fn try_prepare_key(
        &mut self,
        kind: TokenKind,
        current: bool,
        key_type: KeyType,
    ) -> Result<(), AuthorityError> {
        self.flush_journal().await?;
        let name = vacate(self.keys_mut(kind), current).name;
        tracing::debug!(subsystem_name = SUBSYSTEM, slot = name.as_str(), "Preparing {} key", kind.as_str());
        let signer = self.generate(&name.token_key(kind), key_type).await?;
        let now = self.parts.clock.now();
        let not_after = now.saturating_add(self.settings.ca_ttl_seconds);
        let key_id = random_key_id();
        let public_key = signer.public_key().spki_der().clone();
        let entry = pb::JwtKeyEntry {
            slot_id: name.as_str().into(),
            issued_at: now,
            not_after,
            kid: key_id.clone(),
            public_key: public_key.to_vec().into(),
            status: pb::Status::Prepared.into(),
            authority_id: key_id.clone(),
        };
        self.journal.add_key(kind, entry);
        if !current {
            // One for the current slot is active, and saved, right after it is in the bundle.
            self.save_journal().await;
        }
        let key = JwtAuthority { key_id: key_id.clone(), public_key, expires_at: not_after, tainted: false };
        let published = match self.parts.upstream.as_deref() {
            Some(upstream) => published_upstream(upstream, kind.authority(), &key).await,
            None => Ok(None),
        };
        let above = published.inspect_err(|_| self.journal.remove(&key_id))?;
        if above.is_none() {
            self.news.only_here.insert(kind.name(&key_id));
            let kept: Vec<_> = TokenKind::ALL.into_iter().flat_map(|kind| self.journal.names(kind)).collect();
            self.news.only_here.retain(|name| kept.contains(name));
        }
        self.publish_heard();
        let heard = self.parts.feed.heard();
        let mut addition = Bundle::empty(self.settings.trust_domain.clone());
        match kind {
            TokenKind::Jwt => addition.jwt_authorities = with_new(key, above, &heard, Name::jwt),
            TokenKind::Wit => addition.wit_authorities = with_new(key, above, &heard, Name::wit),
        }
        self.append(&addition, &key_id).await?;
        tracing::info!(
            subsystem_name = SUBSYSTEM,
            slot = name.as_str(),
            issued_at = %Rfc3339(now),
            expiration = %Rfc3339(not_after),
            local_authority_id = %key_id,
            "{} key prepared",
            kind.as_str()
        );
        let authority = Arc::new(TokenKey { key_id, signer, not_after });
        let tenure = Tenure { status: Status::Prepared, issued_at: now, not_after };
        vacate(self.keys_mut(kind), current).held = Some(Held { authority, tenure });
        Ok(())
    }

    pub(super) async fn activate_key(&mut self, kind: TokenKind) {
        let Some(id) = activate(self.keys_mut(kind)) else { return };
        self.journal.set_key_status(kind, &id, Status::Active);
        self.save_journal().await;
        self.publish_key(kind);
    }

    /// Lets the current authority sign, if it is active and such tokens are on.
    pub(super) fn publish_key(&self, kind: TokenKind) {
        let slot = &self.keys(kind).current;
        let Some(held) = slot.held.as_ref().filter(|h| h.tenure.status == Status::Active) else { return };
        if self.key_type(kind).is_none() {
            return;
        }
        tracing::info!(
            subsystem_name = SUBSYSTEM,
            slot = slot.name.as_str(),
            issued_at = %Rfc3339(held.tenure.issued_at),
            expiration = %Rfc3339(held.tenure.not_after),
            local_authority_id = held.authority.authority_id(),
            "{} key activated",
            kind.as_str()
        );
        self.parts.metrics.count(kind.metrics().1, 1.0, &[]);
        let TokenKey { key_id, signer, not_after } = &*held.authority;
        let (signer, not_after) = (signer.clone(), *not_after);
        match kind {
            TokenKind::Jwt => {
                let signer = JwtAuthoritySigner::new(signer, key_id);
                self.parts.authorities.set_jwt(Arc::new(ActiveJwt { signer, not_after }));
            }
            TokenKind::Wit => {
                let signer = WitAuthoritySigner::new(signer, key_id);
                self.parts.authorities.set_wit(Arc::new(ActiveWit { signer, not_after }));
            }
        }
        self.publish_states();
    }
}
