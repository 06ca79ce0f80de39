//! Two trust domains whose workloads call each other, while the authorities of one of them are replaced.

use super::{Domain, FLOW, How, On, Traffic, replace};
use crate::kill_points::Orders;
use testkit::eventually_within;

/// Two domains, each on that many servers, that fetch each other's bundles.
pub(super) fn partners(on: [On; 2], server: &str) -> Option<[Domain; 2]> {
    let how = |name| How { name, endpoint: true, server: server.into(), agents: Some(2), ..How::default() };
    let mut here = Domain::found(on[0], &how("here.test"))?;
    let mut there = Domain::found(on[1], &how("there.test"))?;
    federate(&here, &there);
    federate(&there, &here);
    here.settle(&["-federatesWith", &there.id()]);
    there.settle(&["-federatesWith", &here.id()]);
    Some([here, there])
}

/// `domain` has another one's bundle from that one's endpoint.
fn federate(domain: &Domain, other: &Domain) {
    agree(other);
    let bundle = other.servers[0].command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
    let server = &domain.servers[0];
    let bundle = server.dir.write("other.json", &bundle).display().to_string();
    let (id, url) = (format!("{}/spire/server", other.id()), format!("https://127.0.0.1:{}", other.endpoints[0]));
    let endpoint = ["-bundleEndpointURL", &url, "-bundleEndpointProfile", "https_spiffe", "-endpointSpiffeID", &id];
    let first = ["-trustDomainBundleFormat", "spiffe", "-trustDomainBundlePath", &bundle];
    let create = ["federation", "create", "-trustDomain", other.name];
    server.command(&[&create[..], &endpoint, &first].concat()).ok();
}

/// Waits until all servers of the domain tell of the same authorities, which are at least one of each.
fn agree(domain: &Domain) {
    let count = domain.servers.len();
    eventually_within(FLOW, "the servers agree", || {
        let mut known: Vec<_> = domain.servers.iter().map(|server| Orders::to(server).published()).collect();
        known.iter_mut().for_each(|names| names.sort());
        let all = known.iter().all(|names| *names == known[0] && names.len() >= 2 * count);
        if all { Ok(()) } else { Err(format!("{known:?}")) }
    });
}

/// The other domain's operators fetch what changed, as they are asked to before a partner goes on.
fn refresh(domain: &Domain, by: &Domain) {
    agree(domain);
    by.servers[0].command(&["federation", "refresh", "-id", &domain.id()]).ok();
}

fn by_order(on: On, what: &str) {
    let Some([here, mut there]) = partners([on; 2], "") else { return };
    let traffic = Traffic::among(&[&here, &there]);
    for kind in ["x509", "jwt"] {
        replace(&mut there, &traffic, kind, |there, _, step| {
            there.order(kind, step);
            refresh(there, &here);
        });
    }
    traffic.finish(&[&here, &there], what, false);
}

#[test]
fn a_partner_on_one_server_replaces_its_authorities_by_order() {
    by_order(On::One, "partner's by order, one server each");
}

#[test]
fn a_partner_on_three_servers_replaces_its_authorities_by_order() {
    by_order(On::Three, "partner's by order, three servers each");
}
