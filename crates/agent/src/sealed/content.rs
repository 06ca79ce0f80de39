//! What is kept, as messages: entries with their X.509-SVIDs and keys, bundles, and the JWT- and WIT-SVIDs in use.

use super::seal::Sealer;
use crate::cache::{BundleForms, Bundles, CachedJwt, CachedWit, JwtKey, Record, Snapshot, WorkloadSvid};
use crate::entry::WorkloadEntry;
use bytes::Bytes;
use finial_core::{EntryId, Secret, SpiffeId, TrustDomain, UnixSeconds};
use finial_proto::convert::{bundle_from_proto, bundle_to_proto, id_to_proto, selectors_to_proto};
use finial_proto::types;
use prost::Message;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zeroize::Zeroize;

/// What belongs to no entry.
#[derive(Clone, PartialEq, Message)]
struct About {
    #[prost(int64, tag = "1")]
    last_sync: i64,
}

/// An entry with its SVID.
#[derive(Clone, PartialEq, Message)]
struct Kept {
    #[prost(message, optional, tag = "1")]
    entry: Option<types::Entry>,
    #[prost(message, optional, tag = "2")]
    svid: Option<KeptSvid>,
    #[prost(int64, tag = "3")]
    last_used_ms: i64,
}

#[derive(Clone, PartialEq, Message)]
struct KeptSvid {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(bytes = "bytes", tag = "2")]
    chain: Bytes,
    /// Copied, and wiped by whoever is done with it.
    #[prost(bytes = "vec", tag = "3")]
    key: Vec<u8>,
    #[prost(int64, tag = "4")]
    not_after: i64,
    #[prost(int64, tag = "5")]
    rotate_at_ms: i64,
    #[prost(int64, tag = "6")]
    revision_number: i64,
    #[prost(int64, tag = "7")]
    created_at: i64,
    #[prost(bytes = "vec", repeated, tag = "8")]
    signed_by: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct KeptJwt {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    token: String,
    #[prost(string, tag = "3")]
    key_id: String,
    #[prost(string, repeated, tag = "4")]
    audience: Vec<String>,
    #[prost(string, tag = "5")]
    entry_id: String,
    #[prost(int64, tag = "6")]
    issued_at: i64,
    #[prost(int64, tag = "7")]
    expires_at: i64,
    #[prost(int64, tag = "8")]
    rotate_at_ms: i64,
    #[prost(int64, tag = "9")]
    last_used_ms: i64,
}

#[derive(Clone, PartialEq, Message)]
struct KeptWit {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    token: String,
    /// Copied, and wiped by whoever is done with it.
    #[prost(string, tag = "3")]
    key: String,
    #[prost(string, tag = "4")]
    entry_id: String,
    #[prost(int64, tag = "5")]
    expires_at: i64,
    #[prost(int64, tag = "6")]
    rotate_at_ms: i64,
    #[prost(int64, tag = "7")]
    revision_number: i64,
    #[prost(int64, tag = "8")]
    created_at: i64,
    #[prost(string, optional, tag = "9")]
    key_id: Option<String>,
}

/// One of them.
#[derive(Clone, PartialEq, Message)]
struct Item {
    #[prost(message, optional, tag = "1")]
    about: Option<About>,
    #[prost(message, optional, tag = "2")]
    bundle: Option<types::Bundle>,
    #[prost(message, optional, tag = "3")]
    kept: Option<Kept>,
    #[prost(message, optional, tag = "4")]
    jwt: Option<KeptJwt>,
    #[prost(message, optional, tag = "5")]
    wit: Option<KeptWit>,
}

/// Wipes what is secret in an item.
struct Secrets<'a>(&'a mut Item);

impl Drop for Secrets<'_> {
    fn drop(&mut self) {
        if let Some(svid) = self.0.kept.as_mut().and_then(|kept| kept.svid.as_mut()) {
            svid.key.zeroize();
        }
        if let Some(jwt) = &mut self.0.jwt {
            jwt.token.zeroize();
        }
        if let Some(wit) = &mut self.0.wit {
            wit.key.zeroize();
        }
    }
}

/// What is to be kept.
pub(super) struct Contents {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) jwts: Vec<(Arc<CachedJwt>, i64)>,
    /// The least recently used first.
    pub(super) wits: Vec<(EntryId, Arc<CachedWit>)>,
    pub(super) last_sync: UnixSeconds,
    pub(super) now: UnixSeconds,
}

