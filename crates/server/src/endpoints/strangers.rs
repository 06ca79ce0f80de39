//! What callers over TCP may cost, above all those without a certificate: anybody who reaches the port can be one.
//!
//! tonic reads a whole message before a handler, and with it the [`Gate`], sees the call. So strangers are told here, before
//! anything is read, that a method is not for them, and the messages of the two methods that are for anyone are limited.
//!
//! What one address can make the server hold this way, on however many connections and calls:
//! - messages: [`BYTES_PER_ADDRESS`], 32 MiB, counted from the length that a message announces (tonic reserves that much) until
//!   the call ends; 512 MiB ([`BYTES_MAX`]) by all strangers;
//! - what has come and is not yet read (calls that wait for their rate limit): [`super::WINDOW_BYTES`] per connection, 256 KiB, on
//!   at most [`CONNECTIONS_PER_ADDRESS`], 1,024, connections.
//!
//! One connection can thus hold 32 MiB + 256 KiB. Honest calls need some KiB, so thousands of nodes behind one gateway fit.
//!
//! Members are held to the same by their IDs, but only for the newest message of each call, as their streams are long: an
//! agent's node that was taken over must not take the server with it. 1 GiB ([`MEMBERS_BYTES_MAX`]) by all.

use crate::api::PAYLOAD_BYTES_MAX;
use crate::authz::{Connection, Gate, Identity, Method, MethodRow, Peer, TABLE, method};
use bytes::{Buf, Bytes};
use finial_core::SpiffeId;
use futures::future::Either;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use std::collections::HashMap;
use std::future::{Ready, ready};
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use tonic::Status;
use tonic::codegen::StdError;
use tower::{Layer, Service};

/// Largest message of a stranger, in bytes: the empty masks of `GetBundle` fit many times over.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Largest message of `AttestAgent`, in bytes: the largest evidence, and a CSR and names.
const ATTEST_BYTES_MAX: usize = PAYLOAD_BYTES_MAX + 128 * 1024;
/// Bytes of messages of open calls by one address, and by all.
const BYTES_PER_ADDRESS: usize = 32 * 1024 * 1024;
const BYTES_MAX: usize = 16 * BYTES_PER_ADDRESS;
/// The same by one member, and by all.
const BYTES_PER_MEMBER: usize = 32 * 1024 * 1024;
const MEMBERS_BYTES_MAX: usize = 32 * BYTES_PER_MEMBER;
/// Largest message of a member, in bytes: tonic's own limit, and grpc-go's.
const MEMBER_MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Connections by one address, and by all: three quarters of all that a listener takes, the rest is for members.
const CONNECTIONS_PER_ADDRESS: usize = 1024;
const CONNECTIONS_MAX: usize = 12_288;

/// Counts what strangers hold, and turns them away; a layer around the services.
#[derive(Clone)]
pub(super) struct Strangers {
    gate: Arc<Gate>,
    connections: Arc<Ledger>,
    bytes: Arc<Ledger>,
    members: Arc<Ledger>,
}

impl Strangers {
    pub(super) fn new(gate: Arc<Gate>) -> Self {
        let connections = Ledger::new(CONNECTIONS_PER_ADDRESS, CONNECTIONS_MAX);
        let bytes = Ledger::new(BYTES_PER_ADDRESS, BYTES_MAX);
        Self { gate, connections, bytes, members: Ledger::new(BYTES_PER_MEMBER, MEMBERS_BYTES_MAX) }
    }

    /// A place for a new connection, which a member does not need; `Err` if strangers have enough of them.
    pub(super) fn seat(&self, peer: &Peer) -> Result<Option<Share>, Full> {
        let Some(address) = stranger(peer) else { return Ok(None) };
        let mut share = Share::of(&self.connections, Key::Address(address));
        share.grow(1).map(|()| Some(share))
    }

    /// Answers without reading the call's messages, or says how they are limited.
    fn meter(&self, path: &str, peer: Option<&Connection>) -> Result<Option<Meter>, Status> {
        let Some(peer) = peer else { return Ok(None) };
        let Some(address) = stranger(peer) else {
            let share = peer.id().map(|id| Share::of(&self.members, Key::Member(id.clone())));
            return Ok(share.map(|share| Meter::new(MEMBER_MESSAGE_BYTES_MAX, share, false)));
        };
        let row: Option<&'static MethodRow> = TABLE.iter().copied().find(|row| row.path == path);
        if let Some(refusal) = row.and_then(|row| self.gate.refuse_unread(row, peer)) {
            return Err(refusal);
        }
        let attests = path == method::AttestAgent::ROW.path;
        let message_max = if attests { ATTEST_BYTES_MAX } else { MESSAGE_BYTES_MAX };
        Ok(Some(Meter::new(message_max, Share::of(&self.bytes, Key::Address(address)), true)))
    }
}

