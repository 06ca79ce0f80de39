//! Listening on unix sockets.

use crate::accept::AcceptBackoff;
use crate::authority::AuthorityFilter;
use crate::guard::{Guarded, Limits, counted, delegate_io};
pub use crate::peer::{PeerError, PeerHandle, PeerInfo};
use finial_runtime::Places;
use futures::stream::{BoxStream, Stream, StreamExt};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tokio::net::{UnixListener, UnixSocket, UnixStream};
use tonic::transport::server::Connected;

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 1024;
/// The socket, the pidfd and the folder of the process.
const FILES_PER_CONNECTION: u64 = 3;

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process answers there.
    #[error("another process listens on {0}; stop it, or choose another path")]
    InUse(PathBuf),
    /// Something else is there, and it is not ours to remove.
    #[error("{0} exists and is not a socket; remove it, or choose another path")]
    NotASocket(PathBuf),
    /// Others may connect there than are meant to.
    #[error(
        "the socket {path} that was passed to this process has mode {found:04o}, which lets more users in than {most:04o}; \
        correct it, in a .socket unit of systemd's with SocketMode={most:04o}"
    )]
    TooOpen {
        /// The socket.
        path: PathBuf,
        /// Its mode.
        found: u32,
        /// What it may be at most.
        most: u32,
    },
    /// A call failed.
    #[error("cannot {what} {path}: {}", finial_runtime::errno_text(error))]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// Binds `path` with permissions `mode`, after making its missing parent folders with `dir_mode`. A socket that nobody
/// listens on any more is replaced. Nobody can connect before the permissions are set. The file goes away with the
/// returned stream.
pub fn bind(path: &Path, mode: u32, dir_mode: u32, limits: Limits) -> Result<UnixIncoming, BindError> {
    let (listener, file) = listen(path, mode, dir_mode)?;
    UnixIncoming::new(listener, file, limits.within_files(FILES_PER_CONNECTION))
}

/// Goes on with a socket that another process opened on `path`, with permissions `mode` at most. Its file is left where
/// it is at the end, until [`Listening::leave_file`] says otherwise.
///
/// # Errors
/// When `socket` does not listen on `path`, the file there is gone, or it lets more users in. (It is too late to shut them
/// out then: they may have connected already.)
pub fn adopt(socket: OwnedFd, path: &Path, mode: u32, limits: Limits) -> Result<UnixIncoming, BindError> {
    let (listener, file) = go_on(socket, path, mode)?;
    UnixIncoming::new(listener, file, limits.within_files(FILES_PER_CONNECTION))
}

/// Listens with a socket that another process opened.
pub(crate) fn go_on(socket: OwnedFd, path: &Path, mode: u32) -> Result<(UnixListener, SocketFile), BindError> {
    let failed = |error: io::Error| BindError::Io { what: "take over", path: path.to_owned(), error };
    if crate::handover::listens_on(socket.as_fd()).map_err(|e| failed(e.into()))? != path {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it listens elsewhere")));
    }
    let file = SocketFile::of(path).map_err(failed)?;
    // Whatever comes of it, it is not ours yet.
    file.leave.store(true, Ordering::SeqCst);
    let found = fs::symlink_metadata(path).map_err(failed)?.permissions().mode() & 0o777;
    if found & !mode != 0 {
        return Err(BindError::TooOpen { path: path.to_owned(), found, most: mode });
    }
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener.set_nonblocking(true).map_err(failed)?;
    let listener = UnixListener::from_std(listener).map_err(failed)?;
    Ok((listener, file))
}

pub(crate) fn listen(path: &Path, mode: u32, dir_mode: u32) -> Result<(UnixListener, SocketFile), BindError> {
    let failed = |what| move |error| BindError::Io { what, path: path.to_owned(), error };
    if let Some(dir) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(dir_mode).create(dir).map_err(failed("create the folder of"))?;
    }
    remove_stale(path)?;
    let socket = UnixSocket::new_stream().map_err(failed("open a socket for"))?;
    socket.bind(path).map_err(failed("bind"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("set the permissions of"))?;
    let file = SocketFile::of(path).map_err(failed("look at"))?;
    let listener = socket.listen(BACKLOG).map_err(failed("listen on"))?;
    Ok((listener, file))
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |what| move |error| BindError::Io { what, path: path.to_owned(), error };
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("look at")(e)),
    };
    if !meta.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match probe(path) {
        // One that hangs, and has no room for more.
        Ok(()) | Err(Errno::AGAIN) => Err(BindError::InUse(path.to_owned())),
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed("remove the old")),
        Err(e) => Err(failed("probe")(e.into())),
    }
}

