//! The root above is replaced: in the folder of the `disk` upstream authority, and by order about what it signed.

use super::{Domain, How, On, Traffic};
use crate::forced_rotation::{root, serials};
use testkit::Workdir;

/// A domain whose authorities hang from the root in that folder.
pub(super) fn below(folder: &Workdir) -> String {
    let at = folder.path().display();
    format!(
        r#"UpstreamAuthority "disk" {{ plugin_data {{ cert_file_path = "{at}/root.pem" key_file_path = "{at}/root.key" }} }}"#
    )
}

/// With several servers one is told, and the others follow it: the root is known everywhere before anything hangs from it.
fn replaced(on: On, what: &str) {
    let folder = Workdir::new();
    let first = vec![root(folder.path(), "FIRST")];
    let Some(domain) = Domain::start(on, &How { plugins: below(&folder), ..How::default() }) else { return };
    let traffic = Traffic::among(&[&domain]);
    traffic.all_hang(domain.name, "x509", &first, &[]);
    let agents = serials(&domain.servers[0]);
    let second = vec![root(folder.path(), "SECOND")];
    let told = &domain.servers[0];
    told.order("x509", "prepare");
    traffic.all_say("trusted", &second);
    traffic.goes_on();
    told.order("x509", "activate");
    traffic.goes_on();
    told.command(&["upstreamauthority", "taint", "-subjectKeyID", &first[0]]).ok();
    traffic.all_hang(domain.name, "x509", &second, &first);
    domain.agents_moved(&agents);
    traffic.goes_on();
    told.command(&["upstreamauthority", "revoke", "-subjectKeyID", &first[0]]).ok();
    traffic.all_say("left", &first);
    traffic.finish(&[&domain], what, false);
}

#[test]
fn the_root_above_one_server_is_replaced() {
    replaced(On::One, "root above replaced, one server");
}

#[test]
fn the_root_above_three_servers_is_replaced() {
    replaced(On::Three, "root above replaced, three servers");
}
