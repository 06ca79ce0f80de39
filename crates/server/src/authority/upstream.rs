//! What is heard from, and told to, an upstream authority between signatures.

use super::manager::{AuthorityManager, within};
use super::plan::Status;
use super::store::TaintStep;
use super::tokens::TokenKind;
use super::{AuthorityError, AuthorityKind, KeyIds, SUBSYSTEM};
use crate::publish::{Lost, Name};
use finial_core::{Bundle, ErrorKind, JwtAuthority, UnixSeconds, X509Authority};
use finial_crypto::Certificate;
use finial_plugin::{PluginKind, UpstreamAuthorities, UpstreamAuthority};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// After an upstream authority could not say its authorities, it is asked again this long after.
const PAUSE: Duration = Duration::from_secs(5);

/// How long those have to move off an authority that is gone above, unannounced.
const LEAVE_SECONDS: i64 = 60;

/// What the upstream authority said of the trust domain's authorities.
#[derive(Default)]
pub(super) struct News {
    /// What it said last, while it is not in the bundle yet.
    pub(super) told: Option<UpstreamAuthorities>,
    /// What it said before, which is in the bundle.
    taken: Option<UpstreamAuthorities>,
    /// Until when what is gone above stays here, tainted. A deadline of this server alone: another, or this one before a
    /// restart, may have tainted it just now.
    leaving: BTreeMap<Vec<u8>, UnixSeconds>,
    /// Own keys that nothing above knows of.
    pub(super) only_here: BTreeSet<Name>,
}

impl News {
    /// The bundle lost something: of that, what was taken is to be taken again. Nothing else, as it may have been revoked.
    pub(super) fn take_again(&mut self, lost: &Lost) {
        let names = lost.names();
        let Some(taken) = self.taken.as_mut().filter(|_| !names.is_empty()) else { return };
        self.told.get_or_insert_with(|| taken.clone());
        taken.x509.retain(|root| !names.contains(&Name::x509(root)));
        taken.jwt.retain(|key| !names.contains(&Name::jwt(key)));
        taken.wit.retain(|key| !names.contains(&Name::wit(key)));
    }

    fn before(&self, kind: AuthorityKind) -> ById {
        self.taken.as_ref().map(|taken| told_by_id(taken, kind)).unwrap_or_default()
    }
}

/// Publishes a key upstream. Returns all that is known above, or nothing where nothing above knows of such keys.
pub(crate) async fn published_upstream(
    upstream: &dyn UpstreamAuthority,
    kind: AuthorityKind,
    key: &JwtAuthority,
) -> Result<Option<Vec<JwtAuthority>>, AuthorityError> {
    let refused = |e: finial_plugin::PluginError| {
        AuthorityError::Publish(kind, e.of(PluginKind::UpstreamAuthority, upstream.name()))
    };
    let publishing = match kind {
        AuthorityKind::Wit => upstream.publish_wit_key(key),
        _ => upstream.publish_jwt_key(key),
    };
    match within("the upstream authority", publishing, refused).await {
        Err(error) if error.kind() == ErrorKind::Unimplemented => Ok(None),
        Ok(keys) => Ok(Some(keys)),
        Err(error) => Err(error),
    }
}

