//! Makes the requests of all gRPC clients on unix sockets readable for h2.
//!
//! A request over a unix socket has no host to name. go says `localhost`; the C core (Python, C++, Ruby, PHP, C#) and
//! Java put the percent-encoded path of the socket into `:authority`, which RFC 3986 allows and the `http` crate does
//! not: h2 answers with a stream reset. Nobody here looks at that header, so [`AuthorityFilter`] replaces its value by one
//! letter on the way in. Everything else passes as it is.
//!
//! HPACK stays in step: the sender counts the entry that it adds to its table with the original, longer value, so it
//! forgets entries no later than h2 does, and indexes count from the newest entry on both sides. Values are replaced as
//! strings without being decoded, by RFC 7541 sections 5.1, 5.2 and 6.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The client preface of HTTP/2, in bytes.
const PREFACE_BYTES: usize = 24;
/// The header of a frame, in bytes.
const FRAME_HEADER_BYTES: usize = 9;
/// Largest payload that a frame may have without being asked for (RFC 9113 section 4.2); h2 refuses more by itself.
const PAYLOAD_BYTES_MAX: usize = 16_384;
const HEADERS: u8 = 1;
const FLAG_PADDED: u8 = 0x08;
const FLAG_PRIORITY: u8 = 0x20;
/// `:authority` in HPACK's static table.
const AUTHORITY: usize = 1;
/// `:authority` as a string, plain (so the C core sends it) and in HPACK's Huffman code.
const AUTHORITY_NAMES: [&[u8]; 2] = [b"\x0a:authority", b"\x88\xb8\x3b\x53\x39\xec\x32\x7d\x7f"];
/// One letter as an HPACK string: no Huffman code, length 1.
const STAND_IN: [u8; 2] = [1, b'u'];

/// A connection from an HTTP/2 client, with `:authority` replaced.
pub(crate) struct AuthorityFilter<S> {
    stream: S,
    /// Bytes to pass unseen: the preface, or the rest of a frame that is no HEADERS frame.
    pass: usize,
    /// From the beginning of a frame on: what cannot be judged yet.
    held: Vec<u8>,
    /// What may be read next.
    out: Vec<u8>,
    out_at: usize,
    ended: bool,
}

impl<S> AuthorityFilter<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, pass: PREFACE_BYTES, held: Vec::new(), out: Vec::new(), out_at: 0, ended: false }
    }

    /// The connection, of which nothing was read yet.
    pub(crate) fn into_inner(self) -> S {
        self.stream
    }

    /// How many bytes of `chunk` may pass; the next one begins a frame that must be held.
    fn passable(&mut self, chunk: &[u8]) -> usize {
        let mut at = 0;
        loop {
            let step = self.pass.min(chunk.len() - at);
            (at, self.pass) = (at + step, self.pass - step);
            let rest = chunk.get(at..).unwrap_or_default();
            match Frame::of(rest) {
                Some(frame) if !frame.is_request() => self.pass = frame.bytes,
                _ => return at,
            }
        }
    }

    /// Moves what can be judged from `held` to `out`.
    fn judge(&mut self) {
        let mut held = std::mem::take(&mut self.held);
        let mut at = 0;
        loop {
            let rest = held.get(at..).unwrap_or_default();
            let pass = self.passable(rest);
            self.out.extend_from_slice(rest.get(..pass).unwrap_or_default());
            at += pass;
            let rest = rest.get(pass..).unwrap_or_default();
            let frame = Frame::of(rest).and_then(|f| rest.get(..f.bytes));
            let Some(frame) = frame else { break };
            replace_authority(frame, &mut self.out);
            at += frame.len();
        }
        held.drain(..at);
        self.held = held;
        if self.held.is_empty() {
            self.held = Vec::new(); // idle connections keep no buffer
        }
    }

    /// Gives out what is ready; whether there was something.
    fn give(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        let ready = self.out.get(self.out_at..).unwrap_or_default();
        let now = ready.get(..buf.remaining()).unwrap_or(ready);
        if now.is_empty() {
            return false;
        }
        buf.put_slice(now);
        self.out_at += now.len();
        if self.out_at == self.out.len() {
            (self.out, self.out_at) = (Vec::new(), 0);
        }
        true
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AuthorityFilter<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if buf.remaining() == 0 || this.give(buf) || this.ended {
                return Poll::Ready(Ok(()));
            }
            let before = buf.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
            let came = buf.filled().get(before..).unwrap_or_default();
            if came.is_empty() {
                this.ended = true;
                this.out.append(&mut this.held);
                continue;
            }
            // The usual case, and all of it for frames that are no requests: nothing is moved.
            let pass = if this.held.is_empty() { this.passable(came) } else { 0 };
            this.held.extend_from_slice(came.get(pass..).unwrap_or_default());
            buf.set_filled(before + pass);
            this.judge();
            if pass > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AuthorityFilter<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The header of a frame.
#[derive(Clone, Copy)]
struct Frame {
    /// With its header.
    bytes: usize,
    kind: u8,
}

impl Frame {
    /// `None` while the header is not complete.
    fn of(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, kind, ..] = bytes.first_chunk::<FRAME_HEADER_BYTES>()?;
        Some(Self { bytes: FRAME_HEADER_BYTES + (usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c)), kind })
    }

    /// A HEADERS frame that h2 will look into.
    fn is_request(self) -> bool {
        self.kind == HEADERS && self.bytes <= FRAME_HEADER_BYTES + PAYLOAD_BYTES_MAX
    }
}

