//! Pages of lists: how many objects a page has, so that its response fits into memory.
//!
//! The caller of a list sets the largest page by `limit`. A page whose response exceeds [`MAX_PAGE_BYTES`] is requested again with half as
//! many objects, down to one. Later pages of the same list begin at the size that fitted, and grow again while they are small. An object
//! that exceeds the limit alone is read by its metadata only, and left out of the list.
//!
//! A list without `limit`, and one from the API server's cache (`resourceVersion=0`), for which older servers ignore `limit`, is not
//! divided.

use std::collections::HashMap;

use bytes::Bytes;
use http::{HeaderValue, Request, Uri, header, request::Parts, uri::PathAndQuery};
use kube::client::Body;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};

/// Maximum size of the response with a page of several objects, 8 MiB. A response is in memory up to three times until it is parsed.
pub const MAX_PAGE_BYTES: usize = 8 << 20;
/// Size of a page below which the next one may have twice as many objects.
const SMALL_PAGE_BYTES: usize = MAX_PAGE_BYTES / 4;
/// Media type of the metadata of a list's objects.
const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";

/// Objects per page by the path of the list, where it is less than the caller's `limit`.
#[derive(Debug, Default)]
pub(super) struct PageSizes(Mutex<HashMap<String, u32>>);

/// A page of a list, as it is requested.
#[derive(Debug)]
pub(super) struct Page {
    request: Parts,
    /// The caller's `limit`.
    asked: u32,
    /// Objects in the next request.
    size: u32,
}

/// An object that exceeds [`MAX_PAGE_BYTES`] alone.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Skipped {
    /// Namespace and name; the namespace is empty if the object has none.
    pub namespace: String,
    pub name: String,
    /// The response without the object.
    pub body: Bytes,
}

impl Page {
    /// Returns the page that `request` is for, or `None` if it cannot be divided.
    pub(super) fn of(request: &Request<Body>, sizes: &PageSizes) -> Option<Self> {
        let limit = || parameter(request.uri(), "limit")?.parse::<u32>().ok().filter(|limit| *limit > 0);
        let is_from_cache = parameter(request.uri(), "resourceVersion").is_some_and(|version| version == "0");
        let asked = limit().filter(|_| !is_from_cache)?;
        let size = sizes.0.lock().get(request.uri().path()).map_or(asked, |size| asked.min(*size));
        let (mut parts, ()) = Request::new(()).into_parts();
        (parts.method, parts.uri) = (request.method().clone(), request.uri().clone());
        (parts.headers, parts.extensions) = (request.headers().clone(), request.extensions().clone());
        Some(Self { request: parts, asked, size })
    }

    /// Returns the request for the page with its present size.
    pub(super) fn request(&self) -> Request<Body> {
        self.with_limit(self.size)
    }

    fn with_limit(&self, limit: u32) -> Request<Body> {
        let mut parts = self.request.clone();
        parts.uri = with_parameter(&parts.uri, "limit", limit);
        Request::from_parts(parts, Body::empty())
    }

    /// Notes that the response was `bytes` long: the next page may grow.
    pub(super) fn fitted(&self, bytes: usize, sizes: &PageSizes) {
        if self.size < self.asked && bytes <= SMALL_PAGE_BYTES {
            self.note(self.size.saturating_mul(2), sizes);
        }
    }

    /// Notes that the response was too large. Returns false if it cannot become smaller.
    pub(super) fn shrink(&mut self, sizes: &PageSizes) -> bool {
        if self.size == 1 {
            return false;
        }
        self.size /= 2;
        self.note(self.size, sizes);
        true
    }

    fn note(&self, size: u32, sizes: &PageSizes) {
        let mut sizes = sizes.0.lock();
        if size < self.asked {
            sizes.insert(self.request.uri.path().to_owned(), size);
        } else {
            sizes.remove(self.request.uri.path());
        }
    }

    /// Returns the request for the metadata of the page's only object.
    pub(super) fn metadata_request(&self) -> Request<Body> {
        let mut request = self.with_limit(1);
        request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static(METADATA_ONLY));
        request
    }
}

