//! The datastore: everything a server must not forget, in SPIRE's own schema (version 25), so that SPIRE can open the
//! same data again. One module per aggregate; each method is one transaction and returns after the commit is durable.
//!
//! SQLite today. What another database does differently (placeholders, time text, lock clauses) sits in the `sql` module.
//! Shape: one writing connection, a few reading ones; `Store` is a cheap handle to both.

mod bundles;
mod connections;
mod entries;
mod error;
mod events;
mod join_tokens;
mod journals;
mod migrations;
mod nodes;
mod page;
mod schema;
mod settings;
mod sql;
mod store;

pub use bundles::{BundleMask, DeleteMode};
pub use entries::{CreatedEntry, EntryFilter, EntryUpdate};
pub use error::StoreError;
pub use events::{Event, EventFeed};
pub use journals::CaJournal;
pub use nodes::{AgentFilter, AgentUpdate};
pub use page::{Listed, Page};
pub use settings::{SqlConfig, StoreSettings};
pub use store::Store;
