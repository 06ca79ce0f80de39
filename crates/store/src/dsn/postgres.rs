//! PostgreSQL's connection strings: `host=db user=spire …`, or `postgres://spire@db/spire?…`. What they do not say comes
//! from the environment (`PGHOST`, `PGPASSWORD`, …), as with lib/pq. Keys of lib/pq that have no effect here are taken;
//! other keys are parameters of the session, as there.

use super::{percent_decoded, system_roots};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use std::path::Path;
use std::time::Duration;

/// What a connection string says.
#[derive(Clone)]
pub(crate) struct PostgresDsn {
    /// One per host, in the order in which they are tried.
    pub(crate) hosts: Vec<PgConnectOptions>,
    /// The hosts and the database, for messages.
    pub(crate) name: String,
    /// Only a server that can be written will do (`target_session_attrs`).
    pub(crate) writable: bool,
    /// How long connecting may take.
    pub(crate) connect_max: Option<Duration>,
}

/// Keys of lib/pq that need nothing done here.
const WITHOUT_EFFECT: [&str; 14] = [
    "binary_parameters",
    "disable_prepared_binary_result",
    "fallback_application_name",
    "client_encoding",
    "sslsni",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "min_protocol_version",
    "max_protocol_version",
    "load_balance_hosts",
    "krbsrvname",
    "krbspn",
    "geqo",
    "tz",
];

type Pairs = Vec<(String, String)>;

/// Reads either form. The message of an error never holds the string, which may hold a password.
pub(crate) fn parse(text: &str) -> Result<PostgresDsn, String> {
    let rest = text.strip_prefix("postgres://").or_else(|| text.strip_prefix("postgresql://"));
    resolve(&match rest {
        Some(rest) => url_pairs(rest)?,
        None => keyword_pairs(text)?,
    })
}

/// `user:password@host:port,host:port/database?key=value&…`.
fn url_pairs(rest: &str) -> Result<Pairs, String> {
    let decoded = |part: &str, what: &str| {
        percent_decoded(part).ok_or_else(|| format!("invalid percent-escape in the {what} of connection_string"))
    };
    let (before, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = before.split_once('/').unwrap_or((before, ""));
    // the rest of a password, which must not be taken for a host, a port or a name that messages show
    let torn = || {
        database.contains('@')
            || query.split('&').any(|pair| pair.split('=').next().is_some_and(|key| key.contains('@')))
    };
    if !authority.contains('@') && torn() {
        return Err("connection_string: \"/\" and \"?\" in user or password must be written as %2F and %3F".into());
    }
    let (login, hosts) = match authority.rsplit_once('@') {
        Some((login, hosts)) => (Some(login), hosts),
        None => (None, authority),
    };
    let mut pairs = Pairs::new();
    let mut add = |key: &str, value: String| {
        if !value.is_empty() {
            pairs.push((key.into(), value));
        }
    };
    if let Some(login) = login {
        let (user, password) = login.split_once(':').unwrap_or((login, ""));
        add("user", decoded(user, "user")?);
        add("password", decoded(password, "password")?);
    }
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = match host.rsplit_once(':') {
            Some((name, port)) if !port.contains(']') => (name, port),
            _ => (host, ""),
        };
        names.push(decoded(name.trim_start_matches('[').trim_end_matches(']'), "host")?);
        ports.push(port.to_owned());
    }
    add("host", names.join(","));
    if ports.iter().any(|port| !port.is_empty()) {
        add("port", ports.join(","));
    }
    add("dbname", decoded(database, "database name")?);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        add(&decoded(key, "parameters")?, decoded(&value.replace('+', " "), "parameters")?);
    }
    Ok(pairs)
}

/// `key=value key='a value with \' and blanks'`, blanks around `=` allowed.
fn keyword_pairs(text: &str) -> Result<Pairs, String> {
    let mut pairs = Pairs::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let mut key = String::new();
        while let Some(c) = chars.next_if(|c| *c != '=' && !c.is_whitespace()) {
            key.push(c);
        }
        if key.is_empty() && chars.peek().is_none() {
            return Ok(pairs);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if key.is_empty() || chars.next() != Some('=') {
            return Err("missing \"=\" after a key of connection_string: write key=value, with blanks between".into());
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let quoted = chars.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match chars.next_if(|c| quoted || !c.is_whitespace()) {
                Some('\'') if quoted => break,
                Some('\\') => match chars.next() {
                    Some(c) => value.push(c),
                    None => return Err("missing character after the backslash at the end of connection_string".into()),
                },
                Some(c) => value.push(c),
                None if quoted => return Err("unterminated quoted value in connection_string".into()),
                None => break,
            }
        }
        pairs.push((key, value));
    }
}

