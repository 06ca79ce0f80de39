//! `oidc-discovery-provider`, flag for flag: one program without commands.

use crate::app::Exit;
use crate::context::{Context, Io};
use crate::goflag::{FlagError, FlagSet};
use crate::launch;
use finial_config::{Loaded, OIDC_CONFIG_DEFAULT, OidcEndpoint, OidcSettings, load_oidc};
use finial_core::{Clock, SystemClock};
use finial_oidc::{Keys, ServeError};
use finial_runtime::Spawner;
use finial_server::publish::BundleFeed;
use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Weak};

fn flags() -> FlagSet {
    let mut set = FlagSet::new("oidc-discovery-provider");
    set.bool("version", "print version");
    set.string("config", OIDC_CONFIG_DEFAULT, "configuration file");
    set.bool("expandEnv", "expand environment variables in config file");
    set
}

/// Runs the provider until a signal. Gives the exit code: Go's 2 for flags that it does not know, 1 for other failures.
pub(crate) fn main(args: &[String], io: &Io) -> u8 {
    let flags = match flags().parse(args) {
        Ok(flags) => flags,
        Err(error) => {
            if error != FlagError::Help {
                io.err(&format!("{error}\n"));
            }
            io.err(&self::flags().usage());
            return if error == FlagError::Help { 0 } else { 2 };
        }
    };
    if flags.bool("version") {
        io.out(&format!("{}\n", crate::version()));
        return 0;
    }
    if !flags.rest().is_empty() {
        let rest = flags.rest().join(" ");
        io.err(&format!("Error: unexpected arguments: [{rest}]\n{}", self::flags().usage()));
        return 1;
    }
    match run(&Context { flags, io: io.clone() }) {
        Ok(()) => 0,
        Err(error) => {
            if error.downcast_ref::<Exit>().is_none() {
                io.err(&format!("{error:#}\n"));
            }
            1
        }
    }
}

fn run(cx: &Context) -> anyhow::Result<()> {
    let (path, expand) = (Path::new(cx.flags.string("config")), cx.flags.bool("expandEnv"));
    let loaded = load_oidc(path, expand, &|name| cx.io.var(name)).map_err(|e| launch::refuse_config(cx, &e))?;
    let Loaded { settings, notices, .. } = loaded;
    let log = launch::prepare(cx, &settings.log, &notices)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    launch::run("OIDC discovery provider", runtime, log, |spawner| serve(settings, spawner))
}

async fn serve(settings: OidcSettings, spawner: Spawner) -> Result<(), ServeError> {
    finial_oidc::run(settings, Arc::new(SystemClock), &spawner).await
}

/// The provider in a server: its keys are those of the server's own bundle, from the moment at which they change.
pub(crate) async fn beside(
    endpoint: OidcEndpoint,
    bundles: Weak<BundleFeed>,
    clock: Arc<dyn Clock>,
    spawner: &Spawner,
) -> Result<(), ServeError> {
    let keys = Keys::new(clock.clone(), endpoint.documents.set_key_use);
    let Some(mut changes) = bundles.upgrade().map(|bundles| bundles.changes()) else { return Ok(()) };
    let shutdown = spawner.shutdown();
    let take = move |keys: &Keys| {
        if let Some(own) = bundles.upgrade().and_then(|bundles| bundles.own()) {
            keys.set(&own.bundle);
        }
    };
    take(&keys);
    finial_oidc::serve(endpoint, keys.clone(), clock, spawner).await?;
    spawner.service("oidc keys", async move {
        loop {
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return Ok::<(), Infallible>(()) },
                () = shutdown.cancelled() => return Ok(()),
            }
            take(&keys);
        }
    });
    Ok(())
}
