//! Compiles `proto/` in-process, without `protoc`. The crate `sds-server` compiles the services for workloads.

const ROOT: &str = "proto";
/// The services for the kubelet.
const KUBELET: &[&str] = &["csi/v1/csi.proto", "pluginregistration/v1/registration.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={ROOT}");
    // Requests of the kubelet may hold tokens; without `Debug` they cannot be logged.
    tonic_prost_build::configure()
        .build_server(true)
        .build_client(true)
        .build_transport(false)
        .skip_debug([".csi.v1.NodePublishVolumeRequest"])
        .compile_fds(protox::compile(KUBELET, [ROOT])?)?;
    Ok(())
}
