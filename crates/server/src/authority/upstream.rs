//! What is heard from, and told to, an upstream authority between signatures.

use super::manager::{AuthorityManager, within};
use super::plan::Status;
use super::store::TaintStep;
use super::{AuthorityError, AuthorityKind, KeyIds, SUBSYSTEM};
use finial_core::{Bundle, ErrorKind, JwtAuthority, UnixSeconds, X509Authority};
use finial_crypto::Certificate;
use finial_plugin::{PluginKind, UpstreamAuthorities, UpstreamAuthority};
use std::collections::BTreeMap;
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
    /// Until when what is gone above stays here, tainted.
    leaving: BTreeMap<Vec<u8>, UnixSeconds>,
}

impl News {
    /// The bundle lost something: all that was taken is to be taken again.
    pub(super) fn start_anew(&mut self) {
        self.told = self.told.take().or_else(|| self.taken.take());
        self.taken = None;
    }

    /// What was taken before is not added again: it may have been revoked here.
    pub(super) fn was_taken(&self, kind: AuthorityKind, key: &JwtAuthority) -> bool {
        self.before(kind).contains_key(key.key_id.as_bytes())
    }

    fn before(&self, kind: AuthorityKind) -> ById {
        self.taken.as_ref().map(|taken| told_by_id(taken, kind)).unwrap_or_default()
    }
}

/// Publishes a key upstream. Returns what belongs into the bundle: all that is known above, or the key alone where
/// nothing above knows of such keys.
pub(crate) async fn published_upstream(
    upstream: &dyn UpstreamAuthority,
    kind: AuthorityKind,
    key: JwtAuthority,
) -> Result<Vec<JwtAuthority>, AuthorityError> {
    let refused = |e: finial_plugin::PluginError| {
        AuthorityError::Publish(kind, e.of(PluginKind::UpstreamAuthority, upstream.name()))
    };
    let publishing = match kind {
        AuthorityKind::Wit => upstream.publish_wit_key(&key),
        _ => upstream.publish_jwt_key(&key),
    };
    match within("the upstream authority", publishing, refused).await {
        Err(error) if error.kind() == ErrorKind::Unimplemented => Ok(vec![key]),
        Ok(mut keys) => {
            if keys.iter().all(|known| known.key_id != key.key_id) {
                keys.push(key);
            }
            Ok(keys)
        }
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

impl AuthorityManager {
    /// Takes over what the upstream authority said last; what fails is tried again with the next check.
    pub(super) async fn heed_upstream(&mut self) -> Result<(), AuthorityError> {
        let Some(told) = self.news.told.clone() else { return Ok(()) };
        let taken = self.take(&told).await;
        match &taken {
            Ok(true) => {
                self.news.told = None;
                self.news.taken = Some(told);
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
        let new_keys = |kind, keys: &[JwtAuthority]| -> Vec<JwtAuthority> {
            let new = |key: &&JwtAuthority| !key.tainted && !self.news.was_taken(kind, key);
            keys.iter().filter(new).cloned().collect()
        };
        let before_x509 = self.news.before(AuthorityKind::X509);
        let new_root = |root: &&X509Authority| {
            let known = roots_by_id(std::slice::from_ref(*root));
            !root.tainted && !known.keys().any(|id| before_x509.contains_key(id))
        };
        let addition = Bundle {
            x509_authorities: told.x509.iter().filter(new_root).cloned().collect(),
            jwt_authorities: new_keys(AuthorityKind::Jwt, &told.jwt),
            // Without the feature the bundle stays as SPIRE knows it.
            wit_authorities: match self.settings.wit_key_type {
                Some(_) => new_keys(AuthorityKind::Wit, &told.wit),
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
        let (told, now) = (told_by_id(told, kind), self.parts.clock.now());
        let before = self.news.before(kind);
        if told.is_empty() && kind == AuthorityKind::X509 {
            return Ok(true);
        }
        let own = self.own_keys(kind);
        let mut settled = true;
        for (id, known) in stored_by_id(stored, kind) {
            let from_above = kind == AuthorityKind::X509 || before.contains_key(&id);
            let step = match told.get(&id) {
                Some(above) if above.tainted && !known.tainted => TaintStep::Taint,
                None if known.tainted && self.news.leaving.get(&id).is_some_and(|until| now < *until) => {
                    settled = false;
                    continue;
                }
                None if known.tainted && from_above => TaintStep::Revoke,
                // Revoked above, and this server was not there when it was tainted.
                None if !known.tainted && known.ends > now && self.came_from_above(kind, &id, &before, &own) => {
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

    fn came_from_above(&self, kind: AuthorityKind, id: &[u8], before: &ById, own: &[JwtAuthority]) -> bool {
        let hangs = |held: &super::slots::Held<super::ActiveX509>| {
            held.tenure.status != Status::Old && KeyIds::of(held.authority.ca.upstream_chain()).include(id)
        };
        match kind {
            AuthorityKind::X509 => {
                let held = [&self.x509.current, &self.x509.next].into_iter().filter_map(|slot| slot.held.as_ref());
                before.contains_key(id) || held.into_iter().any(hangs)
            }
            _ => before.contains_key(id) && own.iter().all(|key| key.key_id.as_bytes() != id),
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

    /// Own keys that nothing above knows (any more) are made known there.
    async fn publish_unknown(&self, told: &UpstreamAuthorities) -> Result<(), AuthorityError> {
        let Some(upstream) = self.parts.upstream.as_deref() else { return Ok(()) };
        for kind in [AuthorityKind::Jwt, AuthorityKind::Wit] {
            let told = told_by_id(told, kind);
            for key in self.own_keys(kind) {
                if !told.is_empty() && !told.contains_key(key.key_id.as_bytes()) {
                    published_upstream(upstream, kind, key).await?;
                }
            }
        }
        Ok(())
    }
}
