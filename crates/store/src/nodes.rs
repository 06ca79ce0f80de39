//! Attested agents and their selectors.

use crate::entries::{rows as entry_rows, selector_clauses};
use crate::sql::{Conn, Dialect, LIST_MAX, Moment, Query, Row, insert_rows};
use crate::store::transact;
use crate::{EventFeed, Listed, Page, Store, StoreError, events, join_tokens};
use finial_core::{
    AgentRecord, Entry, EntryId, JoinToken, MatchBehavior, Selector, SelectorSet, SpiffeId, UnixSeconds,
};
use std::collections::{HashMap, HashSet};

const SELECT: &str = "SELECT e.id, e.spiffe_id, e.data_type, e.serial_number, e.expires_at, e.new_serial_number, \
    e.new_expires_at, e.can_reattest, e.agent_version FROM attested_node_entries e";

/// An agent and its row ID.
pub type AgentRow = (i64, AgentRecord);

/// Which agents are wanted; every part that is set must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentFilter {
    /// Exactly this attestor.
    pub attestation_type: Option<String>,
    /// The selectors relate so to the given ones; never an empty list.
    pub selectors: Option<(MatchBehavior, Vec<Selector>)>,
    /// Banned or not.
    pub banned: Option<bool>,
    /// May attest again or not.
    pub can_reattest: Option<bool>,
    /// The SVID ends before this moment.
    pub expires_before: Option<UnixSeconds>,
    /// The SVID ends at or after this moment.
    pub valid_at: Option<UnixSeconds>,
}

/// Which parts of an agent an update replaces; `None` leaves a part as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are those of `AgentRecord`
pub struct AgentUpdate {
    pub serial_number: Option<String>,
    pub expires_at: Option<UnixSeconds>,
    pub new_serial_number: Option<String>,
    pub new_expires_at: Option<UnixSeconds>,
    pub can_reattest: Option<bool>,
    pub agent_version: Option<String>,
}

impl Store {
    /// Stores an attested agent with its selectors (`record.selectors` replaces what was there). An agent that exists is
    /// updated: type, serials, expiry and `can_reattest`; its version stays when `record.agent_version` is empty.
    /// Returns it as stored; `Banned` (and nothing stored) for an agent that is banned.
    pub async fn create_or_update_node(&self, record: &AgentRecord) -> Result<AgentRecord, StoreError> {
        self.counted("datastore.node.create", async {
            let now = self.now();
            transact!(self, |tx| put(&mut tx, false, record, now).await)
        })
        .await
    }

    /// In one transaction: uses up the join token and stores the agent, so that a crash cannot burn the token.
    /// The token as it was comes back; `None` (and nothing stored) when it does not exist or was used. A token that has
    /// expired at `now` is used up and comes back, but no agent is stored: compare `expires_at`.
    pub async fn attest_by_join_token(
        &self,
        token: &str,
        record: &AgentRecord,
        now: UnixSeconds,
    ) -> Result<Option<JoinToken>, StoreError> {
        self.counted("datastore.node.create", async {
            let stamp = self.now();
            let mut tries = 0;
            loop {
                let mut tx = self.lend().await?;
                let mut committed = false;
                let result = async {
                    let Some(token) = join_tokens::begin_consume(&mut tx, token).await? else { return Ok(None) };
                    if token.expires_at >= now {
                        committed = record.selectors.is_empty() && self.dialect() == Dialect::Sqlite;
                        put(&mut tx, committed, record, stamp).await?;
                    }
                    Ok(Some(token))
                }
                .await;
                if committed && matches!(result, Ok(_) | Err(StoreError::Banned)) {
                    tx.committed();
                    return result;
                }
                match self.finish(tx, result).await {
                    Err(error) => {
                        tries += 1;
                        if !crate::store::try_again(&error, tries).await {
                            return Err(error);
                        }
                    }
                    done => return done,
                }
            }
        })
        .await
    }

