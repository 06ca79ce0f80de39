//! Conversions between the wire and `finial_core`. Names: `x_to_proto`, `x_from_proto`; `x_to_blob`, `x_from_blob` for
//! what SPIRE keeps in SQL columns. Parsing stops at the first error, worded as SPIRE words it.

mod bundle;
mod entry;
mod node;
mod status;

pub use bundle::{
    bundle_from_blob, bundle_from_proto, bundle_to_blob, bundle_to_proto, jwt_key_to_proto, mask_bundle,
    wit_key_to_proto,
};
pub use entry::{
    attributes_from_blob, attributes_to_blob, entry_from_proto, entry_to_proto, federates_with, id_from_proto,
    id_to_proto, mask_entry, match_behavior, selectors_from_proto, selectors_to_proto,
};
pub use node::{agent_from_proto, agent_to_proto, json_to_struct, mask_agent};
pub use status::{
    ErrorInfo, code_of, error_info, fault_of_status, item_fault, item_ok, kind_of, permission_denied,
    permission_denied_reason, status_of, with_error_info,
};

use finial_core::{EntryIdError, SelectorError, SpiffeIdError};

/// Why a message is not the thing that it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the words say it
pub enum ConvertError {
    #[error("missing entry")]
    NoEntry,
    #[error("no bundle provided")]
    NoBundle,
    #[error("request must specify SPIFFE ID")]
    NoId,
    #[error(transparent)]
    Id(#[from] SpiffeIdError),
    #[error("invalid SPIFFE ID: {0}")]
    SpiffeId(Box<ConvertError>),
    #[error("invalid parent ID: {0}")]
    ParentId(Box<ConvertError>),
    #[error("invalid federated trust domain: {0}")]
    FederatedTrustDomain(SpiffeIdError),
    #[error("invalid trust domain: {0}")]
    TrustDomain(SpiffeIdError),
    #[error("selector list is empty")]
    NoSelectors,
    #[error(transparent)]
    Selector(#[from] SelectorError),
    #[error(transparent)]
    EntryId(#[from] EntryIdError),
    #[error("missing key ID")]
    NoKeyId,
}
