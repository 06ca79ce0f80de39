//! `file`: the bundle in files, one a format, each replaced as a whole. SPIRE has no such publisher.

use async_trait::async_trait;
use finial_core::Bundle;
use finial_hcl::Value;
use finial_plugin::{BundleFormat, BundlePublisher, PluginError, decode, parse_refresh_hint};
use finial_runtime::files;
use serde::Deserialize;
use std::borrow::Cow;
use std::fs::{Metadata, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Mutex;

/// Bundles are no secret.
const MODE: u32 = 0o644;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    spiffe: String,
    jwks: String,
    pem: String,
    refresh_hint: String,
}

/// The `file` bundle publisher.
pub struct File {
    files: Vec<(PathBuf, BundleFormat)>,
    /// In place of the bundle's own, seconds.
    refresh_hint: Option<i64>,
    /// Held until the file is written, also when nobody waits for it any more: the last bundle is written last.
    turn: Arc<Mutex<()>>,
}

impl File {
    /// The name in configuration.
    pub const NAME: &'static str = "file";

    /// With `spiffe`, `jwks` and `pem`, each the path of a file in that format, of which one must be there; and, if it is to be
    /// another than the server's, `refresh_hint`.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Value) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        let formats = [BundleFormat::Spiffe, BundleFormat::Jwks, BundleFormat::Pem];
        let files = [config.spiffe, config.jwks, config.pem].into_iter().zip(formats);
        let files: Vec<_> = files.filter(|(path, _)| !path.is_empty()).map(|(path, f)| (path.into(), f)).collect();
        if files.is_empty() {
            return Err(PluginError::invalid(
                "one of spiffe, jwks and pem is required: the path of a file in that format",
            ));
        }
        let hint = Some(config.refresh_hint).filter(|hint| !hint.is_empty());
        let hint = hint.map(|hint| parse_refresh_hint(&hint));
        Ok(Self { files, refresh_hint: hint.transpose()?, turn: Arc::default() })
    }
}

/// Leaves the file alone when it says that already: who watches it is not woken for nothing.
fn put(path: &Path, text: &str) -> io::Result<()> {
    // Reading a pipe would take for ever.
    let may_be = |there: Metadata| there.is_file() && usize::try_from(there.len()) == Ok(text.len());
    if std::fs::metadata(path).is_ok_and(may_be) && std::fs::read(path).is_ok_and(|there| there == text.as_bytes()) {
        return Ok(());
    }
    files::replace(path, MODE, |mut file| {
        // The server's umask shuts others out.
        file.set_permissions(Permissions::from_mode(MODE))?;
        file.write_all(text.as_bytes())
    })
}

#[async_trait]
impl BundlePublisher for File {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn publish(&self, bundle: &Bundle) -> Result<(), PluginError> {
        let bundle = match self.refresh_hint {
            Some(refresh_hint) => Cow::Owned(Bundle { refresh_hint, ..bundle.clone() }),
            None => Cow::Borrowed(bundle),
        };
        let written: Vec<_> = self.files.iter().map(|(path, format)| (path.clone(), format.write(&bundle))).collect();
        let turn = self.turn.clone().lock_owned().await;
        let work = move || {
            // A file that cannot be written keeps no other from being.
            let failed = |(path, text): (PathBuf, String)| put(&path, &text).err().map(|error| (path, error));
            let failed: Vec<_> = written.into_iter().filter_map(failed).collect();
            drop(turn);
            failed.into_iter().next()
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(None) => Ok(()),
            Ok(Some((path, error))) => {
                Err(PluginError::internal(format!("cannot write the bundle to {}: {error}", path.display())))
            }
            Err(error) => Err(PluginError::internal("cannot write the bundle").because(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::TrustDomain;
    use finial_crypto::pem;
    use finial_plugin::conformance::BundlePublisherFixture;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    fn file(data: &str) -> Result<File, PluginError> {
        File::new(&finial_hcl::parse(data).unwrap())
    }

    fn fixture() -> BundlePublisherFixture {
        let folder = tempfile::tempdir().unwrap().keep();
        let path = folder.join("bundle.pem");
        let publisher = file(&format!("pem = \"{}\"", path.display())).unwrap();
        let spoilt = path.clone();
        BundlePublisherFixture {
            publisher: Arc::new(publisher),
            published: Box::new(move || pem::certificates(&fs::read(&path).ok()?).ok()),
            spoil: Some(Box::new(move || fs::write(&spoilt, "spoilt").unwrap())),
        }
    }

    finial_plugin::bundle_publisher_conformance!(fixture());

    #[test]
    fn what_is_missing_or_malformed_is_named() {
        let refused = |data| file(data).err().unwrap().to_string();
        assert!(refused("").starts_with("one of spiffe, jwks and pem is required"));
        let hint = "pem = \"x\" \n refresh_hint = \"soon\"";
        assert_eq!(refused(hint), "could not parse refresh hint \"soon\": time: invalid duration \"soon\"");
        assert!(refused("pem = \"x\" \n refresh_hint = \"-5m\"").ends_with("it is negative"));
    }

    #[tokio::test]
    async fn the_hint_is_its_own_and_an_unchanged_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bundle.json");
        let data = format!("spiffe = \"{}\" \n refresh_hint = \"5m\"", path.display());
        let publisher = file(&data).unwrap();
        let bundle =
            Bundle { refresh_hint: 2, sequence_number: 3, ..Bundle::empty(TrustDomain::parse("a.test").unwrap()) };
        publisher.publish(&bundle).await.unwrap();
        let first = (fs::read_to_string(&path).unwrap(), fs::metadata(&path).unwrap().ino());
        assert!(first.0.contains("\"spiffe_refresh_hint\":300"), "{}", first.0);
        publisher.publish(&bundle).await.unwrap();
        assert_eq!((fs::read_to_string(&path).unwrap(), fs::metadata(&path).unwrap().ino()), first);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, MODE);
        let pem = tempfile::tempdir().unwrap().keep().join("bundle.pem");
        let publisher = file(&format!("{data} \n pem = \"{}\"", pem.display())).unwrap();
        fs::remove_dir_all(folder.path()).unwrap();
        let error = publisher.publish(&bundle).await.unwrap_err().to_string();
        assert!(error.starts_with("cannot write the bundle to /") && error.contains("No such file"), "{error}");
        assert!(pem.exists(), "the other one is written all the same");
    }

    #[tokio::test]
    async fn a_pipe_in_its_place_is_replaced_and_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bundle.pem");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let publisher = file(&format!("pem = \"{}\"", path.display())).unwrap();
        let bundle = Bundle::empty(TrustDomain::parse("a.test").unwrap());
        let published = tokio::time::timeout(std::time::Duration::from_secs(5), publisher.publish(&bundle)).await;
        if published.is_err() {
            // Who reads it is let go, so that the test ends.
            drop(fs::OpenOptions::new().read(true).write(true).open(&path));
        }
        published.expect("in time").unwrap();
        assert!(fs::metadata(&path).unwrap().is_file());
    }
}