/// Appends a complete HEADERS frame to `out` with the value of `:authority` replaced; as it is if there is none.
fn replace_authority(frame: &[u8], out: &mut Vec<u8>) {
    let replaced = authority_value(frame).and_then(|value| {
        let (header, payload) = (frame.get(..value.start)?, frame.get(value.end..)?);
        let length = u32::try_from(header.len() + STAND_IN.len() + payload.len() - FRAME_HEADER_BYTES).ok()?;
        let [_, a, b, c] = length.to_be_bytes();
        out.extend([a, b, c]);
        out.extend(header.get(3..)?);
        out.extend(STAND_IN);
        out.extend(payload);
        Some(())
    });
    if replaced.is_none() {
        out.extend_from_slice(frame);
    }
}

/// Where in a HEADERS frame the string is that stands for `:authority`. Nothing for an empty one: its stand-in would be
/// longer. A block that goes on in a CONTINUATION frame is read as far as it comes.
fn authority_value(frame: &[u8]) -> Option<std::ops::Range<usize>> {
    let flags = *frame.get(4)?;
    let mut at = FRAME_HEADER_BYTES;
    let mut end = frame.len();
    if flags & FLAG_PADDED != 0 {
        end = end.checked_sub(usize::from(*frame.get(at)?))?;
        at += 1;
    }
    if flags & FLAG_PRIORITY != 0 {
        at += 5;
    }
    let block = frame.get(..end)?;
    loop {
        let first = *block.get(at)?;
        let literal_prefix = match first {
            0x80.. => {
                integer(block, &mut at, 7)?;
                continue;
            }
            0x40.. => 6,
            0x20.. => {
                integer(block, &mut at, 5)?;
                continue;
            }
            _ => 4,
        };
        let index = integer(block, &mut at, literal_prefix)?;
        let name = at;
        if index == 0 {
            string(block, &mut at)?;
        }
        let from = at;
        let length = string(block, &mut at)?;
        if index == AUTHORITY || AUTHORITY_NAMES.contains(&block.get(name..from)?) {
            return (length > 0).then_some(from..at);
        }
    }
}

/// Reads an integer with a prefix of so many bits (RFC 7541 section 5.1). Too large ones are `None`.
fn integer(block: &[u8], at: &mut usize, bits: u32) -> Option<usize> {
    let mask = (1_usize << bits) - 1;
    let mut value = usize::from(*block.get(*at)?) & mask;
    *at += 1;
    if value < mask {
        return Some(value);
    }
    for shift in [0, 7, 14] {
        let byte = usize::from(*block.get(*at)?);
        *at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Passes over a string (RFC 7541 section 5.2) and returns its encoded length.
fn string(block: &[u8], at: &mut usize) -> Option<usize> {
    let length = integer(block, at, 7)?;
    *at = at.checked_add(length).filter(|end| *end <= block.len())?;
    Some(length)
}

#[cfg(test)]
#[path = "authority_tests.rs"]
mod tests;
