//! The commands of `spire-agent`.

mod api;
mod healthcheck;
mod run;

pub(crate) use api::go_time;

use crate::app::Command;

pub(crate) fn commands() -> Vec<Command> {
    [run::COMMANDS, api::COMMANDS, healthcheck::COMMANDS, crate::logger::of_agent::COMMANDS, crate::debug::AGENT]
        .concat()
}
