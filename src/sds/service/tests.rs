//! Layer two: the service on paused time, with a real store, rotation and embedded issuer, and no socket.
//!
//! A test plays the client: it says what a client would say and sees what one would see, message by message.

mod bench;
mod client;
mod ends;
mod fetch;
mod held;
mod outages;
mod subscriptions;
