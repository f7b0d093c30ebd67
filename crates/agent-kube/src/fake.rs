//! An API server for tests: a `tower` service over objects in memory, with lists, resumable watches and scripted faults.
//!
//! It opens no file descriptor, so it can be used under a paused clock.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "for tests alone")]

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture};
use http::{Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::{BoxError, Layer as _};

use crate::{Metrics, RequestRate, layer::Layer};

type Answer = Response<UnsyncBoxBody<Bytes, BoxError>>;
type Key = (String, String, String);

/// A fault that replaces the effect of a request or its response.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The response has this status and this JSON body.
    Status(u16, Value),
    /// The response has this status and this text.
    Text(u16, &'static str),
    /// The request has no effect and no response.
    Hang,
    /// The request has its effect; the connection breaks before the response.
    LoseAnswer,
    /// The request has its effect and no response.
    CarryOutAndHang,
    /// The connection is refused.
    Refuse,
    /// The response has status 200 and this JSON body, and is sent after this time.
    Late(Duration, Value),
    /// A list without a limit, or with a limit above this, gets a response that is larger than any client reads.
    LargeAbove(u64),
}

/// Planned faults, and the requests that meet them.
#[derive(Debug, Clone)]
pub(crate) struct Script<F>(Vec<Planned<F>>);

#[derive(Debug, Clone)]
struct Planned<F> {
    verb: &'static str,
    plural: &'static str,
    fault: F,
    times: usize,
}

impl<F> Default for Script<F> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<F: Clone> Script<F> {
    /// The next `times` requests of this verb and plural meet `fault`, after the faults that are planned already.
    pub(crate) fn plan(&mut self, verb: &'static str, plural: &'static str, fault: F, times: usize) {
        self.0.push(Planned { verb, plural, fault, times });
    }

    /// Returns the fault that a request of this verb and plural meets now.
    pub(crate) fn meet(&mut self, verb: &str, plural: &str) -> Option<F> {
        let planned = self.0.iter_mut().find(|it| it.verb == verb && it.plural == plural && it.times > 0)?;
        planned.times -= 1;
        Some(planned.fault.clone())
    }

    /// Returns whether every planned fault has occurred.
    pub(crate) fn is_done(&self) -> bool {
        self.0.iter().all(|planned| planned.times == 0)
    }
}

struct Watcher {
    plural: String,
    selector: Selector,
    events: mpsc::UnboundedSender<Result<Bytes, BoxError>>,
}

/// Recorded like a parameter of the query: the request accepts the metadata of objects only.
pub const METADATA_ONLY: &str = "(metadata only)";

#[derive(Default, Clone)]
struct Selector {
    namespace: Option<String>,
    labels: Vec<(String, String)>,
    /// Labels that an object must not have.
    absent: Vec<String>,
    fields: Vec<(String, String)>,
}

/// One change: the version, the plural, and the object before and after.
type Change = (u64, String, Option<Value>, Option<Value>);

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<Key, Value>,
    changes: Vec<Change>,
    expired: u64,
    watchers: Vec<Watcher>,
    faults: Script<Fault>,
    seen: Vec<String>,
    queries: Vec<(String, BTreeMap<String, String>)>,
    delays: Vec<(&'static str, &'static str, Duration)>,
    /// For each verb and plural: the number of requests being served, and its maximum so far.
    at_once: BTreeMap<String, (usize, usize)>,
    created: Vec<String>,
    admission: Option<Admission>,
}

/// Changes an object, by its plural, before it is created.
#[derive(Clone)]
struct Admission(Arc<AdmissionFn>);

type AdmissionFn = dyn Fn(&str, &mut Value) + Send + Sync;

/// The server. Clones share its state.
#[derive(Clone, Default)]
pub struct FakeApi {
    state: Arc<Mutex<State>>,
    moved: watch::Sender<()>,
}

impl FakeApi {
    /// Creates an empty cluster.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Returns a client of this server with the real layer and the default rate limit.
    pub fn client(&self, metrics: &Metrics) -> Client {
        self.client_at(metrics, RequestRate::default())
    }

