//! Where the sealing key comes from: never from beside the file that it seals.

use finial_config::OfflineCache;
use finial_core::Secret;
use finial_net::keyring;
use rustix::process::geteuid;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Names the node's installation; not secret, but another one on each node.
const MACHINE_ID_PATH: &str = "/etc/machine-id";
/// A file of the host's key that is larger is something else.
const HOST_KEY_BYTES_MAX: u64 = 64 << 10;
/// A shorter secret is none.
const SECRET_BYTES_MIN: usize = 32;
/// Under which name the kernel holds our key.
const KEYRING_NAME: &str = "finial-agent:sealing-key:v1";

/// What kind of place a key comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// systemd's key of the host, which only root can read.
    Host,
    /// The kernel's memory; it does not outlive a reboot.
    Keyring,
}

impl Source {
    /// In files.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Host => 1,
            Self::Keyring => 2,
        }
    }

    /// Of what is in a file.
    pub(super) fn name_of(number: &[u8]) -> &'static str {
        match number {
            [1] => Self::Host.name(),
            [2] => Self::Keyring.name(),
            _ => "strange",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Keyring => "kernel keyring",
        }
    }
}

/// The secret from which the key of each file is derived.
pub(crate) struct SealingKey {
    source: Source,
    secret: Secret<Vec<u8>>,
}

impl SealingKey {
    pub(super) fn new(source: Source, secret: Vec<u8>) -> Self {
        Self { source, secret: Secret::new(secret) }
    }

    pub(crate) fn source(&self) -> Source {
        self.source
    }

    pub(super) fn expose(&self) -> &[u8] {
        self.secret.expose()
    }
}

/// Finds the key that `choice` allows. `None` when it allows none; an error says why there is none.
pub(crate) fn find(choice: OfflineCache, host_key: &Path) -> Result<Option<SealingKey>, String> {
    let of_host = || read_host_key(host_key).map(|secret| SealingKey::new(Source::Host, secret));
    let of_kernel = || {
        let made = || finial_crypto::random_bytes::<32>().to_vec();
        let secret = keyring::user_key(KEYRING_NAME, made).map_err(|e| format!("kernel keyring: {e}"))?;
        if secret.len() < SECRET_BYTES_MIN {
            return Err("kernel keyring: the key is too short".to_owned());
        }
        Ok(SealingKey::new(Source::Keyring, secret))
    };
    match choice {
        OfflineCache::Off => Ok(None),
        OfflineCache::HostKey => of_host().map(Some),
        OfflineCache::Keyring => of_kernel().map(Some),
        OfflineCache::Auto => match of_host() {
            Ok(key) => Ok(Some(key)),
            Err(host) => of_kernel().map(Some).map_err(|kernel: String| format!("{host}; {kernel}")),
        },
    }
}

/// The content of systemd's credential secret. A file that others can read is no secret.
fn read_host_key(path: &Path) -> Result<Vec<u8>, String> {
    let named = |what: String| format!("host key {}: {what}", path.display());
    let read = || -> io::Result<Result<Vec<u8>, &'static str>> {
        let file = std::fs::File::open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Ok(Err("it is not a file"));
        }
        if meta.mode() & 0o077 != 0 || ![0, geteuid().as_raw()].contains(&meta.uid()) {
            return Ok(Err("others can read it; it must belong to root with mode 0400"));
        }
        let mut secret = Vec::with_capacity(HOST_KEY_BYTES_MAX as usize + 1);
        file.take(HOST_KEY_BYTES_MAX + 1).read_to_end(&mut secret)?;
        Ok(match secret.len() {
            length if length < SECRET_BYTES_MIN => Err("it is too short"),
            length if length as u64 > HOST_KEY_BYTES_MAX => Err("it is too large"),
            _ => Ok(secret),
        })
    };
    match read() {
        Ok(Ok(secret)) => Ok(secret),
        Ok(Err(what)) => Err(named(what.to_owned())),
        Err(error) => Err(named(finial_runtime::errno_text(&error).to_string())),
    }
}

/// The node's name for itself; empty where it has none (then the key alone binds).
pub(crate) fn machine_id() -> String {
    let mut text = String::new();
    let read = std::fs::File::open(MACHINE_ID_PATH).and_then(|file| file.take(256).read_to_string(&mut text));
    if read.is_err() {
        return String::new();
    }
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_host_key_that_others_can_read_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let refused = || find(OfflineCache::HostKey, &path).err().unwrap();
        assert!(refused().contains("no such file"), "{}", refused());
        std::fs::write(&path, [7; 4096]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o440)).unwrap();
        assert!(refused().contains("others can read it"), "{}", refused());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        let key = find(OfflineCache::HostKey, &path).unwrap().unwrap();
        assert_eq!((key.source(), key.expose()), (Source::Host, &[7; 4096][..]));
        let auto = find(OfflineCache::Auto, &path).unwrap().unwrap();
        assert_eq!(auto.source(), Source::Host, "it outlives a reboot, so it goes first");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, [7; 31]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        assert!(refused().contains("too short"), "{}", refused());
        assert!(find(OfflineCache::Off, &path).unwrap().is_none());
    }
}