fn resolve(pairs: &Pairs) -> Result<PostgresDsn, String> {
    let get = |key: &str| pairs.iter().rev().find(|(k, v)| k == key && !v.is_empty()).map(|(_, v)| v.as_str());
    let mut base = PgConnectOptions::new_without_pgpass().application_name("finial-server");
    let mut tls = Tls::default();
    let mut dsn = PostgresDsn { hosts: Vec::new(), name: String::new(), writable: false, connect_max: None };
    if get("user").is_none() {
        let passwd = std::fs::read("/etc/passwd").unwrap_or_default();
        let uid = rustix::process::getuid().as_raw();
        base = base.username(&default_user(|key| std::env::var(key).ok(), &String::from_utf8_lossy(&passwd), uid)?);
    }
    for (key, value) in pairs.iter().filter(|(_, value)| !value.is_empty()) {
        match key.as_str() {
            "host" | "hostaddr" | "port" => {}
            "user" => base = base.username(value),
            "password" => base = base.password(value),
            "dbname" => base = base.database(value),
            "application_name" => base = base.application_name(value),
            "sslmode" => tls.mode = Some(value.clone()),
            "sslrootcert" => tls.root = Some(value.clone()),
            "sslcert" => tls.cert = Some(value.clone()),
            "sslkey" => tls.key = Some(value.clone()),
            "sslinline" => tls.inline = value == "true" || value == "yes" || value == "on" || value == "1",
            "connect_timeout" => {
                let seconds =
                    value.parse().map_err(|_| format!("connect_timeout {value:?} is not a number of seconds"))?;
                dsn.connect_max = (seconds > 0).then(|| Duration::from_secs(seconds));
            }
            "target_session_attrs" => dsn.writable = writable(value)?,
            "options" => base = options(base, value)?,
            "passfile" | "service" | "servicefile" | "sslpassword" | "sslnegotiation" => {
                return Err(format!("connection_string: {key} is not supported; give its content in other keys"));
            }
            known if WITHOUT_EFFECT.contains(&known) => {}
            other => base = base.options([(other, value.as_str())]),
        }
    }
    base = tls.apply(base)?;
    let names: Vec<&str> = get("hostaddr").or(get("host")).map(|hosts| hosts.split(',').collect()).unwrap_or_default();
    let ports: Vec<&str> = get("port").map(|ports| ports.split(',').collect()).unwrap_or_default();
    for at in 0..names.len().max(1) {
        let mut one = base.clone();
        if let Some(host) = names.get(at).filter(|host| !host.is_empty()) {
            one = if host.starts_with('/') { one.socket(host) } else { one.host(host) };
        }
        if let Some(port) = ports.get(at).or(ports.first().filter(|_| ports.len() == 1)).filter(|p| !p.is_empty()) {
            one = one.port(port.parse().map_err(|_| "the port in connection_string is not a port number")?);
        }
        dsn.hosts.push(one);
    }
    let place = |one: &PgConnectOptions| match one.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", one.get_host(), one.get_port()),
    };
    let places: Vec<String> = dsn.hosts.iter().map(place).collect();
    let database = base.get_database().unwrap_or(base.get_username());
    dsn.name = format!("PostgreSQL at {} (database {database})", places.join(", "));
    Ok(dsn)
}

/// Who logs in where the connection string does not say: as with lib/pq `PGUSER`, the system's user, `USER`.
fn default_user(environment: impl Fn(&str) -> Option<String>, passwd: &str, uid: u32) -> Result<String, String> {
    let said = |key| environment(key).filter(|name| !name.is_empty());
    let by_uid = || {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
        })
    };
    said("PGUSER").or_else(by_uid).or_else(|| said("USER")).ok_or_else(|| {
        format!("connection_string has no user, and the system has no name for user ID {uid}: set user or PGUSER")
    })
}

fn writable(attrs: &str) -> Result<bool, String> {
    match attrs {
        "any" | "prefer-standby" => Ok(false),
        "read-write" | "primary" => Ok(true),
        "read-only" | "standby" => Err(format!(
            "target_session_attrs={attrs} cannot work: the server must write; name a replica in ro_connection_string"
        )),
        other => Err(format!("unknown target_session_attrs {other:?}")),
    }
}

