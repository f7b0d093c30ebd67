//! The service in paused time, with a real store, rotation and embedded issuer, and without a socket.
//!
//! A test acts as the client: it sends and receives single messages.

mod bench;
mod client;
mod ends;
mod fetch;
mod held;
mod log;
mod moves;
mod outages;
mod subscriptions;
mod swaps;
mod wildcards;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent_runtime::clock::Clock;
use bytes::Bytes;
use http::Request;
use sds_server::{
    caller::Connection,
    grpc::{
        self, Body,
        request::{Inbox, MessageKind},
    },
    limits::Limits,
    material::Svid,
    proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
    sds::{
        encoded::Variant,
        metrics::{Kind, Metrics},
        names::Directory,
        reissue_window::ReissueWindow,
        service::{SERVICE, Service},
        stream::TYPE_URL,
    },
    store::Store,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use workload_identity::version::prefix as version_prefix;
