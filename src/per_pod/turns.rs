//! Changes of the file system, one at a time.

use std::sync::Arc;

use tokio::sync::Semaphore;

/// Runs changes one at a time on a blocking thread. Clones share the turns.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl Turns {
    /// Runs `change` when all changes before it have completed. Returns `None` if the runtime is shutting down, or if `change` panics.
    ///
    /// # Cancel safety
    ///
    /// A change that has not started does not start if the future is dropped. One that has started completes.
    pub async fn run<T: Send + 'static>(&self, change: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let turn = self.0.clone().acquire_owned().await.ok()?;
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            change()
        });
        done.await.ok()
    }
}
