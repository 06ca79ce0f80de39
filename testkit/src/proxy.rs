//! A TCP proxy on loopback that can break in the ways networks break, and balance between several targets.

use crate::process::{eventually, free_port};
use rustix::net::{Shutdown, listen, shutdown, sockopt};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown as How, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// What the proxy does with connections and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// Passes all on.
    Fair,
    /// Holds each piece of data from the caller's side for so long before passing it on, on old and new connections:
    /// about this much is added to every round trip.
    Slow(Duration),
    /// Takes connections and bytes and passes nothing on, in either direction, until the weather changes.
    Hung,
    /// New connections are refused by the kernel, as where nothing listens. Old ones go on (see [`Proxy::cut`]).
    Refusing,
}

/// A TCP proxy; its port stays the same for as long as it lives.
pub struct Proxy {
    shared: Arc<Shared>,
    port: u16,
}

struct Shared {
    listener: TcpListener,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    weather: Weather,
    targets: Vec<SocketAddr>,
    /// Which target is next.
    turn: usize,
    accepted: HashMap<SocketAddr, u64>,
    /// How often connections were cut.
    cuts: u64,
    open: Vec<Arc<Connection>>,
    closed: bool,
    held: Option<HeldAnswer>,
}

/// An answer that is not passed on, nor anything after it on its connection.
struct HeldAnswer {
    /// How what it answers ends.
    ends: &'static str,
    /// How many such pieces of data are still to be let pass.
    skip: u32,
    /// Where it came.
    connection: Option<Arc<Connection>>,
    /// It was passed on to the target.
    asked: bool,
}

struct Connection {
    caller: TcpStream,
    target: TcpStream,
    to: SocketAddr,
    /// Ended by the proxy: by a reset, not by an orderly end.
    cut: std::sync::atomic::AtomicBool,
}

impl Proxy {
    /// A proxy to one port on 127.0.0.1.
    pub fn to(port: u16) -> Self {
        Self::balancing(&[port])
    }