    /// One agent with its selectors.
    pub async fn fetch_node(&self, id: &SpiffeId) -> Result<Option<AgentRecord>, StoreError> {
        self.counted("datastore.node.fetch", async {
            let mut tx = self.read().await?;
            let found = fetch(&mut tx, id, "").await;
            self.finish_read(tx, found).await
        })
        .await
    }

    /// The agents that match, never from the replica: who has just banned or evicted one looks here.
    pub async fn list_nodes(
        &self,
        filter: &AgentFilter,
        page: Option<&Page>,
    ) -> Result<Listed<AgentRecord>, StoreError> {
        self.counted("datastore.node.list", async {
            let mut tx = self.read().await?;
            let listed = list(&mut tx, filter, page, "").await;
            self.finish_read(tx, listed).await
        })
        .await
    }

    /// How many agents match, not from the replica either.
    pub async fn count_nodes(&self, filter: &AgentFilter) -> Result<u64, StoreError> {
        self.counted("datastore.node.count", async {
            let mut tx = self.read().await?;
            let count = count(&mut tx, filter).await;
            self.finish_read(tx, count).await
        })
        .await
    }

    /// At most `count` agents after a row ID, in order of their row IDs, and the row ID to go on from; `None` when there
    /// are no more. All of one page are of one moment.
    pub async fn agents_after(&self, after: i64, count: u32) -> Result<(Vec<AgentRow>, Option<i64>), StoreError> {
        self.counted("datastore.node.list", async {
            let (read, agents) = loop {
                let mut tx = self.read_page().await?;
                let query = Query::new(format!("{SELECT} WHERE e.id > ? ORDER BY e.id LIMIT ?"));
                let page = rows(&mut tx, query.bind(after).bind(count)).await;
                match self.finish_read(tx, page).await {
                    Err(error) if self.leave_replica(&error) => {}
                    result => break result?,
                }
            };
            let full = read.len() >= usize::try_from(count).unwrap_or(usize::MAX);
            Ok((agents, read.last().copied().filter(|_| full)))
        })
        .await
    }

    /// The agents with these IDs, with their row IDs; missing ones are left out.
    pub async fn agent_rows(&self, ids: &[SpiffeId]) -> Result<Vec<AgentRow>, StoreError> {
        self.counted("datastore.node.fetch", async {
            let mut tx = self.read().await?;
            let work = async {
                let mut agents = Vec::with_capacity(ids.len());
                for some in ids.chunks(LIST_MAX) {
                    let mut query = Query::new(format!("{SELECT} WHERE e.spiffe_id IN "));
                    query.push_list(some.iter().map(SpiffeId::as_str));
                    agents.extend(rows(&mut tx, query.keep(some.len() == 1)).await?.1);
                }
                Ok(agents)
            };
            let mut found = {
                let found = work.await;
                self.finish_read(tx, found).await?
            };
            // MySQL finds rows whatever their case
            let wanted: HashSet<&SpiffeId> = ids.iter().collect();
            found.retain(|(_, agent)| wanted.contains(&agent.id));
            Ok(found)
        })
        .await
    }

    /// Changes an agent. `NotFound` when there is none.
    pub async fn update_node(&self, id: &SpiffeId, update: AgentUpdate) -> Result<AgentRecord, StoreError> {
        self.counted("datastore.node.update", async {
            self.change_node(id, |agent| {
                let AgentUpdate {
                    serial_number,
                    expires_at,
                    new_serial_number,
                    new_expires_at,
                    can_reattest,
                    agent_version,
                } = update.clone();
                agent.serial_number = serial_number.unwrap_or(std::mem::take(&mut agent.serial_number));
                agent.expires_at = expires_at.unwrap_or(agent.expires_at);
                agent.new_serial_number = new_serial_number.unwrap_or(std::mem::take(&mut agent.new_serial_number));
                agent.new_expires_at = new_expires_at.unwrap_or(agent.new_expires_at);
                agent.can_reattest = can_reattest.unwrap_or(agent.can_reattest);
                agent.agent_version = agent_version.unwrap_or(std::mem::take(&mut agent.agent_version));
                true
            })
            .await
        })
        .await
    }

