//! I/O errors in words that operators can use.

use std::fmt::Display;
use std::io::{Error, ErrorKind};

/// The words of C for an I/O error in lower case and without its number, as Go prints them.
pub fn errno_text(error: &Error) -> String {
    let text = error.to_string();
    let Some(number) = error.raw_os_error() else { return text };
    let text = text.strip_suffix(&format!(" (os error {number})")).unwrap_or(&text);
    let mut letters = text.chars();
    letters.next().map(|first| first.to_ascii_lowercase()).into_iter().chain(letters).collect()
}

/// Why `address` cannot be listened on, in Go's words, and what to do.
pub fn listen_text(address: &dyn Display, error: &Error) -> String {
    let hint = match error.kind() {
        ErrorKind::AddrInUse => "; stop what listens there, or configure another port",
        ErrorKind::AddrNotAvailable => "; no interface of this machine has that address: configure another one",
        ErrorKind::PermissionDenied => {
            "; ports below 1024 need CAP_NET_BIND_SERVICE: grant it, or configure another port"
        }
        _ => "",
    };
    format!("listen tcp {address}: bind: {}{hint}", errno_text(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_said_in_gos_words_and_with_what_to_do() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("an address");
        let error = std::net::TcpListener::bind(address).expect_err("is taken");
        let want = format!(
            "listen tcp {address}: bind: address already in use; stop what listens there, or configure another port"
        );
        assert_eq!(listen_text(&address, &error), want);
    }

    #[test]
    fn only_numbers_of_the_system_are_dropped() {
        assert_eq!(errno_text(&Error::from_raw_os_error(2)), "no such file or directory");
        assert_eq!(errno_text(&Error::other("Told (os error 2)")), "Told (os error 2)");
    }
}
