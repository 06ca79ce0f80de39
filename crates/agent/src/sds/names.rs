//! Which secrets there are for a workload, and by which names: the same for all ways of asking.

use crate::cache::{BundleForms, TlsSecret, ViewState};
use finial_config::SdsSettings;
use finial_crypto::sha256_hex;
use finial_proto::envoy::Any;
use finial_proto::envoy::core::node::UserAgentVersionType;
use finial_proto::envoy::core::{DataSource, Node, TypedExtensionConfig};
use finial_proto::envoy::tls::secret::Type;
use finial_proto::envoy::tls::spiffe_cert_validator_config::TrustDomain;
use finial_proto::envoy::tls::{CertificateValidationContext, Secret, SpiffeCertValidatorConfig};
use prost_types::value::Kind;
use std::collections::BTreeSet;
use std::sync::Arc;
use tonic::Status;

/// By which name a node's metadata say how it wants its roots.
const DISABLE_KEY: &str = "disable_spiffe_cert_validation";
/// Envoy's validator that knows which roots belong to which trust domain.
const VALIDATOR: &str = "envoy.tls.cert_validator.spiffe";
/// How much of a list of names a refusal repeats, bytes: it travels in a header.
const LISTED_BYTES_MAX: usize = 4 << 10;

/// How a proxy wants its roots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Roots {
    /// Each with its trust domain.
    Spiffe,
    /// As Envoy takes them from anyone: any of them may vouch for any name.
    Plain,
}

impl Roots {
    /// As the node says in its metadata, else as configured; plain for an Envoy that knows nothing else.
    pub(super) fn wanted_by(node: Option<&Node>, settings: &SdsSettings) -> Self {
        let metadata = node.and_then(|n| n.metadata.as_ref()).and_then(|m| m.fields.get(DISABLE_KEY));
        let said = metadata.and_then(|value| match &value.kind {
            Some(Kind::BoolValue(on)) => Some(*on),
            Some(Kind::StringValue(text)) => go_bool(text),
            _ => None,
        });
        if said.unwrap_or(settings.disable_spiffe_cert_validation) || node.is_some_and(is_old) {
            Self::Plain
        } else {
            Self::Spiffe
        }
    }
}

/// Envoy up to 1.17; one that does not say is taken for newer.
fn is_old(node: &Node) -> bool {
    let Some(UserAgentVersionType::UserAgentBuildVersion(build)) = &node.user_agent_version_type else { return false };
    build.version.is_some_and(|v| v.major_number == 0 || (v.major_number == 1 && v.minor_number <= 17))
}

/// What Go's parser takes for a truth value.
fn go_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// A secret with its name.
#[derive(Clone, Debug)]
pub(super) struct Resource {
    pub(super) name: String,
    /// The same for the same content, also of another stream.
    pub(super) version: String,
    pub(super) any: Any,
}

/// What a name may stand for.
enum Content<'a> {
    Certificate(&'a TlsSecret),
    Bundle(&'a BundleForms),
    AllBundles,
}

/// A name, and whether it is there beside the one by which the content is known.
struct Named<'a> {
    name: &'a str,
    alias: bool,
    content: Content<'a>,
}

/// The secrets of one state of a view.
pub(super) struct Secrets<'a> {
    pub(super) state: &'a ViewState,
    pub(super) settings: &'a SdsSettings,
    pub(super) roots: Roots,
}

