//! The keys by which Vault is reached, SPIRE's. The environment goes before them, as in SPIRE.

use finial_core::Secret;
use finial_net::Proxies;
use finial_plugin::{PluginError, secret};
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct Keys {
    vault_addr: String,
    namespace: String,
    pki_mount_point: String,
    ca_cert_path: String,
    insecure_skip_verify: bool,
    cert_auth: Option<CertAuth>,
    token_auth: Option<TokenAuth>,
    approle_auth: Option<AppRoleAuth>,
    k8s_auth: Option<K8sAuth>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CertAuth {
    cert_auth_mount_point: String,
    cert_auth_role_name: String,
    client_cert_path: String,
    client_key_path: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenAuth {
    #[serde(deserialize_with = "secret")]
    token: Secret<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AppRoleAuth {
    approle_auth_mount_point: String,
    approle_id: String,
    #[serde(deserialize_with = "secret")]
    approle_secret_id: Secret<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct K8sAuth {
    k8s_auth_mount_point: String,
    k8s_auth_role_name: String,
    token_path: String,
}

/// How we show who we are.
pub(crate) enum Auth {
    Token(Secret<String>),
    Cert { mount: String, role: String, certificate: PathBuf, key: PathBuf },
    AppRole { mount: String, id: String, secret: Secret<String> },
    K8s { mount: String, role: String, token: PathBuf },
}

/// The keys, understood.
pub(crate) struct Settings {
    pub(crate) address: String,
    pub(crate) namespace: String,
    pub(crate) pki: String,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) trusts_anyone: bool,
    pub(crate) auth: Auth,
    /// Vault's own, in place of the one that others use.
    pub(crate) proxy: Option<Arc<Proxies>>,
}

fn or(value: String, default: &str) -> String {
    if value.is_empty() { default.to_owned() } else { value }
}

impl Keys {
    pub(crate) fn resolve(self, lookup: impl Fn(&str) -> Option<String>) -> Result<Settings, PluginError> {
        let chosen = |variable: &str, value: String| lookup(variable).filter(|v| !v.is_empty()).unwrap_or(value);
        let needed = |variable: &str, key: &str, value: String| match chosen(variable, value) {
            empty if empty.is_empty() => {
                Err(PluginError::invalid(format!("{key} is required (or {variable} in the environment)")))
            }
            value => Ok(value),
        };
        let auth = match (self.token_auth, self.cert_auth, self.approle_auth, self.k8s_auth) {
            (Some(token), None, None, None) => {
                Auth::Token(Secret::new(needed("VAULT_TOKEN", "token_auth.token", token.token.expose().clone())?))
            }
            (None, Some(cert), None, None) => Auth::Cert {
                mount: or(cert.cert_auth_mount_point, "cert"),
                role: cert.cert_auth_role_name,
                certificate: needed("VAULT_CLIENT_CERT", "cert_auth.client_cert_path", cert.client_cert_path)?.into(),
                key: needed("VAULT_CLIENT_KEY", "cert_auth.client_key_path", cert.client_key_path)?.into(),
            },
            (None, None, Some(role), None) => {
                let secret = role.approle_secret_id.expose().clone();
                Auth::AppRole {
                    mount: or(role.approle_auth_mount_point, "approle"),
                    id: needed("VAULT_APPROLE_ID", "approle_auth.approle_id", role.approle_id)?,
                    // A role may be without.
                    secret: Secret::new(chosen("VAULT_APPROLE_SECRET_ID", secret)),
                }
            }
            (None, None, None, Some(k8s)) => {
                if k8s.k8s_auth_role_name.is_empty() {
                    return Err(PluginError::invalid("k8s_auth_role_name is required"));
                }
                if k8s.token_path.is_empty() {
                    return Err(PluginError::invalid("token_path is required"));
                }
                Auth::K8s {
                    mount: or(k8s.k8s_auth_mount_point, "kubernetes"),
                    role: k8s.k8s_auth_role_name,
                    token: k8s.token_path.into(),
                }
            }
            (None, None, None, None) => {
                return Err(PluginError::invalid(
                    "one of token_auth, cert_auth, approle_auth and k8s_auth must be configured",
                ));
            }
            _ => return Err(PluginError::invalid("only one authentication method can be configured")),
        };
        let ca = chosen("VAULT_CACERT", self.ca_cert_path);
        let proxy = ["VAULT_PROXY_ADDR", "VAULT_HTTP_PROXY"].into_iter().find_map(|variable| {
            let url = lookup(variable).filter(|url| !url.is_empty())?;
            Some(Arc::new(Proxies::always(&url, variable)))
        });
        Ok(Settings {
            address: needed("VAULT_ADDR", "vault_addr", self.vault_addr)?,
            namespace: chosen("VAULT_NAMESPACE", self.namespace),
            pki: or(self.pki_mount_point, "pki"),
            ca: (!ca.is_empty()).then(|| ca.into()),
            trusts_anyone: self.insecure_skip_verify,
            auth,
            proxy,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(data: &str, lookup: fn(&str) -> Option<String>) -> Result<Settings, String> {
        let keys: Keys = finial_plugin::decode(&finial_hcl::parse(data).unwrap()).map_err(|e| e.to_string())?;
        keys.resolve(lookup).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_missing_is_named() {
        let at = "vault_addr = \"https://v.test\"\n";
        for (data, want) in [
            ("", "one of token_auth, cert_auth, approle_auth and k8s_auth must be configured"),
            ("token_auth {}\ncert_auth {}", "only one authentication method can be configured"),
            ("token_auth {}", "token_auth.token is required (or VAULT_TOKEN in the environment)"),
            ("token_auth { token = \"x\" }", "vault_addr is required (or VAULT_ADDR in the environment)"),
            ("cert_auth {}", "cert_auth.client_cert_path is required (or VAULT_CLIENT_CERT in the environment)"),
            (
                "cert_auth { client_cert_path = \"x\" }",
                "cert_auth.client_key_path is required (or VAULT_CLIENT_KEY in the environment)",
            ),
            ("approle_auth {}", "approle_auth.approle_id is required (or VAULT_APPROLE_ID in the environment)"),
            ("k8s_auth {}", "k8s_auth_role_name is required"),
            ("k8s_auth { k8s_auth_role_name = \"r\" }", "token_path is required"),
        ] {
            assert_eq!(
                resolve(&(if want.starts_with("vault_addr") { data.into() } else { format!("{at}{data}") }), |_| None)
                    .err()
                    .unwrap(),
                want
            );
        }
        let error = resolve("token_auth = 5", |_| None).err().unwrap();
        assert!(error.starts_with("unable to decode configuration: ") && error.contains("1:"), "{error}");
    }

    #[test]
    fn the_environment_goes_before_the_file() {
        let data = "vault_addr = \"https://file.test\"\nca_cert_path = \"/file\"\ntoken_auth { token = \"file\" }";
        let settings = resolve(data, |name| Some(format!("/env/{name}"))).unwrap();
        assert_eq!(settings.address, "/env/VAULT_ADDR");
        assert_eq!(settings.namespace, "/env/VAULT_NAMESPACE");
        assert_eq!(settings.ca, Some("/env/VAULT_CACERT".into()));
        assert!(matches!(&settings.auth, Auth::Token(token) if token.expose() == "/env/VAULT_TOKEN"));
        let settings = resolve(data, |_| Some(String::new())).unwrap();
        assert_eq!((settings.address.as_str(), settings.pki.as_str()), ("https://file.test", "pki"));
        let empty = resolve("approle_auth {}", |name| Some(format!("/env/{name}"))).unwrap();
        let Auth::AppRole { mount, id, secret } = &empty.auth else { panic!("another") };
        assert_eq!((mount.as_str(), id.as_str()), ("approle", "/env/VAULT_APPROLE_ID"));
        assert_eq!(secret.expose(), "/env/VAULT_APPROLE_SECRET_ID");
    }
}
