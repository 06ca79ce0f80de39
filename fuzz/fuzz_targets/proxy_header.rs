#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| finial_fuzz::net::proxy_header(data));
