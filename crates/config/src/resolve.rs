//! The common part of turning what is written into settings: positions, unknown keys, durations, paths.

use crate::duration::parse_go_duration;
use crate::problem::{ConfigError, Loaded, Notice, Problem, Readable};
use crate::{LogFormat, LogLevel, LogSettings, PluginConfig, nearest};
use finial_core::TrustDomain;
use finial_hcl::{Kind, Object, Pos, Unused, Value};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Files above this size in bytes are refused.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// How many type errors are reported at once.
const TYPE_ERRORS_MAX: usize = 20;

/// Collects what is wrong and what is to be said.
pub(crate) struct Resolver {
    pub(crate) file: PathBuf,
    pub(crate) root: Value,
    pub(crate) problems: Vec<Problem>,
    pub(crate) notices: Vec<Notice>,
    /// Where the keys stand that problems are reported of; empty at the top of the file.
    pub(crate) base: &'static [&'static str],
    /// Keys that a flag set, so that no place in the file is named for them.
    pub(crate) overridden: Vec<&'static str>,
    pub(crate) log: LogSettings,
    pub(crate) plugins: Option<Vec<PluginConfig>>,
    pub(crate) trust_domain: Option<TrustDomain>,
}

/// Reads a file, expanding variables if told to.
pub(crate) fn read_text(
    path: &Path,
    expand: bool,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<String, Box<ConfigError>> {
    let shown = path.display();
    let fail = |message: String| {
        let problems = vec![Problem { message, pos: None, hint: None }];
        Box::new(ConfigError { file: path.into(), problems, ..ConfigError::default() })
    };
    let unreadable = |error: std::io::Error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
            return fail(format!("could not find config file {}: please use the -config flag", absolute.display()));
        }
        let reason = match error.kind() {
            std::io::ErrorKind::PermissionDenied => "permission denied".into(),
            std::io::ErrorKind::IsADirectory => "is a directory".into(),
            _ => error.to_string(),
        };
        let act = if error.kind() == std::io::ErrorKind::IsADirectory { "read" } else { "open" };
        fail(format!("unable to read configuration at \"{shown}\": {act} {shown}: {reason}"))
    };
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > FILE_BYTES_MAX {
        return Err(fail(format!("unable to read configuration at \"{shown}\": larger than {FILE_BYTES_MAX} bytes")));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| fail(format!("unable to decode configuration at \"{shown}\": illegal UTF-8 encoding")))?;
    Ok(if expand { crate::expand::expand_env(&text, env) } else { text })
}

impl Resolver {
    pub(crate) fn new(file: &Path, text: &str, overridden: Vec<&'static str>) -> Result<Self, Box<ConfigError>> {
        let mut resolver = Self {
            file: file.into(),
            root: Value::empty(),
            problems: Vec::new(),
            notices: Vec::new(),
            base: &[],
            overridden,
            log: LogSettings::default(),
            plugins: None,
            trust_domain: None,
        };
        match finial_hcl::parse(text) {
            Ok(root) => resolver.root = root,
            Err(error) => {
                let message = format!("unable to decode configuration at \"{}\": {error}", file.display());
                resolver.problems.push(Problem { message, pos: Some(error.pos), hint: None });
                return Err(resolver.into_error());
            }
        }
        Ok(resolver)
    }

    /// Reads the whole file as `T`. Values of a wrong type are reported, taken out, and the rest is read again.
    pub(crate) fn raw<T: DeserializeOwned + Default>(&mut self) -> (T, Vec<Unused>) {
        let mut root = self.root.clone();
        for _ in 0..TYPE_ERRORS_MAX {
            match root.parse_reporting() {
                Ok(read) => return read,
                Err(error) => {
                    let message = format!("unable to decode configuration at \"{}\": {error}", self.file.display());
                    self.problems.push(Problem { message, pos: Some(error.pos), hint: None });
                    if !remove_at(&mut root, error.pos) {
                        break;
                    }
                }
            }
        }
        (T::default(), Vec::new())
    }

    pub(crate) fn into_error(self) -> Box<ConfigError> {
        let Self { file, problems, notices, log, plugins, trust_domain, .. } = self;
        Box::new(ConfigError { file, problems, notices, log, plugins, trust_domain, readable: None })
    }

