//! A world for tests: a datastore and a key manager in memory that can be made to fail at any call, and a clock.

use crate::authority::{
    Authorities, AuthorityKind, AuthorityManager, AuthorityParts, AuthoritySettings, AuthorityStore, TaintStep,
};
use crate::compose::Composers;
use crate::issue::{Issuer, IssuerSettings};
use crate::publish::BundleFeed;
use async_trait::async_trait;
use finial_core::{Bundle, Clock, KeyType, ManualClock, TrustDomain};
use finial_crypto::{DistinguishedName, PrivateKey, Signer};
use finial_plugin::{KeyManager, PluginError};
use finial_runtime::Metrics;
use finial_store::{CaJournal, Rotation, RotationNote, StoreError};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

pub(crate) const START: i64 = 1_700_000_000;
pub(crate) const HOUR: i64 = 3600;

/// When a call fails: before it had an effect, or after (the answer got lost).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    Request,
    Answer,
}

/// Fails one call, or all.
#[derive(Default)]
pub(crate) struct Faults {
    pub(crate) calls: usize,
    pub(crate) fail_at: Option<(usize, Lost)>,
    pub(crate) fail_all: bool,
    pub(crate) fail_journal_writes: bool,
}

impl Faults {
    fn next(&mut self) -> Option<Lost> {
        let call = self.calls;
        self.calls += 1;
        if self.fail_all {
            return Some(Lost::Request);
        }
        self.fail_at.filter(|(at, _)| *at == call).map(|(_, lost)| lost)
    }
}

#[derive(Clone, Default)]
pub(crate) struct Data {
    pub(crate) bundles: BTreeMap<String, Bundle>,
    pub(crate) journals: BTreeMap<i64, CaJournal>,
    pub(crate) keys: BTreeMap<String, PrivateKey>,
    /// Orders to all servers, and what these told.
    pub(crate) rotations: Vec<Rotation>,
    pub(crate) notes: BTreeMap<(i64, i64), (Vec<u8>, i64)>,
}

/// Datastore and key manager in one.
#[derive(Default)]
pub(crate) struct Memory {
    pub(crate) faults: Mutex<Faults>,
    pub(crate) data: Mutex<Data>,
}

impl Memory {
    fn act<T, E>(&self, error: impl FnOnce() -> E, act: impl FnOnce(&mut Data) -> T) -> Result<T, E> {
        let lost = self.faults.lock().unwrap().next();
        if lost == Some(Lost::Request) {
            return Err(error());
        }
        let result = act(&mut self.data.lock().unwrap());
        if lost.is_some() { Err(error()) } else { Ok(result) }
    }

    fn store<T>(&self, act: impl FnOnce(&mut Data) -> T) -> Result<T, StoreError> {
        self.act(|| StoreError::Busy(1), act)
    }

    fn key_manager<T>(&self, act: impl FnOnce(&mut Data) -> T) -> Result<T, PluginError> {
        self.act(|| PluginError::internal("key manager is away"), act)
    }
}

/// As the datastore does it: what is there already, tainted or not, stays as it is.
fn extend<T: Clone, I: PartialEq>(known: &mut Vec<T>, new: &[T], id: impl Fn(&T) -> &I) -> bool {
    let before = known.len();
    for item in new {
        if !known.iter().any(|one| id(one) == id(item)) {
            known.push(item.clone());
        }
    }
    known.len() > before
}

