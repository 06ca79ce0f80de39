//! The commands of `spire-server`. A new one: its file here, its `COMMANDS` in the list below.

mod healthcheck;

use crate::app::Command;

pub(crate) fn commands() -> Vec<Command> {
    [healthcheck::COMMANDS].concat()
}
