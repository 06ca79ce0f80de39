//! `localauthority x509|jwt|wit show`, `prepare`, `activate`, `taint`, `revoke`, and `upstreamauthority taint`, `revoke`.
//! Those of WIT authorities are our own, and there where SPIRE_SERVER_FFLAGS names `wit-svid`.

use super::{gotime, print};
use crate::app::Command;
use crate::context::Context;
use crate::goflag::FlagSet;
use crate::rpc::RpcExt;
use anyhow::{Context as _, ensure};
use finial_proto::server::localauthority::local_authority_client::LocalAuthorityClient;
use finial_proto::server::localauthority::{self as pb, AuthorityState};
use tonic::transport::Channel;

/// What an authority signs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    X509,
    Jwt,
    Wit,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::X509 => "X.509",
            Self::Jwt => "JWT",
            Self::Wit => "WIT",
        }
    }
}

/// The five commands of one kind.
macro_rules! commands_of {
    ($word:literal, $name:literal, $kind:expr, $prepared:literal) => {
        [
            Command::server(
                concat!("localauthority ", $word, " show"),
                concat!("Shows the local ", $name, " authorities"),
                FlagSet::output,
                |cx| Box::pin(show(cx, $kind)),
            ),
            Command::server(
                concat!("localauthority ", $word, " prepare"),
                concat!(
                    "Prepares a new ",
                    $name,
                    " authority for use by generating a new key and injecting ",
                    $prepared,
                    " into the bundle"
                ),
                FlagSet::output,
                |cx| Box::pin(prepare(cx, $kind)),
            ),
            Command::server(
                concat!("localauthority ", $word, " activate"),
                concat!(
                    "Activates a prepared ",
                    $name,
                    " authority for use, which will cause it to be used for all ",
                    $name,
                    " signing operations serviced by this server going forward"
                ),
                |f| id_flag(f, concat!("The authority ID of the ", $name, " authority to activate")),
                |cx| Box::pin(activate(cx, $kind)),
            ),
            Command::server(
                concat!("localauthority ", $word, " taint"),
                concat!("Marks the previously active ", $name, " authority as being tainted"),
                |f| id_flag(f, concat!("The authority ID of the ", $name, " authority to taint")),
                |cx| Box::pin(taint(cx, $kind)),
            ),
            Command::server(
                concat!("localauthority ", $word, " revoke"),
                concat!(
                    "Revokes the previously active ",
                    $name,
                    " authority by removing it from the bundle and propagating this update throughout the cluster"
                ),
                |f| id_flag(f, concat!("The authority ID of the ", $name, " authority to revoke")),
                |cx| Box::pin(revoke(cx, $kind)),
            ),
        ]
    };
}

pub(crate) fn commands() -> Vec<Command> {
    let mut all = Vec::new();
    all.extend(commands_of!("x509", "X.509", Kind::X509, "the resulting CA certificate"));
    all.extend(commands_of!("jwt", "JWT", Kind::Jwt, "it"));
    let wit = commands_of!("wit", "WIT", Kind::Wit, "it");
    all.extend(wit.map(|command| command.only_if(super::wit::flag_is_set)));
    all.push(Command::server(
        "upstreamauthority taint",
        "Marks the provided X.509 upstream authority as being tainted",
        |f| {
            f.string("subjectKeyID", "", key_usage("upstream X.509 authority to taint"));
            f.output();
        },
        |cx| Box::pin(taint_upstream(cx)),
    ));
    all.push(Command::server(
        "upstreamauthority revoke",
        "Revokes the previously active X.509 upstream authority by removing it from the bundle and propagating this update \
         throughout the cluster",
        |f| {
            f.string("subjectKeyID", "", key_usage("X.509 upstream authority to revoke"));
            f.output();
        },
        |cx| Box::pin(revoke_upstream(cx)),
    ));
    all
}

fn id_flag(f: &mut FlagSet, usage: &'static str) {
    f.string("authorityID", "", usage);
    f.output();
}

fn key_usage(whose: &str) -> String {
    format!("The X.509 Subject Key Identifier (or SKID) of the authority's CA certificate of the {whose}")
}

