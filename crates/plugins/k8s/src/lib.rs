//! What speaks with the API server of Kubernetes: the upstream authority `cert-manager`, the bundle publisher `k8s_configmap`
//! and the notifier `k8sbundle`.
//!
//! A handful of calls on six kinds of objects need no model of all of Kubernetes: `kube` and `k8s-openapi` would bring one.

mod api;
mod cert_manager;
mod configmap;
mod kubeconfig;
mod notifier;

pub use cert_manager::CertManager;
pub use configmap::ConfigMap;
pub use notifier::K8sBundle;
