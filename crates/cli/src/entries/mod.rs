//! `finial entries export`, `diff`, `import`, `apply`: registration entries as files under version control.

pub(crate) mod file;
pub(crate) mod plan;
mod show;
pub(crate) mod write;

#[cfg(test)]
mod tests;

use crate::app::{Command, Exit};
use crate::context::{Context, write_file};
use crate::goflag::{FlagSet, Flags};
use crate::json;
use crate::rpc::RpcExt;
use crate::server::api::bulk::{Progress, batches};
use crate::server::api::{FILE_BYTES_MAX, entry, plural, print};
use anyhow::{Context as _, bail, ensure};
use file::Placed;
use finial_core::SpiffeId;
use finial_proto::server::entry as pb;
use finial_proto::types::{Entry, Status};
use plan::{Mode, Plan, plan};
use prost::Message as _;
use std::path::Path;

pub(crate) fn commands() -> Vec<Command> {
    vec![
        Command::server("export", "Writes the server's entries as a file", export_flags, |cx| Box::pin(export(cx)))
            .usage("entries export"),
        Command::server("diff", "Shows what apply would do; exit code 1 if there is anything", diff_flags, |cx| {
            Box::pin(diff(cx))
        })
        .usage("entries diff"),
        Command::server("import", "Creates the entries of a file that the server lacks", import_flags, |cx| {
            Box::pin(import(cx))
        })
        .usage("entries import"),
        Command::server("apply", "Makes the server's entries those of a file", apply_flags, |cx| Box::pin(apply(cx)))
            .usage("entries apply"),
    ]
}

const FILE: &str =
    "File of entries, YAML or JSON, with the field names of `spire-server entry create -data`; '-' is standard input";

fn shared_flags(f: &mut FlagSet) {
    f.strings("under", "Only entries whose SPIFFE ID is this one or below it. Can be used more than once");
}

fn plan_flags(f: &mut FlagSet) {
    shared_flags(f);
    f.string("f", "", FILE.replace('`', "'"));
    f.bool("full", "Show every change, however many there are");
    f.output();
}

fn export_flags(f: &mut FlagSet) {
    shared_flags(f);
    f.string("f", "-", "File to write; '-' is standard output");
    f.string("format", "", "yaml or json; by default what the file's name ends with, else yaml");
    f.bool("withoutIDs", "Leave entry IDs out, for a file that is meant for another server");
}

fn diff_flags(f: &mut FlagSet) {
    plan_flags(f);
    f.bool("prune", PRUNE);
}

fn import_flags(f: &mut FlagSet) {
    plan_flags(f);
    f.bool("yes", YES);
}

fn apply_flags(f: &mut FlagSet) {
    diff_flags(f);
    f.bool("yes", YES);
}

const PRUNE: &str = "Also delete the entries that the file does not have";
const YES: &str = "Do it; without this flag the plan is shown and nothing is changed";

/// Which part of a server's entries a command is about.
struct Scope(Vec<SpiffeId>);

impl Scope {
    fn of(flags: &Flags) -> anyhow::Result<Self> {
        let id =
            |text: &String| SpiffeId::parse(text.trim_end_matches('/')).with_context(|| format!("-under {text:?}"));
        Ok(Self(flags.strings("under").iter().map(id).collect::<Result<_, _>>()?))
    }

