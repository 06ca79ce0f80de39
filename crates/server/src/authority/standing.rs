//! Whether what an authority signs is to be relied on, by the trust domain's bundle.

use super::manager::within;
use super::plan::Status;
use super::slots::{Named, Pair, TokenKey};
use super::tokens::TokenKind;
use super::{AuthorityError, AuthorityKind, AuthorityManager, SUBSYSTEM};
use crate::publish::{Lost, Name, Shield, join, split};
use finial_core::{Bundle, JwtAuthority, X509Authority};
use finial_crypto::Certificate;
use finial_proto::journal as pb;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A replacement that is no better than what it replaces is made again this long after, in milliseconds; each time twice as
/// long, up to an hour. An upstream authority may cost money.
const RETRY_MS: i64 = 10_000;
const RETRY_MAX_MS: i64 = 3_600_000;

/// What the bundle says of an authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is there.
    Good,
    /// It is to be abandoned.
    Tainted,
    /// It is not there: nobody can verify what it signs.
    Gone,
}

/// The keys from which a certificate chain hangs: subject and authority key IDs of its certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeyIds {
    ids: BTreeSet<Vec<u8>>,
    /// A certificate did not say who signed it.
    incomplete: bool,
}

impl KeyIds {
    pub(crate) fn of<'a>(chain: impl IntoIterator<Item = &'a Arc<[u8]>>) -> Self {
        let mut found = Self::default();
        for der in chain {
            let certificate = Certificate::parse(der.clone()).ok();
            let authority = certificate.as_ref().and_then(|c| c.authority_key_id());
            // A root need not say that it signed itself.
            found.incomplete |= authority.is_none() && !certificate.as_ref().is_some_and(|c| c.is_self_signed());
            let subject = certificate.as_ref().and_then(|c| c.subject_key_id());
            found.ids.extend(authority.into_iter().chain(subject).map(<[u8]>::to_vec));
        }
        found
    }

    /// Whether the chain hangs from this root.
    pub(crate) fn include(&self, root: &[u8]) -> bool {
        self.ids.contains(root)
    }

    /// By the X.509 authorities of a bundle. What cannot be told counts as good.
    pub(crate) fn standing(&self, bundle: &Bundle) -> Standing {
        let (mut there, mut unclear) = (false, self.incomplete);
        for authority in &bundle.x509_authorities {
            let root = Certificate::parse(authority.der.clone()).ok();
            match root.as_ref().and_then(|root| root.subject_key_id()) {
                Some(id) if self.include(id) && authority.tainted => return Standing::Tainted,
                Some(id) => there |= self.include(id),
                None => unclear = true,
            }
        }
        if there || unclear { Standing::Good } else { Standing::Gone }
    }
}

fn key_standing(keys: &[JwtAuthority], key_id: &str) -> Standing {
    match keys.iter().find(|key| key.key_id == key_id) {
        Some(key) if key.tainted => Standing::Tainted,
        Some(_) => Standing::Good,
        None => Standing::Gone,
    }
}

/// When to make a replacement again that was no better.
#[derive(Default)]
pub(super) struct Retry {
    not_before_ms: i64,
    delay_ms: i64,
}

impl Retry {
    fn is_due(&self, now_ms: i64) -> bool {
        // The clock may have gone back.
        now_ms >= self.not_before_ms || self.not_before_ms.saturating_sub(now_ms) > RETRY_MAX_MS
    }

    fn put_off(&mut self, now_ms: i64) {
        self.delay_ms = self.delay_ms.saturating_mul(2).clamp(RETRY_MS, RETRY_MAX_MS);
        self.not_before_ms = now_ms.saturating_add(self.delay_ms);
    }
}

/// Of the authority that signs, and of its successor where one is prepared.
type Standings = (Option<Standing>, Option<Standing>);

fn standings<A: Named>(pair: &Pair<A>, of: impl Fn(&A) -> Standing) -> Standings {
    let with = |slot: &super::slots::Slot<A>, status| {
        let held = slot.held.as_ref().filter(|held| held.tenure.status == status)?;
        Some(of(&held.authority))
    };
    (with(&pair.current, Status::Active), with(&pair.next, Status::Prepared))
}

fn is_empty(bundle: &Bundle) -> bool {
    bundle.x509_authorities.is_empty() && bundle.jwt_authorities.is_empty() && bundle.wit_authorities.is_empty()
}

fn is_bad(standing: Option<Standing>) -> bool {
    standing.is_some_and(|standing| standing != Standing::Good)
}