/// Reads the response to [`Page::metadata_request`]. Returns `None` if it does not describe exactly one object.
pub(super) fn skipped(metadata: &[u8]) -> Option<Skipped> {
    #[derive(Deserialize)]
    struct List {
        metadata: Value,
        items: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        metadata: Names,
    }
    #[derive(Deserialize)]
    struct Names {
        #[serde(default)]
        namespace: String,
        name: String,
    }
    let List { metadata, items } = serde_json::from_slice(metadata).ok()?;
    let [Item { metadata: Names { namespace, name } }] = <[Item; 1]>::try_from(items).ok()?;
    let body = json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": []}).to_string().into();
    Some(Skipped { namespace, name, body })
}

fn parameter<'a>(uri: &'a Uri, name: &str) -> Option<&'a str> {
    uri.query()?.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

fn with_parameter(uri: &Uri, name: &str, value: u32) -> Uri {
    let is_it = |pair: &&str| pair.strip_prefix(name).is_some_and(|rest| rest.starts_with('='));
    let replaced = |pair: &str| if is_it(&pair) { format!("{name}={value}") } else { pair.to_owned() };
    let query: Vec<String> = uri.query().unwrap_or_default().split('&').map(replaced).collect();
    let mut parts = uri.clone().into_parts();
    // The parts of a valid URI and a number: the result is valid. Otherwise the caller's page is requested.
    let Ok(path) = PathAndQuery::try_from(format!("{}?{}", uri.path(), query.join("&"))) else { return uri.clone() };
    parts.path_and_query = Some(path);
    Uri::from_parts(parts).unwrap_or_else(|_| uri.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(uri: &str, sizes: &PageSizes) -> Option<Page> {
        Page::of(&Request::get(uri).body(Body::empty()).unwrap(), sizes)
    }

    #[test]
    fn only_a_list_in_pages_is_divided() {
        let sizes = PageSizes::default();
        for whole in ["/api/v1/pods", "/api/v1/pods?limit=0", "/api/v1/pods?limit=x", "/api/v1/pods?limit=500&resourceVersion=0"] {
            assert!(page(whole, &sizes).is_none(), "{whole}");
        }
        for divided in ["/api/v1/pods?limit=500", "/api/v1/pods?&limit=500&continue=abc", "/a?resourceVersion=07&limit=1"] {
            assert!(page(divided, &sizes).is_some(), "{divided}");
        }
    }

    #[test]
    fn pages_shrink_to_one_object_and_grow_again() {
        let sizes = PageSizes::default();
        let uri = "/api/v1/pods?labelSelector=a&limit=20&continue=x%3D";
        let mut first = page(uri, &sizes).unwrap();
        let mut seen = Vec::new();
        while first.shrink(&sizes) {
            seen.push(first.request().uri().to_string());
        }
        let expected = [10, 5, 2, 1].map(|size| format!("/api/v1/pods?labelSelector=a&limit={size}&continue=x%3D"));
        assert_eq!(seen, expected);
        let mut limits = Vec::new();
        for bytes in [MAX_PAGE_BYTES, 0, 0, SMALL_PAGE_BYTES + 1, 0, 0, 0, 0] {
            let next = page(uri, &sizes).unwrap();
            limits.push(next.size);
            next.fitted(bytes, &sizes);
        }
        assert_eq!(limits, [1, 1, 2, 4, 4, 8, 16, 20]);
        assert!(sizes.0.lock().is_empty(), "nothing is held for lists whose pages fit");
    }

    #[test]
    fn an_object_that_is_left_out_is_named_and_the_list_goes_on() {
        let list = json!({
            "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"resourceVersion": "7", "continue": "next", "remainingItemCount": 3},
            "items": [{"metadata": {"namespace": "shop", "name": "large", "annotations": {"a": "b"}}}],
        });
        let skipped = skipped(list.to_string().as_bytes()).unwrap();
        assert_eq!((&*skipped.namespace, &*skipped.name), ("shop", "large"));
        let body: Value = serde_json::from_slice(&skipped.body).unwrap();
        assert_eq!((&body["metadata"], body["items"].as_array().map(Vec::len)), (&list["metadata"], Some(0)));
        for other in [json!({"metadata": {}, "items": []}), json!({"items": [{"metadata": {"name": "a"}}]}), json!([])] {
            assert_eq!(super::skipped(other.to_string().as_bytes()), None, "{other}");
        }
    }
}
