//! `systemd`: the unit that a process belongs to, as systemd's manager tells over the system bus.
//!
//! The manager is asked by the process's number. That is safe: who calls an attestor makes sure that the process lived before and
//! after (by its pidfd), so the number was the process's own all the time.

use super::dbus::{Arguments, Bus, BusError, Method, system_bus};
use async_trait::async_trait;
use finial_core::{ErrorKind, Selector};
use finial_plugin::{Peer, PluginError, WorkloadAttestor, prefixed_selectors};
use std::time::Duration;
use tokio::sync::Mutex;

const SERVICE: &str = "org.freedesktop.systemd1";
/// How long all questions about one process may take, waiting for those about others included: less than an attestor may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// The attestor.
pub struct Systemd {
    addresses: String,
    /// Kept between processes; taken out while it is used, so that one that was given up is never used again.
    bus: Mutex<Option<Bus>>,
    deadline: Duration,
}

impl Default for Systemd {
    /// Asks on the system bus, which `DBUS_SYSTEM_BUS_ADDRESS` may name.
    fn default() -> Self {
        Self::at(system_bus())
    }
}

/// What the manager says of a process.
struct Unit {
    id: String,
    fragment_path: String,
}

impl Systemd {
    /// The name of the attestor, and the type of its selectors.
    pub const NAME: &str = "systemd";

    fn at(addresses: String) -> Self {
        Self { addresses, bus: Mutex::default(), deadline: DEADLINE }
    }

    async fn unit(&self, pid: u32) -> Result<Unit, PluginError> {
        let mut kept = self.bus.lock().await;
        if let Some(mut bus) = kept.take() {
            match ask(&mut bus, pid).await {
                Ok(answer) => {
                    *kept = Some(bus);
                    return answer;
                }
                // The bus was started again, or is confused: once more on a new connection.
                Err((_, error)) => tracing::debug!(%error, "The connection to the bus is gone"),
            }
        }
        let opened = Bus::connect(&self.addresses).await;
        let mut bus = opened.map_err(|e| PluginError::internal(format!("failed to open dbus connection: {e}")))?;
        let answer = ask(&mut bus, pid).await.map_err(|(what, e)| PluginError::internal(format!("{what}: {e}")))?;
        *kept = Some(bus);
        answer
    }
}

/// Two levels of failure: that of the answer, and (with what was asked) that of a connection which cannot be used any more.
async fn ask(bus: &mut Bus, pid: u32) -> Result<Result<Unit, PluginError>, (String, BusError)> {
    let failed = format!("failed to get unit by pid {pid}");
    let method = Method {
        destination: SERVICE,
        path: "/org/freedesktop/systemd1",
        interface: "org.freedesktop.systemd1.Manager",
        member: "GetUnitByPID",
    };
    let path = match bus.call(method, Arguments::Number(pid)).await.and_then(|body| body.object_path()) {
        Ok(path) => path,
        Err(BusError::Reply { message }) => return Ok(Err(PluginError::internal(format!("{failed}: {message}")))),
        Err(error) => return Err((failed, error)),
    };
    let mut values = [String::new(), String::new()];
    for (property, value) in ["Id", "FragmentPath"].into_iter().zip(&mut values) {
        match get(bus, &path, property).await? {
            Ok(got) => *value = got,
            Err(error) => return Ok(Err(error)),
        }
    }
    let [id, fragment_path] = values;
    Ok(Ok(Unit { id, fragment_path }))
}

async fn get(bus: &mut Bus, path: &str, name: &str) -> Result<Result<String, PluginError>, (String, BusError)> {
    let failed = format!("error getting value for {name}");
    let method = Method { destination: SERVICE, path, interface: "org.freedesktop.DBus.Properties", member: "Get" };
    let arguments = ["org.freedesktop.systemd1.Unit", name];
    match bus.call(method, Arguments::Texts(&arguments)).await.and_then(|body| body.text_in_variant()) {
        Ok(Ok(text)) => Ok(Ok(text)),
        Ok(Err(signature)) => Ok(Err(PluginError::internal(format!(
            "Returned value for {name} was not a string: it has the type {signature:?}"
        )))),
        Err(BusError::Reply { message }) => Ok(Err(PluginError::internal(format!("{failed}: {message}")))),
        Err(error) => Err((failed, error)),
    }
}

#[async_trait]
impl WorkloadAttestor for Systemd {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        let pid = u32::try_from(peer.pid).map_err(|e| PluginError::invalid(format!("invalid value for PID: {e}")))?;
        let unit = tokio::time::timeout(self.deadline, self.unit(pid)).await.map_err(|_| {
            let message = format!("failed to get unit by pid {pid}: systemd did not answer over D-Bus in time");
            PluginError::new(ErrorKind::Unavailable, message)
        })??;
        // A unit without a file (a session, a transient scope) has an empty path, and this selector nevertheless, as in SPIRE.
        let values = [format!("id:{}", unit.id), format!("fragment_path:{}", unit.fragment_path)];
        Ok(prefixed_selectors(Self::NAME, values))
    }
}

#[cfg(test)]
#[path = "systemd_tests.rs"]
mod tests;
