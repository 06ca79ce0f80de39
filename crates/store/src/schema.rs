//! SPIRE's schema, version 25, as its own ORM creates it on each database: names, types and indexes to the letter.

use crate::sql::Dialect;

/// The version that [`statements`] makes.
pub(crate) const VERSION: i64 = 25;
/// The oldest version that [`MIGRATIONS`] can start from.
pub(crate) const VERSION_MIN: i64 = 23;
/// The SPIRE release whose code this schema belongs to; written where SPIRE looks for it.
pub(crate) const CODE_VERSION: &str = "1.15.3";

/// One column per step of version: `MIGRATIONS[0]` goes from 23 to 24. Each may be there already.
pub(crate) const MIGRATIONS: [(&str, &str, Kind); 2] = [
    ("attested_node_entries", "agent_version", Kind::Text),
    ("registered_entries", "additional_attributes", Kind::Blob),
];

/// Our own index, never needed for right answers, which SPIRE does not mind: the lookup of similar entries at each
/// creation, for which neither column alone is selective. Name, table, columns.
pub(crate) const OWN: (&str, &str, &str) =
    ("finial_registered_entries_spiffe_id_parent_id", "registered_entries", "spiffe_id, parent_id");

/// The type of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    /// Text that must be there.
    Name,
    Int,
    Big,
    Bool,
    Blob,
    Time,
    /// The row ID of another table.
    Row,
}

use Kind::{Big, Blob, Bool, Int, Name, Row, Text, Time};

impl Kind {
    pub(crate) fn sql(self, dialect: Dialect) -> &'static str {
        match (dialect, self) {
            (Dialect::Postgres, Text) => "text",
            (Dialect::Postgres, Name) => "text NOT NULL",
            (Dialect::Sqlite | Dialect::MySql, Text) => "varchar(255)",
            (Dialect::Sqlite | Dialect::MySql, Name) => "varchar(255) NOT NULL",
            (Dialect::MySql, Int) => "int",
            (Dialect::MySql, Row) => "int unsigned",
            (_, Int | Row) => "integer",
            (_, Big) => "bigint",
            (Dialect::Postgres | Dialect::MySql, Bool) => "boolean",
            (Dialect::Sqlite, Bool) => "bool",
            (Dialect::Sqlite, Blob) => "blob",
            (Dialect::Postgres, Blob) => "bytea",
            (Dialect::MySql, Blob) => "longblob",
            (Dialect::Sqlite | Dialect::MySql, Time) => "datetime",
            (Dialect::Postgres, Time) => "timestamp with time zone",
        }
    }
}

