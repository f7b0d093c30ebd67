//! Any sequence of requests and changes, compared with a model of the protocol.
//!
//! The model keeps the subscriptions and what the client has as plain sets, and derives each response from them. It shares no code with the
//! stream state. The sequence is read from bytes: random ones in the tests, those of a fuzzer in `fuzz/`.

use std::collections::BTreeSet;

use super::{BTreeMap, Names, OUTSTANDING, Received, Request, StreamState, Variant, Violation};

/// Maximum names on a stream.
const LIMIT: usize = 4;
const COVERED: [&str; 2] = ["default", "ROOTCA"];
/// The names of requests. The last one is never available.
const NAMES: [&str; 5] = ["default", "ROOTCA", "spiffe://td", "*", "unknown"];
/// The names that may be available.
const RESOURCES: [&str; 3] = ["default", "ROOTCA", "spiffe://td"];

type Versions = BTreeMap<&'static str, u8>;

/// A step of a sequence, for the report of a disagreement.
#[derive(Debug)]
#[allow(dead_code, reason = "printed by a failure")]
enum Step {
    Request(String),
    Versions(Versions),
    Response { names: Vec<String>, removed: Vec<String> },
    NoResponse,
}

/// The state of a client and a server that follow the protocol.
#[derive(Debug, Default)]
struct Model {
    is_delta: bool,
    requests: usize,
    has_named: bool,
    wildcard: bool,
    explicit: BTreeSet<String>,
    /// Names that must be sent, regardless of the version that the client has.
    requested: BTreeSet<String>,
    /// The versions that the client has been sent, or has reported.
    has: BTreeMap<String, String>,
    rejected: BTreeMap<String, String>,
    removed: BTreeSet<String>,
    /// Responses without an answer, the oldest first.
    unanswered: Vec<(u64, BTreeMap<String, String>)>,
    nonce: u64,
}

impl Model {
    fn subscribed(&self) -> BTreeSet<String> {
        let covered = COVERED.into_iter().filter(|_| self.wildcard).map(str::to_owned);
        covered.chain(self.explicit.iter().cloned()).collect()
    }

    fn request(&mut self, request: &Request) -> Result<Received, ()> {
        self.requests += 1;
        let received = if self.requests == 1 { Received::Subscription } else { self.answer(request) };
        match &request.names {
            Names::All { .. } if received == Received::Stale => return Ok(received),
            Names::All { names, version } => self.all(names, version),
            Names::Changes { subscribe, unsubscribe, versions } => self.changes(subscribe, unsubscribe, versions),
        }
        self.forget_others();
        if self.subscribed().len() > LIMIT { Err(()) } else { Ok(received) }
    }

    fn forget_others(&mut self) {
        let subscribed = self.subscribed();
        self.requested.retain(|name| subscribed.contains(name));
        self.has.retain(|name, _| subscribed.contains(name));
        self.rejected.retain(|name, _| subscribed.contains(name));
        self.removed.retain(|name| !subscribed.contains(name));
    }

    fn answer(&mut self, request: &Request) -> Received {
        let Some(nonce) = request.nonce.parse::<u64>().ok().filter(|nonce| *nonce > 0) else {
            return if request.nonce.is_empty() { Received::Subscription } else { Received::Stale };
        };
        let newest = self.unanswered.last().map(|(nonce, _)| *nonce);
        let names = self.unanswered.iter().find(|(other, _)| *other == nonce).map(|(_, names)| names.clone());
        let Some(names) = names.filter(|_| self.is_delta || newest == Some(nonce)) else {
            let is_repeated = nonce == self.nonce && newest != Some(nonce);
            return if is_repeated { Received::Subscription } else { Received::Stale };
        };
        // An answer to a SotW response is one to all earlier responses.
        let is_delta = self.is_delta;
        self.unanswered.retain(|(other, _)| is_delta && *other != nonce);
        let Some(error) = &request.error else { return Received::Ack(nonce) };
        for (name, version) in names {
            // The client has subscribed again since, or has unsubscribed.
            let Some(has) = self.has.get(&name).filter(|_| !self.requested.contains(&name)) else { continue };
            if *has == version || !self.rejected.contains_key(&name) {
                self.rejected.insert(name, version);
            }
        }
        Received::Nack(nonce, error.clone())
    }

