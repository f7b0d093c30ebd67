//! One SDS stream as a pure state machine, for both variants of the protocol: state of the world (SotW) and incremental (delta).
//!
//! It owns the names that the client watches, the versions that were sent, and the responses that the client has not answered. It does no
//! I/O, reads no clock and has no secrets. The driver passes requests to it, asks which response is [due](StreamState::due) for the current
//! versions, and sends it.
//!
//! It implements the [xDS protocol], sections "ACK/NACK and resource type instance version", "How the client specifies what resources to
//! return" and "Resource updates". Where the protocol leaves a choice, these rules apply:
//!
//! - A request with `error_detail` is a NACK; versions are not compared. A rejected version is not sent again, a newer version is. The
//!   names in a NACK are applied.
//! - SotW: a request with a stale nonce is ignored, because the client will answer the newer response. A request without a nonce changes
//!   the names and acknowledges nothing.
//! - Delta: changes of names are always applied. The nonce only selects the response that is acknowledged.
//! - An empty list in the first request of a stream, or the name `*`, is a wildcard. An empty list in a later SotW request unsubscribes
//!   from all names.
//! - An added name gets a response even if its version is old. A repeated name gets one only in delta.
//!
//! [xDS protocol]: https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol

use std::collections::{BTreeMap, VecDeque};

use agent_runtime::text;

use crate::sds::{encoded::Variant, names::WILDCARD};

/// The only resource type that is served.
pub const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// Responses that may await their acknowledgement. The oldest is dropped when there are more.
const OUTSTANDING: usize = 16;

/// A request of either variant.
#[derive(Debug, Default)]
pub struct Request {
    /// `type_url`; empty means [`TYPE_URL`].
    pub type_url: String,
    /// `response_nonce`
    pub nonce: String,
    /// `error_detail.message`, if the request has an `error_detail`.
    pub error: Option<String>,
    /// The names, in the form of the variant.
    pub names: Names,
}

/// The names of a request.
#[derive(Debug)]
pub enum Names {
    /// SotW: the whole list, and the last version that the client accepted.
    All {
        /// `resource_names`
        names: Vec<String>,
        /// `version_info`
        version: String,
    },
    /// Delta: changes of the list, and versions that the client has from an earlier stream.
    Changes {
        /// `resource_names_subscribe`
        subscribe: Vec<String>,
        /// `resource_names_unsubscribe`
        unsubscribe: Vec<String>,
        /// `initial_resource_versions`; used only in the first request.
        versions: BTreeMap<String, String>,
    },
}

impl Default for Names {
    fn default() -> Self {
        Self::All { names: Vec::new(), version: String::new() }
    }
}

/// A request that breaks the protocol or a limit. It ends the stream with INVALID_ARGUMENT or RESOURCE_EXHAUSTED.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The request is for another resource type.
    #[error("type_url {:?} is not served here; this socket serves {TYPE_URL}", text::excerpt(.0, text::MAX_NAME_CHARS))]
    TypeUrl(String),
    /// The stream has more names than the limit.
    #[error("more than {0} resource names on one stream")]
    TooManyNames(usize),
}

impl Violation {
    /// The kind of violation, without content of the request.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::TypeUrl(_) => "type_url",
            Self::TooManyNames(_) => "too many names",
        }
    }
}

/// The meaning of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// A change of names only.
    Subscription,
    /// The client accepted the response with this nonce.
    Ack(u64),
    /// The client rejected the response with this nonce, with this error.
    Nack(u64, String),
    /// The answer to a response that has been superseded.
    Stale,
}

/// One watched name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// The name, as the client sent it.
    pub name: Box<str>,
    /// The version that the client reported in the first request of the stream.
    pub client_reported: Option<Box<str>>,
    /// The version that was sent last.
    sent: Option<Box<str>>,
    /// The version that the client rejected.
    rejected: Option<Box<str>>,
}

impl Watch {
    fn new(name: &str, client_reported: Option<&str>) -> Self {
        Self { name: name.into(), client_reported: client_reported.map(Into::into), sent: None, rejected: None }
    }

