//! A D-Bus client as small as `systemd` needs it: method calls over a unix socket, one after another.
//!
//! The crate zbus would do it, and makes the agent larger by 2 MiB, of the 0.5 that it may still grow
//! (docs/adr/0011-a-small-d-bus-client.md). What a bus sends is not trusted: sizes are limited, offsets are checked.

use std::fmt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Where the system bus is when nothing else is said.
const SYSTEM_BUS: &str = "unix:path=/var/run/dbus/system_bus_socket";
/// The largest message taken; answers here have some hundred bytes.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// How many messages that answer nothing of ours (signals, late answers) are read over before the bus counts as confused.
const STRAY_MESSAGES_MAX: usize = 256;
/// The longest line of the authentication.
const LINE_BYTES_MAX: usize = 1024;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum BusError {
    /// The connection is of no use any more.
    #[error("{0}")]
    Connection(#[from] std::io::Error),
    /// The bus does not speak as it should; the connection is of no use any more.
    #[error("the bus sent {0}")]
    Protocol(&'static str),
    /// The bus does not let us in.
    #[error("the bus refused the authentication: {0}")]
    Refused(String),
    /// No address of the system bus can be used.
    #[error("no usable address in {0:?}")]
    Address(String),
    /// Whom we asked answered with an error; the connection is good.
    #[error("{message}")]
    Reply {
        /// What it says.
        message: String,
    },
}

/// The addresses of the system bus.
pub(super) fn system_bus() -> String {
    std::env::var("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_else(|_| SYSTEM_BUS.to_owned())
}

/// A method, and whose it is.
#[derive(Clone, Copy)]
pub(super) struct Method<'a> {
    pub(super) destination: &'a str,
    pub(super) path: &'a str,
    pub(super) interface: &'a str,
    pub(super) member: &'a str,
}

/// What is given to a method.
#[derive(Clone, Copy)]
pub(super) enum Arguments<'a> {
    None,
    Number(u32),
    Texts(&'a [&'a str]),
}

/// A connection to a bus.
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bus")
    }
}

impl Bus {
    /// Connects to the first of the addresses (`unix:path=…;…`) that can be, and says who we are.
    pub(super) async fn connect(addresses: &str) -> Result<Self, BusError> {
        let mut error = BusError::Address(addresses.to_owned());
        for address in addresses.split(';') {
            let Some(path) = socket_path(address) else { continue };
            match UnixStream::connect(path).await {
                Ok(stream) => return Self::enter(stream).await,
                Err(e) => error = e.into(),
            }
        }
        Err(error)
    }

