//! Nobody orders anything: authorities live a minute. All that waits for this waits at the same time.

use super::partner::partners;
use super::upstream::below;
use super::{Domain, How, On, Traffic};
use crate::forced_rotation::root;
use crate::nested::three_levels_live_through_the_end_of_roots;
use std::time::Duration;
use testkit::{Server, Workdir, eventually_within};

/// How often each authority is followed by the next; the first ones have ended by then.
const SUCCESSIONS: usize = 2;
/// The first follows after 50 s, each further one after 30 s more.
const DEADLINE: Duration = Duration::from_secs(300);
/// Who looks all the time takes the processors from those who are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Everything lives as long as its authority lets it.
const MINUTE: &str = r#"ca_ttl = "1m""#;
/// The longest lives that such an authority never cuts short.
const SHORT: &str = r#"ca_ttl = "1m"
    default_x509_svid_ttl = "10s"
    default_jwt_svid_ttl = "10s"
    agent_ttl = "20s""#;

/// The IDs of the authorities that signed at this server, in order.
fn actives(server: &Server, kind: &str) -> Vec<String> {
    let id = |line: &str| {
        let (_, rest) = line.split_once("local_authority_id=")?;
        Some(rest.split(' ').next().unwrap_or_default().trim_matches('"').to_owned())
    };
    let log = server.process.log();
    log.lines().filter(|line| line.contains(&format!("{kind} activated"))).filter_map(id).collect()
}

/// Waits until all authorities had their successors, and the workloads have what the last ones signed. `each` is called
/// with the number of successions so far.
fn outlive(domains: &[&Domain], traffic: &Traffic, mut each: impl FnMut(usize)) {
    let servers = || domains.iter().flat_map(|domain| &domain.servers);
    eventually_within(DEADLINE, "all authorities have had their successors", || {
        std::thread::sleep(LOOK);
        let counts = servers().flat_map(|s| ["X509 CA", "JWT key"].map(|kind| actives(s, kind).len()));
        let least = counts.min().unwrap_or_default();
        each(least.saturating_sub(1));
        if least > SUCCESSIONS { Ok(()) } else { Err(format!("{least}")) }
    });
    for domain in domains {
        for (kind, event) in [("X509 CA", "x509"), ("JWT key", "jwt")] {
            let of = |server: &Server| actives(server, kind);
            let first: Vec<String> = domain.servers.iter().flat_map(|s| of(s)[..SUCCESSIONS].to_vec()).collect();
            let last: Vec<String> = domain.servers.iter().flat_map(|s| of(s)[SUCCESSIONS..].to_vec()).collect();
            traffic.all_hang(domain.name, event, &last, &first);
        }
    }
}

fn alone(on: On, times: &str, what: &str) {
    let Some(domain) = Domain::start(on, &How { server: times.into(), ..How::default() }) else { return };
    let traffic = Traffic::among(&[&domain]);
    outlive(&[&domain], &traffic, |_| ());
    traffic.finish(&[&domain], what, false);
}

/// With every succession another root is in the folder.
fn below_roots() {
    let folder = Workdir::new();
    let name = |n: usize| format!("ROOT {n}");
    let mut roots = vec![root(folder.path(), &name(0))];
    let how = How { server: MINUTE.into(), plugins: below(&folder), ..How::default() };
    let Some(domain) = Domain::start(On::One, &how) else { return };
    let traffic = Traffic::among(&[&domain]);
    roots.push(root(folder.path(), &name(1)));
    outlive(&[&domain], &traffic, |count| {
        if count + 1 == roots.len() {
            roots.push(root(folder.path(), &name(count + 1)));
        }
    });
    traffic.all_say("trusted", &roots[..=SUCCESSIONS]);
    traffic.finish(&[&domain], "by time, another root each time, one server", false);
}

fn with_partner() {
    let Some(domains) = partners([On::One, On::Three], SHORT) else { return };
    let [here, there] = &domains;
    let traffic = Traffic::among(&[here, there]);
    outlive(&[here, there], &traffic, |_| ());
    traffic.finish(&[here, there], "by time, a partner, one and three servers", false);
}

#[test]
fn authorities_that_live_a_minute_come_and_go() {
    std::thread::scope(|scope| {
        scope.spawn(|| alone(On::One, MINUTE, "by time, one server"));
        scope.spawn(|| alone(On::Three, SHORT, "by time, three servers"));
        scope.spawn(below_roots);
        scope.spawn(with_partner);
        scope.spawn(three_levels_live_through_the_end_of_roots);
    });
}
