//! The agent alone, for nodes.

fn main() -> std::process::ExitCode {
    finial_cli::finial_agent_main()
}
