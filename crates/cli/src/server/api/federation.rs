//! `federation create`, `update`, `show`, `list`, `delete`, `refresh`.

use super::bundle::{Format, parse as parse_bundle};
use super::{ANSWER_BYTES_MAX, FILE_BYTES_MAX, plural, print};
use crate::app::{Advised, Command};
use crate::context::Context;
use crate::goflag::{FlagSet, Flags};
use crate::rpc::RpcExt;
use anyhow::{Context as _, bail, ensure};
use finial_core::SpiffeId;
use finial_proto::server::trustdomain as pb;
use finial_proto::server::trustdomain::trust_domain_client::TrustDomainClient;
use finial_proto::types::{self, federation_relationship::BundleEndpointProfile as Profile};
use serde::Deserialize;
use serde_json::{Map, Value};
use tonic::transport::Channel;

pub(crate) fn commands() -> Vec<Command> {
    vec![
        Command::server(
            "federation create",
            "Creates a dynamic federation relationship with a foreign trust domain",
            written_flags,
            |cx| Box::pin(create(cx)),
        ),
        Command::server(
            "federation update",
            "Updates a dynamic federation relationship with a foreign trust domain",
            written_flags,
            |cx| Box::pin(update(cx)),
        ),
        Command::server("federation show", "Shows a dynamic federation relationship", show_flags, |cx| {
            Box::pin(show(cx))
        }),
        Command::server("federation list", "Lists all dynamic federation relationships", FlagSet::output, |cx| {
            Box::pin(list(cx))
        }),
        Command::server("federation delete", "Deletes a dynamic federation relationship", id_flags, |cx| {
            Box::pin(delete(cx))
        }),
        Command::server(
            "federation refresh",
            "Refreshes the bundle from the specified federated trust domain",
            id_flags,
            |cx| Box::pin(refresh(cx)),
        ),
    ]
}

fn client(cx: &Context) -> anyhow::Result<TrustDomainClient<Channel>> {
    Ok(TrustDomainClient::new(cx.server()?).max_decoding_message_size(ANSWER_BYTES_MAX))
}

fn written_flags(f: &mut FlagSet) {
    f.string(
        "data",
        "",
        "Path to a file containing federation relationships in JSON format (optional). If set to '-', read the JSON from stdin.",
    );
    f.string("trustDomain", "", "Name of the trust domain to federate with (e.g., example.org)");
    f.string(
        "bundleEndpointURL",
        "",
        "URL of the SPIFFE bundle endpoint that provides the trust bundle (must use the HTTPS protocol)",
    );
    f.string("bundleEndpointProfile", "", "Endpoint profile type (either \"https_web\" or \"https_spiffe\")");
    f.string("endpointSpiffeID", "", "SPIFFE ID of the SPIFFE bundle endpoint server. Only used for 'spiffe' profile.");
    f.string("trustDomainBundlePath", "", "Path to the trust domain bundle data (optional).");
    f.string(
        "trustDomainBundleFormat",
        "pem",
        "The format of the bundle data (optional). Either \"pem\" or \"spiffe\".",
    );
    f.output();
}

/// One relationship, as flags or a file give it.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "lowercase")]
struct Written {
    trustdomain: String,
    bundleendpointurl: String,
    bundleendpointprofile: String,
    endpointspiffeid: String,
    /// PEM text, or the bundle document itself.
    trustdomainbundle: Option<Value>,
    trustdomainbundleformat: String,
    /// Flags only: the file that the bundle is in.
    #[serde(skip)]
    bundle_path: String,
}

impl Written {
    fn from_flags(flags: &Flags) -> Self {
        let text = |name| flags.string(name).to_owned();
        Self {
            trustdomain: text("trustDomain"),
            bundleendpointurl: text("bundleEndpointURL"),
            bundleendpointprofile: text("bundleEndpointProfile"),
            endpointspiffeid: text("endpointSpiffeID"),
            trustdomainbundle: None,
            trustdomainbundleformat: text("trustDomainBundleFormat"),
            bundle_path: text("trustDomainBundlePath"),
        }
    }

    fn is_empty(&self) -> bool {
        let texts = [
            &self.trustdomain,
            &self.bundleendpointurl,
            &self.bundleendpointprofile,
            &self.endpointspiffeid,
            &self.bundle_path,
        ];
        texts.iter().all(|text| text.is_empty()) && self.trustdomainbundleformat == "pem"
    }

