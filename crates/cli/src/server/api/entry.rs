//! `entry create`, `update`, `show`, `count`, `delete`.

use super::bulk::{Progress, batches};
use super::{ANSWER_BYTES_MAX, entry_file, id, match_number, plural, print, selector, selectors, wire_int};
use crate::app::Command;
use crate::context::Context;
use crate::goflag::{FlagSet, Flags};
use crate::rpc::RpcExt;
use anyhow::{Context as _, bail, ensure};
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::server::entry::{self as pb, count_entries_request, list_entries_request};
use finial_proto::types;
use prost::Message;
use std::cmp::Ordering;
use tonic::transport::Channel;

/// Entries per page of `entry show`.
const PAGE: i32 = 500;
const DOWNSTREAM: &str = "A boolean value that, when set, indicates that the entry describes a downstream SPIRE server";
const MATCH_SELECTORS: &str =
    "The match mode used when filtering by selectors. Options: exact, any, superset and subset";
const MATCH_FEDERATES: &str =
    "The match mode used when filtering by federates with. Options: exact, any, superset and subset";

pub(crate) fn commands() -> Vec<Command> {
    vec![
        Command::server("entry create", "Creates registration entries", create_flags, |cx| Box::pin(create(cx))),
        Command::server("entry update", "Updates registration entries", update_flags, |cx| Box::pin(update(cx))),
        Command::server("entry show", "Displays configured registration entries", show_flags, |cx| Box::pin(show(cx))),
        Command::server("entry count", "Count registration entries", count_flags, |cx| Box::pin(count(cx))),
        Command::server("entry delete", "Deletes registration entries", delete_flags, |cx| Box::pin(delete(cx))),
    ]
}

pub(crate) fn client(cx: &Context) -> anyhow::Result<EntryClient<Channel>> {
    Ok(EntryClient::new(cx.server()?).max_decoding_message_size(ANSWER_BYTES_MAX))
}

fn create_flags(f: &mut FlagSet) {
    f.string(
        "entryID",
        "",
        "A custom ID for this registration entry (optional). If not set, a new entry ID will be generated",
    );
    f.bool("node", "If set, this entry will be applied to matching nodes rather than workloads");
    written_flags(f);
}

fn update_flags(f: &mut FlagSet) {
    f.string("entryID", "", "The Registration Entry ID of the record to update");
    written_flags(f);
}

/// What `create` and `update` share.
fn written_flags(f: &mut FlagSet) {
    f.string("parentID", "", "The SPIFFE ID of this record's parent");
    f.string("spiffeID", "", "The SPIFFE ID that this record represents");
    f.int("x509SVIDTTL", 0, "The lifetime, in seconds, for x509-SVIDs issued based on this registration entry.");
    f.int("jwtSVIDTTL", 0, "The lifetime, in seconds, for JWT-SVIDs issued based on this registration entry.");
    f.string(
        "data",
        "",
        "Path to a file containing registration JSON (optional). If set to '-', read the JSON from stdin.",
    );
    f.strings("selector", "A colon-delimited type:value selector. Can be used more than once");
    f.strings("federatesWith", "SPIFFE ID of a trust domain to federate with. Can be used more than once");
    f.bool("admin", "If set, the SPIFFE ID in this entry will be granted access to the SPIRE Server's management APIs");
    f.bool(
        "storeSVID",
        "A boolean value that, when set, indicates that the resulting issued SVID from this entry must be stored through an SVIDStore plugin",
    );
    f.bool("downstream", DOWNSTREAM);
    f.int("entryExpiry", 0, "An expiry, from epoch in seconds, for the resulting registration entry to be pruned");
    f.strings("dns", "A DNS name that will be included in SVIDs issued based on this entry, where appropriate. Can be used more than once");
    f.string("hint", "", "The entry hint, used to disambiguate entries with the same SPIFFE ID");
    f.bool("disableX509SVIDPrefetch", "A boolean value that, when set, disables prefetching X509 SVID for this entry");
    f.bool(
        "jwtSVIDIncludeJTI",
        "A boolean value that, when set, includes a unique 'jti' claim in JWT-SVIDs issued for this entry and bypasses the agent JWT-SVID cache",
    );
    f.output();
}