    /// A balancer over ports on 127.0.0.1: each new connection goes to the next in turn that takes it.
    pub fn balancing(ports: &[u16]) -> Self {
        // Bound by number: the kernel takes a port of its own choice away when the listener is shut.
        let bind = || TcpListener::bind(("127.0.0.1", free_port())).map_err(|e| e.to_string());
        let listener = eventually("a port to listen on", bind);
        let port = listener.local_addr().expect("bound").port();
        let state = State {
            weather: Weather::Fair,
            targets: addresses(ports),
            turn: 0,
            accepted: HashMap::new(),
            cuts: 0,
            open: Vec::new(),
            closed: false,
            held: None,
        };
        let shared = Arc::new(Shared { listener, state: Mutex::new(state), changed: Condvar::new() });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || accepting.accept());
        Self { shared, port }
    }

    /// The port on 127.0.0.1 that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Changes the weather, for old and new connections.
    pub fn weather(&self, weather: Weather) {
        let mut state = self.shared.lock();
        if state.weather == Weather::Refusing && weather != Weather::Refusing {
            listen(&self.shared.listener, BACKLOG).expect("listen again");
        }
        if weather == Weather::Refusing {
            let _ = shutdown(&self.shared.listener, Shutdown::Read); // the port stays bound
        }
        state.weather = weather;
        self.shared.changed.notify_all();
    }

    /// Where new connections go from now on; old ones go on.
    pub fn set_targets(&self, ports: &[u16]) {
        self.shared.lock().targets = addresses(ports);
    }

    /// Resets all connections, or those to one port; gives how many. One that is only being made does not outlive this
    /// either: it might go where none should from now on.
    pub fn cut(&self, to: Option<u16>) -> usize {
        let mut state = self.shared.lock();
        state.cuts += 1;
        let (cut, stay): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.open).into_iter().partition(|c| to.is_none_or(|port| c.to.port() == port));
        state.open = stay;
        cut.iter().for_each(|c| c.cut());
        cut.len()
    }

    /// From now on, what the target answers to the `nth` piece of data (from 1) that ends with these words (zeros do not
    /// count) stays here: it was done, and the caller does not hear of it. Before [`Proxy::release`].
    pub fn hold_answer(&self, ends: &'static str, nth: u32) {
        let held = HeldAnswer { ends, skip: nth.saturating_sub(1), connection: None, asked: false };
        self.shared.lock().held = Some(held);
    }

    /// Whether that was asked.
    pub fn holds_answer(&self) -> bool {
        self.shared.lock().held.as_ref().is_some_and(|held| held.asked)
    }

    /// Holds nothing back any more.
    pub fn release(&self) {
        self.shared.lock().held = None;
        self.shared.changed.notify_all();
    }

    /// How many connections are open, to all targets or to one port.
    pub fn open(&self, to: Option<u16>) -> usize {
        self.shared.lock().open.iter().filter(|c| to.is_none_or(|port| c.to.port() == port)).count()
    }

    /// How many connections a target has been given so far.
    pub fn accepted(&self, port: u16) -> u64 {
        let state = self.shared.lock();
        addresses(&[port]).iter().find_map(|a| state.accepted.get(a)).copied().unwrap_or_default()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.open.drain(..).for_each(|c| c.cut());
        let _ = shutdown(&self.shared.listener, Shutdown::Read); // wakes the accepting thread
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>) {
        loop {
            let accepted = self.listener.accept();
            let mut state = self.lock();
            while state.weather == Weather::Refusing && !state.closed {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closed {
                return;
            }
            drop(state);
            if let Ok((caller, _)) = accepted {
                let shared = Arc::clone(&self);
                std::thread::spawn(move || shared.serve(caller));
            }
        }
    }

    fn serve(self: Arc<Self>, caller: TcpStream) {
        let Some(connection) = self.connect(caller) else { return };
        let (up, shared) = (Arc::clone(&connection), Arc::clone(&self));
        let upwards = std::thread::spawn(move || shared.pump(&up, true));
        self.pump(&connection, false);
        let _ = upwards.join();
        self.lock().open.retain(|c| !Arc::ptr_eq(c, &connection));
    }

    /// Connects to the first target in turn that takes it.
    fn connect(&self, caller: TcpStream) -> Option<Arc<Connection>> {
        let (order, cuts) = {
            let mut state = self.lock();
            let count = state.targets.len();
            let first = state.turn;
            state.turn = state.turn.wrapping_add(1);
            let order = (0..count).filter_map(|i| state.targets.get((first + i) % count).copied());
            (order.collect::<Vec<_>>(), state.cuts)
        };
        let (target, to) = order.into_iter().find_map(|to| Some((TcpStream::connect(to).ok()?, to)))?;
        let _ = (caller.set_nodelay(true), target.set_nodelay(true));
        let connection = Arc::new(Connection { caller, target, to, cut: false.into() });
        let mut state = self.lock();
        *state.accepted.entry(to).or_default() += 1;
        if state.closed || state.cuts != cuts {
            connection.cut();
            return None;
        }
        state.open.push(Arc::clone(&connection));
        Some(connection)
    }

    fn pump(&self, connection: &Arc<Connection>, upwards: bool) {
        let (mut from, mut to) = (&connection.caller, &connection.target);
        if !upwards {
            std::mem::swap(&mut from, &mut to);
        }
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = from.read(&mut buffer).unwrap_or(0);
            if connection.was_cut() {
                return; // nothing more may go out, not even an orderly end
            }
            if !self.pass(connection, upwards) {
                return;
            }
            let held = upwards && buffer.get(..read).is_some_and(|bytes| self.holds(connection, bytes));
            let sent = buffer.get(..read).filter(|b| !b.is_empty()).map(|bytes| to.write_all(bytes));
            if let (true, Some(held)) = (held, &mut self.lock().held) {
                held.asked = true;
            }
            if !matches!(sent, Some(Ok(()))) {
                let _ = to.shutdown(How::Write);
                return;
            }
        }
    }

    /// Whether the answer to this is the one to be held.
    fn holds(&self, connection: &Arc<Connection>, bytes: &[u8]) -> bool {
        let mut state = self.lock();
        let Some(held) = state.held.as_mut().filter(|held| held.connection.is_none()) else { return false };
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        if !bytes.get(..end).is_some_and(|text| text.ends_with(held.ends.as_bytes())) {
            return false;
        }
        let is_it = held.skip == 0;
        held.skip = held.skip.saturating_sub(1);
        held.connection = is_it.then(|| Arc::clone(connection));
        is_it
    }

    /// Waits until what was read may be passed on; false when the connection has been cut meanwhile.
    fn pass(&self, connection: &Arc<Connection>, upwards: bool) -> bool {
        let mut state = self.lock();
        while (state.weather == Weather::Hung || !upwards && state.holds(connection)) && !connection.was_cut() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let (Weather::Slow(pause), true) = (state.weather, upwards) {
            drop(state);
            std::thread::sleep(pause); // this is what it is for
        }
        !connection.was_cut()
    }
}

impl State {
    /// Whether this connection's answer is held.
    fn holds(&self, connection: &Arc<Connection>) -> bool {
        let held = self.held.as_ref().and_then(|held| held.connection.as_ref());
        held.is_some_and(|held| Arc::ptr_eq(held, connection))
    }
}

impl Connection {
    fn was_cut(&self) -> bool {
        self.cut.load(std::sync::atomic::Ordering::Acquire)
    }

    /// The last holder's drop then sends a reset.
    fn cut(&self) {
        self.cut.store(true, std::sync::atomic::Ordering::Release);
        for stream in [&self.caller, &self.target] {
            let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
            let _ = stream.shutdown(How::Read);
        }
    }
}

fn addresses(ports: &[u16]) -> Vec<SocketAddr> {
    ports.iter().map(|port| SocketAddr::from(([127, 0, 0, 1], *port))).collect()
}
