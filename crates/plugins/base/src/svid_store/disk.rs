//! `disk`: a folder for each SVID, with PEM files that only the agent's user may read. SPIRE has no such store.
//!
//! The selector `disk:name:NAME` names the folder: `DIRECTORY/NAME/svid.pem` (leaf first), `svid.key` (PKCS#8), `bundle.pem` and
//! `federated_bundle.DOMAIN.pem` for each federated trust domain. The folder is a symbolic link to one that is written anew each
//! time, and is replaced in one step: certificate and key always belong together for who opens both below one opened folder.

use async_trait::async_trait;
use finial_crypto::{hex, pem, random_bytes};
use finial_hcl::Value;
use finial_plugin::{PluginError, StoredSvid, SvidStore, decode};
use serde::Deserialize;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

/// What a folder's name may have.
const NAME_BYTES_MAX: usize = 128;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    directory: String,
}

/// The `disk` SVID store.
pub struct Disk {
    directory: PathBuf,
    /// Held until the work is done, also when nobody waits for it any more: what is done late comes before what is asked later.
    turn: Arc<Mutex<()>>,
}

impl Disk {
    /// The name in configuration, and the type of the selectors that name it.
    pub const NAME: &'static str = "disk";

    /// With `directory`, which is made when something is stored there.
    ///
    /// # Errors
    /// When there is no `directory`.
    pub fn new(data: &Value) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        if config.directory.is_empty() {
            return Err(PluginError::invalid("directory is required"));
        }
        Ok(Self { directory: config.directory.into(), turn: Arc::default() })
    }

    async fn blocking(
        &self,
        what: &str,
        work: impl FnOnce(&Path) -> io::Result<()> + Send + 'static,
    ) -> Result<(), PluginError> {
        let directory = self.directory.clone();
        let failed = |e: &dyn std::fmt::Display| {
            PluginError::internal(format!("cannot {what} below {}: {e}", self.directory.display()))
        };
        let turn = self.turn.clone().lock_owned().await;
        let work = move || {
            let done = work(&directory);
            drop(turn);
            done
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|e| failed(&e))?.map_err(|e| failed(&e))
    }
}

/// The folder's name, from `name:NAME`, which must be there once and alone.
fn name(metadata: &[String]) -> Result<String, PluginError> {
    let [only] = metadata else {
        return Err(PluginError::invalid("there must be one selector, of the form disk:name:NAME"));
    };
    let name = only.strip_prefix("name:").unwrap_or_default();
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.starts_with('.') || !name.bytes().all(allowed) {
        return Err(PluginError::invalid(format!(
            "selector disk:{only} names no folder: it must be disk:name:NAME, with a NAME of at most {NAME_BYTES_MAX} letters, \
             digits, '.', '_' and '-' that does not begin with '.'"
        )));
    }
    Ok(name.to_owned())
}

fn pem_of(certificates: &[Arc<[u8]>]) -> String {
    certificates.iter().map(|der| pem::encode("CERTIFICATE", der)).collect()
}

/// The files and what they hold.
fn files(svid: &StoredSvid) -> Vec<(String, Zeroizing<String>)> {
    let mut files = vec![
        ("svid.pem".to_owned(), pem_of(&svid.cert_chain).into()),
        ("svid.key".to_owned(), pem::encode("PRIVATE KEY", svid.private_key.expose()).into()),
        ("bundle.pem".to_owned(), pem_of(&svid.bundle).into()),
    ];
    let federated = svid.federated_bundles.iter();
    files.extend(federated.map(|(domain, roots)| (format!("federated_bundle.{domain}.pem"), pem_of(roots).into())));
    files
}

/// Begins the names of the folders that `name` is, was or was to be a link to. No name has an `@`.
fn prefix(name: &str) -> String {
    format!(".{name}@")
}

fn write(directory: &Path, name: &str, files: &[(String, Zeroizing<String>)]) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let link = directory.join(name);
    if fs::symlink_metadata(&link).is_ok_and(|found| !found.is_symlink()) {
        return Err(io::Error::other(format!(
            "{} is there and is not ours; remove it, or choose another name",
            link.display()
        )));
    }
    let fresh = format!("{}{}", prefix(name), hex(&random_bytes::<8>()));
    let folder = directory.join(&fresh);
    DirBuilder::new().mode(0o700).create(&folder)?;
    for (file, content) in files {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(folder.join(file))?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
    }
    File::open(&folder)?.sync_all()?;
    let new_link = directory.join(format!("{fresh}.link"));
    symlink(&fresh, &new_link)?;
    fs::rename(&new_link, &link)?;
    File::open(directory)?.sync_all()?;
    clean(directory, name, Some(&fresh))
}

/// Removes what was before, and what a crash left.
fn clean(directory: &Path, name: &str, but: Option<&str>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let found = entry.file_name();
        let ours = found.to_str().is_some_and(|found| found.starts_with(&prefix(name)) && Some(found) != but);
        match entry.file_type()? {
            kind if ours && kind.is_dir() => fs::remove_dir_all(entry.path())?,
            _ if ours => fs::remove_file(entry.path())?,
            _ => {}
        }
    }
    Ok(())
}

fn remove(directory: &Path, name: &str) -> io::Result<()> {
    let link = directory.join(name);
    match fs::symlink_metadata(&link) {
        Ok(found) if found.is_symlink() => fs::remove_file(&link)?,
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    match clean(directory, name, None) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

#[async_trait]
impl SvidStore for Disk {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn put(&self, svid: &StoredSvid, metadata: &[String]) -> Result<(), PluginError> {
        let (name, files) = (name(metadata)?, files(svid));
        self.blocking("store an SVID", move |directory| write(directory, &name, &files)).await
    }

    async fn delete(&self, metadata: &[String]) -> Result<(), PluginError> {
        let name = name(metadata)?;
        self.blocking("delete an SVID", move |directory| remove(directory, &name)).await
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
