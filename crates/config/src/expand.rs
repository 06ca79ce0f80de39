//! `-expandEnv`: Go's `os.Expand` over the whole text.

/// Replaces `$VAR` and `${VAR}`; `$$` becomes `$`; a variable that is not set becomes nothing.
pub fn expand_env(text: &str, env: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        if after.is_empty() {
            out.push('$');
        }
        let (name, used) = shell_name(after);
        match name {
            "" if used == 0 && !after.is_empty() => out.push('$'),
            "" => {}
            "$" => out.push('$'),
            name => out.push_str(&env(name).unwrap_or_default()),
        }
        rest = after.get(used..).unwrap_or_default();
    }
    out.push_str(rest);
    out
}

/// The name that `text` begins with, and how many bytes it takes up. `{` that is not closed is swallowed.
fn shell_name(text: &str) -> (&str, usize) {
    if let Some(braced) = text.strip_prefix('{') {
        return match braced.find('}') {
            Some(at) => (braced.get(..at).unwrap_or_default(), at + 2),
            None => ("", 1),
        };
    }
    if text.starts_with(|c: char| "*#$@!?-".contains(c) || c.is_ascii_digit()) {
        return (text.get(..1).unwrap_or_default(), 1);
    }
    let end = text.bytes().take_while(|b| b.is_ascii_alphanumeric() || *b == b'_').count();
    (text.get(..end).unwrap_or_default(), end)
}

#[cfg(test)]
mod tests {
    use super::expand_env;

    #[test]
    fn expands_as_go_does() {
        let env = |name: &str| match name {
            "A" => Some("x".into()),
            "B_1" => Some("$A".into()),
            _ => None,
        };
        for (text, want) in [
            ("a $A ${A}b$B_1.", "a x xb$A."),
            ("$$A $none|", "$A |"),
            ("100$", "100$"),
            ("$ x", "$ x"),
            ("${} ${", " "),
            ("$1$*é$", "é$"),
            ("$é", "$é"),
        ] {
            assert_eq!(expand_env(text, &env), want, "{text:?}");
        }
    }
}