/// Writes all of it, or the most useful part if it is too much.
pub(super) fn write<W: Write>(to: &mut Sealer<W>, contents: &Contents, bytes_max: u64) -> io::Result<usize> {
    let mut left_out = 0;
    let mut put = |mut item: Item| -> io::Result<()> {
        let item = Secrets(&mut item);
        let length = item.0.encoded_len();
        let room = to.len() + (length as u64) < bytes_max;
        // The buffer has room for the longest one.
        if !room || !to.item(length, |frame| item.0.encode_raw(frame))? {
            left_out += 1;
        }
        Ok(())
    };
    put(Item { about: Some(About { last_sync: contents.last_sync }), ..Item::default() })?;
    let bundles = &contents.snapshot.bundles;
    for bundle in std::iter::once(&bundles.own).chain(bundles.federated.values()) {
        put(Item { bundle: Some(bundle_to_proto(&bundle.bundle)), ..Item::default() })?;
    }
    // Those with SVIDs first: of the others there is nothing to serve, and the server tells of them again.
    let (with, without): (Vec<&Record>, Vec<&Record>) =
        contents.snapshot.records.iter().partition(|r| r.svid.as_ref().is_some_and(|s| s.not_after > contents.now));
    for record in with {
        put(Item { kept: Some(kept(record, record.svid.as_deref())), ..Item::default() })?;
    }
    for (jwt, last_used_ms) in contents.jwts.iter().filter(|(jwt, _)| jwt.expires_at > contents.now) {
        put(Item { jwt: Some(kept_jwt(jwt, *last_used_ms)), ..Item::default() })?;
    }
    let known = |id| contents.snapshot.record(id).is_some();
    for (id, wit) in contents.wits.iter().filter(|(id, wit)| wit.expires_at > contents.now && known(id)) {
        put(Item { wit: Some(kept_wit(id, wit)), ..Item::default() })?;
    }
    for record in without {
        put(Item { kept: Some(kept(record, None)), ..Item::default() })?;
    }
    Ok(left_out)
}

fn kept(record: &Record, svid: Option<&WorkloadSvid>) -> Kept {
    Kept {
        entry: Some(entry_to_wire(&record.entry)),
        svid: svid.map(|svid| KeptSvid {
            id: svid.id.as_str().to_owned(),
            chain: svid.chain.clone(),
            key: svid.key.to_vec(),
            not_after: svid.not_after,
            rotate_at_ms: svid.rotate_at_ms,
            revision_number: svid.revision_number,
            created_at: svid.created_at,
            signed_by: svid.signed_by.iter().map(|key| key.to_vec()).collect(),
        }),
        last_used_ms: record.last_used_ms.load(Ordering::Relaxed),
    }
}

fn kept_jwt(jwt: &CachedJwt, last_used_ms: i64) -> KeptJwt {
    KeptJwt {
        id: jwt.id.as_str().to_owned(),
        token: jwt.token.clone(),
        key_id: jwt.key_id.clone(),
        audience: jwt.audience.clone(),
        entry_id: jwt.entry_id.as_str().to_owned(),
        issued_at: jwt.issued_at,
        expires_at: jwt.expires_at,
        rotate_at_ms: jwt.rotate_at_ms,
        last_used_ms,
    }
}

fn kept_wit(entry_id: &EntryId, wit: &CachedWit) -> KeptWit {
    KeptWit {
        id: wit.id.as_str().to_owned(),
        token: wit.token.clone(),
        key: wit.key.expose().clone(),
        entry_id: entry_id.as_str().to_owned(),
        expires_at: wit.expires_at,
        rotate_at_ms: wit.rotate_at_ms,
        revision_number: wit.revision_number,
        created_at: wit.created_at,
        key_id: wit.key_id.clone(),
    }
}

/// As the server sends it to an agent. Whoever adds a field must keep it, too.
fn entry_to_wire(entry: &WorkloadEntry) -> types::Entry {
    let WorkloadEntry {
        id,
        spiffe_id,
        selectors,
        federates_with,
        revision_number,
        created_at,
        hint,
        store_svid,
        disable_x509_svid_prefetch,
        jwt_svid_include_jti,
        admin,
        downstream,
    } = entry;
    types::Entry {
        id: id.as_str().to_owned(),
        spiffe_id: Some(id_to_proto(spiffe_id)),
        selectors: selectors_to_proto(&selectors.iter().collect::<Vec<_>>()),
        federates_with: federates_with.iter().map(|td| td.as_str().to_owned()).collect(),
        revision_number: *revision_number,
        created_at: *created_at,
        hint: hint.clone(),
        store_svid: *store_svid,
        admin: *admin,
        downstream: *downstream,
        additional_attributes: Some(types::entry::AdditionalAttributes {
            disable_x509_svid_prefetch: *disable_x509_svid_prefetch,
            jwt_svid_include_jti: *jwt_svid_include_jti,
        }),
        ..Default::default()
    }
}

