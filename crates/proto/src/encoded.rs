//! Answers that are encoded once and sent to many streams as they are, and the codec that carries them.
//!
//! A view of the agent's cache changes seldom and has many watchers: its protobuf bytes are built when it changes
//! ([`Encoded::new`]); each stream then copies them into its frame and encodes nothing.

use crate::server::entry;
use crate::{types, workload};
use bytes::{BufMut, Bytes};
use prost::Message;
use std::fmt;
use std::marker::PhantomData;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use zeroize::Zeroizing;

/// The ready-made form of [`workload::X509svidResponse`].
pub type X509SvidResponse = Encoded<workload::X509svidResponse>;
/// The ready-made form of [`workload::X509BundlesResponse`].
pub type X509BundlesResponse = Encoded<workload::X509BundlesResponse>;
/// The ready-made form of [`workload::JwtBundlesResponse`].
pub type JwtBundlesResponse = Encoded<workload::JwtBundlesResponse>;
/// The ready-made form of [`workload::WitsvidResponse`].
pub type WitSvidResponse = Encoded<workload::WitsvidResponse>;
/// The ready-made form of [`workload::WitBundlesResponse`].
pub type WitBundlesResponse = Encoded<workload::WitBundlesResponse>;
/// The ready-made form of [`crate::envoy::discovery::DiscoveryResponse`].
pub type DiscoveryResponse = Encoded<crate::envoy::discovery::DiscoveryResponse>;
/// The ready-made form of [`crate::envoy::discovery::DeltaDiscoveryResponse`].
pub type DeltaDiscoveryResponse = Encoded<crate::envoy::discovery::DeltaDiscoveryResponse>;
/// The ready-made form of [`crate::sync::WatchResponse`].
pub type WatchResponse = Encoded<crate::sync::WatchResponse>;
/// The ready-made form of [`entry::GetAuthorizedEntriesResponse`].
pub type GetAuthorizedEntriesResponse = Encoded<entry::GetAuthorizedEntriesResponse>;
/// The ready-made form of [`entry::SyncAuthorizedEntriesResponse`].
pub type SyncAuthorizedEntriesResponse = Encoded<entry::SyncAuthorizedEntriesResponse>;

/// First size of a stream's two buffers, in bytes. tonic's own is 8 KiB for each, most of what an idle stream costs;
/// a longer message grows its buffer once.
const BUFFER_BYTES: usize = 512;
/// How many encoded bytes are gathered before they are handed to the connection.
const YIELD_BYTES: usize = 32 * 1024;

/// The protobuf bytes of a `T`. Cheap to clone: the bytes are shared.
pub struct Encoded<T> {
    bytes: Bytes,
    message: PhantomData<fn() -> T>,
}

impl<T: Message> Encoded<T> {
    /// Encodes `message`.
    pub fn new(message: &T) -> Self {
        Self { bytes: message.encode_to_vec().into(), message: PhantomData }
    }

    /// Encodes `message`, which holds secrets: the bytes are wiped when the last clone goes.
    pub fn new_secret(message: &T) -> Self {
        Self { bytes: Bytes::from_owner(Zeroizing::new(message.encode_to_vec())), message: PhantomData }
    }
}

/// A message with entries that may be added to its other fields in their encoded form.
pub trait HoldsEntries: Message {
    /// The field of the entries.
    const FIELD: u32;
}
impl HoldsEntries for crate::sync::WatchResponse {
    const FIELD: u32 = 2;
}
impl HoldsEntries for entry::GetAuthorizedEntriesResponse {
    const FIELD: u32 = 1;
}
impl HoldsEntries for entry::SyncAuthorizedEntriesResponse {
    const FIELD: u32 = 2;
}

impl<T: HoldsEntries> Encoded<T> {
    /// `head`, which has no entries, followed by entries that are encoded already, each cut to what the mask names (see
    /// [`crate::convert::mask_entry`]).
    pub fn with_entries<'a>(
        head: &T,
        mask: Option<&types::EntryMask>,
        entries: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Self {
        const OVERHEAD: usize = 12; // tag and length, at most
        let kept = mask.map(KeptFields::new);
        let mut cut = Vec::new();
        let mut bytes =
            Vec::with_capacity(head.encoded_len() + entries.clone().map(|e| e.len() + OVERHEAD).sum::<usize>());
        head.encode_raw(&mut bytes);
        for mut entry in entries {
            if let Some(kept) = &kept {
                cut.clear();
                kept.copy(entry, &mut cut);
                entry = &cut;
            }
            prost::encoding::encode_key(T::FIELD, prost::encoding::WireType::LengthDelimited, &mut bytes);
            prost::encoding::encode_varint(entry.len() as u64, &mut bytes);
            bytes.extend_from_slice(entry);
        }
        Self { bytes: bytes.into(), message: PhantomData }
    }
}

