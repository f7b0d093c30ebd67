//! Failures of `fetch`: a message for users and an exit code for scripts.

use std::{error::Error as _, io, path::PathBuf, time::Duration};

use tonic::{Code, Status};

use super::{key_file, resource};
use crate::cli::{Exit, output::printable};

/// The reason for the failure.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The command line or the environment is wrong.
    #[error("{0}")]
    Usage(String),
    /// The connection failed.
    #[error("{}", connect(.path, .source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The server does not speak HTTP/2.
    #[error("the program that listens at {} does not speak gRPC: {source}", .path.display())]
    Handshake {
        /// The socket.
        path: PathBuf,
        /// The error of the handshake.
        source: hyper::Error,
    },
    /// An error status of the server or of the connection.
    #[error("{}", status(.0))]
    Status(Box<Status>),
    /// The server did not answer, not even about the deadline.
    #[error("no answer within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    /// An answer without resources.
    #[error("the server answered, but has nothing under {}", printable(.0))]
    Nothing(String),
    /// An answer that cannot be used.
    #[error("{0}")]
    Resource(#[from] resource::Error),
    /// The key could not be written.
    #[error("{0}")]
    Key(#[from] key_file::Error),
    /// Writing the output failed.
    #[error("cannot write to standard output: {0}")]
    Unsaid(io::Error),
}

impl Failure {
    /// The failure of a call.
    pub(super) fn status(status: Status) -> Self {
        Self::Status(Box::new(status))
    }

    /// The exit code.
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) => Exit::Usage,
            Self::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Exit::NotPermitted,
            Self::Connect { .. } | Self::Timeout(_) => Exit::Unavailable,
            Self::Status(status) => match status.code() {
                Code::PermissionDenied => Exit::NotPermitted,
                Code::Unavailable | Code::DeadlineExceeded => Exit::Unavailable,
                _ if lost(status) => Exit::Unavailable,
                _ => Exit::Failed,
            },
            Self::Handshake { .. } | Self::Nothing(_) | Self::Resource(_) | Self::Key(_) | Self::Unsaid(_) => Exit::Failed,
        }
    }

    /// Whether a retry can succeed for a client that was served before.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Handshake { .. } | Self::Timeout(_) => true,
            Self::Status(status) => {
                !matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated | Code::InvalidArgument | Code::Unimplemented)
            }
            Self::Usage(_) | Self::Nothing(_) | Self::Resource(_) | Self::Key(_) | Self::Unsaid(_) => false,
        }
    }
}

fn connect(path: &std::path::Path, source: &io::Error) -> String {
    let shown = path.display();
    let way_out = format!("start one with `sds-agent dev --socket {shown}`, or name another socket with --socket");
    match source.kind() {
        io::ErrorKind::NotFound => format!("no socket exists at {shown}; {way_out}"),
        io::ErrorKind::ConnectionRefused => format!("no process listens at {shown}; {way_out}"),
        io::ErrorKind::PermissionDenied => format!("this user may not connect to {shown}; see the modes of the socket and its directories"),
        _ => format!("cannot connect to {shown}: {source}"),
    }
}

fn status(status: &Status) -> String {
    let message = printable(status.message());
    match status.code() {
        Code::PermissionDenied => format!("the server has no identity for this process: {message}"),
        Code::Unavailable | Code::DeadlineExceeded => format!("the server cannot answer now: {message}"),
        Code::NotFound => format!("the server knows none of these names: {message}"),
        _ if lost(status) => format!("the connection was lost: {}", printable(&cause(status))),
        code => format!("the server refused ({code:?}): {message}"),
    }
}

/// Whether the client created the status because the connection ended.
fn lost(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        let ended = error.downcast_ref::<hyper::Error>().is_some_and(|e| e.is_closed() || e.is_canceled() || e.is_incomplete_message());
        if ended || error.is::<io::Error>() || error.downcast_ref::<h2::Error>().is_some_and(|e| e.is_io() || e.is_go_away()) {
            return true;
        }
        source = error.source();
    }
    false
}

/// The innermost error.
fn cause(status: &Status) -> String {
    let mut cause = status.message().to_owned();
    let mut source = status.source();
    while let Some(error) = source {
        cause = error.to_string();
        source = error.source();
    }
    cause
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_has_its_exit_code() {
        let connect = |kind| Failure::Connect { path: "/a".into(), source: io::Error::from(kind) };
        for (failure, exit) in [
            (Failure::Usage(String::new()), Exit::Usage),
            (connect(io::ErrorKind::NotFound), Exit::Unavailable),
            (connect(io::ErrorKind::ConnectionRefused), Exit::Unavailable),
            (connect(io::ErrorKind::PermissionDenied), Exit::NotPermitted),
            (Failure::Timeout(Duration::ZERO), Exit::Unavailable),
            (Failure::status(Status::unavailable("")), Exit::Unavailable),
            (Failure::status(Status::deadline_exceeded("")), Exit::Unavailable),
            (Failure::status(Status::permission_denied("")), Exit::NotPermitted),
            (Failure::status(Status::not_found("")), Exit::Failed),
            (Failure::status(Status::internal("")), Exit::Failed),
            (Failure::Nothing(String::new()), Exit::Failed),
        ] {
            assert_eq!(failure.exit(), exit, "{failure}");
        }
    }

    #[test]
    fn a_missing_socket_says_how_to_make_one() {
        let failure = Failure::Connect { path: "/tmp/a.sock".into(), source: io::ErrorKind::NotFound.into() };
        let expected = "no socket exists at /tmp/a.sock; start one with `sds-agent dev --socket /tmp/a.sock`, \
                        or name another socket with --socket";
        assert_eq!(failure.to_string(), expected);
    }

    #[test]
    fn a_servers_words_do_not_command_the_terminal() {
        let failure = Failure::status(Status::permission_denied("no\x1b[2J"));
        assert_eq!(failure.to_string(), "the server has no identity for this process: no\\u{1b}[2J");
    }
}
