//! Bundles: the own trust domain's and those it federates with. A bundle is one protobuf value (`spire.common.Bundle`) in
//! one row, read, changed and written back within one transaction.

use crate::entries::rows as entry_rows;
use crate::sql::{Conn, Moment, Query, Row};
use crate::store::transact;
use crate::{Listed, Page, Store, StoreError, events};
use finial_core::{Bundle, EntryId, JwtAuthority, TrustDomain, UnixSeconds, X509Authority};
use finial_crypto::Certificate;
use finial_proto::common as pb;
use prost::Message;

/// What to do with the entries that federate with a bundle that is to be deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteMode {
    /// Refuse when there are any.
    Restrict,
    /// They stop federating with it.
    Dissociate,
    /// They are deleted too.
    Delete,
}

/// Which parts of a bundle an update replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BundleMask {
    /// The X.509 authorities.
    pub x509_authorities: bool,
    /// The JWT authorities.
    pub jwt_authorities: bool,
    /// The WIT authorities.
    pub wit_authorities: bool,
    /// The refresh hint.
    pub refresh_hint: bool,
    /// The sequence number.
    pub sequence_number: bool,
}

impl BundleMask {
    /// Everything.
    pub const ALL: Self = Self {
        x509_authorities: true,
        jwt_authorities: true,
        wit_authorities: true,
        refresh_hint: true,
        sequence_number: true,
    };
}

impl Store {
    /// Stores a new bundle; `AlreadyExists` when the trust domain has one.
    pub async fn create_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError> {
        self.counted("datastore.bundle.create", async {
            let now = self.now();
            transact!(self, |tx| insert(&mut tx, bundle, now).await)?;
            Ok(bundle.clone())
        })
        .await
    }

    /// Replaces the masked parts of an existing bundle; `NotFound` when there is none. Returns the whole result.
    pub async fn update_bundle(&self, bundle: &Bundle, mask: BundleMask) -> Result<Bundle, StoreError> {
        self.counted("datastore.bundle.update", async {
            self.change(&bundle.trust_domain, |stored| {
                masked(stored, bundle, mask);
                Ok(true)
            })
            .await
            .map(|(stored, _)| stored)
        })
        .await
    }

    /// Creates or replaces.
    pub async fn set_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError> {
        self.counted("datastore.bundle.set", async {
            let now = self.now();
            transact!(self, |tx| set(&mut tx, bundle, now).await)
        })
        .await
    }

    /// Adds the authorities that are not there yet, creating the bundle if need be; the sequence number grows when
    /// something was added. Returns the whole result.
    pub async fn append_bundle(&self, bundle: &Bundle) -> Result<Bundle, StoreError> {
        self.counted("datastore.bundle.append", async {
            self.upsert(bundle, |stored| {
                let added = add_missing(&mut stored.x509_authorities, &bundle.x509_authorities, |root| &root.der)
                    | add_missing(&mut stored.jwt_authorities, &bundle.jwt_authorities, |key| &key.key_id)
                    | add_missing(&mut stored.wit_authorities, &bundle.wit_authorities, |key| &key.key_id);
                if added {
                    stored.sequence_number = stored.sequence_number.saturating_add(1);
                }
                added
            })
            .await
        })
        .await
    }

    /// Deletes a bundle. Returns the IDs of the entries that changed (`Dissociate`) or went (`Delete`).
    pub async fn delete_bundle(
        &self,
        trust_domain: &TrustDomain,
        mode: DeleteMode,
    ) -> Result<Vec<EntryId>, StoreError> {
        self.counted("datastore.bundle.delete", async {
            let now = self.now();
            transact!(self, |tx| delete(&mut tx, trust_domain, mode, now).await)
        })
        .await
    }

    /// One bundle.
    pub async fn fetch_bundle(&self, trust_domain: &TrustDomain) -> Result<Option<Bundle>, StoreError> {
        self.counted("datastore.bundle.fetch", async {
            let found = fetch(&mut *self.connection().await?, trust_domain, "").await?;
            Ok(found.map(|(_, bundle)| bundle))
        })
        .await
    }