/// Numbers of the fields of an entry that are wanted, a bit for each.
struct KeptFields(u64);

impl KeptFields {
    /// The mask's fields have the numbers of those they stand for. The ID always stays.
    fn new(mask: &types::EntryMask) -> Self {
        const ID: u32 = 1;
        let mask = mask.encode_to_vec();
        Self(fields(&mask).fold(1 << ID, |all, (number, _)| all | 1_u64.checked_shl(number).unwrap_or_default()))
    }

    fn copy(&self, entry: &[u8], to: &mut Vec<u8>) {
        for (number, field) in fields(entry) {
            if 1_u64.checked_shl(number).is_some_and(|bit| self.0 & bit != 0) {
                to.extend_from_slice(field);
            }
        }
    }
}

/// The fields of a message, each with its number and with its tag before it. Ends where the bytes are no message.
fn fields(mut message: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    use prost::encoding::{WireType, decode_key, decode_varint};
    std::iter::from_fn(move || {
        let mut rest = message;
        let (number, form) = decode_key(&mut rest).ok()?;
        let skipped = match form {
            WireType::Varint => decode_varint(&mut rest).map(|_| 0).ok()?,
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => usize::try_from(decode_varint(&mut rest).ok()?).ok()?,
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        let after = rest.get(skipped..)?;
        let field = message.get(..message.len() - after.len())?;
        message = after;
        Some((number, field))
    })
}

impl<T: Message + Default> Encoded<T> {
    /// Decodes again, for those who look at an answer rather than send it.
    pub fn decode(&self) -> Result<T, prost::DecodeError> {
        T::decode(self.bytes.clone())
    }
}

impl<T> Encoded<T> {
    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl<T> Clone for Encoded<T> {
    fn clone(&self) -> Self {
        Self { bytes: self.bytes.clone(), message: PhantomData }
    }
}
impl<T> PartialEq for Encoded<T> {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}
impl<T> Eq for Encoded<T> {}
/// Only the length: the bytes hold private keys.
impl<T> fmt::Debug for Encoded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Encoded({} bytes)", self.bytes.len())
    }
}

/// What can be written to a stream: any message, and ready-made bytes.
pub trait Wire: Send + 'static {
    /// Appends the protobuf bytes.
    fn write(&self, to: &mut EncodeBuf<'_>);
}
impl<T: Message + 'static> Wire for T {
    fn write(&self, to: &mut EncodeBuf<'_>) {
        to.reserve(self.encoded_len());
        self.encode_raw(to);
    }
}
impl<T: 'static> Wire for Encoded<T> {
    fn write(&self, to: &mut EncodeBuf<'_>) {
        to.reserve(self.bytes.len());
        to.put_slice(&self.bytes);
    }
}

/// Protobuf with small buffers, for services with many held streams.
pub struct SmallCodec<T, U>(PhantomData<fn(T) -> U>);

impl<T, U> Default for SmallCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}
impl<T, U> fmt::Debug for SmallCodec<T, U> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SmallCodec")
    }
}

impl<T: Wire, U: Message + Default + 'static> Codec for SmallCodec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = SmallEncoder<T>;
    type Decoder = SmallDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        SmallEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        SmallDecoder(PhantomData)
    }
}

/// The sending half of [`SmallCodec`].
pub struct SmallEncoder<T>(PhantomData<fn(T)>);

impl<T: Wire> Encoder for SmallEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.write(to);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}

/// The receiving half of [`SmallCodec`].
pub struct SmallDecoder<U>(PhantomData<fn() -> U>);

