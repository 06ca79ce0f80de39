//! The container runtime itself (containerd, CRI-O), by the kubelet's own interface to it.
//!
//! The kubelet looks at its containers once a second, so that a container may run for more than a second before the kubelet
//! lists it. The runtime knows it before it starts. The pod itself, with all that it is called, the kubelet lists in time;
//! what the runtime adds is what the kubelet will say of the pod's containers as soon as it has asked the same runtime.

use super::pods::Observed;
use finial_core::ErrorKind;
use finial_net::client::uds_channel;
use finial_plugin::PluginError;
use http::uri::PathAndQuery;
use prost::Message;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

/// How long the runtime may take for one pod.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Labels that the kubelet gives each container.
const POD_UID: &str = "io.kubernetes.pod.uid";
const CONTAINER_NAME: &str = "io.kubernetes.container.name";
/// So many containers of one pod are looked at: each restart leaves one behind, until it is cleaned up.
const CONTAINERS_MAX: usize = 256;

/// Of `runtime.v1`, what we send and read; the numbers are those of the interface.
mod wire {
    use super::HashMap;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ListContainersRequest {
        #[prost(message, optional, tag = "1")]
        pub(super) filter: Option<ContainerFilter>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ContainerFilter {
        #[prost(map = "string, string", tag = "4")]
        pub(super) label_selector: HashMap<String, String>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ListContainersResponse {
        #[prost(message, repeated, tag = "1")]
        pub(super) containers: Vec<Container>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Container {
        #[prost(string, tag = "1")]
        pub(super) id: String,
        #[prost(int64, tag = "7")]
        pub(super) created_at: i64,
        #[prost(map = "string, string", tag = "8")]
        pub(super) labels: HashMap<String, String>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ContainerStatusRequest {
        #[prost(string, tag = "1")]
        pub(super) container_id: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ContainerStatusResponse {
        #[prost(message, optional, tag = "1")]
        pub(super) status: Option<ContainerStatus>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ContainerStatus {
        #[prost(string, tag = "1")]
        pub(super) id: String,
        #[prost(message, optional, tag = "8")]
        pub(super) image: Option<ImageSpec>,
        #[prost(string, tag = "9")]
        pub(super) image_ref: String,
        #[prost(map = "string, string", tag = "12")]
        pub(super) labels: HashMap<String, String>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ImageSpec {
        #[prost(string, tag = "1")]
        pub(super) image: String,
    }
}

/// The runtime at a unix socket.
pub(super) struct Runtime {
    socket: PathBuf,
    channel: OnceLock<Channel>,
}

impl Runtime {
    /// Connects when it is first asked.
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket, channel: OnceLock::new() }
    }

    /// The containers of a pod, the newest of each name.
    pub(super) async fn containers_of(&self, pod_uid: &str) -> Result<Vec<Observed>, PluginError> {
        let failed = |why: String| {
            let socket = self.socket.display();
            PluginError::new(ErrorKind::Unavailable, format!("unable to ask the container runtime at {socket}: {why}"))
        };
        match tokio::time::timeout(TIMEOUT, self.ask(pod_uid)).await {
            Ok(result) => result.map_err(|status| failed(status.message().to_owned())),
            Err(_) => Err(failed(format!("no answer within {TIMEOUT:?}"))),
        }
    }

    async fn ask(&self, pod_uid: &str) -> Result<Vec<Observed>, Status> {
        let label_selector = HashMap::from([(POD_UID.to_owned(), pod_uid.to_owned())]);
        let request = wire::ListContainersRequest { filter: Some(wire::ContainerFilter { label_selector }) };
        let path = PathAndQuery::from_static("/runtime.v1.RuntimeService/ListContainers");
        let listed: wire::ListContainersResponse = self.call(request, path).await?;
        let mut newest = BTreeMap::<String, wire::Container>::new();
        for container in listed.containers.into_iter().take(CONTAINERS_MAX) {
            let Some(name) = container.labels.get(CONTAINER_NAME).filter(|_| is_of(&container.labels, pod_uid)) else {
                continue;
            };
            if newest.get(name).is_none_or(|other| other.created_at < container.created_at) {
                newest.insert(name.clone(), container);
            }
        }
        let mut observed = Vec::with_capacity(newest.len());
        for (name, container) in newest {
            let request = wire::ContainerStatusRequest { container_id: container.id.clone() };
            let path = PathAndQuery::from_static("/runtime.v1.RuntimeService/ContainerStatus");
            let answer: wire::ContainerStatusResponse = self.call(request, path).await?;
            let status = answer.status.filter(|s| s.id == container.id && is_of(&s.labels, pod_uid));
            let status = status.ok_or_else(|| Status::internal("it answers about another container"))?;
            let image = status.image.unwrap_or_default().image;
            observed.push(Observed { name, id: status.id, image, image_id: status.image_ref });
        }
        Ok(observed)
    }

    async fn call<Q, A>(&self, request: Q, path: PathAndQuery) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let channel = self.channel.get_or_init(|| uds_channel(&self.socket)).clone();
        let mut grpc = Grpc::new(channel);
        grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
        Ok(grpc.unary(Request::new(request), path, ProstCodec::default()).await?.into_inner())
    }
}

fn is_of(labels: &HashMap<String, String>, pod_uid: &str) -> bool {
    labels.get(POD_UID).is_some_and(|uid| uid == pod_uid)
}