    fn into_wire(self, cx: &Context) -> anyhow::Result<types::FederationRelationship> {
        ensure!(!self.trustdomain.is_empty(), "trust domain is required");
        ensure!(!self.bundleendpointurl.is_empty(), "bundle endpoint URL is required");
        // SPIRE reads the bundle for the domain of the endpoint's ID, where there is one
        let mut bundle_of = self.trustdomain.clone();
        let profile = match self.bundleendpointprofile.as_str() {
            "https_web" => Profile::HttpsWeb(types::HttpsWebProfile {}),
            "https_spiffe" => {
                let endpoint = self.endpointspiffeid;
                ensure!(
                    !endpoint.is_empty(),
                    "endpoint SPIFFE ID is required if 'https_spiffe' endpoint profile is set"
                );
                let id = SpiffeId::parse(&endpoint).context("cannot parse bundle endpoint SPIFFE ID")?;
                id.trust_domain_name().clone_into(&mut bundle_of);
                Profile::HttpsSpiffe(types::HttpsspiffeProfile { endpoint_spiffe_id: endpoint })
            }
            other => bail!("unknown bundle endpoint profile type: {other:?}"),
        };
        let format = self.trustdomainbundleformat.as_str();
        let trust_domain_bundle = if !self.bundle_path.is_empty() {
            ensure!(self.bundle_path != "-", "cannot read bundle file: open -: no such file or directory");
            let bytes = cx.read_file(&self.bundle_path, FILE_BYTES_MAX).context("cannot read bundle file")?;
            let format = if format == "pem" { Format::Pem } else { Format::Spiffe };
            Some(parse_bundle(&bytes, format, &bundle_of).context("cannot parse bundle file")?)
        } else if let Some(bundle) = self.trustdomainbundle {
            Some(embedded_bundle(&bundle, format, &bundle_of).context("cannot parse bundle raw message")?)
        } else {
            None
        };
        Ok(types::FederationRelationship {
            trust_domain: self.trustdomain,
            bundle_endpoint_url: self.bundleendpointurl,
            bundle_endpoint_profile: Some(profile),
            trust_domain_bundle,
        })
    }
}

fn embedded_bundle(bundle: &Value, format: &str, trust_domain: &str) -> anyhow::Result<types::Bundle> {
    match (format, bundle) {
        ("pem", Value::String(pem)) => parse_bundle(pem.as_bytes(), Format::Pem, trust_domain),
        ("pem", other) => {
            let kind = match other {
                Value::Object(_) => "object",
                Value::Array(_) => "array",
                Value::Bool(_) => "bool",
                _ => "number",
            };
            bail!("failed to unmarshal json: json: cannot unmarshal {kind} into Go value of type string")
        }
        ("spiffe", document) => parse_bundle(document.to_string().as_bytes(), Format::Spiffe, trust_domain),
        (other, _) => bail!("bundle format {other:?} is unsupported"),
    }
}

/// What is to be created or updated: by flags, or by a file.
fn relationships(cx: &Context) -> anyhow::Result<Vec<types::FederationRelationship>> {
    let by_flags = Written::from_flags(&cx.flags);
    let path = cx.flags.string("data");
    if path.is_empty() {
        return Ok(vec![by_flags.into_wire(cx)?]);
    }
    ensure!(by_flags.is_empty(), "cannot use other flags to specify relationship fields when 'data' flag is set");
    let bytes = cx.read_file(path, FILE_BYTES_MAX)?;
    let written = read(&bytes).context("failed to parse JSON")?;
    let mut all = Vec::with_capacity(written.len());
    for (index, relationship) in written.into_iter().enumerate() {
        all.push(relationship.into_wire(cx).with_context(|| format!("could not parse item {index}"))?);
    }
    Ok(all)
}

fn read(bytes: &[u8]) -> anyhow::Result<Vec<Written>> {
    ensure!(!bytes.trim_ascii().is_empty(), "unexpected end of JSON input");
    let Some(file) = serde_json::from_slice::<Option<Map<String, Value>>>(bytes)? else { return Ok(Vec::new()) };
    let Some(list) = fold(file).remove("federationrelationships") else { return Ok(Vec::new()) };
    let list: Vec<Map<String, Value>> = serde_json::from_value(list)?;
    let read = |item| Ok(serde_json::from_value(Value::Object(fold(item)))?);
    list.into_iter().map(read).collect()
}

