//! A PEM file as a source of a trust bundle, read again when it changes.
//!
//! What is watched is the directory, because files are replaced rather than rewritten: Kubernetes swaps a symlink beside the file, and
//! editors rename over it. Where the file is a link to another directory, that one is watched too. The caller runs
//! [`FileSource::run`] inside a runtime with I/O.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::{io::AsyncReadExt, sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{material::MAX_PEM_BYTES, trust::Source};

/// Changes come in bursts: the file is read when they have paused for so long.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Where the directory itself is missing, it is looked for again after this time.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// A watched file.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    source: Source,
}

impl FileSource {
    /// The name for [`Trust::source`](crate::trust::Trust::source).
    pub fn source_name(path: &Path) -> String {
        format!("file {}", path.display())
    }

    /// The file at `path`, offered to `source`.
    pub fn new(path: PathBuf, source: Source) -> Self {
        Self { path, source }
    }

    /// Reads the file, and again at each change until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.follow() => {}
        }
    }

    async fn follow(&self) {
        let mut last: Option<Result<Vec<u8>, io::ErrorKind>> = None;
        loop {
            // The watches are set before the file is read, so that no change falls between; and anew each time, because links move.
            let (changes, mut changed) = mpsc::channel(1);
            let watcher = Self::watch(self.directories().await, changes);
            if let Err(error) = &watcher {
                tracing::warn!(source = self.source.name(), %error, "cannot watch the file's directory; looking again in half a minute");
            }
            self.read(&mut last).await;
            match &watcher {
                Ok(_) => {
                    changed.recv().await;
                    let settled = async { while timeout(DEBOUNCE, changed.recv()).await.is_ok() {} };
                    // A directory in which something always changes must not hide the file.
                    let _ = timeout(10 * DEBOUNCE, settled).await;
                }
                Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    fn watch(directories: BTreeSet<PathBuf>, changes: mpsc::Sender<()>) -> notify::Result<RecommendedWatcher> {
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the file is an event too, but not a change. A full channel already says that something happened.
            if event.map_or(true, |event| !event.kind.is_access()) {
                let _ = changes.try_send(());
            }
        })?;
        for directory in directories {
            watcher.watch(&directory, RecursiveMode::NonRecursive)?;
        }
        Ok(watcher)
    }

    /// Where the file is named, and where it really lies.
    async fn directories(&self) -> BTreeSet<PathBuf> {
        let parent = |path: &Path| match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let real = tokio::fs::canonicalize(&self.path).await.ok();
        std::iter::once(parent(&self.path)).chain(real.as_deref().map(parent)).collect()
    }

    async fn read(&self, last: &mut Option<Result<Vec<u8>, io::ErrorKind>>) {
        let now = self.content().await;
        let comparable = now.as_ref().map(Vec::clone).map_err(io::Error::kind);
        if last.as_ref() == Some(&comparable) {
            return;
        }
        match now {
            // A refusal is counted and logged there.
            Ok(pem) => drop(self.source.offer(&pem)),
            Err(error) => self.source.missing(format_args!("cannot read the file: {error}")),
        }
        *last = Some(comparable);
    }

    /// The content, and one byte more than is allowed where it is too long.
    async fn content(&self) -> io::Result<Vec<u8>> {
        let mut pem = Vec::new();
        let limit = u64::try_from(MAX_PEM_BYTES).unwrap_or(u64::MAX).saturating_add(1);
        tokio::fs::File::open(&self.path).await?.take(limit).read_to_end(&mut pem).await?;
        Ok(pem)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use tokio::sync::watch;

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

        // Neither garbage nor a missing file takes a good bundle away; a file renamed into its place is read.
        fs::write(&path, "garbage").unwrap();
        fs::remove_file(&path).unwrap();
        let beside = directory.path().join("new");
        fs::write(&beside, &third).unwrap();
        fs::rename(&beside, &path).unwrap();
        assert!(same(&world.next().await, &third));
    }

    #[tokio::test]
    async fn a_mounted_config_map_is_followed_through_its_symlink_swap() {
        let mount = tempfile::tempdir().unwrap();
        let at = |name: &str| mount.path().join(name);
        let publish = |version: &str, pem: &str| {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("ca.crt"), pem).unwrap();
            symlink(version, at("..data_tmp")).unwrap();
            fs::rename(at("..data_tmp"), at("..data")).unwrap();
        };
        let (first, second, third) = (pem(), pem(), pem());
        publish("..1", &first);
        symlink("..data/ca.crt", at("ca.crt")).unwrap();
        let mut world = World::new(&at("ca.crt"));
        assert!(same(&world.next().await, &first));
        publish("..2", &second);
        fs::remove_dir_all(at("..1")).unwrap();
        assert!(same(&world.next().await, &second));
        publish("..3", &third);
        assert!(same(&world.next().await, &third));
    }
}
