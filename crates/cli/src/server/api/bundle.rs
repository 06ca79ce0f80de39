//! `bundle show`, `list`, `set`, `delete`, `count`.

use super::{ANSWER_BYTES_MAX, FILE_BYTES_MAX, plural, print};
use crate::app::Command;
use crate::context::Context;
use crate::goflag::FlagSet;
use crate::rpc::RpcExt;
use anyhow::{Context as _, bail, ensure};
use finial_core::TrustDomain;
use finial_crypto::bundle::{BundleFormat, bundle_from_json, bundle_to_json, readable};
use finial_crypto::{Certificate, pem};
use finial_proto::convert::{bundle_from_proto, bundle_to_proto};
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::bundle::{self as pb, batch_delete_federated_bundle_request::Mode};
use finial_proto::types;
use tonic::transport::Channel;

pub(crate) fn commands() -> Vec<Command> {
    vec![
        Command::server("bundle show", "Prints server CA bundle to stdout", show_flags, |cx| Box::pin(show(cx))),
        Command::server("bundle list", "Lists federated bundle data", list_flags, |cx| Box::pin(list(cx))),
        Command::server("bundle set", "Creates or updates federated bundle data", set_flags, |cx| Box::pin(set(cx))),
        Command::server("bundle delete", "Deletes federated bundle data", delete_flags, |cx| Box::pin(delete(cx))),
        Command::server("bundle count", "Count bundles", FlagSet::output, |cx| Box::pin(count(cx))),
    ]
}

fn client(cx: &Context) -> anyhow::Result<BundleClient<Channel>> {
    Ok(BundleClient::new(cx.server()?).max_decoding_message_size(ANSWER_BYTES_MAX))
}

/// How certificates and keys are written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Pem,
    Spiffe,
}

impl Format {
    fn parse(text: &str) -> anyhow::Result<Self> {
        match text.to_ascii_lowercase().as_str() {
            "" | "pem" => Ok(Self::Pem),
            "spiffe" => Ok(Self::Spiffe),
            other => bail!("invalid format: {other:?}"),
        }
    }

    fn print(self, cx: &Context, bundle: &types::Bundle) -> anyhow::Result<()> {
        match self {
            Self::Pem => {
                for authority in &bundle.x509_authorities {
                    let chain = Certificate::parse_chain(&authority.asn1);
                    for certificate in chain.context("unable to parse certificates ASN.1 DER data")? {
                        cx.print(pem::encode("CERTIFICATE", certificate.der()));
                    }
                }
            }
            Self::Spiffe => {
                let format = BundleFormat { wit: false, ..BundleFormat::SPIFFE };
                let bundle = bundle_from_proto(bundle)?;
                for error in readable(&bundle).1 {
                    cx.eprintln(format!("Warning: left out: {error}"));
                }
                cx.println(bundle_to_json(&bundle, format));
            }
        }
        Ok(())
    }
}

fn show_flags(f: &mut FlagSet) {
    let usage =
        "The format to show the bundle (only pretty output format supports this flag). Either \"pem\" or \"spiffe\".";
    f.string("format", "pem", usage);
    f.output();
}

async fn show(cx: Context) -> anyhow::Result<()> {
    let bundle = client(&cx)?.get_bundle(pb::GetBundleRequest::default()).await.rpc()?;
    if print::json_message(&cx, "spire.api.types.Bundle", &bundle)? {
        return Ok(());
    }
    Format::parse(cx.flags.string("format"))?.print(&cx, &bundle)
}

fn list_flags(f: &mut FlagSet) {
    f.string("id", "", "SPIFFE ID of the trust domain");
    let usage = "The format to list federated bundles (only pretty output format supports this flag). Either \"pem\" or \"spiffe\".";
    f.string("format", "pem", usage);
    f.output();
}

async fn list(cx: Context) -> anyhow::Result<()> {
    let mut client = client(&cx)?;
    let id = cx.flags.string("id");
    if !id.is_empty() {
        let request = pb::GetFederatedBundleRequest { trust_domain: id.into(), output_mask: None };
        let bundle = client.get_federated_bundle(request).await.rpc()?;
        if print::json_message(&cx, "spire.api.types.Bundle", &bundle)? {
            return Ok(());
        }
        return Format::parse(cx.flags.string("format"))?.print(&cx, &bundle);
    }
    let response = client.list_federated_bundles(pb::ListFederatedBundlesRequest::default()).await.rpc()?;
    if print::json_message(&cx, "spire.api.server.bundle.v1.ListFederatedBundlesResponse", &response)? {
        return Ok(());
    }
    for (at, bundle) in response.bundles.iter().enumerate() {
        if at > 0 {
            cx.println("");
        }
        let format = Format::parse(cx.flags.string("format"))?;
        let stars = "*".repeat(40);
        cx.println(format!("{stars}\n* {}\n{stars}", bundle.trust_domain));
        format.print(&cx, bundle)?;
    }
    Ok(())
}

