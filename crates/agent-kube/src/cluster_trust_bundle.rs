//! ClusterTrustBundles of `certificates.k8s.io` ([KEP-3257](https://kep.k8s.io/3257)): trust anchors as cluster-scoped objects.
//!
//! The API has a version for each stage of the feature, and a server may serve none of them. The caller asks for the newest one that is
//! served by [`served_version`], and passes it to [`Api::all_with`](kube::Api::all_with).

use std::borrow::Cow;

use k8s_openapi::{ClusterResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Client, Resource};
use serde::Deserialize;

use super::failure::{Call, Cause, Failure};

/// API group.
pub const GROUP: &str = "certificates.k8s.io";
/// Plural, as in API paths.
pub const PLURAL: &str = "clustertrustbundles";

/// The fault of an API server without ClusterTrustBundles, for operators.
pub const UNSERVED: &str = "the API server does not serve ClusterTrustBundles";
/// The remedy for [`UNSERVED`].
pub const UNSERVED_REMEDY: &str = "use Kubernetes 1.37 or newer; or, from 1.33 on, start kube-apiserver with \
                                   --feature-gates=ClusterTrustBundle=true and \
                                   --runtime-config=certificates.k8s.io/v1beta1/clustertrustbundles=true; or name another source of roots";

/// Version of the API. All versions have the same fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Kubernetes 1.37 and newer.
    V1,
    /// Kubernetes 1.33 and newer, behind the feature gate `ClusterTrustBundle`.
    V1beta1,
    /// Kubernetes 1.27 and newer, behind the same feature gate.
    V1alpha1,
}

impl Version {
    /// The newest version first.
    const ALL: [Self; 3] = [Self::V1, Self::V1beta1, Self::V1alpha1];

    /// The name in API paths.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V1beta1 => "v1beta1",
            Self::V1alpha1 => "v1alpha1",
        }
    }
}

/// A ClusterTrustBundle, with the fields that are read.
#[derive(Debug, Clone, Deserialize)]
pub struct ClusterTrustBundle {
    /// `metadata`
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// `spec`
    #[serde(default)]
    pub spec: Spec,
}

/// The spec.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// Trust anchors in PEM.
    pub trust_bundle: String,
}

impl Resource for ClusterTrustBundle {
    type DynamicType = Version;
    type Scope = ClusterResourceScope;

    fn kind(_: &Version) -> Cow<'_, str> {
        "ClusterTrustBundle".into()
    }

    fn group(_: &Version) -> Cow<'_, str> {
        GROUP.into()
    }

    fn version(version: &Version) -> Cow<'_, str> {
        version.as_str().into()
    }

    fn plural(_: &Version) -> Cow<'_, str> {
        PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// Returns the newest version that the API server serves; `None` if it serves none. Sends one request for each version.
///
/// # Errors
///
/// If the API server cannot be asked, or does not allow the question.
pub async fn served_version(client: &Client) -> Result<Option<Version>, Failure> {
    for version in Version::ALL {
        let group_version = format!("{GROUP}/{}", version.as_str());
        match client.list_api_group_resources(&group_version).await {
            Ok(list) if list.resources.iter().any(|resource| resource.name == PLURAL) => return Ok(Some(version)),
            // Another resource of the group is served in this version.
            Ok(_) => {}
            Err(error) => {
                let path = format!("the path /apis/{group_version}");
                let failure = Failure::of(&error, &Call { verb: "get", resource: &path, name: None, namespace: None });
                if !matches!(failure.cause, Cause::NoSuchKind | Cause::NotFound) {
                    return Err(failure);
                }
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fake::{FakeApi, Fault},
        metrics::Metrics,
    };

    #[tokio::test(start_paused = true)]
    async fn the_newest_version_that_has_the_resource_is_found() {
        let (api, metrics) = (FakeApi::new(), Metrics::default());
        let client = api.client(&metrics);
        assert_eq!(served_version(&client).await, Ok(None));
        // Every server has another resource in `v1`.
        api.serve("certificates.k8s.io/v1", &["certificatesigningrequests"]);
        assert_eq!(served_version(&client).await, Ok(None));
        for version in [Version::V1alpha1, Version::V1beta1, Version::V1] {
            api.serve(&format!("certificates.k8s.io/{}", version.as_str()), &["certificatesigningrequests", "clustertrustbundles"]);
            assert_eq!(served_version(&client).await, Ok(Some(version)));
        }
        api.fail("get", "discovery", Fault::Refuse, 1);
        assert_eq!(served_version(&client).await.unwrap_err().cause, Cause::Unreachable);
        let forbidden = serde_json::json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "User \"x\" cannot get path"});
        api.fail("get", "discovery", Fault::Status(403, forbidden), 1);
        let failure = served_version(&client).await.unwrap_err();
        assert_eq!(failure.cause, Cause::Rbac);
        assert!(failure.message.contains("lacks the verb get on the path /apis/certificates.k8s.io/v1 in"), "{failure}");
    }

    #[test]
    fn its_path_has_its_version() {
        assert_eq!(ClusterTrustBundle::url_path(&Version::V1beta1, None), "/apis/certificates.k8s.io/v1beta1/clustertrustbundles");
    }
}