impl<'a> Secrets<'a> {
    /// All names, in the order in which SPIRE answers. Where two are the same, the first counts.
    fn names(&self) -> impl Iterator<Item = Named<'a>> + use<'a> {
        let (state, settings) = (self.state, self.settings);
        let named = |name, content| Named { name, alias: false, content };
        let alias = |name, content| Named { name, alias: true, content };
        let mut bundles = state.bundles();
        let own = bundles.next().into_iter().flat_map(move |own: &Arc<BundleForms>| {
            [
                named(&own.id, Content::Bundle(own)),
                alias(&settings.default_bundle_name, Content::Bundle(own)),
                alias(&settings.default_all_bundles_name, Content::AllBundles),
            ]
        });
        let federated = bundles.map(move |bundle| named(&bundle.id, Content::Bundle(bundle)));
        let certificate = move |(at, one): (usize, &'a TlsSecret)| {
            let default = (at == 0).then(|| alias(&settings.default_svid_name, Content::Certificate(one)));
            std::iter::once(named(one.id.as_str(), Content::Certificate(one))).chain(default)
        };
        own.chain(federated).chain(state.certificates().iter().enumerate().flat_map(certificate))
    }

    /// What goes by these names; without names, all there is.
    ///
    /// # Errors
    /// For a name that nothing goes by, in SPIRE's words.
    pub(super) fn asked(&self, names: &BTreeSet<String>) -> Result<Vec<Resource>, Status> {
        if names.is_empty() {
            return self.all();
        }
        let mut left = names.iter().map(String::as_str).collect();
        let found = self.take(&mut left)?;
        if left.is_empty() { Ok(found) } else { Err(unauthorized(&left)) }
    }

    /// What goes by those of the names that something goes by.
    pub(super) fn present(&self, names: &BTreeSet<String>) -> Result<Vec<Resource>, Status> {
        self.take(&mut names.iter().map(String::as_str).collect())
    }

    fn take(&self, names: &mut BTreeSet<&str>) -> Result<Vec<Resource>, Status> {
        self.names().filter(|named| names.remove(named.name)).map(|named| self.resource(&named)).collect()
    }

    /// Everything, each by the name that is its own.
    pub(super) fn all(&self) -> Result<Vec<Resource>, Status> {
        self.names().filter(|named| !named.alias).map(|named| self.resource(&named)).collect()
    }

    fn resource(&self, named: &Named<'_>) -> Result<Resource, Status> {
        let (r#type, digest) = match named.content {
            Content::Certificate(one) => {
                // The chain says it all: there is one key to it.
                let chain = one.certificate.certificate_chain.as_ref().map(DataSource::bytes).unwrap_or_default();
                (Type::TlsCertificate(one.certificate.clone()), sha256_hex(chain))
            }
            Content::Bundle(bundle) => self.context(std::iter::once(bundle)),
            Content::AllBundles if self.roots == Roots::Plain => {
                return Err(Status::internal("unable to use \"SPIFFE validator\" on Envoy below 1.17"));
            }
            Content::AllBundles => self.context(self.state.bundles().map(Arc::as_ref)),
        };
        let secret = Secret { name: named.name.to_owned(), r#type: Some(r#type) };
        let version = digest.get(..16).unwrap_or_default().to_owned();
        Ok(Resource { name: secret.name.clone(), version, any: Any::secret(&secret) })
    }

    /// What to validate others with.
    fn context<'b>(&self, bundles: impl Iterator<Item = &'b BundleForms>) -> (Type, String) {
        let context = match self.roots {
            Roots::Plain => {
                let pem = bundles.map(BundleForms::x509_pem).next().unwrap_or_default();
                CertificateValidationContext {
                    trusted_ca: Some(DataSource::inline(pem)),
                    custom_validator_config: None,
                }
            }
            Roots::Spiffe => {
                let mut trust_domains: Vec<TrustDomain> = bundles
                    .map(|bundle| TrustDomain {
                        name: bundle.bundle.trust_domain.as_str().to_owned(),
                        trust_bundle: Some(DataSource::inline(bundle.x509_pem())),
                    })
                    .collect();
                trust_domains.sort_by(|a, b| a.name.cmp(&b.name));
                let config = Any::new(&SpiffeCertValidatorConfig { trust_domains });
                let validator = TypedExtensionConfig { name: VALIDATOR.to_owned(), typed_config: Some(config) };
                CertificateValidationContext { trusted_ca: None, custom_validator_config: Some(validator) }
            }
        };
        let digest = sha256_hex(&Any::new(&context).value);
        (Type::ValidationContext(context), digest)
    }
}

