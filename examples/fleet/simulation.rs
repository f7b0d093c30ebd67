//! A fleet in simulated time: the agent's own planner and schedule, and a signer with a given rate.
//!
//! Every node has the real [`Planner`]; its decisions are not reimplemented here. The simulated parts are the two clocks, the clients
//! (which hold the last published certificate), and one signer with one queue, which takes requests in the order of arrival and needs the
//! same time for each. It skips requests that their agent has deleted. Events are in nanoseconds since the start.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    ops::Range,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use issuance::{
    issuer::Retry,
    rotation::{
        planner::{Action, Authority, Id, Now, Planner},
        schedule,
    },
};
use sds_server::{material::Validity, store::Demand};
use tokio::time::Instant;
use workload_identity::{IssuerName, KeyType, Profile};

/// The delay from the agent's decision to the request's place in the signer's queue; the way back takes the same time.
const WAY: Duration = Duration::from_millis(20);
/// The wall clock at the start: an arbitrary day.
const START: Duration = Duration::from_secs(20_000 * 86_400);

/// The parameters of a simulation.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// The number of agents.
    pub nodes: usize,
    /// The number of identities of each agent.
    pub identities: usize,
    /// The lifetime of every certificate.
    pub lifetime: Duration,
    /// Signatures per second.
    pub rate: f64,
    /// All agents start within this time.
    pub rollout: Duration,
    /// The end of the simulation.
    pub until: Duration,
    /// From this time on all agents restart, spread over `rollout`. Their clients reconnect with the certificates that they hold.
    pub restart: Option<Duration>,
    /// A time without a signer.
    pub outage: Option<Outage>,
    /// Seed of all random draws.
    pub seed: u64,
}

/// A time without a signer.
#[derive(Debug, Clone)]
pub struct Outage {
    /// Start and end.
    pub at: Range<Duration>,
    /// Whether requests fail during this time, as with Vault; otherwise they wait.
    pub fails: bool,
}

impl Scenario {
    /// Mean number of renewals per second.
    pub fn mean_rate(&self) -> f64 {
        let identities = self.nodes as f64 * self.identities as f64;
        identities / (self.lifetime.as_secs_f64() * profile(self.lifetime).renew_at)
    }
}

/// A certificate of an identity.
#[derive(Debug, Clone, Copy)]
pub struct Life {
    /// The time at which its replacement was due.
    pub due: Duration,
    /// The time at which it expires.
    pub not_after: Duration,
    /// The time at which the client received its replacement, if any.
    pub replaced: Option<Duration>,
}

/// The result of a simulation.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The time of each request.
    pub requests: Vec<Duration>,
    /// All certificates.
    pub lives: Vec<Life>,
}

impl Outcome {
    /// The number of requests in each window of length `window`, from `span.start` to `span.end`.
    pub fn windows(&self, window: Duration, span: &Range<Duration>) -> Vec<u32> {
        let count = (span.end.saturating_sub(span.start).as_nanos() / window.as_nanos()) as usize;
        let mut out = vec![0; count];
        for at in self.requests.iter().filter(|at| span.contains(*at)) {
            if let Some(n) = out.get_mut(((*at - span.start).as_nanos() / window.as_nanos()) as usize) {
                *n += 1;
            }
        }
        out
    }

    /// The ratio of the busiest of these windows to their mean.
    pub fn peak_to_mean(&self, window: Duration, span: &Range<Duration>) -> f64 {
        let windows = self.windows(window, span);
        let sum: u64 = windows.iter().map(|n| u64::from(*n)).sum();
        let peak = windows.iter().copied().max().unwrap_or(0);
        f64::from(peak) * windows.len() as f64 / (sum.max(1) as f64)
    }

    /// The number of certificates that expired before their replacement arrived.
    pub fn expired(&self, until: Duration) -> usize {
        self.lives.iter().filter(|life| life.replaced.unwrap_or(until) > life.not_after).count()
    }

    /// The number of certificates that no agent could have renewed in time. They would have expired even if every request had been in the
    /// signer's queue when it was due, and the signer had signed the most urgent one first.
    pub fn beyond_saving(&self, rate: f64, outage: &Range<Duration>, until: Duration) -> usize {
        let mut jobs: Vec<_> = self.lives.iter().filter(|life| life.due < until).map(|life| (life.due, life.not_after)).collect();
        jobs.sort_unstable();
        let mut jobs = VecDeque::from(jobs);
        let (mut waiting, mut now, mut late) = (BinaryHeap::new(), Duration::ZERO, 0);
        let each = Duration::from_secs_f64(1.0 / rate);
        while let Some(next) = jobs.front().map(|(due, _)| *due).or_else(|| (!waiting.is_empty()).then_some(now)) {
            if waiting.is_empty() {
                now = now.max(next);
            }
            if outage.contains(&now) {
                now = outage.end;
            }
            while jobs.front().is_some_and(|(due, _)| *due <= now) {
                waiting.extend(jobs.pop_front().map(|(_, not_after)| Reverse(not_after)));
            }
            if let Some(Reverse(not_after)) = waiting.pop() {
                now += each;
                late += usize::from(now + WAY * 2 > not_after);
            }
        }
        late
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// An agent starts or restarts.
    Start(usize),
    /// The time at which an agent's planner asked to be woken.
    Wake(usize),
    /// A request arrives in the signer's queue.
    Arrival(Request),
    /// The signer has signed a request.
    Signed(Request),
    /// The answer to a request; `bool` is true if it was signed.
    Answer(Request, bool),
}

/// A request of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Request {
    node: usize,
    id: Id,
    /// The process that has the key.
    generation: u32,
    /// Identifies the request.
    number: u64,
}

