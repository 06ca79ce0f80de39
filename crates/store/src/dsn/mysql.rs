//! MySQL's connection strings as go-sql-driver reads them: `user:password@tcp(host:port)/database?parseTime=true&…`.

use super::{percent_decoded, system_roots};
use sqlx::mysql::{MySqlConnectOptions, MySqlSslMode};
use std::path::PathBuf;
use std::time::Duration;

/// What a connection string says.
#[derive(Clone)]
pub(crate) struct MySqlDsn {
    /// How to connect.
    pub(crate) options: MySqlConnectOptions,
    /// Host and database, for messages.
    pub(crate) name: String,
    /// System variables to set on each connection, as a statement; may be empty.
    pub(crate) setup: String,
    /// How long connecting may take.
    pub(crate) connect_max: Option<Duration>,
}

/// The files of SPIRE's keys beside the connection string. With any of them TLS is used, and the server's name checked.
#[derive(Clone, Debug, Default)]
pub(crate) struct TlsFiles {
    pub(crate) root: Option<PathBuf>,
    /// Certificate and key of this client.
    pub(crate) client: Option<(PathBuf, PathBuf)>,
}

/// That of SPIRE's tables. With a larger one the database would convert each row before it compares it with a value, and
/// use no index.
const CHARSET: &str = "utf8";

/// Statements that a connection keeps prepared: more than there are, as giving one up costs 40 ms (the driver sends a
/// packet that has no answer, and the next one waits for its acknowledgment).
const STATEMENTS_MAX: usize = 300;

/// Keys of the driver that need nothing done here.
const WITHOUT_EFFECT: [&str; 19] = [
    "allowAllFiles",
    "allowFallbackToPlaintext",
    "allowNativePasswords",
    "allowOldPasswords",
    "charset",
    "checkConnLiveness",
    "clientFoundRows",
    "collation",
    "columnsWithAlias",
    "compress",
    "connectionAttributes",
    "interpolateParams",
    "maxAllowedPacket",
    "multiStatements",
    "parseTime",
    "readTimeout",
    "rejectReadOnly",
    "timeTruncate",
    "writeTimeout",
];

/// Reads one. The message of an error never holds the string, which may hold a password.
pub(crate) fn parse(text: &str, files: &TlsFiles) -> Result<MySqlDsn, String> {
    // the password and the address may hold a '/', the database name may not
    let Some((before, after)) = text.rsplit_once('/') else {
        return Err("invalid DSN: missing the slash separating the database name".into());
    };
    let (login, address) = match before.rsplit_once('@') {
        Some((login, address)) => (login, address),
        None => ("", before),
    };
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    let (database, params) = after.split_once('?').unwrap_or((after, ""));
    let database = percent_decoded(database).ok_or("invalid DSN: invalid percent-escape in the database name")?;
    let mut options = MySqlConnectOptions::new().username(user).database(&database).charset(CHARSET);
    options = options.statement_cache_capacity(STATEMENTS_MAX);
    if !password.is_empty() {
        options = options.password(password);
    }
    let (mut options, place) = with_address(options, address)?;
    let mut dsn = MySqlDsn {
        options: options.clone(),
        name: format!("MySQL at {place} (database {database})"),
        setup: String::new(),
        connect_max: None,
    };
    let (mut parse_time, mut tls) = (false, String::new());
    for (key, value) in params.split('&').filter_map(|pair| pair.split_once('=')) {
        let decoded =
            || percent_decoded(&value.replace('+', " ")).ok_or(format!("invalid DSN: invalid value of {key}"));
        match key {
            "parseTime" => parse_time = flag(key, value)?,
            "tls" => tls = value.to_owned(),
            "loc" => utc(&decoded()?)?,
            "timeout" => dsn.connect_max = Some(duration(key, value)?),
            "allowCleartextPasswords" => options = options.enable_cleartext_plugin(flag(key, value)?),
            "serverPubKey" => return Err("serverPubKey is not supported; use tls".into()),
            known if WITHOUT_EFFECT.contains(&known) => {}
            variable => {
                if !variable.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'@')) {
                    return Err(format!("invalid DSN: {variable:?} is no system variable"));
                }
                let separator = if dsn.setup.is_empty() { "SET " } else { ", " };
                dsn.setup.push_str(&format!("{separator}{variable} = {}", decoded()?));
            }
        }
    }
    if !parse_time {
        return Err("invalid mysql config: missing parseTime=true param in connection_string".into());
    }
    dsn.options = with_tls(options, &tls, files)?;
    Ok(dsn)
}

