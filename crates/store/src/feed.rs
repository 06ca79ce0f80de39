//! What a server needs to follow what others write into the same database: where the events are, which numbers they
//! skipped, and whether bundles changed. See `docs/adr/0006-the-event-feed.md`.
//!
//! SQLite has one server, which knows what it wrote.

use crate::events::Event;
use crate::sql::{Dialect, Query};
use crate::{EventFeed, Store, StoreError};
use sqlx::postgres::{PgListener, PgPoolOptions};
use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Numbers of events, from the first to the last, both included.
pub type Span = (i64, i64);

/// Which PostgreSQL database it is, also on a standby.
pub(crate) const DATABASE: &str = "(SELECT system_identifier::text FROM pg_control_system()) || ':' \
    || (SELECT oid::text FROM pg_database WHERE datname = current_database()) || ':'";
/// Which history of it a primary writes, in hexadecimal.
pub(crate) const TIMELINE: &str = "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)";
/// The channel on which writers tell that there is something new (PostgreSQL).
const CHANNEL: &str = "finial_changes";
/// How long connecting to listen may take.
const LISTEN_MAX: Duration = Duration::from_secs(10);
/// How often our own tables are looked for where there are none.
const LOOK_AGAIN_SECONDS: u64 = 60;

/// What one look at the database says, of one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beat {
    /// No transaction below this runs any more; compares with [`Feed::mark`].
    pub horizon: u64,
    /// Which history of which database this is; another text means another one. Empty when the database does not tell.
    pub history: String,
    /// The events of entries.
    pub entries: EventsSeen,
    /// The events of agents.
    pub agents: EventsSeen,
    /// Changes with every change of a bundle.
    pub bundles: String,
    /// Changes with every change of a federation relationship.
    pub federation: String,
    /// Changes with every order to replace authorities.
    pub rotations: String,
}

/// One table of events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventsSeen {
    /// The lowest number; 0 without events.
    pub first: i64,
    /// The highest number; 0 without events.
    pub last: i64,
    /// How many there are in the spans that were asked for.
    pub within: i64,
}

/// Where a table of events stands before everything is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standpoint {
    /// The highest number; 0 without events.
    pub last: i64,
    /// What is skipped below it, all the way from 1; of very much, the newest.
    pub skipped: VecDeque<Span>,
}

/// Of more skipped spans than this the oldest are left out: before whoever could still fill them ends, so many newer numbers
/// were skipped. (Told as one span they would make a reader read, and split, everything in between, again and again.)
const SKIPPED_MAX: usize = 50_000;

/// The events of a database that several servers share.
pub struct Feed {
    store: Store,
    /// The database refuses to tell its history, as some that only resemble PostgreSQL do.
    no_history: AtomicBool,
    begin: Instant,
    /// In which second after that our own tables are looked for again, where there were none.
    look_again: AtomicU64,
    /// How long an event may come late where the database does not tell which transactions run.
    late_max: Duration,
}

impl Store {
    /// Whether other servers may write into the same database.
    pub fn is_shared(&self) -> bool {
        self.dialect() != Dialect::Sqlite
    }

    /// The feed. `late_max` is how long an event may be committed after one with a higher number, where the database does
    /// not tell which transactions run (MySQL): SPIRE's `event_timeout`.
    pub fn feed(&self, late_max: Duration) -> Feed {
        Feed {
            store: self.clone(),
            no_history: AtomicBool::new(false),
            begin: Instant::now(),
            look_again: AtomicU64::new(0),
            late_max,
        }
    }
}

impl Feed {
    /// Looks at everything at once, with one statement. The spans are those of entries' and of agents' events in which
    /// late ones are to be counted.
    pub async fn beat(&self, entries: &[Span], agents: &[Span]) -> Result<Beat, StoreError> {
        let second = self.begin.elapsed().as_secs();
        if !self.store.has_rotations() && second >= self.look_again.load(Ordering::Relaxed) {
            // Another server may have made our own tables since.
            self.look_again.store(second.saturating_add(LOOK_AGAIN_SECONDS), Ordering::Relaxed);
            self.store.look_for_rotations(false).await?;
        }
        match self.look(entries, agents).await {
            // Another database may be here by now, without our own tables.
            Err(StoreError::Database(_))
                if self.store.has_rotations() && !self.store.look_for_rotations(false).await? =>
            {
                self.look(entries, agents).await
            }
            Err(StoreError::Database(text)) if !self.no_history.swap(true, Ordering::Relaxed) => {
                tracing::info!(
                    reason = text,
                    "The database does not tell its history; it is read anew after each outage"
                );
                self.look(entries, agents).await
            }
            result => result,
        }
    }