impl<U: Message + Default> Decoder for SmallDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // The code and the beginning are what tonic's own codec answers.
        U::decode(from).map(Some).map_err(|e| Status::internal(e.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_made_bytes_are_the_message() {
        let message = workload::X509svidResponse {
            svids: vec![workload::X509svid { spiffe_id: "spiffe://td/x".into(), ..Default::default() }],
            federated_bundles: [("spiffe://other".to_owned(), Bytes::from_static(b"roots"))].into(),
            ..Default::default()
        };
        let ready = Encoded::new(&message);
        assert_eq!(ready.bytes(), &Bytes::from(message.encode_to_vec()));
        assert_eq!(ready.decode().unwrap(), message);
        assert_eq!(ready, ready.clone());
        assert_eq!(ready, Encoded::new_secret(&message));
    }

    #[test]
    fn encoded_entries_are_those_of_the_message() {
        let entry = |id: &str| crate::types::Entry { id: id.into(), ..Default::default() };
        let head = crate::sync::WatchResponse { revision: 7, more: true, ..Default::default() };
        let encoded = [entry("a").encode_to_vec(), entry("b").encode_to_vec()];
        let ready = Encoded::with_entries(&head, None, encoded.iter().map(Vec::as_slice));
        let message = crate::sync::WatchResponse { entries: vec![entry("a"), entry("b")], ..head };
        assert_eq!(ready.decode().unwrap(), message);
    }

    /// Any message: a bit of `set` says for each field whether it is there.
    fn entry(set: u32) -> types::Entry {
        let has = |number: u32| set & 1 << number != 0;
        let id = |path: &str| Some(types::Spiffeid { trust_domain: "td".into(), path: path.into() });
        let selector = |value: &str| types::Selector { r#type: "unix".into(), value: value.into() };
        let texts = |number| if has(number) { vec!["one.example".to_owned(), String::new()] } else { Vec::new() };
        types::Entry {
            id: if has(1) { "id".into() } else { String::new() },
            spiffe_id: id("/workload").filter(|_| has(2)),
            parent_id: id("/agent").filter(|_| has(3)),
            selectors: if has(4) { vec![selector("uid:1"), selector("gid:2")] } else { Vec::new() },
            x509_svid_ttl: has(5).into(),
            federates_with: texts(6),
            admin: has(7),
            downstream: has(8),
            expires_at: if has(9) { -1 } else { 0 },
            dns_names: texts(10),
            revision_number: i64::from(has(11)) << 40,
            store_svid: has(12),
            jwt_svid_ttl: has(13).into(),
            hint: if has(14) { "hint".into() } else { String::new() },
            created_at: has(15).into(),
            additional_attributes: has(16).then(Default::default),
        }
    }

    proptest::proptest! {
        #[test]
        fn cutting_encoded_entries_is_masking_them(sets: Vec<u32>, wanted: u32) {
            let has = |number: u32| wanted & 1 << number != 0;
            let mask = types::EntryMask {
                spiffe_id: has(2),
                parent_id: has(3),
                selectors: has(4),
                x509_svid_ttl: has(5),
                federates_with: has(6),
                admin: has(7),
                downstream: has(8),
                expires_at: has(9),
                dns_names: has(10),
                revision_number: has(11),
                store_svid: has(12),
                jwt_svid_ttl: has(13),
                hint: has(14),
                created_at: has(15),
                additional_attributes: has(16),
            };
            let mut entries: Vec<_> = sets.into_iter().map(entry).collect();
            let encoded: Vec<_> = entries.iter().map(types::Entry::encode_to_vec).collect();
            let head = entry::SyncAuthorizedEntriesResponse { more: has(20), ..Default::default() };
            let ready = Encoded::with_entries(&head, Some(&mask), encoded.iter().map(Vec::as_slice));
            entries.iter_mut().for_each(|entry| crate::convert::mask_entry(entry, &mask));
            let whole = entry::SyncAuthorizedEntriesResponse { entries, ..head };
            proptest::prop_assert_eq!(ready.bytes().len(), whole.encoded_len());
            proptest::prop_assert_eq!(ready.decode().unwrap(), whole);
        }

        #[test]
        fn what_is_no_message_ends(bytes: Vec<u8>) {
            let found: usize = fields(&bytes).map(|(_, field)| field.len()).sum();
            proptest::prop_assert!(found <= bytes.len());
        }
    }

    #[test]
    fn debug_prints_no_secret() {
        let svid = workload::X509svid { x509_svid_key: Bytes::from_static(b"sesame"), ..Default::default() };
        let ready = Encoded::new(&workload::X509svidResponse { svids: vec![svid], ..Default::default() });
        for text in [format!("{ready:?}"), format!("{:?}", ready.decode().unwrap())] {
            assert!(!text.contains("sesame"), "{text}");
        }
    }
}
