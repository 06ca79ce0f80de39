//! `SyncAuthorizedEntries`: an agent learns which entries it may have, and fetches those it does not know yet.

use super::Api;
use super::stream::{Inlet, Outlet};
use crate::authz::{Permit, method};
use crate::entries::Indexed;
use finial_proto::encoded::{Encoded, SyncAuthorizedEntriesResponse};
use finial_proto::server::entry::{self as pb, EntryRevision, SyncAuthorizedEntriesRequest};
use finial_proto::types;
use std::time::Duration;
use tonic::Status;

/// Entries or revisions per message.
const PAGE: usize = 500;
/// IDs per request: twenty pages. SPIRE's agents ask for one page.
const IDS_MAX: usize = 20 * PAGE;
/// How long an agent may be silent on the stream.
pub(super) const IDLE_MAX: Duration = Duration::from_secs(180);

impl Api {
    /// Up to 500 entries are sent at once. Of more, IDs and revisions are sent, in pages, and then whole entries as the
    /// agent asks for them, each request answered for itself, in order of the IDs; IDs that the agent may not have are
    /// silently left out. The mask of the first request holds throughout.
    pub(super) async fn sync_entries(
        &self,
        permit: Permit<method::SyncAuthorizedEntries>,
        mut inlet: Inlet<SyncAuthorizedEntriesRequest>,
        outlet: Outlet<SyncAuthorizedEntriesResponse>,
    ) -> Result<(), Status> {
        let Some(first) = inlet.next().await? else {
            return Err(Status::unknown("EOF"));
        };
        if !first.ids.is_empty() {
            return Err(Status::invalid_argument("specifying IDs on initial request is not supported"));
        }
        let mask = first.output_mask;
        if mask.is_some_and(|mask| !mask.revision_number) {
            return Err(Status::invalid_argument("revision number cannot be masked"));
        }
        // Only now: the agent may have taken its time, and been banned meanwhile.
        permit.still_agent()?;
        let (agent, selectors) = permit.agent()?;
        let entries = self.entries.authorized(agent, &selectors);
        if entries.len() <= PAGE {
            outlet.send(full(&entries, mask.as_ref(), false)).await?;
            permit.audit();
            return Ok(());
        }
        let mut pages = entries.chunks(PAGE).peekable();
        while let Some(page) = pages.next() {
            outlet.send(sparse(page, pages.peek().is_some())).await?;
        }
        drop(entries);
        while let Some(SyncAuthorizedEntriesRequest { mut ids, .. }) = inlet.next().await? {
            permit.still_agent()?;
            if ids.len() > IDS_MAX {
                let message = format!("too many entry IDs in one request: {} (max {IDS_MAX})", ids.len());
                return Err(Status::invalid_argument(message));
            }
            ids.sort_unstable();
            ids.dedup();
            // As they are now: what has changed since its revision was sent comes changed, and what is gone does not come.
            let (agent, selectors) = permit.agent()?;
            let wanted = self.entries.authorized_among(agent, &selectors, ids.iter().map(String::as_str));
            let wanted: Vec<_> = wanted.into_iter().flatten().collect();
            if wanted.is_empty() {
                outlet.send(full(&[], None, false)).await?;
            }
            let mut pages = wanted.chunks(PAGE).peekable();
            while let Some(page) = pages.next() {
                outlet.send(full(page, mask.as_ref(), pages.peek().is_some())).await?;
            }
        }
        permit.audit();
        Ok(())
    }
}

fn full(page: &[Indexed], mask: Option<&types::EntryMask>, more: bool) -> SyncAuthorizedEntriesResponse {
    let head = pb::SyncAuthorizedEntriesResponse { more, ..Default::default() };
    Encoded::with_entries(&head, mask, page.iter().map(Indexed::encoded))
}

fn sparse(page: &[Indexed], more: bool) -> SyncAuthorizedEntriesResponse {
    let revision = |entry: &Indexed| EntryRevision {
        id: entry.id().to_owned(),
        revision_number: entry.revision_number(),
        created_at: entry.created_at(),
    };
    let entry_revisions = page.iter().map(revision).collect();
    Encoded::new(&pb::SyncAuthorizedEntriesResponse { entry_revisions, more, ..Default::default() })
}
