//! Listening sockets that pass from one process to the next: over a private socket (`SCM_RIGHTS`) or from systemd
//! (`LISTEN_FDS`). A socket that is passed on never stops listening, so nobody who connects meanwhile is refused.

use crate::unix::{BindError, SocketFile, go_on, listen};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// Sockets in one message; the kernel's own limit is 253.
pub const SOCKETS_MAX: usize = 16;
/// A message, bytes.
const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// The first one that systemd passes.
const LISTEN_FDS_START: i32 = 3;
/// More than any unit has.
const PASSED_MAX: i32 = 1024;

/// Where the next process asks for the sockets. Only this user can.
pub struct HandoverListener {
    listener: UnixListener,
    file: SocketFile,
}

impl HandoverListener {
    /// Listens on `path`.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let (listener, file) = listen(path, 0o600, 0o755)?;
        Ok(Self { listener, file })
    }

    /// Goes on with the socket of the process before, in which those wait that asked meanwhile.
    pub fn adopt(socket: OwnedFd, path: &Path) -> Result<Self, BindError> {
        let (listener, file) = go_on(socket, path, 0o600)?;
        file.leave(false);
        Ok(Self { listener, file })
    }

    /// The socket, to pass it on.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Leaves its file, and those who wait, to the next process.
    pub fn leave(self) {
        self.file.leave(true);
    }

    /// The next process of this user that asks; others are hung up on.
    pub async fn accept(&self) -> io::Result<Channel> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            match Channel::new(stream) {
                Ok(channel) => return Ok(channel),
                Err(error) => tracing::warn!(%error, "Someone else asked for the sockets"),
            }
        }
    }
}

/// Between the process that has the sockets and the one that wants them: messages, each with its length, and files beside them.
pub struct Channel(UnixStream);

impl Channel {
    fn new(stream: UnixStream) -> io::Result<Self> {
        let uid = stream.peer_cred()?.uid();
        if uid == rustix::process::geteuid().as_raw() {
            return Ok(Self(stream));
        }
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the process at the other end belongs to uid {uid}"),
        ))
    }

    /// Connects to who listens on `path`; `None` if nobody does.
    ///
    /// # Errors
    /// When another user listens there, or a call failed.
    pub async fn connect(path: &Path) -> io::Result<Option<Self>> {
        match UnixStream::connect(path).await {
            Ok(stream) => Self::new(stream).map(Some),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a message with files.
    pub async fn send(&self, message: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let too_much = message.len() > MESSAGE_BYTES_MAX || files.len() > SOCKETS_MAX;
        let length = u32::try_from(message.len()).ok().filter(|_| !too_much).ok_or(io::ErrorKind::InvalidInput)?;
        let mut data = length.to_be_bytes().to_vec();
        data.extend_from_slice(message);
        let mut left = data.as_slice();
        let mut files = files;
        while !left.is_empty() {
            let sent = self.0.async_io(Interest::WRITABLE, || send_once(self.0.as_fd(), left, files)).await?;
            left = left.get(sent..).unwrap_or_default();
            files = &[]; // they went with the first byte
        }
        Ok(())
    }

    /// The next message with its files; `None` when the other end hung up.
    pub async fn receive(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        let mut files = Vec::new();
        let mut length = [0; 4];
        if !self.fill(&mut length, &mut files).await? {
            return Ok(None);
        }
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > MESSAGE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"));
        }
        let mut message = vec![0; length];
        if !self.fill(&mut message, &mut files).await? {
            return Ok(None);
        }
        Ok(Some((message, files)))
    }

    async fn fill(&self, mut to: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<bool> {
        while !to.is_empty() {
            let read = self.0.async_io(Interest::READABLE, || receive_once(self.0.as_fd(), to, files)).await?;
            if read == 0 {
                return Ok(false);
            }
            if files.len() > SOCKETS_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "too many files"));
            }
            to = to.get_mut(read..).unwrap_or_default();
        }
        Ok(true)
    }

    /// Returns when the other end has hung up; what it says before that is thrown away.
    pub async fn gone(&self) {
        while let Ok(Some(_)) = self.receive().await {}
    }
}

fn send_once(to: BorrowedFd<'_>, data: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(sendmsg(to, &[IoSlice::new(data)], &mut control, SendFlags::NOSIGNAL)?)
}

fn receive_once(from: BorrowedFd<'_>, to: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(from, &mut [IoSliceMut::new(to)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            files.extend(passed);
        }
    }
    Ok(received.bytes)
}

/// Keeps the sockets that systemd passed to this process from the programs that it starts. To be called before it starts any.
pub fn keep_from_children() {
    close_on_exec(passed());
}