    /// The renewed SVID was used: it becomes the current one, if `new_serial` is still the renewed one (else nothing
    /// changes). Returns the agent as it then is.
    pub async fn promote_serial(&self, id: &SpiffeId, new_serial: &str) -> Result<AgentRecord, StoreError> {
        self.counted("datastore.node.update", async {
            self.change_node(id, |agent| {
                let current = !new_serial.is_empty() && agent.new_serial_number == new_serial;
                if current {
                    agent.serial_number = std::mem::take(&mut agent.new_serial_number);
                    agent.expires_at = std::mem::take(&mut agent.new_expires_at);
                }
                current
            })
            .await
        })
        .await
    }

    /// A renewed SVID was given out to the agent that had one of the serial numbers in `follows`; nothing changes if it is
    /// another agent by now (evicted and attested again, or banned). Returns the agent as it then is.
    pub async fn renew_node(
        &self,
        id: &SpiffeId,
        follows: &[Box<str>],
        serial: &str,
        expires_at: UnixSeconds,
    ) -> Result<AgentRecord, StoreError> {
        self.counted("datastore.node.update", async {
            self.change_node(id, |agent| {
                let known = |serial: &str| !serial.is_empty() && follows.iter().any(|follows| **follows == *serial);
                let same =
                    !agent.serial_number.is_empty() && (known(&agent.serial_number) || known(&agent.new_serial_number));
                if same {
                    agent.new_serial_number = serial.to_owned();
                    agent.new_expires_at = expires_at;
                }
                same
            })
            .await
        })
        .await
    }

    /// Clears both serials: the agent stays listed and can never come back until it is deleted.
    pub async fn ban_node(&self, id: &SpiffeId) -> Result<AgentRecord, StoreError> {
        let banned = AgentUpdate {
            serial_number: Some(String::new()),
            new_serial_number: Some(String::new()),
            ..Default::default()
        };
        self.update_node(id, banned).await
    }

    /// Deletes an agent, its selectors and, for a join-token agent, the alias entry made with the token.
    /// Returns the agent and the alias entries that went with it. `NotFound` when there is none.
    pub async fn delete_node(&self, id: &SpiffeId) -> Result<(AgentRecord, Vec<Entry>), StoreError> {
        self.counted("datastore.node.delete", async {
            let now = self.now();
            transact!(self, |tx| delete(&mut tx, id, now).await?.ok_or(StoreError::NotFound))
        })
        .await
    }

    /// Deletes at most `batch` agents whose SVIDs, a renewed one among them that was not used yet, ended before
    /// `expired_before`: never banned ones, never those to `keep`, and those that cannot attest again only when asked.
    /// Returns their IDs and those of the alias entries that went with them.
    pub async fn prune_nodes(
        &self,
        expired_before: UnixSeconds,
        include_non_reattestable: bool,
        batch: u32,
        keep: &HashSet<SpiffeId>,
    ) -> Result<(Vec<SpiffeId>, Vec<EntryId>), StoreError> {
        self.counted("datastore.node.prune", async {
            let filter = AgentFilter {
                banned: Some(false),
                can_reattest: (!include_non_reattestable).then_some(true),
                expires_before: Some(expired_before),
                ..AgentFilter::default()
            };
            let now = self.now();
            let batch = usize::try_from(batch.max(1)).unwrap_or(usize::MAX);
            transact!(self, |tx| {
                let (mut agents, mut entries, mut from) = (Vec::new(), Vec::new(), Some(0));
                // a whole page may be kept, or unreadable
                while let Some(after) = from.filter(|_| agents.len() < batch) {
                    let (read, expired) = expired(&mut tx, &filter, expired_before, after, batch).await?;
                    from = read.last().copied().filter(|_| read.len() >= batch);
                    let left = batch.saturating_sub(agents.len());
                    for (_, agent) in expired.into_iter().filter(|(_, agent)| !keep.contains(&agent.id)).take(left) {
                        // another server may be pruning, too
                        if let Some((agent, aliases)) = delete(&mut tx, &agent.id, now).await? {
                            agents.push(agent.id);
                            entries.extend(aliases.into_iter().map(|entry| entry.id));
                        }
                    }
                }
                Ok((agents, entries))
            })
        })
        .await
    }

