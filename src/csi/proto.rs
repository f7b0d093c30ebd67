//! The generated wire types of what the kubelet calls.
#![allow(clippy::all, clippy::pedantic, missing_docs)]

/// `csi.*`: what the kubelet asks of a driver.
pub mod csi {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/csi.v1.rs"));
    }
}

/// `pluginregistration`: how the kubelet learns of a driver.
pub mod pluginregistration {
    include!(concat!(env!("OUT_DIR"), "/pluginregistration.rs"));
}