/// The files that were passed to this process.
fn passed() -> Range<i32> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    let ours = number("LISTEN_PID").and_then(rustix::process::Pid::from_raw) == Some(rustix::process::getpid());
    let count = number("LISTEN_FDS").filter(|_| ours).unwrap_or(0);
    LISTEN_FDS_START..LISTEN_FDS_START + count.clamp(0, PASSED_MAX)
}

#[allow(unsafe_code)]
fn close_on_exec(files: Range<i32>) {
    for fd in files {
        // SAFETY: the flag changes nothing for whoever owns the file in this process; if nobody does, the call fails.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let _ = rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC);
    }
}

/// The listening unix sockets that systemd (or who else speaks its protocol) passed to this process, by their paths. To be
/// asked once, before the process opens files that it passes on.
#[allow(unsafe_code)]
pub fn from_service_manager() -> Vec<(PathBuf, OwnedFd)> {
    use std::os::fd::FromRawFd;
    let passed = passed();
    close_on_exec(passed.clone());
    let mut sockets = Vec::new();
    for fd in passed {
        // SAFETY: the protocol says that these are open and that this process is their owner; we are asked once.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if let Ok(path) = listens_on(fd.as_fd()) {
            sockets.push((path, fd));
        }
    }
    sockets
}

/// The path of a listening unix socket.
pub(crate) fn listens_on(socket: BorrowedFd<'_>) -> Result<PathBuf, Errno> {
    use std::os::unix::ffi::OsStrExt;
    if !rustix::net::sockopt::socket_acceptconn(socket)? {
        return Err(Errno::INVAL);
    }
    let address = rustix::net::SocketAddrUnix::try_from(rustix::net::getsockname(socket)?)?;
    let path = address.path_bytes().filter(|path| !path.is_empty()).ok_or(Errno::INVAL)?;
    Ok(PathBuf::from(std::ffi::OsStr::from_bytes(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_goes_on_listening_in_other_hands() {
        let dir = tempfile::tempdir().unwrap();
        let (private, public) = (dir.path().join("handover.sock"), dir.path().join("api.sock"));
        assert!(Channel::connect(&private).await.unwrap().is_none(), "nobody is there");
        let listener = HandoverListener::bind(&private).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(&public).unwrap();
        let (new, old) = tokio::join!(Channel::connect(&private), listener.accept());
        let (new, old) = (new.unwrap().unwrap(), old.unwrap());
        new.send(b"hello", &[]).await.unwrap();
        assert_eq!(old.receive().await.unwrap().unwrap().0, b"hello");
        old.send(&[7; 9000], &[socket.as_fd(), socket.as_fd()]).await.unwrap();
        let (message, mut files) = new.receive().await.unwrap().unwrap();
        assert_eq!((message.len(), files.len()), (9000, 2));
        let passed = files.pop().unwrap();
        assert_eq!(listens_on(passed.as_fd()).unwrap(), public);
        // Connected before the old one lets go, accepted by the new one.
        let _client = std::os::unix::net::UnixStream::connect(&public).unwrap();
        drop(socket);
        std::os::unix::net::UnixListener::from(passed).accept().unwrap();
        drop(old);
        new.gone().await;
        assert!(new.receive().await.unwrap().is_none());
    }

    #[test]
    fn what_was_passed_is_not_for_children() {
        use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().unwrap();
        let socket = std::os::unix::net::UnixListener::bind(dir.path().join("api.sock")).unwrap();
        fcntl_setfd(&socket, FdFlags::empty()).unwrap(); // as systemd passes it
        let number = socket.as_raw_fd();
        let inherited = || {
            let mut child = std::process::Command::new("test");
            child.arg("-S").arg(format!("/proc/self/fd/{number}")).status().unwrap().success()
        };
        assert!(inherited());
        close_on_exec(number..number + 1);
        assert!(!inherited());
        assert_eq!(fcntl_getfd(&socket).unwrap(), FdFlags::CLOEXEC);
    }

    #[tokio::test]
    async fn nonsense_is_refused() {
        let (one, other) = UnixStream::pair().unwrap();
        let (one, other) = (Channel::new(one).unwrap(), Channel::new(other).unwrap());
        assert!(one.send(&vec![0; MESSAGE_BYTES_MAX + 1], &[]).await.is_err());
        one.0.async_io(Interest::WRITABLE, || send_once(one.0.as_fd(), &[0xff; 4], &[])).await.unwrap();
        assert!(other.receive().await.is_err(), "longer than any message");
        assert!(listens_on(one.0.as_fd()).is_err(), "it does not listen");
    }
}
