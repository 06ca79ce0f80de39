//! Orders to replace the authorities of all servers, and what each server has done of them. Tables of our own, beside SPIRE's:
//! see `docs/adr/0016-an-order-for-a-whole-domain.md`.

use crate::schema::own_tables;
use crate::sql::{Conn, Dialect, Query, Row};
use crate::store::transact;
use crate::{Store, StoreError};
use finial_core::{Bundle, TrustDomain, UnixSeconds};

/// So many orders are remembered.
const KEPT: i64 = 100;

/// An order. What the numbers mean is not the store's to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rotation {
    /// Row ID, growing.
    pub id: i64,
    /// Of which kind of authority.
    pub kind: i64,
    /// What every server is to come to.
    pub goal: i64,
    /// It is to go on to the end.
    pub revoke: bool,
    /// A goal was forced.
    pub forced: bool,
    /// Another may begin.
    pub done: bool,
    /// Who began it.
    pub asked_by: String,
    /// When it began, by that server's clock.
    pub created_at: UnixSeconds,
}

/// What a server tells of itself while it follows an order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RotationNote {
    /// Which order.
    pub rotation_id: i64,
    /// The server, by the row of its journal.
    pub journal_id: i64,
    /// What it says.
    pub data: Vec<u8>,
    /// When, by its clock.
    pub seen_at: UnixSeconds,
}

const SELECT: &str = "SELECT id, kind, goal, revoke_all, forced, open_kind, asked_by, created_at FROM finial_rotations";

