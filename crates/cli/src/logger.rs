//! `logger get`, `set` and `reset`, of the server and of the agent: the same words over two APIs.

use crate::app::Command;
use crate::context::Context;
use crate::goflag::FlagSet;
use crate::json;
use crate::rpc::RpcExt;
use anyhow::{Context as _, bail};
use finial_proto::types::{LogLevel, Logger};
use finial_runtime::log::Level;

fn output(set: &mut FlagSet) {
    set.output();
}

fn level(set: &mut FlagSet) {
    set.string("level", "", "The new log level, one of (panic, fatal, error, warn, info, debug, trace)");
    set.output();
}

fn wanted(cx: &Context) -> anyhow::Result<i32> {
    let text = cx.flags.string("level");
    if text.is_empty() {
        bail!("a value (-level) must be set");
    }
    let Some(level) = Level::parse(text) else { bail!("the value {text:?} is not a valid setting") };
    // The API counts from 1; 0 is "not said".
    Ok(level as i32 + 1)
}

fn print(cx: &Context, logger: &Logger) -> anyhow::Result<()> {
    if cx.json() {
        cx.print(json::lines(vec![json::message("spire.api.types.Logger", logger)?]));
        return Ok(());
    }
    let name = |level: LogLevel| match level {
        LogLevel::Unspecified => "unspecified".into(),
        LogLevel::Warn => "warning".into(),
        other => other.as_str_name().to_lowercase(),
    };
    let (current, launch) = (name(logger.current_level()), name(logger.launch_level()));
    cx.print(format!("Logger Level : {current}\nLaunch Level : {launch}\n\n"));
    Ok(())
}

macro_rules! commands {
    ($name:ident, $style:ident, $api:ident::$module:ident, $channel:expr) => {
        pub(crate) mod $name {
            use super::*;
            use finial_proto::$api::$module::logger_client::LoggerClient;
            use finial_proto::$api::$module::{GetLoggerRequest, ResetLogLevelRequest, SetLogLevelRequest};

            pub(crate) const COMMANDS: &[Command] = &[
                Command::$style("logger get", "Gets the logger details", output, |cx| Box::pin(get(cx))),
                Command::$style("logger set", "Sets the logger details", level, |cx| Box::pin(set(cx))),
                Command::$style("logger reset", "Reset the logger details to launch level", output, |cx| {
                    Box::pin(reset(cx))
                }),
            ];

            fn client(cx: &Context) -> anyhow::Result<LoggerClient<tonic::transport::Channel>> {
                let channel: fn(&Context) -> anyhow::Result<tonic::transport::Channel> = $channel;
                Ok(LoggerClient::new(channel(cx)?))
            }

            async fn get(cx: Context) -> anyhow::Result<()> {
                let logger = client(&cx)?.get_logger(GetLoggerRequest {}).await.rpc();
                print(&cx, &logger.context("error fetching logger")?)
            }

            async fn set(cx: Context) -> anyhow::Result<()> {
                let request = SetLogLevelRequest { new_level: wanted(&cx)? };
                let logger = client(&cx)?.set_log_level(request).await.rpc();
                print(&cx, &logger.context("failed to set log level")?)
            }

            async fn reset(cx: Context) -> anyhow::Result<()> {
                let logger = client(&cx)?.reset_log_level(ResetLogLevelRequest {}).await.rpc();
                print(&cx, &logger.context("failed to reset logger")?)
            }
        }
    };
}

commands!(of_server, server, server::logger, |cx| cx.server());
commands!(of_agent, agent_admin, agent::logger, |cx| Ok(cx.agent_admin()));