    async fn enter(stream: UnixStream) -> Result<Self, BusError> {
        let mut bus = Self { stream, serial: 0 };
        // The user's number in digits, those in hexadecimal: `0` is `30`.
        let uid = finial_crypto::hex(rustix::process::geteuid().as_raw().to_string().as_bytes());
        bus.stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes()).await?;
        let answer = bus.line().await?;
        if !answer.starts_with("OK ") {
            return Err(BusError::Refused(answer));
        }
        bus.stream.write_all(b"BEGIN\r\n").await?;
        let hello = Method {
            destination: "org.freedesktop.DBus",
            path: "/org/freedesktop/DBus",
            interface: "org.freedesktop.DBus",
            member: "Hello",
        };
        bus.call(hello, Arguments::None).await?;
        Ok(bus)
    }

    /// A line of the authentication. Byte by byte: nothing of what follows may be taken.
    async fn line(&mut self) -> Result<String, BusError> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            if line.len() >= LINE_BYTES_MAX {
                return Err(BusError::Protocol("too long a line"));
            }
            line.push(self.stream.read_u8().await?);
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    /// Asks and waits for the answer.
    pub(super) async fn call(&mut self, method: Method<'_>, arguments: Arguments<'_>) -> Result<Body, BusError> {
        self.serial = self.serial.checked_add(1).ok_or(BusError::Protocol("too much for one connection"))?;
        let serial = self.serial;
        self.stream.write_all(&encode(serial, method, arguments)).await?;
        for _ in 0..STRAY_MESSAGES_MAX {
            let message = self.message().await?;
            if message.answers != Some(serial) {
                continue;
            }
            return match message.kind {
                METHOD_RETURN => Ok(message.body),
                ERROR => {
                    let said = message.body.text().ok();
                    let name = message.error.unwrap_or_else(|| "an error without a name".to_owned());
                    Err(BusError::Reply { message: said.filter(|said| !said.is_empty()).unwrap_or(name) })
                }
                _ => Err(BusError::Protocol("an answer that is none")),
            };
        }
        Err(BusError::Protocol("too many messages that nobody asked for"))
    }

    async fn message(&mut self) -> Result<Message, BusError> {
        let mut start = [0; 16];
        self.stream.read_exact(&mut start).await?;
        let [order, kind, _flags, version, ..] = start;
        let big_endian = match order {
            b'l' => false,
            b'B' => true,
            _ => return Err(BusError::Protocol("what is no message")),
        };
        if version != 1 {
            return Err(BusError::Protocol("another version of the protocol"));
        }
        let mut lengths = Reader { bytes: &start, at: 4, big_endian };
        let body_length = lengths.number()? as usize;
        let _serial = lengths.number()?;
        let fields_length = lengths.number()? as usize;
        if body_length > MESSAGE_BYTES_MAX || fields_length > MESSAGE_BYTES_MAX {
            return Err(BusError::Protocol("too large a message"));
        }
        // The header is filled up to a multiple of eight.
        let mut rest = vec![0; fields_length.next_multiple_of(8) + body_length];
        self.stream.read_exact(&mut rest).await?;
        let body = rest.split_off(fields_length.next_multiple_of(8));
        rest.truncate(fields_length);
        let mut message = Message {
            kind,
            answers: None,
            error: None,
            body: Body { signature: String::new(), bytes: body, big_endian },
        };
        // The fields begin at a multiple of eight, so offsets within them align as in the message.
        message.take_fields(&mut Reader { bytes: &rest, at: 0, big_endian })?;
        Ok(message)
    }
}

/// The socket of an address of the form `unix:path=…` or `unix:abstract=…`.
fn socket_path(address: &str) -> Option<std::ffi::OsString> {
    use std::os::unix::ffi::OsStringExt;
    let values = address.strip_prefix("unix:")?;
    let value = |key: &str| values.split(',').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
    let bytes = match (value("path"), value("abstract")) {
        (Some(path), None) => unescape(path)?,
        // A name that begins with a zero byte is an abstract one.
        (None, Some(name)) => [vec![0], unescape(name)?].concat(),
        _ => return None,
    };
    Some(std::ffi::OsString::from_vec(bytes))
}

/// `%2f` is `/`.
fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        // A sign would be read as part of a number.
        digits.bytes().all(|b| b.is_ascii_hexdigit()).then_some(())?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend(rest.as_bytes());
    }
    Some(bytes)
}

const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;

const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// A method call, little-endian.
fn encode(serial: u32, method: Method<'_>, arguments: Arguments<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    let signature = match arguments {
        Arguments::None => String::new(),
        Arguments::Number(number) => {
            put_number(&mut body, number);
            "u".to_owned()
        }
        Arguments::Texts(texts) => {
            texts.iter().for_each(|text| put_text(&mut body, text));
            "s".repeat(texts.len())
        }
    };
    let mut fields = Vec::new();
    let texts = [
        (PATH, b'o', method.path),
        (INTERFACE, b's', method.interface),
        (MEMBER, b's', method.member),
        (DESTINATION, b's', method.destination),
    ];
    for (code, kind, text) in texts {
        pad(&mut fields, 8);
        fields.extend([code, 1, kind, 0]);
        put_text(&mut fields, text);
    }
    if !signature.is_empty() {
        pad(&mut fields, 8);
        fields.extend([SIGNATURE, 1, b'g', 0, signature.len() as u8]);
        fields.extend(signature.as_bytes());
        fields.push(0);
    }
    let mut message = vec![b'l', METHOD_CALL, 0, 1];
    put_number(&mut message, body.len() as u32);
    put_number(&mut message, serial);
    put_number(&mut message, fields.len() as u32);
    message.extend(fields);
    pad(&mut message, 8);
    message.extend(body);
    message
}

