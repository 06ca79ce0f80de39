//! An upgrade without a gap: an agent that starts takes the listening sockets over from the one that runs.
//!
//! The new one asks on a private socket in the data directory. The old one writes down what it knows, passes its sockets on and
//! goes on serving; it does not renew its own SVID meanwhile, which both present. The new one makes itself ready and
//! accepts connections, says so, and only then the old one stops accepting, finishes the calls that are open, and ends. If
//! either ends before, the other one goes on as if nothing had been.
//!
//! Sockets that systemd passes (a `.socket` unit) are taken in the same way; then there need not be an old one.

use crate::Context;
use crate::cache::Cache;
use crate::error::AgentError;
use crate::sealed;
use crate::status::AgentStatus;
use finial_config::AgentSettings;
use finial_core::ErrorKind;
use finial_net::handover::{Channel, HandoverListener, SOCKETS_MAX, from_service_manager};
use finial_net::unix::Listening;
use rustix::fd::{AsFd, OwnedFd};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;

/// As log lines say it.
const SUBSYSTEM: &str = "handover";
/// The private socket's name below the data directory.
const SOCKET_NAME: &str = "handover.sock";
/// What is said, in this order. Another version says something else.
const PLEASE: &[u8] = b"finial-handover-1: the sockets, please";
const READY: &[u8] = b"ready";
const YOURS: &[u8] = b"yours";
/// How long the old one takes to answer: it may be renewing its SVID, or writing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the old one waits for the new one to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the old one takes to finish open calls and end.
const END_TIMEOUT: Duration = Duration::from_secs(15);

/// Sockets of this process that the next one may have, and those that it was given itself.
#[derive(Default)]
pub(crate) struct Sockets {
    given: Mutex<HashMap<PathBuf, OwnedFd>>,
    listening: Mutex<Vec<Listening>>,
    /// Copies, with their names.
    tcp: Mutex<Vec<(PathBuf, OwnedFd)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sockets {
    /// With sockets of another one.
    pub(crate) fn given(sockets: impl IntoIterator<Item = (PathBuf, OwnedFd)>) -> Self {
        Self { given: Mutex::new(sockets.into_iter().collect()), ..Self::default() }
    }

    /// The socket that was given to this process for `path`, once.
    pub(crate) fn take(&self, path: &Path) -> Option<OwnedFd> {
        lock(&self.given).remove(path)
    }

    /// Lets go of those that were given and that no API has taken: nobody would accept who connects.
    pub(crate) fn close_unused(&self) {
        for (path, _socket) in lock(&self.given).drain() {
            tracing::warn!(
                subsystem_name = SUBSYSTEM,
                address = %path.display(),
                "A socket was passed that is nothing's in the configuration; it is closed"
            );
        }
    }

    /// Remembers a socket that listens.
    pub(crate) fn add(&self, listening: Option<Listening>) {
        lock(&self.listening).extend(listening);
    }

    /// A TCP listener on `address`: the one that was given to this process, or a new one.
    pub(crate) fn tcp(&self, address: SocketAddr) -> io::Result<TcpListener> {
        // No path of a unix socket: those are absolute.
        let name = PathBuf::from(format!("tcp:{address}"));
        let given = self.take(&name).map(std::net::TcpListener::from);
        let listener = match given.filter(|l| l.local_addr().is_ok_and(|local| local == address)) {
            Some(listener) => {
                listener.set_nonblocking(true)?;
                TcpListener::from_std(listener)?
            }
            None => finial_net::tls::bind(address)?,
        };
        lock(&self.tcp).push((name, listener.as_fd().try_clone_to_owned()?));
        Ok(listener)
    }

    /// Lets go of all: from now on nobody can connect.
    pub(crate) fn close(&self) {
        lock(&self.listening).clear();
        lock(&self.tcp).clear();
    }

    fn leave_files(&self, leave: bool) {
        lock(&self.listening).iter().for_each(|l| l.leave_file(leave));
    }

    /// Copies of all, with their names; there is room for one more in a message.
    pub(crate) fn copies(&self) -> io::Result<(Vec<PathBuf>, Vec<OwnedFd>)> {
        let (unix, tcp) = (lock(&self.listening), lock(&self.tcp));
        let unix = unix.iter().map(|l| (l.path().to_owned(), l.socket()));
        let tcp = tcp.iter().map(|(name, socket)| (name.clone(), socket.as_fd()));
        let copies =
            unix.chain(tcp).take(SOCKETS_MAX - 1).map(|(name, socket)| Ok((name, socket.try_clone_to_owned()?)));
        Ok(copies.collect::<io::Result<Vec<_>>>()?.into_iter().unzip())
    }
}

/// What an agent that starts got from another one.
#[derive(Default)]
pub(crate) struct Inherited {
    pub(crate) sockets: Sockets,
    /// To the agent that still serves.
    old: Option<Channel>,
    /// It has ended.
    over: AtomicBool,
    /// Where the next one asks. Some may have asked already.
    door: Mutex<Option<OwnedFd>>,
    /// Files of sockets are the service manager's.
    managed: bool,
}

/// Asks for the sockets: systemd, then the agent that runs on the same data. Where neither answers there are none.
pub(crate) async fn ask(settings: &AgentSettings) -> Inherited {
    let mut inherited = Inherited::default();
    for (path, socket) in from_service_manager() {
        tracing::info!(subsystem_name = SUBSYSTEM, address = %path.display(), "A socket was passed by the service manager");
        lock(&inherited.sockets.given).insert(path, socket);
        inherited.managed = true;
    }
    if !settings.handover {
        return inherited;
    }
    let door = settings.data_dir.join(SOCKET_NAME);
    match tokio::time::timeout(ANSWER_TIMEOUT, ask_old(&door)).await {
        Ok(Ok(Some((old, mut sockets)))) => {
            *lock(&inherited.door) = sockets.remove(&door);
            tracing::info!(subsystem_name = SUBSYSTEM, sockets = sockets.len(), "Taking over from the agent that runs");
            let managed = std::mem::take(&mut *lock(&inherited.sockets.given));
            Inherited { sockets: Sockets::given(managed.into_iter().chain(sockets)), old: Some(old), ..inherited }
        }
        Ok(Ok(None)) => inherited,
        Ok(Err(error)) => {
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, "The agent that runs does not hand its sockets over");
            inherited
        }
        Err(_) => {
            tracing::warn!(subsystem_name = SUBSYSTEM, "The agent that runs does not answer");
            inherited
        }
    }
}

