//! `spire.api.agent.logger.v1.Logger`.

use crate::workload_api::{ApiNames, Calls};
use finial_proto::agent::logger::logger_server::Logger;
use finial_proto::agent::logger::{GetLoggerRequest, ResetLogLevelRequest, SetLogLevelRequest};
use finial_proto::types;
use finial_runtime::Metrics;
use finial_runtime::log::{Level, LogHandle};
use tonic::{Request, Response, Status};

/// The log level, while the agent runs.
pub(crate) struct LoggerApi(LogHandle, Calls);

impl LoggerApi {
    pub(crate) fn new(log: LogHandle, metrics: Metrics) -> Self {
        tracing::info!(launch_log_level = log.launch_level().as_str(), "Logger service configured");
        Self(log, Calls::new(metrics, ApiNames::LOGGER))
    }

    /// Notes a call, which ends with `result`.
    fn called<T>(&self, key: &'static str, result: Result<T, Status>) -> Result<T, Status> {
        self.1.begin(key, false).finish_with(&result);
        result
    }

    fn set(&self, number: i32) -> Result<(), Status> {
        if number == types::LogLevel::Unspecified as i32 {
            return Err(Status::invalid_argument("newLevel value cannot be LogLevel_UNSPECIFIED"));
        }
        let level = Level::ALL.into_iter().find(|level| *level as i32 + 1 == number);
        let level = level.ok_or_else(|| Status::invalid_argument("unsupported log level"))?;
        tracing::info!(new_log_level = level.as_str(), "SetLogLevel Called");
        self.0.set_level(level);
        Ok(())
    }

    fn answer(&self) -> Response<types::Logger> {
        // SPIRE's numbers are logrus's plus one: 0 is for "not said".
        let number = |level: Level| level as i32 + 1;
        Response::new(types::Logger {
            current_level: number(self.0.level()),
            launch_level: number(self.0.launch_level()),
        })
    }
}

#[tonic::async_trait]
impl Logger for LoggerApi {
    async fn get_logger(&self, _: Request<GetLoggerRequest>) -> Result<Response<types::Logger>, Status> {
        tracing::info!("GetLogger Called");
        self.called("rpc.logger.get_logger", Ok(self.answer()))
    }

    async fn set_log_level(&self, request: Request<SetLogLevelRequest>) -> Result<Response<types::Logger>, Status> {
        let set = self.set(request.get_ref().new_level);
        self.called("rpc.logger.set_log_level", set.map(|()| self.answer()))
    }

    async fn reset_log_level(&self, _: Request<ResetLogLevelRequest>) -> Result<Response<types::Logger>, Status> {
        tracing::info!(launch_log_level = self.0.launch_level().as_str(), "ResetLogLevel Called");
        self.0.set_level(self.0.launch_level());
        self.called("rpc.logger.reset_log_level", Ok(self.answer()))
    }
}
