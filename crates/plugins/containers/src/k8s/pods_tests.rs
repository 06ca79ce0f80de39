use super::*;

const ID: &str = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961";
const INIT: &str = "93529524695bb00d91c1f6dba692ea8d3550c3b94fb2463af7bc9ec82f992d26";
const UID: &str = "2c48913c-b29f-11e7-9350-020968147796";

/// In the form of a kubelet's answer.
pub(crate) fn answer() -> String {
    format!(
        r#"{{"kind":"PodList","apiVersion":"v1","metadata":{{}},"items":[
        {{"metadata":{{"name":"blog-1","namespace":"web","uid":"{UID}","creationTimestamp":"2026-01-01T00:00:00Z",
            "labels":{{"app":"blog","tier/x":"a:b"}},"annotations":{{"x":"y"}},
            "ownerReferences":[{{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"blog","uid":"o-1","controller":true}}]}},
          "spec":{{"volumes":[{{"name":"t"}}],"containers":[{{"name":"main","image":"busybox"}},{{"name":"side","image":"busybox"}},{{"name":"later","image":"late"}}],
            "initContainers":[{{"name":"prepare","image":"init"}}],
            "serviceAccountName":"writer","nodeName":"node1"}},
          "status":{{"phase":"Running","startTime":null,
            "initContainerStatuses":[{{"name":"prepare","image":"local/init:1","imageID":"sha256:i",
              "containerID":"containerd://{INIT}","state":{{"terminated":{{"exitCode":0}}}}}}],
            "containerStatuses":[
              {{"name":"main","state":{{"running":{{}}}},"ready":true,"image":"local/busybox:1","imageID":"sha256:m",
                "containerID":"containerd://{ID}"}},
              {{"name":"side","image":"local/busybox:1","imageID":"sha256:m","containerID":"cri-o://{}"}},
              {{"name":"later","image":"local/late:1","imageID":"","state":{{"waiting":{{}}}}}}]}}}},
        {{"metadata":{{"name":"empty","namespace":"web","uid":"u-2","labels":null,"ownerReferences":null}},
          "spec":{{}},"status":{{"containerStatuses":null}}}},
        {{"metadata":{{"name":"without uid"}}}}]}}"#,
        "a".repeat(64)
    )
}

fn values(found: &Found<'_>) -> Vec<String> {
    match found {
        Found::Container(found) => [found.pod_values(), found.container_values()].concat(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn selectors_are_those_of_spire() {
    let list = PodList::parse(answer().as_bytes()).unwrap();
    let found = list.find(ID, Some(UID));
    let mut got = values(&found);
    got.sort();
    let uid = format!("pod-uid:{UID}");
    let mut expected = vec![
        "sa:writer",
        "ns:web",
        "node-name:node1",
        &uid,
        "pod-name:blog-1",
        "pod-image-count:3",
        "pod-init-image-count:1",
        "pod-image:local/busybox:1",
        "pod-image:sha256:m",
        "pod-image:local/late:1",
        // SPIRE has it as well, for a container without an image yet.
        "pod-image:",
        "pod-init-image:local/init:1",
        "pod-init-image:sha256:i",
        "pod-label:app:blog",
        "pod-label:tier/x:a:b",
        "pod-owner:ReplicaSet:blog",
        "pod-owner-uid:ReplicaSet:o-1",
        "container-name:main",
        "container-image:local/busybox:1",
        "container-image:sha256:m",
    ];
    expected.sort_unstable();
    assert_eq!(got, expected);
    assert!(values(&list.find(INIT, None)).contains(&"container-name:prepare".to_owned()), "init containers count");
}

#[test]
fn a_container_is_found_in_its_pod_only() {
    let list = PodList::parse(answer().as_bytes()).unwrap();
    assert!(matches!(list.find(ID, None), Found::Container(_)));
    assert!(matches!(list.find(ID, Some("u-2")), Found::Pod(_)), "the cgroup names another pod");
    assert_eq!(list.find(ID, Some("u-3")), Found::Nothing);
    assert_eq!(list.find(&"b".repeat(64), None), Found::Nothing);
    assert!(matches!(list.find(&"b".repeat(64), Some(UID)), Found::Pod(_)));
    assert_eq!(list.find("", None), Found::Nothing, "containers without an ID are not found");
}

#[test]
fn two_pods_with_one_container_are_a_lie() {
    let twice = answer()
        .replace(r#""containerStatuses":null"#, &format!(r#""containerStatuses":[{{"containerID":"x://{ID}"}}]"#));
    let list = PodList::parse(twice.as_bytes()).unwrap();
    assert_eq!(list.find(ID, None), Found::Several);
    assert!(matches!(list.find(ID, Some(UID)), Found::Container(_)), "the kernel says which");
}

#[test]
fn what_is_no_list_is_refused() {
    for text in [
        "",
        "null",
        "[]",
        "{\"items\":{}}",
        "{\"items\":[7]}",
        "{\"items\":[{\"metadata\":{\"uid\":7}}]}",
        "{\"items\":[",
    ] {
        PodList::parse(text.as_bytes()).expect_err(text);
    }
    for empty in ["{}", "{\"items\":null}", "{\"items\":[]}"] {
        assert_eq!(PodList::parse(empty.as_bytes()).unwrap().find(ID, Some(UID)), Found::Nothing);
    }
    // A depth that would overflow the stack.
    PodList::parse(format!("{{\"items\":[{}", "[".repeat(1 << 20)).as_bytes()).expect_err("too deep");
}

#[test]
fn what_the_runtime_knows_is_what_the_kubelet_will_say() {
    // As the kubelet lists a pod whose containers it has not looked at yet.
    let list = PodList::parse(answer().as_bytes()).unwrap();
    let early = answer().replace("containerStatuses", "x").replace("initContainerStatuses", "y");
    let early = PodList::parse(early.as_bytes()).unwrap();
    let Found::Pod(pod) = early.find(ID, Some(UID)) else { panic!("the container is known") };
    let observed = |name: &str, id: &str, image: &str, image_id: &str| Observed {
        name: name.into(),
        id: id.into(),
        image: image.into(),
        image_id: image_id.into(),
    };
    let runtime = [
        observed("main", ID, "local/busybox:1", "sha256:m"),
        observed("side", &"a".repeat(64), "local/busybox:1", "sha256:m"),
        observed("prepare", INIT, "local/init:1", "sha256:i"),
    ];
    let completed = pod.completed(&runtime);
    let (mut ours, mut kubelets) = (values(&completed.find(ID, Some(UID))), values(&list.find(ID, Some(UID))));
    // What is not there yet is called as the pod calls it.
    assert!(ours.contains(&"pod-image:late".to_owned()));
    ours.retain(|value| value != "pod-image:late");
    kubelets.retain(|value| value != "pod-image:local/late:1");
    ours.sort();
    kubelets.sort();
    assert_eq!(ours, kubelets);
    // A container of the runtime that the pod does not have counts for nothing.
    let strange = pod.completed(&[observed("other", ID, "", "")]);
    assert!(matches!(strange.find(ID, Some(UID)), Found::Pod(_)));
}