async fn ask_old(path: &Path) -> io::Result<Option<(Channel, HashMap<PathBuf, OwnedFd>)>> {
    let Some(old) = Channel::connect(path).await? else { return Ok(None) };
    old.send(PLEASE, &[]).await?;
    let refused = || io::Error::new(io::ErrorKind::ConnectionRefused, "it hung up");
    let (paths, files) = old.receive().await?.ok_or_else(refused)?;
    let paths: Vec<PathBuf> = serde_json::from_slice(&paths)?;
    if paths.len() != files.len() {
        let text = format!("of {} sockets {} came: this process may not open more files", paths.len(), files.len());
        return Err(io::Error::other(text));
    }
    Ok(Some((old, paths.into_iter().zip(files).collect())))
}

impl Inherited {
    /// Whether another agent still serves.
    pub(crate) fn is_from_agent(&self) -> bool {
        self.old.is_some()
    }

    /// Whether the own SVID is this agent's alone. If the old one goes on after all, it does so with the SVID that both present.
    pub(crate) fn may_renew(&self) -> bool {
        self.old.is_none() || self.over.load(Ordering::Relaxed)
    }

    /// This agent accepts connections: the old one is to end, and has ended when this returns (or is late with it).
    pub(crate) async fn ready(&self) -> Result<(), AgentError> {
        let Some(old) = &self.old else { return Ok(()) };
        let asked = async {
            old.send(READY, &[]).await?;
            old.receive().await
        };
        let agreed = tokio::time::timeout(ANSWER_TIMEOUT, asked).await;
        if !matches!(&agreed, Ok(Ok(Some((word, _)))) if word == YOURS) {
            let text =
                "the agent that ran before took its sockets back, as this one was not ready in time, or has ended";
            return Err(AgentError::new(ErrorKind::Unavailable, text));
        }
        self.sockets.leave_files(self.managed);
        if tokio::time::timeout(END_TIMEOUT, old.gone()).await.is_err() {
            tracing::warn!(subsystem_name = SUBSYSTEM, "The agent that ran before takes long to end");
        }
        self.over.store(true, Ordering::Relaxed);
        tracing::info!(subsystem_name = SUBSYSTEM, "Took over from the agent that ran before");
        Ok(())
    }
}

