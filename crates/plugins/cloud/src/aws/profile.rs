//! The files in which AWS's tools keep keys and settings: `credentials` and `config`, in folder `~/.aws`.

use crate::world::{World, read_file};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The settings of one profile.
#[derive(Default)]
pub(super) struct Profile(BTreeMap<String, String>);

impl Profile {
    /// Of both files, waiting for the disk; what stands in `credentials` counts. None if neither knows it.
    pub(super) fn load(world: &World, name: &str) -> Result<Option<Self>, String> {
        let mut found = None;
        let titles = |title: &str| title == name || title.strip_prefix("profile ").is_some_and(|t| t.trim() == name);
        for (variable, file) in [("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")] {
            let Some(path) = path(world, variable, file) else { continue };
            let path = path.display().to_string();
            let bytes = match read_file(&path) {
                Ok(bytes) => bytes,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(format!("AWS settings {path} cannot be read: {e}")),
            };
            let text = String::from_utf8_lossy(&bytes);
            for (_, settings) in sections(&text).into_iter().filter(|(title, _)| titles(title)) {
                found.get_or_insert_with(Self::default).0.extend(settings);
            }
        }
        Ok(found)
    }

    /// The same, on a thread where that delays nobody.
    pub(super) async fn find(world: &World, name: &str) -> Result<Option<Self>, String> {
        let (world, name) = (world.clone(), name.to_owned());
        tokio::task::spawn_blocking(move || Self::load(&world, &name)).await.map_err(|e| e.to_string())?
    }

    /// The name of the one to take.
    pub(super) fn name(world: &World) -> Option<String> {
        world.env("AWS_PROFILE").or_else(|| world.env("AWS_DEFAULT_PROFILE"))
    }

    /// A setting that says something.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }
}

fn path(world: &World, variable: &str, file: &str) -> Option<PathBuf> {
    let usual = || Some(PathBuf::from(world.env("HOME")?).join(".aws").join(file));
    world.env(variable).map(PathBuf::from).or_else(usual)
}

type Section = (String, Vec<(String, String)>);

/// What stands under each `[title]`. Settings that belong to another, which are further in, are left out.
fn sections(text: &str) -> Vec<Section> {
    let mut found: Vec<Section> = Vec::new();
    for line in text.lines() {
        let begins = line.trim();
        if begins.is_empty() || begins.starts_with(['#', ';']) || line.starts_with([' ', '\t']) {
            continue;
        }
        if let Some(title) = begins.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            found.push((title.trim().to_owned(), Vec::new()));
        } else if let (Some((key, value)), Some((_, settings))) = (begins.split_once('='), found.last_mut()) {
            let value = value.split(" #").next().unwrap_or_default();
            settings.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_read_as_awss_tools_read_them() {
        let text =
            "a = lost\n# x\n[ default ]\nRegion=eu-west-1 # here\n  nested = 1\n\n[profile p]\nb = c = d\n; y\nodd\n";
        let found = sections(text);
        let setting = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(found[0], ("default".to_owned(), vec![setting("region", "eu-west-1")]));
        assert_eq!(found[1], ("profile p".to_owned(), vec![setting("b", "c = d")]));
        assert_eq!(found.len(), 2);
    }
}
