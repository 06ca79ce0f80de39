//! StreamSecrets and FetchSecrets: each request names all that the proxy wants, each answer has all of it.

use super::names::{Resource, Roots, Secrets};
use super::stream::Protocol;
use super::{SUBSYSTEM, check_names, nonce, report};
use crate::cache::ViewState;
use finial_config::SdsSettings;
use finial_proto::encoded::{self, Encoded};
use finial_proto::envoy::discovery::{DiscoveryRequest, DiscoveryResponse};
use std::collections::BTreeSet;
use std::sync::Arc;
use tonic::{Code, Status};

/// What a proxy asked for last.
#[derive(Debug)]
struct Asked {
    names: BTreeSet<String>,
    type_url: String,
}

/// One stream.
pub(crate) struct World {
    settings: Arc<SdsSettings>,
    pid: i32,
    roots: Roots,
    asked: Option<Asked>,
    /// The last request names something else than the one before.
    due: bool,
    /// How many states were told.
    version: u64,
    /// Of the last answer; empty before the first.
    nonce: String,
    /// Names and versions of the last answer.
    told: Vec<(String, String)>,
}

/// The names of a request, as a set; empty ones count for nothing.
fn names_of(request: &mut DiscoveryRequest) -> Result<BTreeSet<String>, Status> {
    check_names(request.resource_names.iter())?;
    Ok(std::mem::take(&mut request.resource_names).into_iter().filter(|name| !name.is_empty()).collect())
}

fn respond(
    resources: Vec<Resource>,
    type_url: String,
    version_info: String,
    nonce: String,
) -> encoded::DiscoveryResponse {
    let resources = resources.into_iter().map(|resource| resource.any).collect();
    Encoded::new_secret(&DiscoveryResponse { version_info, resources, type_url, nonce })
}

/// What is asked for once.
pub(super) struct Wanted {
    names: BTreeSet<String>,
    type_url: String,
    roots: Roots,
}

impl Wanted {
    pub(super) fn new(settings: &SdsSettings, mut request: DiscoveryRequest) -> Result<Self, Status> {
        let roots = Roots::wanted_by(request.node.as_ref(), settings);
        Ok(Self { names: names_of(&mut request)?, type_url: request.type_url, roots })
    }

    /// The one answer.
    pub(super) fn answer(
        &self,
        state: &ViewState,
        settings: &SdsSettings,
    ) -> Result<encoded::DiscoveryResponse, Status> {
        let resources = Secrets { state, settings, roots: self.roots }.asked(&self.names)?;
        Ok(respond(resources, self.type_url.clone(), String::new(), String::new()))
    }
}

impl World {
    pub(super) fn new(settings: Arc<SdsSettings>, pid: i32) -> Self {
        let roots = Roots::wanted_by(None, &settings);
        Self { settings, pid, roots, asked: None, due: false, version: 0, nonce: String::new(), told: Vec::new() }
    }
}

impl Protocol for World {
    type Request = DiscoveryRequest;
    type Answer = encoded::DiscoveryResponse;

    fn receive(&mut self, mut request: DiscoveryRequest) -> Result<(), Status> {
        let pid = self.pid;
        tracing::debug!(
            subsystem_name = SUBSYSTEM,
            pid,
            resource_names = ?request.resource_names,
            version_info = request.version_info,
            nonce = request.response_nonce,
            "Received StreamSecrets request"
        );
        report(request.error_detail.as_ref(), pid);
        if !self.nonce.is_empty() {
            if self.nonce != request.response_nonce {
                tracing::warn!(subsystem_name = SUBSYSTEM, pid, expect = %self.nonce, "Received unexpected nonce; ignoring request");
                return Ok(());
            }
            if request.version_info != self.version.to_string() {
                // It may want other names all the same.
                tracing::error!(subsystem_name = SUBSYSTEM, pid, expect = %self.version, "Client rejected expected version and rolled back");
            }
        }
        if request.node.is_some() {
            self.roots = Roots::wanted_by(request.node.as_ref(), &self.settings);
        }
        let names = names_of(&mut request)?;
        self.due |= self.asked.as_ref().is_none_or(|asked| asked.names != names);
        self.asked = Some(Asked { names, type_url: request.type_url });
        Ok(())
    }

    fn owes(&self) -> bool {
        self.due
    }

    fn may_wait(&self, refusal: &Status) -> bool {
        self.version == 0 && refusal.code() == Code::InvalidArgument
    }

    fn answer(&mut self, state: &ViewState, news: bool) -> Result<Option<Self::Answer>, Status> {
        let Some(asked) = self.asked.as_ref().filter(|_| self.due || news) else { return Ok(None) };
        let secrets = Secrets { state, settings: &self.settings, roots: self.roots };
        let resources = match secrets.asked(&asked.names) {
            Ok(resources) => resources,
            // It may be the one whose SVID is being fetched: that state comes soon. The entry may have been given another ID.
            Err(status) if state.incomplete && status.code() == Code::InvalidArgument => return Ok(None),
            Err(status) => return Err(status),
        };
        let told: Vec<_> = resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect();
        if !self.due && told == self.told {
            return Ok(None); // what changed is something else
        }
        if news || self.version == 0 {
            self.version += 1;
        }
        (self.due, self.told, self.nonce) = (false, told, nonce());
        let (pid, version_info, count) = (self.pid, self.version, resources.len());
        tracing::debug!(
            subsystem_name = SUBSYSTEM,
            pid,
            version_info,
            nonce = self.nonce,
            count,
            "Sending StreamSecrets response"
        );
        Ok(Some(respond(resources, asked.type_url.clone(), self.version.to_string(), self.nonce.clone())))
    }
}