impl Store {
    /// Whether the database has the tables for it, as far as is known: they are looked for when it is opened, and now and then.
    pub fn has_rotations(&self) -> bool {
        self.rotations_flag().load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Looks for the tables, and makes them if `make`.
    pub(crate) async fn look_for_rotations(&self, make: bool) -> Result<bool, StoreError> {
        let mut there = is_there(&mut *self.connection().await?).await?;
        if make && !there {
            // Several servers may do this at once; whoever comes second finds them.
            let made = transact!(self, |tx| tx.run(own_tables(self.dialect()).join(";")).await.map(drop));
            there = is_there(&mut *self.connection().await?).await?;
            if !there {
                made?;
            }
        }
        self.rotations_flag().store(there, std::sync::atomic::Ordering::Relaxed);
        Ok(there)
    }

    /// They may have been made by another server since.
    async fn demand_rotations(&self) -> Result<(), StoreError> {
        match self.has_rotations() || self.look_for_rotations(false).await? {
            true => Ok(()),
            false => Err(StoreError::FailedPrecondition(
                "the datastore has no tables for orders to a whole trust domain (finial_rotations): a server that may change \
                 the schema makes them when it starts"
                    .into(),
            )),
        }
    }

    /// Begins an order; `AlreadyExists` while one of this kind is open. ID and time are given here.
    pub async fn begin_rotation(&self, order: &Rotation) -> Result<Rotation, StoreError> {
        self.demand_rotations().await?;
        let now = self.now();
        transact!(self, |tx| {
            let query = Query::new(
                "INSERT INTO finial_rotations (created_at, updated_at, kind, goal, revoke_all, forced, open_kind, asked_by) \
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            );
            let query = query.bind(now).bind(now).bind(order.kind).bind(order.goal).bind(order.revoke);
            let id = tx.insert(query.bind(order.forced).bind(order.kind).bind(&order.asked_by)).await?;
            // Nobody asks any more what was told of older ones, and it is long. Of this one nothing can have been told, unless by
            // a server that did not know yet that the database was restored, and gives IDs again.
            let stale = Query::new(
                "DELETE FROM finial_rotation_servers WHERE rotation_id IN (SELECT id FROM finial_rotations WHERE kind = ?)",
            );
            tx.execute(stale.bind(order.kind)).await?;
            for text in [
                "DELETE FROM finial_rotations WHERE id <= ? AND open_kind IS NULL",
                "DELETE FROM finial_rotation_servers WHERE rotation_id <= ? AND rotation_id NOT IN \
                 (SELECT id FROM finial_rotations)",
            ] {
                tx.execute(Query::new(text).bind(id.saturating_sub(KEPT))).await?;
            }
            tx.set_news();
            Ok(Rotation { id, created_at: now.rounded(), ..order.clone() })
        })
    }

    /// The newest order of each kind.
    pub async fn newest_rotations(&self) -> Result<Vec<Rotation>, StoreError> {
        if !self.has_rotations() {
            return Ok(Vec::new());
        }
        let text = format!("{SELECT} WHERE id IN (SELECT MAX(id) FROM finial_rotations GROUP BY kind) ORDER BY kind");
        self.connection().await?.all(Query::new(text)).await?.iter().map(from_row).collect()
    }

    /// Sets another goal, if it is still the one that the caller saw, and opens the order again if it was done. Says whether it
    /// did; `AlreadyExists` where another of its kind is open.
    pub async fn advance_rotation(&self, seen: &Rotation, goal: i64, forced: bool) -> Result<bool, StoreError> {
        self.demand_rotations().await?;
        let now = self.now();
        transact!(self, |tx| {
            let query = Query::new(
                "UPDATE finial_rotations SET updated_at = ?, goal = ?, forced = ?, open_kind = kind \
                 WHERE id = ? AND goal = ?",
            );
            let query = query.bind(now).bind(goal).bind(seen.forced || forced).bind(seen.id).bind(seen.goal);
            let set = tx.execute(query).await? > 0;
            if set {
                tx.set_news();
            }
            Ok(set)
        })
    }

    /// Closes an order that has come to its end, if its goal is still the one that the caller saw.
    pub async fn close_rotation(&self, seen: &Rotation) -> Result<(), StoreError> {
        let now = self.now();
        transact!(self, |tx| {
            let query = Query::new(
                "UPDATE finial_rotations SET updated_at = ?, open_kind = NULL \
                 WHERE id = ? AND goal = ? AND open_kind IS NOT NULL",
            );
            tx.execute(query.bind(now).bind(seen.id).bind(seen.goal)).await.map(drop)
        })
    }

    /// What servers told of an order.
    pub async fn rotation_notes(&self, rotation_id: i64) -> Result<Vec<RotationNote>, StoreError> {
        if !self.has_rotations() {
            return Ok(Vec::new());
        }
        let query = Query::new(
            "SELECT rotation_id, journal_id, data, updated_at FROM finial_rotation_servers WHERE rotation_id = ? \
             ORDER BY journal_id",
        );
        let rows = self.connection().await?.all(query.bind(rotation_id)).await?;
        let note = |row: &Row| {
            let (rotation_id, journal_id) = (row.int(0)?, row.int(1)?);
            Ok(RotationNote { rotation_id, journal_id, data: row.blob(2)?.to_vec(), seen_at: row.seconds_rounded(3)? })
        };
        rows.iter().map(note).collect()
    }

    /// When servers last told of an order, or showed that they are there: the journal and the time by the clock of each.
    pub async fn rotation_beats(&self, rotation_id: i64) -> Result<Vec<(i64, UnixSeconds)>, StoreError> {
        if !self.has_rotations() {
            return Ok(Vec::new());
        }
        let query = Query::new(
            "SELECT journal_id, updated_at FROM finial_rotation_servers WHERE rotation_id = ? ORDER BY journal_id",
        );
        let rows = self.connection().await?.all(query.bind(rotation_id)).await?;
        rows.iter().map(|row| Ok((row.int(0)?, row.seconds_rounded(1)?))).collect()
    }

    /// Shows that a server is there which has told of an order, with the time of now.
    pub async fn touch_rotation_note(&self, rotation_id: i64, journal_id: i64) -> Result<(), StoreError> {
        self.demand_rotations().await?;
        let now = self.now();
        transact!(self, |tx| {
            let text = "UPDATE finial_rotation_servers SET updated_at = ? WHERE rotation_id = ? AND journal_id = ?";
            tx.execute(Query::new(text).bind(now).bind(rotation_id).bind(journal_id)).await.map(drop)
        })
    }

    /// Writes what a server tells, with the time of now. One server writes its own note only.
    pub async fn set_rotation_note(&self, note: &RotationNote) -> Result<(), StoreError> {
        self.demand_rotations().await?;
        let now = self.now();
        let data = note.data.as_slice();
        transact!(self, |tx| {
            let query = Query::new(
                "UPDATE finial_rotation_servers SET updated_at = ?, data = ? WHERE rotation_id = ? AND journal_id = ?",
            );
            let query = query.bind(now).bind(data).bind(note.rotation_id).bind(note.journal_id);
            if tx.execute(query).await? == 0 {
                let query = Query::new(
                    "INSERT INTO finial_rotation_servers (created_at, updated_at, rotation_id, journal_id, data) \
                     VALUES (?, ?, ?, ?, ?)",
                );
                let query = query.bind(now).bind(now).bind(note.rotation_id).bind(note.journal_id);
                tx.execute(query.bind(data)).await?;
            }
            Ok(())
        })
    }

    /// Takes the marks from authorities again: by their subject key IDs in lowercase hex, or the IDs of the keys.
    pub async fn untaint_authorities(&self, trust_domain: &TrustDomain, ids: &[String]) -> Result<(), StoreError> {
        let edit = |stored: &mut Bundle| {
            let mut changed = false;
            for authority in stored.x509_authorities.iter_mut().filter(|authority| authority.tainted) {
                authority.tainted = !crate::bundles::subject_key_id(authority).is_ok_and(|id| ids.contains(&id));
                changed |= !authority.tainted;
            }
            for key in stored.jwt_authorities.iter_mut().chain(&mut stored.wit_authorities).filter(|key| key.tainted) {
                key.tainted = !ids.contains(&key.key_id);
                changed |= !key.tainted;
            }
            Ok(changed && crate::bundles::grown(stored))
        };
        self.change(trust_domain, edit).await.map(drop)
    }
}

fn from_row(row: &Row) -> Result<Rotation, StoreError> {
    Ok(Rotation {
        id: row.int(0)?,
        kind: row.int(1)?,
        goal: row.int(2)?,
        revoke: row.flag(3)?,
        forced: row.flag(4)?,
        // kinds begin at 1
        done: row.int(5)? == 0,
        asked_by: row.text(6)?,
        created_at: row.seconds_rounded(7)?,
    })
}

async fn is_there(conn: &mut Conn) -> Result<bool, StoreError> {
    let text = match conn.dialect() {
        Dialect::Sqlite => "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name LIKE 'finial_rotation%'",
        Dialect::Postgres => {
            "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = CURRENT_SCHEMA() \
             AND table_name LIKE 'finial_rotation%'"
        }
        Dialect::MySql => {
            "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE() \
             AND table_name LIKE 'finial_rotation%'"
        }
    };
    Ok(conn.one(Query::once(text)).await?.int(0)? == 2)
}