    pub(crate) fn finish<T>(
        self,
        settings: T,
        readable: impl FnOnce(Box<Loaded<T>>) -> Readable,
    ) -> Result<Loaded<T>, Box<ConfigError>> {
        let loaded = Loaded { settings, notices: self.notices.clone(), root: self.root.clone() };
        if self.problems.is_empty() {
            return Ok(loaded);
        }
        Err(Box::new(ConfigError { readable: Some(readable(Box::new(loaded))), ..*self.into_error() }))
    }

    /// Reports a problem of the key that `path` leads to; its section is named if the key is not written.
    pub(crate) fn problem(&mut self, path: &[&str], message: impl Into<String>, hint: &str) {
        let path = &[self.base, path].concat();
        let by_flag = path.last().is_some_and(|key| self.overridden.contains(key));
        let pos = (1..=path.len()).rev().find_map(|n| self.root.find_pos(path.get(..n)?)).filter(|_| !by_flag);
        let hint = (!hint.is_empty()).then(|| hint.into());
        self.problems.push(Problem { message: message.into(), pos, hint });
    }

    pub(crate) fn warn(&mut self, message: impl Into<String>) {
        self.notices.push(Notice::Warn(message.into()));
    }

    pub(crate) fn deprecated(&mut self, message: impl Into<String>) {
        self.notices.push(Notice::Deprecated(message.into()));
    }

    /// A duration that is not negative; None if the text is empty or bad. `label` begins the error text.
    pub(crate) fn duration(&mut self, path: &[&str], text: &str, label: &str) -> Option<Duration> {
        if text.is_empty() {
            return None;
        }
        match parse_go_duration(text) {
            Ok(nanos) => match u64::try_from(nanos) {
                Ok(nanos) => return Some(Duration::from_nanos(nanos)),
                Err(_) => self.problem(path, format!("{label}: {text:?} is negative"), "write a duration such as 1h"),
            },
            Err(error) => self.problem(path, format!("{label}: {error}"), "write a duration such as 90s, 10m or 1h30m"),
        }
        None
    }

    /// A TCP address; DNS names are resolved, IPv4 first.
    pub(crate) fn address(&mut self, path: &[&str], host: &str, port: i64, label: &str) -> Option<SocketAddr> {
        let bare = host.trim_matches(['[', ']']);
        let Ok(port) = u16::try_from(port) else {
            self.problem(path, format!("{label}: address {port}: invalid port"), "ports go from 0 to 65535");
            return None;
        };
        match (bare, port).to_socket_addrs().map(|found| found.min_by_key(SocketAddr::is_ipv6)) {
            Ok(Some(address)) => Some(address),
            Ok(None) => {
                self.problem(path, format!("{label}: lookup {bare}: no such host"), "");
                None
            }
            Err(_) => {
                self.problem(
                    path,
                    format!("{label}: lookup {bare}: no such host"),
                    "use an IP address, or a name that resolves",
                );
                None
            }
        }
    }

    /// A path made absolute, seen from the working directory, without `.` and `..`.
    pub(crate) fn absolute(&mut self, path: &[&str], text: &str, label: &str) -> Option<PathBuf> {
        match std::path::absolute(text) {
            Ok(absolute) => Some(clean(&absolute)),
            Err(error) => {
                self.problem(path, format!("{label}: {error}"), "");
                None
            }
        }
    }

    pub(crate) fn log_settings(&mut self, section: &str, level: &str, format: &str, file: &str, source_location: bool) {
        self.log.source_location = source_location;
        self.log.file = (!file.is_empty()).then(|| file.into());
        if !level.is_empty() {
            match LogLevel::parse(level) {
                Some(level) => self.log.level = level,
                None => self.problem(
                    &[section, "log_level"],
                    format!("could not start logger: not a valid logrus Level: {level:?}"),
                    "use trace, debug, info, warn, error, fatal or panic",
                ),
            }
        }
        match format.to_ascii_lowercase().as_str() {
            "" => self.log.format = LogFormat::Default,
            "text" => self.log.format = LogFormat::Text,
            "json" => self.log.format = LogFormat::Json,
            _ => self.problem(
                &[section, "log_format"],
                format!("could not start logger: unknown logger format: {format:?}"),
                "use text or json",
            ),
        }
    }