    /// Reads, changes and writes back; `edit` says whether there is anything to write.
    async fn change_node(
        &self,
        id: &SpiffeId,
        mut edit: impl FnMut(&mut AgentRecord) -> bool + Send,
    ) -> Result<AgentRecord, StoreError> {
        let now = self.now();
        transact!(self, |tx| {
            let lock = tx.dialect().for_update();
            let mut agent = fetch(&mut tx, id, lock).await?.ok_or(StoreError::NotFound)?;
            if edit(&mut agent) {
                update(&mut tx, &agent, now).await?;
                events::write(&mut tx, EventFeed::Nodes, &[id.as_str()], now).await?;
            }
            Ok(agent)
        })
    }
}

const INSERT: &str = "INSERT INTO attested_node_entries (created_at, updated_at, spiffe_id, data_type, serial_number, \
    expires_at, new_serial_number, new_expires_at, can_reattest, agent_version) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";

/// What makes an insertion create or update.
const OR_UPDATE: &str = " ON CONFLICT (spiffe_id) DO UPDATE SET updated_at = excluded.updated_at, \
    data_type = excluded.data_type, serial_number = excluded.serial_number, expires_at = excluded.expires_at, \
    new_serial_number = excluded.new_serial_number, new_expires_at = excluded.new_expires_at, \
    can_reattest = excluded.can_reattest, agent_version = CASE WHEN excluded.agent_version = '' \
    THEN COALESCE(attested_node_entries.agent_version, '') ELSE excluded.agent_version END \
    WHERE attested_node_entries.serial_number <> '' RETURNING agent_version";

/// What follows on SQLite in the same call, as each costs two switches to the connection's thread.
const THEN: &str = "; DELETE FROM node_resolver_map_entries WHERE spiffe_id = ?; \
    INSERT INTO attested_node_entries_events (created_at, updated_at, spiffe_id) VALUES (?, ?, ?)";

/// Creates or updates, with selectors and event; commits on SQLite if asked to. A banned agent stays banned, whoever
/// banned it while this one attested: `Banned`.
async fn put(conn: &mut Conn, commit: bool, record: &AgentRecord, now: Moment) -> Result<AgentRecord, StoreError> {
    let id = record.id.as_str();
    let mut query = Query::new(INSERT);
    query = query.bind(now).bind(now).bind(id).bind(&record.attestation_type).bind(&record.serial_number);
    query = query.bind(Moment::seconds(record.expires_at)).bind(&record.new_serial_number);
    query = query.bind(none_if_zero(record.new_expires_at)).bind(record.can_reattest).bind(&record.agent_version);
    let agent_version = match conn.dialect() {
        Dialect::Sqlite => {
            query.push(OR_UPDATE).push(THEN).push(if commit { "; COMMIT" } else { "" });
            let row = conn.optional(query.bind(id).bind(now).bind(now).bind(id)).await?;
            row.ok_or(StoreError::Banned)?.text(0)?
        }
        Dialect::Postgres => {
            query.push(OR_UPDATE);
            let version = conn.optional(query).await?.ok_or(StoreError::Banned)?.text(0)?;
            delete_selectors(conn, &record.id).await?;
            events::write(conn, EventFeed::Nodes, &[id], now).await?;
            version
        }
        Dialect::MySql => {
            let version = mysql_put(conn, query, record, now).await?;
            delete_selectors(conn, &record.id).await?;
            events::write(conn, EventFeed::Nodes, &[id], now).await?;
            version
        }
    };
    insert_selectors(conn, &record.id, &record.selectors, now).await?;
    Ok(AgentRecord { agent_version, ..record.clone() })
}

