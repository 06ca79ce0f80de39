//! gRPC server reflection, where SPIRE's agent has it: on the public socket, and for brokers on theirs.

use crate::endpoints::SUBSYSTEM;
use finial_proto::DESCRIPTORS;
use prost::Message;
use prost_types::{FileDescriptorProto, FileDescriptorSet};
use std::collections::BTreeSet;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::Router;
use tonic::{Request, Status};
use tonic_reflection::server::Builder;

/// A question, bytes: the name of a file or of a symbol.
const REQUEST_BYTES_MAX: usize = 4 << 10;
/// As it names itself.
const NAMES: [&str; 2] = ["grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"];

/// What a call needs to be let in, beside the connection.
pub(crate) type Check = fn(Request<()>) -> Result<Request<()>, Status>;

/// The files that declare these services, with all that they import: those of other services are nobody's business here.
fn files_of(services: &[&str]) -> FileDescriptorSet {
    // A test reads them, too.
    let all = FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_default().file;
    let declares = |file: &FileDescriptorProto| {
        let full = |name: &str| format!("{}.{name}", file.package()).trim_start_matches('.').to_owned();
        file.service.iter().any(|service| services.contains(&full(service.name()).as_str()))
    };
    let mut wanted: BTreeSet<&str> = all.iter().filter(|file| declares(file)).map(|file| file.name()).collect();
    // Imports stand before those who import them.
    for file in all.iter().rev() {
        if wanted.contains(file.name()) {
            wanted.extend(file.dependency.iter().map(String::as_str));
        }
    }
    FileDescriptorSet { file: all.iter().filter(|file| wanted.contains(file.name())).cloned().collect() }
}

/// Adds both versions, which tell of these services and of themselves. One that cannot be made is left out: nothing needs it.
pub(crate) fn add(router: Router, services: &[&str], check: Check) -> Router {
    let builder = || {
        let files = Builder::configure().register_file_descriptor_set(files_of(services));
        services.iter().chain(&NAMES).fold(files, |builder, name| builder.with_service_name(*name))
    };
    match (builder().build_v1(), builder().build_v1alpha()) {
        (Ok(v1), Ok(v1alpha)) => router
            .add_service(InterceptedService::new(v1.max_decoding_message_size(REQUEST_BYTES_MAX), check))
            .add_service(InterceptedService::new(v1alpha.max_decoding_message_size(REQUEST_BYTES_MAX), check)),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(subsystem_name = SUBSYSTEM, %error, "No gRPC reflection");
            router
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_what_is_offered_are_complete_and_no_others() {
        for (services, own) in [
            (vec!["SpiffeWorkloadAPI"], "spiffe/workload.proto"),
            (vec!["envoy.service.secret.v3.SecretDiscoveryService"], "envoy/secret.proto"),
            (vec!["spiffe.broker.API"], "spiffe/broker.proto"),
            (vec!["grpc.health.v1.Health", "no.such.Service"], "grpc/health.proto"),
        ] {
            let files = files_of(&services).file;
            let names: BTreeSet<&str> = files.iter().map(FileDescriptorProto::name).collect();
            assert!(names.contains(own), "{services:?} {names:?}");
            for file in &files {
                assert!(file.dependency.iter().all(|import| names.contains(import.as_str())), "{}", file.name());
                assert!(file.service.is_empty() || file.name() == own, "{}", file.name());
            }
        }
    }
}
