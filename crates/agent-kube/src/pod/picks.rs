//! Profiles that pods pick through their volumes. The agent and the approver share this code.
//!
//! A per-pod socket is an inline CSI volume, and an attribute of that volume may name a profile. A pod's volumes are immutable, so every
//! reader of the pod obtains the same picks.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::Volume as ApiVolume;
use serde::{Deserialize, Serialize};

/// Volume attribute that picks a profile.
pub const PROFILE: &str = "sds-agent.io/profile";
/// Maximum length of a profile's name, which is a DNS label.
const MAX_NAME_CHARS: usize = 63;

/// `spec.volumes[]` of a pod, with the fields that are read here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Volume {
    /// `name`
    pub name: String,
    /// `csi`
    pub csi: Option<Csi>,
    /// `hostPath`
    pub host_path: Option<HostPath>,
}

/// `spec.volumes[].hostPath`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostPath {
    /// `path`
    pub path: String,
}

/// `spec.volumes[].csi`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Csi {
    /// `driver`
    pub driver: String,
    /// `volumeAttributes`
    pub volume_attributes: Option<BTreeMap<String, String>>,
}

impl From<&ApiVolume> for Volume {
    fn from(volume: &ApiVolume) -> Self {
        let csi = volume.csi.as_ref();
        let csi = csi.map(|csi| Csi { driver: csi.driver.clone(), volume_attributes: csi.volume_attributes.clone() });
        let host_path = volume.host_path.as_ref().map(|host| HostPath { path: host.path.clone() });
        Self { name: volume.name.clone(), csi, host_path }
    }
}

/// Returns the profile that each volume picks, by the volume's name. `driver` is the agent's CSI driver.
pub fn picks(volumes: &[Volume], driver: &str) -> BTreeMap<Arc<str>, Arc<str>> {
    let pick = |volume: &Volume| {
        let csi = volume.csi.as_ref().filter(|csi| csi.driver == driver)?;
        let picked = picked(csi.volume_attributes.as_ref()?.get(PROFILE)?)?;
        Some((volume.name.as_str().into(), picked))
    };
    volumes.iter().filter_map(pick).collect()
}

/// Returns the profile that an attribute's value picks; `None` if the value is empty. For a value that is no valid profile name it returns
/// `""`, which is the name of no profile.
pub fn picked(value: &str) -> Option<Arc<str>> {
    match value {
        "" => None,
        name if is_name(name) => Some(name.into()),
        _ => Some("".into()),
    }
}

/// Returns whether `name` is a valid name of a profile: a DNS label.
pub fn is_name(name: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(|b| *b != b'-');
    let bytes = name.as_bytes();
    bytes.len() <= MAX_NAME_CHARS
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && edge(bytes.first())
        && edge(bytes.last())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_inline_volumes_of_the_driver_pick() {
        let volumes = json!([
            {"name": "sds", "csi": {"driver": "csi.sds-agent.io", "readOnly": true, "volumeAttributes": {PROFILE: "gold"}}},
            {"name": "odd", "csi": {"driver": "csi.sds-agent.io", "volumeAttributes": {PROFILE: "Gold!".repeat(100)}}},
            {"name": "empty", "csi": {"driver": "csi.sds-agent.io", "volumeAttributes": {PROFILE: ""}}},
            {"name": "none", "csi": {"driver": "csi.sds-agent.io"}},
            {"name": "other", "csi": {"driver": "csi.example", "volumeAttributes": {PROFILE: "gold"}}},
            {"name": "files", "emptyDir": {}},
            {"name": "node", "hostPath": {"path": "/run/sds-agent", "type": "Directory"}},
        ]);
        let expected = BTreeMap::from([("sds".into(), "gold".into()), ("odd".into(), "".into())]);
        let slim: Vec<Volume> = serde_json::from_value(volumes.clone()).unwrap();
        assert_eq!(picks(&slim, "csi.sds-agent.io"), expected);
        // The complete API type yields the same volumes.
        let whole: Vec<ApiVolume> = serde_json::from_value(volumes).unwrap();
        let read: Vec<Volume> = whole.iter().map(Volume::from).collect();
        assert_eq!(read, slim);
    }

    #[test]
    fn a_name_is_a_dns_label() {
        for good in ["a", "gold-1", &"a".repeat(63)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a b", &"a".repeat(64)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
