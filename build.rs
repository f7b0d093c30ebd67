//! Compiles `proto/` in-process: `protoc` is not needed. Workloads are served by the crate `sds-server`, which has its own.

const ROOT: &str = "proto";
/// What the kubelet is served, by tonic.
const KUBELET: &[&str] = &["csi/v1/csi.proto", "pluginregistration/v1/registration.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={ROOT}");
    // The requests of the kubelet may hold tokens: a `Debug` would be a way into the log.
    tonic_prost_build::configure()
        .build_server(true)
        .build_client(true)
        .build_transport(false)
        .skip_debug([".csi.v1.NodePublishVolumeRequest"])
        .compile_fds(protox::compile(KUBELET, [ROOT])?)?;
    Ok(())
}
