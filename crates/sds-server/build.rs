//! Compiles `proto/` without `protoc`. Writes the descriptor set for gRPC reflection, without comments.

use std::{env, fs, path::PathBuf};

use prost::Message;

const ROOT: &str = "proto";
const FILES: &[&str] = &["envoy/service/secret/v3/sds.proto", "envoy/extensions/transport_sockets/tls/v3/secret.proto"];

#[expect(clippy::disallowed_methods, reason = "a build script writes its output to OUT_DIR")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={ROOT}");
    let mut descriptors = protox::compile(FILES, [ROOT])?;
    tonic_prost_build::configure()
        .build_server(false)
        .build_client(true)
        .build_transport(false)
        .bytes(".envoy.config.core.v3.DataSource")
        .bytes(".google.protobuf.Any")
        .compile_fds(descriptors.clone())?;
    for file in &mut descriptors.file {
        file.source_code_info = None;
    }
    fs::write(PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin"), descriptors.encode_to_vec())?;
    Ok(())
}
