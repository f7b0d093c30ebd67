//! A file that is read again after each change.
//!
//! The watch is on the directory, because files are replaced rather than rewritten: Kubernetes swaps a symlink beside the file, and editors
//! rename over it. If the file is a link to another directory, that directory is watched too. The caller runs [`Followed::run`] inside a
//! runtime with I/O.

use std::{
    collections::BTreeSet,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::{io::AsyncReadExt, sync::mpsc, time::timeout};

/// Target of this module's log lines.
const LOG_TARGET: &str = "sds_agent::file";

/// Changes arrive in bursts: the file is read after a pause of this length.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Interval of attempts while the directory cannot be watched, for example because it does not exist.
const RECHECK_INTERVAL: Duration = Duration::from_secs(30);

#[cfg(any(test, feature = "testing"))]
mod mounted;
#[cfg(any(test, feature = "testing"))]
pub use mounted::MountedFile;

/// Reads the file at `path` once, and at most one byte more than `limit`, so that a longer file is recognised. Blocks.
///
/// # Errors
///
/// The file cannot be opened or read.
pub fn read(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(with_one_more(limit)).read_to_end(&mut content)?;
    Ok(content)
}

fn with_one_more(limit: usize) -> u64 {
    u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1)
}

/// A file to follow.
#[derive(Debug)]
pub struct Followed {
    path: PathBuf,
    limit: usize,
}

impl Followed {
    /// Follows the file at `path`, of at most `limit` bytes. Watching begins with [`run`](Self::run).
    pub fn new(path: PathBuf, limit: usize) -> Self {
        Self { path, limit }
    }

    /// Reports the current content, and then each different content or kind of error, without an end. A file that is longer than the limit
    /// is reported with one byte more than the limit.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the watch. A new call reports the current content again.
    pub async fn run(&self, mut tell: impl FnMut(Result<&[u8], &io::Error>)) {
        let mut last: Option<Result<Vec<u8>, io::ErrorKind>> = None;
        loop {
            // The watches are set before the file is read, so that no change is missed. They are set again each time, because links change.
            let (changes, mut changed) = mpsc::channel(1);
            let watcher = Self::watch(self.directories().await, changes);
            if let Err(error) = &watcher {
                let path = self.path.display();
                tracing::warn!(target: LOG_TARGET, file = %path, %error, "cannot watch the file's directory; retrying in 30 s");
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
                    // A directory that changes without a pause must not prevent the file from being read.
                    let _ = timeout(10 * DEBOUNCE, settled).await;
                }
                Err(_) => tokio::time::sleep(RECHECK_INTERVAL).await,
            }
        }
    }

    fn watch(directories: BTreeSet<PathBuf>, changes: mpsc::Sender<()>) -> notify::Result<RecommendedWatcher> {
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the file is an event too, but not a change. If the channel is full, a change is already pending.
            if event.map_or(true, |event| !event.kind.is_access()) {
                let _ = changes.try_send(());
            }
        })?;
        for directory in directories {
            watcher.watch(&directory, RecursiveMode::NonRecursive)?;
        }
        Ok(watcher)
    }

    /// Returns the directory of the path and the directory of the file that it resolves to.
    async fn directories(&self) -> BTreeSet<PathBuf> {
        let parent = |path: &Path| match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let real = tokio::fs::canonicalize(&self.path).await.ok();
        std::iter::once(parent(&self.path)).chain(real.as_deref().map(parent)).collect()
    }

    /// Reads the content, and at most one byte more than the limit.
    async fn content(&self) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        tokio::fs::File::open(&self.path).await?.take(with_one_more(self.limit)).read_to_end(&mut content).await?;
        Ok(content)
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests write the file")]
mod tests {
    use std::fs;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// The reports about a file, in order.
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

        /// Reads reports until one equals `wanted`. Contents in between may have been replaced before they were read.
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
        assert_eq!(read(&file.path(), 4).unwrap(), b"01234");
        assert_eq!(read(&file.path(), 10).unwrap(), b"0123456789");
    }
}