    fn has(&self, entry: &Entry) -> bool {
        let id = print::id(entry.spiffe_id.as_ref());
        let below =
            |top: &SpiffeId| id.strip_prefix(top.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        self.0.is_empty() || self.0.iter().any(below)
    }
}

async fn existing(cx: &Context, scope: &Scope) -> anyhow::Result<Vec<Entry>> {
    let mut entries = entry::list(&mut entry::client(cx)?, None).await?.entries;
    entries.retain(|entry| scope.has(entry));
    Ok(entries)
}

async fn export(cx: Context) -> anyhow::Result<()> {
    let (scope, path) = (Scope::of(&cx.flags)?, cx.flags.string("f"));
    let as_json = match cx.flags.string("format") {
        "" => path.ends_with(".json"),
        "json" => true,
        "yaml" => false,
        other => bail!("format {other:?} is unknown: use yaml or json"),
    };
    let mut entries: Vec<Entry> = existing(&cx, &scope).await?.into_iter().map(file::canonical).collect();
    if cx.flags.bool("withoutIDs") {
        entries.iter_mut().for_each(|entry| entry.id.clear());
    }
    entries.sort_by(|a, b| entry::compare_entries(a, b).then_with(|| a.id.cmp(&b.id)));
    let text = if as_json { write::json(&entries) } else { write::yaml(&entries) };
    if path == "-" {
        cx.print(text);
        return Ok(());
    }
    write_file(Path::new(path), text.as_bytes(), 0o644)?;
    cx.eprintln(format!("{} {} written to {path}", entries.len(), plural(entries.len(), "entry", "entries")));
    Ok(())
}

/// The entries of `-f`, all within the scope.
fn wanted(cx: &Context, scope: &Scope) -> anyhow::Result<Vec<Placed>> {
    let path = cx.flags.string("f");
    ensure!(!path.is_empty(), "a file is required: -f entries.yaml");
    let bytes = cx.read_file(path, FILE_BYTES_MAX)?;
    let text = String::from_utf8(bytes).ok().with_context(|| format!("{path} is not text in UTF-8"))?;
    let wanted = file::parse(Path::new(path), &text).map_err(|error| anyhow::anyhow!("{error}"))?;
    if let Some(outside) = wanted.iter().find(|w| !scope.has(&w.entry)) {
        let id = print::id(outside.entry.spiffe_id.as_ref());
        bail!("{id} is not under -under\n  at {path}:{}", outside.pos);
    }
    Ok(wanted)
}

async fn planned(cx: &Context, mode: Mode) -> anyhow::Result<Plan> {
    let scope = Scope::of(&cx.flags)?;
    let wanted = wanted(cx, &scope)?;
    ensure!(
        mode != Mode::Prune || !wanted.is_empty(),
        "the file has no entries: -prune would delete all of them at the server"
    );
    let existing = existing(cx, &scope).await?;
    plan(&wanted, existing, mode).map_err(|problems| {
        let file = cx.flags.string("f").into();
        anyhow::anyhow!("{}", finial_config::ConfigError { file, problems, ..Default::default() })
    })
}

fn mode(flags: &Flags) -> Mode {
    if flags.bool("prune") { Mode::Prune } else { Mode::Match }
}

async fn diff(cx: Context) -> anyhow::Result<()> {
    let plan = match planned(&cx, mode(&cx.flags)).await {
        Ok(plan) => plan,
        Err(error) => {
            // 1 is taken, as by other programs of this name
            crate::app::report(&error, &cx.io);
            return Err(Exit(2).into());
        }
    };
    show_plan(&cx, &plan)?;
    if plan.is_empty() { Ok(()) } else { Err(Exit(1).into()) }
}

fn show_plan(cx: &Context, plan: &Plan) -> anyhow::Result<()> {
    if cx.json() {
        cx.println(json::line(&show::json(plan, false, &[])));
        return Ok(());
    }
    cx.print(show::pretty(plan, cx.flags.bool("full")));
    cx.println(show::summary(plan));
    Ok(())
}

async fn import(cx: Context) -> anyhow::Result<()> {
    let plan = planned(&cx, Mode::Add).await?;
    run(&cx, plan).await
}

async fn apply(cx: Context) -> anyhow::Result<()> {
    let plan = planned(&cx, mode(&cx.flags)).await?;
    run(&cx, plan).await
}

async fn run(cx: &Context, plan: Plan) -> anyhow::Result<()> {
    if !cx.flags.bool("yes") {
        show_plan(cx, &plan)?;
        if !plan.is_empty() {
            cx.eprintln("Nothing was changed: this is a plan. Run it again with -yes to do it.");
        }
        return Ok(());
    }
    if !cx.json() {
        cx.print(show::pretty(&plan, cx.flags.bool("full")));
    }
    let failed = carry_out(cx, &plan).await?;
    if cx.json() {
        cx.println(json::line(&show::json(&plan, true, &failed)));
    } else {
        let planned = plan.update.len() + plan.create.len() + plan.delete.len();
        cx.println(format!("{}: {} done, {} failed", show::summary(&plan), planned - failed.len(), failed.len()));
    }
    ensure!(failed.is_empty(), "{} of the changes failed", failed.len());
    Ok(())
}

/// Does it: changes first, then what is new, then what goes, so that nobody is without an entry in between. What failed.
async fn carry_out(cx: &Context, plan: &Plan) -> anyhow::Result<Vec<(String, Entry, String)>> {
    let mut client = entry::client(cx)?;
    let mut failed = Vec::new();
    let changed: Vec<Entry> = plan.update.iter().map(|update| update.after.clone()).collect();
    let mut progress = Progress::new(cx, "changed", "entries", changed.len());
    for batch in batches(changed, Entry::encoded_len).into_iter().filter(|b| !b.is_empty()) {
        let request = pb::BatchUpdateEntryRequest { entries: batch.clone(), input_mask: None, output_mask: None };
        let answer = client.batch_update_entry(request).await.rpc();
        let results = answer.map_err(|error| progress.stopped(error))?.results;
        note(cx, "update", &mut progress, results.into_iter().map(|r| r.status).zip(batch), &mut failed);
    }
    progress.end();
    let mut progress = Progress::new(cx, "created", "entries", plan.create.len());
    for batch in batches(plan.create.clone(), Entry::encoded_len).into_iter().filter(|b| !b.is_empty()) {
        let request = pb::BatchCreateEntryRequest { entries: batch.clone(), output_mask: None };
        let answer = client.batch_create_entry(request).await.rpc();
        let results = answer.map_err(|error| progress.stopped(error))?.results;
        note(cx, "create", &mut progress, results.into_iter().map(|r| r.status).zip(batch), &mut failed);
    }
    progress.end();
    let mut progress = Progress::new(cx, "deleted", "entries", plan.delete.len());
    for batch in batches(plan.delete.clone(), |entry| entry.id.len()).into_iter().filter(|b| !b.is_empty()) {
        let ids = batch.iter().map(|entry| entry.id.clone()).collect();
        let answer = client.batch_delete_entry(pb::BatchDeleteEntryRequest { ids }).await.rpc();
        let results = answer.map_err(|error| progress.stopped(error))?.results;
        note(cx, "delete", &mut progress, results.into_iter().map(|r| r.status).zip(batch), &mut failed);
    }
    progress.end();
    Ok(failed)
}

/// Keeps and says what failed of a batch.
fn note(
    cx: &Context,
    verb: &str,
    progress: &mut Progress,
    results: impl Iterator<Item = (Option<Status>, Entry)>,
    failed: &mut Vec<(String, Entry, String)>,
) {
    let (mut succeeded, before) = (0, failed.len());
    for (status, entry) in results {
        if print::is_ok(status.as_ref()) {
            succeeded += 1;
        } else {
            failed.push((verb.to_owned(), entry, print::status(status.as_ref())));
        }
    }
    let new = failed.get(before..).unwrap_or_default();
    progress.add(succeeded, new.len());
    if !new.is_empty() {
        progress.clear();
    }
    for (verb, entry, status) in new {
        cx.eprintln(format!("Failed to {verb} the following entry ({status}):"));
        cx.io.err(&print::entry(entry));
    }
    progress.say();
}