fn unauthorized(names: &BTreeSet<&str>) -> Status {
    let (mut listed, mut left_out) = (String::new(), 0);
    for name in names {
        if listed.len() + name.len() > LISTED_BYTES_MAX {
            left_out += 1;
            continue;
        }
        let space = if listed.is_empty() { "" } else { " " };
        listed.push_str(&format!("{space}{name:?}"));
    }
    let more = if left_out > 0 { format!(" and {left_out} more") } else { String::new() };
    Status::invalid_argument(format!("workload is not authorized for the requested identities [{listed}]{more}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_proto::envoy::core::BuildVersion;
    use finial_proto::envoy::types::SemanticVersion;

    fn node(version: Option<(u32, u32)>, metadata: Option<Kind>) -> Node {
        let value = prost_types::Value { kind: metadata.clone() };
        let fields = [(DISABLE_KEY.to_owned(), value)].into();
        let build = |(major_number, minor_number)| BuildVersion {
            version: Some(SemanticVersion { major_number, minor_number, patch: 0 }),
            metadata: None,
        };
        Node {
            metadata: metadata.is_some().then_some(prost_types::Struct { fields }),
            user_agent_version_type: version.map(|v| UserAgentVersionType::UserAgentBuildVersion(build(v))),
            ..Default::default()
        }
    }

    #[test]
    fn a_proxy_gets_roots_as_it_can_take_them() {
        let text = |text: &str| Some(Kind::StringValue(text.to_owned()));
        let no_version = Node {
            user_agent_version_type: Some(UserAgentVersionType::UserAgentBuildVersion(BuildVersion::default())),
            ..Default::default()
        };
        for (disabled, node, expected) in [
            (false, None, Roots::Spiffe),
            (true, None, Roots::Plain),
            (false, Some(node(None, None)), Roots::Spiffe),
            (false, Some(node(Some((1, 17)), None)), Roots::Plain),
            (false, Some(node(Some((1, 18)), None)), Roots::Spiffe),
            (false, Some(node(Some((0, 99)), None)), Roots::Plain),
            (false, Some(node(Some((2, 0)), None)), Roots::Spiffe),
            (false, Some(no_version), Roots::Spiffe),
            (false, Some(node(None, Some(Kind::BoolValue(true)))), Roots::Plain),
            (true, Some(node(None, Some(Kind::BoolValue(false)))), Roots::Spiffe),
            (true, Some(node(Some((1, 17)), Some(Kind::BoolValue(false)))), Roots::Plain),
            (false, Some(node(None, text("true"))), Roots::Plain),
            (false, Some(node(None, text("T"))), Roots::Plain),
            (true, Some(node(None, text("0"))), Roots::Spiffe),
            (false, Some(node(None, text("yes"))), Roots::Spiffe),
            (true, Some(node(None, text("tRUE"))), Roots::Plain),
            (true, Some(node(None, Some(Kind::NumberValue(0.0)))), Roots::Plain),
        ] {
            let settings = SdsSettings { disable_spiffe_cert_validation: disabled, ..Default::default() };
            assert_eq!(Roots::wanted_by(node.as_ref(), &settings), expected, "{disabled} {node:?}");
        }
    }

    #[test]
    fn a_refusal_fits_into_a_header() {
        let names: Vec<String> = (0..1000).map(|n| format!("spiffe://td/{n:060}")).collect();
        let message = unauthorized(&names.iter().map(String::as_str).collect()).message().to_owned();
        assert!(message.len() < 5000 && message.ends_with(" more"), "{message}");
        let few = unauthorized(&["b", "a\n"].into());
        assert_eq!(few.message(), "workload is not authorized for the requested identities [\"a\\n\" \"b\"]");
    }
}