/// As the datastore does it.
fn mark(bundle: &mut Bundle, kind: AuthorityKind, step: TaintStep, id: &str) -> Result<(), StoreError> {
    let refuse = |text: &str| Err(StoreError::InvalidArgument(text.into()));
    bundle.sequence_number += 1;
    if kind == AuthorityKind::X509 {
        let is_it = |der: &Arc<[u8]>| {
            let certificate = finial_crypto::Certificate::parse(der.clone()).unwrap();
            finial_crypto::hex(certificate.subject_key_id().unwrap()) == id
        };
        let tainted = bundle.x509_authorities.iter().any(|a| is_it(&a.der) && a.tainted);
        match (step, tainted) {
            (TaintStep::Taint, true) => return refuse("root CA is already tainted"),
            (TaintStep::Revoke, false) => return refuse("it is not possible to revoke an untainted root CA"),
            (TaintStep::Revoke, true) => bundle.x509_authorities.retain(|a| !is_it(&a.der)),
            (TaintStep::Taint, false) => {
                bundle.x509_authorities.iter_mut().filter(|a| is_it(&a.der)).for_each(|a| a.tainted = true);
            }
        }
        return Ok(());
    }
    let keys = if kind == AuthorityKind::Jwt { &mut bundle.jwt_authorities } else { &mut bundle.wit_authorities };
    let tainted = keys.iter().any(|k| k.key_id == id && k.tainted);
    match (step, tainted) {
        (TaintStep::Taint, true) => return refuse("key is already tainted"),
        (TaintStep::Revoke, false) => return refuse("it is not possible to revoke an untainted key"),
        (TaintStep::Revoke, true) => keys.retain(|k| k.key_id != id),
        (TaintStep::Taint, false) => keys.iter_mut().filter(|k| k.key_id == id).for_each(|k| k.tainted = true),
    }
    Ok(())
}

#[async_trait]
impl AuthorityStore for Memory {
    async fn bundle(&self, trust_domain: &TrustDomain) -> Result<Option<Bundle>, StoreError> {
        self.store(|d| d.bundles.get(trust_domain.as_str()).cloned())
    }

    async fn bundles(&self) -> Result<Vec<Bundle>, StoreError> {
        self.store(|d| d.bundles.values().cloned().collect())
    }

    async fn bundle_rows(&self) -> Result<Vec<(TrustDomain, i64)>, StoreError> {
        self.store(|d| d.bundles.values().map(|bundle| bundle.trust_domain.clone()).zip(1..).collect())
    }

    async fn append_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError> {
        self.store(|d| {
            let name = bundle.trust_domain.as_str().to_owned();
            let known = d.bundles.entry(name).or_insert_with(|| Bundle::empty(bundle.trust_domain.clone()));
            let added = extend(&mut known.x509_authorities, &bundle.x509_authorities, |root| &root.der)
                | extend(&mut known.jwt_authorities, &bundle.jwt_authorities, |key| &key.key_id)
                | extend(&mut known.wit_authorities, &bundle.wit_authorities, |key| &key.key_id);
            known.sequence_number += u64::from(added);
            known.clone()
        })
    }

    async fn mark_authority(
        &self,
        trust_domain: &TrustDomain,
        kind: AuthorityKind,
        step: TaintStep,
        id: &str,
    ) -> Result<(), StoreError> {
        self.store(|d| mark(d.bundles.get_mut(trust_domain.as_str()).ok_or(StoreError::NotFound)?, kind, step, id))?
    }

    async fn journal(&self, active_x509_authority_id: &str) -> Result<Option<CaJournal>, StoreError> {
        self.store(|d| d.journals.values().find(|j| j.active_x509_authority_id == active_x509_authority_id).cloned())
    }

    async fn journals(&self) -> Result<Vec<CaJournal>, StoreError> {
        self.store(|d| d.journals.values().cloned().collect())
    }

    async fn set_journal(&self, journal: &CaJournal) -> Result<CaJournal, StoreError> {
        if self.faults.lock().unwrap().fail_journal_writes {
            return Err(StoreError::Busy(1));
        }
        self.store(|d| {
            let id = if journal.id == 0 { d.journals.len() as i64 + 1 } else { journal.id };
            let stored = CaJournal { id, ..journal.clone() };
            d.journals.insert(id, stored.clone());
            stored
        })
    }

    async fn newest_rotations(&self) -> Result<Vec<Rotation>, StoreError> {
        self.store(|d| d.rotations.clone())
    }

    async fn rotation_notes(&self, rotation_id: i64) -> Result<Vec<RotationNote>, StoreError> {
        self.store(|d| {
            let of = d.notes.iter().filter(|((order, _), _)| *order == rotation_id);
            of.map(|((_, journal_id), (data, seen_at))| RotationNote {
                rotation_id,
                journal_id: *journal_id,
                data: data.clone(),
                seen_at: *seen_at,
            })
            .collect()
        })
    }