    /// The client subscribes to a name or to `*`, for the first time or again.
    fn renew(&mut self, name: &str) {
        let names = if name == "*" { COVERED.map(str::to_owned).to_vec() } else { vec![name.to_owned()] };
        for name in names {
            self.has.remove(&name);
            self.rejected.remove(&name);
            self.requested.insert(name);
        }
    }

    fn reported(&mut self, name: &str, version: &str) {
        if self.requests == 1 && !version.is_empty() && self.subscribed().contains(name) {
            self.has.insert(name.to_owned(), version.to_owned());
            self.requested.remove(name);
        }
    }

    fn all(&mut self, names: &[String], version: &str) {
        self.has_named |= !names.is_empty();
        let before = (self.wildcard, self.explicit.clone());
        self.wildcard = names.iter().any(|name| name == "*") || !self.has_named;
        self.explicit = names.iter().filter(|name| *name != "*").cloned().collect();
        if self.wildcard && !before.0 {
            self.renew("*");
        }
        let added: Vec<String> = self.explicit.difference(&before.1).cloned().collect();
        added.iter().for_each(|name| self.renew(name));
        self.subscribed().iter().for_each(|name| self.reported(name, version));
    }

    fn changes(&mut self, subscribe: &[String], unsubscribe: &[String], versions: &BTreeMap<String, String>) {
        if unsubscribe.iter().any(|name| name == "*") {
            self.wildcard = false;
        }
        for name in unsubscribe {
            if !self.explicit.remove(name) || !self.wildcard {
                continue;
            }
            if COVERED.contains(&name.as_str()) {
                self.renew(name);
            } else {
                self.removed.insert(name.clone());
            }
        }
        self.forget_others();
        let is_legacy = self.requests == 1 && subscribe.is_empty() && unsubscribe.is_empty();
        for name in subscribe.iter().map(String::as_str).chain(is_legacy.then_some("*")) {
            if name == "*" {
                self.wildcard = true;
            } else {
                self.explicit.insert(name.to_owned());
            }
            self.renew(name);
        }
        versions.iter().for_each(|(name, version)| self.reported(name, version));
    }

    /// The response that is due: the names with their versions, and the removed names.
    fn due(&mut self, versions: &Versions) -> Option<(BTreeMap<String, String>, BTreeSet<String>)> {
        let mut sendable = BTreeMap::new();
        for name in self.subscribed() {
            let Some(version) = versions.get(name.as_str()).map(u8::to_string) else { continue };
            if self.rejected.get(&name) != Some(&version) {
                sendable.insert(name, version);
            }
        }
        let is_new = |name: &String, version: &String| self.requested.contains(name) || self.has.get(name) != Some(version);
        let any = sendable.iter().any(|(name, version)| is_new(name, version));
        if !any && self.removed.is_empty() {
            return None;
        }
        let names: BTreeMap<String, String> =
            sendable.into_iter().filter(|(name, version)| !self.is_delta || is_new(name, version)).collect();
        for (name, version) in &names {
            self.requested.remove(name);
            self.has.insert(name.clone(), version.clone());
        }
        self.nonce += 1;
        self.unanswered.push((self.nonce, names.clone()));
        if self.unanswered.len() > OUTSTANDING {
            self.unanswered.remove(0);
        }
        Some((names, std::mem::take(&mut self.removed)))
    }
}

/// Bytes that decide the sequence, one for each choice.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    /// A number below `limit`; 0 after the last byte.
    fn below(&mut self, limit: usize) -> usize {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        usize::from(*first) % limit
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    fn names(&mut self, most: usize) -> Vec<String> {
        (0..self.below(most + 1)).map(|_| self.of(&NAMES).to_owned()).collect()
    }
}

fn request(choices: &mut Choices<'_>, is_delta: bool, nonce: u64) -> Request {
    let nonce = match choices.below(10) {
        0 | 1 => String::new(),
        2 => "not a number".to_owned(),
        3 => nonce.saturating_sub(1).to_string(),
        4 => choices.below(20).to_string(),
        _ => nonce.to_string(),
    };
    let error = (choices.below(4) == 0).then(|| "bad".to_owned());
    let names = if is_delta {
        let most = choices.of(&[0, 1, 3]);
        let (subscribe, unsubscribe) = (choices.names(most), choices.names(most));
        let mut versions = BTreeMap::new();
        for name in RESOURCES {
            if choices.below(2) == 1 {
                versions.insert(name.to_owned(), choices.below(2).to_string());
            }
        }
        Names::Changes { subscribe, unsubscribe, versions }
    } else {
        let version = choices.of(&["", "0", "1"]).to_owned();
        Names::All { names: choices.names(5), version }
    };
    Request { nonce, error, names, ..Request::default() }
}

