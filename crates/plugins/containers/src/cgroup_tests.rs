use super::*;
use proptest::prelude::*;

const ID: &str = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961";
const OTHER: &str = "93529524695bb00d91c1f6dba692ea8d3550c3b94fb2463af7bc9ec82f992d26";
const POD: &str = "2c48913c-b29f-11e7-9350-020968147796";
const STATIC: &str = "d41d8cd98f00b204e9800998ecf8427e";
const POD_2: &str = "a2830d0d-b0f0-4ff0-81b5-0ee4e299cf80";

/// `{ID}`, `{O}`: containers; `{P}`, `{S}`: a pod, and as systemd writes it; `{Q}`: another pod.
fn path(form: &str) -> String {
    let systemd = POD.replace('-', "_");
    form.replace("{ID}", ID).replace("{O}", OTHER).replace("{P}", POD).replace("{S}", &systemd).replace("{Q}", POD_2)
}

fn located(forms: &[&str]) -> Result<Option<Located>, LocateError> {
    let paths: Vec<String> = forms.iter().map(|form| path(form)).collect();
    pod(paths.iter().map(String::as_str), &own())
}

/// The agent runs in the container that is a node of kind.
fn own() -> String {
    path("0::/docker/{O}/kubepods/pod{Q}/x\n1:name=systemd:/system.slice/lab.service/agent\n")
}

fn at(id: &str, pod_uid: Option<&str>) -> Result<Option<Located>, LocateError> {
    Ok(Some(Located { container_id: id.into(), pod_uid: pod_uid.map(str::to_owned) }))
}

#[test]
fn paths_of_real_machines() {
    let with_pod = [
        // containerd and docker, cgroupfs
        "/kubepods/burstable/pod{P}/{ID}",
        "/kubepods/pod{P}/{ID}",
        "/kubelet/kubepods/besteffort/pod{P}/{ID}",
        // docker, containerd, CRI-O by systemd
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{S}.slice/docker-{ID}.scope",
        "/kubepods.slice/kubepods-pod{S}.slice/cri-containerd-{ID}.scope",
        "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{S}.slice/crio-{ID}.scope",
        // CRI-O puts what it runs beside and below
        "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{S}.slice/crio-{ID}.scope/container",
        "/kubepods/besteffort/pod{P}/crio-{ID}",
        // containerd below its own service
        "/system.slice/containerd.service/kubepods-besteffort-pod{S}.slice:cri-containerd:{ID}",
        "/kubepods-besteffort-pod{S}.slice:cri-containerd:{ID}",
        // kind: Kubernetes in a container of docker
        "/docker/{O}/kubepods/besteffort/pod{P}/{ID}",
        "/docker/{O}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{S}.slice/cri-containerd-{ID}.scope",
        // seen from inside another container
        "/../../pod{P}/{ID}",
        "/../../kubepods-burstable-pod{S}.slice/cri-containerd-{ID}.scope",
        "/system.slice/k3s.service/kubepods-besteffort-pod{S}.slice:cri-containerd:{ID}",
        // all of Kubernetes in a service, in which the agent is as well
        "/system.slice/lab.service/kubepods/pod{P}/{ID}",
        // a service that runs below its container
        "/kubepods/burstable/pod{P}/{ID}/system.slice/init.scope",
    ];
    for form in with_pod {
        assert_eq!(located(&[form]), at(ID, Some(POD)), "{form}");
    }
    // a static pod's UID is no UUID
    for form in ["/kubepods/besteffort/pod{U}/{ID}", "/kubepods.slice/kubepods-pod{U}.slice/crio-{ID}.scope"] {
        let form = form.replace("{U}", STATIC);
        assert_eq!(located(&[&form]), at(ID, Some(STATIC)), "{form}");
    }
    // another container of the agent's own pod
    for form in ["/../crio-{ID}.scope", "/../{ID}", "/../../crio-{ID}.scope/container"] {
        assert_eq!(located(&[form]), at(ID, None), "{form}");
    }
    let without_pod = [
        "/docker/{ID}",
        "/system.slice/docker-{ID}.scope",
        "/machine.slice/libpod-{ID}.scope",
        "/libpod_parent/libpod-{ID}",
        "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
        "/docker/{O}/docker/{ID}",
        // what a user names so
        "/user.slice/user-1000.slice/user@1000.service/x/{ID}",
        "/../../../user.slice/user-1000.slice/user@1000.service/x/{ID}",
        "/../x/{ID}",
        "/..x/{ID}",
        "/system.slice/ci.service/{ID}",
        "/kubepods/besteffort/podd41d8cd98f00b204e9800998ecf8427e0/{ID}",
    ];
    for form in without_pod {
        assert_eq!(located(&[form]), Ok(None), "{form}");
        assert_eq!(container([path(form).as_str()]), Ok(Some(ID.to_owned())), "{form}");
    }
}

#[test]
fn what_runs_in_no_container() {
    let none = [
        "/",
        "",
        "/user.slice/user-1000.slice/session-2.scope",
        "/system.slice/sshd.service",
        "/kubepods/burstable/pod{P}",
        // one digit too many, or part of a longer word
        "/docker/{ID}0",
        "/docker/x{ID}",
        "/docker/_{ID}",
    ];
    for form in none {
        assert_eq!(located(&[form]), Ok(None), "{form}");
        assert_eq!(container([path(form).as_str()]), Ok(None), "{form}");
    }
}

