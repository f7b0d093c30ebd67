//! Tests with requests of the kubelet, and with requests that a pod could forge.

use std::path::Path;
use std::time::Duration;

use agent_runtime::text::test_keys::Key;
use proptest::prelude::*;
use tonic::Code;

use super::*;
use crate::csi::proto::csi::v1::volume_capability::{BlockVolume, MountVolume};

const UID: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";
const OTHER: &str = "99999999-8888-7777-6666-555555555555";

fn config() -> PerPod {
    PerPod {
        directory: "/run/sds-agent-pods".into(),
        driver_name: "csi.sds-agent.io".into(),
        kubelet_directory: "/var/lib/kubelet".into(),
        wait_for_certificate: Duration::ZERO,
    }
}

fn mount(mount: MountVolume) -> Option<VolumeCapability> {
    Some(VolumeCapability { access_type: Some(AccessType::Mount(mount)) })
}

fn target(uid: &str, volume: &str) -> String {
    format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~csi/{volume}/mount")
}

fn request() -> NodePublishVolumeRequest {
    let context = [
        (POD_NAME, "cart-1"),
        (POD_NAMESPACE, "shop"),
        (POD_UID, UID),
        (SERVICE_ACCOUNT, "cart"),
        (EPHEMERAL, "true"),
        ("csi.storage.k8s.io/serviceAccount.tokens", "{\"\":{\"token\":\"s3cr3t\"}}"),
        ("csi.storage.k8s.io/of.a.newer.kubelet", "1"),
    ];
    NodePublishVolumeRequest {
        volume_id: "csi-1".into(),
        target_path: target(UID, "sds"),
        volume_capability: mount(MountVolume::default()),
        readonly: true,
        secrets: [("csi.storage.k8s.io/serviceAccount.tokens".to_owned(), "s3cr3t".to_owned())].into(),
        volume_context: context.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
    }
}

fn refusal(change: impl FnOnce(&mut NodePublishVolumeRequest)) -> (Code, String) {
    let mut request = request();
    change(&mut request);
    let status = check(&request, &config()).unwrap_err();
    assert!(!status.message().contains("s3cr3t"));
    (status.code(), status.message().to_owned())
}

#[test]
fn what_the_kubelet_asks_is_taken() {
    let volume = check(&request(), &config()).unwrap();
    assert_eq!((&*volume.place.uid, &*volume.place.volume, &*volume.socket), (UID, "sds", "socket"));
    assert_eq!((volume.claim.pod.to_string().as_str(), &*volume.claim.service_account), ("shop/cart-1", "cart"));
    let (directory, name) = volume.place.target();
    assert_eq!(Path::new("/var/lib/kubelet").join(directory).join(name), Path::new(&target(UID, "sds")));

    let mut named = request();
    named.volume_context.insert(SOCKET_NAME.into(), "sds.sock".into());
    named.volume_context.insert(PROFILE.into(), "gold".into());
    let named = check(&named, &config()).unwrap();
    assert_eq!((&*named.socket, named.claim.picked.as_deref(), volume.claim.picked), ("sds.sock", Some("gold"), None));
}

#[test]
fn a_forged_or_foreign_volume_context_is_refused_by_name() {
    type Change = fn(&mut NodePublishVolumeRequest);
    fn set(request: &mut NodePublishVolumeRequest, name: &str, value: &str) {
        request.volume_context.insert(name.into(), value.into());
    }
    let table: &[(Change, Code, &str)] = &[
        (|r| set(r, POD_UID, OTHER), Code::PermissionDenied, "csi.storage.k8s.io/pod.uid is not the pod of target_path"),
        (|r| r.target_path = target(OTHER, "sds"), Code::PermissionDenied, "csi.storage.k8s.io/pod.uid is not the pod of target_path"),
        (|r| set(r, EPHEMERAL, "false"), Code::InvalidArgument, "csi.storage.k8s.io/ephemeral is not true"),
        (|r| set(r, EPHEMERAL, "True"), Code::InvalidArgument, "csi.storage.k8s.io/ephemeral is not true"),
        (|r| drop(r.volume_context.remove(EPHEMERAL)), Code::InvalidArgument, "has no csi.storage.k8s.io/ephemeral; the CSIDriver"),
        (
            |r| drop(r.volume_context.remove(POD_UID)),
            Code::InvalidArgument,
            "has no csi.storage.k8s.io/pod.uid; the CSIDriver csi.sds-agent.io needs podInfoOnMount: true",
        ),
        (|r| set(r, POD_NAME, ""), Code::InvalidArgument, "has no csi.storage.k8s.io/pod.name"),
        (|r| set(r, SERVICE_ACCOUNT, ""), Code::InvalidArgument, "has no csi.storage.k8s.io/serviceAccount.name"),
        (|r| set(r, POD_NAMESPACE, "shop/../x"), Code::InvalidArgument, "is not a name that Kubernetes gives"),
        (|r| set(r, POD_NAME, "a\nb"), Code::InvalidArgument, "is not a name that Kubernetes gives"),
        (
            |r| set(r, "colour", "s3cr3t"),
            Code::InvalidArgument,
            "volume attribute \"colour\" is not known; this driver knows sds-agent.io/socket-name and sds-agent.io/profile",
        ),
        (|r| set(r, "sds-agent.io/socket", "s3cr3t"), Code::InvalidArgument, "volume attribute \"sds-agent.io/socket\" is not known"),
        (|r| set(r, SOCKET_NAME, "../socket"), Code::InvalidArgument, "sds-agent.io/socket-name is not the plain name of a file"),
        (|r| set(r, SOCKET_NAME, ".hidden"), Code::InvalidArgument, "sds-agent.io/socket-name is not the plain name of a file"),
        (|r| set(r, SOCKET_NAME, "a b"), Code::InvalidArgument, "sds-agent.io/socket-name is not the plain name of a file"),
        (|r| set(r, SOCKET_NAME, &"x".repeat(41)), Code::InvalidArgument, "use 1 to 40 letters"),
        (|r| r.readonly = false, Code::InvalidArgument, "set readOnly: true"),
        (|r| r.volume_id.clear(), Code::InvalidArgument, "volume_id is missing"),
        (|r| r.volume_capability = None, Code::InvalidArgument, "has no access type"),
        (|r| r.volume_capability = Some(VolumeCapability { access_type: None }), Code::InvalidArgument, "has no access type"),
        (
            |r| r.volume_capability = Some(VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})) }),
            Code::InvalidArgument,
            "asks for a block device",
        ),
        (
            |r| r.volume_capability = mount(MountVolume { fs_type: "ext4".into(), ..MountVolume::default() }),
            Code::InvalidArgument,
            "remove fsType",
        ),
        (
            |r| r.volume_capability = mount(MountVolume { mount_flags: vec!["dev".into()], ..MountVolume::default() }),
            Code::InvalidArgument,
            "asks for mount options",
        ),
        (|r| drop(r.secrets.insert("password".into(), "s3cr3t".into())), Code::InvalidArgument, "remove nodePublishSecretRef"),
    ];
    for (change, code, message) in table {
        let (seen, text) = refusal(change);
        assert_eq!(seen, *code, "{text}");
        assert!(text.contains(message), "{text:?} does not say {message:?}");
    }
    assert!(refusal(|r| set(r, SOCKET_NAME, &"x".repeat(41))).1.contains(SOCKET_NAME));
}