/// The index of MySQL takes names that differ in case only for the same, and `ON DUPLICATE KEY` would give one agent's
/// row to the other. So the row is looked for first.
async fn mysql_put(
    conn: &mut Conn,
    insert: Query<'_>,
    record: &AgentRecord,
    now: Moment,
) -> Result<String, StoreError> {
    let lock = conn.dialect().for_update();
    let Some(stored) = fetch(conn, &record.id, lock).await? else {
        return match conn.execute(insert).await {
            Ok(_) => Ok(record.agent_version.clone()),
            Err(StoreError::AlreadyExists(text)) => match like(conn, &record.id).await? {
                Some(other) => Err(StoreError::FailedPrecondition(format!(
                    "the agent cannot be told from {other} by this database, which ignores case: use names that differ in more"
                ))),
                // attested at another server a moment ago: the next try finds it
                None => Err(StoreError::Contended(text)),
            },
            Err(error) => Err(error),
        };
    };
    if stored.is_banned() {
        return Err(StoreError::Banned);
    }
    let mut new = record.clone();
    if new.agent_version.is_empty() {
        new.agent_version = stored.agent_version;
    }
    update(conn, &new, now).await?;
    Ok(new.agent_version)
}

/// The agent whose ID MySQL takes for this one, although it differs.
async fn like(conn: &mut Conn, id: &SpiffeId) -> Result<Option<String>, StoreError> {
    let query = Query::new("SELECT spiffe_id FROM attested_node_entries WHERE spiffe_id = ?").bind(id.as_str());
    let found = conn.optional(query).await?.map(|row| row.text(0)).transpose()?;
    Ok(found.filter(|found| found != id.as_str()))
}

async fn update(conn: &mut Conn, agent: &AgentRecord, now: Moment) -> Result<(), StoreError> {
    let query = Query::new(
        "UPDATE attested_node_entries SET updated_at = ?, data_type = ?, serial_number = ?, expires_at = ?, \
         new_serial_number = ?, new_expires_at = ?, can_reattest = ?, agent_version = ? WHERE spiffe_id = ?",
    );
    let query = query.bind(now).bind(&agent.attestation_type).bind(&agent.serial_number);
    let query = query.bind(Moment::seconds(agent.expires_at)).bind(&agent.new_serial_number);
    let query = query.bind(none_if_zero(agent.new_expires_at)).bind(agent.can_reattest).bind(&agent.agent_version);
    conn.execute(query.bind(agent.id.as_str())).await.map(drop)
}

async fn insert_selectors(conn: &mut Conn, id: &SpiffeId, set: &SelectorSet, now: Moment) -> Result<(), StoreError> {
    let rows = set.as_slice().iter().map(|selector| {
        [now.into(), now.into(), id.as_str().into(), (&selector.kind).into(), (&selector.value).into()]
    });
    conn.execute_all(insert_rows("node_resolver_map_entries (created_at, updated_at, spiffe_id, type, value)", rows))
        .await
}

async fn delete_selectors(conn: &mut Conn, id: &SpiffeId) -> Result<(), StoreError> {
    let query = Query::new("DELETE FROM node_resolver_map_entries WHERE spiffe_id = ?");
    conn.execute(query.bind(id.as_str())).await.map(drop)
}

