//! The two slots of each kind of authority, and how they come back from the journal after a restart.

use super::journal::hex;
use super::plan::{self, Status, Tenure};
use super::tokens::TokenKind;
use super::{ActiveX509, SUBSYSTEM};
use crate::issue::Rfc3339;
use finial_core::{Bundle, UnixSeconds};
use finial_crypto::{Certificate, PublicKey, Signer, X509Ca};
use finial_proto::journal as pb;
use std::sync::Arc;

/// The name of a slot; keys of the key manager carry it, and the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotName {
    A,
    B,
}

impl SlotName {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::B => "B",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "A" => Some(Self::A),
            "B" => Some(Self::B),
            _ => None,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    pub(super) fn x509_key(self) -> String {
        format!("x509-CA-{}", self.as_str())
    }

    pub(super) fn token_key(self, kind: TokenKind) -> String {
        format!("{}-Signer-{}", kind.as_str(), self.as_str())
    }
}

/// A key that signs tokens, or may come to.
pub(super) struct TokenKey {
    pub(super) key_id: String,
    pub(super) signer: Arc<dyn Signer>,
    pub(super) not_after: UnixSeconds,
}

/// What an authority of any kind is called.
pub(super) trait Named {
    /// The subject key ID in hex, or the ID of the key.
    fn authority_id(&self) -> &str;

    /// The subject key ID of what signed it, in hex; empty for keys.
    fn upstream_authority_id(&self) -> &str {
        ""
    }
}

impl Named for ActiveX509 {
    fn authority_id(&self) -> &str {
        &self.authority_id
    }

    fn upstream_authority_id(&self) -> &str {
        &self.upstream_authority_id
    }
}

impl Named for TokenKey {
    fn authority_id(&self) -> &str {
        &self.key_id
    }
}

/// An authority in a slot.
pub(super) struct Held<A> {
    pub(super) authority: Arc<A>,
    pub(super) tenure: Tenure,
}

/// A slot; empty until it is used for the first time.
pub(super) struct Slot<A> {
    pub(super) name: SlotName,
    pub(super) held: Option<Held<A>>,
}

/// The slot that signs, or is about to, and the other one.
pub(super) struct Pair<A> {
    pub(super) current: Slot<A>,
    pub(super) next: Slot<A>,
}

impl<A> Pair<A> {
    pub(super) fn tenures(&self) -> plan::Slots {
        let tenure = |slot: &Slot<A>| slot.held.as_ref().map(|h| h.tenure);
        plan::Slots { current: tenure(&self.current), next: tenure(&self.next) }
    }

    /// Chooses from usable slots, newest first: the newest active one is current, the newest other one is next. Without
    /// an active one the newest takes its place.
    fn choose(newest_first: impl Iterator<Item = Slot<A>>) -> Self {
        let (mut current, mut next): (Option<Slot<A>>, Option<Slot<A>>) = (None, None);
        for slot in newest_first {
            let active = slot.held.as_ref().is_some_and(|h| h.tenure.status == Status::Active);
            let place = if active { &mut current } else { &mut next };
            if place.is_none() {
                *place = Some(slot);
            }
        }
        let current = current.or_else(|| next.take()).unwrap_or(Slot { name: SlotName::A, held: None });
        let other = current.name.other();
        let next = next.filter(|n| n.name == other).unwrap_or(Slot { name: other, held: None });
        Self { current, next }
    }
}

/// What slots are loaded from.
pub(super) struct Sources<'a> {
    pub(super) keys: &'a [(String, Arc<dyn Signer>)],
    /// The trust domain's bundle: an authority that is not in it (after a restore of the datastore, say) is not used,
    /// as nobody could verify what it signs.
    pub(super) bundle: Option<&'a Bundle>,
    /// X.509 authorities hang from an upstream one: they are not in the bundle themselves.
    pub(super) upstream: bool,
    pub(super) now: UnixSeconds,
}