/// `-c key=value -c key=value`, as PostgreSQL's command line takes it.
fn options(mut base: PgConnectOptions, text: &str) -> Result<PgConnectOptions, String> {
    let mut words = text.split_whitespace();
    while let Some(word) = words.next() {
        let pair = match word.strip_prefix("-c").or(word.strip_prefix("--")) {
            Some("") => words.next().unwrap_or_default(),
            Some(pair) => pair,
            None => return Err("options: only `-c key=value` is supported".into()),
        };
        let Some((key, value)) = pair.split_once('=') else {
            return Err("options: only `-c key=value` is supported".into());
        };
        base = base.options([(key, value)]);
    }
    Ok(base)
}

#[derive(Default)]
struct Tls {
    mode: Option<String>,
    root: Option<String>,
    cert: Option<String>,
    key: Option<String>,
    inline: bool,
}

impl Tls {
    fn apply(self, mut to: PgConnectOptions) -> Result<PgConnectOptions, String> {
        let from_environment = std::env::var("PGSSLMODE").ok();
        let root = self.root.or_else(|| std::env::var("PGSSLROOTCERT").ok());
        let system = root.as_deref() == Some("system");
        // lib/pq asks for TLS where nothing is said, and does not check the certificate unless it was given a root
        let mode = match self.mode.or(from_environment).as_deref() {
            Some("disable") => PgSslMode::Disable,
            Some("allow") => PgSslMode::Allow,
            Some("prefer") => PgSslMode::Prefer,
            None if system => PgSslMode::VerifyFull,
            None | Some("require") if root.is_some() => PgSslMode::VerifyCa,
            None | Some("require") => PgSslMode::Require,
            Some("verify-ca") => PgSslMode::VerifyCa,
            Some("verify-full") => PgSslMode::VerifyFull,
            Some(other) => {
                return Err(format!(
                    "unsupported sslmode {other:?}; only \"require\" (default), \"verify-full\", \"verify-ca\", \"allow\", \"prefer\", and \"disable\" supported"
                ));
            }
        };
        if system && !matches!(mode, PgSslMode::VerifyFull) {
            return Err("weak sslmode may not be used with sslrootcert=system (use \"verify-full\")".into());
        }
        to = to.ssl_mode(mode);
        let uses = !matches!(mode, PgSslMode::Disable | PgSslMode::Allow);
        let checks = matches!(mode, PgSslMode::VerifyCa | PgSslMode::VerifyFull);
        match root {
            Some(pem) if self.inline && !system => to = to.ssl_root_cert_from_pem(pem.into_bytes()),
            Some(path) if !system => {
                readable(&path, "sslrootcert", checks)?;
                to = to.ssl_root_cert(path);
            }
            _ if checks => to = system_roots().into_iter().fold(to, |to, path| to.ssl_root_cert(path)),
            _ => {}
        }
        match (self.cert, self.key) {
            (Some(cert), Some(key)) if self.inline => {
                to = to.ssl_client_cert_from_pem(cert).ssl_client_key_from_pem(key);
            }
            (Some(cert), Some(key)) => {
                readable(&cert, "sslcert", uses)?;
                readable(&key, "sslkey", uses)?;
                to = to.ssl_client_cert(cert).ssl_client_key(key);
            }
            (None, None) => {}
            _ => return Err("sslcert and sslkey must be set together".into()),
        }
        Ok(to)
    }
}

