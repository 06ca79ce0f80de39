//! The commands of `spire-server`. A new one: its file here, its `COMMANDS` in the list below.

pub(crate) mod api;
mod healthcheck;
mod reload;
mod run;
mod validate;

use crate::app::Command;

pub(crate) fn commands() -> Vec<Command> {
    [run::COMMANDS, healthcheck::COMMANDS, crate::logger::of_server::COMMANDS, crate::debug::SERVER, &api::commands()]
        .concat()
}
