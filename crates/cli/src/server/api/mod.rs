//! The commands that speak to a server's management API: entries, agents, join tokens, bundles, minting. Flags, texts, JSON
//! and exit codes are SPIRE's; `crates/cli/tests/real_server` compares them with SPIRE's own, command by command.

mod agent;
pub(crate) mod bulk;
mod bundle;
pub(crate) mod entry;
mod entry_file;
mod federation;
mod gotime;
mod jwt;
mod localauthority;
pub(crate) mod print;
mod token;
mod wit;
mod x509;

use crate::app::Command;
use crate::goflag::Flags;
use anyhow::Context as _;
use finial_core::{SpiffeId, UnixSeconds};
use finial_proto::types::{self, selector_match};

/// The most that a file given to a command may hold.
pub(crate) const FILE_BYTES_MAX: u64 = 256 << 20;
/// The most that one answer may hold. SPIRE's lists come in pages far below it; bundles come as one.
pub(crate) const ANSWER_BYTES_MAX: usize = 64 << 20;

/// All of them.
pub(crate) fn commands() -> Vec<Command> {
    let mut all = entry::commands();
    all.extend(agent::commands());
    all.extend(bundle::commands());
    all.extend(federation::commands());
    all.extend(localauthority::commands());
    all.extend([token::GENERATE, x509::MINT, jwt::MINT, wit::MINT]);
    all
}

fn id(text: &str) -> anyhow::Result<types::Spiffeid> {
    let id = SpiffeId::parse(text)?;
    Ok(types::Spiffeid { trust_domain: id.trust_domain_name().into(), path: id.path().into() })
}

/// `type:value`, split at the first colon; what each half may be is for the server to say.
pub(crate) fn selector(text: &str) -> anyhow::Result<types::Selector> {
    let halves =
        text.split_once(':').with_context(|| format!("selector \"{text}\" must be formatted as type:value"))?;
    Ok(types::Selector { r#type: halves.0.into(), value: halves.1.into() })
}

fn selectors(flags: &Flags) -> anyhow::Result<Vec<types::Selector>> {
    flags.strings("selector").iter().map(|text| selector(text)).collect()
}

fn match_number(text: &str) -> Option<i32> {
    use selector_match::MatchBehavior as M;
    let behavior = match text {
        "exact" => M::MatchExact,
        "any" => M::MatchAny,
        "superset" => M::MatchSuperset,
        "subset" => M::MatchSubset,
        _ => return None,
    };
    Some(behavior as i32)
}

/// A number that has to fit the wire, in the words of SPIRE's check.
fn wire_int(value: i64, what: &str) -> anyhow::Result<i32> {
    i32::try_from(value)
        .map_err(|_| anyhow::anyhow!("invalid value for {what}: overflow converting int({value}) to int32"))
}

/// Whole seconds of a duration flag, rounded up.
fn wire_seconds(flags: &Flags, name: &str) -> anyhow::Result<i32> {
    // Go's division cuts towards zero, as Rust's does
    let seconds = flags.duration_nanos(name).saturating_add(999_999_999) / 1_000_000_000;
    i32::try_from(seconds).map_err(|_| {
        anyhow::anyhow!("invalid value for TTL: overflow converting time.Duration({}) to int32", go_duration(seconds))
    })
}

/// How Go prints a `time.Duration` of so many nanoseconds.
fn go_duration(nanos: i64) -> String {
    let text = finial_config::format_go_duration(std::time::Duration::from_nanos(nanos.unsigned_abs()));
    if nanos < 0 { format!("-{text}") } else { text }
}

/// Whether an SVID that ends then lives shorter than asked for.
fn is_capped(flags: &Flags, ends_at: UnixSeconds) -> bool {
    let left_ms = ends_at.saturating_mul(1000).saturating_sub(finial_core::Clock::now_ms(&finial_core::SystemClock));
    left_ms < flags.duration_nanos("ttl") / 1_000_000
}

pub(crate) fn plural<'a>(count: usize, one: &'a str, many: &'a str) -> &'a str {
    if count == 1 { one } else { many }
}
