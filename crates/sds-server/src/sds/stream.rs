//! One SDS stream as a pure state machine, for both faces of the protocol: state of the world (SotW) and incremental (delta).
//!
//! It owns what the client watches, what it was sent, and what it answered (xDS protocol, "ACK/NACK and resource type instance
//! version"). It does no I/O, reads no clock and knows no secrets: the driver feeds it requests, asks what is [due](StreamState::due)
//! given the versions that exist now, and sends it.
//!
//! The rules, where the protocol leaves room:
//! - A NACK is a request with an error, never a guess from versions. The rejected version is not sent again; a newer one is. The
//!   names of a NACK count.
//! - SotW: a request with an old nonce is ignored: its sender will see the newer response and answer that. A request without a nonce
//!   changes the names and acknowledges nothing.
//! - Delta: names are changes and always count; a nonce only decides which response is acknowledged.
//! - An empty list in a stream's first request, or the name `*`, is a wildcard. An empty list later means: nothing any more.
//! - A name that is added is answered even if its version is an old one; a repeated one is not.

use std::collections::{BTreeMap, VecDeque};

use agent_runtime::text;

use crate::sds::{encoded::Variant, names::WILDCARD};

/// The only type of resource that is served.
pub const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// Responses whose acknowledgement may be outstanding; older ones are taken as lost.
const OUTSTANDING: usize = 16;

/// A request of either variant, borrowed from its message.
#[derive(Debug, Default)]
pub struct Request {
    /// `type_url`; empty means [`TYPE_URL`].
    pub type_url: String,
    /// `response_nonce`
    pub nonce: String,
    /// `error_detail.message`, where there is an `error_detail`.
    pub error: Option<String>,
    /// The names.
    pub names: Names,
}

/// The names of a request.
#[derive(Debug)]
pub enum Names {
    /// SotW: the whole list, and the last version that the client took.
    All {
        /// `resource_names`
        names: Vec<String>,
        /// `version_info`
        version: String,
    },
    /// Delta: changes to the list, and versions that the client brings along.
    Changes {
        /// `resource_names_subscribe`
        subscribe: Vec<String>,
        /// `resource_names_unsubscribe`
        unsubscribe: Vec<String>,
        /// `initial_resource_versions`; of the first request only.
        versions: BTreeMap<String, String>,
    },
}

impl Default for Names {
    fn default() -> Self {
        Self::All { names: Vec::new(), version: String::new() }
    }
}

/// A request that ends the stream with INVALID_ARGUMENT or RESOURCE_EXHAUSTED.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Another resource type.
    #[error("type_url {:?} is not served here; this socket serves {TYPE_URL}", text::excerpt(.0, text::MAX_NAME_CHARS))]
    TypeUrl(String),
    /// More names than the limit.
    #[error("more than {0} resource names on one stream")]
    TooManyNames(usize),
}

impl Violation {
    /// Its kind, which holds nothing of the request.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::TypeUrl(_) => "type_url",
            Self::TooManyNames(_) => "too many names",
        }
    }
}

/// What a request was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// It only said which names are wanted.
    Subscription,
    /// It accepted the response with this nonce.
    Ack(u64),
    /// It rejected the response with this nonce.
    Nack(u64, String),
    /// It answered a response that has been superseded.
    Stale,
}

/// One watched name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// The name as the client said it.
    pub name: Box<str>,
    /// The version that the client says it has, of the stream's first request.
    pub client_reported: Option<Box<str>>,
    /// The version last sent.
    sent: Option<Box<str>>,
    /// The version that the client rejected.
    rejected: Option<Box<str>>,
}

impl Watch {
    fn new(name: &str, client_reported: Option<&str>) -> Self {
        Self { name: name.into(), client_reported: client_reported.map(Into::into), sent: None, rejected: None }
    }

    /// Whether `version` is news for the client.
    fn wants(&self, version: &str) -> bool {
        self.sent.as_deref() != Some(version) && self.client_reported.as_deref() != Some(version) && self.may_get(version)
    }

    fn may_get(&self, version: &str) -> bool {
        self.rejected.as_deref() != Some(version)
    }
}

/// One response, to be encoded and sent by the driver.
#[derive(Debug, PartialEq, Eq)]
pub struct Due {
    /// The response's nonce.
    pub nonce: u64,
    /// The names to answer, each with the version that exists now.
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
    /// A stream without subscriptions. `wildcard_names` is what a wildcard stands for; `limit` bounds the names.
    pub fn new(variant: Variant, wildcard_names: [Box<str>; 2], limit: usize) -> Self {
        Self { variant, wildcard_names, limit, started: false, watches: Vec::new(), last_nonce: 0, outstanding: VecDeque::new() }
    }

    /// What is watched, in the order of subscription.
    pub fn watches(&self) -> &[Watch] {
        &self.watches
    }

    /// Takes a request.
    pub fn request(&mut self, request: Request) -> Result<Received, Violation> {
        if !request.type_url.is_empty() && request.type_url != TYPE_URL {
            return Err(Violation::TypeUrl(request.type_url));
        }
        let first = !std::mem::replace(&mut self.started, true);
        // A nonce in a stream's first request is of another stream: it answers nothing, and its names count.
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

    /// Which response a request answers, and how.
    fn answer(&mut self, nonce: &str, error: Option<String>) -> Received {
        if nonce.is_empty() {
            return Received::Subscription;
        }
        let Some(index) = nonce.parse().ok().and_then(|n: u64| self.outstanding.iter().position(|due| due.nonce == n)) else {
            return match nonce.parse::<u64>() {
                // Already answered, and the latest: another word about the names, as clients do when they add one.
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
            // A late word about an older response does not forgive the newer version that was rejected since.
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
            // Before the next one: every name is compared with those before it, and a message has room for a hundred thousand.
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
                // Delta: subscribing again asks for the resource again (a client that has lost it does so).
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

    /// The response that is due, given the version that each name has now (none: not available). Asking records it as sent.
    ///
    /// SotW answers every watched name that has an answer as soon as one of them is news; delta answers the news only.
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

    /// Whether everything that is watched and can be answered has been sent: a client that has stopped asking is done then.
    pub fn is_settled(&self, answerable: impl Fn(&str) -> bool, version: impl Fn(&str) -> Option<String>) -> bool {
        self.watches.iter().filter(|w| answerable(&w.name)).all(|w| version(&w.name).is_some_and(|v| !w.wants(&v)))
    }
}

#[cfg(test)]
mod tests;
