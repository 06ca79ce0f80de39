//! One entry as it lies in memory: a single piece of bytes, the protobuf form behind a short head.

use finial_core::{Entry, TrustDomain};
use finial_proto::types;
use prost::Message;
use std::ops::Range;
use std::sync::Arc;

/// Bytes before the protobuf form: row, revision and creation (8 each, little endian), six positions (2 each), flags (1).
const HEAD: usize = 37;
/// Children of the server are node aliases: they name groups of agents and are never handed out themselves.
pub(super) const SERVER_PATH: &str = "/spire/server";
const ADMIN: u8 = 1;
const DOWNSTREAM: u8 = 2;
const FOREIGN: u8 = 4;

/// One entry, immutable; an update makes a new one. Cheap to clone; about 200 bytes, the index's links apart.
#[derive(Clone, PartialEq, Eq)]
pub struct Indexed(Arc<[u8]>);

impl Indexed {
    /// `row` is its row ID in the datastore, 0 when that is not known.
    pub(crate) fn new(entry: &Entry, row: i64, own: &TrustDomain) -> Self {
        let wire = finial_proto::convert::entry_to_proto(entry);
        let mut bytes = Vec::with_capacity(HEAD + wire.encoded_len());
        bytes.resize(HEAD, 0);
        // A vector grows without end, so that encoding cannot fail.
        let _ = wire.encode(&mut bytes);
        let spans = bytes.get(HEAD..).and_then(spans).unwrap_or_default();
        let foreign = !entry.spiffe_id.is_member_of(own) || !entry.parent_id.is_member_of(own);
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let flags = flag(entry.admin, ADMIN) | flag(entry.downstream, DOWNSTREAM) | flag(foreign, FOREIGN);
        let numbers = [row, entry.revision_number, entry.created_at].into_iter().flat_map(i64::to_le_bytes);
        let positions = spans.into_iter().flat_map(u16::to_le_bytes);
        for (to, from) in bytes.iter_mut().zip(numbers.chain(positions).chain([flags])) {
            *to = from;
        }
        Self(bytes.into())
    }

    /// The same entry in another row.
    pub(crate) fn with_row(&self, row: i64) -> Self {
        let mut bytes = self.0.to_vec();
        for (to, from) in bytes.iter_mut().zip(row.to_le_bytes()) {
            *to = from;
        }
        Self(bytes.into())
    }

    fn number(&self, nth: usize) -> i64 {
        let bytes = self.0.get(nth * 8..nth * 8 + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, i64::from_le_bytes)
    }

    fn text(&self, nth: usize) -> &str {
        let position = |at: usize| {
            let bytes = self.0.get(at..at + 2).and_then(|b| b.try_into().ok());
            bytes.map_or(0, |b| usize::from(u16::from_le_bytes(b)))
        };
        let at = 24 + nth * 4;
        let bytes = self.encoded().get(position(at)..position(at + 2));
        bytes.and_then(|b| std::str::from_utf8(b).ok()).unwrap_or_default()
    }

    fn flag(&self, bit: u8) -> bool {
        self.0.get(HEAD - 1).is_some_and(|flags| flags & bit != 0)
    }

    /// Its row ID in the datastore, by which lists are ordered; 0 while that is not known.
    pub fn row(&self) -> i64 {
        self.number(0)
    }

    /// As in the entry.
    pub fn revision_number(&self) -> i64 {
        self.number(1)
    }

    /// As in the entry, unix seconds.
    pub fn created_at(&self) -> i64 {
        self.number(2)
    }

    /// The entry's ID.
    pub fn id(&self) -> &str {
        self.text(0)
    }

    /// The path of its SPIFFE ID.
    pub fn path(&self) -> &str {
        self.text(1)
    }

    /// The path of its parent's ID.
    pub fn parent_path(&self) -> &str {
        self.text(2)
    }

    /// As in the entry.
    pub fn is_admin(&self) -> bool {
        self.flag(ADMIN)
    }

    /// As in the entry.
    pub fn is_downstream(&self) -> bool {
        self.flag(DOWNSTREAM)
    }

    /// Whether its ID or its parent's lies in another trust domain: it is listed, and reaches nobody.
    pub fn is_foreign(&self) -> bool {
        self.flag(FOREIGN)
    }

    /// Whether it is a node alias: a name for all agents that have its selectors.
    pub fn is_alias(&self) -> bool {
        !self.is_foreign() && self.parent_path() == SERVER_PATH
    }

    /// The bytes of `spire.api.types.Entry`.
    pub fn encoded(&self) -> &[u8] {
        self.0.get(HEAD..).unwrap_or_default()
    }

    /// The whole entry as the API has it.
    pub fn to_proto(&self) -> types::Entry {
        types::Entry::decode(self.encoded()).unwrap_or_default()
    }
}

/// Where ID, path and parent path begin and end in an encoded entry: fields 1, 2.2 and 3.2, which come first and in order.
/// IDs are at most 255 bytes and SPIFFE IDs 2048, so that all of it lies below 64 KiB.
fn spans(encoded: &[u8]) -> Option<[u16; 6]> {
    let mut at = 0;
    let id = field(encoded, &mut at, 1)?;
    let mut spiffe_id = field(encoded, &mut at, 2)?;
    let mut parent_id = field(encoded, &mut at, 3)?;
    let path = |outer: &mut Range<usize>| {
        field(encoded, &mut outer.start, 1)?;
        // An ID without a path leaves the field out; what follows is none of its own.
        match field(encoded, &mut outer.start, 2) {
            Some(path) if path.end <= outer.end => Some(path),
            _ => Some(outer.end..outer.end),
        }
    };
    let (path, parent) = (path(&mut spiffe_id)?, path(&mut parent_id)?);
    let narrow = |at: usize| u16::try_from(at).ok();
    let [a, b, c] = [id, path, parent].map(|span| Some((narrow(span.start)?, narrow(span.end)?)));
    let ((a, b), (c, d), (e, f)) = (a?, b?, c?);
    Some([a, b, c, d, e, f])
}

/// The content of the length-delimited field `number` that begins at `at`, which then points behind it.
fn field(bytes: &[u8], at: &mut usize, number: u8) -> Option<Range<usize>> {
    if *bytes.get(*at)? != number << 3 | 2 {
        return None;
    }
    let mut rest = bytes.get(*at + 1..)?;
    let before = rest.len();
    let len = usize::try_from(prost::encoding::decode_varint(&mut rest).ok()?).ok()?;
    let start = *at + 1 + (before - rest.len());
    *at = start.checked_add(len)?;
    Some(start..*at)
}