/// A file that will be needed is there.
fn readable(path: &str, key: &str, needed: bool) -> Result<(), String> {
    match std::fs::File::open(Path::new(path)) {
        Err(e) if needed => Err(format!("{key} {path:?} cannot be read: {e}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ok(text: &str) -> PostgresDsn {
        parse(text).map_err(|e| format!("{text}: {e}")).unwrap()
    }

    #[test]
    fn both_forms_say_the_same() {
        let keywords = ok("host=db.example port=5433 user=spire password='p w\\'d' dbname=spire sslmode=disable");
        let url = ok("postgres://spire:p%20w'd@db.example:5433/spire?sslmode=disable");
        for dsn in [keywords, url] {
            let one = &dsn.hosts[0];
            assert_eq!((one.get_host(), one.get_port(), one.get_username()), ("db.example", 5433, "spire"));
            assert_eq!(one.get_database(), Some("spire"));
            assert!(matches!(one.get_ssl_mode(), PgSslMode::Disable));
            assert_eq!(dsn.name, "PostgreSQL at db.example:5433 (database spire)");
        }
    }

    #[test]
    fn several_hosts_are_tried_in_order() {
        for text in [
            "host=a,b port=1,2 user=u dbname=d target_session_attrs=read-write sslmode=disable",
            "postgresql://u@a:1,b:2/d?target_session_attrs=read-write&sslmode=disable",
        ] {
            let dsn = ok(text);
            let places: Vec<_> = dsn.hosts.iter().map(|h| (h.get_host().to_owned(), h.get_port())).collect();
            assert_eq!(places, [("a".to_owned(), 1), ("b".to_owned(), 2)]);
            assert!(dsn.writable);
        }
        let v6 = ok("postgres://u@[::1]:5/d?sslmode=disable");
        assert_eq!((v6.hosts[0].get_host(), v6.hosts[0].get_port()), ("::1", 5));
    }

    #[test]
    fn tls_is_required_unless_it_is_said_otherwise() {
        assert!(matches!(ok("host=a user=u").hosts[0].get_ssl_mode(), PgSslMode::Require));
        let checked = ok("host=a user=u sslrootcert=/dev/null");
        assert!(matches!(checked.hosts[0].get_ssl_mode(), PgSslMode::VerifyCa));
        let system = ok("host=a user=u sslrootcert=system");
        assert!(matches!(system.hosts[0].get_ssl_mode(), PgSslMode::VerifyFull));
    }

    #[test]
    fn without_a_user_the_systems_logs_in() {
        let passwd =
            "root:x:0:0::/root:/bin/sh\n+::::::\ntorn:x\nspire:x:1000:1000::/:/bin/sh\nalias:x:1000:1000::/:/bin/sh\n";
        let of = |environment: &[(&str, &str)], uid| {
            let get = |key: &str| environment.iter().find(|(k, _)| *k == key).map(|(_, value)| (*value).to_owned());
            default_user(get, passwd, uid)
        };
        assert_eq!(of(&[("PGUSER", "pg"), ("USER", "shell")], 1000).as_deref(), Ok("pg"));
        assert_eq!(of(&[("PGUSER", ""), ("USER", "shell")], 1000).as_deref(), Ok("spire"));
        assert_eq!(of(&[("USER", "shell")], 7).as_deref(), Ok("shell"));
        assert!(of(&[("USER", "")], 7).unwrap_err().contains("user ID 7"));

        let id = std::process::Command::new("id").arg("-un").output().unwrap().stdout;
        let me = std::env::var("PGUSER").unwrap_or_else(|_| String::from_utf8(id).unwrap().trim().to_owned());
        for text in ["host=db", "host=db user=''", "postgres://db"] {
            assert_eq!(ok(text).hosts[0].get_username(), me, "{text}");
            let database = std::env::var("PGDATABASE").unwrap_or_else(|_| me.clone());
            assert!(ok(text).name.ends_with(&format!("(database {database})")), "{}", ok(text).name);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_without_the_password() {
        for (text, part) in [
            ("host=a password=hunter2 port", "missing \"=\""),
            ("host=a password='hunter2", "unterminated"),
            ("postgres://u:hunter2%@a/d", "percent-escape"),
            ("host=a password=hunter2 port=x", "not a port"),
            ("host=a port=hunter2", "not a port"),
            ("postgres://u:hunter2/rest@a/d", "%2F"),
            ("postgres://u:5432/hunter2@a/d", "%2F"),
            ("postgres://u:5432?hunter2@a/d", "%2F"),
            ("host=a password=hunter2 sslmode=maybe", "unsupported sslmode"),
            ("host=a password=hunter2 sslmode=verify-full sslrootcert=/no/such", "cannot be read"),
            ("host=a password=hunter2 sslcert=/x", "together"),
            ("host=a password=hunter2 target_session_attrs=standby", "must write"),
        ] {
            let error = parse(text).err().unwrap();
            assert!(error.contains(part) && !error.contains("hunter2"), "{text}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_value_can_be_quoted(value in "[ -~äß'\\\\]{1,20}") {
            let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
            let pairs = keyword_pairs(&format!("user = u  password='{quoted}' dbname=d")).unwrap();
            proptest::prop_assert_eq!(&pairs[1], &("password".to_owned(), value));
        }

        #[test]
        fn nothing_makes_it_panic(text in "\\PC{0,60}") {
            let _ = parse(&text);
            let _ = parse(&format!("postgres://{text}"));
        }
    }
}
