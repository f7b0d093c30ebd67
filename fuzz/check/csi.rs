//! Properties of any publish request. An input is a `NodePublishVolumeRequest` of CSI.

use std::{path::PathBuf, time::Duration};

use prost::Message;
use sds_agent::csi::{
    PerPod,
    proto::csi::v1::NodePublishVolumeRequest,
    volume::{Place, Volume, is_pod_uid, is_socket, is_volume},
};

/// Stands for a token, which a volume context may hold.
const TOKEN: &str = "a-token-of-the-pod";

/// Panics if a request reaches another place than its own, or if an error repeats a value of its context.
pub fn check(data: &[u8]) {
    let Ok(request) = NodePublishVolumeRequest::decode(data) else { return };
    let config = PerPod {
        directory: PathBuf::from("/run/sds-agent/pods"),
        driver_name: "sds.example.com".to_owned(),
        kubelet_directory: PathBuf::from("/var/lib/kubelet"),
        wait_for_certificate: Duration::ZERO,
    };
    match Volume::check(&request, &config) {
        Ok(volume) => {
            let Place { uid, volume: name } = &volume.place;
            assert!(is_pod_uid(uid) && is_volume(name) && is_socket(&volume.socket), "{volume:?}");
            let expected = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~csi/{name}/mount");
            assert_eq!(request.target_path, expected);
            let (parent, target) = volume.place.target();
            assert_eq!(config.kubelet_directory.join(parent).join(target), PathBuf::from(expected));
            assert_eq!(volume.claim.pod.uid, *uid, "the claim is for another pod");
            let context = |name: &str| request.volume_context.get(&format!("csi.storage.k8s.io/{name}")).map(String::as_str);
            assert_eq!(context("pod.uid"), Some(&**uid));
            assert_eq!(context("pod.namespace"), Some(&*volume.claim.pod.namespace));
            assert_eq!(context("pod.name"), Some(&*volume.claim.pod.name));
            assert_eq!(context("serviceAccount.name"), Some(&*volume.claim.service_account));
        }
        Err(status) => assert!(status.message().len() < 6000 && !status.message().contains('\n'), "{status}"),
    }
    for name in request.volume_context.keys() {
        let mut other = request.clone();
        other.volume_context.insert(name.clone(), TOKEN.to_owned());
        if let Err(status) = Volume::check(&other, &config) {
            assert!(!status.message().contains(TOKEN) || name.contains(TOKEN) || request.target_path.contains(TOKEN), "{status}");
        }
    }
}
