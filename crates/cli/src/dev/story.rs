//! The story that `finial dev` tells. Each line is printed after the thing has happened, with what was really seen.

use super::child::Workload;
use super::domain::{Domain, Registration, TRUST_DOMAIN, effective_uid, registrations};
use super::folder::Folder;
use super::workload::{Event, Role, Task};
use super::{Trouble, say};
use finial_core::{Clock, SpiffeId};
use finial_runtime::Spawner;
use std::sync::Arc;
use std::time::Instant;
use time::OffsetDateTime;

/// The frontend's X.509-SVIDs live this long, seconds, so that one can be seen to be renewed.
const SHORT_TTL: i32 = 14;
const AUDIENCE: &str = "demo";

struct Teller<'a> {
    domain: Domain<'a>,
    started: Instant,
}

/// Tells the story, and with `keep` waits at its end for the shutdown.
pub(super) async fn tell(
    folder: &Folder,
    spawner: &Spawner,
    clock: Arc<dyn Clock>,
    started: Instant,
    keep: bool,
) -> Result<(), Trouble> {
    say(&format!("A trust domain on this machine, called {TRUST_DOMAIN}. Its data is in {folder}.\n"));
    let teller = Teller { domain: Domain::new(folder, spawner, clock)?, started };
    let uid = effective_uid();
    let registrations = registrations(folder, uid, SHORT_TTL);
    teller.set_up(&registrations).await?;
    teller.fetch().await?;
    teller.mutual_tls().await?;
    if keep {
        teller.keep(uid);
        spawner.shutdown().cancelled().await;
    } else {
        say("\nThat was all. `finial dev --keep` stays up, so that you can try commands yourself.");
    }
    Ok(())
}

/// Hours, minutes and seconds, UTC.
fn clock_time(seconds: i64) -> String {
    match OffsetDateTime::from_unix_timestamp(seconds) {
        Ok(t) => format!("{:02}:{:02}:{:02} UTC", t.hour(), t.minute(), t.second()),
        Err(_) => seconds.to_string(),
    }
}

/// Enough of a serial number to tell two apart.
fn short(serial: &str) -> &str {
    serial.get(..12).unwrap_or(serial)
}

