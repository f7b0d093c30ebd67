//! One file, read again whenever it changes.
//!
//! What is watched is the directory, because files are replaced rather than rewritten: Kubernetes swaps a symlink beside the file, and
//! editors rename over it. Where the file is a link to another directory, that one is watched too. The caller runs
//! [`Followed::run`] inside a runtime with I/O.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::{io::AsyncReadExt, sync::mpsc, time::timeout};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::file";

/// Changes come in bursts: the file is read when they have paused for so long.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Where the directory itself is missing, it is looked for again after this time.
const RECHECK_INTERVAL: Duration = Duration::from_secs(30);

#[cfg(any(test, feature = "testing"))]
mod mounted;
#[cfg(any(test, feature = "testing"))]
pub use mounted::MountedFile;

/// A watched file.
#[derive(Debug)]
pub struct Followed {
    path: PathBuf,
    limit: usize,
}

impl Followed {
    /// The file at `path`, of at most `limit` bytes.
    pub fn new(path: PathBuf, limit: usize) -> Self {
        Self { path, limit }
    }

    /// Tells of the content now, and of each other content or failure from now on; for ever. A file that is longer than the limit is told
    /// of with one byte more than that.
    pub async fn run(&self, mut tell: impl FnMut(Result<&[u8], &io::Error>)) {
        let mut last: Option<Result<Vec<u8>, io::ErrorKind>> = None;
        loop {
            // The watches are set before the file is read, so that no change falls between; and anew each time, because links move.
            let (changes, mut changed) = mpsc::channel(1);
            let watcher = Self::watch(self.directories().await, changes);
            if let Err(error) = &watcher {
                let path = self.path.display();
                tracing::warn!(target: LOG_TARGET, file = %path, %error, "cannot watch the file's directory; looking again in half a minute");
            }
            let now = self.content().await;
            let comparable = now.as_ref().map(Vec::clone).map_err(io::Error::kind);
            if last.as_ref() != Some(&comparable) {
                tell(now.as_deref());
                last = Some(comparable);
            }
            match &watcher {
                Ok(_) => {
                    changed.recv().await;
                    let settled = async { while timeout(DEBOUNCE, changed.recv()).await.is_ok() {} };
                    // A directory in which something always changes must not hide the file.
                    let _ = timeout(10 * DEBOUNCE, settled).await;
                }
                Err(_) => tokio::time::sleep(RECHECK_INTERVAL).await,
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

    /// The content, and one byte more than is allowed where it is too long.
    async fn content(&self) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        let limit = u64::try_from(self.limit).unwrap_or(u64::MAX).saturating_add(1);
        tokio::fs::File::open(&self.path).await?.take(limit).read_to_end(&mut content).await?;
        Ok(content)
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests write the file")]
mod tests {
    use std::fs;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// What is reported of a file, one after another.
    struct Reports(mpsc::UnboundedReceiver<Result<String, io::ErrorKind>>);

    impl Reports {
        fn of(path: PathBuf, limit: usize) -> Self {
            let (report, reports) = mpsc::unbounded_channel();
            tokio::spawn(async move {
                let text = |content: &[u8]| String::from_utf8(content.to_owned()).unwrap();
                Followed::new(path, limit).run(|content| drop(report.send(content.map(text).map_err(io::Error::kind)))).await;
            });
            Self(reports)
        }

        async fn next(&mut self) -> Result<String, io::ErrorKind> {
            timeout(PATIENCE, self.0.recv()).await.expect("nothing is reported").unwrap()
        }

        /// Reports until one is this; contents in between may have been replaced before they were read.
        async fn until(&mut self, wanted: Result<&str, io::ErrorKind>) {
            while self.next().await.as_deref().map_err(|kind| *kind) != wanted {}
        }
    }

    #[tokio::test]
    async fn a_mounted_config_map_is_followed_through_its_swaps() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = MountedFile::new(folder.path(), "ca.crt", "one");
        let mut reports = Reports::of(file.path(), 100);
        assert_eq!(reports.next().await, Ok("one".to_owned()));
        for text in ["two", "three"] {
            file.publish(text);
            reports.until(Ok(text)).await;
        }
        file.publish("four");
        file.publish("five");
        reports.until(Ok("five")).await;
    }

    #[tokio::test]
    async fn a_file_is_followed_through_rewrites_renames_and_absence() {
        let folder = tempfile::tempdir().unwrap();
        let (path, beside) = (folder.path().join("file"), folder.path().join("beside"));
        let mut reports = Reports::of(path.clone(), 100);
        assert_eq!(reports.next().await, Err(io::ErrorKind::NotFound));
        fs::write(&path, "one").unwrap();
        reports.until(Ok("one")).await;
        fs::write(&beside, "two").unwrap();
        fs::rename(&beside, &path).unwrap();
        reports.until(Ok("two")).await;
        fs::remove_file(&path).unwrap();
        reports.until(Err(io::ErrorKind::NotFound)).await;
    }

    #[tokio::test]
    async fn the_same_content_again_is_not_reported() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = MountedFile::new(folder.path(), "file", "one");
        let mut reports = Reports::of(file.path(), 100);
        assert_eq!(reports.next().await, Ok("one".to_owned()));
        file.publish("one");
        assert!(timeout(10 * DEBOUNCE, reports.0.recv()).await.is_err());
        file.publish("two");
        assert_eq!(reports.next().await, Ok("two".to_owned()));
    }

    #[tokio::test]
    async fn a_long_file_is_reported_with_one_byte_more_than_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let file = MountedFile::new(folder.path(), "file", "0123456789");
        assert_eq!(Reports::of(file.path(), 4).next().await, Ok("01234".to_owned()));
    }
}