/// `tcp(host:port)`, `unix(/path)`, or nothing.
fn with_address(options: MySqlConnectOptions, text: &str) -> Result<(MySqlConnectOptions, String), String> {
    let (net, address) = match text.split_once('(') {
        Some((net, address)) => {
            let address = address.strip_suffix(')');
            (net, address.ok_or("invalid DSN: network address not terminated (missing closing brace)")?)
        }
        None => (text, ""),
    };
    match net {
        "" | "tcp" | "tcp4" | "tcp6" => {
            let address = if address.is_empty() { "127.0.0.1" } else { address };
            let (host, port) = match address.rsplit_once(':') {
                Some((host, port)) if !port.contains(']') && !host.ends_with(':') => (host, port),
                _ => (address, "3306"),
            };
            let port = port.parse().map_err(|_| "invalid DSN: the port is not a port number")?;
            let host = host.trim_start_matches('[').trim_end_matches(']');
            Ok((options.host(host).port(port), format!("{host}:{port}")))
        }
        "unix" => {
            let path = if address.is_empty() { "/tmp/mysql.sock" } else { address };
            Ok((options.socket(path), path.to_owned()))
        }
        // what stands there may be a part of the password when the string is cut short
        _ => Err("invalid DSN: the network is not supported; use tcp or unix".into()),
    }
}

fn with_tls(options: MySqlConnectOptions, tls: &str, files: &TlsFiles) -> Result<MySqlConnectOptions, String> {
    let roots = |options: MySqlConnectOptions| match &files.root {
        Some(path) => options.ssl_ca(path),
        None => system_roots().into_iter().fold(options, |options, path| options.ssl_ca(path)),
    };
    if files.root.is_some() || files.client.is_some() {
        if let Some(root) = &files.root {
            let cannot = |_| "invalid mysql config: cannot find Root CA defined in root_ca_path".to_owned();
            let pem = std::fs::read(root).map_err(cannot)?;
            if finial_crypto::pem::certificates(&pem).map_or(true, |all| all.is_empty()) {
                return Err("invalid mysql config: failed to parse Root CA defined in root_ca_path".into());
            }
        }
        let mut options = roots(options.ssl_mode(MySqlSslMode::VerifyIdentity));
        if let Some((cert, key)) = &files.client {
            if std::fs::File::open(cert).is_err() || std::fs::File::open(key).is_err() {
                return Err("invalid mysql config: failed to load client certificate defined in client_cert_path and client_key_path".into());
            }
            options = options.ssl_client_cert(cert).ssl_client_key(key);
        }
        return Ok(options);
    }
    match tls.to_ascii_lowercase().as_str() {
        "" | "0" | "false" => Ok(options.ssl_mode(MySqlSslMode::Disabled)),
        "1" | "true" => Ok(roots(options.ssl_mode(MySqlSslMode::VerifyIdentity))),
        "skip-verify" => Ok(options.ssl_mode(MySqlSslMode::Required)),
        "preferred" => Ok(options.ssl_mode(MySqlSslMode::Preferred)),
        _ => Err(format!("invalid value / unknown config name: {tls}")),
    }
}

/// Times are read and written in UTC.
fn utc(zone: &str) -> Result<(), String> {
    let local = || time::UtcOffset::current_local_offset().is_ok_and(|offset| offset.is_utc());
    match zone {
        "" | "UTC" | "Etc/UTC" => Ok(()),
        "Local" if local() => Ok(()),
        other => Err(format!("loc={other} is not supported: times in the database must be UTC, which is the default")),
    }
}