impl Teller<'_> {
    fn elapsed(&self) -> String {
        format!("{} ms after the start", self.started.elapsed().as_millis())
    }

    fn task(&self, hint: &str, role: Role) -> Task {
        Task { socket: self.domain.folder.agent_socket(), hint: hint.to_owned(), role }
    }

    fn unexpected(&self, event: &Event) -> Trouble {
        Trouble::in_log(format!("something unexpected: {event:?}"), self.domain.folder)
    }

    async fn set_up(&self, registrations: &[Registration]) -> Result<(), Trouble> {
        let server = self.domain.start_server().await?;
        say(&format!("1. The server is up ({}), at {server}.", self.elapsed()));
        say("   It holds the signing keys of the trust domain and decides who gets which identity.");

        self.domain.register(registrations).await?;
        say("2. The entries: which process gets which identity. Your programs hold no password or key for this.");
        for registration in registrations {
            let (id, selectors) = (self.domain.id(&registration.path)?, registration.selectors.join(" and "));
            say(&format!("   {id}\n       if {selectors}"));
        }

        let agent = self.domain.start_agent(server).await?;
        say(&format!("3. The agent is attested ({}):\n   {}", self.elapsed(), agent.id));
        if agent.anew {
            say(&format!("   It proved itself once, by {}, and has a certificate of its own now", agent.how));
        } else {
            say(&format!("   It joined in an earlier run, by {}, and still has its certificate", agent.how));
        }
        say(&format!(
            "   (until {}, renewed by itself). It serves the identities on this machine.",
            clock_time(agent.expires_at)
        ));
        Ok(())
    }

    async fn fetch(&self) -> Result<(), Trouble> {
        let role = Role::Show { audience: AUDIENCE.to_owned() };
        let mut client = Workload::start(self.domain.folder, "client", &self.task("you", role))?;
        match client.next().await? {
            Event::X509Svid { id, serial, not_after, verified: true } => {
                say(&format!(
                    "4. An X.509-SVID, fetched by a new process through the agent's socket ({}):",
                    self.elapsed()
                ));
                say(&format!("   {id}\n   serial {}, until {}", short(&serial), clock_time(not_after)));
                say("   The agent asked the kernel which user the process runs as. The certificate verifies: yes.");
            }
            other => return Err(self.unexpected(&other)),
        }
        match client.next().await? {
            Event::JwtSvid { token, claims, validated_id } => {
                let start: String = token.chars().take(40).collect();
                say(&format!(
                    "5. A JWT-SVID for the audience {AUDIENCE:?}:\n   {start}... ({} characters)",
                    token.len()
                ));
                say(&format!("   it says {claims}\n   The agent validates it: yes, it is from {validated_id}."));
            }
            other => return Err(self.unexpected(&other)),
        }
        client.stop().await;
        Ok(())
    }

    async fn mutual_tls(&self) -> Result<(), Trouble> {
        let folder = self.domain.folder;
        let id = |name: &str| -> Result<SpiffeId, Trouble> { self.domain.id(&format!("/{name}")) };
        let serve = Role::Serve { client: id("frontend")?.to_string() };
        let mut backend = Workload::start(folder, "backend", &self.task("backend", serve))?;
        let address = match backend.next().await? {
            Event::Listening { address } => address,
            other => return Err(self.unexpected(&other)),
        };
        let call = || -> Result<Role, Trouble> {
            Ok(Role::Call { address: address.clone(), server: id("backend")?.to_string() })
        };
        let mut frontend = Workload::start(folder, "frontend", &self.task("frontend", call()?))?;
        let first_serial = match (frontend.next().await?, backend.next().await?) {
            (Event::Answer { text, serial }, Event::Accepted { client }) => {
                say("6. Mutual TLS between two processes, each with its own certificate:");
                say(&format!(
                    "   frontend asks backend at {address}. backend lets in {client}\n   and answers: {text:?}"
                ));
                serial
            }
            (frontend, backend) => return Err(self.unexpected(&format_pair(frontend, backend))),
        };
        let mut stranger = Workload::start(folder, "stranger", &self.task("stranger", call()?))?;
        match (stranger.next().await?, backend.next().await?) {
            (Event::NoAnswer { reason }, Event::Refused { reason: refusal }) => {
                say("   stranger asks too, with a valid certificate of its own, but backend serves frontend only.");
                say(&format!("   backend refuses: {refusal}\n   stranger sees: {reason}"));
            }
            (stranger, backend) => return Err(self.unexpected(&format_pair(stranger, backend))),
        }
        stranger.stop().await;
        self.rotation(&mut frontend, &mut backend, &first_serial).await?;
        frontend.stop().await;
        backend.stop().await;
        Ok(())
    }

    async fn rotation(
        &self,
        frontend: &mut Workload<'_>,
        backend: &mut Workload<'_>,
        first: &str,
    ) -> Result<(), Trouble> {
        let since = Instant::now();
        say(&format!("7. Rotation. frontend's certificate lives {SHORT_TTL} s only; watching it ..."));
        let (old, new, end) = match frontend.next().await? {
            Event::Renewed { old_serial, new_serial, not_after } => (old_serial, new_serial, not_after),
            other => return Err(self.unexpected(&other)),
        };
        if old != first {
            return Err(Trouble::in_log("the certificate changed without being announced", self.domain.folder));
        }
        match (frontend.next().await?, backend.next().await?) {
            (Event::Answer { serial, .. }, Event::Accepted { .. }) if serial == new => {
                let waited = since.elapsed().as_secs_f64();
                say(&format!(
                    "   After {waited:.1} s it was replaced: {} -> {}, until {}.",
                    short(&old),
                    short(&new),
                    clock_time(end)
                ));
                say("   The process went on; its next request used the new certificate and was accepted.");
                Ok(())
            }
            (frontend, backend) => Err(self.unexpected(&format_pair(frontend, backend))),
        }
    }

    fn keep(&self, uid: u32) {
        let folder = self.domain.folder;
        let program = std::env::current_exe().map_or("finial".to_owned(), |p| p.display().to_string());
        let (agent, server) = (folder.agent_socket(), folder.server_socket());
        let (agent, server) = (agent.display(), server.display());
        say(&format!(
            "\nThe trust domain stays up. Workload API: unix://{agent}\n\
             Try in another terminal:\n\
             \n  export SPIFFE_ENDPOINT_SOCKET=unix://{agent}     # any SPIFFE library finds the agent by this\
             \n  {program} agent api fetch x509 -socketPath {agent}\
             \n  {program} agent api fetch jwt -audience demo -socketPath {agent}\
             \n  {program} agent api watch -socketPath {agent}\
             \n  {program} server agent list -socketPath {server}\
             \n  {program} server entry show -socketPath {server}\
             \n  {program} server entry create -socketPath {server} \\\
             \n      -parentID spiffe://{TRUST_DOMAIN}/dev-node -spiffeID spiffe://{TRUST_DOMAIN}/curl -selector unix:uid:{uid} -selector unix:path:/usr/bin/curl\
             \n  {program} server bundle show -socketPath {server}\
             \n\nThe log is {log}. To stop: Ctrl-C here, or kill {pid}.",
            log = folder.log().display(),
            pid = std::process::id(),
        ));
    }
}

/// Two events as one, for an error text.
fn format_pair(one: Event, other: Event) -> Event {
    Event::Failed { reason: format!("{one:?} and {other:?}") }
}