fn client(cx: &Context) -> anyhow::Result<LocalAuthorityClient<Channel>> {
    Ok(LocalAuthorityClient::new(cx.server()?))
}

fn authority_id(cx: &Context) -> anyhow::Result<String> {
    let id = cx.flags.string("authorityID");
    ensure!(!id.is_empty(), "an authority ID is required");
    Ok(id.to_owned())
}

fn subject_key_id(cx: &Context) -> anyhow::Result<String> {
    let id = cx.flags.string("subjectKeyID");
    ensure!(!id.is_empty(), "the Subject Key ID of the X.509 upstream authority is required");
    Ok(id.to_owned())
}

fn print_state(cx: &Context, kind: Kind, state: &AuthorityState) {
    cx.println(format!("  Authority ID: {}", state.authority_id));
    cx.println(format!("  Expires at: {}", gotime::utc(state.expires_at)));
    match state.upstream_authority_subject_key_id.as_str() {
        _ if kind != Kind::X509 => {}
        "" => cx.println("  Upstream authority ID: No upstream authority"),
        id => cx.println(format!("  Upstream authority Subject Key ID: {id}")),
    }
}

fn print_done(cx: &Context, kind: Kind, done: &str, state: Option<&AuthorityState>) -> anyhow::Result<()> {
    let kind_name = kind.as_str();
    cx.println(format!("{done} {kind_name} authority:"));
    let expected =
        || format!("internal error: expected to have {} {kind_name} authority information", done.to_lowercase());
    print_state(cx, kind, state.with_context(expected)?);
    Ok(())
}

/// Calls, and prints as JSON if asked to, else the state in the named field after the heading.
macro_rules! act {
    ($cx:expr, $kind:expr, $verb:literal, $done:literal, $method:ident, $request:expr, $response:literal, $field:ident) => {{
        let response = client(&$cx)?.$method($request).await.rpc();
        let response = response.with_context(|| format!("could not {} {} authority", $verb, $kind.as_str()))?;
        if print::json_message(&$cx, concat!("spire.api.server.localauthority.v1.", $response), &response)? {
            return Ok(());
        }
        print_done(&$cx, $kind, $done, response.$field.as_ref())
    }};
}

async fn show(cx: Context, kind: Kind) -> anyhow::Result<()> {
    macro_rules! states {
        ($response:expr, $name:literal) => {{
            let response = $response;
            if print::json_message(&cx, concat!("spire.api.server.localauthority.v1.", $name), &response)? {
                return Ok(());
            }
            [("active", response.active), ("prepared", response.prepared), ("old", response.old)]
        }};
    }
    let mut client = client(&cx)?;
    let states = match kind {
        Kind::X509 => {
            let response = client.get_x509_authority_state(pb::GetX509AuthorityStateRequest {}).await.rpc();
            states!(response.context("could not get X.509 authorities")?, "GetX509AuthorityStateResponse")
        }
        Kind::Jwt => {
            let response = client.get_jwt_authority_state(pb::GetJwtAuthorityStateRequest {}).await.rpc();
            states!(response?, "GetJWTAuthorityStateResponse")
        }
        Kind::Wit => {
            let response = client.get_wit_authority_state(pb::GetWitAuthorityStateRequest {}).await.rpc();
            states!(response.context("could not get WIT authorities")?, "GetWITAuthorityStateResponse")
        }
    };
    for (at, (word, state)) in states.into_iter().enumerate() {
        if at > 0 {
            cx.println("");
        }
        let heading = match word {
            "active" => "Active",
            "prepared" => "Prepared",
            _ => "Old",
        };
        cx.println(format!("{heading} {} authority:", kind.as_str()));
        match state {
            Some(state) => print_state(&cx, kind, &state),
            None => cx.println(format!("  No {word} {} authority found", kind.as_str())),
        }
    }
    Ok(())
}

#[rustfmt::skip] // one line each, to be read as a table
async fn prepare(cx: Context, kind: Kind) -> anyhow::Result<()> {
    match kind {
        Kind::X509 => act!(cx, kind, "prepare", "Prepared", prepare_x509_authority, pb::PrepareX509AuthorityRequest {}, "PrepareX509AuthorityResponse", prepared_authority),
        Kind::Jwt => act!(cx, kind, "prepare", "Prepared", prepare_jwt_authority, pb::PrepareJwtAuthorityRequest {}, "PrepareJWTAuthorityResponse", prepared_authority),
        Kind::Wit => act!(cx, kind, "prepare", "Prepared", prepare_wit_authority, pb::PrepareWitAuthorityRequest {}, "PrepareWITAuthorityResponse", prepared_authority),
    }
}

