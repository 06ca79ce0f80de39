//! Answers that are encoded once and sent to many streams as they are, and the codec that carries them.
//!
//! A view of the agent's cache changes seldom and has many watchers: its protobuf bytes are built when it changes
//! ([`Encoded::new`]); each stream then copies them into its frame and encodes nothing.

use crate::workload;
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
/// The ready-made form of [`crate::sync::WatchResponse`].
pub type WatchResponse = Encoded<crate::sync::WatchResponse>;

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

impl Encoded<crate::sync::WatchResponse> {
    /// `head`, which has no entries, followed by entries that are encoded already.
    pub fn with_entries<'a>(
        head: &crate::sync::WatchResponse,
        entries: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Self {
        const ENTRIES: u32 = 2;
        let overhead = 12; // tag and length, at most
        let size = head.encoded_len() + entries.clone().map(|e| e.len() + overhead).sum::<usize>();
        let mut bytes = Vec::with_capacity(size);
        head.encode_raw(&mut bytes);
        for entry in entries {
            prost::encoding::encode_key(ENTRIES, prost::encoding::WireType::LengthDelimited, &mut bytes);
            prost::encoding::encode_varint(entry.len() as u64, &mut bytes);
            bytes.extend_from_slice(entry);
        }
        Self { bytes: bytes.into(), message: PhantomData }
    }
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
        let ready = Encoded::with_entries(&head, encoded.iter().map(Vec::as_slice));
        let message = crate::sync::WatchResponse { entries: vec![entry("a"), entry("b")], ..head };
        assert_eq!(ready.decode().unwrap(), message);
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