/// The agent and the alias entries that went with it; `None` when there is none.
async fn delete(conn: &mut Conn, id: &SpiffeId, now: Moment) -> Result<Option<(AgentRecord, Vec<Entry>)>, StoreError> {
    let lock = conn.dialect().for_update();
    let Some(agent) = fetch(conn, id, lock).await? else { return Ok(None) };
    let mut aliases = Vec::new();
    if agent.attestation_type == "join_token" {
        // what the creation of a token with an agent ID makes; other entries below the agent are the operator's
        for (row, entry) in entry_rows::children(conn, id).await? {
            let own = |s: &Selector| s.kind == "spiffe_id" && s.value == id.as_str();
            if entry.selectors.len() == 1 && entry.selectors.iter().all(own) {
                entry_rows::delete(conn, &[row]).await?;
                aliases.push(entry);
            }
        }
        let ids: Vec<&str> = aliases.iter().map(|entry| entry.id.as_str()).collect();
        events::write(conn, EventFeed::Entries, &ids, now).await?;
    }
    delete_selectors(conn, id).await?;
    conn.execute(Query::new("DELETE FROM attested_node_entries WHERE spiffe_id = ?").bind(id.as_str())).await?;
    events::write(conn, EventFeed::Nodes, &[id.as_str()], now).await?;
    Ok(Some((agent, aliases)))
}

async fn fetch(conn: &mut Conn, id: &SpiffeId, lock: &str) -> Result<Option<AgentRecord>, StoreError> {
    let query = Query::new(format!("{SELECT} WHERE e.spiffe_id = ?{lock}")).bind(id.as_str());
    let rows = conn.all(query).await?;
    // MySQL finds rows whatever their case
    Ok(hydrate(conn, &rows).await?.pop().filter(|agent| agent.id == *id))
}

async fn list(
    conn: &mut Conn,
    filter: &AgentFilter,
    page: Option<&Page>,
    lock: &str,
) -> Result<Listed<AgentRecord>, StoreError> {
    let mut query = Query::once(format!("{SELECT} WHERE e.id > "));
    query.push_bind(page.map_or(Ok(0), Page::after)?);
    filter.clauses(&mut query, conn.dialect())?;
    query.push(" ORDER BY e.id");
    if let Some(page) = page {
        query.push(" LIMIT ").push_bind(page.size);
    }
    query.push(lock);
    let rows = conn.all(query).await?;
    let last = rows.last().map(|row| row.int(0)).transpose()?;
    Ok(Listed::new(hydrate(conn, &rows).await?, page, last))
}

/// At most `limit` rows after one, whose agents match, and whose renewed SVID, if there is one, has ended, too; and the agents
/// among them.
async fn expired(
    conn: &mut Conn,
    filter: &AgentFilter,
    before: UnixSeconds,
    after: i64,
    limit: usize,
) -> Result<(Vec<i64>, Vec<AgentRow>), StoreError> {
    let mut query = Query::once(format!("{SELECT} WHERE e.id > "));
    query.push_bind(after);
    filter.clauses(&mut query, conn.dialect())?;
    query.push(" AND (e.new_expires_at IS NULL OR ").push_time(conn.dialect(), "e.new_expires_at", "<", before);
    query.push(") ORDER BY e.id LIMIT ").push_bind(i64::try_from(limit).unwrap_or(i64::MAX));
    query.push(conn.dialect().for_update());
    rows(conn, query).await
}

/// The row IDs of what was read, and the agents among them.
async fn rows(conn: &mut Conn, query: Query<'_>) -> Result<(Vec<i64>, Vec<AgentRow>), StoreError> {
    let read = conn.all(query).await?;
    let name = |row: &Row| row.text(1).unwrap_or_default(); // of a bad row, which is left out
    let numbers = read.iter().map(|row| Ok((name(row), row.int(0)?))).collect::<Result<Vec<_>, StoreError>>()?;
    let by_id: HashMap<&str, i64> = numbers.iter().map(|(id, row)| (id.as_str(), *row)).collect();
    let agents = hydrate(conn, &read).await?.into_iter();
    let agents = agents.map(|agent| (by_id.get(agent.id.as_str()).copied().unwrap_or_default(), agent)).collect();
    Ok((numbers.iter().map(|(_, row)| *row).collect(), agents))
}