    /// Returns a client of this server with the real layer and this rate limit.
    pub fn client_at(&self, metrics: &Metrics, rate: RequestRate) -> Client {
        let this = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| this.clone().respond(request));
        Client::new(Layer::new(metrics.clone(), rate).layer(service), "default")
    }

    /// Creates or replaces an object.
    pub fn put(&self, plural: &str, object: Value) -> Value {
        let object = self.lock().put(plural, object);
        self.moved.send_replace(());
        object
    }

    /// Changes an object in place.
    pub fn change(&self, plural: &str, namespace: &str, name: &str, change: impl FnOnce(&mut Value)) {
        let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        let mut object = self.lock().objects.get(&key).unwrap().clone();
        change(&mut object);
        self.put(plural, object);
    }

    /// Changes each object that a client creates, as a mutating webhook does. `admission` gets the plural and the object.
    pub fn admit(&self, admission: impl Fn(&str, &mut Value) + Send + Sync + 'static) {
        self.lock().admission = Some(Admission(Arc::new(admission)));
    }

    /// Returns one object.
    pub fn object(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        self.lock().objects.get(&(plural.to_owned(), namespace.to_owned(), name.to_owned())).cloned()
    }

    /// Deletes an object.
    pub fn remove(&self, plural: &str, namespace: &str, name: &str) {
        assert!(self.lock().remove(&(plural.into(), namespace.into(), name.into())).is_some());
        self.moved.send_replace(());
    }

    /// Returns the objects with this plural.
    pub fn objects(&self, plural: &str) -> Vec<Value> {
        self.lock().objects.iter().filter(|(key, _)| key.0 == plural).map(|(_, object)| object.clone()).collect()
    }

    /// Serves these resources in this version of a group, such as `example.com/v1`, for discovery. A client reads it as an object: verb
    /// `get`, plural `discovery`. Without it, the version does not exist.
    pub fn serve(&self, group_version: &str, plurals: &[&str]) {
        let resources: Vec<_> = plurals
            .iter()
            .map(|plural| json!({"name": plural, "singularName": "", "namespaced": false, "kind": "x", "verbs": []}))
            .collect();
        self.put("discovery", json!({"metadata": {"name": group_version}, "groupVersion": group_version, "resources": resources}));
    }

    /// The next `times` requests of this verb and plural meet `fault`.
    pub fn fail(&self, verb: &'static str, plural: &'static str, fault: Fault, times: usize) {
        self.lock().faults.plan(verb, plural, fault, times);
    }

    /// Every request of this verb and plural waits for `time` from now on, and then has its effect.
    pub fn delay(&self, verb: &'static str, plural: &'static str, time: Duration) {
        let mut state = self.lock();
        state.delays.retain(|(v, p, _)| (*v, *p) != (verb, plural));
        state.delays.push((verb, plural, time));
    }

    /// Returns the maximum number of requests of this verb and plural that were served at the same time.
    pub fn most_at_once(&self, verb: &str, plural: &str) -> usize {
        self.lock().at_once.get(&format!("{verb} {plural}")).map_or(0, |(_, most)| *most)
    }

    /// Resets the maxima of `most_at_once` to the current numbers.
    pub fn forget_at_once(&self) {
        self.lock().at_once.values_mut().for_each(|(now, most)| *most = *now);
    }

    /// Removes all planned faults.
    pub fn heal(&self) {
        self.lock().faults = Script::default();
    }

    /// Ends every watch, cleanly or in the middle of an event.
    pub fn cut_watches(&self, mid_event: bool) {
        for watcher in self.lock().watchers.drain(..) {
            if mid_event {
                let _ = watcher.events.send(Ok(Bytes::from_static(b"{\"type\":\"MODIFIED\",\"obj")));
                let _ = watcher.events.send(Err("connection reset".into()));
            }
        }
    }

    /// Forgets all changes so far: a watch that continues from an earlier version gets 410.
    pub fn forget_history(&self) {
        let mut state = self.lock();
        state.version += 1;
        state.expired = state.version;
        state.changes.clear();
    }

    /// Returns the number of requests of this verb and plural so far.
    pub fn count(&self, verb: &str, plural: &str) -> usize {
        let wanted = format!("{verb} {plural}");
        self.lock().seen.iter().filter(|s| **s == wanted).count()
    }

    /// Returns the query parameters of each request of this verb and plural so far.
    pub fn queries(&self, verb: &str, plural: &str) -> Vec<BTreeMap<String, String>> {
        let wanted = format!("{verb} {plural}");
        self.lock().queries.iter().filter(|(kind, _)| *kind == wanted).map(|(_, query)| query.clone()).collect()
    }

    /// Returns a receiver that is notified of every request and every change.
    pub fn moved(&self) -> watch::Receiver<()> {
        self.moved.subscribe()
    }

    /// Waits until `condition` returns a value. Panics after an hour of (paused) time.
    pub async fn until<T>(&self, what: &str, mut condition: impl FnMut(&Self) -> Option<T>) -> T {
        let mut moved = self.moved.subscribe();
        let waiting = async {
            loop {
                moved.borrow_and_update();
                if let Some(found) = condition(self) {
                    return found;
                }
                moved.changed().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(3600), waiting).await.unwrap_or_else(|_| panic!("did not happen: {what}"))
    }

    /// Waits until there are `n` objects with this plural, and returns them.
    pub async fn until_count(&self, plural: &'static str, n: usize) -> Vec<Value> {
        let what = format!("{n} {plural}");
        self.until(&what, |api| Some(api.objects(plural)).filter(|objects| objects.len() == n)).await
    }

    /// Sends a bookmark with the current version to every watch of this plural.
    pub fn bookmark(&self, plural: &str) {
        let state = self.lock();
        let metadata = json!({"resourceVersion": state.version.to_string()});
        let event = json!({"type": "BOOKMARK", "object": {"kind": "x", "apiVersion": "x/v1", "metadata": metadata}});
        for watcher in state.watchers.iter().filter(|watcher| watcher.plural == plural) {
            let _ = watcher.events.send(Ok(Bytes::from(format!("{event}\n"))));
        }
    }

    /// Returns the number of objects with this plural that clients have created.
    pub fn created(&self, plural: &str) -> usize {
        self.lock().created.iter().filter(|created| *created == plural).count()
    }

    /// Returns verb and plural of a request.
    pub(super) fn kind(request: &Request<Body>) -> (&'static str, String) {
        let (plural, _, name) = parse_path(request.uri().path());
        let watches = request.uri().query().is_some_and(|query| parse_query(query).contains_key("watch"));
        let verb = match (request.method(), name.is_some()) {
            (&Method::GET, true) => "get",
            (&Method::GET, false) if watches => "watch",
            (&Method::GET, false) => "list",
            (&Method::POST, _) => "create",
            (&Method::DELETE, _) => "delete",
            (&Method::PATCH, _) => "patch",
            _ => "other",
        };
        (verb, plural)
    }

    pub(super) fn respond(self, request: Request<Body>) -> BoxFuture<'static, Result<Answer, BoxError>> {
        Box::pin(async move {
            let (verb, _) = Self::kind(&request);
            let (parts, body) = request.into_parts();
            let body = body.collect_bytes().await?;
            let mut query: BTreeMap<String, String> = parts.uri.query().map(parse_query).unwrap_or_default();
            let accepted = parts.headers.get(http::header::ACCEPT).and_then(|accepted| accepted.to_str().ok()).unwrap_or_default();
            if accepted.contains("as=PartialObjectMetadataList") {
                query.insert(METADATA_ONLY.to_owned(), String::new());
            }
            let (plural, namespace, name) = parse_path(parts.uri.path());
            let fault = {
                let mut state = self.lock();
                state.queries.push((format!("{verb} {plural}"), query.clone()));
                state.meet(verb, &plural)
            };
            self.moved.send_replace(());
            match fault {
                Some(Fault::Status(code, body)) => return Ok(answer(code, body.to_string())),
                Some(Fault::Text(code, text)) => return Ok(answer(code, text.to_owned())),
                Some(Fault::Late(wait, body)) => {
                    tokio::time::sleep(wait).await;
                    return Ok(answer(200, body.to_string()));
                }
                Some(Fault::Hang) => std::future::pending().await,
                Some(Fault::LargeAbove(most)) if limit(&query).is_none_or(|limit| limit > most) => return Ok(endless()),
                Some(Fault::Refuse) => return Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused).into()),
                Some(Fault::LoseAnswer | Fault::CarryOutAndHang | Fault::LargeAbove(_)) | None => {}
            }
            let serving = Serving::begin(&self, format!("{verb} {plural}"));
            let delay = self.lock().delays.iter().find(|(v, p, _)| *v == verb && *p == plural).map(|(_, _, time)| *time);
            if let Some(time) = delay {
                tokio::time::sleep(time).await;
            }
            drop(serving);
            let response = self.carry_out(verb, plural, namespace, name, &query, &body);
            self.moved.send_replace(());
            match fault {
                Some(Fault::LoseAnswer) => Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset).into()),
                Some(Fault::CarryOutAndHang) => std::future::pending().await,
                _ => Ok(response),
            }
        })
    }

    fn carry_out(
        &self,
        verb: &str,
        plural: String,
        namespace: Option<String>,
        name: Option<String>,
        query: &BTreeMap<String, String>,
        body: &[u8],
    ) -> Answer {
        let mut state = self.lock();
        let key = (plural.clone(), namespace.clone().unwrap_or_default(), name.unwrap_or_default());
        let absent = || status(404, "NotFound", &plural);
        match verb {
            "get" => state.objects.get(&key).map_or_else(absent, |object| answer(200, object.to_string())),
            "create" => {
                let mut object: Value = serde_json::from_slice(body).unwrap();
                object["metadata"]["namespace"] = json!(namespace);
                if let (None, Some(prefix)) = (object["metadata"]["name"].as_str(), object["metadata"]["generateName"].as_str()) {
                    object["metadata"]["name"] = json!(format!("{prefix}{}", state.version));
                }
                let name = object["metadata"]["name"].as_str().unwrap().to_owned();
                if state.objects.contains_key(&(plural.clone(), key.1, name)) {
                    return status(409, "AlreadyExists", &plural);
                }
                state.created.push(plural.clone());
                if let Some(Admission(admission)) = state.admission.clone() {
                    admission(&plural, &mut object);
                }
                answer(201, state.put(&plural, object).to_string())
            }
            "delete" => {
                let wanted: Value = serde_json::from_slice(body).unwrap_or_default();
                let found = state.objects.get(&key).map(|o| o["metadata"]["uid"].clone());
                match (found, wanted.pointer("/preconditions/uid")) {
                    (None, _) => absent(),
                    (Some(uid), Some(wanted)) if uid != *wanted => status(409, "Conflict", &plural),
                    _ => {
                        state.remove(&key);
                        answer(200, json!({"kind": "Status", "status": "Success"}).to_string())
                    }
                }
            }
            "patch" => {
                let wanted: Value = serde_json::from_slice(body).unwrap();
                let Some(mut object) = state.objects.get(&key).cloned() else { return absent() };
                let differs = |field: &str| !wanted["metadata"][field].is_null() && wanted["metadata"][field] != object["metadata"][field];
                if differs("resourceVersion") || differs("uid") {
                    return status(409, "Conflict", &plural);
                }
                merge(&mut object, wanted);
                answer(200, state.put(&plural, object).to_string())
            }
            "list" => {
                let selector = Selector::of(namespace, query);
                let items = state.objects.iter().filter(|(k, o)| k.0 == plural && selector.matches(o)).map(|(_, o)| o);
                // A response from the cache has no pages.
                let cached = query.get("resourceVersion").is_some_and(|version| version == "0");
                let limit = limit(query).filter(|_| !cached).map_or(usize::MAX, |limit| limit.try_into().unwrap());
                let begin: usize = query.get("continue").map_or(0, |token| token.parse().unwrap());
                let mut items: Vec<_> = items.skip(begin).take(limit.saturating_add(1)).collect();
                let more = items.len() > limit;
                items.truncate(limit);
                let mut metadata = json!({"resourceVersion": state.version.to_string()});
                if more {
                    metadata["continue"] = json!((begin + limit).to_string());
                }
                let items: Vec<Value> = if query.contains_key(METADATA_ONLY) {
                    items.into_iter().map(|object| json!({"metadata": object["metadata"]})).collect()
                } else {
                    items.into_iter().cloned().collect()
                };
                answer(200, json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items}).to_string())
            }
            "watch" => {
                let from: u64 = query["resourceVersion"].parse().unwrap();
                let (events, receiver) = mpsc::unbounded_channel();
                let watcher = Watcher { plural, selector: Selector::of(namespace, query), events };
                if from < state.expired {
                    let gone =
                        json!({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}});
                    let _ = watcher.events.send(Ok(Bytes::from(format!("{gone}\n"))));
                } else {
                    state.changes.iter().filter(|c| c.0 > from).for_each(|change| watcher.tell(change));
                    state.watchers.push(watcher);
                }
                let body = StreamBody::new(UnboundedReceiverStream::new(receiver).map(|r| r.map(Frame::data)));
                Response::new(body.boxed_unsync())
            }
            _ => status(405, "MethodNotAllowed", &plural),
        }
    }
}