/// Runs the sequence that `bytes` describe. Returns the number of responses.
///
/// # Errors
///
/// The first disagreement of the stream state with the model, with the sequence that leads to it.
pub fn compare(bytes: &[u8]) -> Result<usize, String> {
    run(bytes, false).or_else(|_| run(bytes, true))
}

/// Records the sequence on demand, because that takes most of the time.
fn run(bytes: &[u8], records: bool) -> Result<usize, String> {
    let mut choices = Choices(bytes);
    let is_delta = choices.below(2) == 1;
    let variant = if is_delta { Variant::Delta } else { Variant::Sotw };
    let mut state = StreamState::new(variant, COVERED.map(Into::into), LIMIT);
    let mut model = Model { is_delta, ..Model::default() };
    let mut versions = Versions::from([("default", 0), ("ROOTCA", 0)]);
    let (mut steps, mut responses) = (Vec::new(), 0);
    while !choices.0.is_empty() {
        let disagreement = |what: &str, steps: &[Step], state: &StreamState, model: &Model| {
            Err(format!("{what}; {variant:?}\n{steps:#?}\n{state:#?}\n{model:#?}"))
        };
        if choices.below(3) == 0 {
            // A few versions, so that a former one returns. A resource may be unavailable for a time.
            let name = choices.of(&RESOURCES);
            match choices.of(&[0, 1, 2, 3]) {
                3 => drop(versions.remove(name)),
                version => drop(versions.insert(name, version)),
            }
            steps.extend(records.then(|| Step::Versions(versions.clone())));
        } else {
            let request = request(&mut choices, is_delta, model.nonce);
            steps.extend(records.then(|| Step::Request(format!("{request:?}"))));
            let expected = model.request(&request);
            match (state.request(request), expected) {
                (Err(Violation::TooManyNames(LIMIT)), Err(())) => return Ok(responses),
                (Ok(received), Ok(expected)) if received == expected => {}
                (received, expected) => {
                    return disagreement(&format!("{received:?}, expected {expected:?}"), &steps, &state, &model);
                }
            }
            let watched: BTreeSet<String> = state.watches().iter().map(|watch| watch.name.to_string()).collect();
            if watched != model.subscribed() || watched.len() != state.watches().len() {
                return disagreement("other names are watched", &steps, &state, &model);
            }
        }
        // Several requests may arrive before a response.
        if choices.below(4) == 0 {
            continue;
        }
        let due = state.due(|name| versions.get(name).map(u8::to_string));
        let expected = model.due(&versions);
        let is_expected = match (&due, &expected) {
            (None, None) => true,
            (Some(due), Some((names, removed))) => {
                let sent: BTreeMap<String, String> = due.names.iter().map(|(name, v)| (name.to_string(), v.to_string())).collect();
                let gone: BTreeSet<String> = due.removed.iter().map(ToString::to_string).collect();
                let unique = sent.len() == due.names.len() && gone.len() == due.removed.len();
                due.nonce == model.nonce && unique && sent == *names && gone == *removed
            }
            _ => false,
        };
        if !is_expected {
            return disagreement(&format!("{due:?}, expected {expected:?}"), &steps, &state, &model);
        }
        responses += usize::from(due.is_some());
        steps.extend(records.then(|| {
            due.map_or(Step::NoResponse, |due| Step::Response {
                names: due.names.iter().map(|(name, version)| format!("{name} {version}")).collect(),
                removed: due.removed.iter().map(ToString::to_string).collect(),
            })
        }));
    }
    Ok(responses)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Number of random sequences.
    const SEQUENCES: u64 = 24_000;
    /// Choices in a sequence, some 24 requests.
    const CHOICES: usize = 200;

    #[test]
    fn every_response_is_the_one_that_the_protocol_requires() {
        let mut responses = 0;
        for seed in 0..SEQUENCES {
            let mut random = fastrand::Rng::with_seed(seed);
            let bytes: Vec<u8> = (0..CHOICES).map(|_| random.u8(..)).collect();
            responses += compare(&bytes).unwrap_or_else(|disagreement| panic!("seed {seed}: {disagreement}"));
        }
        assert!(responses as u64 > 2 * SEQUENCES, "{responses} responses: the sequences are too short");
    }
}
