//! DeltaSecrets: each request says which names the proxy wants besides, or no longer, each answer what changed of them. SPIRE
//! has no such method; the rules are those of Envoy's protocol.

use super::names::{Resource, Roots, Secrets};
use super::stream::Protocol;
use super::{check_names, nonce, report};
use crate::cache::ViewState;
use finial_config::SdsSettings;
use finial_proto::encoded::{self, Encoded};
use finial_proto::envoy::discovery::{self, DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tonic::Status;

/// Stands for everything.
const WILDCARD: &str = "*";

/// What the proxy knows of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Known {
    /// It has this version.
    Version(String),
    /// It was told that there is nothing.
    Nothing,
}

/// One stream.
pub(crate) struct Delta {
    settings: Arc<SdsSettings>,
    pid: i32,
    roots: Roots,
    type_url: String,
    begun: bool,
    /// A request asks for something.
    due: bool,
    /// The proxy wants everything.
    wildcard: bool,
    /// What it wants besides.
    names: BTreeSet<String>,
    known: BTreeMap<String, Known>,
    /// How many answers were given.
    version: u64,
}

impl Delta {
    pub(super) fn new(settings: Arc<SdsSettings>, pid: i32) -> Self {
        let roots = Roots::wanted_by(None, &settings);
        let (names, known) = Default::default();
        Self {
            settings,
            pid,
            roots,
            type_url: String::new(),
            begun: false,
            due: false,
            wildcard: false,
            names,
            known,
            version: 0,
        }
    }

    fn subscribe(&mut self, names: Vec<String>) {
        for name in names.into_iter().filter(|name| !name.is_empty()) {
            self.due = true;
            if name == WILDCARD {
                self.wildcard = true;
                continue;
            }
            // Who asks again has lost it.
            if self.begun {
                self.known.remove(&name);
            }
            self.names.insert(name);
        }
    }

    fn unsubscribe(&mut self, names: Vec<String>) {
        for name in names {
            if name == WILDCARD {
                self.wildcard = false;
                let names = &self.names;
                self.known.retain(|name, _| names.contains(name));
            } else if self.names.remove(&name) {
                self.known.remove(&name);
                if self.wildcard {
                    // It keeps it until told whether it is among everything.
                    self.due = true;
                    self.known.insert(name, Known::Version(String::new()));
                }
            }
        }
    }

    /// All that the proxy wants and there is, each name once.
    fn wanted(&self, state: &ViewState) -> Result<Vec<Resource>, Status> {
        let secrets = Secrets { state, settings: &self.settings, roots: self.roots };
        let mut wanted = secrets.present(&self.names)?;
        if self.wildcard {
            let mut there: BTreeSet<String> = wanted.iter().map(|r| r.name.clone()).collect();
            wanted.extend(secrets.all()?.into_iter().filter(|r| there.insert(r.name.clone())));
        }
        Ok(wanted)
    }

    /// Names of which the proxy is to hear that there is nothing.
    fn gone(&self, there: &BTreeSet<&str>, state: &ViewState) -> Vec<String> {
        let unknown = |name: &&String| match self.known.get(*name) {
            Some(known) => *known != Known::Nothing,
            // It may be the one whose SVID is being fetched: that state comes soon.
            None => !state.incomplete,
        };
        let named = self.names.iter().filter(|name| !there.contains(name.as_str())).filter(unknown);
        let had = self.known.iter().filter(|(_, known)| **known != Known::Nothing).map(|(name, _)| name);
        let had = had.filter(|name| !there.contains(name.as_str()) && !self.names.contains(*name));
        named.chain(had).cloned().collect()
    }
}

impl Protocol for Delta {
    type Request = DeltaDiscoveryRequest;
    type Answer = encoded::DeltaDiscoveryResponse;

    fn receive(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        report(request.error_detail.as_ref(), self.pid);
        if request.node.is_some() {
            self.roots = Roots::wanted_by(request.node.as_ref(), &self.settings);
        }
        if !request.type_url.is_empty() {
            self.type_url = request.type_url;
        }
        // What it gave up is known until the next answer, and that may be far: there is none while the first state is awaited.
        let given_up = self.known.iter().filter(|(_, known)| matches!(known, Known::Version(v) if v.is_empty()));
        let names = self.names.iter().chain(given_up.map(|(name, _)| name));
        check_names(names.chain(&request.resource_names_subscribe))?;
        if !self.begun {
            // One that begins without a name wants everything, as long as it says no other.
            self.wildcard = request.resource_names_subscribe.is_empty();
            self.due = true;
        }
        self.subscribe(request.resource_names_subscribe);
        self.unsubscribe(request.resource_names_unsubscribe);
        if !self.begun {
            let names = &self.names;
            let had = request.initial_resource_versions.into_iter();
            let had = had.filter(|(name, _)| self.wildcard || names.contains(name));
            self.known.extend(had.map(|(name, version)| (name, Known::Version(version))));
        }
        self.begun = true;
        Ok(())
    }

    fn owes(&self) -> bool {
        self.due
    }

    fn may_wait(&self, _refusal: &Status) -> bool {
        false
    }

    fn answer(&mut self, state: &ViewState, news: bool) -> Result<Option<Self::Answer>, Status> {
        if !self.begun || !(self.due || news) {
            return Ok(None);
        }
        let wanted = self.wanted(state)?;
        let gone = self.gone(&wanted.iter().map(|r| r.name.as_str()).collect(), state);
        self.due = state.incomplete && wanted.len() < self.names.len();
        let is_new = |resource: &Resource| match self.known.get(&resource.name) {
            Some(Known::Version(version)) => *version != resource.version,
            Some(Known::Nothing) | None => true,
        };
        let changed: Vec<Resource> = wanted.into_iter().filter(is_new).collect();
        if changed.is_empty() && gone.is_empty() {
            return Ok(None);
        }
        for name in &gone {
            if self.names.contains(name) {
                self.known.insert(name.clone(), Known::Nothing);
            } else {
                self.known.remove(name);
            }
        }
        let versions = changed.iter().map(|r| (r.name.clone(), Known::Version(r.version.clone())));
        self.known.extend(versions);
        self.version += 1;
        let resource = |r: Resource| discovery::Resource { version: r.version, resource: Some(r.any), name: r.name };
        Ok(Some(Encoded::new_secret(&DeltaDiscoveryResponse {
            system_version_info: self.version.to_string(),
            resources: changed.into_iter().map(resource).collect(),
            type_url: self.type_url.clone(),
            nonce: nonce(),
            removed_resources: gone,
        })))
    }
}
