//! The PROXY protocol, versions 1 and 2: how a load balancer tells whose connection it passes on
//! (<https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>).
//!
//! Only proxies that the operator names are believed; from others a header is garbage where TLS should begin, and ends the
//! connection. A trusted proxy may leave the header out, as its own health checks do.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// The first bytes of a version 2 header.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, command, family, and the length of the rest.
const V2_FIXED_BYTES: usize = 16;
/// Longest rest of a version 2 header, in bytes: addresses, and the extensions that cloud load balancers add.
const V2_REST_BYTES_MAX: usize = 4096;
/// Longest version 1 header with its line end, in bytes.
const V1_BYTES_MAX: usize = 107;
/// The shortest: `PROXY UNKNOWN\r\n`.
const V1_BYTES_MIN: usize = 15;
/// What a TLS connection begins with.
const TLS_HANDSHAKE: u8 = 22;

/// Text that is no network such as `10.0.0.0/8`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid CIDR address: {0}")]
pub struct InvalidNetwork(pub String);

/// A header that breaks the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed PROXY protocol header: {0}")]
pub struct MalformedHeader(&'static str);

/// The addresses that begin with these bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Network(IpAddr, u32);

impl Network {
    pub(crate) fn parse(text: &str) -> Result<Self, InvalidNetwork> {
        let network = text.split_once('/').and_then(|(address, bits)| {
            let (address, bits) = (address.parse::<IpAddr>().ok()?, bits.parse::<u32>().ok()?);
            (bits <= if address.is_ipv4() { 32 } else { 128 }).then_some(Self(address, bits))
        });
        network.ok_or_else(|| InvalidNetwork(text.into()))
    }

    /// An IPv4 address that came over an IPv6 socket is the IPv4 address.
    pub(crate) fn includes(&self, address: IpAddr) -> bool {
        let Self(network, bits) = self;
        match (network, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                (network.to_bits() ^ address.to_bits()).checked_shr(32 - bits).unwrap_or_default() == 0
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                (network.to_bits() ^ address.to_bits()).checked_shr(128 - bits).unwrap_or_default() == 0
            }
            _ => false,
        }
    }
}

/// The networks whose PROXY headers are believed. None by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustedProxies(Vec<Network>);

impl TrustedProxies {
    /// Parses networks such as `10.0.0.0/8` and `2001:db8::/32`.
    ///
    /// # Errors
    /// The first that is none.
    pub fn parse<T: AsRef<str>>(networks: &[T]) -> Result<Self, InvalidNetwork> {
        networks.iter().map(|text| Network::parse(text.as_ref())).collect::<Result<_, _>>().map(Self)
    }

    /// Whether headers from this address are believed.
    pub fn includes(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.includes(address))
    }
}

/// What a header says: whose connection this is, or that it is the proxy's own.
type Source = Option<SocketAddr>;

/// Reads the header from the beginning of a trusted proxy's connection, if there is one, and not a byte more.
pub(crate) async fn read_header(stream: &mut TcpStream) -> io::Result<Source> {
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 || first == [TLS_HANDSHAKE] {
        return Ok(None);
    }
    let mut header = vec![0; V1_BYTES_MIN];
    stream.read_exact(&mut header).await?;
    if header.starts_with(&SIGNATURE) {
        header.push(stream.read_u8().await?);
        let rest = v2_rest(&header).map_err(malformed)?;
        header.resize(V2_FIXED_BYTES + rest, 0);
        stream.read_exact(header.get_mut(V2_FIXED_BYTES..).unwrap_or_default()).await?;
        return parse_v2(&header).map_err(malformed);
    }
    // Byte by byte, as nothing says how long it is and what follows belongs to TLS.
    while !header.ends_with(b"\n") {
        if header.len() >= V1_BYTES_MAX || !header.starts_with(b"PROXY ") {
            return Err(malformed(MalformedHeader("neither version 1 nor 2")));
        }
        header.push(stream.read_u8().await?);
    }
    parse_v1(&header).map_err(malformed)
}

fn malformed(error: MalformedHeader) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Parses a whole header of either version, with nothing after it. `None`: the connection is the proxy's own, or it does not
/// know whose.
///
/// # Errors
/// When it breaks the protocol.
pub fn parse_header(header: &[u8]) -> Result<Option<SocketAddr>, MalformedHeader> {
    if header.starts_with(&SIGNATURE) { parse_v2(header) } else { parse_v1(header) }
}

