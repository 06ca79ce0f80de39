//! How an API server is reached: by a kubeconfig file, or by what Kubernetes gives each pod.

use finial_core::Secret;
use finial_hcl::{from_value, yaml};
use finial_net::Proxies;
use finial_net::rest::{Client, Identity, Trust, client_config};
use finial_plugin::secret;
use finial_runtime::{errno_text, files};
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest file that is read.
const FILE_BYTES_MAX: usize = 4 << 20;
/// Where Kubernetes puts a pod's service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Where it says how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a kubeconfig file.
    File(PathBuf),
    /// In this pod.
    Pod,
}

impl Place {
    /// Empty: in this pod.
    pub(crate) fn of(path: &str) -> Self {
        if path.is_empty() { Self::Pod } else { Self::File(path.into()) }
    }

    /// Reads the files: they are replaced while the server runs.
    pub(crate) fn connect(&self) -> Result<(Client, Option<Secret<String>>), String> {
        match self {
            Self::File(path) => from_file(path).map_err(|e| format!("kubeconfig {}: {e}", path.display())),
            Self::Pod => from_pod(Path::new(SERVICE_ACCOUNT), |name| std::env::var(name).ok()),
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    files::read_limited(path, FILE_BYTES_MAX).map_err(|e| format!("open {}: {}", path.display(), errno_text(&e)))
}

fn text(path: &Path) -> Result<Secret<String>, String> {
    let text = String::from_utf8(read(path)?).map_err(|_| format!("{}: not text", path.display()))?;
    Ok(Secret::new(text.trim().to_owned()))
}

fn from_pod(folder: &Path, variable: fn(&str) -> Option<String>) -> Result<(Client, Option<Secret<String>>), String> {
    let of = |name| variable(name).filter(|value| !value.is_empty());
    let (Some(host), Some(port)) = (of("KUBERNETES_SERVICE_HOST"), of("KUBERNETES_SERVICE_PORT")) else {
        return Err(
            "unable to load in-cluster configuration, KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT must be \
                    defined"
                .into(),
        );
    };
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let tls = client_config(&Trust::Named(read(&folder.join("ca.crt"))?), None, "API server")?;
    let client = Client::to(&format!("https://{host}:{port}"), Arc::new(tls))?;
    Ok((client, Some(text(&folder.join("token"))?)))
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Config {
    current_context: String,
    contexts: Vec<NamedContext>,
    clusters: Vec<NamedCluster>,
    users: Vec<NamedUser>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Context {
    cluster: String,
    user: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority: String,
    certificate_authority_data: String,
    insecure_skip_tls_verify: bool,
    tls_server_name: String,
    proxy_url: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NamedUser {
    name: String,
    user: User,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct User {
    client_certificate: String,
    client_certificate_data: String,
    client_key: String,
    #[serde(deserialize_with = "secret")]
    client_key_data: Secret<String>,
    #[serde(deserialize_with = "secret")]
    token: Secret<String>,
    #[serde(rename = "tokenFile")]
    token_file: String,
    exec: Option<IgnoredAny>,
    auth_provider: Option<IgnoredAny>,
    username: Option<IgnoredAny>,
}

/// What a key holds, or the file that another one names; relative to the kubeconfig's folder.
fn material(data: &str, path: &str, folder: &Path) -> Result<Option<Vec<u8>>, String> {
    match (data, path) {
        ("", "") => Ok(None),
        ("", path) => read(&folder.join(path)).map(Some),
        (data, _) => {
            let compact: String = data.split_whitespace().collect();
            crate::api::from_base64(&compact).map(Some).ok_or_else(|| "its embedded data is not base64".to_owned())
        }
    }
}

fn from_file(path: &Path) -> Result<(Client, Option<Secret<String>>), String> {
    let content = text(path)?;
    let documents = yaml::parse(content.expose()).map_err(|e| e.to_string())?;
    let first = documents.first().ok_or("it is empty")?;
    let config: Config = from_value(first).map_err(|e| e.to_string())?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let none = |what: &str, name: &str| format!("there is no {what} {name:?}");
    let name = &config.current_context;
    let context = config.contexts.iter().find(|c| c.name == *name).ok_or_else(|| none("context", name))?;
    let Context { cluster, user } = &context.context;
    let cluster = &config.clusters.iter().find(|c| c.name == *cluster).ok_or_else(|| none("cluster", cluster))?.cluster;
    let nobody = User::default();
    let found = config.users.iter().find(|u| u.name == *user);
    let (whose, user) = match found {
        Some(found) => (&found.name, &found.user),
        None if user.is_empty() => (user, &nobody),
        None => return Err(none("user", user)),
    };
    for (key, is_set) in [
        ("exec", user.exec.is_some()),
        ("auth-provider", user.auth_provider.is_some()),
        ("username", user.username.is_some()),
    ] {
        if is_set {
            return Err(format!(
                "user {whose:?}: {key} is not supported; use token, tokenFile, or client-certificate and client-key"
            ));
        }
    }
    let trust = match material(&cluster.certificate_authority_data, &cluster.certificate_authority, folder)? {
        _ if cluster.insecure_skip_tls_verify => Trust::Anyone,
        Some(pem) => Trust::Named(pem),
        None => Trust::System,
    };
    let tls = client_config(&trust, identity(user, folder)?.as_ref(), "API server")?;
    let mut client = Client::to(&cluster.server, Arc::new(tls))?;
    if !cluster.tls_server_name.is_empty() {
        client = client.named(&cluster.tls_server_name).map_err(|e| format!("tls-server-name {e}"))?;
    }
    if !cluster.proxy_url.is_empty() {
        client = client.through(Arc::new(Proxies::always(&cluster.proxy_url, "proxy-url")));
    }
    let token = match user.token_file.as_str() {
        "" => Some(user.token.clone()).filter(|token| !token.expose().is_empty()),
        file => Some(text(&folder.join(file))?),
    };
    Ok((client, token))
}

fn identity(user: &User, folder: &Path) -> Result<Option<Identity>, String> {
    let certificate = material(&user.client_certificate_data, &user.client_certificate, folder)?;
    let key = material(user.client_key_data.expose(), &user.client_key, folder)?.map(Secret::new);
    match (certificate, key) {
        (None, None) => Ok(None),
        (Some(certificate), Some(key)) => Ok(Some(Identity { certificate, key })),
        _ => Err("client-certificate and client-key go together".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::fake::Pki;

    #[test]
    fn files_are_relative_and_may_be_embedded() {
        let pki = Pki::new();
        pki.issue("client", "extendedKeyUsage=clientAuth");
        let base64 = |name: &str| crate::api::to_base64(&std::fs::read(pki.path(name)).unwrap());
        std::fs::write(pki.path("token"), "from-a-file\n").unwrap();
        let user =
            format!("{{client-certificate-data: {}, client-key-data: {}}}", base64("client.crt"), base64("client.key"));
        for (user, token) in [
            (user.as_str(), None),
            ("{client-certificate: client.crt, client-key: client.key, token: t}", Some("t")),
            ("{tokenFile: token, token: other}", Some("from-a-file")),
            ("{}", None),
        ] {
            let text = format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: x\ncontexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n\
                 clusters: [{{name: c, cluster: {{server: \"https://127.0.0.1:6443/k\", certificate-authority: ca.crt}}}}]\n\
                 users: [{{name: u, user: {user}}}]\n"
            );
            std::fs::write(pki.path("config"), text).unwrap();
            let (client, got) = Place::of(&pki.path("config")).connect().unwrap();
            assert_eq!(client.target().to_string(), "https://127.0.0.1:6443");
            assert_eq!(got.as_ref().map(|got| got.expose().as_str()), token);
        }
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config");
        let shown = path.display().to_string();
        let start = "current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\n";
        let cluster = "clusters: [{name: c, cluster: {server: \"https://127.0.0.1:1\"}}]\n";
        for (text, want) in [
            (String::new(), "it is empty"),
            ("a: [".into(), "2:1: "),
            ("a: b".into(), "there is no context \"\""),
            (start.into(), "there is no cluster \"c\""),
            (format!("{start}{cluster}"), "there is no user \"u\""),
            (
                format!("{start}{cluster}users: [{{name: u, user: {{exec: {{command: aws}}}}}}]"),
                "user \"u\": exec is not supported; use token, ",
            ),
            (
                format!("{start}{cluster}users: [{{name: u, user: {{client-key-data: aGk=}}}}]"),
                "client-certificate and client-key go together",
            ),
            (format!("{start}{cluster}users: [{{name: u, user: {{tokenFile: away}}}}]"), "open "),
        ] {
            std::fs::write(&path, &text).unwrap();
            let error = Place::File(path.clone()).connect().err().unwrap();
            let rest = error.strip_prefix(&format!("kubeconfig {shown}: ")).unwrap_or_else(|| panic!("{error}"));
            assert!(rest.starts_with(want), "{text}: {error}");
        }
        let error = Place::of("/nowhere/config").connect().err().unwrap();
        assert!(error.starts_with("kubeconfig /nowhere/config: open /nowhere/config: "), "{error}");
    }

    #[test]
    fn a_pod_is_told_by_two_variables_and_a_folder() {
        let pki = Pki::new();
        std::fs::write(pki.path("token"), "t\n").unwrap();
        let variable = |name: &str| Some(if name.ends_with("HOST") { "::1".into() } else { "443".into() });
        let (client, token) = from_pod(pki.0.path(), variable).unwrap();
        assert_eq!(
            (client.target().to_string().as_str(), token.unwrap().expose().as_str()),
            ("https://[::1]:443", "t")
        );
        let outside = from_pod(pki.0.path(), |_| None).err().unwrap();
        assert!(outside.starts_with("unable to load in-cluster configuration"), "{outside}");
    }
}