fn pad(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}

fn put_number(bytes: &mut Vec<u8>, number: u32) {
    pad(bytes, 4);
    bytes.extend(number.to_le_bytes());
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    put_number(bytes, text.len() as u32);
    bytes.extend(text.as_bytes());
    bytes.push(0);
}

/// A message that came in.
struct Message {
    kind: u8,
    answers: Option<u32>,
    error: Option<String>,
    body: Body,
}

impl Message {
    fn take_fields(&mut self, fields: &mut Reader<'_>) -> Result<(), BusError> {
        while fields.at < fields.bytes.len() {
            fields.align(8);
            let code = fields.byte()?;
            let kind = fields.signature()?;
            match kind.as_str() {
                "s" | "o" => {
                    let text = fields.text()?;
                    if code == ERROR_NAME {
                        self.error = Some(text);
                    }
                }
                "u" => {
                    let number = fields.number()?;
                    if code == REPLY_SERIAL {
                        self.answers = Some(number);
                    }
                }
                "g" => {
                    let signature = fields.signature()?;
                    if code == SIGNATURE {
                        self.body.signature = signature;
                    }
                }
                _ => return Err(BusError::Protocol("a header field of an unknown type")),
            }
        }
        Ok(())
    }
}

/// What a method answered.
pub(super) struct Body {
    signature: String,
    bytes: Vec<u8>,
    big_endian: bool,
}

impl Body {
    /// The first value, which must be a string.
    pub(super) fn text(&self) -> Result<String, BusError> {
        self.first('s', "an answer that is no string")?.text()
    }

    /// The first value, which must be the path of an object.
    pub(super) fn object_path(&self) -> Result<String, BusError> {
        let path = self.first('o', "an answer that is no object path")?.text()?;
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'/';
        let valid = path.starts_with('/') && path.bytes().all(allowed);
        if valid { Ok(path) } else { Err(BusError::Protocol("an object path that is none")) }
    }

    /// The string in the variant that the first value must be. `Ok(Err(signature))` when something else is in it.
    pub(super) fn text_in_variant(&self) -> Result<Result<String, String>, BusError> {
        let mut reader = self.first('v', "an answer that is no variant")?;
        let signature = reader.signature()?;
        if signature != "s" { Ok(Err(signature)) } else { reader.text().map(Ok) }
    }

    fn first(&self, kind: char, otherwise: &'static str) -> Result<Reader<'_>, BusError> {
        let reader = Reader { bytes: &self.bytes, at: 0, big_endian: self.big_endian };
        if self.signature.starts_with(kind) { Ok(reader) } else { Err(BusError::Protocol(otherwise)) }
    }
}

/// Reads values in the order in which they lie in a message.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    big_endian: bool,
}

impl<'a> Reader<'a> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], BusError> {
        let end = self.at.saturating_add(count);
        let taken = self.bytes.get(self.at..end).ok_or(BusError::Protocol("a message that ends too early"))?;
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, BusError> {
        Ok(self.take(1)?.first().copied().unwrap_or_default())
    }

    fn number(&mut self) -> Result<u32, BusError> {
        self.align(4);
        let bytes: [u8; 4] = self.take(4)?.try_into().unwrap_or_default();
        Ok(if self.big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    }

    fn text(&mut self) -> Result<String, BusError> {
        let length = self.number()? as usize;
        self.ended(length)
    }

    fn signature(&mut self) -> Result<String, BusError> {
        let length = usize::from(self.byte()?);
        self.ended(length)
    }

    /// A text of this length, and the zero byte behind it.
    fn ended(&mut self, length: usize) -> Result<String, BusError> {
        let text = self.take(length)?.to_vec();
        self.take(1)?;
        String::from_utf8(text).map_err(|_| BusError::Protocol("a text that is none"))
    }
}

#[cfg(test)]
#[path = "dbus_tests.rs"]
mod tests;
