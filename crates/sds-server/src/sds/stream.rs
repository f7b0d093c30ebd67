//! One SDS stream as a pure state machine, for both variants of the protocol: state of the world (SotW) and incremental (delta).
//!
//! It owns the names that the client watches, the versions that were sent, and the responses that the client has not answered. It does no
//! I/O, reads no clock and has no secrets. The driver passes requests to it, asks which response is [due](StreamState::due) for the current
//! versions, and sends it.
//!
//! It implements the [xDS protocol], sections "ACK/NACK and resource type instance version", "How the client specifies what resources to
//! return", "Resource updates" and "Unsubscribing from Resources". Where the protocol leaves a choice, these rules apply:
//!
//! - A request with `error_detail` is a NACK; versions are not compared. A rejected version is sent again only if the client subscribes to
//!   the name again; a newer version is sent. The names in a NACK are applied.
//! - SotW: a request with a stale nonce is ignored, because the client will answer the newer response. A request without a nonce, or with
//!   the latest one after it was answered, changes the names and acknowledges nothing.
//! - Delta: changes of names are always applied. The nonce only selects the response that is acknowledged.
//! - The name `*` is a wildcard subscription, and so are empty lists if the stream has never named a resource: in SotW all requests so far,
//!   in delta the first request. A name is watched while the client subscribes to it, or while the wildcard covers it.
//! - A new subscription, to a name or to `*`, gets a response even if the versions are old and were sent before. A repeated one gets a
//!   response only in delta.
//! - Delta: if a client with a wildcard subscription ends the one to a name, the response has the resource if the wildcard covers it, and
//!   otherwise the name in `removed_resources`. An unsubscription from a name that the client has not subscribed to is ignored.
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
    /// Whether the client subscribes to the name itself.
    explicit: bool,
    /// Whether the client's wildcard subscription covers the name.
    covered: bool,
    /// The version that the client reported in the first request of the stream.
    pub client_reported: Option<Box<str>>,
    /// The version that was sent last.
    sent: Option<Box<str>>,
    /// The version that the client rejected.
    rejected: Option<Box<str>>,
}

impl Watch {
    fn new(name: &str, client_reported: Option<&str>) -> Self {
        let client_reported = client_reported.map(Into::into);
        Self { name: name.into(), explicit: false, covered: false, client_reported, sent: None, rejected: None }
    }

    /// Adds the subscription to the name itself, or the wildcard subscription.
    fn subscribe(&mut self, by: By) {
        *self.flag(by) = true;
    }

    fn flag(&mut self, by: By) -> &mut bool {
        match by {
            By::Name => &mut self.explicit,
            By::Wildcard => &mut self.covered,
        }
    }

    /// The current version is sent, whichever was sent before.
    fn renew(&mut self) {
        (self.sent, self.client_reported, self.rejected) = (None, None, None);
    }

    /// Whether `version` is new for the client.
    fn wants(&self, version: &str) -> bool {
        self.sent.as_deref() != Some(version) && self.client_reported.as_deref() != Some(version) && self.may_get(version)
    }

    fn may_get(&self, version: &str) -> bool {
        self.rejected.as_deref() != Some(version)
    }
}

/// The subscription by which a client watches a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Name,
    Wildcard,
}

/// One response that the driver has to encode and send.
#[derive(Debug, PartialEq, Eq)]
pub struct Due {
    /// The nonce of the response.
    pub nonce: u64,
    /// The names in the response, each with its current version.
    pub names: Vec<(Box<str>, Box<str>)>,
    /// Delta: the names of `removed_resources`.
    pub removed: Vec<Box<str>>,
}

/// The state of one stream.
#[derive(Debug)]
pub struct StreamState {
    variant: Variant,
    wildcard_names: [Box<str>; 2],
    limit: usize,
    started: bool,
    /// Whether a request has named a resource or `*`. From then on, an empty list is not a wildcard.
    has_named: bool,
    /// Whether the client has a wildcard subscription.
    wildcard: bool,
    watches: Vec<Watch>,
    /// Delta: names for `removed_resources` of the next response.
    removed: Vec<Box<str>>,
    last_nonce: u64,
    outstanding: VecDeque<Sent>,
}

/// A response that the client has not answered.
#[derive(Debug)]
struct Sent {
    nonce: u64,
    names: Vec<(Box<str>, Box<str>)>,
}

impl StreamState {
    /// A stream without subscriptions. `wildcard_names` are the names that a wildcard stands for. `limit` is the maximum number of names.
    pub fn new(variant: Variant, wildcard_names: [Box<str>; 2], limit: usize) -> Self {
        Self {
            variant,
            wildcard_names,
            limit,
            started: false,
            has_named: false,
            wildcard: false,
            watches: Vec::new(),
            removed: Vec::new(),
            last_nonce: 0,
            outstanding: VecDeque::new(),
        }
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
        let Ok(nonce) = nonce.parse::<u64>() else { return Received::Stale };
        let Some(index) = self.outstanding.iter().position(|sent| sent.nonce == nonce) else {
            // The latest response is already answered: the request only changes the names.
            let is_latest = nonce == self.last_nonce && nonce > 0;
            return if is_latest { Received::Subscription } else { Received::Stale };
        };
        let superseded = self.variant == Variant::Sotw && index + 1 != self.outstanding.len();
        if superseded {
            return Received::Stale;
        }
        let Some(Sent { nonce, names }) = self.outstanding.remove(index) else { return Received::Stale };
        if self.variant == Variant::Sotw {
            self.outstanding.clear();
        }
        let Some(error) = error else { return Received::Ack(nonce) };
        for (name, version) in names {
            let Some(watch) = self.watches.iter_mut().find(|watch| watch.name == name) else { continue };
            // A late NACK of an older response neither replaces the rejection of a newer version, nor does it answer a later subscription.
            if watch.sent.is_some() && (watch.rejected.is_none() || watch.sent.as_ref() == Some(&version)) {
                watch.rejected = Some(version);
            }
        }
        Received::Nack(nonce, error)
    }

