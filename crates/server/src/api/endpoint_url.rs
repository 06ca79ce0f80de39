//! The URLs of bundle endpoints, held against SPIRE's rules, in the words of Go's parser.

/// The URL with its scheme in lower case and its path escaped, as Go writes it again.
///
/// # Errors
/// What SPIRE says of it.
pub(super) fn check(url: &str) -> Result<String, String> {
    let (scheme, rest) = split_scheme(url).map_err(|why| unparsable(url, &why))?;
    let rest_sent = rest.split_once('#').map_or(rest, |(sent, _)| sent);
    let before_query = rest_sent.split_once('?').map_or(rest_sent, |(path, _)| path);
    let authority = authority_of(&scheme, before_query).map_err(|why| unparsable(url, &why))?;
    if scheme != "https" {
        return Err("bundle endpoint URL must use the https scheme".into());
    }
    match authority.map(|a| a.rsplit_once('@').map_or((None, a), |(user, host)| (Some(user), host))) {
        None | Some((_, "")) => Err("bundle endpoint URL must specify the host".into()),
        Some((Some(_), _)) => Err("bundle endpoint URL must not contain user info".into()),
        Some((None, host)) => {
            let path = before_query.get("//".len() + host.len()..).unwrap_or_default();
            let tail = rest.get(before_query.len()..).unwrap_or_default();
            Ok(format!("{scheme}://{host}{}{tail}", escaped(path)))
        }
    }
}

fn unparsable(url: &str, why: &str) -> String {
    format!("failed to parse bundle endpoint URL: parse {url:?}: {why}")
}

/// The scheme in lower case, which may be empty, and what follows its colon.
fn split_scheme(url: &str) -> Result<(String, &str), String> {
    if url.split_once('#').map_or(url, |(sent, _)| sent).bytes().any(|b| b < b' ' || b == 0x7f) {
        return Err("net/url: invalid control character in URL".into());
    }
    let end = url.find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c)));
    let starts_well = url.starts_with(|c: char| c.is_ascii_alphabetic());
    match end.and_then(|at| url.split_at_checked(at)) {
        Some(("", rest)) if rest.starts_with(':') => Err("missing protocol scheme".into()),
        Some((scheme, rest)) if starts_well && rest.starts_with(':') => {
            Ok((scheme.to_ascii_lowercase(), rest.get(1..).unwrap_or_default()))
        }
        _ => Ok((String::new(), url)),
    }
}

/// What stands between `//` and the path, if there is such a part; it and the path are well-formed.
fn authority_of<'a>(scheme: &str, text: &'a str) -> Result<Option<&'a str>, String> {
    if !text.starts_with('/') {
        let first = text.split('/').next().unwrap_or_default();
        if scheme.is_empty() && first.contains(':') {
            return Err("first path segment in URL cannot contain colon".into());
        }
        return Ok(None);
    }
    let has_authority = text.starts_with("//") && (!scheme.is_empty() || !text.starts_with("///"));
    let Some(rest) = text.strip_prefix("//").filter(|_| has_authority) else {
        return check_escapes(text).map(|()| None);
    };
    let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
    check_host(host)?;
    if let Some(user) = user {
        if !user.chars().all(|c| c.is_ascii_alphanumeric() || "-._:~!$&'()*+,;=%@".contains(c)) {
            return Err("net/url: invalid userinfo".into());
        }
        check_escapes(user)?;
    }
    check_escapes(path)?;
    Ok(Some(authority))
}

fn check_host(host: &str) -> Result<(), String> {
    let port = match host.strip_prefix('[') {
        Some(rest) => rest.rsplit_once(']').ok_or("missing ']' in host")?.1,
        None => host.rfind(':').and_then(|at| host.get(at..)).unwrap_or_default(),
    };
    let digits = port.strip_prefix(':');
    if !(port.is_empty() || digits.is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_digit()))) {
        return Err(format!("invalid port {port:?} after host"));
    }
    check_escapes(host)?;
    let odd =
        host.chars().find(|&c| c.is_ascii() && !c.is_ascii_alphanumeric() && !"-_.~!$&'()*+,;=:[]<>\"%".contains(c));
    odd.map_or(Ok(()), |c| Err(format!("invalid character {:?} in host name", c.to_string())))
}

