//! The datastore: everything a server must not forget, in SPIRE's own schema (version 25), so that SPIRE can open the
//! same data again. One module per aggregate; each method is one transaction and returns after the commit is durable.
//!
//! SQLite, PostgreSQL, MySQL and MariaDB. What they do differently sits in the `sql` module; the other modules are one text.
//! `Store` is a cheap handle to the connections.

mod bundles;
mod connections;
mod dsn;
mod entries;
mod error;
mod events;
mod federation;
mod feed;
mod join_tokens;
mod journals;
mod migrations;
mod nodes;
mod page;
mod replica;
mod rotations;
mod schema;
mod settings;
mod sql;
mod store;

pub use bundles::{BundleMask, DeleteMode};
pub use entries::{CreatedEntry, EntryFilter, EntryRow, EntryUpdate};
pub use error::StoreError;
pub use events::{Event, EventFeed};
pub use federation::{FederationMask, FederationRelationship};
pub use feed::{Beat, EventsSeen, Feed, Listener, Span, Standpoint};
pub use journals::CaJournal;
pub use nodes::{AgentFilter, AgentRow, AgentUpdate};
pub use page::{Listed, Page};
pub use rotations::{Rotation, RotationNote};
pub use settings::{ServerSettings, SqlConfig, StoreSettings};
pub use store::Store;
