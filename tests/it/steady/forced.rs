//! Authorities replaced by order, one kind after the other.

use super::wits::Wits;
use super::{Domain, How, On, Traffic, replace};
use crate::kill_points::WIT;
use testkit::AgentOptions;

fn by_order(on: On, what: &str) {
    let agent = AgentOptions { experimental: "feature_flags = [\"wit-svid\"]".into(), ..AgentOptions::default() };
    let how = How { server: WIT.into(), agent, ..How::default() };
    let Some(mut domain) = Domain::start(on, &how) else { return };
    let traffic = Traffic::among(&[&domain]);
    let wits = Wits::of(&domain);
    for kind in ["x509", "jwt"] {
        replace(&mut domain, &traffic, kind, |domain, _, step| domain.order(kind, step));
    }
    wits.replace(&domain, &traffic);
    wits.finish(what);
    traffic.finish(&[&domain], what, false);
}

#[test]
fn every_kind_of_authority_of_one_server_is_replaced_by_order() {
    by_order(On::One, "by order, one server");
}

#[test]
fn every_kind_of_authority_of_three_servers_is_replaced_by_order() {
    by_order(On::Three, "by order, three servers");
}
