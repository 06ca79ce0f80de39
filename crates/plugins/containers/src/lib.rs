//! The workload attestors of containers: `docker` (and podman) and `k8s`.
//!
//! Both begin with the cgroup of the process ([`cgroup`]), which the kernel writes and a workload cannot choose freely, and
//! then ask who runs the container: the Docker daemon by its socket, or the kubelet by HTTPS. Neither asks anything when
//! the process runs in no container.
//!
//! Both speak plain HTTP by hyper, which the agent has anyway: two GET requests need no SDK. `bollard` and `kube` would
//! bring models of every object of Docker and Kubernetes into a program that runs on each node.

pub mod cgroup;
mod docker;
#[cfg(test)]
mod fake;
mod k8s;
mod process;

pub use docker::Docker;
pub use k8s::{ApiServer, K8s};
