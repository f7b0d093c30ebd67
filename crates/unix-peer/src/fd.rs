//! Waiting until an owned file descriptor is readable: timers, pidfds and inotify.

use std::{io, os::fd::OwnedFd, sync::Arc};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers `fd` with the tokio runtime, for reading only.
///
/// tokio deprecates its safe constructor, because `as_raw_fd` of an arbitrary type may return another descriptor later. That of an
/// [`OwnedFd`] does not, and this crate forbids the `unsafe` code that the replacement requires.
///
/// # Errors
///
/// epoll rejected the descriptor, such as a regular file.
///
/// # Panics
///
/// Outside of a tokio runtime with I/O enabled.
#[expect(deprecated, reason = "OwnedFd keeps its descriptor, and unsafe code is forbidden here")]
pub fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// Registers a shared descriptor with the tokio runtime, like [`watched`].
///
/// # Errors
///
/// Like [`watched`], and `AlreadyExists` while another registration of the same descriptor exists.
///
/// # Panics
///
/// Outside of a tokio runtime with I/O enabled.
#[expect(deprecated, reason = "as above; an Arc does not change what it holds")]
pub fn watched_shared(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}
