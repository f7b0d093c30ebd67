//! Sockets of pods: the agent as a CSI driver that gives each pod a directory with a socket of its own.
pub mod directory;
pub mod mounts;
pub mod volume;
