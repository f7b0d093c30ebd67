//! Compiles `proto/` in-process, without `protoc`. The crate `sds-server` compiles the services for workloads.

const ROOT: &str = "proto";
/// The services for the kubelet, and the one between mount helper and agent.
const SERVICES: &[&str] = &["csi/v1/csi.proto", "pluginregistration/v1/registration.proto", "sds_agent/podsockets/v1/pod_sockets.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={ROOT}");
    // Requests of the kubelet may hold tokens; without `Debug` they cannot be logged.
    tonic_prost_build::configure()
        .build_server(true)
        .build_client(true)
        .build_transport(false)
        .skip_debug([".csi.v1.NodePublishVolumeRequest"])
        .compile_fds(protox::compile(SERVICES, [ROOT])?)?;
    Ok(())
}