    /// Whether `version` is new for the client.
    fn wants(&self, version: &str) -> bool {
        self.sent.as_deref() != Some(version) && self.client_reported.as_deref() != Some(version) && self.may_get(version)
    }

    fn may_get(&self, version: &str) -> bool {
        self.rejected.as_deref() != Some(version)
    }
}

/// One response that the driver has to encode and send.
#[derive(Debug, PartialEq, Eq)]
pub struct Due {
    /// The nonce of the response.
    pub nonce: u64,
    /// The names in the response, each with its current version.
    pub names: Vec<(Box<str>, Box<str>)>,
}

/// The state of one stream.
#[derive(Debug)]
pub struct StreamState {
    variant: Variant,
    wildcard_names: [Box<str>; 2],
    limit: usize,
    started: bool,
    watches: Vec<Watch>,
    last_nonce: u64,
    outstanding: VecDeque<Due>,
}

impl StreamState {
    /// A stream without subscriptions. `wildcard_names` are the names that a wildcard stands for. `limit` is the maximum number of names.
    pub fn new(variant: Variant, wildcard_names: [Box<str>; 2], limit: usize) -> Self {
        Self { variant, wildcard_names, limit, started: false, watches: Vec::new(), last_nonce: 0, outstanding: VecDeque::new() }
    }

    /// The watched names, in the order of subscription.
    pub fn watches(&self) -> &[Watch] {
        &self.watches
    }

    /// Bytes that the state holds because of the client's requests.
    pub fn held_bytes(&self) -> usize {
        let text = |text: &Option<Box<str>>| text.as_ref().map_or(0, |text| text.len());
        let watch = |w: &Watch| size_of::<Watch>() + w.name.len() + text(&w.client_reported) + text(&w.sent) + text(&w.rejected);
        let named = |(name, version): &(Box<str>, Box<str>)| size_of::<[Box<str>; 2]>() + name.len() + version.len();
        let outstanding = self.outstanding.iter().flat_map(|due| &due.names).map(named);
        self.watches.iter().map(watch).chain(outstanding).sum()
    }

    /// Applies a request.
    ///
    /// # Errors
    ///
    /// A [`Violation`] if the request is for another resource type, or has more names than the limit. The stream must end.
    pub fn request(&mut self, request: Request) -> Result<Received, Violation> {
        if !request.type_url.is_empty() && request.type_url != TYPE_URL {
            return Err(Violation::TypeUrl(request.type_url));
        }
        let first = !std::mem::replace(&mut self.started, true);
        // A nonce in the first request is from another stream. It acknowledges nothing, and the names are applied.
        let received = if first { Received::Subscription } else { self.answer(&request.nonce, request.error) };
        if received == Received::Stale && self.variant == Variant::Sotw {
            return Ok(received);
        }
        match request.names {
            Names::All { names, version } => self.replace(first, &names, &version)?,
            Names::Changes { subscribe, unsubscribe, versions } => self.change(first, &subscribe, &unsubscribe, &versions)?,
        }
        Ok(received)
    }

    /// Finds the response that the request answers, and whether the client accepted it.
    fn answer(&mut self, nonce: &str, error: Option<String>) -> Received {
        if nonce.is_empty() {
            return Received::Subscription;
        }
        let Some(index) = nonce.parse().ok().and_then(|n: u64| self.outstanding.iter().position(|due| due.nonce == n)) else {
            return match nonce.parse::<u64>() {
                // The latest response is already answered: the request only changes the names.
                Ok(n) if n == self.last_nonce && self.last_nonce > 0 && error.is_none() => Received::Subscription,
                _ => Received::Stale,
            };
        };
        let superseded = self.variant == Variant::Sotw && index + 1 != self.outstanding.len();
        if superseded {
            return Received::Stale;
        }
        let Some(due) = self.outstanding.remove(index) else { return Received::Stale };
        if self.variant == Variant::Sotw {
            self.outstanding.clear();
        }
        let Some(error) = error else { return Received::Ack(due.nonce) };
        for (name, version) in due.names {
            // A late NACK of an older response does not replace the rejection of a newer version.
            if let Some(watch) =
                self.watches.iter_mut().find(|w| w.name == name && (w.rejected.is_none() || w.sent.as_ref() == Some(&version)))
            {
                watch.rejected = Some(version);
            }
        }
        Received::Nack(due.nonce, error)
    }

