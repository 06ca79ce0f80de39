//! Calls to a running plugin, and the services of go-plugin and of SPIRE's SDK that come before them.

use crate::handshake::Address;
use crate::log::{PluginLog, Splitter};
use finial_net::client::{tcp_channel, uds_channel};
use finial_proto::plugin::{config, go, init};
use finial_runtime::{Shutdown, Spawner};
use futures::{Stream, StreamExt};
use http::uri::PathAndQuery;
use prost::Message;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tonic::client::Grpc;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{IntoRequest, Request, Status, Streaming};
use tonic_prost::ProstCodec;

/// The largest message of a plugin.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// By this number plugins ask go-plugin's broker for our services.
const HOST_SERVICES: u32 = 1;
/// The service by which plugins are configured.
const CONFIG: &str = "spire.service.common.config.v1.Config";
/// How long a plugin may take to get ready, and to take its configuration.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long it may take to be told that it ends.
const DEINIT_TIMEOUT: Duration = Duration::from_secs(5);

/// A way to call a plugin. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Connection(Channel);

impl Connection {
    /// Nothing is opened before the first call.
    pub(crate) fn new(address: &Address) -> Self {
        Self(match address {
            Address::Unix(path) => uds_channel(path),
            Address::Tcp(at) => tcp_channel(&at.to_string()),
        })
    }

    /// One question, one answer, within `deadline`.
    pub(crate) async fn unary<Q, A>(
        &self,
        path: &str,
        question: impl IntoRequest<Q>,
        deadline: Duration,
    ) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut request = question.into_request();
        request.set_timeout(deadline);
        let call = async {
            let mut grpc = self.grpc().await?;
            grpc.unary(request, to_path(path)?, ProstCodec::<Q, A>::default()).await
        };
        let late = || Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs()));
        Ok(tokio::time::timeout(deadline, call).await.map_err(|_| late())??.into_inner())
    }

    /// A stream of questions, a stream of answers. Returns when the plugin has begun to answer, which may take until it was
    /// asked something.
    pub(crate) async fn streaming<Q, A>(
        &self,
        path: &str,
        questions: impl Stream<Item = Q> + Send + 'static,
        metadata: MetadataMap,
    ) -> Result<Streaming<A>, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut request = Request::new(questions);
        *request.metadata_mut() = metadata;
        let answers = self.grpc().await?.streaming(request, to_path(path)?, ProstCodec::<Q, A>::default()).await?;
        Ok(answers.into_inner())
    }

    async fn grpc(&self) -> Result<Grpc<Channel>, Status> {
        let mut grpc = Grpc::new(self.0.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        grpc.ready().await.map_err(|e| Status::unavailable(format!("the plugin cannot be reached: {e}")))?;
        Ok(grpc)
    }

    /// Tells the plugin where our services are, and listens to what it writes to its output once it serves: until `stop`.
    pub(crate) fn attend(&self, host: &Path, log: Arc<PluginLog>, spawner: &Spawner, stop: &Shutdown) {
        let info = go::ConnInfo {
            service_id: HOST_SERVICES,
            network: "unix".into(),
            address: host.to_string_lossy().into_owned(),
            knock: None,
        };
        let (broker, until) = (self.clone(), stop.clone());
        let held = futures::stream::iter([info]).chain(futures::stream::pending());
        spawner.spawn("plugin broker", async move {
            let hold = async {
                let answers = broker.streaming("/plugin.GRPCBroker/StartStream", held, MetadataMap::new()).await;
                let Ok(mut answers) = answers else { return };
                // Plugins offer no services this way that we would use.
                while let Ok(Some(go::ConnInfo { .. })) = answers.message().await {}
            };
            tokio::select! { () = hold => {}, () = until.cancelled() => {} }
        });
        let (stdio, until) = (self.clone(), stop.clone());
        spawner.spawn("plugin stdio", async move {
            tokio::select! { () = stdio.output(&log) => {}, () = until.cancelled() => {} }
        });
    }

    async fn output(&self, log: &PluginLog) {
        let nothing = futures::stream::iter([()]);
        let pieces = self.streaming("/plugin.GRPCStdio/StreamStdio", nothing, MetadataMap::new()).await;
        let Ok(mut pieces) = pieces else { return };
        let mut channels = [Splitter::default(), Splitter::default()];
        let mut each = |line: &[u8]| log.line(line);
        while let Ok(Some(go::StdioData { channel, data })) = pieces.message().await {
            let [stdout, stderr] = &mut channels;
            let is_error = channel == i32::from(go::stdio_data::Channel::Stderr);
            (if is_error { stderr } else { stdout }).take(&data, &mut each);
        }
        channels.iter_mut().for_each(|splitter| splitter.finish(&mut each));
    }

    /// Introduces us; returns the services that the plugin has.
    pub(crate) async fn initialize(&self, ours: &[&str]) -> Result<Vec<String>, Status> {
        let request = init::InitRequest { host_service_names: ours.iter().map(|s| (*s).to_owned()).collect() };
        let path = "/spire.service.private.init.v1.Init/Init";
        let answer: init::InitResponse = self.unary(path, request, READY_TIMEOUT).await?;
        Ok(answer.plugin_service_names)
    }

    /// Whether a plugin with these services takes a configuration.
    pub(crate) fn is_configurable(services: &[String]) -> bool {
        services.iter().any(|service| service == CONFIG)
    }

    /// Gives the plugin its configuration.
    pub(crate) async fn configure(&self, trust_domain: &str, text: String) -> Result<(), Status> {
        let core_configuration = Some(config::CoreConfiguration { trust_domain: trust_domain.into() });
        let request = config::ConfigureRequest { core_configuration, hcl_configuration: text };
        let config::ConfigureResponse {} = self.unary(&format!("/{CONFIG}/Configure"), request, READY_TIMEOUT).await?;
        Ok(())
    }

    /// What the plugin has to say against a configuration. Nothing where it does not judge any.
    pub(crate) async fn validate(&self, trust_domain: &str, text: String) -> Result<Vec<String>, Status> {
        let core_configuration = Some(config::CoreConfiguration { trust_domain: trust_domain.into() });
        let request = config::ValidateRequest { core_configuration, hcl_configuration: text };
        match self.unary(&format!("/{CONFIG}/Validate"), request, READY_TIMEOUT).await {
            Ok(config::ValidateResponse { notes, .. }) => Ok(notes),
            Err(status) if status.code() == tonic::Code::Unimplemented => Ok(Vec::new()),
            Err(status) => Err(status),
        }
    }

    /// Has the plugin clean up and end.
    pub(crate) async fn end(&self) -> Result<(), Status> {
        let path = "/spire.service.private.init.v1.Init/Deinit";
        let deinit = self.unary(path, init::DeinitRequest {}, DEINIT_TIMEOUT).await;
        if let Err(status) = &deinit
            && status.code() == tonic::Code::DeadlineExceeded
        {
            return deinit.map(|init::DeinitResponse {}| ()); // it would not hear of this either
        }
        // It hangs up while it answers.
        let path = "/plugin.GRPCController/Shutdown";
        let _: Result<go::Empty, _> = self.unary(path, go::Empty {}, DEINIT_TIMEOUT).await;
        match deinit {
            Ok(init::DeinitResponse {}) => Ok(()),
            Err(status) if status.code() == tonic::Code::Unimplemented => Ok(()),
            Err(status) => Err(status),
        }
    }
}

fn to_path(path: &str) -> Result<PathAndQuery, Status> {
    PathAndQuery::try_from(path).map_err(|e| Status::internal(e.to_string()))
}