/// The address of a caller that showed no SVID. For IPv6 the network, as one host has all of a /64.
fn stranger(peer: &Peer) -> Option<IpAddr> {
    match peer {
        Peer::Remote { identity: Identity::Svid { .. }, .. } | Peer::Local(_) => None,
        Peer::Remote { address, .. } => Some(match address.ip().to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
            ip => ip,
        }),
    }
}

/// A limit is reached.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

/// Who holds something.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Address(IpAddr),
    Member(SpiffeId),
}

/// Who holds how much.
struct Ledger {
    each: usize,
    all: usize,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    all: usize,
    by_key: HashMap<Key, usize>,
}

impl Ledger {
    fn new(each: usize, all: usize) -> Arc<Self> {
        Arc::new(Self { each, all, held: Mutex::default() })
    }
}

/// What one connection or call holds; given back on drop.
pub(super) struct Share {
    ledger: Arc<Ledger>,
    key: Key,
    amount: usize,
}

impl Share {
    fn of(ledger: &Arc<Ledger>, key: Key) -> Self {
        Self { ledger: ledger.clone(), key, amount: 0 }
    }

    fn grow(&mut self, by: usize) -> Result<(), Full> {
        let mut held = self.ledger.held.lock().unwrap_or_else(PoisonError::into_inner);
        let of_key = held.by_key.get(&self.key).copied().unwrap_or_default();
        if by > self.ledger.each.saturating_sub(of_key) || by > self.ledger.all.saturating_sub(held.all) {
            return Err(Full);
        }
        held.all += by;
        held.by_key.insert(self.key.clone(), of_key + by);
        self.amount += by;
        Ok(())
    }