/// Counts a request as being served until it is dropped.
struct Serving(FakeApi, String);

impl Serving {
    fn begin(api: &FakeApi, kind: String) -> Self {
        let mut state = api.lock();
        let (now, most) = state.at_once.entry(kind.clone()).or_default();
        *now += 1;
        *most = (*most).max(*now);
        drop(state);
        Self(api.clone(), kind)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some((now, _)) = self.0.lock().at_once.get_mut(&self.1) {
            *now -= 1;
        }
    }
}

impl State {
    fn meet(&mut self, verb: &str, plural: &str) -> Option<Fault> {
        self.seen.push(format!("{verb} {plural}"));
        self.faults.meet(verb, plural)
    }

    fn put(&mut self, plural: &str, mut object: Value) -> Value {
        self.version += 1;
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let key = (plural.to_owned(), text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]));
        let old = self.objects.get(&key).cloned();
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-{}", self.version));
        }
        self.objects.insert(key, object.clone());
        self.tell((self.version, plural.to_owned(), old, Some(object.clone())));
        object
    }

    fn remove(&mut self, key: &Key) -> Option<Value> {
        let old = self.objects.remove(key)?;
        self.version += 1;
        self.tell((self.version, key.0.clone(), Some(old.clone()), None));
        Some(old)
    }

    fn tell(&mut self, change: Change) {
        self.watchers.iter().for_each(|w| w.tell(&change));
        self.changes.push(change);
    }
}

