//! Names of users and groups, from files of the form of `/etc/passwd` and `/etc/group`.
//!
//! Directory services (LDAP and the like) are not asked: that would load foreign code into the agent and could block an
//! attestation. SPIRE's own release binaries read the same files only.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long names are used before the file is looked at again.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Larger files are taken for a mistake.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// When these are the same, the file is.
#[derive(Clone, Copy, PartialEq)]
struct Stamp(u64, u64, i64, i64);

#[derive(Default)]
struct State {
    checked: Option<Instant>,
    stamp: Option<Stamp>,
    names: HashMap<u32, Arc<str>>,
}

/// One file, read again when it changes.
pub(super) struct Names {
    path: PathBuf,
    state: Mutex<State>,
}

impl Names {
    pub(super) fn of(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), state: Mutex::default() }
    }

    /// The first name that has this number.
    pub(super) fn find(&self, id: u32) -> Option<Arc<str>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.checked.is_none_or(|at| at.elapsed() >= CHECK_INTERVAL) {
            self.refresh(&mut state);
        }
        state.names.get(&id).cloned()
    }

    fn refresh(&self, state: &mut State) {
        state.checked = Some(Instant::now());
        let Ok(metadata) = fs::metadata(&self.path) else {
            (state.stamp, state.names) = (None, HashMap::new());
            return;
        };
        let stamp = Stamp(metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec());
        if state.stamp == Some(stamp) || metadata.size() > FILE_BYTES_MAX {
            return;
        }
        if let Ok(text) = fs::read(&self.path) {
            (state.stamp, state.names) = (Some(stamp), parse(&text));
        }
    }
}

/// Lines of `name:password:number:…`; others are skipped.
fn parse(text: &[u8]) -> HashMap<u32, Arc<str>> {
    let mut names = HashMap::new();
    for line in text.split(|b| *b == b'\n') {
        let Ok(line) = std::str::from_utf8(line) else { continue };
        let mut fields = line.split(':');
        let (name, id) = (fields.next().unwrap_or_default().trim(), fields.nth(1));
        if let Some(id) =
            id.and_then(|id| id.parse().ok()).filter(|_| !name.is_empty() && !name.starts_with(['#', '+', '-']))
        {
            names.entry(id).or_insert_with(|| name.into());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_odd_lines_are_skipped() {
        let text = b"root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:\n#c:x:1:\n+\n\nbad\n:x:5:\n\xff:x:6:\nneg:x:-1:\nann:x:1000:1000::/:";
        let names = parse(text);
        assert_eq!(names.len(), 2, "{names:?}");
        assert_eq!((names.get(&0).map(|n| &**n), names.get(&1000).map(|n| &**n)), (Some("root"), Some("ann")));
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("group");
        let names = Names::of(&path);
        let recheck = || names.state.lock().expect("no panics").checked = None;
        assert_eq!(names.find(7), None, "a missing file is as an empty one");
        fs::write(&path, "a:x:7:").expect("writes");
        recheck();
        assert_eq!(names.find(7).as_deref(), Some("a"));
        fs::write(&path, "bb:x:7:").expect("writes");
        assert_eq!(names.find(7).as_deref(), Some("a"), "within a second the file is not looked at");
        recheck();
        assert_eq!(names.find(7).as_deref(), Some("bb"));
        fs::remove_file(&path).expect("removes");
        recheck();
        assert_eq!(names.find(7), None);
    }
}