/// Go reads field names in any case, and takes `null` for "not given". What is inside stays as it is: bundle documents
/// have names of their own.
fn fold(object: Map<String, Value>) -> Map<String, Value> {
    object.into_iter().filter(|(_, v)| !v.is_null()).map(|(name, v)| (name.to_ascii_lowercase(), v)).collect()
}

fn block(fr: &types::FederationRelationship) -> String {
    let mut out = format!(
        "Trust domain              : {}\nBundle endpoint URL       : {}\n",
        fr.trust_domain, fr.bundle_endpoint_url
    );
    match &fr.bundle_endpoint_profile {
        Some(Profile::HttpsWeb(_)) => out.push_str("Bundle endpoint profile   : https_web\n"),
        Some(Profile::HttpsSpiffe(profile)) => out.push_str(&format!(
            "Bundle endpoint profile   : https_spiffe\nEndpoint SPIFFE ID        : {}\n",
            profile.endpoint_spiffe_id
        )),
        None => {}
    }
    out
}

async fn create(cx: Context) -> anyhow::Result<()> {
    let relationships = relationships(&cx)?;
    let request = pb::BatchCreateFederationRelationshipRequest {
        federation_relationships: relationships.clone(),
        output_mask: None,
    };
    let response = client(&cx)?.batch_create_federation_relationship(request).await.rpc().context("request failed")?;
    const NAME: &str = "spire.api.server.trustdomain.v1.BatchCreateFederationRelationshipResponse";
    if print::json_message(&cx, NAME, &response)? {
        return Ok(());
    }
    let results = response.results.into_iter().map(|r| (r.status, r.federation_relationship));
    print_results(&cx, "create", results.zip(relationships))
}

async fn update(cx: Context) -> anyhow::Result<()> {
    let relationships = relationships(&cx)?;
    let request = pb::BatchUpdateFederationRelationshipRequest {
        federation_relationships: relationships.clone(),
        input_mask: None,
        output_mask: None,
    };
    let response = client(&cx)?.batch_update_federation_relationship(request).await.rpc().context("request failed")?;
    const NAME: &str = "spire.api.server.trustdomain.v1.BatchUpdateFederationRelationshipResponse";
    if print::json_message(&cx, NAME, &response)? {
        return Ok(());
    }
    let results = response.results.into_iter().map(|r| (r.status, r.federation_relationship));
    print_results(&cx, "update", results.zip(relationships))
}

/// What an item of a batch gave, and what was asked for.
type Outcome = ((Option<types::Status>, Option<types::FederationRelationship>), types::FederationRelationship);

/// First what went well, then what did not; the empty line before each goes to standard output.
fn print_results(cx: &Context, verb: &str, results: impl Iterator<Item = Outcome>) -> anyhow::Result<()> {
    let (succeeded, failed): (Vec<Outcome>, Vec<Outcome>) =
        results.partition(|((status, _), _)| print::is_ok(status.as_ref()));
    for ((_, relationship), _) in &succeeded {
        cx.print(format!("\n{}", block(&relationship.clone().unwrap_or_default())));
    }
    for ((status, _), asked) in &failed {
        cx.println("");
        cx.eprintln(format!(
            "Failed to {verb} the following federation relationship ({}):",
            print::status(status.as_ref())
        ));
        cx.io.err(&block(asked));
    }
    ensure!(failed.is_empty(), "failed to {verb} one or more federation relationships");
    Ok(())
}

fn show_flags(f: &mut FlagSet) {
    f.string("trustDomain", "", "The trust domain name of the federation relationship to show");
    f.output();
}

async fn show(cx: Context) -> anyhow::Result<()> {
    let trust_domain = cx.flags.string("trustDomain");
    ensure!(!trust_domain.is_empty(), "a trust domain name is required");
    let request = pb::GetFederationRelationshipRequest { trust_domain: trust_domain.into(), output_mask: None };
    let relationship = client(&cx)?.get_federation_relationship(request).await.rpc();
    let relationship = relationship.context("error showing federation relationship")?;
    if !print::json_message(&cx, "spire.api.types.FederationRelationship", &relationship)? {
        cx.print(format!("Found a federation relationship with trust domain {trust_domain}:\n\n"));
        cx.print(block(&relationship));
    }
    Ok(())
}

