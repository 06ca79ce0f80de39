//! The journal: which authorities this server made, in which slot, and what became of them.
//!
//! Stored as SPIRE stores it, so that SPIRE can go on from it: one row per server, found again by the key manager's keys
//! (the row's active X.509 authority is one of them). A journal that could not be saved is kept and saved with the next
//! change or check; nothing that would overwrite a key happens before it is.

use super::plan::Status;
use super::store::AuthorityStore;
use super::tokens::TokenKind;
use super::{AuthorityError, AuthorityKind, SUBSYSTEM};
use crate::publish::Name;
use finial_core::UnixSeconds;
pub(super) use finial_crypto::hex;
use finial_crypto::{Certificate, Signer};
use finial_proto::journal as pb;
use finial_store::{CaJournal, StoreError};
use prost::Message;
use std::sync::Arc;

/// How many authorities of each kind are remembered.
const ENTRIES_MAX: usize = 10;

/// The journal of this server.
#[derive(Default)]
pub(super) struct Journal {
    /// 0 = there is no row yet; it is made when the first X.509 authority becomes active.
    row: i64,
    active_x509_authority_id: String,
    entries: pb::Entries,
    /// What memory says is not what the datastore says.
    unsaved: bool,
    /// The datastore's history that the row is of.
    history: u64,
    /// What the row told when it was found in that history, before it was written there; `None` where that cannot be read.
    found: Option<pb::Entries>,
}

impl Status {
    fn to_proto(self) -> pb::Status {
        match self {
            Self::Prepared => pb::Status::Prepared,
            Self::Active => pb::Status::Active,
            Self::Old => pb::Status::Old,
        }
    }

    /// An unknown status counts as prepared: such an entry may be used when nothing is active.
    pub(super) fn from_proto(status: i32) -> Self {
        match pb::Status::try_from(status) {
            Ok(pb::Status::Active) => Self::Active,
            Ok(pb::Status::Old) => Self::Old,
            Ok(pb::Status::Prepared | pb::Status::Unknown) | Err(_) => Self::Prepared,
        }
    }
}

/// The two kinds of keys have messages of their own with the same fields.
fn wit_entry(entry: pb::JwtKeyEntry) -> pb::WitKeyEntry {
    let pb::JwtKeyEntry { slot_id, issued_at, not_after, kid, public_key, status, authority_id } = entry;
    pb::WitKeyEntry { slot_id, issued_at, not_after, kid, public_key, status, authority_id }
}

fn jwt_entry(entry: pb::WitKeyEntry) -> pb::JwtKeyEntry {
    let pb::WitKeyEntry { slot_id, issued_at, not_after, kid, public_key, status, authority_id } = entry;
    pb::JwtKeyEntry { slot_id, issued_at, not_after, kid, public_key, status, authority_id }
}

/// Drops the oldest entries beyond the limit.
fn cap<T>(entries: &mut Vec<T>) {
    let exceeded = entries.len().saturating_sub(ENTRIES_MAX);
    entries.drain(..exceeded);
}

/// Rows that name a certificate of one of these keys. They are kept under the active one's subject key ID, which an upstream
/// authority need not make of the key as we do (RFC 5280 section 4.2.1.2 leaves it free).
async fn by_certificate(
    store: &dyn AuthorityStore,
    keys: &[(String, Arc<dyn Signer>)],
) -> Result<Vec<CaJournal>, AuthorityError> {
    let ours = |entry: &pb::X509caEntry| {
        let certificate = Certificate::parse(entry.certificate.to_vec()).ok();
        certificate.is_some_and(|c| keys.iter().any(|(_, key)| key.public_key().spki_der().as_ref() == c.spki_der()))
    };
    let mut rows = store.journals().await.map_err(AuthorityError::FetchJournal)?;
    // One that cannot be read is another server's, as far as can be told.
    rows.retain(|row| pb::Entries::decode(row.data.as_slice()).is_ok_and(|entries| entries.x509_c_as.iter().any(ours)));
    Ok(rows)
}

