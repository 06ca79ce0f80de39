//! How glibc's allocator treats what a long-running process has freed.

/// Freed memory above this is given back, bytes: glibc's own beginning, which would grow to 64 MiB by itself.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES: libc::c_int = 128 * 1024;

/// Keeps a peak (100,000 entries listed) from staying: glibc raises its thresholds with each large piece that is freed, and
/// keeps eight arenas a core. Call it before threads start. Other allocators are left alone.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn give_back_what_is_freed() {
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let arenas = libc::c_int::try_from(cores.max(2)).unwrap_or(libc::c_int::MAX);
    let settings =
        [(libc::M_ARENA_MAX, arenas), (libc::M_TRIM_THRESHOLD, KEPT_BYTES), (libc::M_MMAP_THRESHOLD, KEPT_BYTES)];
    for (name, value) in settings {
        // SAFETY: mallopt takes two integers and touches the allocator's own settings only. What it refuses stays as it was.
        unsafe { libc::mallopt(name, value) };
    }
}

/// There is nothing to set.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn give_back_what_is_freed() {}

/// Gives freed pages between what stays back to the system: after a peak, most of what was freed lies there. Takes some
/// milliseconds for 100 MiB, and blocks.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn trim() {
    // SAFETY: takes a number of bytes to keep at the top, and touches only what nobody uses.
    unsafe { libc::malloc_trim(0) };
}

/// There is nothing to give back.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn trim() {}
