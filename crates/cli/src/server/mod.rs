//! The commands of `spire-server`. A new one: its file here, its `COMMANDS` in the list below.

pub(crate) mod api;
mod healthcheck;
mod run;

use crate::app::Command;

/// What SPIRE has and we do not have yet, by first word.
pub(crate) const NOT_YET: &[&str] = &[];

pub(crate) fn commands() -> Vec<Command> {
    [run::COMMANDS, healthcheck::COMMANDS, crate::logger::of_server::COMMANDS, crate::debug::SERVER, &api::commands()]
        .concat()
}