fn parse_v1(header: &[u8]) -> Result<Source, MalformedHeader> {
    if header.len() > V1_BYTES_MAX {
        return Err(MalformedHeader("version 1 is at most 107 bytes long"));
    }
    let line = header.strip_suffix(b"\r\n").ok_or(MalformedHeader("version 1 does not end its line"))?;
    let line = std::str::from_utf8(line).map_err(|_| MalformedHeader("version 1 is not text"))?;
    let mut words = line.split(' ');
    if words.next() != Some("PROXY") {
        return Err(MalformedHeader("neither version 1 nor 2"));
    }
    let v4 = match words.next() {
        Some("TCP4") => true,
        Some("TCP6") => false,
        Some("UNKNOWN") => return Ok(None),
        _ => return Err(MalformedHeader("version 1 names no protocol")),
    };
    let address = |word: Option<&str>| {
        let address = word.and_then(|word| word.parse::<IpAddr>().ok());
        address.filter(|a| a.is_ipv4() == v4).ok_or(MalformedHeader("version 1 has an odd address"))
    };
    let (source, _destination) = (address(words.next())?, address(words.next())?);
    let (port, _destination) = (v1_port(words.next())?, v1_port(words.next())?);
    match words.next() {
        None => Ok(Some(SocketAddr::new(source, port))),
        Some(_) => Err(MalformedHeader("version 1 has too many words")),
    }
}

fn v1_port(word: Option<&str>) -> Result<u16, MalformedHeader> {
    let plain = |word: &&str| word.bytes().all(|b| b.is_ascii_digit()) && (*word == "0" || !word.starts_with('0'));
    word.filter(plain).and_then(|word| word.parse().ok()).ok_or(MalformedHeader("version 1 has an odd port"))
}

/// How many bytes follow the fixed part.
fn v2_rest(fixed: &[u8]) -> Result<usize, MalformedHeader> {
    let Some([high, low]) = fixed.get(14..V2_FIXED_BYTES) else { return Err(MalformedHeader("version 2 is cut off")) };
    let rest = usize::from(u16::from_be_bytes([*high, *low]));
    if rest > V2_REST_BYTES_MAX { Err(MalformedHeader("version 2 is too long")) } else { Ok(rest) }
}