#[test]
fn all_hierarchies_must_agree() {
    let pod_path = "/kubepods/pod{P}/{ID}";
    assert_eq!(located(&["/", pod_path, "/", pod_path]), at(ID, Some(POD)));
    // The outer container in some hierarchies, whatever the order.
    assert_eq!(located(&["/docker/{O}/system.slice/containerd.service", pod_path]), at(ID, Some(POD)));
    assert_eq!(located(&[pod_path, "/docker/{O}"]), at(ID, Some(POD)));
    assert_eq!(located(&[pod_path, "/kubepods/pod{P}/{O}"]), Err(LocateError::Containers(ID.into(), OTHER.into())));
    assert_eq!(located(&[pod_path, "/kubepods/pod{Q}/{ID}"]), Err(LocateError::Pods(POD.into(), POD_2.into())));
    let docker = [path("/docker/{ID}"), path("/docker/{O}")];
    let error = container(docker.iter().map(String::as_str)).expect_err("is refused");
    assert_eq!(error, LocateError::Containers(ID.into(), OTHER.into()));
}

/// Names that a workload can give its own cgroups must not make another pod's workload of it.
#[test]
fn a_pod_inside_a_pod_is_refused() {
    let nested = path("/kubepods/pod{P}/{ID}/kubepods/pod{Q}/{O}");
    assert_eq!(located(&[&nested]), Err(LocateError::Pods(POD.into(), POD_2.into())));
    let delegated = path("/user.slice/user-1000.slice/user@1000.service/kubepods/pod{P}/{ID}");
    assert_eq!(located(&[&delegated]), Err(LocateError::Delegated(delegated.clone())));
    // A service that does not run as root, to which systemd delegates its cgroups; not even in the names of ours.
    for form in [
        "/system.slice/ci.service/kubepods/pod{P}/{ID}",
        "/system.slice/ci.service/containerd.service/pod{P}/{ID}",
        "/user.slice/user-1000.slice/user@1000.service/kubelet.service/pod{P}/{ID}",
        "/lab.service/pod{P}/{ID}",
        "/system.slice/ci@lab.service/pod{P}/{ID}",
        "/../../system.slice/ci.service/podd41d8cd98f00b204e9800998ecf8427e/{ID}",
    ] {
        assert_eq!(located(&[form]), Err(LocateError::Delegated(path(form))), "{form}");
    }
    let inside = path("/docker/{ID}/kubepods/pod{P}/{O}");
    assert_eq!(located(&[&inside]), Err(LocateError::Inside(inside.clone(), ID.into())));
    // Its own pod again is no lie.
    assert_eq!(located(&["/kubepods/pod{P}/{O}/kubepods/pod{P}/{ID}"]), at(ID, Some(POD)));
}

#[test]
fn lines_are_read_as_the_kernel_writes_them() {
    let text = "12:cpu,cpuacct:/docker/a:b\n1:name=systemd:/\n0::/x\n";
    assert_eq!(paths(text), Ok(vec!["/docker/a:b", "/", "/x"]));
    assert_eq!(paths(""), Ok(vec![]));
    assert_eq!(paths("11:hugetlb\n"), Err(LocateError::Line { found: 2, line: "11:hugetlb".into() }));
}

#[test]
fn a_cgroup_is_within_itself_and_what_is_above() {
    for (path, of, within) in [
        ("/docker/a", "/docker/a", true),
        ("/docker/a/b", "/docker/a", true),
        ("/docker/ab", "/docker/a", false),
        ("/docker", "/docker/a", false),
        ("/x", "/", true),
    ] {
        assert_eq!(is_within(path, of), within, "{path} {of}");
    }
}

fn hex(len: usize) -> impl Strategy<Value = String> {
    prop::string::string_regex(&format!("[0-9a-f]{{{len}}}")).expect("a pattern")
}

proptest! {
    #[test]
    fn nothing_panics_and_nothing_is_invented(text in "(?s).{0,400}") {
        if let Ok(paths) = paths(&text) {
            if let Ok(Some(found)) = pod(paths.iter().copied(), "") {
                prop_assert!(text.contains(&found.container_id) && found.container_id.len() == 64);
            }
            let _ = container(paths);
        }
    }

    #[test]
    fn near_misses_never_panic(path in "[/:._-]{0,3}((pod|docker-|crio-)?[0-9a-f_-]{0,70}[/:._é-]{0,2}){0,6}") {
        let _ = pod([path.as_str()], "");
        let _ = container([path.as_str()]);
    }

    #[test]
    fn any_pod_and_container_are_found_again(
        id in hex(64), groups in (hex(8), hex(4), hex(4), hex(4), hex(12)), systemd: bool,
        before in "(/[a-z.]{1,12}){0,3}", runtime in prop::sample::select(vec!["", "crio-", "docker-", "cri-containerd-"]),
        after in "(|/[a-z]{1,8}\\.scope|/init)",
    ) {
        let (a, b, c, d, e) = groups;
        let uid = format!("{a}-{b}-{c}-{d}-{e}");
        let path = if systemd {
            format!("{before}/kubepods-pod{}.slice/{runtime}{id}.scope{after}", uid.replace('-', "_"))
        } else {
            format!("{before}/pod{uid}/{runtime}{id}{after}")
        };
        let expected = Located { container_id: id.clone(), pod_uid: Some(uid) };
        prop_assert_eq!(pod([path.as_str()], ""), Ok(Some(expected)));
        prop_assert_eq!(container([path.as_str()]), Ok(Some(id)));
    }
}
