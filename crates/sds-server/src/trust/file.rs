//! A PEM file as a source of a trust bundle; it is read again when it changes. The caller runs [`FileSource::run`] in a tokio runtime with
//! I/O.

use std::path::{Path, PathBuf};

use agent_runtime::file::Followed;
use tokio_util::sync::CancellationToken;

use crate::{material::MAX_PEM_BYTES, trust::Source};

/// A watched file.
#[derive(Debug)]
pub struct FileSource {
    file: Followed,
    source: Source,
}

impl FileSource {
    /// The name of the source for [`Trust::source`](crate::trust::Trust::source).
    pub fn source_name(path: &Path) -> String {
        format!("file {}", path.display())
    }

    /// Follows the file at `path` and offers its content to `source`.
    pub fn new(path: PathBuf, source: Source) -> Self {
        Self { file: Followed::new(path, MAX_PEM_BYTES), source }
    }

    /// Reads the file now and after each change, until `shutdown` is cancelled.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the file is no longer followed. The last good bundle stays in use.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { file, source } = self;
        let follow = file.run(|content| match content {
            // `offer` logs and counts a refusal.
            Ok(pem) => drop(source.offer(pem)),
            Err(error) => source.missing(format_args!("cannot read the file: {error}")),
        });
        shutdown.run_until_cancelled(follow).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use tokio::{sync::watch, time::timeout};

    use super::*;
    use crate::trust::{BundleSet, Metrics, Trust};

    fn pem() -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap().pem()
    }

    struct World {
        bundles: watch::Receiver<std::sync::Arc<BundleSet>>,
        shutdown: CancellationToken,
    }

    impl World {
        fn new(path: &Path) -> Self {
            let trust = Trust::new(Metrics::default());
            let source = FileSource::new(path.to_owned(), trust.source(None, &FileSource::source_name(path)));
            let shutdown = CancellationToken::new();
            tokio::spawn(source.run(shutdown.clone()));
            Self { bundles: trust.subscribe(), shutdown }
        }

        async fn next(&mut self) -> String {
            timeout(Duration::from_secs(20), self.bundles.changed()).await.expect("no new bundle").unwrap();
            let pem = self.bundles.borrow_and_update().own.as_ref().unwrap().roots.to_pem();
            String::from_utf8(pem).unwrap()
        }
    }

    impl Drop for World {
        fn drop(&mut self) {
            self.shutdown.cancel();
        }
    }

    fn same(a: &str, b: &str) -> bool {
        let text = |pem: &str| pem.split_whitespace().collect::<String>();
        text(a) == text(b)
    }

    #[tokio::test]
    async fn a_file_is_followed_through_rewrites_renames_and_bad_content() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("roots.pem");
        let (first, second, third) = (pem(), pem(), pem());
        fs::write(&path, &first).unwrap();
        let mut world = World::new(&path.clone());
        assert!(same(&world.next().await, &first));

        fs::write(&path, &second).unwrap();
        assert!(same(&world.next().await, &second));

        // Neither invalid content nor a missing file removes a good bundle. A file that is renamed to the path is read.
        fs::write(&path, "garbage").unwrap();
        fs::remove_file(&path).unwrap();
        let beside = directory.path().join("new");
        fs::write(&beside, &third).unwrap();
        fs::rename(&beside, &path).unwrap();
        assert!(same(&world.next().await, &third));
    }
}
