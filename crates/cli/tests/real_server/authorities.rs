//! `localauthority …` and `upstreamauthority …`: a rotation by hand, step by step, with every step that is refused.

use crate::harness::{Pair, Server};
use finial_core::{KeyType, TrustDomain};
use finial_crypto::{CaTemplate, DistinguishedName, PrivateKey, SerialNumber, X509Ca, pem};
use std::path::Path;
use std::sync::Arc;

const JSON: [&str; 2] = ["-output", "json"];

/// Asks both servers, each about its own authority of this standing (`active`, `prepared`, `old`).
fn about(pair: &mut Pair, command: &[&str], flag: &str, field: &str, standing: &str, more: &[&str]) {
    let ids = [&pair.first, &pair.second].map(|server| state(server, command[1], standing, field));
    let [first, second] = ids.each_ref().map(|id| [command, &[flag, id], more].concat());
    pair.changes_each(&first, &second, "");
}

/// By SPIRE's command, of either server.
fn state(server: &Server, kind: &str, standing: &str, field: &str) -> String {
    let kind = if kind == "jwt" { "jwt" } else { "x509" };
    let shown = server.theirs(&["localauthority", kind, "show", "-output", "json"], "");
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap_or_else(|e| panic!("{shown:?}: {e}"));
    shown[standing][field].as_str().unwrap_or_default().to_owned()
}

pub(crate) fn local(pair: &mut Pair) {
    for kind in ["x509", "jwt"] {
        usage(pair, kind);
        rotation(pair, kind);
    }
    for step in ["taint", "revoke"] {
        for args in [&["-help"][..], &["-nope"], &["-output", "xml"], &[], &["-subjectKeyID", "ABCD"], &JSON] {
            pair.changes(&[&["upstreamauthority", step], args].concat(), "");
        }
    }
}

fn usage(pair: &mut Pair, kind: &str) {
    for step in ["show", "prepare", "activate", "taint", "revoke"] {
        for args in
            [&["-help"][..], &["-nope"], &["-output", "xml"], &["-socketPath", "{folder}/none", "-authorityID", "a"]]
        {
            pair.reads(&[&["localauthority", kind, step], args].concat());
        }
    }
}

/// All refusals for the ID of this standing.
fn refused(pair: &mut Pair, kind: &str, standing: &str, steps: &[&str]) {
    for step in steps {
        about(pair, &["localauthority", kind, step], "-authorityID", "authority_id", standing, &[]);
    }
}

fn rotation(pair: &mut Pair, kind: &str) {
    let call = |step: &'static str| ["localauthority", kind, step];
    pair.changes(&call("show"), "");
    for step in ["activate", "taint", "revoke"] {
        pair.changes(&call(step), "");
        pair.changes(&[&call(step)[..], &JSON].concat(), "");
        pair.changes(&[&call(step)[..], &["-authorityID", "unknown"]].concat(), "");
        pair.changes(&[&call(step)[..], &["-authorityID", "unknown"], &JSON].concat(), "");
    }
    refused(pair, kind, "active", &["activate", "taint", "revoke"]);
    pair.changes(&call("prepare"), "");
    pair.changes(&[&call("prepare")[..], &JSON].concat(), "");
    pair.changes(&call("show"), "");
    pair.changes(&[&call("show")[..], &JSON].concat(), "");
    refused(pair, kind, "prepared", &["taint", "revoke", "activate"]);
    pair.changes(&call("show"), "");
    pair.changes(&[&call("show")[..], &JSON].concat(), "");
    // Not tainted yet, tainted, tainted twice, revoked, revoked twice.
    refused(pair, kind, "old", &["activate", "revoke", "taint", "taint", "revoke", "revoke", "taint"]);
    pair.changes(&call("show"), "");
    // Once more, in JSON.
    pair.changes(&call("prepare"), "");
    for (standing, step) in [("prepared", "activate"), ("old", "taint"), ("old", "revoke")] {
        about(pair, &call(step), "-authorityID", "authority_id", standing, &JSON);
    }
    pair.changes(&[&call("show")[..], &JSON].concat(), "");
}

/// Writes a root and its key where the `disk` plugin reads them at each signature.
fn root(folder: &Path, name: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let template = CaTemplate {
        subject: &DistinguishedName::of(&["US"], &[name], ""),
        trust_domain: &TrustDomain::parse("upstream.test").unwrap(),
        not_before: 1_700_000_000,
        not_after: 2_500_000_000,
        serial: SerialNumber::random(),
    };
    let ca = runtime.block_on(X509Ca::self_sign(Arc::new(key.clone()), &template)).unwrap();
    std::fs::write(folder.join("root.pem"), pem::encode("CERTIFICATE", ca.certificate())).unwrap();
    std::fs::write(folder.join("root.key"), pem::encode_private_key(key.pkcs8_der().expose()).expose()).unwrap();
}

pub(crate) fn upstream(bin: &Path, folder: &Path, servers: bool) {
    root(folder, "FIRST");
    let at = folder.display();
    let plugin = format!(
        r#"UpstreamAuthority "disk" {{ plugin_data {{ cert_file_path = "{at}/root.pem" key_file_path = "{at}/root.key" }} }}"#
    );
    let mut pair = Pair::start_with(bin, folder, servers, &plugin);
    let pair_ = &mut pair;
    pair_.changes(&["localauthority", "x509", "show"], "");
    let key = |pair: &mut Pair, step: &str, standing: &str, more: &[&str]| {
        let command = ["upstreamauthority", step];
        about(pair, &command, "-subjectKeyID", "upstream_authority_subject_key_id", standing, more);
    };
    for step in ["taint", "revoke"] {
        key(pair_, step, "active", &[]);
        pair_.changes(&["upstreamauthority", step, "-subjectKeyID", "00AA"], "");
    }
    root(folder, "SECOND");
    pair_.changes(&["localauthority", "x509", "prepare"], "");
    for step in ["taint", "revoke"] {
        key(pair_, step, "prepared", &[]);
    }
    refused(pair_, "x509", "prepared", &["activate"]);
    refused(pair_, "x509", "old", &["taint", "revoke"]);
    key(pair_, "revoke", "old", &[]);
    key(pair_, "taint", "old", &[]);
    key(pair_, "taint", "old", &JSON);
    key(pair_, "revoke", "old", &JSON);
    key(pair_, "revoke", "old", &[]);
    pair_.changes(&["localauthority", "x509", "show"], "");
    pair.finish();
}
