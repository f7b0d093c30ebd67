//! Compiles `proto/` in-process: nobody needs `protoc`. The descriptor set of what workloads are served is kept for gRPC reflection,
//! without comments.

use std::{env, fs, path::PathBuf};

use prost::Message;

const ROOT: &str = "proto";
/// What workloads are served, by framing of our own.
const WORKLOADS: &[&str] = &["envoy/service/secret/v3/sds.proto", "envoy/extensions/transport_sockets/tls/v3/secret.proto"];
/// What the kubelet is served, by tonic.
const KUBELET: &[&str] = &["csi/v1/csi.proto", "pluginregistration/v1/registration.proto"];

#[expect(clippy::disallowed_methods, reason = "a build script is there to write files")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={ROOT}");
    let mut descriptors = protox::compile(WORKLOADS, [ROOT])?;

    let out = PathBuf::from(env::var("OUT_DIR")?);
    tonic_prost_build::configure()
        .build_server(false)
        .build_client(true)
        .build_transport(false)
        .bytes(".envoy.config.core.v3.DataSource")
        .bytes(".google.protobuf.Any")
        .compile_fds(descriptors.clone())?;
    // The requests of the kubelet may hold tokens: a `Debug` would be a way into the log.
    tonic_prost_build::configure()
        .build_server(true)
        .build_client(true)
        .build_transport(false)
        .skip_debug([".csi.v1.NodePublishVolumeRequest"])
        .compile_fds(protox::compile(KUBELET, [ROOT])?)?;

    for file in &mut descriptors.file {
        file.source_code_info = None;
    }
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    Ok(())
}
