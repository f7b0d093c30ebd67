//! Properties of any publish request. An input is a `NodePublishVolumeRequest` of CSI.

use std::{path::PathBuf, time::Duration};

use prost::Message;
use sds_agent::{
    csi::{proto::csi::v1::NodePublishVolumeRequest, request},
    per_pod::{
        PerPod,
        volume::{Place, is_pod_uid, is_socket, is_volume},
    },
};

/// Stands for a token, which a volume context may hold.
const TOKEN: &str = "a-token-of-the-pod";

/// Panics if a request reaches another place than its own, or if an error repeats a value of its context.
pub fn check(data: &[u8]) {
    let Ok(publish) = NodePublishVolumeRequest::decode(data) else { return };
    let config = PerPod {
        directory: PathBuf::from("/run/sds-agent/pods"),
        driver_name: "sds.example.com".to_owned(),
        kubelet_directory: PathBuf::from("/var/lib/kubelet"),
        wait_for_certificate: Duration::ZERO,
    };
    match request::check(&publish, &config) {
        Ok(volume) => {
            let Place { uid, volume: name } = &volume.place;
            assert!(is_pod_uid(uid) && is_volume(name) && is_socket(&volume.socket), "{volume:?}");
            let expected = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~csi/{name}/mount");
            assert_eq!(publish.target_path, expected);
            let (parent, target) = volume.place.target();
            assert_eq!(config.kubelet_directory.join(parent).join(target), PathBuf::from(expected));
            assert_eq!(volume.claim.pod.uid, *uid, "the claim is for another pod");
            let context = |name: &str| publish.volume_context.get(&format!("csi.storage.k8s.io/{name}")).map(String::as_str);
            assert_eq!(context("pod.uid"), Some(&**uid));
            assert_eq!(context("pod.namespace"), Some(&*volume.claim.pod.namespace));
            assert_eq!(context("pod.name"), Some(&*volume.claim.pod.name));
            assert_eq!(context("serviceAccount.name"), Some(&*volume.claim.service_account));
        }
        Err(status) => assert!(status.message().len() < 6000 && !status.message().contains('\n'), "{status}"),
    }
    for name in publish.volume_context.keys() {
        let mut other = publish.clone();
        other.volume_context.insert(name.clone(), TOKEN.to_owned());
        if let Err(status) = request::check(&other, &config) {
            assert!(!status.message().contains(TOKEN) || name.contains(TOKEN) || publish.target_path.contains(TOKEN), "{status}");
        }
    }
}
