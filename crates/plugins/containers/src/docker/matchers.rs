//! `container_id_cgroup_matchers`: patterns of cgroup paths in which `*` is any one part and `<id>` the container's ID.

use crate::cgroup::LocateError;
use finial_plugin::PluginError;

const ANY: &str = "*";
const ID: &str = "<id>";

/// Patterns of which at most one fits any path.
pub(super) struct Matchers(Vec<Vec<String>>);

impl Matchers {
    pub(super) fn new(patterns: &[String]) -> Result<Self, PluginError> {
        let parts: Vec<Vec<String>> =
            patterns.iter().map(|pattern| pattern.split('/').map(str::to_owned).collect()).collect();
        let overlaps = |index: usize, one: &[String]| {
            parts.iter().enumerate().any(|(other_index, other)| other_index != index && overlap(one, other))
        };
        let ambiguous: Vec<_> =
            patterns.iter().enumerate().filter(|(i, _)| parts.get(*i).is_some_and(|p| overlaps(*i, p))).collect();
        if !ambiguous.is_empty() {
            let names: Vec<_> = ambiguous.into_iter().map(|(_, pattern)| format!("{pattern:?}")).collect();
            let names = names.join(" ");
            return Err(PluginError::invalid(format!("dockerfinder: patterns must not be ambiguous: [{names}]")));
        }
        for (pattern, parts) in patterns.iter().zip(&parts) {
            if parts.iter().filter(|part| *part == ID).count() != 1 {
                return Err(PluginError::invalid(format!(
                    "pattern {pattern:?} must contain the container id token \"<id>\" exactly once"
                )));
            }
        }
        Ok(Self(parts))
    }

    /// The container that the paths name, if any of them fits a pattern.
    pub(super) fn container<'a>(&self, paths: impl Iterator<Item = &'a str>) -> Result<Option<String>, LocateError> {
        let mut found: Option<&str> = None;
        for id in paths.filter_map(|path| self.0.iter().find_map(|pattern| fit(pattern, path))) {
            match found {
                _ if id.is_empty() => return Err(LocateError::Blank),
                Some(other) if other != id => return Err(LocateError::Containers(other.into(), id.into())),
                _ => found = Some(id),
            }
        }
        Ok(found.map(str::to_owned))
    }
}

fn fit<'a>(pattern: &[String], path: &'a str) -> Option<&'a str> {
    let mut id = None;
    let mut parts = path.split('/');
    for expected in pattern {
        let part = parts.next()?;
        match expected.as_str() {
            ID => id = Some(part),
            ANY => {}
            expected if expected == part => {}
            _ => return None,
        }
    }
    if parts.next().is_some() { None } else { id }
}

/// Whether some path fits both.
fn overlap(one: &[String], other: &[String]) -> bool {
    let open = |part: &String| part == ANY || part == ID;
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| a == b || open(a) || open(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matchers(patterns: &[&str]) -> Result<Matchers, String> {
        Matchers::new(&patterns.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>()).map_err(|e| e.to_string())
    }

    #[test]
    fn parts_are_matched_whole() {
        let docker = matchers(&["/docker/<id>"]).unwrap();
        assert_eq!(docker.container(["/docker/foo", "/x"].into_iter()), Ok(Some("foo".into())));
        assert_eq!(docker.container(["/docker/"].into_iter()), Err(LocateError::Blank));
        for none in ["", "/", "/docker", "/dockerfoo", "/docker/foo/", "/docker/foo/bar"] {
            assert_eq!(docker.container([none].into_iter()), Ok(None), "{none}");
        }
        let long = matchers(&["/long.slice/*/*/<id>/*"]).unwrap();
        assert_eq!(long.container(["/long.slice/foo/bar/baz/"].into_iter()), Ok(Some("baz".into())));
        assert_eq!(long.container(["/long.slice/foo/bar/baz"].into_iter()), Ok(None));
        let two = docker.container(["/docker/a", "/docker/b"].into_iter());
        assert_eq!(two, Err(LocateError::Containers("a".into(), "b".into())));
    }

    #[test]
    fn bad_patterns_are_refused() {
        for pattern in ["/noid", "/<id>/<id>"] {
            let expected = format!("pattern {pattern:?} must contain the container id token \"<id>\" exactly once");
            assert_eq!(matchers(&[pattern]).err(), Some(expected));
        }
        for pair in [["/docker/<id>", "/*/<id>"], ["/docker/<id>", "/docker/<id>"], ["/a/<id>", "/a/*"]] {
            let error = matchers(&pair).err().expect("is refused");
            assert!(error.starts_with("dockerfinder: patterns must not be ambiguous: ["), "{error}");
        }
        assert!(matchers(&["/a/<id>", "/b/<id>", "/a/b/<id>"]).is_ok());
    }
}
