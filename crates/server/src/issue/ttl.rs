//! Warnings about lifetimes that the rotation of authorities would cut short, in SPIRE's words.

use crate::authority::plan::{MAX_SVID_TTL_SECONDS, max_svid_ttl, min_ca_ttl};
use finial_config::ServerSettings;
use std::time::Duration;

/// A duration as Go prints it, whole seconds, without trailing zero parts: `1h30m`, `45s`, `168h`.
pub fn go_duration(seconds: i64) -> String {
    let (h, m, s) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (h, m, s) {
        (0, 0, s) => format!("{s}s"),
        (0, m, 0) => format!("{m}m"),
        (0, m, s) => format!("{m}m{s}s"),
        (h, 0, 0) => format!("{h}h"),
        (h, m, 0) => format!("{h}h{m}m"),
        (h, m, s) => format!("{h}h{m}m{s}s"),
    }
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

/// What is to be said about the configured lifetimes; empty when all is well.
pub fn ttl_warnings(settings: &ServerSettings) -> Vec<String> {
    let ca_ttl = seconds(settings.ca_ttl);
    [
        ("default_x509_svid_ttl", Some(settings.x509_svid_ttl)),
        ("default_jwt_svid_ttl", Some(settings.jwt_svid_ttl)),
        ("agent_ttl", settings.agent_ttl),
    ]
    .into_iter()
    .filter_map(|(name, ttl)| warning(name, seconds(ttl?), ca_ttl))
    .collect()
}

fn warning(name: &str, ttl: i64, ca_ttl: i64) -> Option<String> {
    let longest = go_duration(max_svid_ttl(ca_ttl));
    let tail = format!("to guarantee the full {name} lifetime when CA rotations are scheduled.");
    if ttl <= max_svid_ttl(ca_ttl) {
        None
    } else if ttl < MAX_SVID_TTL_SECONDS {
        Some(format!(
            "{name} is too high for the configured ca_ttl value. SVIDs with shorter lifetimes may be issued. Please set \
             {name} to {longest} or less, or the ca_ttl to {} or more, {tail}",
            go_duration(min_ca_ttl(ttl))
        ))
    } else if ca_ttl < min_ca_ttl(MAX_SVID_TTL_SECONDS) {
        Some(format!(
            "{name} is too high and the ca_ttl is too low. SVIDs with shorter lifetimes may be issued. Please set {name} \
             to {} or less, and the ca_ttl to {} or more, {tail}",
            go_duration(MAX_SVID_TTL_SECONDS),
            go_duration(min_ca_ttl(MAX_SVID_TTL_SECONDS))
        ))
    } else {
        Some(format!(
            "{name} is too high. SVIDs with shorter lifetimes may be issued. Please set {name} to {longest} or less {tail}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_that_rotation_cuts_short_are_named_with_the_way_out() {
        let (hour, day) = (3600, 24 * 3600);
        assert_eq!(warning("agent_ttl", 4 * hour, day), None);
        assert_eq!(
            warning("agent_ttl", 5 * hour, day).as_deref(),
            Some(
                "agent_ttl is too high for the configured ca_ttl value. SVIDs with shorter lifetimes may be issued. Please \
                 set agent_ttl to 4h or less, or the ca_ttl to 30h or more, to guarantee the full agent_ttl lifetime when \
                 CA rotations are scheduled."
            )
        );
        assert_eq!(
            warning("agent_ttl", 8 * day, 30 * day).as_deref(),
            Some(
                "agent_ttl is too high and the ca_ttl is too low. SVIDs with shorter lifetimes may be issued. Please set \
                 agent_ttl to 168h or less, and the ca_ttl to 1008h or more, to guarantee the full agent_ttl lifetime when \
                 CA rotations are scheduled."
            )
        );
        assert_eq!(
            warning("agent_ttl", 8 * day, 365 * day).as_deref(),
            Some(
                "agent_ttl is too high. SVIDs with shorter lifetimes may be issued. Please set agent_ttl to 168h or less to \
                 guarantee the full agent_ttl lifetime when CA rotations are scheduled."
            )
        );
    }

    #[test]
    fn durations_print_like_gos_without_trailing_zeros() {
        for (seconds, text) in [(0, "0s"), (45, "45s"), (90, "1m30s"), (3600, "1h"), (5400, "1h30m"), (3601, "1h0m1s")]
        {
            assert_eq!(go_duration(seconds), text);
        }
    }
}
