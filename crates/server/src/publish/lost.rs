//! What a change of the datastore's history took from the own bundle, and what is certain of it.
//!
//! An authority that was known and is not there may be one that this history never had, or one that was tainted and revoked
//! in it while this server was cut off. Every change of the bundle makes its number grow, so a bundle that had an authority
//! and has it no more, after a taint and a revocation, has a number two above the lowest that it can have come with. That
//! number is the old history's: it holds for what only this server adds, and it added it there alone.

use finial_core::{Bundle, JwtAuthority, X509Authority};
use std::collections::{BTreeMap, BTreeSet};

/// The taint and the revocation.
const CHANGES_TO_REVOKE: u64 = 2;

/// An authority by its certificate, or by kind and the ID of its key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Name {
    X509(Box<[u8]>),
    Jwt(Box<str>),
    Wit(Box<str>),
}

impl Name {
    pub(crate) fn x509(root: &X509Authority) -> Self {
        Self::X509((*root.der).into())
    }

    pub(crate) fn jwt(key: &JwtAuthority) -> Self {
        Self::of_jwt(&key.key_id)
    }

    pub(crate) fn wit(key: &JwtAuthority) -> Self {
        Self::of_wit(&key.key_id)
    }

    pub(crate) fn of_jwt(key_id: &str) -> Self {
        Self::Jwt(key_id.into())
    }

    pub(crate) fn of_wit(key_id: &str) -> Self {
        Self::Wit(key_id.into())
    }

    fn all(bundle: &Bundle) -> impl Iterator<Item = Self> + '_ {
        let roots = bundle.x509_authorities.iter().map(Self::x509);
        let keys = bundle.jwt_authorities.iter().map(Self::jwt);
        roots.chain(keys).chain(bundle.wit_authorities.iter().map(Self::wit))
    }
}

/// The authorities of which this holds, and the others.
pub(crate) fn split(bundle: &Bundle, holds: impl Fn(&Name) -> bool) -> (Bundle, Bundle) {
    let (mut with, mut without) =
        (Bundle::empty(bundle.trust_domain.clone()), Bundle::empty(bundle.trust_domain.clone()));
    for root in &bundle.x509_authorities {
        let side = if holds(&Name::x509(root)) { &mut with } else { &mut without };
        side.x509_authorities.push(root.clone());
    }
    for key in &bundle.jwt_authorities {
        let side = if holds(&Name::jwt(key)) { &mut with } else { &mut without };
        side.jwt_authorities.push(key.clone());
    }
    for key in &bundle.wit_authorities {
        let side = if holds(&Name::wit(key)) { &mut with } else { &mut without };
        side.wit_authorities.push(key.clone());
    }
    (with, without)
}

/// Puts the authorities of the other into the first.
pub(crate) fn join(bundle: &mut Bundle, other: &Bundle) {
    bundle.x509_authorities.extend_from_slice(&other.x509_authorities);
    bundle.jwt_authorities.extend_from_slice(&other.jwt_authorities);
    bundle.wit_authorities.extend_from_slice(&other.wit_authorities);
}

/// The lowest number of the own bundle with which each of its authorities can have come, in the history that is known; 0
/// where nobody saw it come.
#[derive(Default)]
pub(super) struct Arrivals(BTreeMap<Name, u64>);

impl Arrivals {
    /// The own bundle was `known` and is `now`, in one history.
    pub(super) fn note(&mut self, known: Option<&Bundle>, now: &Bundle) {
        let next = known.map_or(0, |known| known.sequence_number.saturating_add(1));
        let old: BTreeSet<Name> = known.into_iter().flat_map(Name::all).collect();
        let since = |name: &Name| if old.contains(name) { self.since(name) } else { next };
        self.0 = Name::all(now).map(|name| (name.clone(), since(&name))).collect();
    }

    fn since(&self, name: &Name) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

/// Authorities that were there, and not tainted, and are not in the history that is known now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    /// This history never had them, unless others than who made them can add them as well.
    pub(crate) never_there: Bundle,
    /// There is no own bundle in this history: it never had any authority.
    pub(crate) nothing_there: bool,
    /// This history may have had them, and then they were revoked in it; `None` once it was decided what becomes of them.
    pub(crate) unclear: Option<Bundle>,
}

impl Lost {
    pub(super) fn of(before: &Bundle, now: Option<&Bundle>, arrivals: &Arrivals) -> Self {
        let mut before = before.clone();
        before.x509_authorities.retain(|root| !root.tainted);
        before.jwt_authorities.retain(|key| !key.tainted);
        before.wit_authorities.retain(|key| !key.tainted);
        let there: BTreeSet<Name> = now.into_iter().flat_map(Name::all).collect();
        let (gone, _) = split(&before, |name| !there.contains(name));
        // The own bundle is never deleted: what has none never had any.
        let number = now.map_or(0, |now| now.sequence_number);
        let revocable = |name: &Name| number >= arrivals.since(name).saturating_add(CHANGES_TO_REVOKE);
        let (unclear, never_there) = split(&gone, revocable);
        Self { never_there, nothing_there: now.is_none(), unclear: Some(unclear) }
    }

    /// All of them.
    pub(crate) fn names(&self) -> BTreeSet<Name> {
        std::iter::once(&self.never_there).chain(&self.unclear).flat_map(Name::all).collect()
    }

    /// All of them.
    pub(super) fn add_to(&self, bundle: &mut Bundle) {
        join(bundle, &self.never_there);
        if let Some(unclear) = &self.unclear {
            join(bundle, unclear);
        }
    }
}