/// Hands the sockets over to the next agent on the same data, when it asks; then this one is to end, and the next one sees by
/// the end of the connection when it has.
pub(crate) async fn offer(context: &Arc<Context>, cache: &Cache, status: &AgentStatus) -> Option<Channel> {
    if !context.settings.handover {
        return None;
    }
    let path = context.settings.data_dir.join(SOCKET_NAME);
    let adopted = lock(&context.inherited.door).take().and_then(|door| HandoverListener::adopt(door, &path).ok());
    let listener = match adopted.map_or_else(|| HandoverListener::bind(&path), Ok) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, "The next agent cannot take this one's sockets over");
            return None;
        }
    };
    let door = (path.as_path(), &listener);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = context.shutdown.cancelled() => return None,
        };
        let Ok(new) = accepted else {
            tokio::time::sleep(Duration::from_secs(1)).await; // no files left
            continue;
        };
        let handed = tokio::select! {
            handed = hand_over(context, cache, status, &new, door) => handed,
            () = context.shutdown.cancelled() => return None,
        };
        match handed {
            Ok(()) => {
                tracing::info!(subsystem_name = SUBSYSTEM, "The next agent serves; this one ends");
                context.inherited.sockets.leave_files(true);
                listener.leave();
                context.shutdown.trigger();
                return Some(new);
            }
            Err(error) => {
                context.sealed.go_on();
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, "The next agent did not take over; this one goes on");
            }
        }
    }
}

async fn hand_over(
    context: &Arc<Context>,
    cache: &Cache,
    status: &AgentStatus,
    new: &Channel,
    (path, door): (&Path, &HandoverListener),
) -> Result<(), AgentError> {
    if within(ANSWER_TIMEOUT, hear(new)).await? != PLEASE {
        return Err(AgentError::internal("it speaks another version"));
    }
    tracing::info!(subsystem_name = SUBSYSTEM, "The next agent asks for the sockets");
    // The SVID that both present stays the same until it is clear whose it is.
    let _renewal = within(ANSWER_TIMEOUT, async { Ok(context.renewal.lock().await) }).await?;
    let write = async {
        sealed::write_last(context, cache, status).await;
        Ok(())
    };
    within(ANSWER_TIMEOUT, write).await?;
    let (mut names, copies) = context.inherited.sockets.copies().map_err(failed)?;
    // Who asks while neither listens is heard by the next one.
    names.push(path.to_owned());
    let message = serde_json::to_vec(&names).map_err(|e| AgentError::internal(e.to_string()))?;
    let files: Vec<_> = copies.iter().map(OwnedFd::as_fd).chain([door.socket()]).collect();
    within(ANSWER_TIMEOUT, async { new.send(&message, &files).await.map_err(failed) }).await?;
    drop(copies);
    if within(READY_TIMEOUT, hear(new)).await? != READY {
        return Err(AgentError::internal("it says something strange"));
    }
    within(ANSWER_TIMEOUT, async { new.send(YOURS, &[]).await.map_err(failed) }).await
}

async fn within<T>(time: Duration, step: impl Future<Output = Result<T, AgentError>>) -> Result<T, AgentError> {
    let silent = |_| AgentError::new(ErrorKind::Timeout, "it took too long");
    tokio::time::timeout(time, step).await.map_err(silent)?
}

/// The other one's next word.
async fn hear(other: &Channel) -> Result<Vec<u8>, AgentError> {
    let said = other.receive().await.map_err(failed)?;
    said.map(|(word, _)| word).ok_or_else(|| AgentError::internal("it hung up"))
}

fn failed(error: io::Error) -> AgentError {
    AgentError::internal(error.to_string()).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn a_socket_that_nothing_takes_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["taken.sock", "left.sock"].map(|name| dir.path().join(name));
        let bound = |path: &PathBuf| (path.clone(), OwnedFd::from(UnixListener::bind(path).unwrap()));
        let sockets = Sockets::given(paths.iter().map(bound));
        let [taken, left] = &paths;
        let _socket = sockets.take(taken).unwrap();
        sockets.close_unused();
        assert!(UnixStream::connect(taken).is_ok());
        assert_eq!(UnixStream::connect(left).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert!(sockets.take(left).is_none());
    }

    #[tokio::test]
    async fn the_svid_is_not_renewed_before_the_old_agent_has_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SOCKET_NAME);
        let door = HandoverListener::bind(&path).unwrap();
        let (new, old) = tokio::join!(Channel::connect(&path), door.accept());
        let (new, old) = (new.unwrap().unwrap(), old.unwrap());
        let inherited = Inherited { old: Some(new), ..Inherited::default() };
        let serve = async {
            assert_eq!(hear(&old).await.unwrap(), READY);
            assert!(!inherited.may_renew());
            old.send(YOURS, &[]).await.unwrap();
            drop(old);
        };
        let (ready, ()) = tokio::join!(inherited.ready(), serve);
        ready.unwrap();
        assert!(inherited.may_renew() && Inherited::default().may_renew());
    }
}
