//! Properties of any publish request. An input is a `NodePublishVolumeRequest` of CSI.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../check/csi.rs"]
mod check;

fuzz_target!(|data: &[u8]| check::check(data));
