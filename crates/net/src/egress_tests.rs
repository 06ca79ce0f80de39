use super::*;
use proptest::prelude::*;

fn with(no_proxy: &str) -> Proxies {
    Proxies::read(|name| match name {
        "HTTPS_PROXY" => Some("proxy.test:3128".into()),
        "no_proxy" => Some(no_proxy.to_owned()),
        _ => None,
    })
}

fn is_proxied(no_proxy: &str, host: &str, port: u16) -> bool {
    with(no_proxy).of(host, port).unwrap().is_some()
}

#[test]
fn no_proxy_is_read_as_go_reads_it() {
    for (no_proxy, direct, proxied) in [
        (
            "",
            &["localhost", "LocalHost", "x.localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"][..],
            &["a.test", "10.0.0.1"][..],
        ),
        ("*", &["a.test", "10.0.0.1", "fd00::1"], &[]),
        ("x.test, * ,y.test", &["a.test"], &[]),
        ("a.test", &["a.test", "A.TEST", "b.a.test", "c.b.a.test"], &["ba.test", "a.test.b", "test"]),
        (".a.test", &["b.a.test"], &["a.test", "ba.test"]),
        ("*.a.test", &["b.a.test"], &["a.test"]),
        ("*a.test", &[], &["a.test", "ba.test"]),
        ("A.Test", &["a.test"], &[]),
        ("a.test:443", &["a.test", "b.a.test"], &["b.test"]),
        ("a.test:8443", &[], &["a.test"]),
        ("a.test:", &["a.test"], &[]),
        (":443", &[], &["a.test"]),
        (",, ,", &[], &["a.test"]),
        ("10.0.0.1", &["10.0.0.1", "::ffff:10.0.0.1"], &["10.0.0.2", "x.10.0.0.1"]),
        ("10.0.0.1:443", &["10.0.0.1"], &[]),
        ("10.0.0.1:80", &[], &["10.0.0.1"]),
        ("10.1.2.3/8", &["10.200.0.1", "::ffff:10.0.0.1"], &["11.0.0.1", "a.test", "fd00::1"]),
        ("10.0.0.0/33", &[], &["10.0.0.1"]),
        ("fd00::/8", &["fd12::1"], &["fe80::1", "10.0.0.1"]),
        ("fd00::1", &["fd00::1", "fd00:0::1"], &["fd00::2"]),
        ("[fd00::1]:443", &["fd00::1"], &["fd00::2"]),
        ("[fd00::1]:80", &[], &["fd00::1"]),
        ("test", &["a.test", "test"], &["atest"]),
    ] {
        for (hosts, want) in [(direct, false), (proxied, true)] {
            for host in hosts {
                assert_eq!(is_proxied(no_proxy, host, 443), want, "{no_proxy:?} {host}");
            }
        }
    }
}

#[test]
fn the_first_variable_that_says_something_counts() {
    let of = |set: &'static [(&str, &str)]| {
        let proxies = Proxies::read(|name| set.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()));
        let proxy = proxies.of("a.test", 443);
        proxy.map(|proxy| proxy.map(|proxy| format!("{}:{}", proxy.host, proxy.port))).map_err(|e| e.to_string())
    };
    let at = |address: &str| Ok(Some(address.to_owned()));
    assert_eq!(of(&[]), Ok(None));
    assert_eq!(of(&[("HTTP_PROXY", "http://p.test"), ("ALL_PROXY", "http://p.test")]), Ok(None));
    assert_eq!(of(&[("HTTPS_PROXY", ""), ("https_proxy", "http://p.test")]), at("p.test:80"));
    assert_eq!(of(&[("HTTPS_PROXY", "q.test:8"), ("https_proxy", "http://p.test")]), at("q.test:8"));
    assert_eq!(of(&[("HTTPS_PROXY", "HTTP://u:p@[fd00::1]:8/x?y")]), at("fd00::1:8"));
    assert_eq!(of(&[("HTTPS_PROXY", "p.test"), ("NO_PROXY", "a.test"), ("no_proxy", "b.test")]), Ok(None));
    for (bad, want) in [
        ("https://u:hush@p.test", "proxies that are reached by https are not supported: name one by http://"),
        ("socks5://u:hush@p.test", "proxies that are reached by socks5 are not supported: name one by http://"),
        ("hush://p.test", "it is not the URL of a proxy"),
        ("http://u:hush@", "it is not the URL of a proxy"),
        ("http://u:hush@p.test:x", "it is not the URL of a proxy"),
    ] {
        let error = Proxies::always(bad, "X").of("a.test", 443).err().unwrap().to_string();
        assert_eq!(error, format!("X: {want}"));
    }
}

#[test]
fn a_proxy_for_everybody_knows_no_exception() {
    let proxies = Proxies::always("http://p.test", "proxy-url");
    for host in ["localhost", "127.0.0.1", "a.test"] {
        assert!(proxies.of(host, 443).unwrap().is_some(), "{host}");
    }
}

#[test]
fn credentials_are_decoded_and_the_last_at_sign_ends_them() {
    for (url, want) in [
        ("http://p.test", None),
        ("http://me:hush@p.test", Some("me:hush")),
        ("me@p.test", Some("me:")),
        ("http://me:h%40%3Ash:@p.test", Some("me:h@:sh:")),
        ("http://me:a@b@p.test", Some("me:a@b")),
    ] {
        let proxy = Proxy::parse(url).unwrap();
        let want = want.map(|text| STANDARD.encode(text));
        assert_eq!(proxy.credentials.map(|c| c.expose().clone()), want, "{url}");
        assert_eq!((proxy.host.as_str(), proxy.port), ("p.test", 80));
    }
}

proptest! {
    /// A domain excludes itself and what is below it, whatever else is in the list and however it is written.
    #[test]
    fn a_listed_domain_is_never_proxied(
        before in "[a-z0-9.:/\\[\\] -]{0,12}", name in "[a-z]{1,8}\\.[a-z]{2,4}", below in "([a-z]{1,5}\\.){0,2}",
        after in "[^*]{0,12}", port: u16,
    ) {
        let list = format!("{before},  {} ,{after}", name.to_uppercase());
        let (host, at_port) = (format!("{below}{name}"), format!(" {name}:{port}"));
        prop_assert!(!is_proxied(&list, &host, port));
        prop_assert!(is_proxied(&at_port, &host, port.wrapping_add(1)));
    }

    /// A network excludes its addresses and no others.
    #[test]
    fn a_listed_network_is_never_proxied(bits in 0u32..=32, network: u32, other: u32) {
        let ip = |bits: u32| std::net::Ipv4Addr::from_bits(bits);
        let mask = u32::MAX.checked_shl(32 - bits).unwrap_or_default();
        let list = format!("{}/{bits}", ip(network));
        let inside = ip((network & mask) | (other & !mask));
        prop_assert!(!is_proxied(&list, &inside.to_string(), 443));
        let (outside, is_within) = (ip(other), other & mask == network & mask);
        prop_assert_eq!(is_proxied(&list, &outside.to_string(), 443), !is_within && !outside.is_loopback());
    }

    /// Whatever an operator writes, it is read.
    #[test]
    fn nothing_in_it_is_fatal(list: String, url: String, host in "[a-z0-9.:-]{0,20}") {
        let _ = is_proxied(&list, &host, 443);
        let _ = Proxy::parse(&url);
    }
}