    fn give_back(&mut self) {
        let amount = std::mem::take(&mut self.amount);
        if amount == 0 {
            return;
        }
        let mut held = self.ledger.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.all -= amount;
        if let Some(of_key) = held.by_key.get_mut(&self.key) {
            *of_key -= amount;
            if *of_key == 0 {
                held.by_key.remove(&self.key);
            }
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// A flag and the length of the message, before each message of gRPC.
const HEADER_BYTES: usize = 5;

/// Follows the messages of one call.
struct Meter {
    message_max: usize,
    share: Share,
    /// Whether all messages of the call count until it ends, or only the newest.
    keeps: bool,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    /// Bytes of the current message that are still to come.
    missing: usize,
}

impl Meter {
    fn new(message_max: usize, share: Share, keeps: bool) -> Self {
        Self { message_max, share, keeps, header: [0; HEADER_BYTES], header_filled: 0, missing: 0 }
    }

    fn note(&mut self, mut bytes: &[u8]) -> Result<(), Status> {
        while !bytes.is_empty() {
            let of_message = bytes.len().min(self.missing);
            self.missing -= of_message;
            bytes.advance(of_message);
            for slot in self.header.iter_mut().skip(self.header_filled) {
                let Some((first, rest)) = bytes.split_first() else { break };
                (*slot, bytes) = (*first, rest);
                self.header_filled += 1;
            }
            if self.header_filled == HEADER_BYTES {
                self.header_filled = 0;
                let [_, a, b, c, d] = self.header;
                self.begin(usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX))?;
            }
        }
        Ok(())
    }

    fn begin(&mut self, length: usize) -> Result<(), Status> {
        let max = self.message_max;
        if length > max {
            // tonic's words for its own limit.
            let message =
                format!("Error, decoded message length too large: found {length} bytes, the limit is: {max} bytes");
            return Err(Status::resource_exhausted(message));
        }
        self.missing = length;
        if !self.keeps {
            self.share.give_back();
        }
        let whose = if self.keeps { " without a client certificate" } else { " of one client or of all" };
        let full = |_| Status::resource_exhausted(format!("too many bytes in open calls{whose}"));
        self.share.grow(length.saturating_add(HEADER_BYTES)).map_err(full)
    }
}

/// A request's body that is metered if it is a stranger's.
pub(super) struct Metered<B> {
    body: B,
    meter: Option<Meter>,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Metered<B>
where
    B::Error: Into<StdError>,
{
    type Data = Bytes;
    type Error = StdError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = &mut *self;
        Pin::new(&mut this.body).poll_frame(cx).map_err(Into::into).map(|frame| {
            let frame = frame?;
            if let (Some(meter), Some(bytes)) = (&mut this.meter, frame.as_ref().ok().and_then(Frame::data_ref)) {
                meter.note(bytes).map_or_else(|status| Some(Err(status.into())), |()| Some(frame))
            } else {
                Some(frame)
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A service behind [`Strangers`].
#[derive(Clone)]
pub(super) struct Guarded<S> {
    strangers: Strangers,
    inner: S,
}

impl<S> Layer<S> for Strangers {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { strangers: self.clone(), inner }
    }
}

impl<S, B, R> Service<Request<B>> for Guarded<S>
where
    S: Service<Request<Metered<B>>, Response = Response<R>>,
    R: Default,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Either<Ready<Result<Response<R>, S::Error>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        match self.strangers.meter(request.uri().path(), request.extensions().get()) {
            Ok(meter) => Either::Right(self.inner.call(request.map(|body| Metered { body, meter }))),
            Err(refusal) => Either::Left(ready(Ok(refusal.into_http()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn shares_are_counted_by_address_and_in_all_and_given_back() {
        let ledger = Ledger::new(10, 15);
        let mut one = Share::of(&ledger, key("10.0.0.1"));
        let mut again = Share::of(&ledger, key("10.0.0.1"));
        let mut other = Share::of(&ledger, key("10.0.0.2"));
        assert_eq!(one.grow(8), Ok(()));
        assert_eq!(again.grow(3), Err(Full), "of one address");
        assert_eq!(again.grow(2), Ok(()));
        assert_eq!(other.grow(6), Err(Full), "of all");
        assert_eq!(other.grow(usize::MAX), Err(Full));
        assert_eq!(other.grow(5), Ok(()));
        drop(one);
        assert_eq!(again.grow(8), Ok(()));
        drop((again, other));
        let held = ledger.held.lock().unwrap();
        assert!(held.all == 0 && held.by_key.is_empty(), "no leftovers");
    }

    fn key(text: &str) -> Key {
        Key::Address(address(text))
    }

    /// Streams of agents last for hours: only what a call holds now counts, and all calls of one agent together.
    #[test]
    fn a_members_stream_is_charged_for_its_newest_message() {
        let ledger = Ledger::new(1000, 10_000);
        let member = |name: &str| Key::Member(SpiffeId::parse(&format!("spiffe://example.org/{name}")).unwrap());
        let meter = |name: &str| Meter::new(900, Share::of(&ledger, member(name)), false);
        let message = [&[0, 0, 0, 1, 144][..], &[7; 400]].concat();
        let (mut one, mut two, mut three) = (meter("a"), meter("a"), meter("a"));
        for _ in 0..100 {
            one.note(&message).unwrap();
        }
        assert_eq!(one.share.amount, 405);
        two.note(&message).unwrap();
        assert_eq!(three.note(&message).unwrap_err().code(), tonic::Code::ResourceExhausted);
        meter("b").note(&message).unwrap();
        drop(one);
        three.note(&message[405..]).unwrap();
    }

    #[test]
    fn a_network_of_ipv6_is_one_stranger() {
        let of = |text: &str| {
            let address = std::net::SocketAddr::new(address(text), 1);
            stranger(&Peer::Remote { address, identity: Identity::None }).unwrap()
        };
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }

    /// However a body is cut into frames, the same messages are seen and charged when announced.
    #[test]
    fn messages_are_found_however_they_are_cut() {
        let message = |length: u32| {
            let mut bytes = vec![0];
            bytes.extend(length.to_be_bytes());
            bytes.extend(vec![7; length as usize]);
            bytes
        };
        let ends_well: Vec<u8> = [0, 3, 300, 0].into_iter().flat_map(message).collect();
        let too_large: Vec<u8> = [3, 301].into_iter().flat_map(message).collect();
        for cut in [1, 2, 4, 5, 6, 7, 100, 1000] {
            let ledger = Ledger::new(1000, 1000);
            let mut meter = Meter::new(300, Share::of(&ledger, key("10.0.0.1")), true);
            for part in ends_well.chunks(cut) {
                meter.note(part).unwrap();
            }
            assert_eq!((meter.share.amount, meter.missing, meter.header_filled), (ends_well.len(), 0, 0), "{cut}");
            let refused = too_large.chunks(cut).find_map(|part| meter.note(part).err()).unwrap();
            assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{cut}");
            let mut meter = Meter { message_max: 900, ..meter };
            (meter.header_filled, meter.missing) = (0, 0);
            assert!(meter.note(&[0, 0, 0, 3, 132]).is_err(), "900 announced are more than is left");
        }
    }
}
