//! Secrets that the kernel holds for a user: they are on no disk, and gone after a reboot.

use rustix::io::Errno;
use std::ffi::CString;

/// `KEY_SPEC_THREAD_KEYRING`, `KEY_SPEC_USER_KEYRING`.
const THREAD: libc::c_long = -1;
const USER: libc::c_long = -4;
/// Operations of `keyctl`.
const SETPERM: libc::c_long = 5;
const LINK: libc::c_long = 8;
const SEARCH: libc::c_long = 10;
const READ: libc::c_long = 11;
/// Possessor: all; its user: view, read, search. Nobody else.
const PERMISSIONS: libc::c_long = 0x3f0b_0000;
/// The kernel takes no larger key of this kind.
const BYTES_MAX: usize = 32_767;

/// The key of this user (in this user namespace) that is called `name`; made with what `make` gives if there is none yet.
///
/// # Errors
/// What the kernel said: it may have no keyrings, or a container's filter may forbid them.
pub fn user_key(name: &str, make: impl FnOnce() -> Vec<u8>) -> Result<Vec<u8>, Errno> {
    let name = CString::new(name).map_err(|_| Errno::INVAL)?;
    // A service has a session keyring of its own, from which the user's cannot be reached: what this thread holds it may read.
    keyctl(LINK, USER, THREAD, 0, 0)?;
    let id = match search(&name) {
        Ok(id) => id,
        Err(Errno::NOKEY) => {
            let secret = Wiped(make());
            let id = add(&name, &secret.0)?;
            keyctl(SETPERM, id, PERMISSIONS, 0, 0)?;
            // Of two who made one at the same time, the second replaced the content of the first: both read it now.
            id
        }
        Err(error) => return Err(error),
    };
    read(id)
}

struct Wiped(Vec<u8>);

impl Drop for Wiped {
    fn drop(&mut self) {
        self.0.fill(0);
        std::hint::black_box(&self.0);
    }
}

fn result(returned: libc::c_long) -> Result<libc::c_long, Errno> {
    if returned >= 0 {
        return Ok(returned);
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

#[allow(unsafe_code)]
fn keyctl(
    operation: libc::c_long,
    a: libc::c_long,
    b: libc::c_long,
    c: libc::c_long,
    d: libc::c_long,
) -> Result<libc::c_long, Errno> {
    // SAFETY: called for operations whose arguments are plain numbers.
    result(unsafe { libc::syscall(libc::SYS_keyctl, operation, a, b, c, d) })
}

#[allow(unsafe_code)]
fn search(name: &CString) -> Result<libc::c_long, Errno> {
    // SAFETY: both strings end with a zero and live during the call, which writes nothing.
    result(unsafe { libc::syscall(libc::SYS_keyctl, SEARCH, USER, c"user".as_ptr(), name.as_ptr(), 0) })
}

#[allow(unsafe_code)]
fn add(name: &CString, secret: &[u8]) -> Result<libc::c_long, Errno> {
    // SAFETY: the kernel reads two strings that end with a zero, and as many bytes of the secret as it is told.
    result(unsafe {
        libc::syscall(libc::SYS_add_key, c"user".as_ptr(), name.as_ptr(), secret.as_ptr(), secret.len(), USER)
    })
}

#[allow(unsafe_code)]
fn read(id: libc::c_long) -> Result<Vec<u8>, Errno> {
    let mut secret = vec![0u8; BYTES_MAX];
    // SAFETY: the kernel writes at most as many bytes as it is told that there are.
    let length = result(unsafe { libc::syscall(libc::SYS_keyctl, READ, id, secret.as_mut_ptr(), secret.len()) })?;
    let length = usize::try_from(length).map_err(|_| Errno::IO)?;
    secret.truncate(length);
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `KEYCTL_INVALIDATE`.
    const INVALIDATE: libc::c_long = 21;

    /// Takes the key away: the kernel keeps it for the user otherwise.
    struct Gone(String);

    impl Drop for Gone {
        fn drop(&mut self) {
            if let Ok(id) = search(&CString::new(self.0.as_str()).unwrap()) {
                let _ = keyctl(INVALIDATE, id, 0, 0, 0);
            }
        }
    }

    /// Whether a container's filter of system calls is what forbids them.
    fn filtered() -> bool {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
    }

    #[test]
    fn a_key_is_made_once_and_found_again_by_any_thread() {
        let gone = Gone(format!("finial-test:{}", std::process::id()));
        let name = gone.0.clone();
        let first = match user_key(&name, || vec![1; 32]) {
            Err(error @ (Errno::NOSYS | Errno::PERM | Errno::ACCESS)) => {
                let promised = ["CI", "FINIAL_REAL_SPIRE"].iter().any(|name| std::env::var_os(name).is_some());
                assert!(!promised || filtered(), "keyrings are refused, and not by a filter of system calls: {error}");
                eprintln!("SKIPPED: the kernel's keyring is refused here ({error}); nothing of it was tested");
                return;
            }
            other => other.unwrap(),
        };
        assert_eq!(first, [1; 32]);
        let again = std::thread::spawn(move || user_key(&name, || vec![2; 32])).join().unwrap();
        assert_eq!(again.unwrap(), [1; 32], "the first one stays");
    }
}
