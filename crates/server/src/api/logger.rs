//! `spire.api.server.logger.v1.Logger`: the log level, on the local socket only.

use super::{Api, Service};
use crate::authz::{Call, Permit, method};
use finial_core::ErrorKind;
use finial_proto::server::logger as pb;
use finial_proto::types;
use finial_proto::types::LogLevel;
use finial_runtime::log::{Level, LogHandle};
use tonic::{Request, Response, Status, async_trait};

fn to_proto(level: Level) -> LogLevel {
    match level {
        Level::Panic => LogLevel::Panic,
        Level::Fatal => LogLevel::Fatal,
        Level::Error => LogLevel::Error,
        Level::Warning => LogLevel::Warn,
        Level::Info => LogLevel::Info,
        Level::Debug => LogLevel::Debug,
        Level::Trace => LogLevel::Trace,
    }
}

fn from_proto(level: i32) -> Result<Level, &'static str> {
    match LogLevel::try_from(level) {
        Ok(LogLevel::Unspecified) => Err("newLevel value cannot be LogLevel_UNSPECIFIED"),
        Ok(LogLevel::Panic) => Ok(Level::Panic),
        Ok(LogLevel::Fatal) => Ok(Level::Fatal),
        Ok(LogLevel::Error) => Ok(Level::Error),
        Ok(LogLevel::Warn) => Ok(Level::Warning),
        Ok(LogLevel::Info) => Ok(Level::Info),
        Ok(LogLevel::Debug) => Ok(Level::Debug),
        Ok(LogLevel::Trace) => Ok(Level::Trace),
        Err(_) => Err("unsupported log level"),
    }
}

fn answer(log: &LogHandle) -> types::Logger {
    types::Logger { current_level: to_proto(log.level()).into(), launch_level: to_proto(log.launch_level()).into() }
}

impl Api {
    fn log_handle(&self, call: &Call) -> Result<&LogHandle, Status> {
        self.log.as_ref().ok_or_else(|| call.fail(ErrorKind::Unimplemented, "this program has no log of its own"))
    }

    async fn get_logger(
        &self,
        permit: Permit<method::GetLogger>,
        _: pb::GetLoggerRequest,
    ) -> Result<types::Logger, Status> {
        let log = self.log_handle(&permit)?;
        permit.log_info("GetLogger Called");
        permit.audit();
        Ok(answer(log))
    }

    async fn set_log_level(
        &self,
        permit: Permit<method::SetLogLevel>,
        request: pb::SetLogLevelRequest,
    ) -> Result<types::Logger, Status> {
        // As Go prints an enumeration: what has no name by its number.
        let named = LogLevel::try_from(request.new_level).map(|level| level.as_str_name().to_owned());
        permit.note("new_log_level", named.unwrap_or_else(|_| request.new_level.to_string()));
        let level = from_proto(request.new_level).map_err(|why| permit.fail(ErrorKind::InvalidArgument, why))?;
        let log = self.log_handle(&permit)?;
        permit.about("new_log_level", level.as_str());
        permit.log_info("SetLogLevel Called");
        log.set_level(level);
        permit.audit();
        Ok(answer(log))
    }

    async fn reset_log_level(
        &self,
        permit: Permit<method::ResetLogLevel>,
        _: pb::ResetLogLevelRequest,
    ) -> Result<types::Logger, Status> {
        let log = self.log_handle(&permit)?;
        permit.about("launch_log_level", log.launch_level().as_str());
        permit.log_info("ResetLogLevel Called");
        log.set_level(log.launch_level());
        permit.audit();
        Ok(answer(log))
    }
}

#[async_trait]
impl pb::logger_server::Logger for Service {
    async fn get_logger(&self, request: Request<pb::GetLoggerRequest>) -> Result<Response<types::Logger>, Status> {
        self.gate.unary(request, |permit, request| self.0.get_logger(permit, request)).await
    }

    async fn set_log_level(&self, request: Request<pb::SetLogLevelRequest>) -> Result<Response<types::Logger>, Status> {
        self.gate.unary(request, |permit, request| self.0.set_log_level(permit, request)).await
    }

    async fn reset_log_level(
        &self,
        request: Request<pb::ResetLogLevelRequest>,
    ) -> Result<Response<types::Logger>, Status> {
        self.gate.unary(request, |permit, request| self.0.reset_log_level(permit, request)).await
    }
}