/// Connects, without waiting.
fn probe(path: &Path) -> Result<(), Errno> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)
}

/// The file of a socket; removed on drop unless another one has its place by then, or it is to be left.
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
    leave: Arc<AtomicBool>,
}

impl SocketFile {
    /// Whether it stays.
    pub(crate) fn leave(&self, leave: bool) {
        self.leave.store(leave, Ordering::SeqCst);
    }

    fn of(path: &Path) -> io::Result<Self> {
        let at = fs::symlink_metadata(path)?;
        if !at.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a socket"));
        }
        Ok(Self { path: path.to_owned(), device: at.dev(), inode: at.ino(), leave: Arc::default() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |m: fs::Metadata| (m.dev(), m.ino()) == (self.device, self.inode);
        if !self.leave.load(Ordering::SeqCst) && fs::symlink_metadata(&self.path).is_ok_and(ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A second hand on a socket that listens, to pass it to another process.
pub struct Listening {
    socket: OwnedFd,
    path: PathBuf,
    leave: Arc<AtomicBool>,
}

impl Listening {
    /// On what it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether its file stays when this process stops listening.
    pub fn leave_file(&self, leave: bool) {
        self.leave.store(leave, Ordering::SeqCst);
    }
}

/// The connections to a unix socket, each with its peer. Never ends and never yields an error: a peer that cannot be
/// identified, or that is one too many, is hung up on.
pub struct UnixIncoming {
    connections: BoxStream<'static, io::Result<UnixConnection>>,
    listening: Option<Listening>,
}

impl UnixIncoming {
    fn new(listener: UnixListener, file: SocketFile, limits: Limits) -> Result<Self, BindError> {
        let failed = |error| BindError::Io { what: "duplicate the socket of", path: file.path.clone(), error };
        let socket = listener.as_fd().try_clone_to_owned().map_err(failed)?;
        let listening = Some(Listening { socket, path: file.path.clone(), leave: file.leave.clone() });
        let places = counted(&limits);
        let state = (listener, file, places, AcceptBackoff::default());
        let stream = futures::stream::unfold(state, move |(listener, file, places, mut backoff)| async move {
            loop {
                let Some((stream, _)) = backoff.note(listener.accept().await).await else { continue };
                if let Some(connection) = identify(stream, &places, limits) {
                    return Some((Ok(connection), (listener, file, places, backoff)));
                }
            }
        });
        Ok(Self { connections: stream.boxed(), listening })
    }

    /// The second hand on the socket, once. While it is held, connections queue up although nobody accepts them.
    pub fn listening(&mut self) -> Option<Listening> {
        self.listening.take()
    }
}

fn identify(stream: UnixStream, places: &Arc<Places<u32>>, limits: Limits) -> Option<UnixConnection> {
    let peer = match PeerInfo::of(&stream) {
        Ok(peer) => peer,
        Err(error) => {
            tracing::warn!(%error, "Connection failed during accept");
            return None;
        }
    };
    let Some(admitted) = places.take(peer.uid).map(Into::into) else {
        tracing::warn!(uid = peer.uid, pid = peer.pid, "Too many connections; this one was closed");
        return None;
    };
    Some(UnixConnection { stream: AuthorityFilter::new(Guarded::new(stream, &limits, admitted)), peer })
}

impl Stream for UnixIncoming {
    type Item = io::Result<UnixConnection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.connections.poll_next_unpin(cx)
    }
}

/// A connection to a unix socket. Requests on it carry a [`PeerInfo`] extension.
pub struct UnixConnection {
    stream: AuthorityFilter<Guarded<UnixStream>>,
    peer: PeerInfo,
}

impl UnixConnection {
    /// What it sends as it is, for what is not HTTP/2. Nothing may have been read yet.
    pub(crate) fn into_stream(self) -> Guarded<UnixStream> {
        self.stream.into_inner()
    }

    /// The process at the other end.
    pub fn peer(&self) -> &PeerInfo {
        &self.peer
    }
}

impl Connected for UnixConnection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

delegate_io!(UnixConnection);