async fn count(conn: &mut Conn, filter: &AgentFilter) -> Result<u64, StoreError> {
    let mut query = Query::once("SELECT COUNT(*) FROM attested_node_entries e WHERE 1 = 1");
    filter.clauses(&mut query, conn.dialect())?;
    Ok(conn.one(query).await?.int(0)?.unsigned_abs())
}

impl AgentFilter {
    fn clauses<'q>(&'q self, query: &mut Query<'q>, dialect: Dialect) -> Result<(), StoreError> {
        if let Some(kind) = &self.attestation_type {
            query.and_equals(dialect, "e.data_type", kind);
        }
        if let Some(banned) = self.banned {
            query.push(if banned { " AND e.serial_number = ''" } else { " AND e.serial_number <> ''" });
        }
        if let Some(can) = self.can_reattest {
            query.push(" AND e.can_reattest = ").push_bind(can);
        }
        if let Some(before) = self.expires_before {
            query.push(" AND ").push_time(dialect, "e.expires_at", "<", before);
        }
        if let Some(at) = self.valid_at {
            query.push(" AND ").push_time(dialect, "e.expires_at", ">=", at);
        }
        if let Some((behavior, selectors)) = &self.selectors {
            selector_clauses(query, dialect, *behavior, selectors)?;
        }
        Ok(())
    }
}

/// Completes rows of [`SELECT`] with their selectors; a row that cannot be an agent is logged and left out.
async fn hydrate(conn: &mut Conn, rows: &[Row]) -> Result<Vec<AgentRecord>, StoreError> {
    let mut agents = Vec::with_capacity(rows.len());
    for some in rows.chunks(LIST_MAX) {
        let ids: Vec<&str> = some.iter().map(|row| row.str(1).unwrap_or_default()).collect();
        let mut query = Query::new("SELECT spiffe_id, type, value FROM node_resolver_map_entries WHERE spiffe_id IN ");
        query.push_list(ids.iter().copied());
        let selector = |row: &Row| Ok(Selector { kind: row.text(1)?, value: row.text(2)? });
        let mut selectors = HashMap::with_capacity(ids.len());
        for row in conn.all(query.keep(ids.len() == 1)).await? {
            entry_rows::add_part(selectors.entry(row.text(0)?).or_insert(Ok(Vec::new())), selector(&row));
        }
        for (id, row) in ids.iter().zip(some) {
            let selectors = selectors.remove(*id).unwrap_or(Ok(Vec::new()));
            match selectors.and_then(|selectors| from_row(row, SelectorSet::new(selectors))) {
                Ok(agent) => agents.push(agent),
                Err(error) => {
                    let row = row.int(0).unwrap_or_default();
                    tracing::error!(row, spiffe_id = id, %error, "Invalid agent in the datastore; left out");
                }
            }
        }
    }
    Ok(agents)
}

fn from_row(row: &Row, selectors: SelectorSet) -> Result<AgentRecord, StoreError> {
    let name = row.str(1)?;
    let bad =
        |e: finial_core::SpiffeIdError| StoreError::BadRow { what: format!("agent {name:?}"), cause: e.to_string() };
    Ok(AgentRecord {
        id: SpiffeId::parse(name).map_err(bad)?,
        attestation_type: row.text(2)?,
        serial_number: row.text(3)?,
        expires_at: row.seconds(4)?,
        new_serial_number: row.text(5)?,
        new_expires_at: row.seconds(6)?,
        can_reattest: row.flag(7)?,
        agent_version: row.text(8)?,
        selectors,
    })
}

/// A moment that is not set is NULL.
fn none_if_zero(seconds: UnixSeconds) -> Option<Moment> {
    (seconds != 0).then(|| Moment::seconds(seconds))
}
