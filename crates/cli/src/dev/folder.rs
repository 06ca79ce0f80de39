//! The data folder: everything that `finial dev` writes.

use super::Trouble;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::{fmt, io};

/// A unix socket's address holds this many bytes (`sun_path`, less the final zero).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The folder, for us alone as long as this value lives.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    _lock: File,
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl Folder {
    /// Makes the folder if need be, and locks it.
    pub(super) fn open(wanted: Option<PathBuf>) -> Result<Self, Trouble> {
        let other = "choose another folder with --data DIR";
        let path = match wanted {
            Some(path) => path,
            None => default_path(|name| std::env::var_os(name).map(PathBuf::from))
                .ok_or_else(|| Trouble::new("I do not know your home folder", "name a data folder with --data DIR"))?,
        };
        let failed = |what: &str, e: &io::Error| Trouble::new(format!("{what} {}: {e}", path.display()), other);
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(|e| failed("I cannot make the folder", &e))?;
        let real = fs::canonicalize(&path).map_err(|e| failed("I cannot find the folder", &e))?;
        let lock_file = real.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(lock_file);
        let lock = lock.map_err(|e| failed("I cannot write to the folder", &e))?;
        lock.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => {
                let what = format!("another `finial dev` is using {}", real.display());
                Trouble::new(what, format!("stop it (Ctrl-C where it runs), or {other}"))
            }
            TryLockError::Error(e) => failed("I cannot lock the folder", &e),
        })?;
        let folder = Self { path: real, _lock: lock };
        if folder.server_socket().as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            let what = format!("the name {folder} is too long for the sockets in it");
            return Err(Trouble::new(what, "choose a folder with a shorter name: --data DIR"));
        }
        for made in [folder.server(), folder.agent(), folder.workloads()] {
            fs::create_dir_all(&made).map_err(|e| failed("I cannot write to the folder", &e))?;
        }
        Ok(folder)
    }

    pub(super) fn log(&self) -> PathBuf {
        self.path.join("finial.log")
    }
    /// The server's data: database and keys.
    pub(super) fn server(&self) -> PathBuf {
        self.path.join("server")
    }
    /// The agent's data: its SVID and key.
    pub(super) fn agent(&self) -> PathBuf {
        self.path.join("agent")
    }
    /// What new agents trust at first.
    pub(super) fn bootstrap_bundle(&self) -> PathBuf {
        self.path.join("bootstrap-bundle.pem")
    }
    /// Where the server's API answers local administrators.
    pub(super) fn server_socket(&self) -> PathBuf {
        self.path.join("server.sock")
    }
    /// Where the agent's Workload API answers workloads.
    pub(super) fn agent_socket(&self) -> PathBuf {
        self.path.join("agent.sock")
    }
    fn workloads(&self) -> PathBuf {
        self.path.join("workloads")
    }

    /// The program of the workload of this name.
    pub(super) fn workload(&self, name: &str) -> PathBuf {
        self.workloads().join(name)
    }

    /// Makes the program of a workload: this program under another name. A link where possible, else a copy.
    pub(super) fn make_workload(&self, program: &Path, name: &str) -> io::Result<PathBuf> {
        let link = self.workload(name);
        match fs::remove_file(&link) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        if fs::hard_link(program, &link).is_err() {
            fs::copy(program, &link)?;
        }
        Ok(link)
    }
}

/// Below `XDG_DATA_HOME`, else below the home folder.
fn default_path(env: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let absolute = |path: &PathBuf| path.is_absolute();
    let data = env("XDG_DATA_HOME").filter(absolute);
    let data = data.or_else(|| env("HOME").filter(absolute).map(|home| home.join(".local/share")));
    data.map(|data| data.join("finial-dev"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_for_one_at_a_time() {
        let temporary = tempfile::tempdir().expect("a folder");
        let path = temporary.path().join("new");
        let folder = Folder::open(Some(path.clone())).expect("opens");
        let trouble = Folder::open(Some(path.clone())).expect_err("is in use");
        assert!(trouble.what.contains("another `finial dev`"), "{}", trouble.what);
        drop(folder);
        drop(Folder::open(Some(path)).expect("opens again"));
    }

    #[test]
    fn folders_that_cannot_be_used_are_told_with_what_to_do() {
        let temporary = tempfile::tempdir().expect("a folder");
        let long = temporary.path().join("x".repeat(100));
        let trouble = Folder::open(Some(long)).expect_err("is too long");
        assert!(trouble.what.contains("too long") && trouble.hint.contains("--data"), "{}", trouble.what);
        let file = temporary.path().join("file");
        fs::write(&file, "").expect("writes");
        assert!(Folder::open(Some(file)).is_err());
    }

    #[test]
    fn the_default_is_below_the_home_folder() {
        let home = |name: &str| (name == "HOME").then(|| PathBuf::from("/home/ann"));
        assert_eq!(default_path(home), Some("/home/ann/.local/share/finial-dev".into()));
        let xdg = |name: &str| Some(PathBuf::from(if name == "HOME" { "/home/ann" } else { "/data" }));
        assert_eq!(default_path(xdg), Some("/data/finial-dev".into()));
        assert_eq!(default_path(|_| None), None);
    }

    #[test]
    fn a_workload_is_this_program_under_another_name() {
        let temporary = tempfile::tempdir().expect("a folder");
        let folder = Folder::open(Some(temporary.path().join("d"))).expect("opens");
        let program = temporary.path().join("program");
        for content in ["one", "two"] {
            fs::write(&program, content).expect("writes");
            let made = folder.make_workload(&program, "frontend").expect("links");
            assert_eq!(fs::read_to_string(made).expect("reads"), content);
            fs::remove_file(&program).expect("removes");
        }
    }
}
