//! The health question that both programs' `healthcheck` asks.

use crate::context::Context;
use crate::rpc::RpcExt;
use anyhow::bail;
use finial_proto::health::HealthCheckRequest;
use finial_proto::health::health_check_response::ServingStatus;
use finial_proto::health::health_client::HealthClient;
use std::time::Duration;
use tonic::transport::Channel;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Asks; an error says why the answer is not "serving". With `-verbose`, what went wrong is printed.
pub(crate) async fn check(cx: &Context, channel: Channel, who: &str) -> anyhow::Result<()> {
    let mut client = HealthClient::new(channel);
    let mut request = tonic::Request::new(HealthCheckRequest::default());
    request.set_timeout(TIMEOUT);
    match client.check(request).await.rpc() {
        Ok(response) => match response.status() {
            ServingStatus::Serving => Ok(()),
            other => bail!("{who} returned status {:?}", other.as_str_name()),
        },
        Err(error) => {
            if cx.flags.bool("verbose") {
                cx.eprintln(format!("Failed to check health: {error}"));
            }
            bail!("unable to determine health")
        }
    }
}
