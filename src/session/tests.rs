//! Layer three: real sockets and real time. Nothing is waited for but events, and those not for ever.

mod arrivals;
mod bench;
mod calls;
mod ends;
mod floods;
mod link;
