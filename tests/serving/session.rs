//! Real sockets and real time. Tests wait only for events, with a limit.

mod arrivals;
mod bench;
mod calls;
mod ends;
mod floods;
mod link;
mod log;

use std::{sync::Arc, time::Duration};

use agent_runtime::shutdown::Shutdown;
use sds_server::{
    attest::origin::Origin,
    server::{self, Server},
    session::{
        MAX_REFUSED_STREAMS, Sessions,
        metrics::{self, Rejection},
        quotas,
    },
};
use tokio::{net::UnixStream, time::Instant};
use tokio_util::sync::CancellationToken;
use unix_peer::peer::Peer;