impl AuthorityManager {
    fn standings(&self, kind: AuthorityKind, bundle: &Bundle) -> Standings {
        let by_key =
            |kind: TokenKind, pair: &Pair<TokenKey>| standings(pair, |key| key_standing(kind.of(bundle), &key.key_id));
        match kind {
            AuthorityKind::X509 => standings(&self.x509, |authority| authority.key_ids().standing(bundle)),
            AuthorityKind::Jwt => by_key(TokenKind::Jwt, &self.jwt),
            AuthorityKind::Wit => by_key(TokenKind::Wit, &self.wit),
        }
    }

    /// Moves off authorities that the bundle says are tainted, whoever tainted them, or that it lost.
    pub(super) async fn heed_bundle(&mut self) -> Result<(), AuthorityError> {
        if let Err(error) = self.restore_lost().await {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "Unable to add to the bundle again what the datastore lost; trying again");
            // Replacing what may only be missing for a moment would cut off all who hold what it signed.
            return Err(error);
        }
        let mut result = Ok(());
        for kind in [AuthorityKind::X509, AuthorityKind::Jwt, AuthorityKind::Wit] {
            if kind.tokens().is_some_and(|tokens| self.key_type(tokens).is_none()) {
                continue;
            }
            let moved = self.move_off(kind).await;
            if let Err(error) = &moved {
                tracing::error!(subsystem_name = SUBSYSTEM, %error, "Unable to replace the {kind} authority that the bundle does not have or has tainted");
            }
            result = result.and(moved);
        }
        result
    }

    /// Adds to journal and bundle again what this server signs with, or will, where the datastore lost it by a failover or a
    /// backup: what was signed already hangs from it. Nothing that may have been revoked there.
    async fn restore_lost(&mut self) -> Result<(), AuthorityError> {
        let Some(lost) = self.parts.feed.lost() else { return Ok(()) };
        self.news.take_again(&lost);
        self.publish_heard();
        let lost = self.decide(lost).await?;
        self.flush_journal().await?;
        let own = self.own_of(&lost.never_there);
        if !is_empty(&own) {
            tracing::warn!(
                subsystem_name = SUBSYSTEM,
                "The datastore lost authorities of this server; adding them again"
            );
            self.append_to_bundle(&own).await?;
        }
        self.parts.feed.restored(&lost);
        Ok(())
    }

    /// What of the lost authorities may be added again, by what the journal says there before it is written again: an
    /// authority is in the journal before it is in the bundle. So one that was made here, and of which the journal knows
    /// nothing, was never in the bundle. All else may have been: what others can add as well, as roots of an upstream
    /// authority, may have come, and been revoked, whatever its number was before.
    async fn decide(&mut self, lost: Lost) -> Result<Lost, AuthorityError> {
        let before = lost.clone();
        let Some(unclear) = &lost.unclear else { return Ok(lost) };
        let history = self.parts.feed.history();
        let finding = self.journal.turn_to(history, self.parts.store.as_ref());
        within("the datastore", finding, |e| e).await?;
        let stored = self.journal.found();
        let (never_there, others) = split(&lost.never_there, |name| lost.nothing_there || !self.may_others_add(name));
        let mut unclear = unclear.clone();
        join(&mut unclear, &others);
        let own = self.own_of(&unclear);
        let is_made_after =
            |name: &Name| !self.may_others_add(name) && stored.is_some_and(|stored| self.is_made_after(name, stored));
        let (anew, revoked) = split(&own, is_made_after);
        if !is_empty(&revoked) {
            tracing::error!(
                subsystem_name = SUBSYSTEM,
                "The datastore has lost authorities of this server, or they were revoked there while it was cut off; they \
                 are not added again, but replaced: what they signed is not valid any more, and agents whose own SVIDs \
                 hang from them have to attest again"
            );
        }
        let mut decided = Lost { never_there, unclear: None, ..lost };
        join(&mut decided.never_there, &anew);
        self.parts.feed.decided(&before, decided.clone());
        Ok(decided)
    }

    /// Whether others can add it to the bundle: all that is known above.
    fn may_others_add(&self, name: &Name) -> bool {
        match name {
            Name::X509(der) => {
                let slots = [&self.x509.current, &self.x509.next].into_iter().filter_map(|slot| slot.held.as_ref());
                slots.map(|held| held.authority.ca.certificate()).all(|own| **own != **der)
            }
            Name::Jwt(_) | Name::Wit(_) => self.parts.upstream.is_some() && !self.news.only_here.contains(name),
        }
    }

    /// Whether it was made after this journal was written.
    fn is_made_after(&self, name: &Name, journal: &pb::Entries) -> bool {
        match name {
            Name::X509(der) => journal.x509_c_as.iter().all(|entry| *entry.certificate != **der),
            Name::Jwt(key_id) => journal.jwt_keys.iter().all(|entry| *entry.kid != **key_id),
            Name::Wit(key_id) => journal.wit_keys.iter().all(|entry| *entry.kid != **key_id),
        }
    }

    async fn move_off(&mut self, kind: AuthorityKind) -> Result<(), AuthorityError> {
        let Some((current, next)) = self.confirmed(kind).await? else { return Ok(()) };
        let now_ms = self.parts.clock.now_ms();
        if !(is_bad(current) || is_bad(next)) {
            *self.retry(kind) = Retry::default();
            return Ok(());
        }
        let mut next = next;
        if next != Some(Standing::Good) {
            if !self.retry(kind).is_due(now_ms) {
                return Ok(());
            }
            tracing::info!(
                subsystem_name = SUBSYSTEM,
                ?current,
                ?next,
                "The bundle has the {kind} authority tainted or not at all; preparing another"
            );
            self.prepare(kind).await?;
            next = self.parts.feed.own().and_then(|own| self.standings(kind, own.stored()).1);
        }
        if next != Some(Standing::Good) {
            tracing::error!(
                subsystem_name = SUBSYSTEM,
                "The new {kind} authority hangs from what is tainted too: its upstream authority must change first"
            );
            self.retry(kind).put_off(now_ms);
        } else if is_bad(current) {
            self.rotate(kind).await;
        }
        Ok(())
    }

    /// By the bundle that everyone has here; what that does not have is looked up in the datastore, as it may be behind.
    async fn confirmed(&self, kind: AuthorityKind) -> Result<Option<Standings>, AuthorityError> {
        let Some(own) = self.parts.feed.own() else { return Ok(None) };
        let known = self.standings(kind, own.stored());
        if known.0 != Some(Standing::Gone) && known.1 != Some(Standing::Gone) {
            return Ok(Some(known));
        }
        let reading = self.parts.store.bundle(&self.settings.trust_domain);
        let bundle = within("the datastore", reading, AuthorityError::Bundle).await?;
        Ok(bundle.map(|bundle| self.standings(kind, &bundle)))
    }

    /// What of a bundle the authorities hang from that sign here or are prepared to.
    fn own_of(&self, bundle: &Bundle) -> Bundle {
        fn signing<A>(pair: &Pair<A>) -> impl Iterator<Item = &A> {
            let held = [&pair.current, &pair.next].into_iter().filter_map(|slot| slot.held.as_ref());
            let signing = held.filter(|held| matches!(held.tenure.status, Status::Active | Status::Prepared));
            signing.map(|held| &*held.authority)
        }
        let x509: Vec<_> = signing(&self.x509).map(|authority| authority.key_ids()).collect();
        let hangs = |root: &&X509Authority| {
            let root = Certificate::parse(root.der.clone()).ok();
            let id = root.as_ref().and_then(|root| root.subject_key_id());
            id.is_some_and(|id| x509.iter().any(|ids| ids.include(id)))
        };
        let keys = |pair: &Pair<TokenKey>, keys: &[JwtAuthority]| {
            let own = |key: &&JwtAuthority| signing(pair).any(|held| held.key_id == key.key_id);
            keys.iter().filter(own).cloned().collect()
        };
        Bundle {
            x509_authorities: bundle.x509_authorities.iter().filter(hangs).cloned().collect(),
            jwt_authorities: keys(&self.jwt, &bundle.jwt_authorities),
            wit_authorities: keys(&self.wit, &bundle.wit_authorities),
            ..Bundle::empty(bundle.trust_domain.clone())
        }
    }

    fn retry(&mut self, kind: AuthorityKind) -> &mut Retry {
        match kind {
            AuthorityKind::X509 => &mut self.retries.0,
            AuthorityKind::Jwt => &mut self.retries.1,
            AuthorityKind::Wit => &mut self.retries.2,
        }
    }

    /// What the bundle must not show as tainted while it signs here.
    pub(super) fn shield(&self) -> Shield {
        let key = |pair: &Pair<TokenKey>| {
            let held = pair.current.held.as_ref().filter(|held| held.tenure.status == Status::Active);
            held.map(|held| held.authority.key_id.clone()).unwrap_or_default()
        };
        let x509 = self.x509.current.held.as_ref().filter(|held| held.tenure.status == Status::Active);
        Shield {
            x509: x509.map(|held| held.authority.key_ids()).unwrap_or_default(),
            jwt: key(&self.jwt),
            wit: key(&self.wit),
        }
    }
}

#[cfg(test)]
#[path = "standing_tests.rs"]
mod tests;