    async fn look(&self, entries: &[Span], agents: &[Span]) -> Result<Beat, StoreError> {
        let dialect = self.store.dialect();
        let text = match dialect {
            Dialect::Postgres => self.postgres_beat(entries, agents),
            Dialect::MySql | Dialect::Sqlite => mysql_beat(entries, agents, self.store.has_rotations()),
        };
        let now = self.moment();
        let mut conn = self.store.connection().await?;
        let steady = entries.is_empty() && agents.is_empty();
        let row = conn.one(Query::new(text).keep(steady)).await?;
        let seen = |at: usize| -> Result<EventsSeen, StoreError> {
            Ok(EventsSeen { first: row.int(at)?, last: row.int(at + 1)?, within: row.int(at + 2)? })
        };
        let horizon = match dialect {
            Dialect::Postgres if row.str(0)?.is_empty() => {
                return Err(StoreError::Unavailable {
                    what: "PostgreSQL".into(),
                    detail: "is a standby, which may be behind".into(),
                    advice: "connection_string must lead to the primary",
                });
            }
            Dialect::Postgres => number(row.str(0)?)?,
            _ => now,
        };
        Ok(Beat {
            horizon,
            history: row.text(1)?,
            entries: seen(2)?,
            agents: seen(5)?,
            bundles: row.text(8)?,
            federation: row.text(9)?,
            rotations: row.text(10)?,
        })
    }

    /// A standby gives no horizon, and is not followed: what it shows may be older than what is known.
    fn postgres_beat(&self, entries: &[Span], agents: &[Span]) -> String {
        let history = if self.no_history.load(Ordering::Relaxed) {
            "''".to_owned()
        } else {
            format!("CASE WHEN pg_is_in_recovery() THEN '' ELSE {DATABASE} || {TIMELINE} END")
        };
        let fingerprint = |table: &str| {
            format!(
                "COALESCE((SELECT md5(string_agg(id::text || ':' || xmin::text, ',' ORDER BY id)) FROM {table}), '')"
            )
        };
        format!(
            "SELECT CASE WHEN pg_is_in_recovery() THEN '' ELSE pg_snapshot_xmin(pg_current_snapshot())::text END, {history}, {}, {}, {}, {}, {}",
            seen_columns(EventFeed::Entries, entries, "BIGINT"),
            seen_columns(EventFeed::Nodes, agents, "BIGINT"),
            fingerprint("bundles"),
            fingerprint("federated_trust_domains"),
            if self.store.has_rotations() { fingerprint("finial_rotations") } else { "''".into() },
        )
    }

    /// At most `limit` events, in order: those above `after`.
    pub async fn events_after(&self, feed: EventFeed, after: i64, limit: u32) -> Result<Vec<Event>, StoreError> {
        let (table, subject) = feed.table();
        let text = format!("SELECT id, {subject} FROM {table} WHERE id > ? ORDER BY id LIMIT ?");
        self.store.counted(feed.calls().0, self.events(Query::new(text).bind(after).bind(limit))).await
    }

    /// The events within these spans, in order.
    pub async fn events_within(&self, feed: EventFeed, spans: &[Span]) -> Result<Vec<Event>, StoreError> {
        let (table, subject) = feed.table();
        let text = format!("SELECT id, {subject} FROM {table} WHERE {} ORDER BY id", within(spans));
        self.store.counted(feed.calls().0, self.events(Query::once(text))).await
    }

    async fn events(&self, query: Query<'_>) -> Result<Vec<Event>, StoreError> {
        let mut conn = self.store.connection().await?;
        let rows = conn.all(query).await?;
        // A subject that is no text names nothing.
        rows.iter().map(|row| Ok(Event { id: row.int(0)?, subject: row.text(1).unwrap_or_default() })).collect()
    }

    /// A mark for what was skipped so far: whoever may still fill it runs below the mark. It is the ID of a transaction
    /// of its own: transactions change a row, and so have their ID, before they take the number of an event, and thus a
    /// number that was seen skipped was taken by one with a lower ID. (The end of a snapshot would not do: it knows
    /// nothing of transactions that began after the last one that ended.)
    pub async fn mark(&self) -> Result<u64, StoreError> {
        if self.store.dialect() != Dialect::Postgres {
            let late = u64::try_from(self.late_max.as_millis()).unwrap_or(u64::MAX);
            return Ok(self.moment().saturating_add(late));
        }
        let mut conn = self.store.connection().await?;
        number(conn.one(Query::new("SELECT pg_current_xact_id()::text")).await?.str(0)?)
    }