/// One page: SPIRE's server answers all of them when no page size is given, and SPIRE's command asks so.
async fn list(cx: Context) -> anyhow::Result<()> {
    let response = client(&cx)?.list_federation_relationships(pb::ListFederationRelationshipsRequest::default()).await;
    let response = response.rpc().context("error listing federation relationship")?;
    if print::json_message(&cx, "spire.api.server.trustdomain.v1.ListFederationRelationshipsResponse", &response)? {
        return Ok(());
    }
    let count = response.federation_relationships.len();
    cx.println(format!("Found {count} {}", plural(count, "federation relationship", "federation relationships")));
    for relationship in &response.federation_relationships {
        cx.print(format!("\n{}", block(relationship)));
    }
    Ok(())
}

fn id_flags(f: &mut FlagSet) {
    f.string("id", "", "SPIFFE ID of the trust domain");
    f.output();
}

async fn delete(cx: Context) -> anyhow::Result<()> {
    let id = cx.flags.string("id");
    ensure!(!id.is_empty(), "id is required");
    let request = pb::BatchDeleteFederationRelationshipRequest { trust_domains: vec![id.into()] };
    let response = client(&cx)?.batch_delete_federation_relationship(request).await.rpc();
    let response = response.context("failed to delete federation relationship")?;
    const NAME: &str = "spire.api.server.trustdomain.v1.BatchDeleteFederationRelationshipResponse";
    if print::json_message(&cx, NAME, &response)? {
        return Ok(());
    }
    match response.results.first().filter(|r| !print::is_ok(r.status.as_ref())) {
        Some(result) => {
            let message = result.status.as_ref().map(|s| s.message.as_str()).unwrap_or_default();
            bail!("failed to delete federation relationship {:?}: {message}", result.trust_domain)
        }
        None => cx.println("federation relationship deleted."),
    }
    Ok(())
}

async fn refresh(cx: Context) -> anyhow::Result<()> {
    let id = cx.flags.string("id");
    ensure!(!id.is_empty(), "id is required");
    let request = pb::RefreshBundleRequest { trust_domain: id.into() };
    match client(&cx)?.refresh_bundle(request).await.rpc() {
        Ok(()) => {
            let done = types::Status { code: 0, message: "OK".into() };
            if !print::json_message(&cx, "spire.api.types.Status", &done)? {
                cx.println("Bundle refreshed");
            }
            Ok(())
        }
        Err(error) if error.code() == tonic::Code::NotFound => {
            bail!("there is no federation relationship with trust domain {id:?}")
        }
        Err(error) => {
            let advice = advice(error.message(), id);
            let error = anyhow::Error::from(error).context("failed to refresh bundle");
            Err(match advice {
                Some(advice) => Advised::new(error, advice).into(),
                None => error,
            })
        }
    }
}

/// What to do, by what the server says of an endpoint: the first whose words it says. The guide's table names them all.
fn advice(message: &str, id: &str) -> Option<String> {
    let again = format!(
        "have the other side's operator send `spire-server bundle show -format spiffe`, and set it: spire-server bundle set \
         -id {id} -format spiffe -path FILE"
    );
    let update =
        format!("spire-server federation update -trustDomain {id} -bundleEndpointURL … -bundleEndpointProfile");
    let known: &[(&[&str], String)] = &[
        (&["local copy of bundle not found", "has no X.509 authorities"], again.clone()),
        (
            &["signed by unknown authority: not by any that is known here"],
            format!(
                "the bundle here is older than their authorities, or somebody else answers there: if it is the former, {again}"
            ),
        ),
        (&["maybe use https_spiffe"], format!("{update} https_spiffe -endpointSpiffeID …")),
        (&["contains no URI SAN"], format!("their endpoint shows a certificate of the web: {update} https_web")),
        (
            &["serves the bundle of trust domain"],
            format!(
                "the URL is another trust domain's endpoint; if authorities of that name are really meant to sign here, set \
                 them once: spire-server bundle set -id {id} -format spiffe -path FILE"
            ),
        ),
    ];
    let found = known.iter().find(|(words, _)| words.iter().any(|words| message.contains(words)));
    found.map(|(_, advice)| advice.clone()).or_else(|| {
        let found = ADVICE.iter().find(|(words, _)| words.iter().any(|words| message.contains(words)));
        found.map(|(_, advice)| (*advice).to_owned())
    })
}

