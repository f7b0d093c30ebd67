//! How far a stolen node reaches: the approver and the policy, as `daemonset/` installs them, against the real API server and cert-manager.
//!
//! Each of the two is shown to stop what it is there for without the other. Everybody acts with a token of their own, and with no more
//! rights than `daemonset/` gives.

mod alone;
mod changes;
mod crowd;
mod load;
mod outages;
mod policy;
mod together;
