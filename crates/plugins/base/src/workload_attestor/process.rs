//! Reading about a process through its open `/proc/PID` folder, so that it is always the same process.

use finial_plugin::PluginError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

/// `/proc/PID/status` names all groups of a process, at most 65,536.
const STATUS_BYTES_MAX: usize = 1 << 20;

/// What a file of the folder says, up to where `enough` says so, to its end, or to `max` bytes.
pub(super) fn read(
    folder: BorrowedFd<'_>,
    name: &str,
    max: usize,
    enough: impl Fn(&[u8]) -> bool,
) -> Result<Vec<u8>, Errno> {
    let file = openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut content = vec![0; max.min(4096)];
    let mut length = 0;
    loop {
        let room = content.get_mut(length..).unwrap_or_default();
        let count = rustix::io::read(file.as_fd(), room)?;
        length += count;
        if count == 0 || length >= max || enough(content.get(..length).unwrap_or_default()) {
            break;
        }
        if length == content.len() {
            content.resize((length * 4).min(max), 0);
        }
    }
    content.truncate(length);
    Ok(content)
}

/// `status` up to the line with the groups, which is the last that anybody here needs. Usually one read.
pub(super) fn status(folder: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    read(folder, "status", STATUS_BYTES_MAX, has_groups_line)
}

pub(super) fn has_groups_line(status: &[u8]) -> bool {
    // Lines end with a line feed, so the last piece is empty or a line that is not complete.
    let mut lines = status.split(|b| *b == b'\n');
    lines.next_back();
    lines.any(|line| line.starts_with(b"Groups:"))
}

/// The fields of the line of `status` that begins with `key`.
pub(super) fn fields<'a>(status: &'a [u8], key: &str) -> Option<std::str::SplitAsciiWhitespace<'a>> {
    // `Name` is the first line and the process chooses it, but the kernel escapes line feeds in it.
    let found = status.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(key.as_bytes()));
    found.and_then(|rest| std::str::from_utf8(rest).ok()).map(str::split_ascii_whitespace)
}

/// The number of the parent, as our PID namespace knows it: 0 when it is outside.
pub(super) fn parent(status: &[u8]) -> Option<i32> {
    fields(status, "PPid:")?.next()?.parse().ok()
}

#[derive(Debug, PartialEq)]
pub(super) struct Owner {
    /// Effective.
    pub(super) uid: u32,
    /// Effective.
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
}

impl Owner {
    /// Reads the lines `Uid`, `Gid` (real, effective, saved, file system) and `Groups`.
    pub(super) fn of(status: &[u8]) -> Result<Self, PluginError> {
        let effective = |key: &str| fields(status, key).and_then(|mut n| n.nth(1)).and_then(|n| n.parse().ok());
        let internal = PluginError::internal;
        let uid = effective("Uid:").ok_or_else(|| internal("UIDs lookup: no UIDs for process"))?;
        let gid = effective("Gid:").ok_or_else(|| internal("GIDs lookup: no GIDs for process"))?;
        let groups = fields(status, "Groups:");
        let groups = groups.ok_or_else(|| internal("supplementary GIDs lookup: no groups for process"))?;
        let groups = groups.map(str::parse).collect::<Result<_, _>>();
        let groups = groups.map_err(|e| internal("supplementary GIDs lookup: malformed line").because(e))?;
        Ok(Self { uid, gid, groups })
    }
}

/// Whether the process still runs. A pidfd becomes readable when its process ends.
pub(super) fn is_alive(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(0))
}
