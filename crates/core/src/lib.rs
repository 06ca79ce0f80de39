//! The vocabulary of a trust domain: names, selectors, entries, bundles, time and secrets.
//!
//! Pure values, parsed at the edge and then trusted: no I/O, no async. Every other crate builds on these and adds no
//! second spelling of any of them. Start at [`SpiffeId`].

mod bundle;
mod entry;
mod error;
mod federation;
mod id;
mod key;
mod node;
mod secret;
mod selector;
mod time;

pub use bundle::{Bundle, JwtAuthority, X509Authority, X509Svid};
pub use entry::{Entry, EntryId, EntryIdError};
pub use error::{ErrorKind, Fault};
pub use federation::EndpointProfile;
pub use id::{SpiffeId, SpiffeIdError, TrustDomain};
pub use key::KeyType;
pub use node::{AgentRecord, JoinToken};
pub use secret::Secret;
pub use selector::{MatchBehavior, Selector, SelectorError, SelectorSet};
pub use time::{Clock, ManualClock, SystemClock, UnixSeconds};
