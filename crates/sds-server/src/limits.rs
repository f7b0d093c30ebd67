//! What one agent takes on.

use std::time::Duration;

/// `limits` of the configuration. The bounds of connections and streams count for all sockets of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections in all.
    pub connections: usize,
    /// Connections of one pod, or of one user outside of pods.
    pub connections_per_pod: usize,
    /// Streams and unary calls in all.
    pub streams: usize,
    /// Streams and unary calls at once of one pod.
    pub streams_per_pod: usize,
    /// Streams and unary calls at once on one connection.
    pub streams_per_connection: u32,
    /// How often one pod may connect, in the long run.
    pub new_connections_per_second_per_pod: u32,
    /// How often at once.
    pub new_connections_burst_per_pod: u32,
    /// Bytes in one request message.
    pub message_bytes: usize,
    /// Resource names on one stream.
    pub names_per_stream: usize,
    /// A connection without a call in progress is closed after this time.
    pub idle: Duration,
}

impl Limits {
    /// For a socket with one caller, who may have nearly all that there is: an eighth stays for others even so.
    pub fn undivided(self) -> Self {
        Self {
            connections_per_pod: self.connections,
            streams_per_pod: self.streams,
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
            idle: Duration::from_secs(3600),
        }
    }
}
