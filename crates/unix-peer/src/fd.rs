//! Waiting for an owned file descriptor: timers, pidfds and what the kernel tells of files.

use std::{io, os::fd::OwnedFd, sync::Arc};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers `fd` with the runtime, for reading only.
///
/// tokio deprecates its safe constructor because a type's `as_raw_fd` may change its answer; an [`OwnedFd`]'s never does, and this
/// crate forbids the `unsafe` of the successor.
#[expect(deprecated, reason = "OwnedFd keeps its descriptor, and unsafe code is forbidden here")]
pub fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// The same for a descriptor that others hold too. While it is registered, another registration of it fails with `AlreadyExists`.
#[expect(deprecated, reason = "as above; an Arc does not change what it holds")]
pub fn watched_shared(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}