#[rustfmt::skip]
async fn activate(cx: Context, kind: Kind) -> anyhow::Result<()> {
    let authority_id = authority_id(&cx)?;
    match kind {
        Kind::X509 => act!(cx, kind, "activate", "Activated", activate_x509_authority, pb::ActivateX509AuthorityRequest { authority_id }, "ActivateX509AuthorityResponse", activated_authority),
        Kind::Jwt => act!(cx, kind, "activate", "Activated", activate_jwt_authority, pb::ActivateJwtAuthorityRequest { authority_id }, "ActivateJWTAuthorityResponse", activated_authority),
        Kind::Wit => act!(cx, kind, "activate", "Activated", activate_wit_authority, pb::ActivateWitAuthorityRequest { authority_id }, "ActivateWITAuthorityResponse", activated_authority),
    }
}

#[rustfmt::skip]
async fn taint(cx: Context, kind: Kind) -> anyhow::Result<()> {
    let authority_id = authority_id(&cx)?;
    match kind {
        Kind::X509 => act!(cx, kind, "taint", "Tainted", taint_x509_authority, pb::TaintX509AuthorityRequest { authority_id }, "TaintX509AuthorityResponse", tainted_authority),
        Kind::Jwt => act!(cx, kind, "taint", "Tainted", taint_jwt_authority, pb::TaintJwtAuthorityRequest { authority_id }, "TaintJWTAuthorityResponse", tainted_authority),
        Kind::Wit => act!(cx, kind, "taint", "Tainted", taint_wit_authority, pb::TaintWitAuthorityRequest { authority_id }, "TaintWITAuthorityResponse", tainted_authority),
    }
}

#[rustfmt::skip]
async fn revoke(cx: Context, kind: Kind) -> anyhow::Result<()> {
    let authority_id = authority_id(&cx)?;
    match kind {
        Kind::X509 => act!(cx, kind, "revoke", "Revoked", revoke_x509_authority, pb::RevokeX509AuthorityRequest { authority_id }, "RevokeX509AuthorityResponse", revoked_authority),
        Kind::Jwt => act!(cx, kind, "revoke", "Revoked", revoke_jwt_authority, pb::RevokeJwtAuthorityRequest { authority_id }, "RevokeJWTAuthorityResponse", revoked_authority),
        Kind::Wit => act!(cx, kind, "revoke", "Revoked", revoke_wit_authority, pb::RevokeWitAuthorityRequest { authority_id }, "RevokeWITAuthorityResponse", revoked_authority),
    }
}

async fn taint_upstream(cx: Context) -> anyhow::Result<()> {
    let request = pb::TaintX509UpstreamAuthorityRequest { subject_key_id: subject_key_id(&cx)? };
    let response = client(&cx)?.taint_x509_upstream_authority(request).await.rpc();
    let response = response.context("could not taint X.509 upstream authority")?;
    if !print::json_message(&cx, "spire.api.server.localauthority.v1.TaintX509UpstreamAuthorityResponse", &response)? {
        cx.println("Tainted X.509 upstream authority:");
        cx.println(format!("  Subject Key ID: {}", response.upstream_authority_subject_key_id));
    }
    Ok(())
}

async fn revoke_upstream(cx: Context) -> anyhow::Result<()> {
    let request = pb::RevokeX509UpstreamAuthorityRequest { subject_key_id: subject_key_id(&cx)? };
    let response = client(&cx)?.revoke_x509_upstream_authority(request).await.rpc();
    let response = response.context("could not revoke X.509 upstream authority")?;
    if !print::json_message(&cx, "spire.api.server.localauthority.v1.RevokeX509UpstreamAuthorityResponse", &response)? {
        cx.println("Revoked X.509 upstream authority:");
        cx.println(format!("  Subject Key ID: {}", response.upstream_authority_subject_key_id));
    }
    Ok(())
}