async fn create(cx: Context) -> anyhow::Result<()> {
    let flags = &cx.flags;
    let entries = match flags.string("data") {
        "" => {
            let node = flags.bool("node");
            ensure!(!flags.strings("selector").is_empty(), "at least one selector is required");
            ensure!(!node || flags.strings("federatesWith").is_empty(), "node entries can not federate");
            ensure!(
                node || !flags.string("parentID").is_empty(),
                "a parent ID is required if the node flag is not set"
            );
            check_written(flags)?;
            let mut entry = written(flags, node)?;
            let (prefetch, jti) = (flags.bool("disableX509SVIDPrefetch"), flags.bool("jwtSVIDIncludeJTI"));
            entry.additional_attributes = (prefetch || jti).then_some(types::entry::AdditionalAttributes {
                disable_x509_svid_prefetch: prefetch,
                jwt_svid_include_jti: jti,
            });
            vec![entry]
        }
        path => entry_file::entries(&cx, path)?,
    };
    let mut client = client(&cx)?;
    let mut progress = Progress::new(&cx, "created", "entries", entries.len());
    let mut response = pb::BatchCreateEntryResponse::default();
    let mut all_succeeded = true;
    for batch in batches(entries, Message::encoded_len) {
        let request = pb::BatchCreateEntryRequest { entries: batch.clone(), output_mask: None };
        let answer = client.batch_create_entry(request).await.rpc();
        let results = answer.map_err(|error| progress.stopped(error))?.results;
        let results = results.into_iter().zip(batch).map(|(mut result, entry)| {
            if !print::is_ok(result.status.as_ref()) {
                // the server does not repeat what it refused
                result.entry = Some(entry);
            }
            result
        });
        let results: Vec<_> = results.collect();
        let shown = results.iter().map(|r| (r.status.as_ref(), r.entry.as_ref()));
        all_succeeded &= print_results(&cx, "create", &mut progress, shown);
        if cx.json() {
            response.results.extend(results);
        }
    }
    progress.end();
    let is_json = print::json_message(&cx, "spire.api.server.entry.v1.BatchCreateEntryResponse", &response)?;
    ensure!(is_json || all_succeeded, "failed to create one or more entries");
    Ok(())
}

async fn update(cx: Context) -> anyhow::Result<()> {
    let flags = &cx.flags;
    let mut client = client(&cx)?;
    let entries = match flags.string("data") {
        "" => {
            ensure!(!flags.string("entryID").is_empty(), "entry ID is required");
            ensure!(!flags.strings("selector").is_empty(), "at least one selector is required");
            ensure!(!flags.string("parentID").is_empty(), "a parent ID is required");
            check_written(flags)?;
            let mut entry = written(flags, false)?;
            entry.additional_attributes = merged_attributes(flags, &mut client).await?;
            vec![entry]
        }
        path => entry_file::entries(&cx, path)?,
    };
    let mut progress = Progress::new(&cx, "updated", "entries", entries.len());
    let mut response = pb::BatchUpdateEntryResponse::default();
    let mut all_succeeded = true;
    for batch in batches(entries, Message::encoded_len) {
        let request = pb::BatchUpdateEntryRequest { entries: batch.clone(), input_mask: None, output_mask: None };
        let answer = client.batch_update_entry(request).await.rpc();
        let results = answer.map_err(|error| progress.stopped(error))?.results;
        let results = results.into_iter().zip(batch).map(|(mut result, entry)| {
            if !print::is_ok(result.status.as_ref()) {
                result.entry = Some(entry);
            }
            result
        });
        let results: Vec<_> = results.collect();
        let shown = results.iter().map(|r| (r.status.as_ref(), r.entry.as_ref()));
        all_succeeded &= print_results(&cx, "update", &mut progress, shown);
        if cx.json() {
            response.results.extend(results);
        }
    }
    progress.end();
    let is_json = print::json_message(&cx, "spire.api.server.entry.v1.BatchUpdateEntryResponse", &response)?;
    ensure!(is_json || all_succeeded, "failed to update one or more entries");
    Ok(())
}

