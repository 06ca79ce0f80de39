//! Flags as Go's `flag` package takes them: `-name value`, `--name=value`, booleans without a value, texts of usage and
//! errors to the letter, because scripts and people know them from SPIRE.

use finial_config::{format_go_duration, parse_go_duration};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

/// How results are printed: `-output`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Output {
    /// For people.
    #[default]
    Pretty,
    /// One line of JSON.
    Json,
}

/// A value that a flag holds.
#[derive(Clone, Debug, PartialEq)]
enum Held {
    Bool(bool),
    Int(i64),
    Text(String),
    Texts(Vec<String>),
    /// Split at commas; the last one given counts.
    CommaTexts(Vec<String>),
    /// In nanoseconds. The bool tells whether usage says `duration` or `value`.
    Duration(i64, bool),
    /// `true`, `false`, or anything else for "either".
    TriBool(Option<bool>),
    Output(Option<Output>),
}

#[derive(Clone, Debug)]
struct Flag {
    usage: Cow<'static, str>,
    held: Held,
    /// The flag that shares its value with this one.
    target: &'static str,
    given: bool,
}

/// The flags of one command, before they are parsed.
#[derive(Clone, Debug, Default)]
pub struct FlagSet {
    name: String,
    flags: BTreeMap<&'static str, Flag>,
}

/// Why arguments were refused. `usage` was not printed yet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// `-h` or `-help`.
    #[error("flag: help requested")]
    Help,
    /// Anything else, in Go's words.
    #[error("{0}")]
    Refused(String),
}

impl FlagSet {
    /// An empty set; `name` stands in the first line of usage.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), flags: BTreeMap::new() }
    }

    fn add(&mut self, name: &'static str, usage: impl Into<Cow<'static, str>>, held: Held) {
        self.flags.insert(name, Flag { usage: usage.into(), held, target: name, given: false });
    }

    /// A switch, false unless given.
    pub fn bool(&mut self, name: &'static str, usage: impl Into<Cow<'static, str>>) {
        self.add(name, usage, Held::Bool(false));
    }

    /// A whole number.
    pub fn int(&mut self, name: &'static str, default: i64, usage: impl Into<Cow<'static, str>>) {
        self.add(name, usage, Held::Int(default));
    }

    /// A text.
    pub fn string(&mut self, name: &'static str, default: &str, usage: impl Into<Cow<'static, str>>) {
        self.add(name, usage, Held::Text(default.into()));
    }

    /// A text that may be given several times.
    pub fn strings(&mut self, name: &'static str, usage: impl Into<Cow<'static, str>>) {
        self.add(name, usage, Held::Texts(Vec::new()));
    }

    /// A list separated by commas.
    pub fn comma_strings(&mut self, name: &'static str, usage: impl Into<Cow<'static, str>>) {
        self.add(name, usage, Held::CommaTexts(Vec::new()));
    }

    /// A duration that usage calls `duration` (Go's `DurationVar`).
    pub fn duration(&mut self, name: &'static str, default: Duration, usage: impl Into<Cow<'static, str>>) {
        self.add(name, usage, Held::Duration(i64::try_from(default.as_nanos()).unwrap_or(i64::MAX), true));
    }

    /// A duration that usage calls `value` (SPIRE's own flag type).
    pub fn duration_value(&mut self, name: &'static str, default: Duration, usage: impl Into<Cow<'static, str>>) {
        self.add(name, usage, Held::Duration(i64::try_from(default.as_nanos()).unwrap_or(i64::MAX), false));
    }

    /// `true`, `false`, or either if not given.
    pub fn tri_bool(&mut self, name: &'static str, usage: impl Into<Cow<'static, str>>) {
        self.add(name, usage, Held::TriBool(None));
    }

    /// `-output`.
    pub fn output(&mut self) {
        let usage = "Desired output format (pretty, json); default: pretty.";
        self.add("output", usage, Held::Output(None));
    }

    /// Another name for `-output`.
    pub fn output_alias(&mut self, name: &'static str, usage: &'static str) {
        self.add(name, usage, Held::Output(None));
        if let Some(flag) = self.flags.get_mut(name) {
            flag.target = "output";
        }
    }

    /// The usage text, as Go prints it.
    pub fn usage(&self) -> String {
        let mut out = if self.name.is_empty() { "Usage:\n".into() } else { format!("Usage of {}:\n", self.name) };
        for (name, flag) in &self.flags {
            let (kind, usage) = flag.kind_and_usage();
            let mut line = format!("  -{name}");
            if !kind.is_empty() {
                let _ = write!(line, " {kind}");
            }
            line.push_str(if line.len() <= 4 { "\t" } else { "\n    \t" });
            line.push_str(&usage.replace('\n', "\n    \t"));
            if let Some(default) = flag.held.default_text() {
                let _ = write!(line, " (default {default})");
            }
            out.push_str(&line);
            out.push('\n');
        }
        out
    }

    /// Parses up to the first argument that is not a flag, or `--`.
    ///
    /// # Errors
    /// Help was asked for, or a flag is unknown, lacks its value or has a bad one.
    pub fn parse(mut self, args: &[String]) -> Result<Flags, FlagError> {
        let mut args = args.iter();
        let mut rest = Vec::new();
        while let Some(arg) = args.next() {
            let Some(body) = arg.strip_prefix('-').filter(|b| !b.is_empty()) else {
                rest.push(arg.clone());
                break;
            };
            let body = body.strip_prefix('-').unwrap_or(body);
            if body.is_empty() {
                break;
            }
            if body.starts_with(['-', '=']) {
                return Err(FlagError::Refused(format!("bad flag syntax: {arg}")));
            }
            let (name, value) = match body.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (body, None),
            };
            let Some((&known, flag)) = self.flags.get_key_value(name) else {
                if name == "help" || name == "h" {
                    return Err(FlagError::Help);
                }
                return Err(FlagError::Refused(format!("flag provided but not defined: -{name}")));
            };
            let is_bool = matches!(flag.held, Held::Bool(_));
            let target = flag.target;
            let value = match value {
                Some(value) => value,
                None if is_bool => "true".into(),
                None => match args.next() {
                    Some(value) => value.clone(),
                    None => return Err(FlagError::Refused(format!("flag needs an argument: -{name}"))),
                },
            };
            if let Some(flag) = self.flags.get_mut(target) {
                flag.held.set(&value).map_err(|error| {
                    FlagError::Refused(if is_bool {
                        format!("invalid boolean value {value:?} for -{known}: {error}")
                    } else {
                        format!("invalid value {value:?} for flag -{known}: {error}")
                    })
                })?;
                flag.given = true;
            }
        }
        rest.extend(args.cloned());
        Ok(Flags { flags: self.flags, rest })
    }
}

