//! What a sealed file is: a header, then frames of AES-256-GCM under a key that is derived anew for each file.
//!
//! The key comes from a [`SealingKey`] and the file's own salt; each frame's nonce is its number, with a mark on the last one,
//! so that frames cannot be left out, swapped or cut off. What the file is bound to ([`Binding`]) is authenticated with
//! each frame and is not in the file.

use super::key::SealingKey;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf;
use finial_core::{SpiffeId, TrustDomain};
use std::io::{self, Read, Write};
use zeroize::Zeroizing;

/// The form's name and version. Another form has another one.
const MAGIC: [u8; 8] = *b"FINSEAL1";
/// What all versions begin with.
const FAMILY: &[u8] = b"FINSEAL";
const SALT_BYTES: usize = 32;
const HEADER_BYTES: usize = MAGIC.len() + 1 + SALT_BYTES;
const TAG_BYTES: usize = 16;
/// A frame is sealed as soon as it has this size.
const FRAME_BYTES: usize = 64 << 10;
/// One item may have at most this size.
pub(super) const ITEM_BYTES_MAX: usize = 1 << 20;
const FRAME_BYTES_MAX: usize = FRAME_BYTES + ITEM_BYTES_MAX + 4;

/// What a file is of use for only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) machine_id: String,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) agent_id: SpiffeId,
}

/// Why a file cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("it is not a sealed cache")]
    NotOurs,
    #[error("it was written by another version")]
    OtherVersion,
    #[error("it is sealed by a {0} key, which is not in use here")]
    OtherSource(&'static str),
    #[error("it was sealed on another node, for another agent or by another key, or it is damaged")]
    Foreign,
    #[error("it is damaged at byte {0}")]
    Damaged(u64),
    #[error("it is cut off")]
    CutOff,
    #[error("it is larger than {0} bytes")]
    TooLarge(u64),
    #[error("{0}")]
    Io(#[from] io::Error),
}

fn unspecified<E>(_: E) -> io::Error {
    io::Error::other("the cipher failed")
}

fn file_key(secret: &SealingKey, salt: &[u8]) -> io::Result<LessSafeKey> {
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret.expose());
    let okm = prk.expand(&[b"finial sealed cache v1"], &AES_256_GCM).map_err(unspecified)?;
    Ok(LessSafeKey::new(UnboundKey::from(okm)))
}

fn nonce(number: u32, last: bool) -> Nonce {
    let mut bytes = [0; 12];
    let numbered = number.to_be_bytes().into_iter().chain([u8::from(last)]);
    bytes.iter_mut().zip(numbered).for_each(|(to, from)| *to = from);
    Nonce::assume_unique_for_key(bytes)
}

/// Header and binding, each part with its length.
fn associated(header: &[u8], bound: &Binding) -> Vec<u8> {
    let mut data = header.to_vec();
    for part in [bound.machine_id.as_str(), bound.trust_domain.as_str(), bound.agent_id.as_str()] {
        data.extend_from_slice(&(part.len() as u64).to_be_bytes());
        data.extend_from_slice(part.as_bytes());
    }
    data
}

/// Seals items into a file.
pub(super) struct Sealer<W> {
    to: W,
    key: LessSafeKey,
    associated: Vec<u8>,
    frame: Zeroizing<Vec<u8>>,
    number: u32,
    written: u64,
}

impl<W: Write> Sealer<W> {
    pub(super) fn new(mut to: W, secret: &SealingKey, bound: &Binding) -> io::Result<Self> {
        let salt = finial_crypto::random_bytes::<SALT_BYTES>();
        let mut header = MAGIC.to_vec();
        header.push(secret.source().number());
        header.extend_from_slice(&salt);
        to.write_all(&header)?;
        Ok(Self {
            to,
            key: file_key(secret, &salt)?,
            associated: associated(&header, bound),
            // Never grown: what it held would stay in memory.
            frame: Zeroizing::new(Vec::with_capacity(FRAME_BYTES_MAX + TAG_BYTES)),
            number: 0,
            written: header.len() as u64,
        })
    }

    /// Bytes in the file, about.
    pub(super) fn len(&self) -> u64 {
        self.written + self.frame.len() as u64
    }