/// What was kept and is still of use.
#[derive(Default)]
pub(crate) struct Restored {
    pub(crate) entries: BTreeMap<EntryId, Arc<WorkloadEntry>>,
    pub(crate) svids: Vec<(EntryId, Arc<WorkloadSvid>)>,
    /// When workloads asked last, milliseconds since the epoch.
    pub(crate) used: Vec<(EntryId, i64)>,
    pub(crate) own: Option<Arc<BundleForms>>,
    pub(crate) federated: BTreeMap<TrustDomain, Arc<BundleForms>>,
    pub(crate) jwts: Vec<(JwtKey, Arc<CachedJwt>, i64)>,
    /// The least recently used first.
    pub(crate) wits: Vec<(EntryId, CachedWit)>,
    pub(crate) last_sync: UnixSeconds,
    /// Of SVIDs, all kinds, that ended meanwhile.
    pub(crate) ended: usize,
}

impl Restored {
    /// The bundles, if there are any.
    pub(crate) fn bundles(&self) -> Option<Bundles> {
        Some(Bundles { own: self.own.clone()?, federated: self.federated.clone() })
    }

    /// Takes an item; `false` if it makes no sense.
    pub(super) fn take(&mut self, bytes: &[u8], own: &TrustDomain, now: UnixSeconds) -> bool {
        let Ok(mut item) = Item::decode(bytes) else { return false };
        let item = Secrets(&mut item);
        let Item { about, bundle, kept, jwt, wit } = &mut *item.0;
        if let Some(about) = about {
            self.last_sync = about.last_sync.min(now);
        }
        let bundle = bundle.as_ref().is_none_or(|bundle| self.take_bundle(bundle, own).is_some());
        let kept = kept.as_mut().is_none_or(|kept| self.take_kept(kept, now).is_some());
        let jwt = jwt.as_mut().is_none_or(|jwt| self.take_jwt(jwt, now).is_some());
        // An item in which there is none of these is of a later version.
        bundle && kept && jwt && wit.as_mut().is_none_or(|wit| self.take_wit(wit, now).is_some())
    }

    fn take_bundle(&mut self, bundle: &types::Bundle, own: &TrustDomain) -> Option<()> {
        let forms = BundleForms::new(bundle_from_proto(bundle).ok()?).ok()?;
        let domain = forms.bundle.trust_domain.clone();
        if domain == *own {
            self.own = Some(Arc::new(forms));
        } else {
            self.federated.insert(domain, Arc::new(forms));
        }
        Some(())
    }

    fn take_kept(&mut self, kept: &mut Kept, now: UnixSeconds) -> Option<()> {
        let entry = WorkloadEntry::try_from(kept.entry.take()?).ok()?;
        let id = entry.id.clone();
        self.used.push((id.clone(), kept.last_used_ms));
        let entry = Arc::new(entry);
        self.entries.insert(id.clone(), entry.clone());
        let Some(svid) = &mut kept.svid else { return Some(()) };
        if svid.not_after <= now {
            self.ended += 1;
            return Some(());
        }
        let svid = WorkloadSvid {
            id: SpiffeId::parse(&svid.id).ok()?,
            chain: svid.chain.clone(),
            key: crate::cache::key_bytes(Arc::new(Secret::new(std::mem::take(&mut svid.key)))),
            not_after: svid.not_after,
            rotate_at_ms: svid.rotate_at_ms,
            revision_number: svid.revision_number,
            created_at: svid.created_at,
            signed_by: std::mem::take(&mut svid.signed_by).into_iter().map(Into::into).collect(),
            issued_in: 0,
        };
        if svid.is_for(&entry) {
            self.svids.push((id, Arc::new(svid)));
        }
        Some(())
    }

    fn take_jwt(&mut self, jwt: &mut KeptJwt, now: UnixSeconds) -> Option<()> {
        if jwt.expires_at <= now {
            self.ended += 1;
            return Some(());
        }
        let svid = CachedJwt {
            id: SpiffeId::parse(&jwt.id).ok()?,
            token: std::mem::take(&mut jwt.token),
            key_id: std::mem::take(&mut jwt.key_id),
            audience: std::mem::take(&mut jwt.audience),
            entry_id: EntryId::parse(&jwt.entry_id).ok()?,
            issued_at: jwt.issued_at,
            expires_at: jwt.expires_at,
            rotate_at_ms: jwt.rotate_at_ms,
        };
        self.jwts.push((JwtKey::new(&svid.id, &svid.audience), Arc::new(svid), jwt.last_used_ms));
        Some(())
    }

    fn take_wit(&mut self, wit: &mut KeptWit, now: UnixSeconds) -> Option<()> {
        if wit.expires_at <= now {
            self.ended += 1;
            return Some(());
        }
        let svid = CachedWit {
            id: SpiffeId::parse(&wit.id).ok()?,
            token: std::mem::take(&mut wit.token),
            key: Secret::new(std::mem::take(&mut wit.key)),
            expires_at: wit.expires_at,
            rotate_at_ms: wit.rotate_at_ms,
            revision_number: wit.revision_number,
            created_at: wit.created_at,
            key_id: wit.key_id.take(),
        };
        self.wits.push((EntryId::parse(&wit.entry_id).ok()?, svid));
        Some(())
    }
}
