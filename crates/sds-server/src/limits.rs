//! Limits for callers: connections, streams, message sizes.

use std::time::Duration;

/// `limits` of the configuration. The limits of connections and streams apply to all sockets of a process together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Open connections. Default: 16,384.
    pub connections: usize,
    /// Open connections of one pod, or of one user outside of pods. Default: 256.
    pub connections_per_pod: usize,
    /// Streams and unary calls in progress. Default: 65,536.
    pub streams: usize,
    /// Streams and unary calls in progress, of one pod. Default: 1,024.
    pub streams_per_pod: usize,
    /// Streams and unary calls in progress on one connection (`SETTINGS_MAX_CONCURRENT_STREAMS`, RFC 9113, section 6.5.2). Default: 100.
    pub streams_per_connection: u32,
    /// Sustained rate of new connections of one pod, per second. Default: 50.
    pub new_connections_per_second_per_pod: u32,
    /// New connections that one pod may open in a burst. Default: 200.
    pub new_connections_burst_per_pod: u32,
    /// Bytes of one request message. Default: 524,288 (512 KiB).
    pub message_bytes: usize,
    /// Resource names on one stream, and in one `FetchSecrets` request. Default: 64.
    pub names_per_stream: usize,
    /// Bytes that all callers together can make the process hold. Each connection and each call in progress reserves what the HTTP/2
    /// implementation can hold for it at most. Default: 738,197,504 (704 MiB).
    pub memory_bytes: usize,
    /// Bytes that one pod can make the process hold. Default: 33,554,432 (32 MiB).
    pub memory_bytes_per_pod: usize,
    /// A connection without a call in progress is closed after this time. Default: 1 h.
    pub idle: Duration,
}

impl Limits {
    /// Limits for a socket with one caller: the caller may use the limits of the whole process, and its connection rate is in effect
    /// unlimited. An eighth of the connections and streams stays reserved for other callers, see [`quotas`](crate::session::quotas).
    pub fn undivided(self) -> Self {
        Self {
            connections_per_pod: self.connections,
            streams_per_pod: self.streams,
            memory_bytes_per_pod: self.memory_bytes,
            new_connections_per_second_per_pod: 1_000_000,
            new_connections_burst_per_pod: 1_000_000,
            ..self
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            connections_per_pod: 256,
            streams: 65_536,
            streams_per_pod: 1024,
            streams_per_connection: 100,
            new_connections_per_second_per_pod: 50,
            new_connections_burst_per_pod: 200,
            message_bytes: 512 << 10,
            names_per_stream: 64,
            memory_bytes: 704 << 20,
            memory_bytes_per_pod: 32 << 20,
            idle: Duration::from_secs(3600),
        }
    }
}