impl Watcher {
    fn tell(&self, (version, plural, old, new): &Change) {
        if *plural != self.plural {
            return;
        }
        let matches = |object: &Option<Value>| object.as_ref().is_some_and(|o| self.selector.matches(o));
        let (kind, object) = match (matches(old), matches(new)) {
            (false, true) => ("ADDED", new),
            (true, true) => ("MODIFIED", new),
            (true, false) => ("DELETED", if new.is_some() { new } else { old }),
            (false, false) => return,
        };
        let mut object = object.clone().unwrap();
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let _ = self.events.send(Ok(Bytes::from(format!("{}\n", json!({"type": kind, "object": object})))));
    }
}

impl Selector {
    fn of(namespace: Option<String>, query: &BTreeMap<String, String>) -> Self {
        let pairs = |name: &str| {
            let text = query.get(name).map(String::as_str).unwrap_or_default();
            text.split(',').filter_map(|p| p.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
        };
        let labels = query.get("labelSelector").map(String::as_str).unwrap_or_default().split(',');
        let absent = labels.filter_map(|label| label.strip_prefix('!')).map(str::to_owned).collect();
        Self { namespace, labels: pairs("labelSelector"), absent, fields: pairs("fieldSelector") }
    }

    fn matches(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let field = |path: &str| path.split('.').fold(object, |value, key| &value[key]);
        self.namespace.as_ref().is_none_or(|n| metadata["namespace"] == **n)
            && self.labels.iter().all(|(k, v)| metadata["labels"][k] == **v)
            && self.absent.iter().all(|key| metadata["labels"][key].is_null())
            && self.fields.iter().all(|(k, v)| *field(k) == **v)
    }
}

/// Applies a JSON merge patch (RFC 7396).
fn merge(into: &mut Value, patch: Value) {
    match patch {
        Value::Object(fields) => {
            if !into.is_object() {
                *into = json!({});
            }
            for (key, value) in fields {
                match value {
                    Value::Null => drop(into.as_object_mut().unwrap().remove(&key)),
                    value => merge(&mut into[key.as_str()], value),
                }
            }
        }
        value => *into = value,
    }
}

fn answer(code: u16, body: String) -> Answer {
    let body = http_body_util::Full::new(Bytes::from(body)).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

/// A response that repeats one MiB without end.
fn endless() -> Answer {
    let part = Bytes::from(vec![b' '; 1 << 20]);
    let body = StreamBody::new(futures::stream::repeat(part).map(|part| Ok(Frame::data(part))));
    Response::new(body.boxed_unsync())
}

fn limit(query: &BTreeMap<String, String>) -> Option<u64> {
    query.get("limit").map(|limit| limit.parse().unwrap())
}

fn status(code: u16, reason: &str, plural: &str) -> Answer {
    let status =
        json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason, "details": {"kind": plural}});
    answer(code, status.to_string())
}

fn parse_path(path: &str) -> (String, Option<String>, Option<String>) {
    let segments: Vec<&str> = path.split('/').filter(|s| !s.is_empty()).collect();
    if let ["apis", group, version] = segments[..] {
        return ("discovery".to_owned(), None, Some(format!("{group}/{version}")));
    }
    let rest = &segments[if segments[0] == "apis" { 3 } else { 2 }..];
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some((*namespace).to_owned()), rest),
        _ => (None, rest),
    };
    (rest[0].to_owned(), namespace, rest.get(1).map(|s| (*s).to_owned()))
}

fn parse_query(query: &str) -> BTreeMap<String, String> {
    let decode = |text: &str| {
        text.replace("%21", "!").replace("%2F", "/").replace("%3A", ":").replace("%3D", "=").replace("%2C", ",").replace('+', " ")
    };
    query.split('&').filter_map(|p| p.split_once('=')).map(|(k, v)| (decode(k), decode(v))).collect()
}
