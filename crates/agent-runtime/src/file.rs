//! A file that is read again after each change.
//!
//! The watch is on directories, because files are replaced rather than rewritten: Kubernetes swaps a symlink beside the file, and editors
//! rename over it. Every directory is watched through which the path leads, because any link or directory on the way can be replaced while
//! the former file still exists. The caller runs [`Followed::run`] inside a runtime with I/O.

use std::{
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
/// Interval at which the file is read while a directory on the way cannot be watched, for example because it is not readable.
const RECHECK_INTERVAL: Duration = Duration::from_secs(30);

mod route;

use route::Route;

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
        let mut announced = None;
        loop {
            // The watches are set before the file is read, so that no change is missed. They are set again each time, because links change.
            let (changes, mut changed) = mpsc::channel(1);
            let route = self.route().await;
            let (watcher, failure) = Self::watch(route.clone(), changes);
            self.announce(failure.as_ref(), &mut announced);
            // A link that changed before its watch was set may lead through directories without a watch.
            let is_watched = self.route().await == route;
            let now = self.content().await;
            let comparable = now.as_ref().map(Vec::clone).map_err(io::Error::kind);
            if last.as_ref() != Some(&comparable) {
                tell(now.as_deref());
                last = Some(comparable);
            }
            let limit = match &failure {
                _ if !is_watched => DEBOUNCE,
                None => Duration::MAX,
                Some(_) => RECHECK_INTERVAL,
            };
            let change = async {
                // Without a watcher the channel is closed.
                if changed.recv().await.is_none() {
                    std::future::pending::<()>().await;
                }
            };
            if timeout(limit, change).await.is_ok() {
                let settled = async { while timeout(DEBOUNCE, changed.recv()).await.is_ok() {} };
                // A directory that changes without a pause must not prevent the file from being read.
                let _ = timeout(10 * DEBOUNCE, settled).await;
            }
            drop(watcher);
        }
    }

    /// Logs the failure of a watch if it differs from the one that was logged last.
    fn announce(&self, failure: Option<&notify::Error>, announced: &mut Option<String>) {
        let words = failure.map(ToString::to_string);
        if let Some(error) = words.as_ref().filter(|words| announced.as_ref() != Some(words)) {
            let path = self.path.display();
            tracing::warn!(target: LOG_TARGET, file = %path, error, "cannot watch every directory of the file's path; reading it every 30 s");
        }
        *announced = words;
    }

    /// Watches the directories of `route`, and reports what may change it. Returns the first failure; the other directories are watched.
    fn watch(route: Route, changes: mpsc::Sender<()>) -> (Option<RecommendedWatcher>, Option<notify::Error>) {
        let directories = route.directories().to_vec();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the file is an event too, but not a change. An event without a path reports that events were lost.
            let is_change = |event: notify::Event| {
                !event.kind.is_access() && (event.paths.is_empty() || event.paths.iter().any(|path| route.concerns(path)))
            };
            if event.map_or(true, is_change) {
                // If the channel is full, a change is already pending.
                let _ = changes.try_send(());
            }
        });
        let mut watcher = match watcher {
            Ok(watcher) => watcher,
            Err(error) => return (None, Some(error)),
        };
        // All of them, before the first failure is taken.
        let results: Vec<_> = directories.iter().map(|directory| watcher.watch(directory, RecursiveMode::NonRecursive)).collect();
        (Some(watcher), results.into_iter().find_map(Result::err))
    }

    /// The route of the path as it is now.
    async fn route(&self) -> Route {
        let path = self.path.clone();
        tokio::task::spawn_blocking(move || Route::of(&path)).await.unwrap_or_default()
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
    use std::{fs, os::unix::fs::symlink, time::Instant};

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

    /// Replaces the link at `link` at once, and deletes nothing.
    fn swap(link: &Path, target: &str) {
        let beside = link.with_extension("new");
        symlink(target, &beside).unwrap();
        fs::rename(&beside, link).unwrap();
    }

    #[tokio::test]
    async fn a_link_in_the_middle_of_the_way_is_followed_when_it_is_swapped() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        for (directory, text) in [("one", "one"), ("two", "two"), ("three", "three")] {
            fs::create_dir_all(at(directory).join("sub")).unwrap();
            fs::write(at(directory).join("sub/file"), text).unwrap();
        }
        // file -> b -> c, and from there through two links of a directory.
        for (link, target) in [("links/c", "../hop/data/sub/file"), ("hop/data", "../one"), ("entry/b", "../links/c"), ("entry/file", "b")]
        {
            fs::create_dir_all(at(link).parent().unwrap()).unwrap();
            symlink(target, at(link)).unwrap();
        }
        let mut reports = Reports::of(at("entry/file"), 100);
        assert_eq!(reports.next().await, Ok("one".to_owned()));
        let mut times = Vec::new();
        for (link, target, text) in [
            ("hop/data", "../two", "two"),
            ("links/c", "../three/sub/file", "three"),
            ("entry/b", "../one/sub/file", "one"),
            ("entry/file", "../two/sub/file", "two"),
        ] {
            let start = Instant::now();
            swap(&at(link), target);
            assert_eq!(reports.next().await, Ok(text.to_owned()), "{link}");
            times.push(start.elapsed());
        }
        // The fastest one, so that a busy machine does not fail the test.
        assert!(times.iter().min() < Some(&Duration::from_secs(1)), "{times:?}");
        // A directory on the way is replaced, and nothing is deleted.
        fs::create_dir_all(at("beside/sub")).unwrap();
        fs::write(at("beside/sub/file"), "beside").unwrap();
        fs::rename(at("two"), at("former")).unwrap();
        fs::rename(at("beside"), at("two")).unwrap();
        reports.until(Ok("beside")).await;
    }

    #[tokio::test]
    async fn a_file_is_read_when_its_directory_comes_later() {
        let folder = tempfile::tempdir().unwrap();
        let mut reports = Reports::of(folder.path().join("later/sub/file"), 100);
        assert_eq!(reports.next().await, Err(io::ErrorKind::NotFound));
        let start = Instant::now();
        fs::create_dir_all(folder.path().join("beside/sub")).unwrap();
        fs::write(folder.path().join("beside/sub/file"), "one").unwrap();
        fs::rename(folder.path().join("beside"), folder.path().join("later")).unwrap();
        reports.until(Ok("one")).await;
        assert!(start.elapsed() < RECHECK_INTERVAL);
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
