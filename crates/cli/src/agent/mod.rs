//! The commands of `spire-agent`.

mod api;
mod healthcheck;

use crate::app::Command;

pub(crate) fn commands() -> Vec<Command> {
    [api::COMMANDS, healthcheck::COMMANDS].concat()
}
