//! The encoded forms of certificates and bundles. Each is encoded once and shared by all streams that send it.

use std::fmt;

use bytes::Bytes;
use parking_lot::Mutex;
use zeroize::Zeroizing;

use crate::material::Attached;

/// The protocol variant that a resource is encoded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// SotW SDS: `DiscoveryResponse.resources`.
    Sotw,
    /// Incremental SDS: `DeltaDiscoveryResponse.resources`.
    Delta,
}

/// The encoded forms of one certificate or bundle. Each is encoded once, shared by all receivers, and wiped with its last reference.
#[derive(Default)]
pub struct EncodedCache(Mutex<Vec<(Variant, Box<str>, Bytes)>>);

impl EncodedCache {
    /// Returns the encoding for (`variant`, `name`). Calls `encode` at the first use.
    pub fn get_or_encode(&self, variant: Variant, name: &str, encode: impl FnOnce() -> Zeroizing<Vec<u8>>) -> Bytes {
        let mut forms = self.0.lock();
        if let Some((_, _, bytes)) = forms.iter().find(|(f, n, _)| *f == variant && &**n == name) {
            return bytes.clone();
        }
        let bytes = Bytes::from_owner(encode());
        forms.push((variant, name.into(), bytes.clone()));
        bytes
    }
}

impl fmt::Debug for EncodedCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EncodedCache(redacted)")
    }
}

/// Returns the encoding for (`variant`, `name`) from the cache in `attached`. Calls `encode` at the first use.
pub fn of(attached: &Attached, variant: Variant, name: &str, encode: impl FnOnce() -> Zeroizing<Vec<u8>>) -> Bytes {
    match attached.get::<EncodedCache>() {
        Some(cache) => cache.get_or_encode(variant, name, encode),
        // Another value is attached, so there is no cache.
        None => Bytes::from_owner(encode()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_encoding_is_made_once_for_each_variant_and_name() {
        let encoded = EncodedCache::default();
        let mut made = 0;
        for (variant, name) in [(Variant::Delta, "a"), (Variant::Delta, "a"), (Variant::Sotw, "a"), (Variant::Delta, "b")] {
            encoded.get_or_encode(variant, name, || {
                made += 1;
                Zeroizing::new(vec![1])
            });
        }
        assert_eq!(made, 3);
    }
}