    async fn set_rotation_note(&self, note: &RotationNote) -> Result<(), StoreError> {
        self.store(|d| {
            let (known, at) = d.notes.entry((note.rotation_id, note.journal_id)).or_default();
            (*known, *at) = (note.data.clone(), *at + 1);
        })
    }

    async fn reopen_rotation(&self, order: &Rotation) -> Result<(), StoreError> {
        self.store(|d| d.rotations.iter_mut().filter(|known| known.id == order.id).for_each(|known| known.done = false))
    }

    async fn close_rotation(&self, order: &Rotation) -> Result<(), StoreError> {
        self.store(|d| d.rotations.iter_mut().filter(|known| known.id == order.id).for_each(|known| known.done = true))
    }

    async fn rotation_beats(&self, rotation_id: i64) -> Result<Vec<(i64, i64)>, StoreError> {
        self.store(|d| {
            let of = d.notes.iter().filter(|((order, _), _)| *order == rotation_id);
            of.map(|((_, journal_id), (_, seen_at))| (*journal_id, *seen_at)).collect()
        })
    }

    async fn touch_rotation_note(&self, rotation_id: i64, journal_id: i64) -> Result<(), StoreError> {
        self.store(|d| d.notes.get_mut(&(rotation_id, journal_id)).into_iter().for_each(|(_, seen_at)| *seen_at += 1))
    }

    async fn untaint_authorities(&self, trust_domain: &TrustDomain, ids: &[String]) -> Result<(), StoreError> {
        self.store(|d| {
            let Some(bundle) = d.bundles.get_mut(trust_domain.as_str()) else { return };
            bundle.sequence_number += 1;
            for authority in &mut bundle.x509_authorities {
                let certificate = finial_crypto::Certificate::parse(authority.der.clone()).unwrap();
                authority.tainted &= !ids.contains(&finial_crypto::hex(certificate.subject_key_id().unwrap()));
            }
            for key in bundle.jwt_authorities.iter_mut().chain(&mut bundle.wit_authorities) {
                key.tainted &= !ids.contains(&key.key_id);
            }
        })
    }
}

