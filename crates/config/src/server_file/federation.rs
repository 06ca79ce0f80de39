//! `federation { }` of servers.

use crate::resolve::{Named, Resolver};
use crate::{BundleEndpointAcme, BundleEndpointProfile, BundleEndpointSettings, FederatesWith, FederationSettings};
use finial_core::{EndpointProfile, SpiffeId, TrustDomain};
use serde::Deserialize;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct RawFederation {
    bundle_endpoint: Option<RawBundleEndpoint>,
    federates_with: Named<RawFederatesWith>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawBundleEndpoint {
    address: String,
    port: i64,
    refresh_hint: String,
    acme: Option<RawAcme>,
    profile: Option<Named<RawEndpointProfile>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawEndpointProfile {
    acme: Option<RawAcme>,
    serving_cert_file: Option<RawServingCert>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawAcme {
    directory_url: String,
    domain_name: String,
    email: String,
    tos_accepted: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawServingCert {
    cert_file_path: String,
    key_file_path: String,
    file_sync_interval: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawFederatesWith {
    bundle_endpoint_url: String,
    bundle_endpoint_profile: Option<Named<RawForeignProfile>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawForeignProfile {
    endpoint_spiffe_id: String,
}

pub(super) fn resolve(r: &mut Resolver, federation: RawFederation, data_dir: &Path) -> FederationSettings {
    let mut out = FederationSettings::default();
    if let Some(endpoint) = federation.bundle_endpoint {
        out.bundle_endpoint = bundle_endpoint(r, endpoint, data_dir);
    }
    for (name, raw) in federation.federates_with {
        let path = ["server", "federation", "federates_with", name.as_str()];
        let url = &raw.bundle_endpoint_url;
        if url.is_empty() {
            let message = format!("federation.federates_with[\"{name}\"].bundle_endpoint_url must be configured");
            r.problem(&path, message, "");
        } else if !url.to_ascii_lowercase().starts_with("https://") {
            let message = format!(
                "federation.federates_with[\"{name}\"].bundle_endpoint_url must use the HTTPS protocol; URL found: {url:?}"
            );
            r.problem(&path, message, "");
        } else if let Err(cause) = check_url(url) {
            // Without the URL: there may be a password in it.
            r.problem(&path, format!("federation.federates_with[\"{name}\"].bundle_endpoint_url {cause}"), "");
        }
        let trust_domain = TrustDomain::parse(&name);
        if let Err(error) = &trust_domain {
            r.problem(&path, error.to_string(), "");
        }
        let profile = foreign_profile(r, &path, &name, raw.bundle_endpoint_profile);
        if let (Ok(trust_domain), Some(profile)) = (trust_domain, profile) {
            let relation = FederatesWith { bundle_endpoint_url: raw.bundle_endpoint_url, profile };
            out.federates_with.insert(trust_domain, relation);
        }
    }
    out
}

/// Whether an `https` URL can be fetched: by the rules of those who do, or it would be refused at every poll.
fn check_url(url: &str) -> Result<(), &'static str> {
    let sent = url.split_once('#').map_or(url, |(sent, _)| sent);
    let uri: http::Uri = sent.parse().map_err(|_| "is not a valid URL")?;
    let authority = uri.authority().ok_or("must specify the host")?;
    if authority.as_str().contains('@') {
        return Err("must not contain user info");
    }
    if authority.host().is_empty() { Err("must specify the host") } else { Ok(()) }
}

fn foreign_profile(
    r: &mut Resolver,
    path: &[&str],
    name: &str,
    profiles: Option<Named<RawForeignProfile>>,
) -> Option<EndpointProfile> {
    let label = format!("error parsing federation relationship for trust domain {name:?}");
    let Some(profiles) = profiles else {
        let message =
            format!("federation configuration for trust domain {name:?}: missing bundle endpoint configuration");
        r.problem(
            path,
            message,
            "add bundle_endpoint_profile \"https_web\" {} or \"https_spiffe\" { endpoint_spiffe_id = … }",
        );
        return None;
    };
    if profiles.len() != 1 {
        r.problem(path, format!("{label}: exactly one bundle endpoint profile is expected"), "");
        return None;
    }
    match profiles.first_key_value() {
        Some((kind, _)) if kind == "https_web" => Some(EndpointProfile::HttpsWeb),
        Some((kind, profile)) if kind == "https_spiffe" => match SpiffeId::parse(&profile.endpoint_spiffe_id) {
            Ok(endpoint_id) => Some(EndpointProfile::HttpsSpiffe { endpoint_id }),
            Err(error) => {
                r.problem(path, format!("{label}: could not get endpoint SPIFFE ID: {error}"), "");
                None
            }
        },
        _ => {
            let message = format!(
                "{label}: no bundle endpoint profile defined; current supported profiles are \"https_spiffe\" and 'https_web\""
            );
            r.problem(path, message, "");
            None
        }
    }
}

const ENDPOINT: [&str; 3] = ["server", "federation", "bundle_endpoint"];

fn endpoint_key(key: &str) -> [&str; 4] {
    let [server, federation, endpoint] = ENDPOINT;
    [server, federation, endpoint, key]
}

fn bundle_endpoint(r: &mut Resolver, raw: RawBundleEndpoint, data_dir: &Path) -> Option<BundleEndpointSettings> {
    let label = format!("could not parse refresh_hint {:?}", raw.refresh_hint);
    let hint = r.duration(&endpoint_key("refresh_hint"), &raw.refresh_hint, &label);
    if let Some(hint) = hint {
        if hint >= Duration::from_secs(24 * 3600) {
            r.warn("Bundle endpoint refresh hint set to a high value. To cover the case of unscheduled trust bundle updates, it's recommended to have a smaller value, e.g. 5m");
        }
        if hint < Duration::from_secs(60) {
            r.warn("Bundle endpoint refresh hint set too low. SPIRE will not refresh more often than 1 minute");
        }
    }
    let ip = raw.address.parse().unwrap_or_else(|_| {
        if !raw.address.is_empty() {
            // No problem, as SPIRE's server starts with it.
            r.warn(format!(
                "federation.bundle_endpoint.address {:?} is not an IP address: the endpoint listens on all addresses of \
                 this machine",
                raw.address
            ));
        }
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    });
    let port = u16::try_from(raw.port).unwrap_or_else(|_| {
        let message = format!("federation.bundle_endpoint.port {} is not a TCP port", raw.port);
        r.problem(&endpoint_key("port"), message, "");
        0
    });
    let profile = match (raw.acme, raw.profile) {
        (Some(_), Some(_)) => {
            r.problem(&ENDPOINT, "either bundle endpoint 'acme' or 'profile' can be set, but not both", "");
            return None;
        }
        (Some(raw), None) => {
            for (name, value) in [("domain_name", &raw.domain_name), ("email", &raw.email)] {
                if value.is_empty() {
                    let message = format!("federation.bundle_endpoint.acme.{name} must be configured");
                    r.problem(&endpoint_key("acme"), message, "");
                }
            }
            r.deprecated("ACME configuration within the bundle_endpoint is deprecated. Please use ACME configuration as part of the https_web profile instead.");
            acme(raw, data_dir)
        }
        (None, None) => {
            r.deprecated("Bundle endpoint is configured but has no profile set, using https_spiffe as default; please configure a profile explicitly. This will be fatal in a future release.");
            BundleEndpointProfile::HttpsSpiffe
        }
        (None, Some(profiles)) => endpoint_profile(r, profiles, data_dir)?,
    };
    Some(BundleEndpointSettings {
        address: SocketAddr::new(ip, port),
        refresh_hint: hint.unwrap_or(Duration::from_secs(300)),
        profile,
    })
}

fn acme(raw: RawAcme, data_dir: &Path) -> BundleEndpointProfile {
    BundleEndpointProfile::Acme(BundleEndpointAcme {
        directory_url: raw.directory_url,
        domain_name: raw.domain_name,
        email: raw.email,
        tos_accepted: raw.tos_accepted,
        cache_dir: data_dir.join("bundle-acme"),
    })
}

fn endpoint_profile(
    r: &mut Resolver,
    profiles: Named<RawEndpointProfile>,
    data_dir: &Path,
) -> Option<BundleEndpointProfile> {
    let path = endpoint_key("profile");
    if profiles.len() != 1 {
        r.problem(&path, "exactly one bundle endpoint profile is expected", "");
        return None;
    }
    match profiles.into_iter().next() {
        Some((kind, _)) if kind == "https_spiffe" => Some(BundleEndpointProfile::HttpsSpiffe),
        Some((kind, RawEndpointProfile { acme: Some(raw), .. })) if kind == "https_web" => Some(acme(raw, data_dir)),
        Some((kind, RawEndpointProfile { serving_cert_file: Some(cert), .. })) if kind == "https_web" => {
            let interval = r.duration(&path, &cert.file_sync_interval, "could not parse file_sync_interval");
            Some(BundleEndpointProfile::ServingCertFile {
                cert_file_path: cert.cert_file_path.into(),
                key_file_path: cert.key_file_path.into(),
                file_sync_interval: interval.filter(|i| !i.is_zero()).unwrap_or(Duration::from_secs(3600)),
            })
        }
        Some((kind, _)) if kind == "https_web" => {
            let message = "malformed https_web profile configuration: 'acme' or 'serving_cert_file' is required";
            r.problem(&path, message, "");
            None
        }
        _ => {
            let message = "unknown bundle endpoint profile configured; current supported profiles are \"https_spiffe\" and 'https_web\"";
            r.problem(&path, message, "");
            None
        }
    }
}