    /// Adds an item of `length` bytes that `encode` appends; `false` if it is too large.
    pub(super) fn item(&mut self, length: usize, encode: impl FnOnce(&mut Vec<u8>)) -> io::Result<bool> {
        if length > ITEM_BYTES_MAX {
            return Ok(false);
        }
        self.frame.extend_from_slice(&u32::try_from(length).map_err(unspecified)?.to_be_bytes());
        encode(&mut self.frame);
        if self.frame.len() >= FRAME_BYTES {
            self.flush(false)?;
        }
        Ok(true)
    }

    fn flush(&mut self, last: bool) -> io::Result<()> {
        let aad = Aad::from(self.associated.as_slice());
        let sealed = self.key.seal_in_place_append_tag(nonce(self.number, last), aad, &mut *self.frame);
        sealed.map_err(unspecified)?;
        self.number = self.number.checked_add(1).ok_or_else(|| io::Error::other("too many frames"))?;
        let length = u32::try_from(self.frame.len()).map_err(unspecified)?;
        self.to.write_all(&length.to_be_bytes())?;
        self.to.write_all(&self.frame)?;
        self.written += 4 + u64::from(length);
        self.frame.clear();
        Ok(())
    }

    /// Seals the last frame, and gives back where it wrote, with the bytes in all.
    pub(super) fn finish(mut self) -> io::Result<(W, u64)> {
        self.flush(true)?;
        Ok((self.to, self.written))
    }
}

/// Opens a file and gives its items to `take`, in order. Nothing of it may be used before this returned well: only then is
/// it known to be whole.
pub(super) fn open(
    mut from: impl Read,
    secret: &SealingKey,
    bound: &Binding,
    mut take: impl FnMut(&[u8]) -> bool,
) -> Result<(), OpenError> {
    let mut header = [0; HEADER_BYTES];
    let have = read_up_to(&mut from, &mut header)?;
    let (magic, rest) = header.split_at(MAGIC.len());
    if !magic.starts_with(FAMILY) {
        return Err(OpenError::NotOurs);
    }
    if magic != MAGIC {
        return Err(OpenError::OtherVersion);
    }
    if have < HEADER_BYTES {
        return Err(OpenError::CutOff);
    }
    let (source, salt) = rest.split_at(1);
    if source != [secret.source().number()] {
        return Err(OpenError::OtherSource(super::key::Source::name_of(source)));
    }
    let key = file_key(secret, salt)?;
    let associated = associated(&header, bound);
    let mut at = HEADER_BYTES as u64;
    // As the Sealer's: never grown.
    let mut frame = Zeroizing::new(Vec::with_capacity(FRAME_BYTES_MAX + TAG_BYTES));
    let mut length = next_length(&mut from)?.ok_or(OpenError::CutOff)?;
    for number in 0.. {
        let wrong = || if number == 0 { OpenError::Foreign } else { OpenError::Damaged(at) };
        if !(TAG_BYTES..=FRAME_BYTES_MAX + TAG_BYTES).contains(&length) {
            return Err(wrong());
        }
        frame.resize(length, 0);
        if read_up_to(&mut from, &mut frame)? < length {
            return Err(OpenError::CutOff);
        }
        let next = next_length(&mut from)?;
        let aad = Aad::from(associated.as_slice());
        let plain = key.open_in_place(nonce(number, next.is_none()), aad, &mut frame).map_err(|_| wrong())?;
        if !items(plain, &mut take) {
            return Err(OpenError::Damaged(at));
        }
        at += 4 + length as u64;
        match next {
            Some(next) => length = next,
            None => break,
        }
    }
    Ok(())
}

fn items(mut plain: &[u8], take: &mut impl FnMut(&[u8]) -> bool) -> bool {
    while let Some((length, rest)) = plain.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let Some((item, rest)) = rest.split_at_checked(length) else { return false };
        if !take(item) {
            return false;
        }
        plain = rest;
    }
    plain.is_empty()
}

/// How long the next frame is; `None` at the end.
fn next_length(from: &mut impl Read) -> Result<Option<usize>, OpenError> {
    let mut length = [0; 4];
    match read_up_to(from, &mut length)? {
        0 => Ok(None),
        4 => Ok(Some(usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX))),
        _ => Err(OpenError::CutOff),
    }
}

fn read_up_to(from: &mut impl Read, to: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while let Some(free) = to.get_mut(have..).filter(|free| !free.is_empty()) {
        match from.read(free) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}
