//! From the cgroup of a process to its container and pod: pure functions over what `/proc/PID/cgroup` says.
//!
//! A path is searched from its end, so that a container inside a container is found as the inner one. Forms that are known:
//!
//! | who | path |
//! |---|---|
//! | docker, cgroupfs | `/docker/ID` |
//! | docker, systemd | `/system.slice/docker-ID.scope` |
//! | podman | `/libpod_parent/libpod-ID`, `/machine.slice/libpod-ID.scope`, `…/user-1000.slice/…/libpod-ID.scope/container` |
//! | containerd or CRI-O, cgroupfs | `/kubepods/burstable/podUID/ID`, `/kubepods/podUID/crio-ID` |
//! | containerd or CRI-O, systemd | `/kubepods.slice/…/kubepods-burstable-podU_I_D.slice/cri-containerd-ID.scope` |
//! | containerd, systemd named by its own driver | `/kubepods-besteffort-podU_I_D.slice:cri-containerd:ID` |
//! | another container, seen from inside a container | `/../../podUID/ID` |

/// A container ID has so many hex digits.
const CONTAINER_ID_LEN: usize = 64;
/// The groups of hex digits of a pod's UID.
const POD_UID_GROUPS: [usize; 5] = [8, 4, 4, 4, 12];
/// The UID of a static pod has so many hex digits, in one group.
const STATIC_UID_LEN: usize = 32;
/// The services below which a pod's cgroups may be: the kubelet's and the runtimes', or what has them built in.
const RUNTIMES: [&str; 11] = [
    "containerd",
    "crio",
    "cri-o",
    "kubelet",
    "k3s",
    "k3s-agent",
    "rke2-server",
    "rke2-agent",
    "k0scontroller",
    "k0sworker",
    "snap.microk8s.daemon-containerd",
];

/// Where a process runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Located {
    /// The container's ID, 64 hex digits.
    pub container_id: String,
    /// The pod's UID in its usual form, when the path names one.
    pub pod_uid: Option<String>,
}

/// Why the cgroups of a process do not tell where it runs.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LocateError {
    /// A line that the kernel would not write.
    #[error("invalid cgroup entry, contains {found} colon separated fields but expected at least 3: {line:?}")]
    Line {
        /// So many fields.
        found: usize,
        /// The line.
        line: String,
    },
    /// Its cgroups name different containers.
    #[error("multiple container IDs found ({0:?}, {1:?})")]
    Containers(String, String),
    /// Its cgroups name different pods.
    #[error("multiple pod UIDs found ({0:?}, {1:?})")]
    Pods(String, String),
    /// A pod's cgroup below one that a user, or a service, may fill with what names he likes.
    #[error(
        "the cgroup {0:?} names a pod below a user's own cgroups, or a service's, where others than the kubelet can write \
         such a name"
    )]
    Delegated(String),
    /// A pod's cgroup inside a container in which the agent does not run.
    #[error(
        "the cgroup {0:?} names a pod inside container {1}, which is no node of ours: it may write such a name itself"
    )]
    Inside(String, String),
    /// A matcher's `<id>` stands for nothing.
    #[error("a pattern matched, but no container id was found")]
    Blank,
}

/// The paths of `/proc/PID/cgroup`: one for each hierarchy (v1), or one (v2).
pub fn paths(text: &str) -> Result<Vec<&str>, LocateError> {
    let path = |line| {
        let mut fields = str::splitn(line, 3, ':');
        fields
            .nth(2)
            .ok_or_else(|| LocateError::Line { found: line.split(':').count(), line: line.chars().take(200).collect() })
    };
    text.lines().map(path).collect()
}

/// The container of a process, or `None` when it runs in none.
///
/// # Errors
/// When its cgroups name several.
pub fn container<'a>(paths: impl IntoIterator<Item = &'a str>) -> Result<Option<String>, LocateError> {
    let mut found: Option<&str> = None;
    for id in paths.into_iter().filter_map(|path| container_in(path).map(|(id, _)| id)) {
        match found {
            Some(other) if other != id => return Err(LocateError::Containers(other.into(), id.into())),
            _ => found = Some(id),
        }
    }
    Ok(found.map(str::to_owned))
}

/// The container and the pod of a process, or `None` when it runs in no container of a pod.
///
/// A container's ID without a pod counts only where it stands right above the agent, as another of the agent's own pod: all
/// others are below their pod's cgroup, and anyone who may make cgroups can name one after a container.
///
/// A path with a pod counts more than one without: where containers of Kubernetes run in a container of docker (kind), some
/// hierarchies name only the outer one. In which the agent (`own`: its own cgroups) must run as well.
///
/// # Errors
/// When its cgroups name several containers or pods, or when one names a pod where others than the kubelet could.
pub fn pod<'a>(paths: impl IntoIterator<Item = &'a str>, own: &str) -> Result<Option<Located>, LocateError> {
    let mut found: Option<Located> = None;
    for path in paths {
        let Some((id, before)) = container_in(path) else { continue };
        let pod_uid = pod_in(path, before, own)?;
        if pod_uid.is_none() && !is_beside_us(before) {
            continue;
        }
        match (&found, &pod_uid) {
            (Some(Located { pod_uid: Some(_), .. }), None) => continue,
            (None, _) | (Some(Located { pod_uid: None, .. }), Some(_)) => {}
            (Some(other), _) if other.pod_uid != pod_uid => {
                let words = |uid: &Option<String>| uid.clone().unwrap_or_default();
                return Err(LocateError::Pods(words(&other.pod_uid), words(&pod_uid)));
            }
            (Some(other), _) if other.container_id != id => {
                return Err(LocateError::Containers(other.container_id.clone(), id.into()));
            }
            _ => continue,
        }
        found = Some(Located { container_id: id.to_owned(), pod_uid });
    }
    Ok(found)
}