impl Flag {
    /// The name of the value, which usage may put in back quotes, and the usage without these.
    fn kind_and_usage(&self) -> (String, String) {
        let mut parts = self.usage.splitn(3, '`');
        if let (Some(before), Some(name), Some(after)) = (parts.next(), parts.next(), parts.next()) {
            return (name.into(), format!("{before}{name}{after}"));
        }
        let kind = match self.held {
            Held::Bool(_) => "",
            Held::Int(_) => "int",
            Held::Text(_) => "string",
            Held::Duration(_, true) => "duration",
            _ => "value",
        };
        (kind.into(), self.usage.clone().into_owned())
    }
}

impl Held {
    fn default_text(&self) -> Option<String> {
        match self {
            Self::Bool(true) => Some("true".into()),
            Self::Int(value) if *value != 0 => Some(value.to_string()),
            Self::Text(text) if !text.is_empty() => Some(format!("{text:?}")),
            Self::Duration(nanos, _) if *nanos != 0 => {
                Some(format_go_duration(Duration::from_nanos(nanos.unsigned_abs())))
            }
            _ => None,
        }
    }

    fn set(&mut self, text: &str) -> Result<(), String> {
        let parse_error = || String::from("parse error");
        match self {
            Self::Bool(value) => {
                *value = match text {
                    "1" | "t" | "T" | "TRUE" | "true" | "True" => true,
                    "0" | "f" | "F" | "FALSE" | "false" | "False" => false,
                    _ => return Err(parse_error()),
                };
            }
            Self::Int(value) => *value = parse_int(text)?,
            Self::Text(value) => text.clone_into(value),
            Self::Texts(values) => values.push(text.into()),
            Self::CommaTexts(values) => *values = text.split(',').map(String::from).collect(),
            Self::Duration(value, plain) => {
                *value = parse_go_duration(text).map_err(|error| if *plain { parse_error() } else { error })?;
            }
            Self::TriBool(value) => *value = text.parse().ok(),
            Self::Output(value) => {
                let format = match text.to_ascii_lowercase().as_str() {
                    "json" => Output::Json,
                    "pretty" | "prettyprint" => Output::Pretty,
                    _ => return Err(format!("bad formatter flag: unknown format option: {text:?}")),
                };
                if value.is_some_and(|before| before != format) {
                    let before = if *value == Some(Output::Json) { "json" } else { "pretty" };
                    return Err(format!("the output format has already been set to {before:?}"));
                }
                *value = Some(format);
            }
        }
        Ok(())
    }
}

