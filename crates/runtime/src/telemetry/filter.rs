//! What is let through of measurements and of their labels, by the rules of SPIRE's metrics library.

/// `AllowedPrefixes`, `BlockedPrefixes`, `AllowedLabels` and `BlockedLabels`.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Beginnings of names with their prefix, joined by dots (`spire_server.rpc`), and whether they are let through: the longest
    /// that fits counts, and what none fits is let through.
    prefixes: Vec<(String, bool)>,
    /// Empty: all.
    allowed_labels: Vec<String>,
    blocked_labels: Vec<String>,
}

impl Filter {
    /// A prefix that is allowed and blocked is blocked. Allowed ones without blocked ones change nothing, no allowed labels mean all.
    pub fn new(allowed: &[String], blocked: &[String], allowed_labels: &[String], blocked_labels: &[String]) -> Self {
        let all = |prefixes: &[String], lets_through| prefixes.iter().map(move |p| (p.clone(), lets_through)).collect();
        let mut prefixes: Vec<(String, bool)> = all(blocked, false);
        let allowed: Vec<_> = all(allowed, true);
        prefixes.extend(allowed.into_iter().filter(|(prefix, _)| !blocked.contains(prefix)));
        prefixes.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
        Self { prefixes, allowed_labels: allowed_labels.to_vec(), blocked_labels: blocked_labels.to_vec() }
    }

    /// Whether the measurement `key` of the program `prefix` is let through.
    pub(super) fn allows(&self, prefix: &str, key: &str) -> bool {
        if self.prefixes.is_empty() {
            return true;
        }
        let name = format!("{prefix}.{key}");
        self.prefixes.iter().find(|(prefix, _)| name.starts_with(prefix.as_str())).is_none_or(|(_, allowed)| *allowed)
    }

    /// Whether a label of this name is.
    pub(super) fn allows_label(&self, name: &str) -> bool {
        let is_in = |list: &[String]| list.iter().any(|other| other == name);
        !is_in(&self.blocked_labels) && (self.allowed_labels.is_empty() || is_in(&self.allowed_labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.into()).collect()
    }

    #[test]
    fn the_longest_prefix_counts_and_what_none_fits_is_let_through() {
        let blocked = list(&["p.rpc", "p.x"]);
        let filter = Filter::new(&list(&["p.rpc.entry", "p.x"]), &blocked, &[], &[]);
        for (key, allowed) in
            [("rpc.agent", false), ("rpc.entry.list", true), ("rpcs", false), ("x", false), ("y", true)]
        {
            assert_eq!(filter.allows("p", key), allowed, "{key}");
        }
        assert!(Filter::new(&list(&["p.rpc"]), &[], &[], &[]).allows("p", "y"), "to allow one blocks no other");
    }

    #[test]
    fn labels_are_let_through_by_name() {
        let filter = Filter::new(&[], &[], &list(&["a", "b"]), &list(&["b"]));
        assert_eq!(["a", "b", "c"].map(|name| filter.allows_label(name)), [true, false, false]);
        assert!(Filter::default().allows_label("a"));
    }
}