/// The last container ID in the path, and all that stands before it.
fn container_in(path: &str) -> Option<(&str, &str)> {
    let mut end = path.len();
    for segment in path.rsplit('/') {
        let start = end - segment.len();
        if let Some(at) = container_in_segment(segment) {
            let id = segment.get(at..at + CONTAINER_ID_LEN)?;
            return Some((id, path.get(..start + at)?));
        }
        end = start.saturating_sub(1);
    }
    None
}

/// Where in the segment the first word stands that is a container ID.
fn container_in_segment(segment: &str) -> Option<usize> {
    let mut at = 0;
    for word in segment.as_bytes().split(|b| !is_word(*b)) {
        if word.len() == CONTAINER_ID_LEN && word.iter().all(u8::is_ascii_hexdigit) {
            return Some(at);
        }
        at += word.len() + 1;
    }
    None
}

/// Whether a container's name, before whose ID this stands, is in a cgroup that the agent itself is below: `/../crio-`.
fn is_beside_us(before_container: &str) -> bool {
    let name = before_container.trim_start_matches("/..").strip_prefix('/');
    before_container.starts_with("/../") && name.is_some_and(|name| !name.contains('/'))
}

/// Whether others than root may make cgroups below that service: whoever it runs as, if systemd delegates them to it.
fn is_delegated(path: &str, own: &[&str]) -> bool {
    let Some(service) = path.rsplit('/').next().and_then(|segment| segment.strip_suffix(".service")) else {
        return false;
    };
    let is_ours = || own.iter().any(|own| is_within(own, path));
    service.starts_with("user@") || !(RUNTIMES.contains(&service) || is_ours())
}

/// The pod that the beginning of a path names, of which there may be one only: who may make cgroups below his own (a
/// container with its cgroups writable, a user with a systemd of his own) can name them like another pod's.
fn pod_in(path: &str, before_container: &str, own: &str) -> Result<Option<String>, LocateError> {
    let mut found: Option<String> = None;
    let own_paths = paths(own).unwrap_or_default();
    let mut others_write = false;
    let mut stranger: Option<&str> = None;
    let mut end = 0;
    for segment in before_container.split('/') {
        end += segment.len();
        if let Some(uid) = pod_in_segment(segment) {
            match (found, stranger) {
                _ if others_write => return Err(LocateError::Delegated(path.to_owned())),
                (Some(other), _) if other != uid => return Err(LocateError::Pods(other, uid)),
                (None, Some(outer)) => return Err(LocateError::Inside(path.to_owned(), outer.to_owned())),
                _ => found = Some(uid),
            }
        }
        others_write |= path.get(..end).is_some_and(|above| is_delegated(above, &own_paths));
        end += 1;
        let id = container_in_segment(segment).and_then(|at| segment.get(at..at + CONTAINER_ID_LEN));
        stranger = stranger.or(id.filter(|id| !own.contains(id)));
    }
    Ok(found)
}

/// `podUID` as a word, its groups parted by dashes or (systemd) by underscores; in the form with dashes, or without groups as
/// static pods have it.
fn pod_in_segment(segment: &str) -> Option<String> {
    let bytes = segment.as_bytes();
    let begins = |at: &usize| at.checked_sub(1).and_then(|before| bytes.get(before)).is_none_or(|b| !is_word(*b));
    segment.match_indices("pod").map(|(at, _)| at).filter(begins).find_map(|at| uid_at(bytes.get(at + 3..)?))
}

fn uid_at(bytes: &[u8]) -> Option<String> {
    if let Some((uid, rest)) = bytes.split_at_checked(STATIC_UID_LEN)
        && uid.iter().all(u8::is_ascii_hexdigit)
        && rest.first().is_none_or(|b| !is_word(*b))
    {
        return Some(uid.iter().copied().map(char::from).collect());
    }
    let mut rest = bytes.iter().copied();
    let mut uid = String::with_capacity(36);
    for (index, digits) in POD_UID_GROUPS.into_iter().enumerate() {
        if index > 0 {
            rest.next().filter(|b| matches!(b, b'-' | b'_'))?;
            uid.push('-');
        }
        for _ in 0..digits {
            uid.push(char::from(rest.next().filter(u8::is_ascii_hexdigit)?));
        }
    }
    rest.next().is_none_or(|b| !is_word(b)).then_some(uid)
}

fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_'
}

/// The path up to the first part that is named after the container.
pub fn up_to<'a>(path: &'a str, container_id: &str) -> Option<&'a str> {
    let at = path.find(container_id)? + container_id.len();
    let rest = path.get(at..)?;
    path.get(..at + rest.find('/').unwrap_or(rest.len()))
}

/// Whether `path` is the cgroup `of` or one below it.
pub fn is_within(path: &str, of: &str) -> bool {
    path.strip_prefix(of).is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || of.ends_with('/'))
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
