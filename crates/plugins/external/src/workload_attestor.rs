//! Workload attestors.

use crate::Plugin;
use async_trait::async_trait;
use finial_core::{ErrorKind, Selector};
use finial_plugin::{Peer, PluginError, Reference, WorkloadAttestor, prefixed_selectors};
use finial_proto::plugin::workload_attestor::{
    AttestReferenceRequest, AttestReferenceResponse, AttestRequest, AttestResponse, PidReference,
};
use prost::Message;
use std::time::Duration;
use tonic::Request;
use tonic::metadata::MetadataValue;

/// Whoever asks may be less patient.
const DEADLINE: Duration = Duration::from_secs(60);
/// How a plugin is told who refers to a workload.
const BROKER: &str = "spire-agent-broker-caller-id";
/// How newer plugins are told of a process.
const PID_REFERENCE: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";

/// A workload attestor that is an external plugin. It is told of a process by number only: the caller checks before and
/// after that it is still the same.
pub struct ExternalWorkloadAttestor(pub Plugin);

#[async_trait]
impl WorkloadAttestor for ExternalWorkloadAttestor {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        let asked = self.0.call("Attest", AttestRequest { pid: peer.pid }, DEADLINE).await;
        let values = match asked {
            Ok(AttestResponse { selector_values }) => selector_values,
            Err(error) if error.kind == ErrorKind::Unimplemented => {
                let value = PidReference { pid: peer.pid }.encode_to_vec();
                let reference = Some(prost_types::Any { type_url: PID_REFERENCE.into(), value });
                let asked = self.0.call("AttestReference", AttestReferenceRequest { reference }, DEADLINE);
                let AttestReferenceResponse { selector_values } = asked.await?;
                selector_values
            }
            Err(error) => return Err(error),
        };
        Ok(prefixed_selectors(self.name(), values))
    }

    async fn attest_reference(&self, reference: &Reference<'_>) -> Result<Option<Vec<Selector>>, PluginError> {
        let any = prost_types::Any { type_url: reference.type_url.into(), value: reference.value.to_vec() };
        let mut request = Request::new(AttestReferenceRequest { reference: Some(any) });
        if let Ok(broker) = MetadataValue::try_from(reference.broker.as_str()) {
            request.metadata_mut().insert(BROKER, broker);
        }
        match self.0.call::<AttestReferenceRequest, _>("AttestReference", request, DEADLINE).await {
            Ok(AttestReferenceResponse { selector_values }) => {
                Ok(Some(prefixed_selectors(self.name(), selector_values)))
            }
            Err(error) if error.kind == ErrorKind::Unimplemented => Ok(None),
            Err(error) => Err(error),
        }
    }
}
