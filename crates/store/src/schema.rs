//! SPIRE's schema, version 25, as its own ORM creates it: names, types and indexes to the letter.

/// The version that [`TABLES`] makes.
pub(crate) const VERSION: i64 = 25;
/// The oldest version that [`MIGRATIONS`] can start from.
pub(crate) const VERSION_MIN: i64 = 23;
/// The SPIRE release whose code this schema belongs to; written where SPIRE looks for it.
pub(crate) const CODE_VERSION: &str = "1.15.3";

/// One statement per step of version: `MIGRATIONS[0]` goes from 23 to 24. Each adds a column that may be there already.
pub(crate) const MIGRATIONS: [(&str, &str, &str); 2] = [
    ("attested_node_entries", "agent_version", "varchar(255)"),
    ("registered_entries", "additional_attributes", "blob"),
];

/// Our own additions: never needed for right answers, and SPIRE does not mind them.
pub(crate) const OWN: [&str; 1] = [
    // the similar-entry lookup of each creation: neither column alone is selective
    "CREATE INDEX IF NOT EXISTS finial_registered_entries_spiffe_id_parent_id ON \"registered_entries\"(spiffe_id, parent_id)",
];

const COMMON: &str = "\"id\" integer primary key autoincrement,\"created_at\" datetime,\"updated_at\" datetime";

/// Table name and its columns after the common ones.
const TABLES: [(&str, &str); 12] = [
    ("bundles", "\"trust_domain\" varchar(255) NOT NULL,\"data\" blob"),
    (
        "attested_node_entries",
        "\"spiffe_id\" varchar(255),\"data_type\" varchar(255),\"serial_number\" varchar(255),\"expires_at\" datetime,\"new_serial_number\" varchar(255),\"new_expires_at\" datetime,\"can_reattest\" bool,\"agent_version\" varchar(255)",
    ),
    ("attested_node_entries_events", "\"spiffe_id\" varchar(255)"),
    ("node_resolver_map_entries", "\"spiffe_id\" varchar(255),\"type\" varchar(255),\"value\" varchar(255)"),
    (
        "registered_entries",
        "\"entry_id\" varchar(255),\"spiffe_id\" varchar(255),\"parent_id\" varchar(255),\"ttl\" integer,\"admin\" bool,\"downstream\" bool,\"expiry\" bigint,\"revision_number\" bigint,\"store_svid\" bool,\"hint\" varchar(255),\"jwt_svid_ttl\" integer,\"additional_attributes\" blob",
    ),
    ("registered_entries_events", "\"entry_id\" varchar(255)"),
    ("join_tokens", "\"token\" varchar(255),\"expiry\" bigint"),
    ("selectors", "\"registered_entry_id\" integer,\"type\" varchar(255),\"value\" varchar(255)"),
    ("migrations", "\"version\" integer,\"code_version\" varchar(255)"),
    ("dns_names", "\"registered_entry_id\" integer,\"value\" varchar(255)"),
    (
        "federated_trust_domains",
        "\"trust_domain\" varchar(255) NOT NULL,\"bundle_endpoint_url\" varchar(255),\"bundle_endpoint_profile\" varchar(255),\"endpoint_spiffe_id\" varchar(255),\"implicit\" bool",
    ),
    ("ca_journals", "\"data\" blob,\"active_x509_authority_id\" varchar(255),\"active_jwt_authority_id\" varchar(255)"),
];

const JOIN_TABLE: &str = "CREATE TABLE \"federated_registration_entries\" (\"bundle_id\" integer,\"registered_entry_id\" integer, PRIMARY KEY (\"bundle_id\",\"registered_entry_id\"))";

/// Unique or not, name, table, columns.
const INDEXES: [(bool, &str, &str, &str); 17] = [
    (true, "uix_bundles_trust_domain", "bundles", "trust_domain"),
    (false, "idx_attested_node_entries_expires_at", "attested_node_entries", "expires_at"),
    (true, "uix_attested_node_entries_spiffe_id", "attested_node_entries", "spiffe_id"),
    (true, "idx_node_resolver_map", "node_resolver_map_entries", "spiffe_id, \"type\", \"value\""),
    (false, "idx_registered_entries_spiffe_id", "registered_entries", "spiffe_id"),
    (false, "idx_registered_entries_parent_id", "registered_entries", "parent_id"),
    (false, "idx_registered_entries_expiry", "registered_entries", "\"expiry\""),
    (false, "idx_registered_entries_hint", "registered_entries", "\"hint\""),
    (true, "uix_registered_entries_entry_id", "registered_entries", "entry_id"),
    (true, "uix_join_tokens_token", "join_tokens", "\"token\""),
    (false, "idx_selectors_type_value", "selectors", "\"type\", \"value\""),
    (true, "idx_selector_entry", "selectors", "registered_entry_id, \"type\", \"value\""),
    (true, "idx_dns_entry", "dns_names", "registered_entry_id, \"value\""),
    (true, "uix_federated_trust_domains_trust_domain", "federated_trust_domains", "trust_domain"),
    (false, "idx_ca_journals_active_x509_authority_id", "ca_journals", "active_x509_authority_id"),
    (false, "idx_ca_journals_active_jwt_authority_id", "ca_journals", "active_jwt_authority_id"),
    (
        false,
        "idx_federated_registration_entries_registered_entry_id",
        "federated_registration_entries",
        "registered_entry_id",
    ),
];

/// Every statement that makes an empty database.
pub(crate) fn statements() -> Vec<String> {
    let mut all = vec![JOIN_TABLE.to_owned()];
    all.extend(TABLES.iter().map(|(name, columns)| format!("CREATE TABLE \"{name}\" ({COMMON},{columns} )")));
    all.extend(INDEXES.iter().map(|(unique, name, table, columns)| {
        let unique = if *unique { "UNIQUE " } else { "" };
        format!("CREATE {unique}INDEX {name} ON \"{table}\"({columns}) ")
    }));
    all
}
