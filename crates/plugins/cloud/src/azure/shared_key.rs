//! The signature of requests to Azure Storage with an account's key.

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use finial_core::Secret;
use finial_plugin::PluginError;

/// A storage account and its key.
pub(super) struct SharedKey {
    account: String,
    key: Secret<Vec<u8>>,
}

impl SharedKey {
    pub(super) fn new(account: &str, key: &Secret<String>) -> Result<Self, PluginError> {
        let key = BASE64.decode(key.expose().trim()).map_err(|e| {
            PluginError::internal(format!(
                "unable to get shared key credential: storage_account_key is not base64: {e}"
            ))
        })?;
        Ok(Self { account: account.to_owned(), key: Secret::new(key) })
    }

    /// What `Authorization` has to say of a request without a query. Headers have names in lower case.
    pub(super) fn authorization(&self, method: &str, path: &str, length: usize, headers: &[(&str, &str)]) -> String {
        let get = |name| headers.iter().find(|(n, _)| *n == name).map_or("", |(_, value)| *value);
        let length = if length == 0 { String::new() } else { length.to_string() };
        let mut of_storage: Vec<_> = headers.iter().filter(|(name, _)| name.starts_with("x-ms-")).collect();
        of_storage.sort();
        let of_storage: String = of_storage.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
        let to_sign = format!(
            "{method}\n{}\n{}\n{length}\n{}\n{}\n\n\n\n\n\n\n{of_storage}/{}{path}",
            get("content-encoding"),
            get("content-language"),
            get("content-md5"),
            get("content-type"),
            self.account,
        );
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, self.key.expose()), to_sign.as_bytes());
        format!("SharedKey {}:{}", self.account, BASE64.encode(tag))
    }
}
