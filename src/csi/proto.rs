//! The generated types of the services that the kubelet calls.
#![allow(clippy::all, clippy::pedantic, missing_docs)]

/// `csi.*`: the services of a CSI driver.
pub mod csi {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/csi.v1.rs"));
    }
}

/// `pluginregistration`: the service by which the kubelet registers a driver.
pub mod pluginregistration {
    include!(concat!(env!("OUT_DIR"), "/pluginregistration.rs"));
}
