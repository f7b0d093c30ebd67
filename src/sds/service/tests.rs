//! Layer two: the service on paused time, with a real store, rotation and embedded issuer, and no socket.
//!
//! A test plays the client: it says what a client would say and sees what one would see, message by message.

mod bench;
mod client;
mod ends;
mod fetch;
mod held;
mod log;
mod outages;
mod subscriptions;
mod swaps;

use std::time::{Duration, SystemTime};

use tokio::{sync::mpsc, time::Instant};

use super::*;
use crate::{
    caller::Connection,
    proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
    sds::stream::TYPE_URL,
};