#[test]
fn a_target_has_the_kubelets_form_and_no_other() {
    let long = format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/{}/mount", "v".repeat(64));
    let longest = format!("/var/lib/kubelet/pods/{}", "v".repeat(5000));
    for path in [
        "",
        "/",
        "mount",
        "/etc",
        "/var/lib/kubelet",
        "/var/lib/kubelet/pods",
        &format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/sds"),
        &format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/sds/mount/"),
        &format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/sds/mount/more"),
        &format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/sds/vol_data.json"),
        &format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~secret/sds/mount"),
        &format!("/var/lib/kubelet//pods/{UID}/volumes/kubernetes.io~csi/sds/mount"),
        &format!("/var/lib/kubelet/pods/{UID}//volumes/kubernetes.io~csi/sds/mount"),
        &format!("/var/lib/kubelet/pods/{UID}/volumes/./kubernetes.io~csi/sds/mount"),
        &format!("/var/lib/kubelet/./pods/{UID}/volumes/kubernetes.io~csi/sds/mount"),
        &format!("/var/lib/kubelet/pods/x/../{UID}/volumes/kubernetes.io~csi/sds/mount"),
        &format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/../mount"),
        &format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/SDS/mount"),
        &format!("/var/lib/kubelet2/pods/{UID}/volumes/kubernetes.io~csi/sds/mount"),
        "/var/lib/kubelet/pods/../volumes/kubernetes.io~csi/sds/mount",
        "/var/lib/kubelet/pods/0/volumes/kubernetes.io~csi/sds/mount",
        &long,
        &longest,
    ] {
        let status = Place::of_target(path, Path::new("/var/lib/kubelet")).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{path}");
        assert!(status.message().len() < 400, "{status:?}");
    }
    for (uid, volume) in [(UID, "v"), ("0123456789abcdef0123456789abcdef", "a-1"), (UID, &"v".repeat(63))] {
        let place = Place::of_target(&target(uid, volume), Path::new("/var/lib/kubelet")).unwrap();
        assert_eq!((&*place.uid, &*place.volume), (uid, volume));
    }
}

proptest! {
    #[test]
    fn no_target_leads_elsewhere(path in "(/var/lib/kubelet)?(/pods)?(/|[a-z0-9~.\\-]{0,8}|\\.\\.){0,12}(/mount)?") {
        if let Ok(place) = Place::of_target(&path, Path::new("/var/lib/kubelet")) {
            let (directory, name) = place.target();
            prop_assert_eq!(Path::new("/var/lib/kubelet").join(directory).join(name), Path::new(&path));
        }
    }

    #[test]
    fn a_socket_is_one_component(name in any::<String>()) {
        if is_socket(&name) {
            prop_assert_eq!(Path::new(&name).components().count(), 1);
            prop_assert_eq!(Path::new(&name).file_name().and_then(|n| n.to_str()), Some(&*name));
        }
    }
}

#[test]
fn a_key_in_what_a_pod_writes_on_its_volume_is_not_in_the_answer() {
    let key = Key::ecdsa();
    for (name, text) in key.texts() {
        let named = |name: &str| (name.to_owned(), text.clone());
        let unknown = (text.clone(), "x".to_owned());
        for attribute in [unknown, named(SOCKET_NAME), named(POD_NAME), named(SERVICE_ACCOUNT), named(EPHEMERAL)] {
            let (_, told) = refusal(|request| request.volume_context.extend([attribute]));
            assert_eq!(key.leak_in(&told), None, "{name}: {told}");
        }
        let (_, told) = refusal(|request| request.target_path.clone_from(&text));
        assert_eq!(key.leak_in(&told), None, "{name}: {told}");
    }
}
