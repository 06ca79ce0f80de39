//! The program that a process runs: where it lies, what its content hashes to.

use super::super::process;
use finial_core::{Clock, UnixSeconds};
use finial_crypto::hex;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, open, openat, openat2, readlinkat, statat,
};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Programs whose hash is remembered.
const HASHES_MAX: usize = 1024;
/// A file changed later than this before now may be changed again without a new time stamp, so its hash is not remembered.
const SETTLED_AFTER_SECONDS: UnixSeconds = 2;
/// How often a program is looked at that changes meanwhile.
const LOOKS_MAX: usize = 3;

/// Which file it is, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    // The widths of these fields differ between architectures.
    #[allow(clippy::unnecessary_cast)]
    pub(in super::super) fn of(stat: &Stat) -> Self {
        Self { device: stat.st_dev as u64, inode: stat.st_ino as u64 }
    }
}

/// When these are the same, the content is: any write sets the ctime.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct FileStamp {
    device: u64,
    inode: u64,
    size: i64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl FileStamp {
    // The widths of these fields differ between architectures.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            size: stat.st_size as i64,
            mtime: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            ctime: (stat.st_ctime as i64, stat.st_ctime_nsec as i64),
        }
    }
}

/// Where a process's program lies, and which file it is.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Program {
    /// As the kernel tells it. In another mount namespace any path can be made to hold any program.
    pub(in super::super) path: String,
    pub(in super::super) file: FileId,
}

impl Program {
    /// Path and file of one moment, also when the process runs another program meanwhile.
    pub(in super::super) fn of(folder: BorrowedFd<'_>) -> Result<Self, String> {
        for _ in 0..LOOKS_MAX {
            let before = FileId::of(&statat(folder, "exe", AtFlags::empty()).map_err(|e| e.to_string())?);
            let path = path(folder)?;
            let after = FileId::of(&statat(folder, "exe", AtFlags::empty()).map_err(|e| e.to_string())?);
            if before == after {
                return Ok(Self { path, file: after });
            }
        }
        Err("the process keeps changing its program".to_owned())
    }
}

/// What the process's link to its program says.
pub(super) fn path(folder: BorrowedFd<'_>) -> Result<String, String> {
    let path = readlinkat(folder, "exe", Vec::with_capacity(256)).map_err(|e| e.to_string())?;
    path.into_string().map_err(|e| e.to_string())
}

/// Hashes programs, each when it is first seen or has changed.
pub(super) struct Hashes {
    /// Bytes; 0: no limit.
    limit: i64,
    known: Mutex<HashMap<FileStamp, Arc<str>>>,
    clock: Arc<dyn Clock>,
}

impl Hashes {
    pub(super) fn new(limit: i64, clock: Arc<dyn Clock>) -> Self {
        Self { limit, known: Mutex::default(), clock }
    }

    /// The SHA-256 of the process's program, and which file that is.
    pub(super) async fn of(&self, folder: BorrowedFd<'_>, pid: i32) -> Result<(Arc<str>, FileId), String> {
        // Through /proc, so that it is this process's program, whatever the path means in our mount namespace. Not
        // blocking, in case it should be something else than a regular file.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(openat(folder, "exe", flags, Mode::empty()).map_err(|e| e.to_string())?);
        let stat = fstat(&file).map_err(|e| e.to_string())?;
        let stamp = FileStamp::of(&stat);
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err("not a regular file".to_owned());
        }
        if self.limit > 0 && stamp.size > self.limit {
            return Err(format!("workload /proc/{pid}/exe exceeds size limit ({} > {})", stamp.size, self.limit));
        }
        if let Some(hash) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&stamp) {
            return Ok((hash.clone(), FileId::of(&stat)));
        }
        // Gone when nobody waits for the hash any more: then hashing stops.
        let waiting = Arc::new(());
        let still = Arc::downgrade(&waiting);
        let hashed = tokio::task::spawn_blocking(move || sha256(file, stamp.size, &still)).await;
        let hash: Arc<str> = hashed.map_err(|e| e.to_string())??.into();
        if self.clock.now() - stamp.ctime.0 > SETTLED_AFTER_SECONDS {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() >= HASHES_MAX {
                known.clear();
            }
            known.insert(stamp, hash.clone());
        }
        drop(waiting);
        Ok((hash, FileId::of(&stat)))
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.known.lock().expect("no panics").len()
    }
}