impl Journal {
    /// Finds the row that belongs to one of these keys; without one the journal is empty.
    pub(super) async fn load(
        store: &dyn AuthorityStore,
        keys: &[(String, Arc<dyn Signer>)],
        history: u64,
    ) -> Result<Self, AuthorityError> {
        let mut rows = Vec::new();
        for (_, key) in keys {
            let authority_id = hex(&key.public_key().subject_key_id());
            rows.extend(store.journal(&authority_id).await.map_err(AuthorityError::FetchJournal)?);
        }
        if rows.is_empty() && !keys.is_empty() {
            rows = by_certificate(store, keys).await?;
        }
        let mut found: Option<Self> = None;
        for row in rows {
            let entries = pb::Entries::decode(row.data.as_slice()).map_err(AuthorityError::BadJournal)?;
            let (id, active_x509_authority_id) = (row.id, row.active_x509_authority_id);
            tracing::debug!(
                subsystem_name = SUBSYSTEM,
                ca_journal_id = id,
                local_authority_id = %active_x509_authority_id,
                "Found a CA journal record that matches with a local X509 authority ID"
            );
            let journal = Self { row: id, active_x509_authority_id, entries, ..Self::default() };
            // There is one, unless a row was left behind: the newest is right.
            if found.as_ref().is_none_or(|f| f.newest() <= journal.newest()) {
                found = Some(journal);
            }
        }
        let journal = found.unwrap_or_else(|| {
            tracing::info!(
                subsystem_name = SUBSYSTEM,
                "There is not a CA journal record that matches any of the local X509 authority IDs"
            );
            Self::default()
        });
        Ok(Self { history, ..journal })
    }

    /// When the newest X.509 authority was made.
    fn newest(&self) -> UnixSeconds {
        self.entries.x509_c_as.iter().map(|e| e.issued_at).max().unwrap_or(UnixSeconds::MIN)
    }

    pub(super) fn entries(&self) -> &pb::Entries {
        &self.entries
    }

    /// Its row in the datastore; 0 = there is none yet.
    pub(super) fn row(&self) -> i64 {
        self.row
    }

    /// The IDs of the authorities of a kind, with when they were made, oldest first.
    pub(super) fn issued(&self, kind: AuthorityKind) -> Vec<(String, UnixSeconds)> {
        match kind.tokens() {
            Some(tokens) => self.keys(tokens).into_iter().map(|e| (e.authority_id, e.issued_at)).collect(),
            None => self.entries.x509_c_as.iter().map(|e| (e.authority_id.clone(), e.issued_at)).collect(),
        }
    }

    pub(super) fn add_x509(&mut self, entry: pb::X509caEntry) {
        self.entries.x509_c_as.push(entry);
        cap(&mut self.entries.x509_c_as);
        self.unsaved = true;
    }

    pub(super) fn add_key(&mut self, kind: TokenKind, entry: pb::JwtKeyEntry) {
        match kind {
            TokenKind::Jwt => {
                self.entries.jwt_keys.push(entry);
                cap(&mut self.entries.jwt_keys);
            }
            TokenKind::Wit => {
                self.entries.wit_keys.push(wit_entry(entry));
                cap(&mut self.entries.wit_keys);
            }
        }
        self.unsaved = true;
    }

    /// The keys of a kind, oldest first.
    pub(super) fn keys(&self, kind: TokenKind) -> Vec<pb::JwtKeyEntry> {
        match kind {
            TokenKind::Jwt => self.entries.jwt_keys.clone(),
            TokenKind::Wit => self.entries.wit_keys.iter().cloned().map(jwt_entry).collect(),
        }
    }

    /// The names of the keys of a kind.
    pub(super) fn names(&self, kind: TokenKind) -> Vec<Name> {
        self.keys(kind).iter().map(|entry| kind.name(&entry.kid)).collect()
    }