struct Node {
    planner: Planner,
    generation: u32,
    wake: Option<u64>,
    /// The certificate that the client of each identity holds, as an index into the outcome's lives.
    held: Vec<Option<usize>>,
    /// Certificates that are signed and not yet published.
    signed: Vec<Option<(Validity, SystemTime)>>,
    /// The numbers of the requests that each identity waits for, the oldest first. All but the last may have been set aside.
    pending: Vec<Vec<u64>>,
    /// The number of requests of each identity that were set aside.
    aside: Vec<usize>,
}

struct Run<'a> {
    scenario: &'a Scenario,
    profile: Profile,
    authority: Authority,
    zero: Instant,
    heap: BinaryHeap<Reverse<(u64, Event)>>,
    nodes: Vec<Node>,
    /// The signer's queue.
    queue: VecDeque<Request>,
    is_signing: bool,
    random: fastrand::Rng,
    outcome: Outcome,
}

/// The profile of every identity: the agent's defaults.
fn profile(lifetime: Duration) -> Profile {
    Profile {
        name: "default".into(),
        issuer: IssuerName("mesh".into()),
        authority: "mesh".into(),
        key: KeyType::EcdsaP256,
        lifetime,
        renew_at: 0.5,
        jitter: 0.1,
        spiffe_id: "".into(),
        dns_names: Vec::new(),
        per_pod: false,
        epoch: 0,
    }
}

/// The draws of a process depend only on the seed, so scenarios with one seed can be compared.
fn planner(scenario: &Scenario, node: usize, generation: u32) -> Planner {
    let mut random = fastrand::Rng::with_seed(scenario.seed);
    let seed = random.u64(..).wrapping_add((node as u64) << 32 | u64::from(generation));
    Planner::new(Duration::from_secs(300), fastrand::Rng::with_seed(seed).u64(..))
}

/// Runs `scenario` to its end.
pub fn run(scenario: &Scenario) -> Outcome {
    let random = fastrand::Rng::with_seed(scenario.seed);
    let node = |node: usize| Node {
        planner: planner(scenario, node, 0),
        generation: 0,
        wake: None,
        held: vec![None; scenario.identities],
        signed: vec![None; scenario.identities],
        pending: vec![Vec::new(); scenario.identities],
        aside: vec![0; scenario.identities],
    };
    let nodes = (0..scenario.nodes).map(node).collect();
    let (profile, zero, outcome) = (profile(scenario.lifetime), Instant::now(), Outcome::default());
    let authority = Authority(profile.authority.clone());
    let mut run = Run {
        scenario,
        profile,
        authority,
        zero,
        heap: BinaryHeap::new(),
        nodes,
        queue: VecDeque::new(),
        is_signing: false,
        random,
        outcome,
    };
    for start in [Some(Duration::ZERO), scenario.restart].into_iter().flatten() {
        for node in 0..scenario.nodes {
            let at = start + scenario.rollout.mul_f64(run.random.f64());
            run.push(at, Event::Start(node));
        }
    }
    while let Some(Reverse((at, event))) = run.heap.pop() {
        let at = Duration::from_nanos(at);
        if at > scenario.until {
            break;
        }
        run.handle(at, event);
    }
    run.outcome
}