    fn replace(&mut self, first: bool, names: &[String], version: &str) -> Result<(), Violation> {
        let client_reported = Some(version).filter(|v| first && !v.is_empty());
        let names = if first && names.is_empty() { vec![WILDCARD.to_owned()] } else { names.to_vec() };
        let mut next: Vec<Watch> = Vec::new();
        for name in self.expand(&names) {
            if next.iter().any(|w| w.name == name) {
                continue;
            }
            // Checked before each name: a message has room for 100,000 names, and each is compared with all before it.
            if next.len() >= self.limit {
                return Err(Violation::TooManyNames(self.limit));
            }
            next.push(self.watches.iter().find(|w| w.name == name).cloned().unwrap_or_else(|| Watch::new(&name, client_reported)));
        }
        self.watches = next;
        Ok(())
    }

    fn change(
        &mut self,
        first: bool,
        subscribe: &[String],
        unsubscribe: &[String],
        versions: &BTreeMap<String, String>,
    ) -> Result<(), Violation> {
        for name in self.expand(unsubscribe) {
            self.watches.retain(|w| w.name != name);
        }
        let wildcard = [WILDCARD.to_owned()];
        let subscribe = if first && subscribe.is_empty() { &wildcard } else { subscribe };
        for name in self.expand(subscribe) {
            let full = self.watches.len() >= self.limit;
            match self.watches.iter_mut().find(|w| w.name == name) {
                // Delta: a repeated subscription requests the resource again, for a client that has dropped it.
                Some(watch) => (watch.sent, watch.client_reported) = (None, None),
                None if full => return Err(Violation::TooManyNames(self.limit)),
                None => {
                    let client_reported = versions.get(&*name).map(String::as_str).filter(|v| first && !v.is_empty());
                    self.watches.push(Watch::new(&name, client_reported));
                }
            }
        }
        Ok(())
    }

    fn expand(&self, names: &[String]) -> Vec<Box<str>> {
        let mut out = Vec::with_capacity(names.len());
        for name in names {
            if name == WILDCARD { out.extend(self.wildcard_names.iter().cloned()) } else { out.push(name.as_str().into()) }
        }
        out
    }

    /// Returns the response that is due, if any, and records it as sent. `version` returns the current version of a name, or `None` if the
    /// resource is not available.
    ///
    /// As soon as one watched name has a new version, SotW sends all available names; delta sends only the new versions.
    pub fn due(&mut self, version: impl Fn(&str) -> Option<String>) -> Option<Due> {
        let mut any = false;
        let mut names = Vec::new();
        for watch in &self.watches {
            let Some(version) = version(&watch.name) else { continue };
            let changed = watch.wants(&version);
            any |= changed;
            if changed || (self.variant == Variant::Sotw && watch.may_get(&version)) {
                names.push((watch.name.clone(), version.into_boxed_str()));
            }
        }
        if !any {
            return None;
        }
        for (name, version) in &names {
            if let Some(watch) = self.watches.iter_mut().find(|w| w.name == *name) {
                watch.sent = Some(version.clone());
                watch.client_reported = None;
            }
        }
        self.last_nonce += 1;
        if self.outstanding.len() == OUTSTANDING {
            self.outstanding.pop_front();
        }
        self.outstanding.push_back(Due { nonce: self.last_nonce, names: names.clone() });
        Some(Due { nonce: self.last_nonce, names })
    }

    /// Whether every watched name that can be answered has been sent. A stream whose client has ended its requests is then complete.
    pub fn is_settled(&self, answerable: impl Fn(&str) -> bool, version: impl Fn(&str) -> Option<String>) -> bool {
        self.watches.iter().filter(|w| answerable(&w.name)).all(|w| version(&w.name).is_some_and(|v| !w.wants(&v)))
    }
}

#[cfg(test)]
mod tests;