    /// How many bundles there are, the own one included.
    pub async fn count_bundles(&self) -> Result<u64, StoreError> {
        self.counted("datastore.bundle.count", async {
            let row = self.connection().await?.one(Query::new("SELECT COUNT(*) FROM bundles")).await?;
            Ok(row.int(0)?.unsigned_abs())
        })
        .await
    }

    /// The bundles, the own one included. One that cannot be read is logged and left out: a foreign one must not keep
    /// the others from being read. Who needs a certain one asks for it by name, and is told.
    pub async fn list_bundles(&self, page: Option<&Page>) -> Result<Listed<Bundle>, StoreError> {
        self.counted("datastore.bundle.list", async { list(&mut *self.connection().await?, page).await }).await
    }

    /// The row ID of each bundle, which pages go by, with the bare name of its trust domain.
    pub async fn bundle_rows(&self) -> Result<Vec<(TrustDomain, i64)>, StoreError> {
        self.counted("datastore.bundle.list", async {
            let rows = self.connection().await?.all(Query::new("SELECT id, trust_domain FROM bundles")).await?;
            let mut named = Vec::with_capacity(rows.len());
            for row in &rows {
                // What names no trust domain is no bundle that anybody could read.
                if let Ok(Ok(name)) = row.str(1).map(TrustDomain::parse) {
                    named.push((name, row.int(0)?));
                }
            }
            Ok(named)
        })
        .await
    }

