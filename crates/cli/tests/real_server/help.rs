//! Every command is there, with SPIRE's help, and so is every word that only leads to others.

use crate::harness::Pair;

const COMMANDS: [&str; 47] = [
    "run",
    "validate",
    "healthcheck",
    "token generate",
    "entry create",
    "entry update",
    "entry show",
    "entry count",
    "entry delete",
    "agent list",
    "agent show",
    "agent count",
    "agent ban",
    "agent evict",
    "agent purge",
    "bundle show",
    "bundle list",
    "bundle set",
    "bundle delete",
    "bundle count",
    "federation create",
    "federation update",
    "federation show",
    "federation list",
    "federation delete",
    "federation refresh",
    "logger get",
    "logger set",
    "logger reset",
    "debug getinfo",
    "x509 mint",
    "jwt mint",
    "wit mint",
    "localauthority x509 show",
    "localauthority x509 prepare",
    "localauthority x509 activate",
    "localauthority x509 taint",
    "localauthority x509 revoke",
    "localauthority jwt show",
    "localauthority jwt prepare",
    "localauthority jwt activate",
    "localauthority jwt taint",
    "localauthority jwt revoke",
    "upstreamauthority taint",
    "upstreamauthority revoke",
    "",
    "nope",
];

pub(crate) fn help(pair: &mut Pair) {
    for command in COMMANDS {
        let words: Vec<&str> = command.split(' ').filter(|w| !w.is_empty()).collect();
        for length in 0..=words.len() {
            let words = &words[..length];
            pair.raw(&[words, &["-h"]].concat());
            pair.raw(&[words, &["--help"]].concat());
            if length < words.len() || words.len() > 1 {
                // a parent without its child, and a command with a flag that it does not have
                pair.raw(words);
                pair.raw(&[words, &["-nope"]].concat());
            }
        }
    }
}

/// What a running server says of itself.
pub(crate) fn itself(pair: &mut Pair) {
    for args in [
        &["healthcheck"][..],
        &["healthcheck", "-verbose"],
        &["healthcheck", "-shallow"],
        &["healthcheck", "-socketPath", "{folder}/none"],
        &["healthcheck", "-verbose", "-socketPath", "{folder}/none"],
        &["logger", "get"],
        &["logger", "get", "-output", "json"],
        &["logger", "set", "-level", "loud"],
        &["logger", "set", "-level", "DEBUG"],
        &["logger", "set", "-level", "warning", "-output", "json"],
        &["logger", "get"],
        &["logger", "reset"],
        &["logger", "reset", "-output", "json"],
    ] {
        pair.reads(args);
    }
    pair.mints(&["debug", "getinfo"]);
    pair.mints(&["debug", "getinfo", "-output", "json"]);
}