    /// Forgets an authority that did not come to be.
    pub(super) fn remove(&mut self, authority_id: &str) {
        self.entries.x509_c_as.retain(|e| e.authority_id != authority_id);
        self.entries.jwt_keys.retain(|e| e.authority_id != authority_id);
        self.entries.wit_keys.retain(|e| e.authority_id != authority_id);
        self.unsaved = true;
    }

    pub(super) fn set_x509_status(&mut self, authority_id: &str, status: Status) {
        if let Some(entry) = self.entries.x509_c_as.iter_mut().rev().find(|e| e.authority_id == authority_id) {
            entry.set_status(status.to_proto());
            self.unsaved = true;
        }
        if status == Status::Active {
            authority_id.clone_into(&mut self.active_x509_authority_id);
        }
    }

    pub(super) fn set_key_status(&mut self, kind: TokenKind, key_id: &str, status: Status) {
        let (jwt, wit) = (&mut self.entries.jwt_keys, &mut self.entries.wit_keys);
        let known = match kind {
            TokenKind::Jwt => jwt.iter_mut().rev().find(|e| e.authority_id == key_id).map(|e| &mut e.status),
            TokenKind::Wit => wit.iter_mut().rev().find(|e| e.authority_id == key_id).map(|e| &mut e.status),
        };
        if let Some(known) = known {
            *known = status.to_proto().into();
            self.unsaved = true;
        }
    }

    /// In another history of the datastore the row may be what it was before, gone, or another server's. Finds it again, to be
    /// written with the next saving.
    pub(super) async fn turn_to(&mut self, history: u64, store: &dyn AuthorityStore) -> Result<(), AuthorityError> {
        if history == self.history {
            return Ok(());
        }
        let older = self.entries.x509_c_as.iter().rev().map(|entry| &entry.authority_id);
        let mut found = None;
        for id in std::iter::once(&self.active_x509_authority_id).chain(older).filter(|id| !id.is_empty()) {
            found = store.journal(id).await.map_err(AuthorityError::FetchJournal)?;
            if found.is_some() {
                break;
            }
        }
        self.row = found.as_ref().map_or(0, |row| row.id);
        self.found =
            found.map_or_else(|| Some(pb::Entries::default()), |row| pb::Entries::decode(row.data.as_slice()).ok());
        self.history = history;
        self.unsaved = true;
        Ok(())
    }

    /// What the row told in this history of the datastore before it was written there; `None` where that cannot be read.
    pub(super) fn found(&self) -> Option<&pb::Entries> {
        self.found.as_ref()
    }

    /// Saves what is not saved. Without an active X.509 authority there is nothing to find the row by, and nothing to do.
    pub(super) async fn save(&mut self, store: &dyn AuthorityStore) -> Result<(), AuthorityError> {
        if !self.unsaved || self.active_x509_authority_id.is_empty() {
            return Ok(());
        }
        if self.row == 0 {
            // It may be there: made by an attempt whose answer got lost.
            let row = store.journal(&self.active_x509_authority_id).await.map_err(AuthorityError::FetchJournal)?;
            self.row = row.map_or(0, |row| row.id);
        }
        if self.row == 0 {
            tracing::info!(subsystem_name = SUBSYSTEM, "Creating a new CA journal entry");
        }
        let row = CaJournal {
            id: self.row,
            data: self.entries.encode_to_vec(),
            active_x509_authority_id: self.active_x509_authority_id.clone(),
        };
        let saved = store.set_journal(&row).await;
        if matches!(saved, Err(StoreError::NotFound)) {
            // The row went, with a restored datastore perhaps: the next attempt makes a new one.
            self.row = 0;
        }
        self.row = saved.map_err(AuthorityError::SaveJournal)?.id;
        self.unsaved = false;
        tracing::debug!(
            subsystem_name = SUBSYSTEM,
            ca_journal_id = self.row,
            local_authority_id = %self.active_x509_authority_id,
            "Successfully stored CA journal entry in datastore"
        );
        Ok(())
    }
}