fn parse_v2(header: &[u8]) -> Result<Source, MalformedHeader> {
    let cut = MalformedHeader("version 2 is cut off");
    let (Some(&command), Some(&family)) = (header.get(12), header.get(13)) else { return Err(cut) };
    let rest = header.get(V2_FIXED_BYTES..).filter(|rest| Ok(rest.len()) == v2_rest(header)).ok_or(cut)?;
    let own = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err(MalformedHeader("version 2 has an unknown command")),
    };
    match family {
        0x00 if own => Ok(None),
        0x11 | 0x12 | 0x21 | 0x22 | 0x31 | 0x32 if own => Ok(None),
        0x11 | 0x12 => {
            let [a, b, c, d, _, _, _, _, high, low, _, _] = *rest.first_chunk::<12>().ok_or(cut)?;
            Ok(Some(SocketAddr::new(Ipv4Addr::new(a, b, c, d).into(), u16::from_be_bytes([high, low]))))
        }
        0x21 | 0x22 => {
            let bytes = rest.first_chunk::<36>().ok_or(cut)?;
            let (source, [high, low]) = (bytes.first_chunk::<16>().ok_or(cut)?, [bytes[32], bytes[33]]);
            Ok(Some(SocketAddr::new(Ipv6Addr::from(*source).into(), u16::from_be_bytes([high, low]))))
        }
        // A unix socket at the other side of the proxy has no address that means something here.
        0x31 | 0x32 => {
            if rest.len() >= 216 {
                Ok(None)
            } else {
                Err(cut)
            }
        }
        _ => Err(MalformedHeader("version 2 has an unknown address family")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trusted(networks: &[&str]) -> TrustedProxies {
        TrustedProxies::parse(networks).unwrap()
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn networks_include_what_is_in_them() {
        let some = trusted(&["10.0.0.0/8", "192.168.1.7/32", "2001:db8::/33", "::1/128"]);
        for inside in ["10.0.0.0", "10.255.255.255", "192.168.1.7", "::ffff:10.1.2.3", "2001:db8:7fff::1", "::1"] {
            assert!(some.includes(address(inside)), "{inside}");
        }
        for outside in ["11.0.0.0", "9.255.255.255", "192.168.1.6", "2001:db8:8000::1", "::2", "::ffff:11.0.0.1"] {
            assert!(!some.includes(address(outside)), "{outside}");
        }
        assert!(trusted(&["0.0.0.0/0"]).includes(address("1.2.3.4")));
        assert!(!trusted(&["0.0.0.0/0"]).includes(address("::1")));
        assert!(trusted(&["::/0"]).includes(address("2001::1")));
        assert!(!TrustedProxies::default().includes(address("127.0.0.1")));
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "::/129", "10.0.0/8", "10.0.0.0/-1", "host/8"] {
            assert_eq!(TrustedProxies::parse(&[bad]), Err(InvalidNetwork(bad.into())));
        }
    }

    #[test]
    fn version_1_says_who() {
        let of = |text: &str| parse_header(text.as_bytes());
        assert_eq!(of("PROXY TCP4 10.0.0.1 10.0.0.2 1000 8081\r\n"), Ok(Some("10.0.0.1:1000".parse().unwrap())));
        assert_eq!(of("PROXY TCP6 2001:db8::1 ::1 0 65535\r\n"), Ok(Some("[2001:db8::1]:0".parse().unwrap())));
        assert_eq!(of("PROXY UNKNOWN\r\n"), Ok(None));
        assert_eq!(of("PROXY UNKNOWN whatever there is\r\n"), Ok(None));
        for bad in [
            "PROXY TCP4 10.0.0.1 10.0.0.2 1000 8081\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 1000\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 1000 8081 \r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 01000 8081\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 +1 8081\r\n",
            "PROXY TCP4 10.0.0.1 10.0.0.2 65536 8081\r\n",
            "PROXY TCP4 ::1 ::1 1000 8081\r\n",
            "PROXY TCP6 10.0.0.1 10.0.0.2 1000 8081\r\n",
            "PROXY TCP6 fe80::1%eth0 ::1 1000 8081\r\n",
            "PROXY TCP5 10.0.0.1 10.0.0.2 1000 8081\r\n",
            "PROXYTCP4 10.0.0.1 10.0.0.2 1000 8081\r\n",
            "PROXY  TCP4 10.0.0.1 10.0.0.2 1000 8081\r\n",
            "PROXY\r\n",
            "",
        ] {
            assert!(of(bad).is_err(), "{bad:?}");
        }
    }

    fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, rest].concat()
    }

    #[test]
    fn version_2_says_who() {
        let four = [&[10, 0, 0, 1, 10, 0, 0, 2][..], &1000u16.to_be_bytes(), &8081u16.to_be_bytes()].concat();
        let who = Ok(Some("10.0.0.1:1000".parse().unwrap()));
        assert_eq!(parse_header(&v2(0x21, 0x11, &four)), who);
        let extended = [&four[..], &[0x04, 0, 1, 0xff]].concat();
        assert_eq!(parse_header(&v2(0x21, 0x11, &extended)), who, "extensions are passed over");
        let source: Ipv6Addr = "2001:db8::1".parse().unwrap();
        let six = [&source.octets()[..], &[0; 16], &1000u16.to_be_bytes(), &8081u16.to_be_bytes()].concat();
        assert_eq!(parse_header(&v2(0x21, 0x21, &six)), Ok(Some("[2001:db8::1]:1000".parse().unwrap())));
        assert_eq!(parse_header(&v2(0x20, 0x00, b"")), Ok(None), "the proxy's own");
        assert_eq!(parse_header(&v2(0x20, 0x11, &four)), Ok(None));
        assert_eq!(parse_header(&v2(0x21, 0x31, &[0; 216])), Ok(None));
        for bad in [
            v2(0x21, 0x00, b""),
            v2(0x21, 0x11, &four[..11]),
            v2(0x21, 0x21, &four),
            v2(0x21, 0x13, &four),
            v2(0x20, 0x13, &four),
            v2(0x22, 0x11, &four),
            v2(0x11, 0x11, &four),
            v2(0x21, 0x31, &[0; 215]),
            v2(0x21, 0x11, &[0; V2_REST_BYTES_MAX + 1]),
            v2(0x21, 0x11, &four)[..20].to_vec(),
            [v2(0x21, 0x11, &four), vec![0]].concat(),
        ] {
            assert!(parse_header(&bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        /// Any bytes are answered, and what is understood is what was said.
        #[test]
        fn no_header_breaks_the_parser(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0..3) {
            let header = match kind {
                0 => bytes,
                1 => [b"PROXY TCP4 ", &bytes[..], b"\r\n"].concat(),
                _ => [&SIGNATURE[..], &bytes].concat(),
            };
            let _ = parse_header(&header);
        }

        #[test]
        fn addresses_survive_both_versions(source: [u8; 4], long: [u8; 16], port: u16, extension in proptest::collection::vec(any::<u8>(), 0..64)) {
            let four = SocketAddr::from((source, port));
            let line = format!("PROXY TCP4 {} 127.0.0.1 {port} 1\r\n", four.ip());
            prop_assert_eq!(parse_header(line.as_bytes()), Ok(Some(four)));
            let six = SocketAddr::from((long, port));
            let line = format!("PROXY TCP6 {} ::1 {port} 1\r\n", six.ip());
            prop_assert_eq!(parse_header(line.as_bytes()), Ok(Some(six)));
            let rest = [&source[..], &[0; 4], &port.to_be_bytes(), &[0; 2], &extension].concat();
            prop_assert_eq!(parse_header(&v2(0x21, 0x11, &rest)), Ok(Some(four)));
            let rest = [&long[..], &[0; 16], &port.to_be_bytes(), &[0; 2], &extension].concat();
            prop_assert_eq!(parse_header(&v2(0x21, 0x21, &rest)), Ok(Some(six)));
        }
    }
}
