//! Offers the content of a trust source when it changes. An unchanged result of a read is neither offered nor logged again.

use std::fmt;

use aws_lc_rs::digest;
use sds_server::trust::Source;

/// Offers content to a source when it differs from the last content.
pub(super) struct ChangedContent {
    source: Source,
    last: Option<Found>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Content([u8; 32]),
    Nothing(Missing),
}

/// The cause for which a source has no content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// The object does not exist, or no object is selected.
    Object,
    /// The object has no such key.
    Key,
    /// The API server does not serve the kind of object.
    Kind,
}

impl fmt::Debug for ChangedContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChangedContent").field("source", &self.source.name()).finish_non_exhaustive()
    }
}

impl ChangedContent {
    /// Nothing has been read yet.
    pub(super) fn new(source: Source) -> Self {
        Self { source, last: None }
    }

    /// The source has this content. A refusal is counted and logged by the source.
    pub(super) fn offer(&mut self, pem: &[u8]) {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, pem).as_ref());
        if self.changes_to(Found::Content(hash)) {
            let _ = self.source.offer(pem);
        }
    }

    /// The source has no content; `why` is for the operator.
    pub(super) fn missing(&mut self, missing: Missing, why: impl fmt::Display) {
        if self.changes_to(Found::Nothing(missing)) {
            self.source.missing(why);
        }
    }

    fn changes_to(&mut self, found: Found) -> bool {
        self.last.replace(found) != Some(found)
    }
}