fn parse_int(text: &str) -> Result<i64, String> {
    let digits = text.trim_start_matches(['+', '-']);
    let (radix, digits) = match digits.get(..2).map(str::to_ascii_lowercase).as_deref() {
        Some("0x") => (16, digits.get(2..).unwrap_or_default()),
        Some("0b") => (2, digits.get(2..).unwrap_or_default()),
        Some("0o") => (8, digits.get(2..).unwrap_or_default()),
        _ if digits.len() > 1 && digits.starts_with('0') => (8, digits.get(1..).unwrap_or_default()),
        _ => (10, digits),
    };
    if text.len() > digits.len() + 3 || digits.is_empty() || digits.starts_with(['+', '-']) {
        return Err("parse error".into());
    }
    let error = |error: std::num::ParseIntError| match error.kind() {
        std::num::IntErrorKind::PosOverflow => "value out of range".to_owned(),
        _ => "parse error".to_owned(),
    };
    let value = i128::from_str_radix(digits, radix).map_err(error)?;
    i64::try_from(if text.starts_with('-') { -value } else { value }).map_err(|_| "value out of range".into())
}

/// Flags as given. Asking for a name that the command did not declare is a mistake of ours and answered with the
/// empty value; tests catch it.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    flags: BTreeMap<&'static str, Flag>,
    rest: Vec<String>,
}

impl Flags {
    fn held(&self, name: &str) -> Option<&Held> {
        let held = self.flags.get(name).map(|f| &f.held);
        debug_assert!(held.is_some(), "no flag -{name} was declared");
        held
    }

    /// A switch.
    pub fn bool(&self, name: &str) -> bool {
        matches!(self.held(name), Some(Held::Bool(true)))
    }

    /// A whole number.
    pub fn int(&self, name: &str) -> i64 {
        if let Some(Held::Int(value)) = self.held(name) { *value } else { 0 }
    }

    /// A text.
    pub fn string(&self, name: &str) -> &str {
        if let Some(Held::Text(text)) = self.held(name) { text } else { "" }
    }

    /// Texts of a flag that may be repeated, or that is split at commas.
    pub fn strings(&self, name: &str) -> &[String] {
        if let Some(Held::Texts(texts) | Held::CommaTexts(texts)) = self.held(name) { texts } else { &[] }
    }

    /// A duration in nanoseconds; may be negative.
    pub fn duration_nanos(&self, name: &str) -> i64 {
        if let Some(Held::Duration(nanos, _)) = self.held(name) { *nanos } else { 0 }
    }

    /// A duration; negative ones are zero.
    pub fn duration(&self, name: &str) -> Duration {
        Duration::from_nanos(u64::try_from(self.duration_nanos(name)).unwrap_or(0))
    }

    /// `true`, `false` or either.
    pub fn tri_bool(&self, name: &str) -> Option<bool> {
        if let Some(Held::TriBool(value)) = self.held(name) { *value } else { None }
    }

    /// `-output`; pretty if the command has no such flag.
    pub fn output(&self) -> Output {
        match self.flags.get("output").map(|f| &f.held) {
            Some(Held::Output(Some(output))) => *output,
            _ => Output::Pretty,
        }
    }

    /// Whether the flag was given.
    pub fn is_set(&self, name: &str) -> bool {
        self.flags.get(name).is_some_and(|f| f.given)
    }