    /// Reports unknown keys. `name` gives the name of a checked section, None for those that SPIRE does not check:
    /// these are only warned about.
    pub(crate) fn unknown_keys(&mut self, unused: &[Unused], name: impl Fn(&[String]) -> Option<String>) {
        let mut sections: Vec<(String, Vec<&Unused>)> = Vec::new();
        for unused in unused {
            let Some(section) = name(&unused.section) else {
                let path = unused.section.join(".");
                let meant = did_you_mean(unused).map(|meant| format!(" ({meant})")).unwrap_or_default();
                self.warn(format!(
                    "Unknown configuration key {path}.{} at {} is ignored{meant}",
                    unused.key, unused.pos
                ));
                continue;
            };
            match sections.iter_mut().find(|(known, _)| *known == section) {
                Some((_, keys)) => keys.push(unused),
                None => sections.push((section, vec![unused])),
            }
        }
        for (section, keys) in sections {
            let mut names: Vec<&str> = keys.iter().map(|u| u.key.as_str()).collect();
            names.sort_unstable();
            names.dedup();
            self.notices.push(Notice::Unknown { section: section.clone(), keys: names.join(",") });
            for key in keys {
                let what = format!("the key {:?} is not known in section {section:?}", key.key);
                let advice = former(&key.key).map(str::to_owned).or_else(|| did_you_mean(key));
                let advice = advice.unwrap_or_else(|| "remove or correct it".into());
                self.problems.push(Problem {
                    message: "unknown configuration detected".into(),
                    pos: Some(key.pos),
                    hint: Some(format!("{what}: {advice}")),
                });
            }
        }
    }

    /// `experimental { feature_flags }`: known flags.
    pub(crate) fn feature_flags(&mut self, section: &str, flags: &[String]) {
        let mut bad: Vec<&str> =
            flags.iter().map(String::as_str).filter(|f| !["wit-svid", "i_am_a_test_flag"].contains(f)).collect();
        if !bad.is_empty() {
            bad.sort_unstable();
            let message = format!("error loading feature flags: unknown feature flag(s): [{}]", bad.join(" "));
            self.problem(&[section, "experimental", "feature_flags"], message, "known flags: wit-svid");
        }
    }

    /// Whether the section has an `experimental` block that sets anything.
    pub(crate) fn experimental_warning(&mut self, section: &str) {
        let set =
            self.root.find(&[section, "experimental"]).and_then(Value::as_object).is_some_and(|o| !o.items.is_empty());
        if set {
            self.warn(
                "Experimental features have been enabled. Please see docs/compatibility.md for upgrade and compatibility considerations for experimental features.",
            );
        }
    }

    pub(crate) fn feature_flag_warnings(&mut self, flags: &[String]) {
        for flag in flags {
            self.warn(format!("Developer feature flag {flag:?} has been enabled"));
        }
    }
}

fn did_you_mean(unused: &Unused) -> Option<String> {
    nearest(&unused.key, unused.known.iter().copied()).map(|meant| format!("did you mean {meant:?}?"))
}

/// What became of keys that older versions of SPIRE had.
fn former(key: &str) -> Option<&'static str> {
    Some(match key.to_ascii_lowercase().as_str() {
        "default_svid_ttl" => "it became default_x509_svid_ttl and default_jwt_svid_ttl",
        "registration_uds_path" => "it is called socket_path now",
        "retry_rebootstrap" => "it became rebootstrap_mode",
        "bundle_endpoint" => "it stands in a block federation { } now",
        "upstream_bundle"
        | "omit_x509svid_uid"
        | "allow_agentless_node_attestors"
        | "allow_unsafe_ids"
        | "enable_sds" => "SPIRE has it no more: remove it",
        _ => return None,
    })
}

/// Go's `filepath.Clean` for an absolute path.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for part in path.components() {
        match part {
            std::path::Component::Normal(name) => out.push(name),
            std::path::Component::ParentDir => {
                out.pop();
            }
            _ => {}
        }
    }
    out
}

/// Takes the item, or the list element, whose value or key stands at `pos` out of the tree.
fn remove_at(value: &mut Value, pos: Pos) -> bool {
    match &mut value.kind {
        Kind::Object(Object { items }) => match items.iter().position(|i| i.value.pos == pos || i.pos == pos) {
            Some(at) => {
                items.remove(at);
                true
            }
            None => items.iter_mut().any(|i| remove_at(&mut i.value, pos)),
        },
        Kind::List(list) => match list.iter().position(|v| v.pos == pos) {
            Some(at) => {
                list.remove(at);
                true
            }
            None => list.iter_mut().any(|v| remove_at(v, pos)),
        },
        _ => false,
    }
}

/// A map from names to blocks, in the order of names.
pub(crate) type Named<T> = BTreeMap<String, T>;
