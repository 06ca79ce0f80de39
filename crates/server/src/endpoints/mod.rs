//! The two doors: TCP with TLS for agents and remote admins, and the local socket for operators.

mod admission;
mod connection;
mod strangers;

use crate::api::Service;
use crate::authz::{Connection, Identity, LocalProcess, Peer};
use admission::Doorkeeper;
use finial_core::Clock;
use finial_crypto::tls::{ClientAuth, KeyExchange, PeerPolicy, TlsIdentity, server_config_with};
use finial_net::Limits;
use finial_net::proxy::TrustedProxies;
use finial_net::tls::{TlsConnection, TlsIncoming, bind};
use finial_net::unix::{self, BindError, UnixConnection, UnixIncoming};
use finial_proto::health::health_server::HealthServer;
use finial_proto::rotation::rotation_server::RotationServer;
use finial_proto::server::agent::agent_server::AgentServer;
use finial_proto::server::bundle::bundle_server::BundleServer;
use finial_proto::server::debug::debug_server::DebugServer;
use finial_proto::server::entry::encoded::EntryServer;
use finial_proto::server::localauthority::local_authority_server::LocalAuthorityServer;
use finial_proto::server::logger::logger_server::LoggerServer;
use finial_proto::server::svid::svid_server::SvidServer;
use finial_proto::server::trustdomain::trust_domain_server::TrustDomainServer;
use finial_proto::sync::server::AgentSyncServer;
use finial_runtime::{Shutdown, Spawner};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use strangers::{Share, Strangers};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_stream::StreamExt;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::{Connected, Router};
use tower::layer::util::Stack;
use tower::util::MapResponseLayer;

pub use admission::Admissible;
pub use connection::{Held, Streams};

/// How long open calls may go on at shutdown.
const DRAIN: Duration = Duration::from_secs(10);
/// Calls at a time on one connection over TCP. Agents make a handful.
const REMOTE_CALLS: u32 = 128;
/// Calls at a time on one local connection.
const LOCAL_CALLS: u32 = 1024;
/// What a connection over TCP may send ahead of what is read, in bytes.
const WINDOW_BYTES: u32 = 256 * 1024;
/// Mode of the local socket: its owner and group are the operators.
const SOCKET_MODE: u32 = 0o770;
/// Mode of the socket's folder if it has to be made.
const FOLDER_MODE: u32 = 0o750;