    /// What follows the flags.
    pub fn rest(&self) -> &[String] {
        &self.rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set() -> FlagSet {
        let mut set = FlagSet::new("try it");
        set.bool("verbose", "Print more");
        set.int("port", 0, "Port `number`\nof it");
        set.int("ttl", 600, "Seconds");
        set.string("path", "/x", "Where");
        set.string("n", "", "Short");
        set.strings("dns", "Names");
        set.comma_strings("audience", "Who");
        set.duration("for", Duration::from_secs(2_592_000), "How long");
        set.duration_value("timeout", Duration::from_secs(5), "How long");
        set.tri_bool("banned", "Which");
        set.output();
        set.output_alias("format", "deprecated; use -output");
        set
    }

    fn parse(args: &[&str]) -> Result<Flags, FlagError> {
        set().parse(&args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn takes_all_forms() {
        let flags = parse(&[
            "-verbose",
            "--port=0x10",
            "-path",
            "-y",
            "-dns",
            "a",
            "--dns",
            "b",
            "-audience",
            "a,b",
            "-for",
            "1h",
            "-timeout=3s",
            "-banned",
            "false",
            "-n=",
            "-output",
            "JSON",
            "-format",
            "json",
            "rest",
            "-port",
        ])
        .unwrap();
        assert!(flags.bool("verbose"));
        assert_eq!((flags.int("port"), flags.int("ttl")), (16, 600));
        assert_eq!((flags.string("path"), flags.string("n")), ("-y", ""));
        assert_eq!(flags.strings("dns"), ["a", "b"]);
        assert_eq!(flags.strings("audience"), ["a", "b"]);
        assert_eq!(flags.duration("for"), Duration::from_secs(3600));
        assert_eq!(flags.duration("timeout"), Duration::from_secs(3));
        assert_eq!(flags.tri_bool("banned"), Some(false));
        assert_eq!(flags.output(), Output::Json);
        assert_eq!(flags.rest(), ["rest", "-port"]);
        assert!(flags.is_set("path") && !flags.is_set("ttl"));
        assert_eq!(parse(&["--", "-x"]).unwrap().rest(), ["-x"]);
        assert_eq!(parse(&["-"]).unwrap().rest(), ["-"]);
        assert!(!parse(&["-verbose=F"]).unwrap().bool("verbose"));
    }

    #[test]
    fn refuses_in_gos_words() {
        for (args, want) in [
            (vec!["-nope"], "flag provided but not defined: -nope"),
            (vec!["---x"], "bad flag syntax: ---x"),
            (vec!["-=x"], "bad flag syntax: -=x"),
            (vec!["-port"], "flag needs an argument: -port"),
            (vec!["-port", "x"], "invalid value \"x\" for flag -port: parse error"),
            (
                vec!["-port", "99999999999999999999"],
                "invalid value \"99999999999999999999\" for flag -port: value out of range",
            ),
            (vec!["-verbose=maybe"], "invalid boolean value \"maybe\" for -verbose: parse error"),
            (vec!["-timeout", "5"], "invalid value \"5\" for flag -timeout: time: missing unit in duration \"5\""),
            (vec!["-for", "5"], "invalid value \"5\" for flag -for: parse error"),
            (
                vec!["-output", "x"],
                "invalid value \"x\" for flag -output: bad formatter flag: unknown format option: \"x\"",
            ),
            (
                vec!["-output", "json", "-format", "pretty"],
                "invalid value \"pretty\" for flag -format: the output format has already been set to \"json\"",
            ),
            (vec!["-h"], "flag: help requested"),
            (vec!["--help"], "flag: help requested"),
        ] {
            assert_eq!(parse(&args).unwrap_err().to_string(), want);
        }
    }

    #[test]
    fn usage_as_go_prints_it() {
        let want = "Usage of try it:\n  -audience value\n    \tWho\n  -banned value\n    \tWhich\n  -dns value\n    \tNames\n  -for duration\n    \tHow long (default 720h0m0s)\n  -format value\n    \tdeprecated; use -output\n  -n string\n    \tShort\n  -output value\n    \tDesired output format (pretty, json); default: pretty.\n  -path string\n    \tWhere (default \"/x\")\n  -port number\n    \tPort number\n    \tof it\n  -timeout value\n    \tHow long (default 5s)\n  -ttl int\n    \tSeconds (default 600)\n  -verbose\n    \tPrint more\n";
        assert_eq!(set().usage(), want);
    }

    proptest! {
        #[test]
        fn no_arguments_make_it_panic(args in prop::collection::vec("(-{0,3}(verbose|port|output|dns|for)?=?)?[ -~]{0,5}", 0..6)) {
            let _ = set().parse(&args);
        }

        #[test]
        fn every_number_is_read_back(value in any::<i64>()) {
            prop_assert_eq!(parse(&["-port", &value.to_string()]).map(|f| f.int("port")), Ok(value));
        }
    }
}