#[async_trait]
impl KeyManager for Memory {
    async fn generate_key(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, PluginError> {
        self.key_manager(|d| {
            let key = PrivateKey::generate(key_type).unwrap();
            d.keys.insert(id.to_owned(), key.clone());
            Arc::new(key) as Arc<dyn Signer>
        })
    }

    async fn key(&self, id: &str) -> Result<Option<Arc<dyn Signer>>, PluginError> {
        self.key_manager(|d| d.keys.get(id).map(|k| Arc::new(k.clone()) as Arc<dyn Signer>))
    }

    async fn keys(&self) -> Result<Vec<(String, Arc<dyn Signer>)>, PluginError> {
        self.key_manager(|d| {
            d.keys.iter().map(|(id, k)| (id.clone(), Arc::new(k.clone()) as Arc<dyn Signer>)).collect()
        })
    }
}

/// The keys of one of several servers, each with a prefix of its own.
struct KeysOf(&'static str, Arc<Memory>);

#[async_trait]
impl KeyManager for KeysOf {
    async fn generate_key(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, PluginError> {
        self.1.generate_key(&format!("{}{id}", self.0), key_type).await
    }

    async fn key(&self, id: &str) -> Result<Option<Arc<dyn Signer>>, PluginError> {
        self.1.key(&format!("{}{id}", self.0)).await
    }

    async fn keys(&self) -> Result<Vec<(String, Arc<dyn Signer>)>, PluginError> {
        let all = self.1.keys().await?;
        Ok(all.into_iter().filter_map(|(id, key)| Some((id.strip_prefix(self.0)?.to_owned(), key))).collect())
    }
}

/// A process on top of what survives it.
pub(crate) struct World {
    /// Which of several servers; empty where there is one.
    pub(crate) name: &'static str,
    pub(crate) memory: Arc<Memory>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) settings: AuthoritySettings,
    pub(crate) upstream: Option<Arc<dyn finial_plugin::UpstreamAuthority>>,
    pub(crate) composers: Composers,
}

/// What dies with the process.
pub(crate) struct Process {
    pub(crate) manager: AuthorityManager,
    pub(crate) authorities: Authorities,
    pub(crate) feed: Arc<BundleFeed>,
}

pub(crate) fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

impl World {
    pub(crate) fn new() -> Self {
        let settings = AuthoritySettings {
            trust_domain: trust_domain(),
            ca_ttl_seconds: 24 * HOUR,
            ca_subject: DistinguishedName::ca_default(),
            ca_key_type: KeyType::EcP256,
            jwt_key_type: Some(KeyType::EcP256),
            wit_key_type: None,
            token_ttl_seconds: (300, 300),
        };
        let (clock, composers) = (Arc::new(ManualClock::at(START)), Composers::default());
        Self { name: "", memory: Arc::default(), clock, settings, upstream: None, composers }
    }

    /// Another server on the same datastore, whose clock goes so many seconds ahead.
    pub(crate) fn beside(&self, name: &'static str, ahead_seconds: i64) -> Self {
        let clock = Arc::new(ManualClock::at(self.now() + ahead_seconds));
        Self {
            name,
            memory: self.memory.clone(),
            clock,
            settings: self.settings.clone(),
            upstream: self.upstream.clone(),
            composers: self.composers.clone(),
        }
    }

    pub(crate) fn now(&self) -> i64 {
        self.clock.now()
    }

    /// Starts a process and loads the journal.
    pub(crate) async fn load(&self) -> Result<Process, Box<dyn std::error::Error>> {
        let authorities = Authorities::new();
        let feed = BundleFeed::open(self.memory.clone(), trust_domain()).await?;
        let parts = AuthorityParts {
            store: self.memory.clone(),
            keys: Arc::new(KeysOf(self.name, self.memory.clone())),
            upstream: self.upstream.clone(),
            feed: feed.clone(),
            authorities: authorities.clone(),
            clock: self.clock.clone(),
            metrics: Metrics::disabled(),
            composers: self.composers.clone(),
            domain: Arc::default(),
        };
        let manager = AuthorityManager::load(self.settings.clone(), parts).await?;
        Ok(Process { manager, authorities, feed })
    }

    /// Starts a process whose authorities are ready.
    pub(crate) async fn start(&self) -> Process {
        let mut process = self.load().await.unwrap();
        process.manager.start().await.unwrap();
        process
    }

    pub(crate) fn issuer(&self, authorities: &Authorities) -> Issuer {
        let settings = IssuerSettings {
            trust_domain: trust_domain(),
            x509_svid_ttl_seconds: HOUR,
            agent_svid_ttl_seconds: 2 * HOUR,
            jwt_svid_ttl_seconds: 300,
            jwt_issuer: None,
            wit_issuer: None,
            ca_ttl_seconds: 24 * HOUR,
        };
        Issuer::new(settings, authorities.clone(), self.clock.clone(), Metrics::disabled())
            .with_composers(self.composers.clone())
    }

    pub(crate) fn bundle(&self) -> Option<Bundle> {
        self.memory.data.lock().unwrap().bundles.get("example.org").cloned()
    }

    pub(crate) fn fail(&self, at: Option<(usize, Lost)>) {
        let mut faults = self.memory.faults.lock().unwrap();
        faults.calls = 0;
        faults.fail_at = at;
    }

    pub(crate) fn fail_all(&self, all: bool) {
        self.memory.faults.lock().unwrap().fail_all = all;
    }

    /// Whether the planned fault happened.
    pub(crate) fn fault_fired(&self) -> bool {
        let faults = self.memory.faults.lock().unwrap();
        faults.fail_at.is_some_and(|(at, _)| faults.calls > at)
    }

    pub(crate) fn calls(&self) -> usize {
        self.memory.faults.lock().unwrap().calls
    }
}

impl Process {
    pub(crate) fn x509_id(&self) -> Option<String> {
        self.authorities.x509().map(|a| a.authority_id.clone())
    }

    pub(crate) fn jwt_id(&self) -> Option<String> {
        self.authorities.jwt().map(|a| a.signer.key_id().to_owned())
    }
}
