//! `file`: the bundle in a file, which is replaced as a whole. SPIRE has no such publisher.

use async_trait::async_trait;
use finial_config::parse_go_duration;
use finial_core::Bundle;
use finial_hcl::Value;
use finial_plugin::{BundleFormat, BundlePublisher, PluginError, decode};
use finial_runtime::files;
use serde::Deserialize;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Mutex;

/// Bundles are no secret.
const MODE: u32 = 0o644;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    path: String,
    format: String,
    refresh_hint: String,
}

/// The `file` bundle publisher.
pub struct File {
    path: PathBuf,
    format: BundleFormat,
    /// In place of the bundle's own, seconds.
    refresh_hint: Option<i64>,
    /// Held until the file is written, also when nobody waits for it any more: the last bundle is written last.
    turn: Arc<Mutex<()>>,
}

impl File {
    /// The name in configuration.
    pub const NAME: &'static str = "file";

    /// With `path`, `format` (`spiffe`, `jwks` or `pem`) and, if it is to be another than the server's, `refresh_hint`.
    ///
    /// # Errors
    /// What is missing or unknown.
    pub fn new(data: &Value) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        if config.path.is_empty() || config.format.is_empty() {
            let missing = if config.path.is_empty() { "path" } else { "format" };
            return Err(PluginError::invalid(format!("{missing} is required")));
        }
        let hint =
            Some(config.refresh_hint).filter(|hint| !hint.is_empty()).map(|hint| match parse_go_duration(&hint) {
                Ok(nanoseconds) if nanoseconds >= 0 => Ok(nanoseconds / 1_000_000_000),
                Ok(_) => Err(PluginError::invalid(format!("could not parse refresh hint {hint:?}: it is negative"))),
                Err(e) => Err(PluginError::invalid(format!("could not parse refresh hint {hint:?}: {e}"))),
            });
        let format = BundleFormat::parse(&config.format)?;
        Ok(Self { path: config.path.into(), format, refresh_hint: hint.transpose()?, turn: Arc::default() })
    }
}

/// Leaves the file alone when it says that already: who watches it is not woken for nothing.
fn put(path: &Path, text: &str) -> io::Result<()> {
    if std::fs::read(path).is_ok_and(|there| there == text.as_bytes()) {
        return Ok(());
    }
    files::replace(path, MODE, |mut file| file.write_all(text.as_bytes()))
}

#[async_trait]
impl BundlePublisher for File {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn publish(&self, bundle: &Bundle) -> Result<(), PluginError> {
        let text = match self.refresh_hint {
            Some(refresh_hint) => self.format.write(&Bundle { refresh_hint, ..bundle.clone() })?,
            None => self.format.write(bundle)?,
        };
        let turn = self.turn.clone().lock_owned().await;
        let path = self.path.clone();
        let work = move || {
            let done = put(&path, &text);
            drop(turn);
            done
        };
        let failed = |e: &dyn std::fmt::Display| {
            PluginError::internal(format!("cannot write the bundle to {}: {e}", self.path.display()))
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|e| failed(&e))?.map_err(|e| failed(&e))
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
        let publisher = file(&format!("path = \"{}\" \n format = \"pem\"", path.display())).unwrap();
        let spoilt = path.clone();
        BundlePublisherFixture {
            publisher: Arc::new(publisher),
            published: Box::new(move || pem::certificates(&fs::read(&path).ok()?).ok()),
            spoil: Some(Box::new(move || fs::write(&spoilt, "spoilt").unwrap())),
        }
    }

    finial_plugin::bundle_publisher_conformance!(fixture());

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        let refused = |data| file(data).err().unwrap().to_string();
        assert_eq!(refused("format = \"pem\""), "path is required");
        assert_eq!(refused("path = \"x\""), "format is required");
        assert_eq!(refused("path = \"x\" \n format = \"der\""), "unknown bundle format: \"der\"");
        let hint = "path = \"x\" \n format = \"pem\" \n refresh_hint = \"soon\"";
        assert_eq!(refused(hint), "could not parse refresh hint \"soon\": time: invalid duration \"soon\"");
    }

    #[tokio::test]
    async fn the_hint_is_its_own_and_an_unchanged_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bundle.json");
        let data = format!("path = \"{}\" \n format = \"spiffe\" \n refresh_hint = \"5m\"", path.display());
        let publisher = file(&data).unwrap();
        let bundle =
            Bundle { refresh_hint: 2, sequence_number: 3, ..Bundle::empty(TrustDomain::parse("a.test").unwrap()) };
        publisher.publish(&bundle).await.unwrap();
        let first = (fs::read_to_string(&path).unwrap(), fs::metadata(&path).unwrap().ino());
        assert!(first.0.contains("\"spiffe_refresh_hint\":300"), "{}", first.0);
        publisher.publish(&bundle).await.unwrap();
        assert_eq!((fs::read_to_string(&path).unwrap(), fs::metadata(&path).unwrap().ino()), first);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, MODE);
        fs::remove_dir_all(folder.path()).unwrap();
        let error = publisher.publish(&bundle).await.unwrap_err().to_string();
        assert!(error.starts_with("cannot write the bundle to /") && error.contains("No such file"), "{error}");
    }
}
