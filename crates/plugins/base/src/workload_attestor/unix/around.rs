//! What a process lives in: its namespaces, its SELinux context.

use super::super::process;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{Mode, OFlags, open, readlinkat};
use rustix::io::Errno;

/// The kinds, as `/proc/PID/ns` calls them.
const KINDS: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];
/// The longest security context that is read.
const CONTEXT_BYTES_MAX: usize = 4096;

/// The host's namespaces: those of process 1, or our own where we may not look at that.
pub(super) struct Namespaces([Option<String>; KINDS.len()]);

impl Namespaces {
    pub(super) fn of_host() -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let first = open("/proc/1", flags, Mode::empty());
        let own = open("/proc/self", flags, Mode::empty());
        Self(
            KINDS.map(|kind| [&first, &own].into_iter().flatten().find_map(|folder| number(folder.as_fd(), kind).ok())),
        )
    }

    /// `userns:4026531837` and, when it is the host's, `userns:host`; the same for each kind.
    pub(super) fn of(&self, folder: BorrowedFd<'_>) -> Result<Vec<String>, Errno> {
        let mut values = Vec::with_capacity(2 * KINDS.len());
        for (kind, host) in KINDS.into_iter().zip(&self.0) {
            let own = match number(folder, kind) {
                // The kernel has no such namespaces.
                Err(Errno::NOENT) if host.is_none() => continue,
                own => own?,
            };
            if host.as_ref() == Some(&own) {
                values.push(format!("{kind}ns:host"));
            }
            values.push(format!("{kind}ns:{own}"));
        }
        Ok(values)
    }
}

/// The number in `user:[4026531837]`.
fn number(folder: BorrowedFd<'_>, kind: &str) -> Result<String, Errno> {
    let link = readlinkat(folder, format!("ns/{kind}"), Vec::with_capacity(64))?;
    let link = link.into_string().map_err(|_| Errno::INVAL)?;
    let number = link.strip_prefix(kind).and_then(|rest| rest.strip_prefix(":[")?.strip_suffix(']'));
    number.map(str::to_owned).ok_or(Errno::INVAL)
}

/// `selinux:USER:ROLE:TYPE:LEVEL` and `selinux_type:TYPE`; nothing where the process has no such context.
pub(super) fn selinux(folder: BorrowedFd<'_>) -> Result<Vec<String>, Errno> {
    let context = match process::read(folder, "attr/current", CONTEXT_BYTES_MAX, |_| false) {
        Ok(context) => context,
        // What kernels say that have no security module, or one without labels.
        Err(Errno::NOENT | Errno::INVAL) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let context = parse_context(&context);
    Ok(context
        .map(|(whole, kind)| vec![format!("selinux:{whole}"), format!("selinux_type:{kind}")])
        .unwrap_or_default())
}

/// The context and its type. Other modules write into the same file: AppArmor's `profile (mode)` and `unconfined` have no three
/// parts without spaces between colons.
fn parse_context(content: &[u8]) -> Option<(&str, &str)> {
    let text = std::str::from_utf8(content).ok()?.trim_end_matches(['\0', '\n']);
    let mut parts = text.splitn(4, ':');
    let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let mut next = || parts.next().filter(|part| !part.is_empty() && part.chars().all(name));
    let (_user, _role, kind) = (next()?, next()?, next()?);
    let level = |level: &str| !level.is_empty() && level.chars().all(|c| name(c) || matches!(c, ':' | ','));
    parts.next().is_none_or(level).then_some((text, kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload_attestor::testing::open_folder;
    use rustix::fd::AsFd;

    fn of(content: Option<&[u8]>) -> Vec<String> {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("attr")).expect("a folder");
        if let Some(content) = content {
            std::fs::write(folder.path().join("attr/current"), content).expect("writes");
        }
        selinux(open_folder(folder.path()).as_fd()).expect("reads")
    }

    #[test]
    fn contexts_of_selinux_are_told_whole_and_by_type() {
        let full = of(Some(b"system_u:system_r:container_t:s0:c12,c345\0"));
        assert_eq!(full, ["selinux:system_u:system_r:container_t:s0:c12,c345", "selinux_type:container_t"]);
        let range = of(Some(b"unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023\n"));
        assert_eq!(range[1], "selinux_type:unconfined_t");
        assert_eq!(of(Some(b"user_u:user_r:user_t")), ["selinux:user_u:user_r:user_t", "selinux_type:user_t"]);
        assert!(selinux(open_folder(std::path::Path::new("/proc/self")).as_fd()).is_ok(), "this kernel's own");
    }

    #[test]
    fn what_other_modules_write_is_no_context() {
        for other in
            ["unconfined\n", "docker-default (enforce)\n", "_", "kernel", "", "a:b", "a:b:", "a::c:s0", ":a:b:c"]
        {
            assert_eq!(of(Some(other.as_bytes())).len(), 0, "{other}");
        }
        // A profile that is named after a context still has AppArmor's mode behind it.
        assert_eq!(of(Some(b"system_u:system_r:trusted_t:s0 (enforce)\n")).len(), 0);
        assert_eq!(of(Some(b"system_u:system_r:trusted_t (complain)\n")).len(), 0);
        assert_eq!(of(Some(b"system_u:system_r:trusted_t:s0\nx:y:z:s1\n")).len(), 0);
        assert_eq!(of(Some(b"a:b:\xff:s0")).len(), 0);
        assert_eq!(of(None).len(), 0);
    }
}
