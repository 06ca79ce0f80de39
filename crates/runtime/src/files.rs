//! Files that are replaced as a whole: a crash leaves the old one or the new one. And files that are read, up to a limit.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Reads a file that is not to be longer than that.
///
/// # Errors
/// It cannot be read, or is longer.
pub fn read_limited(path: &Path, bytes_max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(bytes_max as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > bytes_max {
        return Err(io::Error::other(format!("larger than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// Where a file is written before it takes the place of `path`.
pub fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Writes beside `path`, with these permission bits, flushes to disk, moves into place and flushes that. Waits for the disk.
///
/// # Errors
/// What failed; then the old file is as it was, and nothing is left beside it.
pub fn replace(path: &Path, mode: u32, write: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let beside = beside(path);
    let moved = write_new(&beside, mode, write).and_then(|()| fs::rename(&beside, path));
    if let Err(error) = moved {
        let _ = fs::remove_file(&beside);
        return Err(error);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

fn write_new(path: &Path, mode: u32, write: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    // A file that a crash left keeps its mode, and a link leads elsewhere: what is private goes into a new file only.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    write(&file)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn the_new_file_is_private_whatever_was_left_beside_and_a_failure_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("keys"), folder.path().join("other"));
        fs::write(&other, "theirs").unwrap();
        let put = |text: &'static str| replace(&path, 0o600, |mut file| file.write_all(text.as_bytes()));
        put("one").unwrap();
        fs::write(beside(&path), "left, and open to all").unwrap();
        fs::set_permissions(beside(&path), fs::Permissions::from_mode(0o666)).unwrap();
        put("two").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        symlink(&other, beside(&path)).unwrap();
        put("three").unwrap();
        assert_eq!(
            (fs::read_to_string(&path).unwrap().as_str(), fs::read(&other).unwrap()),
            ("three", b"theirs".to_vec())
        );
        let failed = replace(&path, 0o600, |mut file| {
            file.write_all(b"four, ")?;
            Err(io::Error::other("the disk is full"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "the disk is full");
        assert_eq!(fs::read_to_string(&path).unwrap(), "three");
        assert!(!beside(&path).exists());
    }
}