impl Sources<'_> {
    fn key(&self, name: &str, public_key: &PublicKey) -> Result<Arc<dyn Signer>, &'static str> {
        let (_, signer) = self.keys.iter().find(|(n, _)| n == name).ok_or("no key manager key")?;
        if signer.public_key() != public_key {
            return Err("public key does not match key manager key");
        }
        Ok(signer.clone())
    }

    fn slot_name(&self, slot_id: &str, not_after: UnixSeconds) -> Result<SlotName, &'static str> {
        let name = SlotName::parse(slot_id).ok_or("no slot id")?;
        if not_after < self.now {
            return Err("slot expired");
        }
        Ok(name)
    }

    /// The X.509 slots.
    pub(super) fn x509(&self, entries: &[pb::X509caEntry]) -> Pair<ActiveX509> {
        Pair::choose(entries.iter().rev().filter_map(|entry| match self.x509_slot(entry) {
            Ok(slot) => slot,
            Err(reason) => {
                tracing::warn!(
                    subsystem_name = SUBSYSTEM,
                    error = reason,
                    slot = %entry.slot_id,
                    issued_at = %Rfc3339(entry.issued_at),
                    status = entry.status().as_str_name(),
                    local_authority_id = %entry.authority_id,
                    upstream_authority_id = %entry.upstream_authority_id,
                    "X509CA slot unusable"
                );
                None
            }
        }))
    }

    fn x509_slot(&self, entry: &pb::X509caEntry) -> Result<Option<Slot<ActiveX509>>, &'static str> {
        let known = self.bundle.is_some_and(|b| b.x509_authorities.iter().any(|a| *a.der == *entry.certificate));
        if !known && !self.upstream {
            return Ok(None);
        }
        let name = self.slot_name(&entry.slot_id, entry.not_after)?;
        let certificate = Certificate::parse(entry.certificate.as_ref()).map_err(|_| "malformed certificate")?;
        let public_key = certificate.public_key().map_err(|_| "malformed public key")?;
        let signer = self.key(&name.x509_key(), &public_key)?;
        let chain = entry.upstream_chain.iter().map(|c| Arc::from(c.as_ref())).collect();
        let ca = X509Ca::new(signer, certificate.der().clone(), chain).map_err(|_| "unusable certificate")?;
        // Less than its certificate says, where what it hangs from ends before.
        let ca = if entry.not_after > 0 { ca.ending(entry.not_after) } else { ca };
        let tenure =
            Tenure { status: Status::from_proto(entry.status), issued_at: entry.issued_at, not_after: ca.not_after() };
        let authority = ActiveX509 {
            authority_id: hex(&ca.subject_key_id()),
            upstream_authority_id: hex(certificate.authority_key_id().unwrap_or_default()),
            ca,
        };
        Ok(Some(Slot { name, held: Some(Held { authority: Arc::new(authority), tenure }) }))
    }

    /// The slots of keys that sign tokens.
    pub(super) fn keys<'e>(
        &self,
        kind: TokenKind,
        entries: impl DoubleEndedIterator<Item = &'e pb::JwtKeyEntry>,
    ) -> Pair<TokenKey> {
        Pair::choose(entries.rev().filter_map(|entry| match self.key_slot(kind, entry) {
            Ok(slot) => slot,
            Err(reason) => {
                tracing::warn!(
                    subsystem_name = SUBSYSTEM,
                    error = reason,
                    slot = %entry.slot_id,
                    issued_at = %Rfc3339(entry.issued_at),
                    status = entry.status().as_str_name(),
                    local_authority_id = %entry.authority_id,
                    "{} key slot unusable",
                    kind.as_str()
                );
                None
            }
        }))
    }

    fn key_slot(&self, kind: TokenKind, entry: &pb::JwtKeyEntry) -> Result<Option<Slot<TokenKey>>, &'static str> {
        if !self.bundle.is_some_and(|b| kind.of(b).iter().any(|a| a.key_id == entry.kid)) {
            return Ok(None);
        }
        let name = self.slot_name(&entry.slot_id, entry.not_after)?;
        let public_key = PublicKey::from_spki(&entry.public_key).map_err(|_| "malformed public key")?;
        let signer = self.key(&name.token_key(kind), &public_key)?;
        let tenure =
            Tenure { status: Status::from_proto(entry.status), issued_at: entry.issued_at, not_after: entry.not_after };
        let authority = TokenKey { key_id: entry.kid.clone(), signer, not_after: entry.not_after };
        Ok(Some(Slot { name, held: Some(Held { authority: Arc::new(authority), tenure }) }))
    }
}
