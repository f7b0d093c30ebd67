//! The state of an SDS stream against a model of the protocol. An input is the choices of a sequence of requests and changes.

use sds_server::sds::stream::model;

/// Panics if a response differs from that of the model.
pub fn check(data: &[u8]) {
    if let Err(disagreement) = model::compare(data) {
        panic!("{disagreement}");
    }
}