/// The switches only ever turn on, and leave what the entry has besides them.
async fn merged_attributes(
    flags: &Flags,
    client: &mut EntryClient<Channel>,
) -> anyhow::Result<Option<types::entry::AdditionalAttributes>> {
    let (prefetch, jti) = (flags.is_set("disableX509SVIDPrefetch"), flags.is_set("jwtSVIDIncludeJTI"));
    if !prefetch && !jti {
        return Ok(None);
    }
    let request = pb::GetEntryRequest { id: flags.string("entryID").into(), output_mask: None };
    let existing = client.get_entry(request).await.rpc();
    let existing = existing.context("failed to fetch existing entry to merge additional attributes")?;
    let mut attributes = existing.additional_attributes.unwrap_or_default();
    attributes.disable_x509_svid_prefetch |= prefetch;
    attributes.jwt_svid_include_jti |= jti;
    Ok(Some(attributes))
}

fn check_written(flags: &Flags) -> anyhow::Result<()> {
    ensure!(!flags.string("spiffeID").is_empty(), "a SPIFFE ID is required");
    ensure!(flags.int("x509SVIDTTL") >= 0, "a positive x509-SVID TTL is required");
    ensure!(flags.int("jwtSVIDTTL") >= 0, "a positive JWT-SVID TTL is required");
    Ok(())
}

fn written(flags: &Flags, node: bool) -> anyhow::Result<types::Entry> {
    let (spiffe_id, parent_id);
    if node {
        spiffe_id = id(flags.string("spiffeID"))?;
        parent_id = types::Spiffeid { trust_domain: spiffe_id.trust_domain.clone(), path: "/spire/server".into() };
    } else {
        // of two bad IDs, `create` names the first and `update` the second; the order here is that of `create`
        spiffe_id = id(flags.string("spiffeID"))?;
        parent_id = id(flags.string("parentID"))?;
    }
    Ok(types::Entry {
        id: flags.string("entryID").into(),
        spiffe_id: Some(spiffe_id),
        parent_id: Some(parent_id),
        x509_svid_ttl: wire_int(flags.int("x509SVIDTTL"), "X509 SVID TTL")?,
        jwt_svid_ttl: wire_int(flags.int("jwtSVIDTTL"), "JWT SVID TTL")?,
        selectors: selectors(flags)?,
        federates_with: flags.strings("federatesWith").to_vec(),
        admin: flags.bool("admin"),
        downstream: flags.bool("downstream"),
        expires_at: flags.int("entryExpiry"),
        dns_names: flags.strings("dns").to_vec(),
        store_svid: flags.bool("storeSVID"),
        hint: flags.string("hint").into(),
        ..types::Entry::default()
    })
}

/// First what went well, on standard output; then what did not, on standard error. Whether all went well. JSON has its
/// results in one piece at the end instead.
fn print_results<'a>(
    cx: &Context,
    verb: &str,
    progress: &mut Progress,
    results: impl Iterator<Item = (Option<&'a types::Status>, Option<&'a types::Entry>)>,
) -> bool {
    let (succeeded, failed): (Vec<_>, Vec<_>) = results.partition(|(status, _)| print::is_ok(*status));
    progress.add(succeeded.len(), failed.len());
    if !cx.json() {
        progress.clear();
        let shown = |entry: Option<&types::Entry>| print::entry(entry.unwrap_or(&types::Entry::default()));
        cx.print(succeeded.iter().map(|(_, entry)| shown(*entry)).collect::<String>());
        for (status, entry) in &failed {
            cx.eprintln(format!("Failed to {verb} the following entry ({}):", print::status(*status)));
            cx.io.err(&shown(*entry));
        }
    }
    progress.say();
    failed.is_empty()
}

fn show_flags(f: &mut FlagSet) {
    f.string("entryID", "", "The Entry ID of the records to show");
    f.string("parentID", "", "The Parent ID of the records to show");
    f.string("spiffeID", "", "The SPIFFE ID of the records to show");
    f.string("hint", "", "The Hint of the records to show (optional)");
    filter_flags(f);
}

fn count_flags(f: &mut FlagSet) {
    f.string("parentID", "", "The Parent ID of the records to count");
    f.string("spiffeID", "", "The SPIFFE ID of the records to count");
    f.string("hint", "", "The Hint of the records to count (optional)");
    filter_flags(f);
}