fn check_escapes(text: &str) -> Result<(), String> {
    for (at, _) in text.match_indices('%') {
        let rest = text.get(at..).unwrap_or_default();
        let escape: String = rest.chars().take(3).collect();
        if escape.len() != 3 || !escape.bytes().skip(1).all(|b| b.is_ascii_hexdigit()) {
            return Err(format!("invalid URL escape {escape:?}"));
        }
    }
    Ok(())
}

/// A path as it was, if nothing in it needs an escape; else decoded and escaped anew.
fn escaped(path: &str) -> String {
    if path.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:@[]%/".contains(&b)) {
        return path.to_owned();
    }
    let mut out = String::with_capacity(path.len() + 16);
    let mut rest = path.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        let digits = after.get(..2).filter(|_| *first == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        let byte = match digits.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(decoded) => {
                rest = after.get(2..).unwrap_or_default();
                decoded
            }
            None => *first,
        };
        match byte.is_ascii_alphanumeric() || b"-_.~$&+,/:;=@".contains(&byte) {
            true => out.push(char::from(byte)),
            false => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::check;
    use proptest::prelude::*;

    #[test]
    fn good_urls_stay_and_bad_ones_are_told_apart() {
        for good in ["https://a", "https://a:8443/x?y=%20#z", "https://[::1]:1/", "https://:80", "https://a//b"] {
            assert_eq!(check(good).as_deref(), Ok(good));
        }
        assert_eq!(check("HTTPS://A/x").as_deref(), Ok("https://A/x"));
        assert_eq!(check("https://a/ é%41?ü#ö").as_deref(), Ok("https://a/%20%C3%A9A?ü#ö"));
        for (bad, why) in [
            ("", "bundle endpoint URL must use the https scheme"),
            ("http://a", "bundle endpoint URL must use the https scheme"),
            ("a/b", "bundle endpoint URL must use the https scheme"),
            ("//a", "bundle endpoint URL must use the https scheme"),
            ("https:a", "bundle endpoint URL must specify the host"),
            ("https:/a", "bundle endpoint URL must specify the host"),
            ("https:///a", "bundle endpoint URL must specify the host"),
            ("https://u@a", "bundle endpoint URL must not contain user info"),
            ("https://u:p@a", "bundle endpoint URL must not contain user info"),
            (":a", "failed to parse bundle endpoint URL: parse \":a\": missing protocol scheme"),
            (
                "1:a",
                "failed to parse bundle endpoint URL: parse \"1:a\": first path segment in URL cannot contain colon",
            ),
            (
                "https://a:x",
                "failed to parse bundle endpoint URL: parse \"https://a:x\": invalid port \":x\" after host",
            ),
            ("https://[a", "failed to parse bundle endpoint URL: parse \"https://[a\": missing ']' in host"),
            (
                "https://a b",
                "failed to parse bundle endpoint URL: parse \"https://a b\": invalid character \" \" in host name",
            ),
            (
                "https://a/%zz",
                "failed to parse bundle endpoint URL: parse \"https://a/%zz\": invalid URL escape \"%zz\"",
            ),
            ("https://a/%2", "failed to parse bundle endpoint URL: parse \"https://a/%2\": invalid URL escape \"%2\""),
            (
                "https://a\u{7f}",
                "failed to parse bundle endpoint URL: parse \"https://a\\u{7f}\": net/url: invalid control character in URL",
            ),
        ] {
            assert_eq!(check(bad).unwrap_err(), why, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "(https?:)?/{0,3}[a%:@\\[\\]# ?/é1\u{0}]{0,12}") {
            if let Ok(url) = check(&text) {
                prop_assert!(url.starts_with("https://"));
                prop_assert_eq!(check(&url), Ok(url.clone()));
            }
        }
    }
}