/// Why a door could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The TCP port.
    #[error("{}", finial_runtime::listen_text(.0, .1))]
    Tcp(SocketAddr, io::Error),
    /// The local socket.
    #[error(transparent)]
    Local(#[from] BindError),
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// What listening needs.
pub struct Doors {
    /// Where to listen on TCP; port 0 takes any free one.
    pub address: SocketAddr,
    /// Where the local socket is.
    pub socket_path: PathBuf,
    /// What the server shows.
    pub identity: Arc<TlsIdentity>,
    /// Which key exchanges are taken.
    pub exchange: KeyExchange,
    /// Who may come in with which roots.
    pub admissible: Admissible,
    /// Looks up the programs of local callers, for the audit log and the policy.
    pub look_up_programs: bool,
    /// Load balancers that say whose connections they pass on.
    pub proxies: TrustedProxies,
    /// For the validity of client certificates.
    pub clock: Arc<dyn Clock>,
    /// Runs handshakes.
    pub spawner: Spawner,
}

/// Listening on both doors.
pub struct Endpoints {
    tcp: TlsIncoming,
    local: UnixIncoming,
    doorkeeper: Arc<Doorkeeper>,
    socket_path: PathBuf,
    look_up_programs: bool,
    spawner: Spawner,
}

impl Endpoints {
    /// Opens both doors. Callers queue up until [`Endpoints::serve`].
    pub fn listen(doors: Doors) -> Result<Self, ListenError> {
        let doorkeeper = Arc::new(Doorkeeper::new(doors.admissible, doors.clock.clone()));
        // Who is let in by the roots is checked against `admin_ids` right after the handshake.
        let clients = ClientAuth { bundles: doorkeeper.clone(), policy: PeerPolicy::Any, required: false };
        let config = server_config_with(doors.exchange, doors.identity, Some(clients), doors.clock)?;
        let tcp_error = |error| ListenError::Tcp(doors.address, error);
        let listener = bind(doors.address).map_err(tcp_error)?;
        // How long they live is `connection`'s to say.
        let (limits, spawner) = (Limits::default(), doors.spawner.clone());
        let tcp = TlsIncoming::behind(doors.proxies, listener, Arc::new(config), limits, spawner).map_err(tcp_error)?;
        let local = unix::bind(&doors.socket_path, SOCKET_MODE, FOLDER_MODE, Limits::default())?;
        let (socket_path, look_up_programs, spawner) = (doors.socket_path, doors.look_up_programs, doors.spawner);
        Ok(Self { tcp, local, doorkeeper, socket_path, look_up_programs, spawner })
    }

    /// Where TCP listens.
    pub fn address(&self) -> SocketAddr {
        self.tcp.local_addr()
    }

    /// Answers on both doors until shutdown, then lets open calls finish for up to 10 s.
    pub async fn serve(self, service: Service, shutdown: Shutdown) -> Result<(), tonic::transport::Error> {
        let address = self.tcp.local_addr();
        tracing::info!(subsystem_name = "endpoints", network = "tcp", %address, "Starting Server APIs");
        let path = self.socket_path.display();
        tracing::info!(subsystem_name = "endpoints", network = "unix", address = %path, "Starting Server APIs");
        let doorkeeper = self.doorkeeper;
        let strangers = Strangers::new(service.gate.clone());
        let remote_services = remote_services(&service, &strangers);
        let tcp = self.tcp.filter_map(move |connection| match connection {
            Ok(stream) => doorkeeper.admit(remote(&stream)).and_then(|peer| {
                let seat = strangers.seat(&peer).ok()?;
                Some(Known { stream, peer, _seat: seat })
            }),
            Err(_) => None, // the listener yields none
        });
        let look_up = self.look_up_programs;
        let local = self.local.map(move |result| {
            result.map(|stream| Known { peer: Arc::new(local(&stream, look_up)), stream, _seat: None })
        });
        let serve_tcp = connection::serve(tcp, remote_services, self.spawner, shutdown.clone());
        let serve_tcp = async {
            serve_tcp.await;
            Ok(())
        };
        let serve_local = local_services(&service).serve_with_incoming_shutdown(local, shutdown.cancelled());
        let late = async {
            shutdown.cancelled().await;
            tracing::info!(subsystem_name = "endpoints", "Stopping Server APIs");
            tokio::time::sleep(DRAIN).await;
        };
        tokio::select! {
            done = async { tokio::try_join!(serve_tcp, serve_local) } => {
                done?;
                tracing::info!(subsystem_name = "endpoints", "Server APIs have stopped");
            }
            () = late => {
                let seconds = DRAIN.as_secs();
                tracing::info!(subsystem_name = "endpoints", "Graceful stop unsuccessful, forced stop after {seconds}s");
            }
        }
        Ok(())
    }
}

type Response = http::Response<tonic::body::Body>;
type Layers = Stack<MapResponseLayer<fn(Response) -> Response>, tower::layer::util::Identity>;
type Services = Router<Layers>;

fn builder(calls_per_connection: u32) -> Server<Layers> {
    Server::builder()
        .max_concurrent_streams(calls_per_connection)
        .layer(MapResponseLayer::new(oversize_is_exhausted as fn(Response) -> Response))
}

/// What both doors offer.
fn both_services(service: &Service) -> Routes {
    Routes::new(AgentServer::new(service.clone()))
        .add_service(BundleServer::new(service.clone()))
        .add_service(EntryServer::new(service.clone()))
        .add_service(LocalAuthorityServer::new(service.clone()))
        .add_service(RotationServer::new(service.clone()))
        .add_service(SvidServer::new(service.clone()))
        .add_service(TrustDomainServer::new(service.clone()))
}

fn remote_services(service: &Service, strangers: &Strangers) -> Routes {
    let mut routes = both_services(service).add_service(AgentSyncServer::new(service.clone()));
    let router = routes.axum_router_mut();
    // Around the services that there are: of others nobody reads anything.
    *router = std::mem::take(router).route_layer(strangers.clone());
    or_unknown(routes)
}

fn local_services(service: &Service) -> Services {
    let routes = both_services(service)
        .add_service(DebugServer::new(service.clone()))
        .add_service(HealthServer::new(service.clone()))
        .add_service(LoggerServer::new(service.clone()));
    builder(LOCAL_CALLS).add_routes(or_unknown(routes))
}

/// Says which service there is not, in grpc-go's words.
fn or_unknown(mut routes: Routes) -> Routes {
    let unknown = |uri: http::Uri| async move {
        let service = uri.path().trim_start_matches('/').split('/').next().unwrap_or_default();
        Status::unimplemented(format!("unknown service {service}")).into_http::<tonic::body::Body>()
    };
    let router = routes.axum_router_mut();
    *router = std::mem::take(router).fallback(unknown);
    routes.prepare()
}

/// A message over the limit is `OutOfRange` to tonic and `ResourceExhausted` to everyone else; none of our handlers answers
/// `OutOfRange` itself.
fn oversize_is_exhausted(mut response: Response) -> Response {
    const OUT_OF_RANGE: &str = "11";
    const RESOURCE_EXHAUSTED: &str = "8";
    if let Some(code) = response.headers_mut().get_mut("grpc-status")
        && code == OUT_OF_RANGE
    {
        *code = http::HeaderValue::from_static(RESOURCE_EXHAUSTED);
    }
    response
}

fn remote(connection: &TlsConnection) -> Peer {
    let peer = connection.peer();
    let identity = peer.certificates.first().map_or(Identity::None, |leaf| Identity::of_leaf(leaf));
    Peer::Remote { address: peer.address, identity }
}

fn local(connection: &UnixConnection, look_up_program: bool) -> Peer {
    let peer = connection.peer();
    let exe = |pid: i32| std::fs::read_link(Path::new("/proc").join(pid.to_string()).join("exe")).ok();
    // The pid still means the caller if the caller lives after we looked.
    let path = look_up_program.then(|| exe(peer.pid)).flatten().filter(|_| peer.handle.is_alive());
    Peer::Local(LocalProcess { uid: peer.uid, gid: peer.gid, path })
}

/// A connection whose calls know who is at the other end.
struct Known<S> {
    stream: S,
    peer: Connection,
    _seat: Option<Share>,
}

impl<S> Connected for Known<S> {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.peer.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Known<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Known<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
