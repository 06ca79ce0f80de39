//! Finial: server, agent and commands in one file.

fn main() -> std::process::ExitCode {
    finial_cli::finial_main()
}
