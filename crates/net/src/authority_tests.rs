//! Tests of the filter: what it changes, what it leaves, and that chunks of any size make no difference.

use super::*;
use proptest::prelude::*;
use tokio::io::AsyncReadExt;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
    [&[a, b, c, kind, flags, 0, 0, 0, 1], payload].concat()
}

/// `:method: POST`, `:scheme: http`, `:authority` as given, a literal header with a new name.
fn block(authority: &[u8]) -> Vec<u8> {
    let header = [&[0x40, 2], &b"te"[..], &[8], b"trailers"].concat();
    [&[0x83, 0x86, 0x41, authority.len() as u8], authority, &header].concat()
}

/// Hands out its pieces one at a time.
struct Pieces(std::collections::VecDeque<Vec<u8>>);

impl AsyncRead for Pieces {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(mut piece) = self.0.pop_front() {
            let later = piece.split_off(piece.len().min(buf.remaining()));
            buf.put_slice(&piece);
            if !later.is_empty() {
                self.0.push_front(later);
            }
        }
        Poll::Ready(Ok(()))
    }
}

fn filtered(pieces: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut out = Vec::new();
    let pieces = pieces.into_iter().filter(|p| !p.is_empty()).collect();
    runtime.block_on(AuthorityFilter::new(Pieces(pieces)).read_to_end(&mut out)).unwrap();
    out
}

#[test]
fn the_authority_is_replaced_and_nothing_else() {
    let settings = frame(4, 0, &[]);
    let data = frame(0, 1, &[7; 300]);
    let path = b"tmp%2Fagent%2Fapi.sock";
    for (flags, before, after) in [
        (0x04, &b""[..], &b""[..]),
        (0x04 | FLAG_PRIORITY, &[0, 0, 0, 0, 9], b""),
        (0x04 | FLAG_PADDED, &[3], &[0, 0, 0]),
        (0x04 | FLAG_PADDED | FLAG_PRIORITY, &[2, 0, 0, 0, 0, 9], &[0, 0]),
    ] {
        let headers = |authority: &[u8]| frame(HEADERS, flags, &[before, &block(authority), after].concat());
        let sent = [PREFACE, &settings, &headers(path), &data, &headers(path)].concat();
        let want = [PREFACE, &settings, &headers(b"u"), &data, &headers(b"u")].concat();
        assert_eq!(filtered([sent]), want, "{flags:#x}");
    }
}

#[test]
fn representations_of_all_kinds_are_passed_over() {
    let long = vec![b'x'; 300];
    let skipped = [
        &[0x3f, 0xe1, 0x1f, 0xff, 0x05][..], // table size 4096; an index of two bytes
        &[0x00, 1, b'a', 0x7f, 0xad, 0x01],
        &long,                        // a new name; a value of 300 bytes
        &[0x1f, 0x05, 0x83, 1, 2, 3], // never indexed, name 20; a Huffman value
    ]
    .concat();
    for kind in [0x01, 0x11, 0x41] {
        let with = |authority: &[u8]| {
            frame(HEADERS, 4, &[&skipped[..], &[kind, authority.len() as u8], authority, &[0x84]].concat())
        };
        assert_eq!(filtered([[PREFACE, &with(b"a%2Fb")].concat()]), [PREFACE, &with(b"u")].concat(), "{kind:#x}");
    }
}

#[test]
fn the_name_may_be_spelled_out() {
    for name in [&b"\x0a:authority"[..], b"\x88\xb8\x3b\x53\x39\xec\x32\x7d\x7f"] {
        let with = |value: &[u8]| {
            let path = [&b"\x40\x05:path\x02/x\x40"[..], name, &[value.len() as u8], value].concat();
            frame(HEADERS, 4, &path)
        };
        assert_eq!(filtered([[PREFACE, &with(b"a%2Fb")].concat()]), [PREFACE, &with(b"u")].concat());
    }
}

#[test]
fn what_is_no_request_is_left_alone() {
    for left in [
        frame(HEADERS, 4, &[0x83, 0x86]),      // no authority
        frame(HEADERS, 4, &block(b"")),        // an empty one
        frame(HEADERS, 4, &[0x41, 200, b'x']), // cut short
        frame(HEADERS, 4 | FLAG_PADDED, &[200, 0x41, 1, b'x']),
        frame(HEADERS, 4, &[0x41, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff]),
        frame(HEADERS, 4, &[]),
        frame(HEADERS, 4, &[&block(b"x%2Fx")[..], &[0; PAYLOAD_BYTES_MAX]].concat()), // h2 refuses the size
        b"\0\0".to_vec(), // an end in the middle of a header
        [&[0, 0, 99, HEADERS, 4, 0, 0, 0, 1][..], b"ab"].concat(),
    ] {
        let sent = [PREFACE, &left].concat();
        assert_eq!(filtered([sent.clone()]), sent);
    }
}

proptest! {
    #[test]
    fn chunks_make_no_difference(cuts in proptest::collection::vec(0usize..500, 0..40), authority in "[a-z%/.]{1,60}") {
        let all = [
            PREFACE, &frame(4, 0, &[0; 12]), &frame(HEADERS, 4, &block(authority.as_bytes())), &frame(0, 1, &[9; 77]),
            &frame(8, 0, &[0; 4]), &frame(HEADERS, 4, &block(authority.as_bytes())), &frame(0, 1, &[]),
        ].concat();
        let whole = filtered([all.clone()]);
        prop_assert!(whole.len() <= all.len());
        let mut cuts: Vec<_> = cuts.into_iter().map(|c| c.min(all.len())).collect();
        cuts.sort();
        let mut from = 0;
        let mut pieces = Vec::new();
        for cut in cuts.into_iter().chain([all.len()]) {
            pieces.push(all[from..cut].to_vec());
            from = cut;
        }
        prop_assert_eq!(filtered(pieces), whole);
    }

    #[test]
    fn anything_comes_out_again(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let out = filtered([bytes.clone()]);
        prop_assert!(out.len() <= bytes.len());
        let headers: Vec<u8> = [PREFACE, &frame(HEADERS, 4, &bytes)].concat();
        let out = filtered([headers.clone()]);
        prop_assert!(out.len() <= headers.len() && out.len() >= PREFACE.len() + FRAME_HEADER_BYTES);
    }
}