fn flag(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "1" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("invalid bool value of {key}: {value}")),
    }
}

fn duration(key: &str, value: &str) -> Result<Duration, String> {
    let nanos = finial_config::parse_go_duration(value).map_err(|e| format!("invalid {key} value: {e}"))?;
    u64::try_from(nanos).map(Duration::from_nanos).map_err(|_| format!("invalid {key} value: {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<MySqlDsn, String> {
        parse(text, &TlsFiles::default())
    }

    #[test]
    fn reads_what_the_go_driver_reads() {
        let dsn = parsed("spire:p@ss/w:rd@tcp(db.example:3307)/spire?parseTime=true&charset=utf8mb4").unwrap();
        let options = &dsn.options;
        assert_eq!((options.get_host(), options.get_port()), ("db.example", 3307));
        assert_eq!((options.get_username(), options.get_database()), ("spire", Some("spire")));
        assert!(matches!(options.get_ssl_mode(), MySqlSslMode::Disabled));
        assert_eq!(dsn.name, "MySQL at db.example:3307 (database spire)");
        let short = parsed("u@/d?parseTime=1&timeout=3s&wait_timeout=100&time_zone=%27UTC%27").unwrap();
        assert_eq!((short.options.get_host(), short.options.get_port()), ("127.0.0.1", 3306));
        assert_eq!(short.connect_max, Some(Duration::from_secs(3)));
        assert_eq!(short.setup, "SET wait_timeout = 100, time_zone = 'UTC'");
        let v6 = parsed("u@tcp([::1]:5)/d?parseTime=true").unwrap();
        assert_eq!((v6.options.get_host(), v6.options.get_port()), ("::1", 5));
        let socket = parsed("u@unix(/run/my.sock)/d?parseTime=true").unwrap();
        assert_eq!(socket.options.get_socket(), Some(&PathBuf::from("/run/my.sock")));
    }

    #[test]
    fn tls_is_as_strict_as_it_is_asked_to_be() {
        for (tls, wanted) in [
            ("false", MySqlSslMode::Disabled),
            ("true", MySqlSslMode::VerifyIdentity),
            ("skip-verify", MySqlSslMode::Required),
            ("preferred", MySqlSslMode::Preferred),
        ] {
            let dsn = parsed(&format!("u@tcp(h:1)/d?parseTime=true&tls={tls}")).unwrap();
            assert_eq!(format!("{:?}", dsn.options.get_ssl_mode()), format!("{wanted:?}"), "{tls}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_without_the_password() {
        for (text, part) in [
            ("u:hunter2@tcp(h:1)", "missing the slash"),
            ("u:hunter2@tcp(h:1/d?parseTime=true", "missing closing brace"),
            ("u:hunter2@tcp(h:1)/d", "missing parseTime=true"),
            ("u:hunter2/rest@tcp(h:1)", "not supported"),
            ("u@tcp(h:hunter2)/d?parseTime=true", "not a port"),
            ("u:hunter2@tcp(h:x)/d?parseTime=true", "not a port"),
            ("u:hunter2@pipe(h)/d?parseTime=true", "not supported"),
            ("u:hunter2@tcp(h:1)/d?parseTime=maybe", "invalid bool value"),
            ("u:hunter2@tcp(h:1)/d?parseTime=true&tls=mine", "unknown config name"),
            ("u:hunter2@tcp(h:1)/d?parseTime=true&loc=Europe%2FBerlin", "must be UTC"),
        ] {
            let error = parsed(text).err().unwrap();
            assert!(error.contains(part) && !error.contains("hunter2"), "{text}: {error}");
        }
        let files = TlsFiles { root: Some("/no/such".into()), client: None };
        let error = parse("u@tcp(h:1)/d?parseTime=true", &files).err().unwrap();
        assert_eq!(error, "invalid mysql config: cannot find Root CA defined in root_ca_path");
    }

    proptest::proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "\\PC{0,60}") {
            let _ = parsed(&text);
            let _ = parsed(&format!("u:p@tcp({text})/d?parseTime=true&{text}"));
        }
    }
}