fn set_flags(f: &mut FlagSet) {
    f.string("id", "", "SPIFFE ID of the trust domain");
    f.string("path", "", "Path to the bundle data");
    f.string("format", "pem", "The format of the bundle data. Either \"pem\" or \"spiffe\".");
    f.output();
}

async fn set(cx: Context) -> anyhow::Result<()> {
    let id = cx.flags.string("id");
    ensure!(!id.is_empty(), "id flag is required");
    let format = Format::parse(cx.flags.string("format"))?;
    // without a path, the bundle comes from standard input
    let path = Some(cx.flags.string("path")).filter(|path| !path.is_empty()).unwrap_or("-");
    let bytes = cx.read_file(path, FILE_BYTES_MAX).context("unable to load bundle data")?;
    let request = pb::BatchSetFederatedBundleRequest { bundle: vec![parse(&bytes, format, id)?], output_mask: None };
    let response = client(&cx)?.batch_set_federated_bundle(request).await.rpc();
    let response = response.context("failed to set federated bundle")?;
    if print::json_message(&cx, "spire.api.server.bundle.v1.BatchSetFederatedBundleResponse", &response)? {
        return Ok(());
    }
    match response.results.first().and_then(|r| r.status.as_ref()).filter(|s| s.code != 0) {
        Some(status) => bail!("failed to set federated bundle: {}", status.message),
        None => cx.println("bundle set."),
    }
    Ok(())
}

pub(super) fn parse(bytes: &[u8], format: Format, id: &str) -> anyhow::Result<types::Bundle> {
    match format {
        Format::Pem => {
            let roots = pem::certificates(bytes).context("unable to parse bundle data")?;
            let authority =
                |der: &std::sync::Arc<[u8]>| types::X509Certificate { asn1: der.to_vec().into(), tainted: false };
            // whether the ID is one is for the server to say
            Ok(types::Bundle {
                trust_domain: id.into(),
                x509_authorities: roots.iter().map(authority).collect(),
                ..types::Bundle::default()
            })
        }
        Format::Spiffe => {
            let trust_domain = TrustDomain::parse(id)?;
            let bundle =
                bundle_from_json(&trust_domain, bytes).context("unable to parse to spiffe bundle: spiffebundle")?;
            Ok(bundle_to_proto(&bundle))
        }
    }
}

fn delete_flags(f: &mut FlagSet) {
    f.string("id", "", "SPIFFE ID of the trust domain");
    f.string("mode", "restrict", "Deletion mode: one of restrict, delete, or dissociate");
    f.output();
}

async fn delete(cx: Context) -> anyhow::Result<()> {
    let id = cx.flags.string("id");
    ensure!(!id.is_empty(), "id is required");
    let mode = match cx.flags.string("mode") {
        "" | "restrict" => Mode::Restrict,
        "dissociate" => Mode::Dissociate,
        "delete" => Mode::Delete,
        other => bail!("unsupported mode {other:?}"),
    };
    let request = pb::BatchDeleteFederatedBundleRequest { trust_domains: vec![id.into()], mode: mode as i32 };
    let response = client(&cx)?.batch_delete_federated_bundle(request).await.rpc();
    let response = response.context("failed to delete federated bundle")?;
    if print::json_message(&cx, "spire.api.server.bundle.v1.BatchDeleteFederatedBundleResponse", &response)? {
        return Ok(());
    }
    match response.results.first().filter(|r| !print::is_ok(r.status.as_ref())) {
        Some(result) => {
            let message = result.status.as_ref().map(|s| s.message.as_str()).unwrap_or_default();
            bail!("failed to delete federated bundle {:?}: {message}", result.trust_domain)
        }
        None => cx.println("bundle deleted."),
    }
    Ok(())
}

async fn count(cx: Context) -> anyhow::Result<()> {
    let response = client(&cx)?.count_bundles(pb::CountBundlesRequest {}).await.rpc()?;
    if !print::json_message(&cx, "spire.api.server.bundle.v1.CountBundlesResponse", &response)? {
        let count = usize::try_from(response.count).unwrap_or_default();
        cx.println(format!("{count} {}", plural(count, "bundle", "bundles")));
    }
    Ok(())
}