/// SHA-256 of the file, which must have the size that was looked up.
fn sha256(mut file: File, size: i64, waiting: &Weak<()>) -> Result<String, String> {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let mut buffer = vec![0; 64 * 1024];
    let mut total = 0i64;
    while waiting.strong_count() > 0 {
        let count = file.read(&mut buffer).map_err(|e| e.to_string())?;
        total = total.saturating_add(i64::try_from(count).unwrap_or(i64::MAX));
        context.update(buffer.get(..count).unwrap_or_default());
        if count == 0 || total > size {
            break;
        }
    }
    if total != size {
        return Err("the file changed while it was read".to_owned());
    }
    Ok(hex(context.finish().as_ref()))
}

/// The host's file system, as process 1 sees it: a path there is what its name says, since only root mounts there.
pub(in super::super) struct Host {
    root: Option<OwnedFd>,
    /// Lookups that wait for a slow file system, which a process may have chosen on purpose.
    slow: Arc<tokio::sync::Semaphore>,
}

/// How many lookups may wait at a time.
const SLOW_LOOKUPS_MAX: usize = 4;

impl Host {
    /// That of process 1, where we may look at it, or our own.
    pub(in super::super) fn look() -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open("/proc/1/root", flags, Mode::empty()).or_else(|_| open("/", flags, Mode::empty()));
        Self { root: root.ok(), slow: Arc::new(tokio::sync::Semaphore::new(SLOW_LOOKUPS_MAX)) }
    }

    /// Whether the program's path is, on the host, the path of this file. False when it cannot be told.
    pub(in super::super) async fn has(&self, program: &Program) -> bool {
        let Some(root) = &self.root else { return false };
        // What a process runs is known to the kernel by its path already: no disk is needed for the genuine ones.
        let found = match find(root.as_fd(), &program.path, ResolveFlags::CACHED) {
            Err(Errno::AGAIN) => self.look_slowly(root, &program.path).await,
            found => found,
        };
        found.is_ok_and(|file| file == program.file)
    }

    async fn look_slowly(&self, root: &OwnedFd, path: &str) -> Result<FileId, Errno> {
        let permit = self.slow.clone().try_acquire_owned().map_err(|_| Errno::AGAIN)?;
        let (root, path) = (root.try_clone().map_err(|_| Errno::MFILE)?, path.to_owned());
        let look = move || {
            let found = find(root.as_fd(), &path, ResolveFlags::empty());
            drop(permit);
            found
        };
        tokio::task::spawn_blocking(look).await.map_err(|_| Errno::IO)?
    }
}

fn find(root: BorrowedFd<'_>, path: &str, how: ResolveFlags) -> Result<FileId, Errno> {
    let how = how | ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let file = openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), how)?;
    Ok(FileId::of(&fstat(file)?))
}

/// A parent, grandparent and so on, held so that no later process with its number is meant.
pub(super) struct Ancestor {
    pub(super) pid: i32,
    pub(super) folder: OwnedFd,
}

/// The nearest of them; deeper trees are not looked at any further.
const ANCESTORS_MAX: usize = 32;
/// How often a parent is looked for that ends meanwhile.
const PARENT_LOOKS_MAX: usize = 8;

/// The ancestors of a process, its parent first, as far as we may see them.
pub(super) fn ancestors(folder: BorrowedFd<'_>) -> Result<Vec<Ancestor>, Errno> {
    let mut chain: Vec<Ancestor> = Vec::new();
    while chain.len() < ANCESTORS_MAX {
        let child = chain.last().map_or(folder, |last| last.folder.as_fd());
        match parent(|| Ok(process::parent(&process::status(child)?))) {
            Ok(Some(next)) => chain.push(next),
            Ok(None) => break,
            // An ancestor that ended meanwhile: what is above it is not the process's any more. For the process itself it is a failure.
            Err(error) if chain.is_empty() => return Err(error),
            Err(_) => break,
        }
    }
    Ok(chain)
}

/// The parent of a process whose parent's number `look` tells, each time anew; `None` when it has none that we can see.
pub(super) fn parent(look: impl Fn() -> Result<Option<i32>, Errno>) -> Result<Option<Ancestor>, Errno> {
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    for _ in 0..PARENT_LOOKS_MAX {
        let Some(pid) = look()?.and_then(Pid::from_raw) else { return Ok(None) };
        let number = pid.as_raw_nonzero().get();
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => continue,
            Err(error) => return Err(error),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = match open(format!("/proc/{number}"), flags, Mode::empty()) {
            Ok(folder) => folder,
            // Gone, or hidden from us.
            Err(Errno::NOENT) if process::is_alive(&pidfd) => return Ok(None),
            Err(Errno::NOENT | Errno::SRCH) => continue,
            Err(error) => return Err(error),
        };
        // The number belonged to the held process from before the folder was opened until after it was still the parent's.
        if look()? == Some(number) && process::is_alive(&pidfd) {
            return Ok(Some(Ancestor { pid: number, folder }));
        }
    }
    Err(Errno::AGAIN)
}