/// What to do, by words of the server, where it is the same for every trust domain.
const ADVICE: &[(&[&str], &str)] = &[
    (
        &["not by any web root of this machine"],
        "trust the authority of their certificate on this machine, or agree on https_spiffe",
    ),
    (
        &["is an authority's (CA:TRUE)"],
        "if it signs itself, add it to the web roots of this machine; otherwise their endpoint needs a certificate that is no \
         authority's; or agree on https_spiffe",
    ),
    (
        &["unexpected ID"],
        "the relationship's -endpointSpiffeID is not who answers there: servers are spiffe://DOMAIN/spire/server",
    ),
    (
        &["certificate has expired"],
        "their endpoint shows an old certificate, which they have to renew; or a clock is wrong",
    ),
    (
        &["not valid for name", "certificate is valid for"],
        "the host in -bundleEndpointURL has to be a name that their certificate has",
    ),
    (
        &["does not look like a TLS handshake", "HTTP response to HTTPS client"],
        "what listens there does not speak TLS: look at host and port of -bundleEndpointURL",
    ),
    (
        &["no such host"],
        "the host in -bundleEndpointURL has no address here: look at its spelling and at this machine's DNS",
    ),
    (
        &[
            "connection refused",
            "connection reset",
            "no answer within",
            "i/o timeout",
            "no route to host",
            "unreachable",
        ],
        "nobody answers at that address: look at -bundleEndpointURL, ask whether their endpoint is up, and which firewall is between",
    ),
    (&["unexpected status 404"], "the path of -bundleEndpointURL: endpoints of SPIRE and Finial have only /"),
    (
        &["failed to decode bundle"],
        "what is served at -bundleEndpointURL is no SPIFFE bundle: ask them for the right URL",
    ),
    (
        &["with sequence number"],
        "a server or a cache of theirs is behind the others: ask them; what is older is taken when it stays so for an hour",
    ),
    (
        &["is not an https URL", "stopped after"],
        "redirects are followed within https only, and not for ever: ask them for the URL that needs none",
    ),
];

#[cfg(test)]
mod tests {
    use super::advice;

    #[test]
    fn what_the_server_says_of_an_endpoint_leads_to_advice() {
        for (said, want) in [
            ("can't perform SPIFFE Authentication: local copy of bundle not found", "bundle set -id a.test"),
            (
                "can't perform SPIFFE Authentication: the bundle of \"a.test\" has no X.509 authorities, as",
                "bundle set -id a.test",
            ),
            (
                "x509: certificate signed by unknown authority: not by any that is known here of \"a.test\"",
                "bundle set -id a.test",
            ),
            ("x509: certificate signed by unknown authority: not by any web root of this machine", "on this machine"),
            (
                "contains SPIFFE ID \"spiffe://a.test/x\": maybe use https_spiffe instead of https_web: Get",
                "federation update",
            ),
            ("tls: failed to verify certificate: unexpected ID \"spiffe://a.test/x\"", "-endpointSpiffeID"),
            ("x509: certificate has expired or is not yet valid", "they have to renew"),
            ("unexpected status 404 fetching bundle: 404 page not found", "only /"),
        ] {
            let advice = advice(said, "a.test").unwrap_or_default();
            assert!(advice.contains(want), "{said}: {advice}");
        }
        assert_eq!(advice("something else", "a.test"), None);
    }

    /// "The command says so too", it says.
    #[test]
    fn every_message_in_the_guide_leads_to_advice() {
        let guide = include_str!("../../../../../docs/guides/federate.md");
        let rows = guide.lines().skip_while(|line| *line != "| message | who, and what |").skip(2);
        let messages: Vec<&str> =
            rows.flat_map(|row| row.split('|').nth(1).unwrap_or_default().split('`').skip(1).step_by(2)).collect();
        assert!(messages.len() > 15, "{messages:?}");
        for message in messages {
            assert!(advice(message, "a.test").is_some(), "{message}");
        }
    }
}
