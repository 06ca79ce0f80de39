//! The one DER reader and the one DER writer. Strict where DER is strict: definite, minimal lengths, no trailing bytes.

pub(crate) const BOOLEAN: u8 = 0x01;
pub(crate) const INTEGER: u8 = 0x02;
pub(crate) const BIT_STRING: u8 = 0x03;
pub(crate) const OCTET_STRING: u8 = 0x04;
pub(crate) const NULL: u8 = 0x05;
pub(crate) const OID: u8 = 0x06;
pub(crate) const UTF8_STRING: u8 = 0x0c;
pub(crate) const PRINTABLE_STRING: u8 = 0x13;
pub(crate) const TELETEX_STRING: u8 = 0x14;
pub(crate) const IA5_STRING: u8 = 0x16;
pub(crate) const UTC_TIME: u8 = 0x17;
pub(crate) const GENERALIZED_TIME: u8 = 0x18;
pub(crate) const BMP_STRING: u8 = 0x1e;
pub(crate) const SEQUENCE: u8 = 0x30;
pub(crate) const SET: u8 = 0x31;

/// `[n]`, constructed.
pub(crate) const fn context(n: u8) -> u8 {
    0xa0 | n
}
/// `[n]`, primitive.
pub(crate) const fn context_primitive(n: u8) -> u8 {
    0x80 | n
}

/// One element: its tag, its content, and all of its bytes.
#[derive(Clone, Copy)]
pub(crate) struct Element<'a> {
    pub(crate) tag: u8,
    pub(crate) content: &'a [u8],
    pub(crate) whole: &'a [u8],
}

/// Reads elements one after the other. `None` means: not DER, or not what was asked for.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Succeeds when everything was read.
    pub(crate) fn end(&self) -> Option<()> {
        self.is_empty().then_some(())
    }

    pub(crate) fn peek(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    /// Reads any element. Tags above 30 and lengths above four bytes do not occur in what we read.
    pub(crate) fn any(&mut self) -> Option<Element<'a>> {
        let (&tag, after_tag) = self.rest.split_first()?;
        if tag & 0x1f == 0x1f {
            return None;
        }
        let (&first, after_first) = after_tag.split_first()?;
        let (length, header, body) = if first < 0x80 {
            (usize::from(first), 2, after_first)
        } else {
            let count = usize::from(first & 0x7f);
            if count == 0 || count > 4 {
                return None;
            }
            let (length_bytes, body) = after_first.split_at_checked(count)?;
            let length = length_bytes.iter().fold(0usize, |n, b| n << 8 | usize::from(*b));
            let minimal = length >= 0x80 && length_bytes.first() != Some(&0);
            if !minimal {
                return None;
            }
            (length, 2 + count, body)
        };
        let content = body.get(..length)?;
        let (whole, rest) = self.rest.split_at_checked(header + length)?;
        self.rest = rest;
        Some(Element { tag, content, whole })
    }

    /// Reads an element with that tag and gives its content.
    pub(crate) fn read(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.element(tag).map(|e| e.content)
    }

    /// Reads an element with that tag.
    pub(crate) fn element(&mut self, tag: u8) -> Option<Element<'a>> {
        if self.peek()? != tag {
            return None;
        }
        self.any()
    }

    /// Reads an element with that tag and goes inside.
    pub(crate) fn nested(&mut self, tag: u8) -> Option<Reader<'a>> {
        self.read(tag).map(Reader::new)
    }

    /// Reads an element if the next one has that tag; `None` only for malformed ones.
    pub(crate) fn optional(&mut self, tag: u8) -> Option<Option<&'a [u8]>> {
        if self.peek() == Some(tag) { self.read(tag).map(Some) } else { Some(None) }
    }

    /// Reads a BOOLEAN if there is one, else the default.
    pub(crate) fn boolean_or(&mut self, default: bool) -> Option<bool> {
        match self.optional(BOOLEAN)? {
            None => Some(default),
            Some([0x00]) => Some(false),
            Some([0xff]) => Some(true),
            Some(_) => None,
        }
    }

    /// Reads a non-negative INTEGER and gives its magnitude without leading zeros (empty for zero).
    pub(crate) fn unsigned(&mut self) -> Option<&'a [u8]> {
        match self.read(INTEGER)? {
            [0] => Some(&[]),
            [0, rest @ ..] if rest.first()? & 0x80 != 0 => Some(rest),
            all @ [first, ..] if *first != 0 && first & 0x80 == 0 => Some(all),
            _ => None,
        }
    }

    /// Reads an INTEGER that fits `u32`.
    pub(crate) fn small(&mut self) -> Option<u32> {
        let magnitude = self.unsigned()?;
        (magnitude.len() <= 4).then(|| magnitude.iter().fold(0, |n, b| n << 8 | u32::from(*b)))
    }

    /// Reads a BIT STRING without unused bits.
    pub(crate) fn bit_string(&mut self) -> Option<&'a [u8]> {
        match self.read(BIT_STRING)? {
            [0, bits @ ..] => Some(bits),
            _ => None,
        }
    }
}

/// Bytes that tag and length take for a content of `length` bytes.
pub(crate) fn header_len(length: usize) -> usize {
    match length {
        0..0x80 => 2,
        0x80..0x100 => 3,
        0x100..0x1_0000 => 4,
        0x1_0000..0x100_0000 => 5,
        _ => 6,
    }
}

/// Bytes of a whole element with a content of `length` bytes.
pub(crate) fn element_len(length: usize) -> usize {
    header_len(length) + length
}

