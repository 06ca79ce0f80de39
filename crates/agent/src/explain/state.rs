//! What is with the SVID of an entry that fits.

use crate::cache::Record;
use finial_core::EntryId;
use finial_proto::agent::explain::State;

/// What is known besides the record.
pub(super) struct Circumstances<'a> {
    pub(super) now_ms: i64,
    /// An entry with the same hint, which is shown in this one's place.
    pub(super) hidden_by: Option<&'a EntryId>,
    /// Why the server did not issue for this entry, when it was asked last.
    pub(super) refused: Option<&'a str>,
    /// Why the server cannot be asked.
    pub(super) away: Option<&'a str>,
}

/// The state, and the reason if that says too little.
pub(super) fn state(record: &Record, around: &Circumstances<'_>) -> (State, String) {
    let state = match &record.svid {
        None => State::Waiting,
        Some(svid) if svid.not_after.saturating_mul(1000) <= around.now_ms => State::Expired,
        Some(svid) if svid.rotate_at_ms <= around.now_ms || svid.revision_number != record.entry.revision_number => {
            State::Renewing
        }
        Some(_) => State::Issued,
    };
    if record.entry.store_svid {
        return (State::Hidden, "the entry is for SVID stores (-storeSVID), not for the Workload API".into());
    }
    if let Some(other) = around.hidden_by {
        return (State::Hidden, format!("entry {other} has the same hint {:?} and is older", record.entry.hint));
    }
    if state == State::Issued {
        return (state, String::new());
    }
    let reason = match (around.refused, around.away) {
        (Some(refused), _) => format!("the server did not issue it: {refused}"),
        (None, Some(away)) => format!("the server cannot be asked: {away}"),
        (None, None) if state != State::Waiting => "its successor is being asked for".into(),
        (None, None) if record.entry.disable_x509_svid_prefetch => {
            "it is asked for when the workload wants it (the entry has prefetching disabled)".into()
        }
        (None, None) => "it is being asked for; or the cache is full (x509_svid_cache_max_size), and it is asked for when the workload wants it".into(),
    };
    (state, reason)
}