    /// Removes authorities that expired before `expires_before`. Returns the new bundle, or `None` when nothing
    /// changed; an error rather than a bundle without authorities.
    pub async fn prune_bundle(
        &self,
        trust_domain: &TrustDomain,
        expires_before: UnixSeconds,
    ) -> Result<Option<Bundle>, StoreError> {
        self.counted("datastore.bundle.prune", async {
            let changed = self.change(trust_domain, |stored| prune(stored, expires_before)).await;
            match changed {
                Ok((bundle, changed)) => Ok(changed.then_some(bundle)),
                Err(StoreError::NotFound) => Ok(None),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Marks the X.509 authority with this subject key ID (lowercase hex) as tainted. Returns the new bundle.
    pub async fn taint_x509_authority(&self, trust_domain: &TrustDomain, key_id: &str) -> Result<Bundle, StoreError> {
        self.counted("datastore.bundle.x509.taint", async {
            let changed = self.change(trust_domain, |stored| {
                let mut found = false;
                for authority in &mut stored.x509_authorities {
                    // One that cannot be read is none that anybody could mean.
                    if !subject_key_id(authority).is_ok_and(|id| id == key_id) {
                        continue;
                    }
                    if authority.tainted {
                        return invalid("root CA is already tainted");
                    }
                    authority.tainted = true;
                    found = true;
                }
                if !found {
                    return missing("no ca found with provided subject key ID");
                }
                Ok(grown(stored))
            });
            changed.await.map(|(bundle, _)| bundle)
        })
        .await
    }

    /// Removes the tainted X.509 authority with this subject key ID (lowercase hex). Returns the new bundle.
    pub async fn revoke_x509_authority(&self, trust_domain: &TrustDomain, key_id: &str) -> Result<Bundle, StoreError> {
        self.counted("datastore.bundle.x509.revoke", async {
            let changed = self.change(trust_domain, |stored| {
                let mut kept = Vec::with_capacity(stored.x509_authorities.len());
                for authority in &stored.x509_authorities {
                    match subject_key_id(authority).is_ok_and(|id| id == key_id) {
                        true if !authority.tainted => {
                            return invalid("it is not possible to revoke an untainted root CA");
                        }
                        true => {}
                        false => kept.push(authority.clone()),
                    }
                }
                if kept.len() == stored.x509_authorities.len() {
                    return missing("no root CA found with provided subject key ID");
                }
                stored.x509_authorities = kept;
                Ok(grown(stored))
            });
            changed.await.map(|(bundle, _)| bundle)
        })
        .await
    }

    /// Marks the JWT authority with this key ID as tainted, and returns it.
    pub async fn taint_jwt_authority(
        &self,
        trust_domain: &TrustDomain,
        key_id: &str,
    ) -> Result<JwtAuthority, StoreError> {
        self.counted("datastore.bundle.jwt.taint", self.taint_key(trust_domain, key_id, "JWT", jwt_keys)).await
    }

    /// Removes the tainted JWT authority with this key ID, and returns it.
    pub async fn revoke_jwt_authority(
        &self,
        trust_domain: &TrustDomain,
        key_id: &str,
    ) -> Result<JwtAuthority, StoreError> {
        self.counted("datastore.bundle.jwt.revoke", self.revoke_key(trust_domain, key_id, "JWT", jwt_keys)).await
    }

    /// Marks the WIT authority with this key ID as tainted, and returns it.
    pub async fn taint_wit_authority(
        &self,
        trust_domain: &TrustDomain,
        key_id: &str,
    ) -> Result<JwtAuthority, StoreError> {
        self.counted("datastore.bundle.wit.taint", self.taint_key(trust_domain, key_id, "WIT", wit_keys)).await
    }

    /// Removes the tainted WIT authority with this key ID, and returns it.
    pub async fn revoke_wit_authority(
        &self,
        trust_domain: &TrustDomain,
        key_id: &str,
    ) -> Result<JwtAuthority, StoreError> {
        self.counted("datastore.bundle.wit.revoke", self.revoke_key(trust_domain, key_id, "WIT", wit_keys)).await
    }

    async fn taint_key(
        &self,
        trust_domain: &TrustDomain,
        key_id: &str,
        kind: &str,
        keys: fn(&mut Bundle) -> &mut Vec<JwtAuthority>,
    ) -> Result<JwtAuthority, StoreError> {
        let mut tainted = None;
        let changed = self.change(trust_domain, |stored| {
            let Some(key) = keys(stored).iter_mut().find(|key| key.key_id == key_id) else {
                return missing(&format!("no {kind} Key found with provided key ID"));
            };
            if key.tainted {
                return invalid("key is already tainted");
            }
            key.tainted = true;
            tainted = Some(key.clone());
            Ok(grown(stored))
        });
        changed.await?;
        tainted.ok_or(StoreError::NotFound)
    }

    async fn revoke_key(
        &self,
        trust_domain: &TrustDomain,
        key_id: &str,
        kind: &str,
        keys: fn(&mut Bundle) -> &mut Vec<JwtAuthority>,
    ) -> Result<JwtAuthority, StoreError> {
        let mut revoked = None;
        let changed = self.change(trust_domain, |stored| {
            let keys = keys(stored);
            let mut found = keys.iter().filter(|key| key.key_id == key_id).peekable();
            if found.peek().is_none() {
                return missing(&format!("no {kind} Key found with provided key ID"));
            }
            let Some(key) = found.find(|key| key.tainted).cloned() else {
                return invalid("it is not possible to revoke an untainted key");
            };
            keys.retain(|key| key.key_id != key_id);
            revoked = Some(key);
            Ok(grown(stored))
        });
        changed.await?;
        revoked.ok_or(StoreError::NotFound)
    }

    /// Reads, changes and writes back; `edit` says whether there is anything to write.
    pub(crate) async fn change(
        &self,
        trust_domain: &TrustDomain,
        mut edit: impl FnMut(&mut Bundle) -> Result<bool, StoreError> + Send,
    ) -> Result<(Bundle, bool), StoreError> {
        let now = self.now();
        transact!(self, |tx| {
            let lock = tx.dialect().for_update();
            let (id, mut stored) = fetch(&mut tx, trust_domain, lock).await?.ok_or(StoreError::NotFound)?;
            let changed = edit(&mut stored)?;
            if changed {
                write(&mut tx, id, &stored, now).await?;
            }
            Ok((stored, changed))
        })
    }

    async fn upsert(
        &self,
        bundle: &Bundle,
        mut edit: impl FnMut(&mut Bundle) -> bool + Send,
    ) -> Result<Bundle, StoreError> {
        let now = self.now();
        transact!(self, |tx| put(&mut tx, bundle, &mut edit, now).await)
    }
}

/// Creates the bundle, or changes the one that is there; `edit` says whether there is anything to write.
pub(crate) async fn put(
    conn: &mut Conn,
    bundle: &Bundle,
    edit: &mut (impl FnMut(&mut Bundle) -> bool + Send),
    now: Moment,
) -> Result<Bundle, StoreError> {
    let lock = conn.dialect().for_update();
    let Some((id, mut stored)) = fetch(conn, &bundle.trust_domain, lock).await? else {
        return match insert(conn, bundle, now).await {
            Ok(()) => Ok(bundle.clone()),
            // another server made it a moment ago: the next try changes that one
            Err(StoreError::AlreadyExists(text)) => Err(StoreError::Contended(text)),
            Err(error) => Err(error),
        };
    };
    if edit(&mut stored) {
        write(conn, id, &stored, now).await?;
    }
    Ok(stored)
}

/// Creates or replaces.
pub(crate) async fn set(conn: &mut Conn, bundle: &Bundle, now: Moment) -> Result<Bundle, StoreError> {
    let mut replace = |stored: &mut Bundle| {
        masked(stored, bundle, BundleMask::ALL);
        true
    };
    put(conn, bundle, &mut replace, now).await
}

fn invalid<T>(text: &str) -> Result<T, StoreError> {
    Err(StoreError::InvalidArgument(text.into()))
}

fn missing<T>(text: &str) -> Result<T, StoreError> {
    Err(StoreError::Missing(text.into()))
}

pub(crate) fn grown(bundle: &mut Bundle) -> bool {
    bundle.sequence_number = bundle.sequence_number.saturating_add(1);
    true
}

fn masked(stored: &mut Bundle, new: &Bundle, mask: BundleMask) {
    if mask.x509_authorities {
        stored.x509_authorities.clone_from(&new.x509_authorities);
    }
    if mask.jwt_authorities {
        stored.jwt_authorities.clone_from(&new.jwt_authorities);
    }
    if mask.wit_authorities {
        stored.wit_authorities.clone_from(&new.wit_authorities);
    }
    if mask.refresh_hint {
        stored.refresh_hint = new.refresh_hint;
    }
    if mask.sequence_number {
        stored.sequence_number = new.sequence_number;
    }
}

/// Adds those that are not there, tainted or not: a server that offers its authority again does not untaint it.
fn add_missing<T: Clone, I: PartialEq + ?Sized>(stored: &mut Vec<T>, new: &[T], id: impl Fn(&T) -> &I) -> bool {
    let before = stored.len();
    for item in new {
        if !stored.iter().any(|known| id(known) == id(item)) {
            stored.push(item.clone());
        }
    }
    stored.len() > before
}

fn prune(stored: &mut Bundle, expires_before: UnixSeconds) -> Result<bool, StoreError> {
    let halted = |text: &str| Err(StoreError::FailedPrecondition(format!("prune failed: {text}")));
    // Nobody knows when one ends that cannot be read: it stays, and is none to go on with.
    let lives = |root: &X509Authority| certificate(root).map(|c| c.not_after() > expires_before).ok();
    if !stored.x509_authorities.iter().any(|root| lives(root) == Some(true)) {
        return halted("would prune all certificates");
    }
    let roots: Vec<_> = stored.x509_authorities.iter().filter(|root| lives(root) != Some(false)).cloned().collect();
    // Of a kind that is signed no more the last keys stay, and hold up nothing else.
    let live = |keys: &[JwtAuthority]| -> Vec<JwtAuthority> {
        let lives = |key: &&JwtAuthority| key.expires_at == 0 || key.expires_at > expires_before;
        let live: Vec<_> = keys.iter().filter(lives).cloned().collect();
        if live.is_empty() { keys.to_vec() } else { live }
    };
    let (jwt, wit) = (live(&stored.jwt_authorities), live(&stored.wit_authorities));
    let counts = |b: &Bundle| (b.x509_authorities.len(), b.jwt_authorities.len(), b.wit_authorities.len());
    let before = counts(stored);
    (stored.x509_authorities, stored.jwt_authorities, stored.wit_authorities) = (roots, jwt, wit);
    Ok(before != counts(stored) && grown(stored))
}

fn certificate(authority: &X509Authority) -> Result<Certificate, StoreError> {
    Certificate::parse(authority.der.clone())
        .map_err(|e| StoreError::BadRow { what: "failed to parse root CA".into(), cause: e.to_string() })
}

/// Lowercase hex, as authority IDs are written everywhere.
pub(crate) fn subject_key_id(authority: &X509Authority) -> Result<String, StoreError> {
    let certificate = certificate(authority)?;
    Ok(finial_crypto::hex(certificate.subject_key_id().unwrap_or_default()))
}

const SELECT: &str = "SELECT id, trust_domain, data FROM bundles WHERE ";

/// Row ID and bundle.
pub(crate) async fn fetch(
    conn: &mut Conn,
    trust_domain: &TrustDomain,
    lock: &str,
) -> Result<Option<(i64, Bundle)>, StoreError> {
    let query = Query::new(format!("{SELECT}trust_domain = ?{lock}")).bind(trust_domain.id_string());
    conn.optional(query).await?.as_ref().map(from_row).transpose()
}

async fn list(conn: &mut Conn, page: Option<&Page>) -> Result<Listed<Bundle>, StoreError> {
    let mut query = Query::new(format!("{SELECT}id > "));
    query.push_bind(page.map_or(Ok(0), Page::after)?).push(" ORDER BY id");
    if let Some(page) = page {
        query.push(" LIMIT ").push_bind(page.size);
    }
    let rows = conn.all(query).await?;
    let last = rows.last().map(|row| row.int(0)).transpose()?;
    let mut bundles = Vec::with_capacity(rows.len());
    for row in &rows {
        match from_row(row) {
            Ok((_, bundle)) => bundles.push(bundle),
            Err(error @ StoreError::BadRow { .. }) => {
                tracing::error!(%error, "Invalid bundle in the datastore; left out");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Listed::new(bundles, page, last))
}

fn jwt_keys(bundle: &mut Bundle) -> &mut Vec<JwtAuthority> {
    &mut bundle.jwt_authorities
}

fn wit_keys(bundle: &mut Bundle) -> &mut Vec<JwtAuthority> {
    &mut bundle.wit_authorities
}

async fn insert(conn: &mut Conn, bundle: &Bundle, now: Moment) -> Result<(), StoreError> {
    conn.set_news();
    let query = Query::new("INSERT INTO bundles (created_at, updated_at, trust_domain, data) VALUES (?, ?, ?, ?)");
    let query = query.bind(now).bind(now).bind(bundle.trust_domain.id_string()).bind(Some(to_blob(bundle)));
    conn.execute(query).await.map(drop)
}

async fn write(conn: &mut Conn, id: i64, bundle: &Bundle, now: Moment) -> Result<(), StoreError> {
    conn.set_news();
    let query = Query::new("UPDATE bundles SET data = ?, updated_at = ? WHERE id = ?");
    conn.execute(query.bind(Some(to_blob(bundle))).bind(now).bind(id)).await.map(drop)
}

async fn delete(
    conn: &mut Conn,
    trust_domain: &TrustDomain,
    mode: DeleteMode,
    now: Moment,
) -> Result<Vec<EntryId>, StoreError> {
    conn.set_news();
    let lock = conn.dialect().for_update();
    let (id, _) = fetch(conn, trust_domain, lock).await?.ok_or(StoreError::NotFound)?;
    let query = Query::new(
        "SELECT e.id, e.entry_id FROM registered_entries e \
         JOIN federated_registration_entries f ON f.registered_entry_id = e.id WHERE f.bundle_id = ? ORDER BY e.id",
    );
    let federated = conn.all(query.bind(id)).await?;
    let mut entries = Vec::with_capacity(federated.len());
    for row in &federated {
        entries.push((row.int(0)?, row.text(1)?));
    }
    if mode == DeleteMode::Restrict && !entries.is_empty() {
        let count = entries.len();
        return Err(StoreError::FailedPrecondition(format!(
            "cannot delete bundle; federated with {count} registration entries"
        )));
    }
    if mode == DeleteMode::Delete {
        let rows: Vec<i64> = entries.iter().map(|(row, _)| *row).collect();
        entry_rows::delete(conn, &rows).await?;
    }
    conn.execute(Query::new("DELETE FROM federated_registration_entries WHERE bundle_id = ?").bind(id)).await?;
    conn.execute(Query::new("DELETE FROM bundles WHERE id = ?").bind(id)).await?;
    let ids: Vec<String> = entries.into_iter().map(|(_, id)| id).collect();
    events::write(conn, crate::EventFeed::Entries, &ids, now).await?;
    Ok(ids.iter().filter_map(|id| EntryId::parse(id).ok()).collect())
}

fn from_row(row: &Row) -> Result<(i64, Bundle), StoreError> {
    Ok((row.int(0)?, from_blob(row.str(1)?, row.blob(2)?)?))
}

/// A bundle from its trust domain's ID and its data.
pub(crate) fn from_blob(name: &str, data: &[u8]) -> Result<Bundle, StoreError> {
    let bad = |cause: String| StoreError::BadRow { what: format!("bundle of {name:?}"), cause };
    let blob = pb::Bundle::decode(data).map_err(|e| bad(e.to_string()))?;
    let trust_domain = TrustDomain::parse(name).map_err(|e| bad(e.to_string()))?;
    let keys = |keys: Vec<pb::PublicKey>| -> Vec<JwtAuthority> {
        let key = |key: pb::PublicKey| JwtAuthority {
            key_id: key.kid,
            public_key: key.pkix_bytes.as_ref().into(),
            expires_at: key.not_after,
            tainted: key.tainted_key,
        };
        keys.into_iter().map(key).collect()
    };
    let root = |root: pb::Certificate| X509Authority { der: root.der_bytes.as_ref().into(), tainted: root.tainted_key };
    Ok(Bundle {
        trust_domain,
        x509_authorities: blob.root_cas.into_iter().map(root).collect(),
        jwt_authorities: keys(blob.jwt_signing_keys),
        wit_authorities: keys(blob.wit_signing_keys),
        refresh_hint: blob.refresh_hint,
        sequence_number: blob.sequence_number,
    })
}

fn to_blob(bundle: &Bundle) -> Vec<u8> {
    let keys = |keys: &[JwtAuthority]| -> Vec<pb::PublicKey> {
        let key = |key: &JwtAuthority| pb::PublicKey {
            pkix_bytes: key.public_key.to_vec().into(),
            kid: key.key_id.clone(),
            not_after: key.expires_at,
            tainted_key: key.tainted,
        };
        keys.iter().map(key).collect()
    };
    let root =
        |root: &X509Authority| pb::Certificate { der_bytes: root.der.to_vec().into(), tainted_key: root.tainted };
    let blob = pb::Bundle {
        trust_domain_id: bundle.trust_domain.id_string(),
        root_cas: bundle.x509_authorities.iter().map(root).collect(),
        jwt_signing_keys: keys(&bundle.jwt_authorities),
        wit_signing_keys: keys(&bundle.wit_authorities),
        refresh_hint: bundle.refresh_hint,
        sequence_number: bundle.sequence_number,
    };
    blob.encode_to_vec()
}