/// Writes tag and length.
pub(crate) fn put_header(out: &mut Vec<u8>, tag: u8, length: usize) {
    out.push(tag);
    let bytes = (length as u64).to_be_bytes();
    let significant = header_len(length) - 2;
    if significant == 0 {
        out.push(length as u8);
    } else {
        out.push(0x80 | significant as u8);
        out.extend_from_slice(bytes.get(bytes.len() - significant..).unwrap_or_default());
    }
}

/// Writes one element.
pub(crate) fn put(out: &mut Vec<u8>, tag: u8, content: &[u8]) {
    put_header(out, tag, content.len());
    out.extend_from_slice(content);
}

/// Writes one element whose content the closure writes. For cold paths: it writes the content apart first.
pub(crate) fn put_nested(out: &mut Vec<u8>, tag: u8, write: impl FnOnce(&mut Vec<u8>)) {
    let mut content = Vec::new();
    write(&mut content);
    put(out, tag, &content);
}

/// Bytes of an INTEGER's content for a big-endian magnitude.
fn unsigned_content_len(magnitude: &[u8]) -> usize {
    let trimmed = trim_zeros(magnitude);
    match trimmed.first() {
        None => 1,
        Some(first) => trimmed.len() + usize::from(first & 0x80 != 0),
    }
}

/// Bytes of a whole INTEGER for a big-endian magnitude.
pub(crate) fn unsigned_len(magnitude: &[u8]) -> usize {
    element_len(unsigned_content_len(magnitude))
}

/// Writes a non-negative INTEGER from its big-endian magnitude.
pub(crate) fn put_unsigned(out: &mut Vec<u8>, magnitude: &[u8]) {
    let trimmed = trim_zeros(magnitude);
    let length = unsigned_content_len(magnitude);
    put_header(out, INTEGER, length);
    if length > trimmed.len() {
        out.push(0);
    }
    out.extend_from_slice(trimmed);
}

/// Writes a BIT STRING without unused bits.
pub(crate) fn put_bit_string(out: &mut Vec<u8>, bits: &[u8]) {
    put_header(out, BIT_STRING, bits.len() + 1);
    out.push(0);
    out.extend_from_slice(bits);
}

/// Without leading zeros.
pub(crate) fn trim_zeros(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|b| **b == 0).count();
    bytes.get(zeros..).unwrap_or_default()
}

/// An OID's content in dotted form, for messages.
pub(crate) fn dotted(oid: &[u8]) -> String {
    let mut text = String::new();
    let mut value: u64 = 0;
    for (at, byte) in oid.iter().enumerate() {
        value = value << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 != 0 {
            if at > 64 || value > u64::from(u32::MAX) {
                return "?".to_owned();
            }
            continue;
        }
        if text.is_empty() {
            let root = (value / 40).min(2);
            text = format!("{root}.{}", value - root * 40);
        } else {
            text.push_str(&format!(".{value}"));
        }
        value = 0;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(bytes: &[u8]) -> Option<Element<'_>> {
        let mut reader = Reader::new(bytes);
        let element = reader.any()?;
        reader.end()?;
        Some(element)
    }

    #[test]
    fn lengths_that_are_not_minimal_or_not_definite_are_refused() {
        assert!(one(&[0x04, 0x01, 0xaa]).is_some());
        for bad in [
            &[][..],
            &[0x04],
            &[0x04, 0x01],
            &[0x04, 0x80, 0x00, 0x00],
            &[0x04, 0x81, 0x01, 0xaa],
            &[0x04, 0x82, 0x00, 0x80],
            &[0x04, 0x85, 0, 0, 0, 0, 1],
            &[0x04, 0x84, 0xff, 0xff, 0xff, 0xff],
            &[0x1f, 0x81, 0x01, 0x00],
            &[0x04, 0x00, 0x00],
        ] {
            assert!(one(bad).is_none(), "{bad:x?}");
        }
    }

    #[test]
    fn integers_are_minimal_and_not_negative() {
        let read = |bytes: &[u8]| Reader::new(bytes).unsigned().map(<[u8]>::to_vec);
        assert_eq!(read(&[2, 1, 0]), Some(vec![]));
        assert_eq!(read(&[2, 1, 0x7f]), Some(vec![0x7f]));
        assert_eq!(read(&[2, 2, 0, 0x80]), Some(vec![0x80]));
        for bad in [&[2, 0][..], &[2, 1, 0x80], &[2, 2, 0, 0x7f], &[2, 2, 0, 0], &[2, 2, 0xff, 0xff]] {
            assert_eq!(read(bad), None, "{bad:x?}");
        }
    }

    #[test]
    fn oids_print_dotted() {
        assert_eq!(dotted(&[0x55, 0x1d, 0x0f]), "2.5.29.15");
        assert_eq!(dotted(&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01]), "1.2.840.10045.2.1");
        assert_eq!(dotted(&[0x88, 0x37, 0x03]), "2.999.3");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(tag in 0u8..=0x1e, content in proptest::collection::vec(any::<u8>(), 0..70_000)) {
            let mut out = Vec::new();
            put(&mut out, tag, &content);
            prop_assert_eq!(out.len(), element_len(content.len()));
            let element = one(&out).unwrap();
            prop_assert_eq!((element.tag, element.content, element.whole), (tag, &content[..], &out[..]));
        }

        #[test]
        fn integers_round_trip(magnitude in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut out = Vec::new();
            put_unsigned(&mut out, &magnitude);
            prop_assert_eq!(out.len(), unsigned_len(&magnitude));
            prop_assert_eq!(Reader::new(&out).unsigned().unwrap(), trim_zeros(&magnitude));
        }

        #[test]
        fn every_read_consumes_or_fails(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut reader = Reader::new(&bytes);
            let mut total = 0;
            while let Some(element) = reader.any() {
                total += element.whole.len();
            }
            prop_assert!(total <= bytes.len());
        }
    }
}