    /// Where the events stand. Whoever reads everything after this has missed nothing but what comes later or in between.
    pub async fn standpoint(&self, feed: EventFeed) -> Result<Standpoint, StoreError> {
        let (table, _) = feed.table();
        let text = format!(
            "SELECT above + 1, id - 1 FROM (SELECT id, COALESCE(LAG(id) OVER (ORDER BY id), 0) AS above FROM {table}) AS steps \
             WHERE id > above + 1 UNION ALL SELECT 0, COALESCE(MAX(id), 0) FROM {table} ORDER BY 1"
        );
        let mut conn = self.store.connection().await?;
        let mut standpoint = Standpoint::default();
        conn.each(Query::once(text), |row| {
            match (row.int(0)?, row.int(1)?) {
                (0, last) => standpoint.last = last,
                span => {
                    standpoint.skipped.push_back(span);
                    if standpoint.skipped.len() > SKIPPED_MAX {
                        standpoint.skipped.pop_front();
                    }
                }
            }
            Ok(())
        })
        .await?;
        Ok(standpoint)
    }

    /// Milliseconds since this feed was made.
    fn moment(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Hears when somebody has written. `None` where the database cannot tell.
    pub async fn listen(&self) -> Result<Option<Listener>, StoreError> {
        let Some(options) = self.store.connector().postgres_options() else { return Ok(None) };
        // one connection, and nothing that would end it
        let pool = PgPoolOptions::new().max_connections(1).max_lifetime(None).idle_timeout(None);
        let connect = async {
            let pool = pool.acquire_timeout(LISTEN_MAX).connect_lazy_with(options);
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.ignore_pool_close_event(true);
            listener.listen(CHANNEL).await?;
            Ok(listener)
        };
        match tokio::time::timeout(LISTEN_MAX, connect).await {
            Ok(Ok(listener)) => Ok(Some(Listener(listener))),
            Ok(Err(error)) => Err(self.store.connector().fault(error)),
            Err(_) => Err(self.store.connector().fault(sqlx::Error::PoolTimedOut)),
        }
    }
}

/// Hears when somebody has written.
pub struct Listener(PgListener);

impl Listener {
    /// Waits for the next time; `false` when the connection has ended.
    pub async fn heard(&mut self) -> bool {
        matches!(self.0.try_recv().await, Ok(Some(_)))
    }
}

/// First and last number of a table, and how many rows lie within the spans.
fn seen_columns(feed: EventFeed, spans: &[Span], int: &str) -> String {
    let (table, _) = feed.table();
    let count = match spans {
        [] => "0".to_owned(),
        spans => format!("(SELECT COUNT(*) FROM {table} WHERE {})", within(spans)),
    };
    format!(
        "CAST(COALESCE((SELECT MIN(id) FROM {table}), 0) AS {int}), \
         CAST(COALESCE((SELECT MAX(id) FROM {table}), 0) AS {int}), CAST({count} AS {int})"
    )
}

/// The numbers are ours, so they stand in the text.
fn within(spans: &[Span]) -> String {
    let mut text = String::with_capacity(spans.len() * 32);
    for (nth, (from, to)) in spans.iter().enumerate() {
        // writing into a string cannot fail
        let _ = write!(text, "{}id BETWEEN {from} AND {to}", if nth == 0 { "" } else { " OR " });
    }
    text
}

/// A row is told by its content, as MySQL has nothing that changes with every write of a row.
fn mysql_beat(entries: &[Span], agents: &[Span], rotations: bool) -> String {
    let fingerprint = |table: &str, columns: &str| {
        format!(
            "(SELECT CONCAT(COUNT(*), ':', COALESCE(BIT_XOR(CAST(CONV(LEFT(MD5(CONCAT_WS('|', {columns})), 15), 16, 10) \
             AS UNSIGNED)), 0)) FROM {table})"
        )
    };
    format!(
        "SELECT '', '', {}, {}, {}, {}, {}",
        seen_columns(EventFeed::Entries, entries, "SIGNED"),
        seen_columns(EventFeed::Nodes, agents, "SIGNED"),
        fingerprint("bundles", "id, trust_domain, MD5(data)"),
        fingerprint(
            "federated_trust_domains",
            "id, trust_domain, bundle_endpoint_url, bundle_endpoint_profile, COALESCE(endpoint_spiffe_id, '')"
        ),
        if rotations { fingerprint("finial_rotations", "id, goal, open_kind") } else { "''".into() },
    )
}

fn number(text: &str) -> Result<u64, StoreError> {
    text.parse().map_err(|e: std::num::ParseIntError| StoreError::BadRow {
        what: format!("transaction ID {text:?}"),
        cause: e.to_string(),
    })
}
