//! The requests that a compromised node can get signed: the approver and the policy, as `daemonset/` installs them, with the real API
//! server and cert-manager.
//!
//! The tests show that each of the two works without the other. Every actor uses its own token, and only the permissions of `daemonset/`.

mod alone;
mod ban;
mod changes;
mod crowd;
mod issuance;
mod load;
mod outages;
mod policy;
mod together;