/// What `show` and `count` share.
fn filter_flags(f: &mut FlagSet) {
    f.bool("downstream", DOWNSTREAM);
    f.strings("selector", "A colon-delimited type:value selector. Can be used more than once");
    f.strings("federatesWith", "SPIFFE ID of a trust domain an entry is federate with. Can be used more than once");
    f.string("matchFederatesWithOn", "superset", MATCH_FEDERATES);
    f.string("matchSelectorsOn", "superset", MATCH_SELECTORS);
    f.output();
}

fn filter(flags: &Flags) -> anyhow::Result<list_entries_request::Filter> {
    let optional_id = |name: &str, what: &str| match flags.string(name) {
        "" => Ok(None),
        text => id(text).map(Some).with_context(|| format!("error parsing {what} {text:?}")),
    };
    let behavior = |name: &str| {
        let text = flags.string(name);
        match_number(text).with_context(|| format!("match behavior {text:?} unknown"))
    };
    let mut filter = list_entries_request::Filter {
        by_parent_id: optional_id("parentID", "parent ID")?,
        by_spiffe_id: optional_id("spiffeID", "SPIFFE ID")?,
        by_hint: Some(flags.string("hint").to_owned()).filter(|hint| !hint.is_empty()),
        by_downstream: Some(flags.bool("downstream")),
        ..list_entries_request::Filter::default()
    };
    let given = flags.strings("selector");
    if !given.is_empty() {
        let behavior = behavior("matchSelectorsOn")?;
        let selectors: anyhow::Result<_> = given.iter().map(|text| selector(text)).collect();
        let selectors = selectors.context("error parsing selectors")?;
        filter.by_selectors = Some(types::SelectorMatch { selectors, r#match: behavior });
    }
    let trust_domains = flags.strings("federatesWith").to_vec();
    if !trust_domains.is_empty() {
        let behavior = behavior("matchFederatesWithOn")?;
        filter.by_federates_with = Some(types::FederatesWithMatch { trust_domains, r#match: behavior });
    }
    Ok(filter)
}

async fn show(cx: Context) -> anyhow::Result<()> {
    let mut response = fetch(&cx).await?;
    for entry in &mut response.entries {
        entry.selectors.sort_by(compare_selectors);
    }
    response.entries.sort_by(compare_entries);
    if print::json_message(&cx, "spire.api.server.entry.v1.ListEntriesResponse", &response)? {
        return Ok(());
    }
    let count = response.entries.len();
    cx.println(format!("Found {count} {}", plural(count, "entry", "entries")));
    for entry in &response.entries {
        cx.print(print::entry(entry));
    }
    Ok(())
}

async fn fetch(cx: &Context) -> anyhow::Result<pb::ListEntriesResponse> {
    let flags = &cx.flags;
    let entry_id = flags.string("entryID");
    if !entry_id.is_empty() {
        let others = [flags.string("parentID"), flags.string("spiffeID")];
        let alone = others.iter().all(|o| o.is_empty()) && flags.strings("selector").is_empty();
        ensure!(alone, "the -entryID flag can't be combined with others");
        let request = pb::GetEntryRequest { id: entry_id.into(), output_mask: None };
        let entry = client(cx)?.get_entry(request).await.rpc();
        let entry = entry.with_context(|| format!("error fetching entry ID {entry_id}"))?;
        return Ok(pb::ListEntriesResponse { entries: vec![entry], next_page_token: String::new() });
    }
    let filter = filter(flags)?;
    list(&mut client(cx)?, Some(filter)).await
}

/// All entries that fit, page by page.
pub(crate) async fn list(
    client: &mut EntryClient<Channel>,
    filter: Option<list_entries_request::Filter>,
) -> anyhow::Result<pb::ListEntriesResponse> {
    let mut all = pb::ListEntriesResponse::default();
    let mut page_token = String::new();
    loop {
        let request = pb::ListEntriesRequest { filter: filter.clone(), output_mask: None, page_size: PAGE, page_token };
        let page = client.list_entries(request).await.rpc().context("error fetching entries")?;
        all.entries.extend(page.entries);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

pub(crate) fn compare_entries(a: &types::Entry, b: &types::Entry) -> Ordering {
    let names = |id: &Option<types::Spiffeid>| id.clone().map(|id| (id.trust_domain, id.path));
    names(&a.spiffe_id)
        .cmp(&names(&b.spiffe_id))
        .then_with(|| names(&a.parent_id).cmp(&names(&b.parent_id)))
        .then_with(|| (a.x509_svid_ttl, a.jwt_svid_ttl).cmp(&(b.x509_svid_ttl, b.jwt_svid_ttl)))
        .then_with(|| a.selectors.len().cmp(&b.selectors.len()))
        .then_with(|| {
            let pairs = a.selectors.iter().zip(&b.selectors);
            pairs.map(|(a, b)| compare_selectors(a, b)).find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
        })
}

pub(crate) fn compare_selectors(a: &types::Selector, b: &types::Selector) -> Ordering {
    (&a.r#type, &a.value).cmp(&(&b.r#type, &b.value))
}

async fn count(cx: Context) -> anyhow::Result<()> {
    let filter = filter(&cx.flags)?;
    let filter = count_entries_request::Filter {
        by_spiffe_id: filter.by_spiffe_id,
        by_parent_id: filter.by_parent_id,
        by_selectors: filter.by_selectors,
        by_federates_with: filter.by_federates_with,
        by_hint: filter.by_hint,
        by_downstream: filter.by_downstream,
    };
    let response = client(&cx)?.count_entries(pb::CountEntriesRequest { filter: Some(filter) }).await.rpc()?;
    if !print::json_message(&cx, "spire.api.server.entry.v1.CountEntriesResponse", &response)? {
        let count = usize::try_from(response.count).unwrap_or_default();
        cx.println(format!("{count} registration {}", plural(count, "entry", "entries")));
    }
    Ok(())
}

fn delete_flags(f: &mut FlagSet) {
    f.string("entryID", "", "The Registration Entry ID of the record to delete.");
    f.string(
        "file",
        "",
        "Path to a file containing a JSON structure for batch deletion (optional). If set to '-', read from stdin.",
    );
    f.output();
}

async fn delete(cx: Context) -> anyhow::Result<()> {
    let ids = match (cx.flags.string("file"), cx.flags.string("entryID")) {
        ("", "") => bail!("an entry ID is required"),
        ("", id) => vec![id.to_owned()],
        (path, _) => entry_file::ids(&cx, path)?,
    };
    let mut client = client(&cx)?;
    let mut progress = Progress::new(&cx, "deleted", "entries", ids.len());
    let mut response = pb::BatchDeleteEntryResponse::default();
    for ids in batches(ids, String::len) {
        let answer = client.batch_delete_entry(pb::BatchDeleteEntryRequest { ids }).await.rpc();
        let results = answer.map_err(|error| progress.stopped(error))?.results;
        let succeeded = results.iter().filter(|r| print::is_ok(r.status.as_ref())).count();
        progress.add(succeeded, results.len() - succeeded);
        progress.say();
        response.results.extend(results);
    }
    progress.end();
    if print::json_message(&cx, "spire.api.server.entry.v1.BatchDeleteEntryResponse", &response)? {
        return Ok(());
    }
    let (succeeded, failed): (Vec<_>, Vec<_>) = response.results.iter().partition(|r| print::is_ok(r.status.as_ref()));
    for result in &succeeded {
        cx.println(format!("Deleted entry with ID: {}", result.id));
    }
    if !succeeded.is_empty() {
        cx.print("\n\n");
    }
    for result in &failed {
        cx.eprintln(format!(
            "Failed to delete entry with ID {} ({})",
            result.id,
            print::status(result.status.as_ref())
        ));
    }
    // none of these summaries ends its line, and scripts know that
    if failed.is_empty() {
        cx.print(format!("Deleted {} entries successfully", succeeded.len()));
        return Ok(());
    }
    cx.print("\n\n");
    match succeeded.len() {
        0 => cx.print(format!("Failed to delete {} entries", failed.len())),
        count => {
            cx.print(format!("Deleted {count} entries successfully, but failed to delete {} entries", failed.len()))
        }
    }
    bail!("failed to delete one or more entries")
}