/// What an upstream authority says next; pauses after a failure, so that asking again right away does no harm.
pub(super) async fn next_authorities(upstream: Option<&dyn UpstreamAuthority>) -> UpstreamAuthorities {
    let Some(upstream) = upstream else { return std::future::pending().await };
    loop {
        match upstream.next_authorities().await {
            Ok(authorities) => return authorities,
            Err(error) => {
                let error = error.of(PluginKind::UpstreamAuthority, upstream.name());
                tracing::error!(subsystem_name = SUBSYSTEM, %error, "The upstream authority does not say its roots and keys; asking again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// What must be known of an authority to take it over.
struct Known {
    tainted: bool,
    ends: UnixSeconds,
}

/// X.509 authorities by subject key ID; what cannot be read, or has none, is left out. Keys by the bytes of their ID.
type ById = BTreeMap<Vec<u8>, Known>;

fn roots_by_id(roots: &[X509Authority]) -> ById {
    let entry = |a: &X509Authority| {
        let certificate = Certificate::parse(a.der.clone()).ok()?;
        let id = certificate.subject_key_id()?.to_vec();
        Some((id, Known { tainted: a.tainted, ends: certificate.not_after() }))
    };
    roots.iter().filter_map(entry).collect()
}

fn keys_by_id(keys: &[JwtAuthority]) -> ById {
    let ends = |at| if at == 0 { UnixSeconds::MAX } else { at };
    keys.iter()
        .map(|k| (k.key_id.clone().into_bytes(), Known { tainted: k.tainted, ends: ends(k.expires_at) }))
        .collect()
}

fn told_by_id(told: &UpstreamAuthorities, kind: AuthorityKind) -> ById {
    match kind {
        AuthorityKind::X509 => roots_by_id(&told.x509),
        AuthorityKind::Jwt => keys_by_id(&told.jwt),
        AuthorityKind::Wit => keys_by_id(&told.wit),
    }
}

fn stored_by_id(bundle: &Bundle, kind: AuthorityKind) -> ById {
    match kind {
        AuthorityKind::X509 => roots_by_id(&bundle.x509_authorities),
        AuthorityKind::Jwt => keys_by_id(&bundle.jwt_authorities),
        AuthorityKind::Wit => keys_by_id(&bundle.wit_authorities),
    }
}

/// Whether a key that is known above is to be known here.
fn is_new(heard: &BTreeSet<Name>, name: &Name, key: &JwtAuthority) -> bool {
    !key.tainted && !heard.contains(name)
}

/// What belongs into the bundle once a key was published, by what is known above then: the key, and what is new.
pub(crate) fn with_new(
    key: JwtAuthority,
    above: Option<Vec<JwtAuthority>>,
    heard: &BTreeSet<Name>,
    name: fn(&JwtAuthority) -> Name,
) -> Vec<JwtAuthority> {
    let mut keys = above.unwrap_or_default();
    keys.retain(|known| known.key_id == key.key_id || is_new(heard, &name(known), known));
    if keys.iter().all(|known| known.key_id != key.key_id) {
        keys.push(key);
    }
    keys
}

impl AuthorityManager {
    /// Says which keys an answer from above does not bring into the bundle: those that were told before, and this server's
    /// own, which it adds itself. Where the bundle does not have them they were revoked here.
    pub(super) fn publish_heard(&self) {
        let own = TokenKind::ALL.into_iter().flat_map(|kind| self.journal.names(kind));
        let taken = self.news.taken.iter();
        let told = taken.flat_map(|taken| taken.jwt.iter().map(Name::jwt).chain(taken.wit.iter().map(Name::wit)));
        self.parts.feed.set_heard(own.chain(told).collect());
    }

    /// Takes over what the upstream authority said last; what fails is tried again with the next check.
    pub(super) async fn heed_upstream(&mut self) -> Result<(), AuthorityError> {
        let Some(told) = self.news.told.clone() else { return Ok(()) };
        let taken = self.take(&told).await;
        match &taken {
            Ok(true) => {
                self.news.told = None;
                self.news.leaving.clear();
                self.news.taken = Some(told);
                self.publish_heard();
            }
            Ok(false) => {}
            Err(error) => {
                tracing::error!(subsystem_name = SUBSYSTEM, %error, "Could not take over the authorities of the upstream authority");
            }
        }
        taken.map(drop)
    }

    /// Adds what is new, marks what is tainted, and removes what is gone: what was tainted at once, other things after they
    /// were marked and left. Moving off follows from the bundle. Whether that was all.
    async fn take(&mut self, told: &UpstreamAuthorities) -> Result<bool, AuthorityError> {
        let trust_domain = self.settings.trust_domain.clone();
        let reading = self.parts.store.bundle(&trust_domain);
        let stored = within("the datastore", reading, AuthorityError::Bundle).await?;
        let stored = stored.unwrap_or_else(|| Bundle::empty(trust_domain.clone()));
        self.add_new(told).await?;
        let mut settled = true;
        for kind in [AuthorityKind::X509, AuthorityKind::Jwt, AuthorityKind::Wit] {
            settled &= self.mark_told(kind, &stored, told).await?;
        }
        self.publish_unknown(told).await?;
        let reading = self.parts.feed.refresh(&trust_domain);
        within("the datastore", reading, AuthorityError::Bundle).await?;
        Ok(settled)
    }

    async fn add_new(&mut self, told: &UpstreamAuthorities) -> Result<(), AuthorityError> {
        let heard = self.parts.feed.heard();
        let before_x509 = self.news.before(AuthorityKind::X509);
        let new_root = |root: &&X509Authority| {
            let known = roots_by_id(std::slice::from_ref(*root));
            !root.tainted && !known.keys().any(|id| before_x509.contains_key(id))
        };
        let addition = Bundle {
            x509_authorities: told.x509.iter().filter(new_root).cloned().collect(),
            jwt_authorities: told.jwt.iter().filter(|key| is_new(&heard, &Name::jwt(key), key)).cloned().collect(),
            // Without the feature the bundle stays as SPIRE knows it.
            wit_authorities: match self.settings.wit_key_type {
                Some(_) => told.wit.iter().filter(|key| is_new(&heard, &Name::wit(key), key)).cloned().collect(),
                None => Vec::new(),
            },
            ..Bundle::empty(self.settings.trust_domain.clone())
        };
        if addition != Bundle::empty(self.settings.trust_domain.clone()) {
            self.append(&addition, "").await?;
        }
        Ok(())
    }

    /// Whether nothing of that kind is left to be done.
    async fn mark_told(
        &mut self,
        kind: AuthorityKind,
        stored: &Bundle,
        told: &UpstreamAuthorities,
    ) -> Result<bool, AuthorityError> {
        // Which servers made known there what was lost, they make known again.
        let lost = told.put_back && kind != AuthorityKind::X509;
        let (told, now) = (told_by_id(told, kind), self.parts.clock.now());
        let before = self.news.before(kind);
        if told.is_empty() && kind == AuthorityKind::X509 {
            return Ok(true);
        }
        let mut settled = true;
        for (id, known) in stored_by_id(stored, kind) {
            if told.contains_key(&id) {
                self.news.leaving.remove(&id);
            }
            let step = match told.get(&id) {
                Some(above) if above.tainted && !known.tainted => TaintStep::Taint,
                // All had the time between the two to move off.
                None if known.tainted && before.get(&id).is_some_and(|before| before.tainted) => TaintStep::Revoke,
                None if known.tainted && self.was_from_above(kind, &id, &before, &told) => {
                    let until = now.saturating_add(LEAVE_SECONDS);
                    if now < *self.news.leaving.entry(id.clone()).or_insert(until) {
                        settled = false;
                        continue;
                    }
                    TaintStep::Revoke
                }
                // Revoked above, and this server was not there when it was tainted.
                None if !(lost || known.tainted) && known.ends > now && self.came_from_above(kind, &id, &before) => {
                    settled = false;
                    self.news.leaving.insert(id.clone(), now.saturating_add(LEAVE_SECONDS));
                    TaintStep::Taint
                }
                _ => continue,
            };
            if step == TaintStep::Revoke {
                self.news.leaving.remove(&id);
            }
            let id = match kind {
                AuthorityKind::X509 => super::journal::hex(&id),
                _ => String::from_utf8_lossy(&id).into_owned(),
            };
            let marking = self.parts.store.mark_authority(&self.settings.trust_domain, kind, step, &id);
            within("the datastore", marking, AuthorityError::Bundle).await?;
            let done = if step == TaintStep::Taint { "tainted" } else { "revoked" };
            tracing::info!(subsystem_name = SUBSYSTEM, authority_id = id, "{kind} authority {done} upstream");
        }
        Ok(settled)
    }

    /// Whether it was told from above, or something that this server made hung from it. A root of its own is neither. A key
    /// that is not this server's came from above where keys are known there: what was told before a restart nobody knows.
    fn was_from_above(&self, kind: AuthorityKind, id: &[u8], before: &ById, told: &ById) -> bool {
        if before.contains_key(id) {
            return true;
        }
        if let Some(tokens) = kind.tokens() {
            let own = self.journal.names(tokens);
            return !told.is_empty() && !own.contains(&tokens.name(&String::from_utf8_lossy(id)));
        }
        let signed = self.journal.entries().x509_c_as.iter().flat_map(|entry| &entry.upstream_chain);
        let signed: Vec<Arc<[u8]>> = signed.map(|der| Arc::from(der.as_ref())).collect();
        KeyIds::of(&signed).include(id)
    }

    fn came_from_above(&self, kind: AuthorityKind, id: &[u8], before: &ById) -> bool {
        let hangs = |held: &super::slots::Held<super::ActiveX509>| {
            held.tenure.status != Status::Old && KeyIds::of(held.authority.ca.upstream_chain()).include(id)
        };
        match kind {
            AuthorityKind::X509 => {
                let held = [&self.x509.current, &self.x509.next].into_iter().filter_map(|slot| slot.held.as_ref());
                before.contains_key(id) || held.into_iter().any(hangs)
            }
            _ => before.contains_key(id),
        }
    }

    /// The keys with which this server signs tokens, or is about to.
    fn own_keys(&self, kind: AuthorityKind) -> Vec<JwtAuthority> {
        let Some(tokens) = kind.tokens() else { return Vec::new() };
        let pair = self.keys(tokens);
        let held = [&pair.current, &pair.next].into_iter().filter_map(|slot| slot.held.as_ref());
        held.filter(|held| held.tenure.status != Status::Old)
            .map(|held| JwtAuthority {
                key_id: held.authority.key_id.clone(),
                public_key: held.authority.signer.public_key().spki_der().clone(),
                expires_at: held.authority.not_after,
                tainted: false,
            })
            .collect()
    }

    /// Own keys that nothing above knows, or that were lost there, are made known there. One that was revoked there is not.
    async fn publish_unknown(&self, told: &UpstreamAuthorities) -> Result<(), AuthorityError> {
        let Some(upstream) = self.parts.upstream.as_deref() else { return Ok(()) };
        for kind in [AuthorityKind::Jwt, AuthorityKind::Wit] {
            let revoked = if told.put_back { ById::new() } else { self.news.before(kind) };
            let told = told_by_id(told, kind);
            for key in self.own_keys(kind) {
                let id = key.key_id.as_bytes();
                if !told.is_empty() && !told.contains_key(id) && !revoked.contains_key(id) {
                    published_upstream(upstream, kind, &key).await?;
                }
            }
        }
        Ok(())
    }
}