impl Run<'_> {
    fn push(&mut self, at: Duration, event: Event) {
        // 64 bits of nanoseconds are enough for centuries.
        self.heap.push(Reverse((at.as_nanos() as u64, event)));
    }

    fn now(&self, at: Duration) -> Now {
        Now { wall: UNIX_EPOCH + START + at, mono: self.zero + at }
    }

    fn since_start(wall: SystemTime) -> Duration {
        wall.duration_since(UNIX_EPOCH + START).unwrap_or_default()
    }

    fn handle(&mut self, at: Duration, event: Event) {
        let now = self.now(at);
        let node = match event {
            Event::Start(node) => {
                self.start(now, node);
                node
            }
            Event::Wake(node) => {
                if self.nodes[node].wake != Some(at.as_nanos() as u64) {
                    return;
                }
                self.nodes[node].wake = None;
                node
            }
            Event::Arrival(request) => {
                if self.scenario.outage.as_ref().is_some_and(|outage| outage.fails && outage.at.contains(&at)) {
                    return self.push(at + WAY, Event::Answer(request, false));
                }
                self.queue.push_back(request);
                return self.sign(at);
            }
            Event::Signed(request) => {
                self.is_signing = false;
                self.push(at + WAY, Event::Answer(request, true));
                return self.sign(at);
            }
            Event::Answer(request, signed) => {
                if self.nodes[request.node].generation != request.generation {
                    return;
                }
                let Some(index) = self.position(&request) else { return };
                self.answer(now, request.node, request.id, index, signed);
                request.node
            }
        };
        self.advance(at, node);
    }

    /// Starts an agent; its clients connect with the certificates that they hold, if any.
    fn start(&mut self, now: Now, node: usize) {
        let Node { planner: old, generation, held, pending, aside, .. } = &mut self.nodes[node];
        *generation += 1;
        pending.iter_mut().for_each(Vec::clear);
        aside.fill(0);
        *old = planner(self.scenario, node, *generation);
        for (id, held) in held.iter().enumerate() {
            let demand = match held.map(|life| self.outcome.lives[life]) {
                Some(life) if UNIX_EPOCH + START + life.not_after > now.wall => {
                    let at = |t| UNIX_EPOCH + START + t;
                    Demand::Held { renew_at: at(life.due), not_after: at(life.not_after) }
                }
                _ => Demand::Now,
            };
            old.wanted(now, id as Id, &self.authority, Some(demand));
        }
    }

    /// Answers the request at `index` among those that the identity waits for.
    fn answer(&mut self, now: Now, node: usize, id: Id, index: usize, signed: bool) {
        let Node { planner, signed: ready, pending, aside, .. } = &mut self.nodes[node];
        let (pending, aside) = (&mut pending[id as usize], &mut aside[id as usize]);
        let is_aside = index < *aside;
        if !signed {
            pending.remove(index);
            if is_aside {
                *aside -= 1;
                planner.aside_failed(now, id, index);
            } else {
                planner.failed(now, id, Retry::Backoff, false);
            }
            return;
        }
        let validity = Validity { not_before: now.wall, not_after: now.wall + self.profile.lifetime };
        let renewal_jitter = planner.renewal_jitter(now, id);
        let renew_at = schedule::renew_at(&validity, now.wall, &self.profile, renewal_jitter, planner.draw());
        ready[id as usize] = Some((validity, renew_at));
        pending.clear();
        *aside = 0;
        if is_aside {
            planner.aside_issued(now, id, index, validity, renew_at);
        } else {
            planner.issued(now, id, validity, renew_at);
        }
    }

    fn advance(&mut self, at: Duration, node: usize) {
        let now = self.now(at);
        while let Some(action) = self.nodes[node].planner.poll(now) {
            match action {
                Action::Start(id) => {
                    self.outcome.requests.push(at);
                    let number = self.outcome.requests.len() as u64;
                    let Node { planner, generation, pending, .. } = &mut self.nodes[node];
                    planner.submitted(now, id);
                    pending[id as usize].push(number);
                    let request = Request { node, id, generation: *generation, number };
                    self.push(at + WAY, Event::Arrival(request));
                }
                Action::SetAside(id) => self.nodes[node].aside[id as usize] += 1,
                Action::Withdraw(id) => {
                    let Node { pending, aside, .. } = &mut self.nodes[node];
                    aside[id as usize] -= 1;
                    pending[id as usize].pop();
                }
                Action::Publish(id) => self.publish(at, node, id as usize),
                // Every request reaches the signer's queue, and every identity keeps its client.
                Action::Abandon(_) | Action::Forget(_) => {}
            }
        }
        let (wall, mono) = self.nodes[node].planner.next_wake();
        let wake = [wall.map(Self::since_start), mono.map(|t| t.duration_since(self.zero))].into_iter().flatten().min();
        if let Some(wake) = wake.map(|wake| wake.max(at)) {
            let nanos = wake.as_nanos() as u64;
            if self.nodes[node].wake != Some(nanos) {
                self.nodes[node].wake = Some(nanos);
                self.push(wake, Event::Wake(node));
            }
        }
    }

    /// The position of a request among those that its identity waits for. `None` if the agent has deleted it.
    fn position(&self, request: &Request) -> Option<usize> {
        self.nodes[request.node].pending[request.id as usize].iter().position(|pending| *pending == request.number)
    }

    /// Begins to sign the next request, unless the signer is busy or away. The requests of a process that has ended are signed too.
    fn sign(&mut self, at: Duration) {
        while let Some(request) = self.queue.front().copied().filter(|_| !self.is_signing) {
            self.queue.pop_front();
            let deleted = self.nodes[request.node].generation == request.generation && self.position(&request).is_none();
            if !deleted {
                let begin = self.scenario.outage.as_ref().map_or(at, |outage| if outage.at.contains(&at) { outage.at.end } else { at });
                self.is_signing = true;
                self.push(begin + Duration::from_secs_f64(1.0 / self.scenario.rate), Event::Signed(request));
            }
        }
    }

    fn publish(&mut self, at: Duration, node: usize, id: usize) {
        let Node { held, signed, .. } = &mut self.nodes[node];
        let Some((validity, renew_at)) = signed[id].take() else { return };
        let life = Life { due: Self::since_start(renew_at), not_after: Self::since_start(validity.not_after), replaced: None };
        if let Some(old) = held[id].replace(self.outcome.lives.len()) {
            self.outcome.lives[old].replaced = Some(at);
        }
        self.outcome.lives.push(life);
    }
}