type Table = (&'static str, &'static [(&'static str, Kind)]);

/// Table name and its columns after the common ones. `migrations` is last: once it is there, all of them are.
const TABLES: [Table; 12] = [
    ("bundles", &[("trust_domain", Name), ("data", Blob)]),
    (
        "attested_node_entries",
        &[
            ("spiffe_id", Text),
            ("data_type", Text),
            ("serial_number", Text),
            ("expires_at", Time),
            ("new_serial_number", Text),
            ("new_expires_at", Time),
            ("can_reattest", Bool),
            ("agent_version", Text),
        ],
    ),
    ("attested_node_entries_events", &[("spiffe_id", Text)]),
    ("node_resolver_map_entries", &[("spiffe_id", Text), ("type", Text), ("value", Text)]),
    (
        "registered_entries",
        &[
            ("entry_id", Text),
            ("spiffe_id", Text),
            ("parent_id", Text),
            ("ttl", Int),
            ("admin", Bool),
            ("downstream", Bool),
            ("expiry", Big),
            ("revision_number", Big),
            ("store_svid", Bool),
            ("hint", Text),
            ("jwt_svid_ttl", Int),
            ("additional_attributes", Blob),
        ],
    ),
    ("registered_entries_events", &[("entry_id", Text)]),
    ("join_tokens", &[("token", Text), ("expiry", Big)]),
    ("selectors", &[("registered_entry_id", Row), ("type", Text), ("value", Text)]),
    ("dns_names", &[("registered_entry_id", Row), ("value", Text)]),
    (
        "federated_trust_domains",
        &[
            ("trust_domain", Name),
            ("bundle_endpoint_url", Text),
            ("bundle_endpoint_profile", Text),
            ("endpoint_spiffe_id", Text),
            ("implicit", Bool),
        ],
    ),
    ("ca_journals", &[("data", Blob), ("active_x509_authority_id", Text), ("active_jwt_authority_id", Text)]),
    ("migrations", &[("version", Int), ("code_version", Text)]),
];

/// Our own tables, of which SPIRE knows nothing: orders to replace the authorities of all servers. `open_kind` is the kind while
/// the order is open, so that there is one at most.
const OWN_TABLES: [Table; 2] = [
    (
        "finial_rotations",
        &[("kind", Int), ("goal", Int), ("revoke_all", Bool), ("forced", Bool), ("open_kind", Int), ("asked_by", Text)],
    ),
    ("finial_rotation_servers", &[("rotation_id", Row), ("journal_id", Row), ("data", Blob)]),
];

/// The table between entries and bundles, which has no ID of its own.
const JOIN_TABLE: &str = "federated_registration_entries";

/// Unique or not, name, table, columns.
type Index = (bool, &'static str, &'static str, &'static str);

const OWN_INDEXES: [Index; 2] = [
    (true, "finial_rotations_open_kind", "finial_rotations", "open_kind"),
    (true, "finial_rotation_servers_rotation_id_journal_id", "finial_rotation_servers", "rotation_id, journal_id"),
];

const INDEXES: [Index; 17] = [
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
    (false, "idx_federated_registration_entries_registered_entry_id", JOIN_TABLE, "registered_entry_id"),
];

/// Every statement that makes an empty database. MySQL ends a transaction with each of them, so there each leaves alone
/// what an earlier attempt made.
pub(crate) fn statements(dialect: Dialect) -> Vec<String> {
    let mut all = vec![join_table(dialect)];
    all.extend(TABLES.iter().map(|(name, columns)| table(dialect, name, columns)));
    if dialect != Dialect::MySql {
        all.extend(INDEXES.iter().map(index));
    }
    all
}

/// The statements that make our own tables.
pub(crate) fn own_tables(dialect: Dialect) -> Vec<String> {
    let mut all: Vec<_> = OWN_TABLES.iter().map(|(name, columns)| table(dialect, name, columns)).collect();
    if dialect != Dialect::MySql {
        all.extend(OWN_INDEXES.iter().map(index));
    }
    all
}

fn index((unique, name, table, columns): &Index) -> String {
    let unique = if *unique { "UNIQUE " } else { "" };
    format!("CREATE {unique}INDEX {name} ON \"{table}\"({columns}) ")
}

fn table(dialect: Dialect, name: &str, columns: &[(&str, Kind)]) -> String {
    let id = match dialect {
        Dialect::Sqlite => "integer primary key autoincrement",
        Dialect::Postgres => "serial PRIMARY KEY",
        Dialect::MySql => "int unsigned NOT NULL AUTO_INCREMENT PRIMARY KEY",
    };
    let common = [("created_at", Time), ("updated_at", Time)];
    let mut text = format!("(\"id\" {id}");
    for (name, kind) in common.iter().chain(columns) {
        text.push_str(&format!(",\"{name}\" {}", kind.sql(dialect)));
    }
    match dialect {
        Dialect::Sqlite | Dialect::Postgres => format!("CREATE TABLE \"{name}\" {text} )"),
        Dialect::MySql => mysql_table(name, &text),
    }
}

fn join_table(dialect: Dialect) -> String {
    let row = Kind::Row.sql(dialect);
    match dialect {
        Dialect::Sqlite | Dialect::Postgres => format!(
            "CREATE TABLE \"{JOIN_TABLE}\" (\"bundle_id\" {row},\"registered_entry_id\" {row}, PRIMARY KEY (\"bundle_id\",\"registered_entry_id\"))"
        ),
        Dialect::MySql => mysql_table(
            JOIN_TABLE,
            &format!(
                "(\"bundle_id\" {row},\"registered_entry_id\" {row}, PRIMARY KEY (\"bundle_id\",\"registered_entry_id\")"
            ),
        ),
    }
}

/// With its indexes in the same statement, and with backticks.
fn mysql_table(name: &str, columns: &str) -> String {
    let mut text = format!("CREATE TABLE IF NOT EXISTS \"{name}\" {columns}");
    for (unique, index, _, columns) in INDEXES.iter().chain(&OWN_INDEXES).filter(|(_, _, table, _)| *table == name) {
        let unique = if *unique { "UNIQUE " } else { "" };
        text.push_str(&format!(", {unique}KEY \"{index}\" ({columns})"));
    }
    text.push_str(") ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=utf8");
    text.replace('"', "`")
}