    fn replace(&mut self, first: bool, names: &[String], version: &str) -> Result<(), Violation> {
        let client_reported = Some(version).filter(|v| first && !v.is_empty());
        let legacy = [WILDCARD.to_owned()];
        self.has_named |= !names.is_empty();
        let names = if self.has_named { names } else { &legacy };
        let mut next: Vec<Watch> = Vec::new();
        for (name, by) in self.expand(names) {
            if let Some(watch) = next.iter_mut().find(|w| w.name == name) {
                watch.subscribe(by);
                continue;
            }
            // Checked before each name: a message has room for 100,000 names, and each is compared with all before it.
            if next.len() >= self.limit {
                return Err(Violation::TooManyNames(self.limit));
            }
            let former = self.watches.iter().find(|w| w.name == name);
            let mut watch = former.map_or_else(|| Watch::new(&name, client_reported), Watch::clone);
            (watch.explicit, watch.covered) = (false, false);
            watch.subscribe(by);
            next.push(watch);
        }
        for watch in &mut next {
            if let Some(former) = self.watches.iter().find(|w| w.name == watch.name)
                && (watch.explicit && !former.explicit || watch.covered && !former.covered)
            {
                watch.renew();
            }
        }
        (self.watches, self.wildcard) = (next, names.iter().any(|name| name == WILDCARD));
        Ok(())
    }

    fn change(
        &mut self,
        first: bool,
        subscribe: &[String],
        unsubscribe: &[String],
        versions: &BTreeMap<String, String>,
    ) -> Result<(), Violation> {
        self.unsubscribe(unsubscribe);
        let legacy = [WILDCARD.to_owned()];
        let subscribe = if first && subscribe.is_empty() && unsubscribe.is_empty() { &legacy } else { subscribe };
        let before = self.watches.len();
        for (name, by) in self.expand(subscribe) {
            self.wildcard |= by == By::Wildcard;
            self.removed.retain(|removed| *removed != name);
            let full = self.watches.len() >= self.limit;
            match self.watches.iter_mut().position(|w| w.name == name) {
                Some(index) => {
                    let watch = &mut self.watches[index];
                    watch.subscribe(by);
                    // A repeated subscription requests the resource again, for a client that has dropped it.
                    if index < before {
                        watch.renew();
                    }
                }
                None if full => return Err(Violation::TooManyNames(self.limit)),
                None => {
                    let client_reported = versions.get(&*name).map(String::as_str).filter(|v| first && !v.is_empty());
                    let mut watch = Watch::new(&name, client_reported);
                    watch.subscribe(by);
                    self.watches.push(watch);
                }
            }
        }
        Ok(())
    }

    fn unsubscribe(&mut self, names: &[String]) {
        if names.iter().any(|name| name == WILDCARD) {
            self.wildcard = false;
            self.watches.iter_mut().for_each(|watch| watch.covered = false);
        }
        for name in names {
            let Some(watch) = self.watches.iter_mut().find(|watch| *watch.name == **name && watch.explicit) else { continue };
            watch.explicit = false;
            if watch.covered {
                // The client does not know whether the wildcard covers the name.
                watch.renew();
            } else if self.wildcard {
                self.removed.push(watch.name.clone());
            }
        }
        self.watches.retain(|watch| watch.explicit || watch.covered);
    }

    /// The names of a request, with those that the wildcard covers in the place of `*`.
    fn expand(&self, names: &[String]) -> Vec<(Box<str>, By)> {
        let mut out = Vec::with_capacity(names.len());
        for name in names {
            if name == WILDCARD {
                out.extend(self.wildcard_names.iter().cloned().map(|name| (name, By::Wildcard)));
            } else {
                out.push((name.as_str().into(), By::Name));
            }
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
        if !any && self.removed.is_empty() {
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
        self.outstanding.push_back(Sent { nonce: self.last_nonce, names: names.clone() });
        Some(Due { nonce: self.last_nonce, names, removed: std::mem::take(&mut self.removed) })
    }

    /// Whether every watched name that can be answered has been sent. A stream whose client has ended its requests is then complete.
    pub fn is_settled(&self, answerable: impl Fn(&str) -> bool, version: impl Fn(&str) -> Option<String>) -> bool {
        self.watches.iter().filter(|w| answerable(&w.name)).all(|w| version(&w.name).is_some_and(|v| !w.wants(&v)))
    }
}

#[cfg(any(test, feature = "testing"))]
pub mod model;
#[cfg(test)]
mod tests;
